// SPDX-License-Identifier: MIT
// The gradients of an expectation with respect to the heatmap and to beta: dh_i = beta P_i sum_c g_c (V_ci - E_c).
#pragma once

#include "pixels.h"
#include "values.h"

namespace kpfused::cuda {

// Bytes: reads the map and the values, writes the map's gradient. All channels in one pass.
template <class T>
__global__ void __launch_bounds__(plan_detail::kRowThreads, kExpectationBlocks<T>)
    expectation_gradient(Launch<ExpectationHeatmapParams> launch) {
  const auto& [p, plan] = launch;
  using A = Acc<T>;
  constexpr int N = kStepRows, C = 2;  // more would not fit into registers
  const SoftmaxParams& of = p.softmax;
  const int64_t channels = p.values.view.channels;
  const Area area = area_of(plan, of.view, blockIdx.x);
  const int64_t n = area.active ? area.map : 0;
  const CountedPixels counted = counted_pixels(of.pixels, of.view, n);
  const Softmax<A> softmax = softmax_of<A>(of, n);
  const MapValues<T> values(p.values, of, n, value_box<A>(p.values, of, n), area.first_row());
  const bool plain = of.holds == Holds::probabilities;  // dh_i = sum_c g_c V_ci
  const A beta = plain ? A(1) : beta_of<A>(of.beta, n);
  const A* const grad = static_cast<const A*>(p.grad) + n * channels;
  const bool ones = !p.grad;
  const A* const mean = static_cast<const A*>(p.expectation) + n * channels;
  const int rows = area.rows_until(area.bottom);
  const int64_t step = plan.ty * of.view.stride_y, out_step = plan.ty * p.grad_view.stride_y;
  const int64_t value_step = plan.ty * p.values.view.stride_y;
  const int64_t first = area.first_row();
  const T* const map = static_cast<const T*>(of.heatmap) + map_offset(of.view, n);
  T* const out = static_cast<T*>(p.grad_heatmap) + map_offset(p.grad_view, n);
  A dbeta = 0;
  for (int64_t x = area.first_column(); x < area.right; x += plan.tx) {
    const T* h = map + first * of.view.stride_y + x * of.view.stride_x;
    T* to = out + first * p.grad_view.stride_y + x * p.grad_view.stride_x;
    const uint8_t* mask = mask_at(counted, first, x);
    // Beyond the valid size nothing is read, in an empty map neither.
    const int valid = softmax.empty || x >= counted.width ? 0 : area.rows_until(counted.height);
    const auto column = values.column(0, x);
    const T* row_values = column.p;
    for (int row = 0; row < rows; row += N * plan.ty) {
      const int left = valid < rows ? valid - row : rows - row;
      A logit[N], q[N] = {};
      load_logits(h, step, plain ? 0 : left, plan.ty, logit);
      const T* value = row_values;
      for (int64_t c = 0; c < channels; c += C, value += C * p.values.view.stride_channel) {
        A v[N][C];
        const int some = some_channels(channels - c, C);
        values.load(column, value, some, row, left, plan.ty, v);
        const auto add = [&](int j) {
          const A g = ones ? A(1) : grad[c + j], e = plain ? A(0) : mean[c + j];
#pragma unroll
          for (int i = 0; i < N; ++i) q[i] += g * (v[i][j] - e);
        };
        add(0);
        if (some == 1) break;
#pragma unroll
        for (int j = 1; j < C; ++j) {
          if (j < some) add(j);
        }
      }
      bool counts[N];
      count_rows(counted, mask, left, plan.ty, counts);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const A wq = plain ? q[i] : softmax(logit[i]) * q[i];
        // Selected: beside a pixel that does not count, values may be NaN.
        if (counts[i] && !plain) dbeta += finite_distance(softmax.distance(logit[i])) * wq;
        const A dh[1] = {counts[i] ? beta * wq : A(0)};
        if (i * plan.ty < rows - row) store<T, 1>(to + i * out_step, narrow(dh, T{}));
      }
      h += N * step;
      to += N * out_step;
      row_values += N * value_step;
    }
  }
  if (!p.grad_beta) return;
  KPFUSED_SHARED(A, shared);
  dbeta = reduce_area(dbeta, area, plan, shared) * softmax.sign;
  if (area.pixel != 0 || !area.active) return;
  static_cast<A*>(plan.parts() > 1 ? p.workspace : p.grad_beta)[n * plan.parts() + area.part] = dbeta;
}

}  // namespace kpfused::cuda
