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

// Vectors of channels that a chunk is read for at once.
constexpr int kLaneVectors = 4;

// Chunks of pixels, each with all channels of a block. What is read twice in a row has kChunkBytes at most.
template <class T>
KPFUSED_INLINE Tiling lane_chunks(int64_t rows, int64_t cols, int64_t channels) {
  const int64_t at_once = at_most(channels, kLaneVectors * kLanes<Acc<T>>);
  return tile(rows, cols, kChunkBytes / (at_once * int64_t(sizeof(T))), 1);
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

// Whether all channels of a pixel count, or none. Kernels then ask once a pixel, and read none that does not count.
KPFUSED_INLINE bool counts_by_pixel(const PixelView& pixels, const MapView& view) {
  const bool one_mask = !pixels.mask || pixels.mask_view.stride_inner == 0;
  return one_mask && (!pixels.sizes || pixels.modulus == 1 || pixels.divisor % view.inner == 0);
}

// A mask from the first pixel of a chunk on, for all channels; null: all count.
struct PixelMask {
  const uint8_t* p;
  int64_t stride_y, stride_x;

  KPFUSED_INLINE const uint8_t* row(int64_t r) const { return p ? p + r * stride_y : nullptr; }
  KPFUSED_INLINE bool at(const uint8_t* of_row, int64_t c) const { return !of_row || of_row[c * stride_x] != 0; }
};

KPFUSED_INLINE PixelMask mask_from(const Counting& counting, int64_t row, int64_t col) {
  const int64_t y = counting.stride_y, x = counting.stride_x;
  return {counting.mask ? counting.mask + row * y + col * x : nullptr, y, x};
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
    // Masks of some pixels, channel by channel; a stack of whole maps is turned over first.
    constexpr int64_t kPixels = 8;
    uint8_t turned[kPixels * 2 * kChannelBlock];
    for (int64_t r = 0; r < range.rows; ++r) {
      const int64_t row = range.row + r;
      for (int64_t first = 0; first < range.cols; first += kPixels) {
        const int64_t col = range.col + first, pixels = at_most(kPixels, range.cols - first);
        const T* p = from + r * from_y + first * from_x;
        T* out = to + r * to_y + first * to_x;
        const uint8_t* mask = nullptr;
        int64_t to_next = 0;
        if (one_size && !one_mask) {
          mask = each[0].mask + row * each[0].stride_y + col * each[0].stride_x, to_next = each[0].stride_x;
          if (between != 1) turn(mask, pixels, turned), mask = turned, to_next = channels;
        }
        for (int64_t c = 0; c < pixels; ++c, p += from_x, out += to_x) {
          if (!one_size) {
            for (int64_t k = 0; k < channels; ++k) out[k] = each[k].at(row, col + c) ? p[k] : otherwise[k];
          } else if (mask && row < each[0].rows && col + c < each[0].cols) {
            copy_channels<true>(p, out, channels, mask + c * to_next, otherwise);
          } else {
            copy_channels<false>(!mask && each[0].at(row, col + c) ? p : otherwise, out, channels, nullptr, otherwise);
          }
        }
      }
    }
  }

 private:
  // The masks of up to 8 pixels of all channels, from channel after channel to pixel after pixel.
  KPFUSED_INLINE void turn(const uint8_t* mask, int64_t pixels, uint8_t* to) const {
    int64_t k = 0;
    for (; pixels == 8 && each[0].stride_x == 1 && k + 8 <= channels; k += 8) {
      uint64_t rows[8];
      for (int i = 0; i < 8; ++i) __builtin_memcpy(&rows[i], mask + (k + i) * between, 8);
      transpose_bytes(rows);
      for (int i = 0; i < 8; ++i) __builtin_memcpy(to + i * channels + k, &rows[i], 8);
    }
    for (; k < channels; ++k) {
      for (int64_t c = 0; c < pixels; ++c) to[c * channels + k] = mask[k * between + c * each[0].stride_x];
    }
  }
};

}  // namespace kpfused::cpu::KPFUSED_ISA
