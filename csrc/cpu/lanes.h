// SPDX-License-Identifier: MIT
// What forward and backward share where lanes are channels.
#pragma once

#include "lane_words.h"

namespace kpfused::cpu::KPFUSED_ISA {

// What counts among the pixels of a chunk.
enum class Counts {
  all,
  listed,    // the same for all channels: a list of columns
  by_lanes,  // lanes by themselves: channels count by themselves, or pixels stand abreast
};

KPFUSED_INLINE Counts counts_of(const PixelView& pixels, const MapView& view) {
  if (!one_mask(pixels, view.inner) || !one_size(pixels, view)) return Counts::by_lanes;
  return pixels.mask ? Counts::listed : Counts::all;
}

// How many pixels of a row stand abreast in the lanes: a power of two of them, such that lane a * channels + c is channel c
// of pixel a of a group, as they lie in memory. So channels fill vectors whatever their number. One where there is
// nothing to gain, or rows are no whole groups.
template <class A>
KPFUSED_INLINE int64_t pixels_abreast(const MapView& view, const Tiling& parts, const PixelView& pixels) {
  constexpr int64_t L = kLanes<A>;
  const int64_t channels = view.inner, vectors = ceil_div(channels, L);
  if (channels > kAbreastChannels || view.stride_x != channels || parts.x.count > 1) return 1;
  for (int64_t n = L; n > 1; n /= 2) {
    if (view.width % n != 0 || n * channels < L || view.width * view.height < 8 * n) continue;
    // What is done at the end of a chunk has to be won back, and what of a listed mask would be skipped otherwise.
    const int64_t abreast = ceil_div(n * channels, L), alone = n * vectors;
    if (channels < L || (counts_of(pixels, view) == Counts::listed ? 3 * abreast <= 2 * alone : 8 * abreast <= 7 * alone)) {
      return n;
    }
  }
  return 1;
}

// Leaves op over the pixels abreast in each channel, of several rows side by side: each step waits for the one before. Pixels
// are read as they were stored, all at once: what is read where it has just been written in other vectors has to wait.
template <class A, int N, class Op>
KPFUSED_INLINE void fold(LaneRow<A> (&rows)[N], int64_t abreast, int64_t channels, const Op& op) {
  for (int64_t i = 0; i < channels; i += kLanes<A>) {
    Vec<A> even[N], odd[N];
    for (int n = 0; n < N; ++n) {
      even[n] = load_vector(rows[n].values + i), odd[n] = load_vector(rows[n].values + channels + i);
    }
    for (int64_t a = 2; a < abreast; a += 2) {
      for (int n = 0; n < N; ++n) {
        const A* const pixel = rows[n].values + a * channels + i;
        even[n] = op(even[n], load_vector(pixel)), odd[n] = op(odd[n], load_vector(pixel + channels));
      }
    }
    for (int n = 0; n < N; ++n) store_vector(rows[n].values + i, op(even[n], odd[n]));
  }
}

// Pixels of a part within the valid size, where all channels have the same: sizes of their own are in the words.
KPFUSED_INLINE PixelRange valid_of(const PixelView& pixels, const MapView& view, const PixelRange& part, int64_t first_map) {
  if (!pixels.sizes || !one_size(pixels, view)) return part;
  const Counting counting = counting_of(pixels, view, first_map);
  return {part.row, at_most(at_least(counting.rows - part.row, 0), part.rows), part.col,
          at_most(at_least(counting.cols - part.col, 0), part.cols)};
}

// Vectors of lanes that a chunk is read for at once.
constexpr int kLaneVectors = 4;

// A list of columns has no place for pixels abreast.
KPFUSED_INLINE Counts lane_counts(const PixelView& pixels, const MapView& view, int64_t abreast) {
  if (abreast == 1) return counts_of(pixels, view);
  return pixels.all() ? Counts::all : Counts::by_lanes;
}

// Pixels that a list has room for.
constexpr int64_t kListed = 2048;

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

// Bytes of a chunk whose pixels stand abreast: what is done at the end of one is work for all its lanes. Three quarters where
// lanes count by themselves, since a mask is read meanwhile.
constexpr int64_t kAbreastBytes = 8 * kChunkBytes;

// Chunks of groups of pixels, each with all lanes. Where pixels do not stand abreast, those of a few vectors are read twice in
// a row. Moments have a long end of a chunk.
template <class T>
KPFUSED_INLINE Tiling lane_chunks(Counts counts, int64_t rows, int64_t cols, int64_t lanes, int64_t abreast,
                                  bool long_end = false) {
  const int64_t at_once = at_most(lanes, kLaneVectors * kLanes<Acc<T>>);
  const int64_t abreast_bytes = counts == Counts::by_lanes && !long_end ? kAbreastBytes / 4 * 3 : kAbreastBytes;
  int64_t groups = (abreast == 1 ? chunk_bytes(long_end) / at_once : abreast_bytes / lanes) / int64_t(sizeof(T));
  if (counts == Counts::listed) groups = at_most(groups, kListed);
  if (counts == Counts::by_lanes) groups = at_most(groups, kChunkWords / ceil_div(lanes, kLanes<Acc<T>>));
  return tile(rows, cols, groups, 1);
}

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

// Work items: (map, part), or (outer, part, block of channels) with channels in the lanes.
KPFUSED_INLINE int64_t count_items(const MapView& view) {
  const int64_t parts = part_tiling(view).count();
  return parts * (is_channels_last(view) ? view.outer * channel_blocks(view.inner).count : view.maps());
}

}  // namespace kpfused::cpu::KPFUSED_ISA
