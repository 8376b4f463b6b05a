// SPDX-License-Identifier: MIT
// What forward and backward share where lanes are channels.
#pragma once

#include "maps.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Vectors that hold the channels of one work item.
template <class A>
constexpr int kGroups = int(2 * kChannelBlock / kLanes<A>);

// First channel of a group.
template <class A>
KPFUSED_INLINE int64_t group_begin(int64_t group, int64_t channels) {
  return at_most(group * kLanes<A>, channels - kLanes<A>);
}

// Chunks of pixels, each with all channels of a block. Fewer channels than lanes are padded to a vector.
template <class T>
KPFUSED_INLINE Tiling lane_chunks(int64_t rows, int64_t cols, int64_t channels) {
  constexpr int64_t L = kLanes<Acc<T>>, size = sizeof(T);
  const int64_t pixels = channels < L ? kGatherBytes / (L * size) : at_least(kChunkBytes / (channels * size), 32);
  return tile(rows, cols, pixels, 1);
}

// Copies pixels of `channels` elements each: from and to rows of pixels with the given strides.
template <class T>
KPFUSED_INLINE void copy_pixels(const T* from, int64_t from_y, int64_t from_x, T* to, int64_t to_y, int64_t to_x,
                                int64_t rows, int64_t cols, int64_t channels) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t k = 0; k < channels; ++k) to[r * to_y + c * to_x + k] = from[r * from_y + c * from_x + k];
    }
  }
}

}  // namespace kpfused::cpu::KPFUSED_ISA
