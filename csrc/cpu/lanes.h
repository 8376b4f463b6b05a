// SPDX-License-Identifier: MIT
// What forward and backward share where lanes are channels.
#pragma once

#include "counting.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Vectors that hold the channels of one work item.
template <class A>
constexpr int kGroups = int(2 * kChannelBlock / kLanes<A>);

// First channel of a group.
template <class A>
KPFUSED_INLINE int64_t group_begin(int64_t group, int64_t channels) {
  return at_most(group * kLanes<A>, channels - kLanes<A>);
}

// Chunks of pixels, each with all channels of a block.
template <class T>
KPFUSED_INLINE Tiling lane_chunks(int64_t rows, int64_t cols, int64_t channels) {
  return tile(rows, cols, at_least(kChunkBytes / (channels * int64_t(sizeof(T))), 32), 1);
}

// Channels of a block as a buffer holds them: at least a vector.
template <class A>
KPFUSED_INLINE int64_t padded_channels(int64_t channels) {
  return at_least(channels, kLanes<A>);
}

// Pixels that a buffer of `bytes` takes.
template <class T>
KPFUSED_INLINE Tiling buffer_chunks(int64_t rows, int64_t cols, int64_t channels) {
  return tile(rows, cols, kGatherBytes / (padded_channels<Acc<T>>(channels) * int64_t(sizeof(T))), 1);
}

// Which pixels count, for every channel of a block, and what stands in place of the others.
template <class T>
struct LanesCounting {
  int64_t channels;
  bool one_mask, one_size;  // for all channels
  int64_t between;  // the masks of two channels
  Counting each[2 * kChannelBlock];
  T weightless[2 * kChannelBlock];

  LanesCounting(const PixelView& pixels, const MapView& view, const BetaView& beta, int64_t first_map, int64_t count)
      : channels(count), one_mask(!pixels.mask || pixels.mask_view.stride_inner == 0),
        one_size(!pixels.sizes || pixels.modulus == 1 || pixels.divisor % view.inner == 0),
        between(pixels.mask_view.stride_inner) {
    for (int64_t k = 0; k < channels; ++k) {
      each[k] = counting_of(pixels, view, first_map + k);
      weightless[k] = KPFUSED_ISA::weightless<T>(sharpness(beta_of<Acc<T>>(beta, first_map + k)).sign);
    }
  }

  // Copies pixels of `channels` elements each, from and to rows of pixels with the given strides. Channels of pixels that
  // do not count get `otherwise`.
  void copy(const T* from, int64_t from_y, int64_t from_x, T* to, int64_t to_y, int64_t to_x, const PixelRange& range,
            const T* otherwise) const {
    for (int64_t r = 0; r < range.rows; ++r) {
      for (int64_t c = 0; c < range.cols; ++c) {
        const T* p = from + r * from_y + c * from_x;
        T* out = to + r * to_y + c * to_x;
        const int64_t row = range.row + r, col = range.col + c;
        if (one_mask && one_size) {
          copy_channels<false>(each[0].at(row, col) ? p : otherwise, out, channels, nullptr, otherwise);
        } else if (one_size && (row >= each[0].rows || col >= each[0].cols)) {
          copy_channels<false>(otherwise, out, channels, nullptr, otherwise);
        } else if (one_size && between == 1) {
          copy_channels<true>(p, out, channels, each[0].mask + row * each[0].stride_y + col * each[0].stride_x, otherwise);
        } else if (one_size) {
          const uint8_t* mask = each[0].mask + row * each[0].stride_y + col * each[0].stride_x;
          for (int64_t k = 0; k < channels; ++k) out[k] = mask[k * between] ? p[k] : otherwise[k];
        } else {
          for (int64_t k = 0; k < channels; ++k) out[k] = each[k].at(row, col) ? p[k] : otherwise[k];
        }
      }
    }
  }
};

}  // namespace kpfused::cpu::KPFUSED_ISA
