// SPDX-License-Identifier: MIT
// The gradient of an expectation with respect to the values: dV_ci = P_i g_c, summed over the maps that share them.
#pragma once

#include "areas.h"
#include "pixels.h"
#include "softmax.h"

namespace kpfused::cuda {

// The maps that have values of their own, each for the others that share them.
KPFUSED_HD MapView own_values(const MapView& maps, const ValueView& values) {
  MapView own = maps;
  if (values.stride_outer == 0) own.outer = 1;
  if (values.stride_inner == 0) own.inner = 1;
  return own;
}

// The maps that share values with map `first`, kStepRows of them at a time: of one sample where they share there, else of
// neighbouring samples.
template <class T>
struct Sharing {
  using A = Acc<T>;
  const ExpectationValuesParams& p;
  int64_t first;  // map
  const T* map;
  int64_t far, far_maps, far_stride;
  int64_t near, near_maps, near_stride;

  KPFUSED_DEVICE Sharing(const ExpectationValuesParams& params, const MapView& own, int64_t outer, int64_t inner)
      : p(params) {
    const MapView& view = p.softmax.view;
    const int64_t of_outer = own.outer == view.outer ? 1 : view.outer;
    const int64_t of_inner = own.inner == view.inner ? 1 : view.inner;
    const bool along_inner = of_inner > 1;
    first = outer * view.inner + inner;
    map = static_cast<const T*>(p.softmax.heatmap) + outer * view.stride_outer + inner * view.stride_inner;
    far = along_inner ? of_outer : 1;
    far_maps = view.inner;
    far_stride = view.stride_outer;
    near = along_inner ? of_inner : of_outer;
    near_maps = along_inner ? 1 : view.inner;
    near_stride = along_inner ? view.stride_inner : view.stride_outer;
  }

  // sum[k] += P g of every kStepRows-th map at one pixel.
  KPFUSED_DEVICE void add(int64_t y, int64_t x, int64_t channel, A (&sum)[kStepRows][kStepChannels]) const {
    const T* row = map + y * p.softmax.view.stride_y + x * p.softmax.view.stride_x;
    for (int64_t o = 0; o < far; ++o, row += far_stride) {
      const T* h = row;
      for (int64_t i = 0; i < near; i += kStepRows, h += kStepRows * near_stride) {
        add_maps(first + o * far_maps + i * near_maps, h, near - i, y, x, channel, sum);
      }
    }
  }

 private:
  // Up to kStepRows maps from n on: all loads before the first use.
  KPFUSED_DEVICE void add_maps(int64_t n, const T* h, int64_t maps, int64_t y, int64_t x, int64_t channel,
                               A (&sum)[kStepRows][kStepChannels]) const {
    constexpr int N = kStepRows;
    const SoftmaxParams& of = p.softmax;
    A w[N];
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      w[k] = k < maps ? widen(h[k * near_stride]) : A(0);
      if (k < maps) bits |= 1u << k;
    }
    const unsigned all = bits;
    if (!of.pixels.all()) {
      // Not unrolled: rare, and long.
#pragma unroll 1
      for (int k = 0; k < N; ++k) {
        if (k < maps && !counts_at(counted_pixels(of.pixels, of.view, n + k * near_maps), y, x)) bits &= ~(1u << k);
      }
    }
    if (of.holds == Holds::logits) {
      Stats<A> stats[N];
      A beta[N];
#pragma unroll
      for (int k = 0; k < N; ++k) stats[k] = stats_of<A>(of, k < maps ? n + k * near_maps : n);
#pragma unroll
      for (int k = 0; k < N; ++k) beta[k] = beta_of<A>(of.beta, k < maps ? n + k * near_maps : n);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        w[k] = softmax_of(stats[k], beta[k])(w[k]);
        if (!is_empty(of.pixels, stats[k].sum)) continue;
        // The softmax map of an empty map is its value everywhere.
        w[k] = static_cast<A>(of.pixels.empty_value);
        bits = p.grad ? bits & ~(1u << k) : bits | (all & 1u << k);
      }
    }
    const int64_t channels = p.value_view.channels;
    const A* const grad = static_cast<const A*>(p.grad) + n * channels + channel;
#pragma unroll
    for (int k = 0; k < N; ++k) w[k] = bits >> k & 1 ? w[k] : A(0);
#pragma unroll
    for (int j = 0; j < kStepChannels; ++j) {
      if (channel + j >= channels) break;
      A g[N];
#pragma unroll
      for (int k = 0; k < N; ++k) {
        g[k] = !(bits >> k & 1) ? A(0) : p.grad ? grad[k * near_maps * channels + j] : A(1);
      }
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k][j] += w[k] * g[k];
    }
  }
};

// Bytes: reads the maps, writes the values' gradient. As for E, a few channels a block. kShared: a thread takes one pixel
// after another and of each a few maps at a time, instead of a few pixels of one map.
template <class T, bool kShared>
__global__ void __launch_bounds__(plan_detail::kRowThreads, kExpectationBlocks<T>)
    values_gradient(Launch<ExpectationValuesParams> launch) {
  const auto& [p, plan] = launch;
  using A = Acc<T>;
  // Of one map there is less to keep, which leaves registers for more loads.
  constexpr int N = kShared ? kStepRows : 2 * kStepRows, C = kStepChannels;
  const SoftmaxParams& of = p.softmax;
  const ValueView& to = p.value_view;
  const int64_t passes = channel_passes(to.channels), channel = blockIdx.x % passes * C;
  const MapView own = own_values(of.view, to);
  const Area area = area_of(plan, own, blockIdx.x / passes);
  if (!area.active) return;
  const int64_t outer = area.map / own.inner, inner = area.map % own.inner;
  const int rows = area.rows_until(area.bottom);
  const int some = some_channels(to.channels - channel, C);
  const int64_t first = area.first_row(), out_step = plan.ty * to.stride_y;
  T* const out = static_cast<T*>(p.grad_values) + outer * to.stride_outer + inner * to.stride_inner +
                 channel * to.stride_channel + first * to.stride_y;
  const auto write = [&](T* q, const A(&v)[C]) {
    const A one[1] = {v[0]};
    store<T, 1>(q, narrow(one, T{}));
    if (some == 1) return;
#pragma unroll
    for (int j = 1; j < C; ++j) {
      q += to.stride_channel;
      const A another[1] = {v[j]};
      if (j < some) store<T, 1>(q, narrow(another, T{}));
    }
  };
  if constexpr (kShared) {
    const Sharing<T> sharing(p, own, outer, inner);
    for (int64_t x = area.first_column(); x < area.right; x += plan.tx) {
      T* q = out + x * to.stride_x;
      for (int row = 0; row < rows; row += plan.ty, q += out_step) {
        A sum[N][C] = {}, all[C];
        sharing.add(first + row, x, channel, sum);
#pragma unroll
        for (int j = 0; j < C; ++j) all[j] = (sum[0][j] + sum[1][j]) + (sum[2][j] + sum[3][j]);
        write(q, all);
      }
    }
  } else {
    const int64_t n = area.map, step = plan.ty * of.view.stride_y;
    const CountedPixels counted = counted_pixels(of.pixels, of.view, n);
    const Softmax<A> softmax = softmax_of<A>(of, n);
    const T* const map = static_cast<const T*>(of.heatmap) + map_offset(of.view, n);
    const A* const grad = static_cast<const A*>(p.grad) + n * to.channels + channel;
    // Without an upstream gradient, the softmax map of an empty map is its value everywhere.
    const A otherwise = static_cast<A>(softmax.empty && !p.grad ? of.pixels.empty_value : 0);
    A g[C];
#pragma unroll
    for (int j = 0; j < C; ++j) g[j] = p.grad && j < some ? grad[j] : A(1);
    for (int64_t x = area.first_column(); x < area.right; x += plan.tx) {
      T* q = out + x * to.stride_x;
      const T* h = map + first * of.view.stride_y + x * of.view.stride_x;
      const uint8_t* mask = mask_at(counted, first, x);
      const int valid = softmax.empty || x >= counted.width ? 0 : area.rows_until(counted.height);
      for (int row = 0; row < rows; row += N * plan.ty) {
        const int left = valid < rows ? valid - row : rows - row;
        A logit[N];
        load_logits(h, step, left, plan.ty, logit);
        bool counts[N];
        count_rows(counted, mask, left, plan.ty, counts);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const A w = softmax(logit[i]);
          A v[C];
#pragma unroll
          for (int j = 0; j < C; ++j) v[j] = counts[i] ? w * g[j] : otherwise;
          if (i * plan.ty < rows - row) write(q + i * out_step, v);
        }
        h += N * step;
        q += N * out_step;
      }
    }
  }
}

}  // namespace kpfused::cuda
