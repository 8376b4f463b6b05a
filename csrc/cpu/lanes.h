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

// What counts among the pixels of a chunk.
enum class Counts {
  all,
  listed,    // the same for all channels: a list of columns
  by_bytes,  // for each channel by itself: a byte of ones where it does not
};

// Whether all channels of a pixel count, or none. Kernels then read none that does not count.
KPFUSED_INLINE bool one_mask(const PixelView& pixels) { return !pixels.mask || pixels.mask_view.stride_inner == 0; }
KPFUSED_INLINE bool one_size(const PixelView& pixels, const MapView& view) {
  return !pixels.sizes || pixels.modulus == 1 || pixels.divisor % view.inner == 0;
}
KPFUSED_INLINE Counts counts_of(const PixelView& pixels, const MapView& view) {
  if (!one_mask(pixels) || !one_size(pixels, view)) return Counts::by_bytes;
  return pixels.mask ? Counts::listed : Counts::all;
}

// Pixels that a list has room for.
constexpr int64_t kListed = 2048;

// Chunks of pixels, each with all channels of a block. What is read twice in a row has kChunkBytes at most.
template <class T>
KPFUSED_INLINE Tiling lane_chunks(Counts counts, int64_t rows, int64_t cols, int64_t channels) {
  const int64_t at_once = at_most(channels, kLaneVectors * kLanes<Acc<T>>);
  int64_t pixels = kChunkBytes / (at_once * int64_t(sizeof(T)));
  if (counts == Counts::listed) pixels = at_most(pixels, kListed);
  if (counts == Counts::by_bytes) pixels = at_most(pixels, kGatherBytes / channels);
  return tile(rows, cols, pixels, 1);
}

// Channels of a block as a buffer holds them: at least a vector.
template <class A>
KPFUSED_INLINE int64_t padded_channels(int64_t channels) {
  return at_least(channels, kLanes<A>);
}

// Pixels that a buffer takes.
template <class T>
KPFUSED_INLINE Tiling buffer_chunks(int64_t rows, int64_t cols, int64_t channels) {
  return tile(rows, cols, kGatherBytes / (padded_channels<Acc<T>>(channels) * int64_t(sizeof(T))), 1);
}

// The columns that count, row after row: those of row r are columns[begins[r]] .. columns[begins[r + 1]].
struct ColumnList {
  uint16_t columns[kListed];
  uint32_t begins[kListed + 1];

  // From one mask; without branches, which noise in it would mislead.
  void fill(const Counting& counting, const PixelRange& range) {
    uint32_t n = 0;
    begins[0] = 0;
    for (int64_t r = 0; r < range.rows; ++r) {
      const uint8_t* const mask = counting.mask + (range.row + r) * counting.stride_y + range.col * counting.stride_x;
      for (int64_t c = 0; c < range.cols; ++c) columns[n] = uint16_t(c), n += mask[c * counting.stride_x] != 0;
      begins[r + 1] = n;
    }
  }
};

typedef uint8_t Bytes16 __attribute__((vector_size(16)));

// The bytes of two in turn, of eight from `first` on.
template <int first>
KPFUSED_INLINE Bytes16 interleave(Bytes16 a, Bytes16 b) {
#ifdef __SSE2__
  const __m128i x = (__m128i)a, y = (__m128i)b;
  return (Bytes16)(first == 0 ? _mm_unpacklo_epi8(x, y) : _mm_unpackhi_epi8(x, y));
#else
  Bytes16 turned;
  for (int i = 0; i < 8; ++i) turned[2 * i] = a[first + i], turned[2 * i + 1] = b[first + i];
  return turned;
#endif
}

// Which pixels count for each channel of a block.
struct LanesCounting {
  int64_t channels;
  bool same_size;
  int64_t between;  // the masks of two channels
  Counting each[2 * kChannelBlock];

  LanesCounting(const PixelView& pixels, const MapView& view, int64_t first_map, int64_t count)
      : channels(count), same_size(one_size(pixels, view)), between(pixels.mask_view.stride_inner) {
    for (int64_t k = 0; k < channels; ++k) each[k] = counting_of(pixels, view, first_map + k);
  }

  // A byte for each channel of each pixel, pixel after pixel, `to_next` bytes apart: ones where it does not count.
  void exclude(const PixelRange& range, int64_t to_next, uint8_t* to) const {
    for (int64_t r = 0; r < range.rows; ++r, to += range.cols * to_next) {
      const int64_t row = range.row + r;
      if (each[0].mask) {
        exclude_masked(each[0].mask + row * each[0].stride_y + range.col * each[0].stride_x, range.cols, to_next, to);
      } else {
        __builtin_memset(to, 0, range.cols * to_next);
      }
      if (row < each[0].rows && range.col + range.cols <= each[0].cols && same_size) continue;
      uint16_t valid[2 * kChannelBlock];  // columns of this range
      for (int64_t k = 0; k < channels; ++k) {
        valid[k] = uint16_t(row < each[k].rows ? at_most(at_least(each[k].cols - range.col, 0), range.cols) : 0);
      }
      for (int64_t c = 0; c < range.cols; ++c) {
        for (int64_t k = 0; k < channels; ++k) to[c * to_next + k] |= uint8_t(-(c >= valid[k]));
      }
    }
  }

 private:
  // One row.
  KPFUSED_INLINE void exclude_masked(const uint8_t* mask, int64_t cols, int64_t to_next, uint8_t* to) const {
    const int64_t stride_x = each[0].stride_x;
    if (between == 1 && stride_x == to_next && channels == to_next) return invert(mask, cols * to_next, to);
    if (stride_x == 1 && cols >= 16 && channels >= 8) {
      // Lines of eight channels at a time: where maps lie a power of two apart, the cache has room for no more of them.
      for (int64_t line = 0; line < cols; line += 64) {
        for (int64_t k = 0; k < channels; k += 8) {
          const int64_t channel = at_most(k, channels - 8), next = k + 8 < channels ? at_most(k + 8, channels - 8) : 0;
          const int64_t ahead = next * between + (next ? line : line + 64);
          for (int i = 0; i < 8; ++i) prefetch(mask, ahead + i * between);
          for (int64_t c = line; c < at_most(line + 64, cols); c += 16) {
            const int64_t col = at_most(c, cols - 16);
            turn(mask + channel * between + col, to_next, to + col * to_next + channel);
          }
        }
      }
      return;
    }
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t k = 0; k < channels; ++k) to[c * to_next + k] = uint8_t(-(mask[k * between + c * stride_x] == 0));
    }
  }

  static void invert(const uint8_t* mask, int64_t n, uint8_t* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = uint8_t(-(mask[i] == 0));
  }

  // 8 channels of 16 pixels. The place of a byte, three bits of its channel and four of its pixel, goes around by one bit
  // at each of three steps.
  KPFUSED_INLINE void turn(const uint8_t* mask, int64_t to_next, uint8_t* to) const {
    Bytes16 v[8], turned[8];
    for (int i = 0; i < 8; ++i) {
      __builtin_memcpy(&v[i], mask + i * between, 16);
      v[i] = (Bytes16)(v[i] == 0);
    }
    for (int step = 0; step < 3; ++step) {
      for (int i = 0; i < 4; ++i) {
        turned[2 * i] = interleave<0>(v[i], v[i + 4]);
        turned[2 * i + 1] = interleave<8>(v[i], v[i + 4]);
      }
      for (int i = 0; i < 8; ++i) v[i] = turned[i];
    }
    for (int i = 0; i < 16; ++i) __builtin_memcpy(to + i * to_next, reinterpret_cast<const uint8_t*>(v) + i * 8, 8);
  }
};

// The bytes of one chunk after the other.
struct ExcludedBytes {
  LanesCounting counting;
  uint8_t bytes[kGatherBytes];

  ExcludedBytes(const PixelView& pixels, const MapView& view, int64_t first_map, int64_t channels)
      : counting(pixels, view, first_map, channels) {}

  const uint8_t* of(const PixelRange& range, int64_t to_next) {
    counting.exclude(range, to_next, bytes);
    return bytes;
  }
};

// Copies pixels of `channels` elements each between rows of them.
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
