// SPDX-License-Identifier: MIT
// The one place that includes CUDA, but for half precision (float16.h, bfloat16.h). Kernels use what is named here and a
// few built-ins of the language, no inline PTX, so that tests/simt can run the same sources on a CPU: there KPFUSED_SIMT
// is defined and simt.h stands in for CUDA.
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

}  // namespace kpfused::cuda
