// SPDX-License-Identifier: MIT
// float16 as bits. A header of its own, as CUDA's is long and each file is compiled for every architecture.
#pragma once

#include "element.h"

#if !defined(KPFUSED_SIMT)
#include <cuda_fp16.h>
#endif

namespace kpfused::cuda {

#if defined(KPFUSED_SIMT)
inline float widen(Float16 x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, sizeof(half));
  return static_cast<float>(half);
}
inline uint32_t narrow_pair(Float16, float low, float high) {
  const _Float16 pair[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
  uint32_t bits;
  std::memcpy(&bits, pair, sizeof(bits));
  return bits;
}
#else
KPFUSED_DEVICE float widen(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
// Two at a time is what the hardware has an instruction for.
KPFUSED_DEVICE uint32_t narrow_pair(Float16, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
#endif

}  // namespace kpfused::cuda
