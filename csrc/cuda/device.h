// SPDX-License-Identifier: MIT
// The one place that includes CUDA. Kernels use what is named here and a few built-ins of the language, no inline PTX, so
// that tests/simt can run the same sources on a CPU: there KPFUSED_SIMT is defined and simt.h stands in for CUDA.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(KPFUSED_SIMT)
#include "simt.h"
#define KPFUSED_DEVICE inline
#define KPFUSED_SHARED(type, name) type* const name = static_cast<type*>(simt::shared_memory())
#define KPFUSED_LAUNCH(kernel, grid, block, shared_bytes, stream, params) \
  simt::launch(#kernel, grid, block, shared_bytes, [&] { kernel(params); })
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define KPFUSED_DEVICE __device__ __forceinline__
// The block's dynamic shared memory as an array of `type`.
#define KPFUSED_SHARED(type, name)                              \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#define KPFUSED_LAUNCH(kernel, grid, block, shared_bytes, stream, params) \
  kernel<<<grid, block, shared_bytes, stream>>>(params)
#endif

namespace kpfused::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// float: one MUFU.EX2 under -ftz=true. double: the math library's.
struct Exp2 {
  KPFUSED_DEVICE float operator()(float x) const { return exp2f(x); }
  KPFUSED_DEVICE double operator()(double x) const { return exp2(x); }
};

// Half-precision values as bits. Converting two at a time is what the hardware has an instruction for.
#if defined(KPFUSED_SIMT)
inline float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}
inline uint16_t float_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float float16_to_float(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, sizeof(x));
  return static_cast<float>(x);
}
inline uint16_t float_to_float16(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof(bits));
  return bits;
}
inline uint32_t floats_to_bfloat16(float low, float high) {
  return float_to_bfloat16(low) | static_cast<uint32_t>(float_to_bfloat16(high)) << 16;
}
inline uint32_t floats_to_float16(float low, float high) {
  return float_to_float16(low) | static_cast<uint32_t>(float_to_float16(high)) << 16;
}
#else
KPFUSED_DEVICE float bfloat16_to_float(uint16_t bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
KPFUSED_DEVICE float float16_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
KPFUSED_DEVICE uint32_t floats_to_bfloat16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
KPFUSED_DEVICE uint32_t floats_to_float16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
#endif

}  // namespace kpfused::cuda
