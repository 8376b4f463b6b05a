// SPDX-License-Identifier: MIT
// Expectations of values under the softmax P of a map, E_c = sum_i P_i V_ci.
#pragma once

#include "pixels.h"
#include "values.h"

namespace kpfused::cuda {

// Bytes: reads the map and, where they are in memory, the values. More than a few channels are taken by several blocks,
// each of which makes P again: an exp2 costs less than to bring P from elsewhere.
template <class T>
__global__ void __launch_bounds__(plan_detail::kRowThreads, kExpectationBlocks<T>)
    expectation_sums(Launch<ExpectationParams> launch) {
  const auto& [p, plan] = launch;
  using A = Acc<T>;
  using Sums = Tuple<A, kStepChannels>;
  constexpr int N = kStepRows, C = kStepChannels;
  const SoftmaxParams& of = p.softmax;
  const int64_t channels = p.values.view.channels, passes = channel_passes(channels);
  const int64_t channel = blockIdx.x % passes * C;
  const int some = some_channels(channels - channel, C);
  Area area = area_of(plan, of.view, blockIdx.x / passes);
  const int64_t n = area.active ? area.map : 0;
  const CountedPixels counted = counted_pixels(of.pixels, of.view, n);
  const Softmax<A> softmax = softmax_of<A>(of, n);
  const Box box = value_box<A>(p.values, of, n);
  area.clip({0, counted.width, 0, counted.height});
  area.clip(box);
  const MapValues<T> values(p.values, of, n, box, area.first_row());
  const int rows = area.rows_until(area.bottom);
  const int64_t step = plan.ty * of.view.stride_y, value_step = plan.ty * p.values.view.stride_y;
  const int64_t first = area.first_row();
  const T* const map = static_cast<const T*>(of.heatmap) + map_offset(of.view, n);
  Sums sum = {};
  for (int64_t x = area.first_column(); x < area.right; x += plan.tx) {
    const T* h = map + first * of.view.stride_y + x * of.view.stride_x;
    const auto column = values.column(channel, x);
    const T* value = column.p;
    const uint8_t* mask = mask_at(counted, first, x);
    for (int row = 0; row < rows; row += N * plan.ty) {
      const int left = rows - row;
      A w[N], v[N][C];
      load_logits(h, step, left, plan.ty, w);
      values.load(column, value, some, row, left, plan.ty, v);
      bool counts[N];
      count_rows(counted, mask, left, plan.ty, counts);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        // Selected: beside a pixel that does not count, the value may be NaN.
        w[i] = softmax(w[i]);
        if (counts[i]) sum.at[0] += w[i] * v[i][0];
      }
      if (some > 1) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (!counts[i]) continue;
#pragma unroll
          for (int j = 1; j < C; ++j) sum.at[j] += w[i] * v[i][j];
        }
      }
      h += N * step;
      value += N * value_step;
    }
  }
  KPFUSED_SHARED(Sums, shared);
  sum = reduce_area(sum, area, plan, shared);
  if (area.pixel != 0 || !area.active) return;
  A* const to = static_cast<A*>(plan.parts() > 1 ? p.workspace : p.expectation);
  // Zero, or NaN of a map of NaN, which has no mass even where nothing of it counts within the window.
  const A nothing = softmax.inverse - softmax.inverse;
  // The parts of an empty map add up to its value.
  const A value = static_cast<A>(area.part == 0 ? of.pixels.empty_value : 0), most = most_of<A>(p.values, of.pixels);
#pragma unroll
  for (int j = 0; j < C; ++j) {
    if (j >= some) continue;
    const A all = softmax.empty ? value : sum.at[j] + nothing;
    to[(n * channels + channel + j) * plan.parts() + area.part] = all > most ? most : all;
  }
}

}  // namespace kpfused::cuda
