// SPDX-License-Identifier: MIT
// Pixels that do not count (a mask, or beyond the valid size) never reach the kernels as such: rows go through a buffer in
// the nearest cache, in which these pixels hold a logit of no weight, and their gradients are set to zero afterwards.
#pragma once

#include "maps.h"

namespace kpfused::cpu::KPFUSED_ISA {

struct PixelRange {
  int64_t row, rows, col, cols;
};

// Which pixels of one map count.
struct Counting {
  const uint8_t* mask;  // of the map's first pixel; null: all within the valid size
  int64_t stride_y, stride_x;
  int64_t rows, cols;  // the valid size

  KPFUSED_INLINE bool at(int64_t row, int64_t col) const {
    return row < rows && col < cols && (!mask || mask[row * stride_y + col * stride_x] != 0);
  }
};

KPFUSED_INLINE Counting counting_of(const PixelView& pixels, const MapView& view, int64_t map) {
  Counting c = {nullptr, pixels.mask_view.stride_y, pixels.mask_view.stride_x, view.height, view.width};
  if (pixels.mask) c.mask = pixels.mask + map_offset(pixels.mask_view, map);
  if (pixels.sizes) {
    const int64_t* size = pixels.sizes + map / pixels.divisor % pixels.modulus * 2;
    c.rows = at_most(at_least(size[0], 0), view.height);
    c.cols = at_most(at_least(size[1], 0), view.width);
  }
  return c;
}

// The logit whose weight is zero, as an element.
template <class T>
KPFUSED_INLINE T weightless(Acc<T> sign) {
  T lanes[kLanes<Acc<T>>];
  store(lanes, splat(Acc<T>(-INFINITY) * sign));
  return lanes[0];
}

// `to` gets the n elements of a row from (row, col) on that count, and `otherwise` in place of the others, which are not
// read. `from` and `to` may be the same.
template <class T>
KPFUSED_INLINE void copy_counting(const T* from, T* to, int64_t n, T otherwise, const Counting& counting, int64_t row,
                                  int64_t col) {
  const int64_t valid = row < counting.rows ? at_most(at_least(counting.cols - col, 0), n) : 0;
  const uint8_t* mask = counting.mask ? counting.mask + row * counting.stride_y + col * counting.stride_x : nullptr;
  if (!mask) {
    for (int64_t i = 0; i < valid; ++i) to[i] = from[i];
  } else if (counting.stride_x == 1) {
    for (int64_t i = 0; i < valid; ++i) to[i] = mask[i] ? from[i] : otherwise;
  } else {
    for (int64_t i = 0; i < valid; ++i) to[i] = mask[i * counting.stride_x] ? from[i] : otherwise;
  }
  for (int64_t i = valid; i < n; ++i) to[i] = otherwise;
}

// Likewise for rows; those of `to` are dense.
template <class T>
KPFUSED_INLINE void copy_counting_rows(const T* from, int64_t stride_y, int64_t rows, int64_t cols, T* to, T otherwise,
                                       const Counting& counting, int64_t row, int64_t col) {
  for (int64_t r = 0; r < rows; ++r) {
    copy_counting(from + r * stride_y, to + r * cols, cols, otherwise, counting, row + r, col);
  }
}

}  // namespace kpfused::cpu::KPFUSED_ISA
