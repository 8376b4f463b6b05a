// SPDX-License-Identifier: MIT
// bfloat16 as bits. A header of its own, as CUDA's is long and each file is compiled for every architecture.
#pragma once

#include "element.h"

#if !defined(KPFUSED_SIMT)
#include <cuda_bf16.h>
#endif

namespace kpfused::cuda {

#if defined(KPFUSED_SIMT)
inline float widen(Bfloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}
inline uint16_t narrow_one(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline uint32_t narrow_pair(Bfloat16, float low, float high) {
  return narrow_one(low) | static_cast<uint32_t>(narrow_one(high)) << 16;
}
#else
KPFUSED_DEVICE float widen(Bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
// Two at a time is what the hardware has an instruction for.
KPFUSED_DEVICE uint32_t narrow_pair(Bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
#endif

}  // namespace kpfused::cuda
