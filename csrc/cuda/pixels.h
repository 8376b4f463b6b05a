// SPDX-License-Identifier: MIT
// Which pixels of a map count: a mask, a valid size, or both. Kernels that know them ask once a step, in a branch that
// all threads take or none, so maps without either pay nothing an element.
#pragma once

#include "element.h"

namespace kpfused::cuda {

// Those of one map.
struct CountedPixels {
  bool all;
  const uint8_t* mask;  // of the map's first pixel; null where there is none
  int64_t stride_y, stride_x;
  int64_t height, width;  // valid size
};

KPFUSED_DEVICE CountedPixels counted_pixels(const PixelView& pixels, const MapView& view, int64_t n) {
  CountedPixels c{pixels.all(), nullptr, pixels.mask_view.stride_y, pixels.mask_view.stride_x, view.height, view.width};
  if (pixels.mask) c.mask = pixels.mask + pixels.mask_view.offset(n);
  if (pixels.sizes) {
    const int64_t* const size = pixels.sizes + n / pixels.divisor % pixels.modulus * 2;
    const auto within = [](int64_t value, int64_t most) { return value < 0 ? 0 : value < most ? value : most; };
    c.height = within(size[0], view.height);
    c.width = within(size[1], view.width);
  }
  return c;
}

// The mask from a pixel on.
KPFUSED_DEVICE const uint8_t* mask_at(const CountedPixels& c, int64_t y, int64_t x) {
  return c.mask ? c.mask + y * c.stride_y + x * c.stride_x : nullptr;
}

KPFUSED_DEVICE bool counts_at(const CountedPixels& c, int64_t y, int64_t x) {
  return y < c.height && x < c.width && (!c.mask || c.mask[y * c.stride_y + x * c.stride_x]);
}

// Which of N rows, ty apart, lie within the first `rows` and the mask, which begins at the first of them and goes on to the
// one after the last.
template <int N>
KPFUSED_DEVICE void count_rows(const CountedPixels& c, const uint8_t*& mask, int rows, int ty, bool (&counts)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) counts[i] = i * ty < rows;
  if (!mask) return;
  const int64_t step = ty * c.stride_y;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (counts[i]) counts[i] = mask[i * step] != 0;
  }
  mask += N * step;
}

// One bit for each of N rows, ty apart, of V pixels side by side: whether it lies within the first `rows` and `columns`
// and the mask, which begins at the first of them, has it.
template <int N, int V>
KPFUSED_DEVICE unsigned counted_bits(const CountedPixels& c, const uint8_t* mask, int rows, int ty, int columns) {
  unsigned bits = 0;
  // 8 loads at a time: more would cost the registers of loops that know no mask.
#pragma unroll 8 / V
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (i * ty >= rows || j >= columns) continue;
      if (!mask || mask[i * ty * c.stride_y + j * c.stride_x]) bits |= 1u << (i * V + j);
    }
  }
  return bits;
}

}  // namespace kpfused::cuda
