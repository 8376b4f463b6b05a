// SPDX-License-Identifier: MIT
// Values of which an expectation is taken: from memory in any layout, or from the pixel's place.
#pragma once

#include "areas.h"
#include "softmax.h"

namespace kpfused::cuda {

// Those of one map, of which a thread's first row is row 0.
template <class T>
struct MapValues {
  using A = Acc<T>;
  const Values& of;
  const MapView& view;
  const T* data;        // of row 0; all strides are zero where there is none
  A y;                  // row 0, centred
  int64_t left, right;  // columns and rows outside which values that are not in memory are zero
  int top, bottom;

  KPFUSED_DEVICE MapValues(const Values& values, const SoftmaxParams& softmax, int64_t n, const Box& box,
                           int64_t first)
      : of(values), view(softmax.view), y(centred<A>(first, view.height)), left(box.left), right(box.right) {
    top = row_of(box.top, first);
    bottom = row_of(box.bottom, first);
    data = static_cast<const T*>(of.data) + n / view.inner * of.view.stride_outer +
           n % view.inner * of.view.stride_inner + first * of.view.stride_y;
  }

  // Channel `channel` and those after it, of one column.
  struct Column {
    const T* p;  // where row 0 lies in memory
    A x;         // or its value: the coordinate, or 1 within the window
  };

  KPFUSED_DEVICE Column column(int64_t channel, int64_t x) const {
    Column column{data + channel * of.view.stride_channel + x * of.view.stride_x, A(0)};
    if (of.kind == ValueKind::window) {
      column.x = left <= x && x < right ? A(1) : A(0);
    } else if (of.kind == ValueKind::coordinates) {
      column.x = static_cast<A>(of.units.scale_x) * centred<A>(x, view.width) + static_cast<A>(of.units.offset_x);
    }
    return column;
  }

  // `channels` of them, one at least, at N rows from `row` on, ty apart, of which `rows` are read. The others, and channels
  // beyond, are zero. Of a tensor, p: where they lie.
  template <int N, int C>
  KPFUSED_DEVICE void load(const Column& column, const T* p, int channels, int row, int rows, int ty,
                           A (&v)[N][C]) const {
    if (of.kind != ValueKind::tensor) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int at = row + i * ty;
        v[i][0] = top <= at && at < bottom ? column.x : A(0);
        v[i][1] = static_cast<A>(of.units.scale_y) * (y + static_cast<A>(at)) + static_cast<A>(of.units.offset_y);
#pragma unroll
        for (int j = 2; j < C; ++j) v[i][j] = 0;
      }
      return;
    }
    const int64_t step = ty * of.view.stride_y;
#pragma unroll
    for (int i = 0; i < N; ++i) v[i][0] = i * ty < rows ? widen(p[i * step]) : A(0);
    // One channel is what most ask for.
    if (channels == 1) return;
#pragma unroll
    for (int j = 1; j < C; ++j) {
      p += of.view.stride_channel;
#pragma unroll
      for (int i = 0; i < N; ++i) v[i][j] = j < channels && i * ty < rows ? widen(p[i * step]) : A(0);
    }
  }
};

// Where values other than a tensor's are not zero: within the window, or all of the map.
template <class A>
KPFUSED_DEVICE Box value_box(const Values& values, const SoftmaxParams& softmax, int64_t n) {
  if (values.kind != ValueKind::window) return {0, softmax.view.width, 0, softmax.view.height};
  return window_of(values, softmax.view, stats_of<A>(softmax, n), n);
}

}  // namespace kpfused::cuda
