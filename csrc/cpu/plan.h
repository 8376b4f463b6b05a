// SPDX-License-Identifier: MIT
// How the CPU kernels cut maps: into parts, which are what threads share out, and parts into chunks, which are read
// twice (peak, then sums) and so have to stay in the nearest caches between the two. Both depend on the map's shape,
// dtype and layout alone, and on what kind of mask there is, never on the batch or the number of threads, so a map always
// gives the same bits.
#pragma once

#include "../params.h"

#define KPFUSED_INLINE inline __attribute__((always_inline))

namespace kpfused::cpu {

// Elements of a part. A partial state is four accumulators, so what split maps need besides is below 0.01 %.
constexpr int64_t kPartElements = 65536;
// Bytes of a chunk: its second reading comes from the first- and second-level caches.
constexpr int64_t kChunkBytes = 32768;
// A range for one thread covers at least this many elements: less costs more to hand over than to compute.
constexpr int64_t kGrainElements = 32768;
// Channels of one work item of a channels_last map (the last item takes up to twice as many, less one).
constexpr int64_t kChannelBlock = 128;
// A part of a channels_last map has at least this many pixels, which bounds the memory of its partial states too.
constexpr int64_t kPartPixels = 2048;

KPFUSED_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
KPFUSED_INLINE constexpr int64_t at_least(int64_t a, int64_t b) { return a < b ? b : a; }
KPFUSED_INLINE constexpr int64_t at_most(int64_t a, int64_t b) { return a > b ? b : a; }

// True: lanes are channels (stride_inner == 1). False: lanes run along rows.
KPFUSED_INLINE bool is_channels_last(const MapView& view) {
  return view.stride_x != 1 && (view.stride_inner == 1 || view.inner == 1) && (view.width > 1 || view.inner > 1);
}

// An even partition of one extent: pieces that differ by no more than `multiple`, the larger ones first, and begin at
// multiples of it. What is left beyond the last multiple goes to the last piece.
struct Cut {
  int64_t extent, count, multiple;
  int64_t whole, larger;  // multiples in a piece; pieces that have one more

  KPFUSED_INLINE Cut(int64_t extent, int64_t count, int64_t multiple)
      : extent(extent), count(count), multiple(multiple), whole(extent / multiple / count), larger(extent / multiple % count) {}

  KPFUSED_INLINE int64_t begin(int64_t i) const {
    return i == count ? extent : (i * whole + at_most(i, larger)) * multiple;
  }
  KPFUSED_INLINE int64_t size(int64_t i) const { return begin(i + 1) - begin(i); }
};

// No piece is larger than `most`, at least twice `multiple`; where there are several none is smaller than most / 2 - multiple,
// or than multiple.
KPFUSED_INLINE Cut cut(int64_t extent, int64_t most, int64_t multiple = 1) {
  if (extent <= most) return {extent, 1, multiple};
  return {extent, at_most(ceil_div(extent, most - multiple + 1), extent / multiple), multiple};
}

// Rows, and columns where one row alone is longer than `elements`.
struct Tiling {
  Cut y, x;

  KPFUSED_INLINE int64_t count() const { return y.count * x.count; }
};

KPFUSED_INLINE Tiling tile(int64_t height, int64_t width, int64_t elements, int64_t multiple) {
  const Cut x = cut(width, elements, multiple);
  return {cut(height, at_least(elements / ceil_div(width, x.count), 1)), x};
}

// Where columns are cut, lanes along rows want whole cache lines.
constexpr int64_t kRowMultiple = 64;

// Channels of a channels_last map are dealt out in blocks: begin(i) .. begin(i + 1).
struct ChannelBlocks {
  int64_t channels, count;

  KPFUSED_INLINE int64_t begin(int64_t i) const { return i == count ? channels : i * kChannelBlock; }
};

KPFUSED_INLINE ChannelBlocks channel_blocks(int64_t channels) {
  return {channels, at_least(channels / kChannelBlock, 1)};
}

// The parts of one map.
KPFUSED_INLINE Tiling part_tiling(const MapView& view) {
  if (!is_channels_last(view)) return tile(view.height, view.width, kPartElements, kRowMultiple);
  const int64_t block = at_most(view.inner, kChannelBlock);
  return tile(view.height, view.width, at_least(kPartElements / at_least(block, 1), kPartPixels), 1);
}

// The parts of one map for kernels that take its pixels in row order, across the ends of rows.
KPFUSED_INLINE Cut pixel_parts(const MapView& view) { return cut(view.height * view.width, kPartElements, 1024); }

}  // namespace kpfused::cpu
