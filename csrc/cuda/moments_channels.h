// SPDX-License-Identifier: MIT
// Moments of channels_last maps (stride_inner == 1), with or without masks: threads lie over an image as in channels.h.
//
// Every channel of a thread has sums of its own, about the row of its running peak in the present column; at the end of a
// column they join those of the columns before. So that they fit the registers, a thread takes no more than 2 channels.
// One read of the map forward, one read and one write backward.
#pragma once

#include "channels.h"
#include "moments_rows.h"

namespace kpfused::cuda {

// One channel of one thread in one column.
template <class A>
struct MomentChannel {
  A peak;  // -inf before the first pixel
  A at_y;  // of the first pixel, from the top, whose key is the peak
  A sum, y, yy, distance;

  KPFUSED_DEVICE void clear() {
    peak = -INFINITY;
    at_y = kNowhere<A>;
    sum = y = yy = distance = 0;
  }

  // N rows, ty apart, the first at `first`.
  template <int N>
  KPFUSED_DEVICE void add(const A (&key)[N], A first, int ty, A scale) {
    A top = peak;
#pragma unroll
    for (int i = 0; i < N; ++i) top = larger(top, key[i]);
    if (top > peak) {
      A to_y = first;
#pragma unroll
      for (int i = N - 1; i > 0; --i) to_y = key[i] == top ? first + static_cast<A>(i * ty) : to_y;
      if (key[0] == top) to_y = first;
      const A down = peak - top, w = Exp2{}(down * scale), dy = at_y - to_y;
      yy = w * (yy + dy * (y + y + dy * sum));
      y = w * (y + dy * sum);
      sum *= w;
      distance = w * distance + sum * larger(down, Limits<A>::lowest);
      peak = top;
      at_y = to_y;
    }
    const A base = larger(peak, Limits<A>::lowest), dy = first - at_y;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A d = key[i] - base, w = Exp2{}(d * scale), row = dy + static_cast<A>(i * ty), weighed = w * row;
      sum += w;
      y += weighed;
      yy += weighed * row;
      distance += w * larger(d, Limits<A>::lowest);
    }
  }

  KPFUSED_DEVICE Moments<A> moments(A x) const {
    Moments<A> m = empty_moments<A>();
    m.peak = larger(peak, Limits<A>::lowest);
    m.at_x = peak < Limits<A>::lowest ? kNowhere<A> : x;
    m.at_y = at_y;
    m.sum = sum;
    m.y = y;
    m.yy = yy;
    m.distance = distance;
    return m;
  }
};

// What counts of a thread's V channels in one column, from the thread's first row on.
template <int V>
struct CountedColumn {
  int rows[V], most;    // rows within the valid size, and the most of them
  const uint8_t* mask;  // of the first pixel and channel; null where there is none
};

template <int V>
KPFUSED_DEVICE CountedColumn<V> counted_column(const PixelView& pixels, const MapView& view, const ChannelsPart& part,
                                               int64_t n, int64_t column) {
  CountedColumn<V> c;
  c.most = pixels.all() ? part.rows : 0;
  c.mask = nullptr;
#pragma unroll
  for (int j = 0; j < V; ++j) c.rows[j] = part.rows;
  if (pixels.all()) return c;
  c.mask = mask_at(counted_pixels(pixels, view, n), part.top, column);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const CountedPixels map = counted_pixels(pixels, view, n + j);
    const int64_t below = column < map.width ? map.height - part.top : 0;
    if (below < part.rows) c.rows[j] = below < 0 ? 0 : static_cast<int>(below);
    if (c.rows[j] > c.most) c.most = c.rows[j];
  }
  return c;
}

// One bit for each of N rows, ty apart, of V channels with even masks: bit i * V + j is row i of channel j. done: rows before
// the first.
template <int N, int V>
KPFUSED_DEVICE unsigned counted_bits(const CountedColumn<V>& c, const MaskView& mask, int done, int ty) {
  unsigned bits = 0;
#pragma unroll 8 / V
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int row = done + i * ty;
      if (row >= c.rows[j]) continue;
      if (!c.mask || c.mask[row * mask.stride_y + j * mask.stride_inner()]) bits |= 1u << (i * V + j);
    }
  }
  return bits;
}

template <bool kFull, class T, int V>
KPFUSED_DEVICE void moments_step(const T* p, int64_t step, int rows, int done, const Plan& plan,
                                 const Sharpness<Acc<T>> (&beta)[V], Acc<T> y, const PixelView& pixels,
                                 const CountedColumn<V>& counted, MomentChannel<Acc<T>> (&channel)[V]) {
  using A = Acc<T>;
  constexpr int N = kStepItems<kFull, T, V>;
  Pack<T, V> pack[N];
  load_packs<kFull>(p, step, rows, plan.ty, pack);
  unsigned bits = ~0u;
  if (!kFull && !pixels.all()) bits = counted_bits<N>(counted, pixels.mask_view, done, plan.ty);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    A key[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      key[i] = kFull || i * plan.ty < rows ? widen(pack[i].value[j]) * beta[j].sign : -INFINITY;
    }
    if (!kFull && !pixels.all()) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (!(bits >> (i * V + j) & 1)) key[i] = -INFINITY;
      }
    }
    channel[j].add(key, y, plan.ty, beta[j].scale);
  }
}

template <class T, int V>
KPFUSED_DEVICE void channels_moments_states(const T* image, const ChannelsPart& part, const ForwardParams& p,
                                            const Plan& plan, int64_t n, const Sharpness<Acc<T>> (&beta)[V],
                                            Moments<Acc<T>> (&state)[V]) {
  using A = Acc<T>;
  constexpr int N = kItems<T, V>, kChecked = kStepItems<false, T, V>;
  const int64_t step = plan.ty * p.view.stride_y;
  const int unchecked = p.pixels.all() ? (N - 1) * plan.ty : kEveryStep;
  for (int column = 0; column < part.columns; column += plan.tx) {
    const int64_t at_x = part.left + column;
    const CountedColumn<V> counted = counted_column<V>(p.pixels, p.view, part, n, at_x);
    MomentChannel<A> channel[V];
#pragma unroll
    for (int j = 0; j < V; ++j) channel[j].clear();
    const T* from = image + part.top * p.view.stride_y + at_x * p.view.stride_x + part.channel;
    A y = centred<A>(part.top, p.view.height);
    int rows = counted.most;
    const auto advance = [&](int items) {
      rows -= items * plan.ty;
      from += items * step;
      y += static_cast<A>(items * plan.ty);
    };
    for (; rows > unchecked; advance(N)) {
      moments_step<true>(from, step, rows, counted.most - rows, plan, beta, y, p.pixels, counted, channel);
    }
    for (; rows > 0; advance(kChecked)) {
      moments_step<false>(from, step, rows, counted.most - rows, plan, beta, y, p.pixels, counted, channel);
    }
    const A x = centred<A>(at_x, p.view.width);
#pragma unroll
    for (int j = 0; j < V; ++j) state[j] = merge(state[j], channel[j].moments(x), beta[j].scale, Exp2{});
  }
}

// Bytes: reads the image once, and where there is one the mask; writes 17 numbers a map.
template <class T, int V>
__global__ void __launch_bounds__(plan_detail::kChannelThreads, kMomentBlocks<T>)
    channels_moments(Launch<ForwardParams> launch) {
  const auto& [p, plan] = launch;
  using A = Acc<T>;
  KPFUSED_SHARED(Moments<A>, shared);
  const ChannelsPart part = channels_part(plan, p.view);
  const int64_t n = part.image * p.view.inner + part.channel;
  Sharpness<A> beta[V];
  Moments<A> state[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    beta[j] = sharpness(beta_of<A>(p.beta, part.active ? n + j : 0));
    state[j] = empty_moments<A>();
  }
  if (part.active) {
    channels_moments_states<T, V>(static_cast<const T*>(p.heatmap) + part.image * p.view.stride_outer, part, p, plan, n,
                                  beta, state);
  }
  Merge<A> op[V];
#pragma unroll
  for (int j = 0; j < V; ++j) op[j].scale = beta[j].scale;
  reduce_pixels(state, part.pixel, plan, shared, op);
  if (part.pixel != 0 || !part.active) return;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (plan.parts() > 1) {
      static_cast<Moments<A>*>(p.workspace)[(n + j) * plan.parts() + part.part] = state[j];
    } else {
      write_map(p, n + j, state[j]);
    }
  }
}

// What the present column gives to q of one channel: q = constant + dy * (slope + yy * dy), and more at the peak's row.
template <class A>
struct ColumnPolynomial {
  A constant, slope;
  int peak;  // rows from the thread's first to that of the peak; negative where it is not in this column
};

// Loads that a thread issues backward, where a channel has twice the numbers.
template <class T, int V>
constexpr int kGradientItems = kItems<T, V> / 2;

// A peak's pixel, column and row from the thread's first on; negative ones are none of the thread's part.
struct PeakPixel {
  int column, row;
};

template <class A>
KPFUSED_DEVICE PeakPixel peak_pixel(const MapPolynomial<A>& map, const ChannelsPart& part) {
  const auto within = [](int64_t i, int size) { return 0 <= i && i < size ? static_cast<int>(i) : -1; };
  return {within(map.peak_x - part.left, part.columns), within(map.peak_y - part.top, part.rows)};
}

template <bool kFull, class T, int V>
KPFUSED_DEVICE void moments_gradient_step(const T* from, T* to, int64_t step, int64_t out_step, int rows, int done,
                                          int ty, const MapPolynomial<Acc<T>> (&map)[V],
                                          const ColumnPolynomial<Acc<T>> (&column)[V], Acc<T> y,
                                          const PixelView& pixels, const CountedColumn<V>& counted,
                                          Acc<T> (&dbeta)[V]) {
  using A = Acc<T>;
  constexpr int N = kGradientItems<T, V>;
  Pack<T, V> pack[N];
  load_packs<kFull>(from, step, rows, ty, pack);
  unsigned bits = ~0u;
  if (!kFull && !pixels.all()) bits = counted_bits<N>(counted, pixels.mask_view, done, ty);
#pragma unroll
  for (int i = 0; i < N; ++i, to += out_step) {
    if (!kFull && i * ty >= rows) continue;
    A dh[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      A logit = widen(pack[i].value[j]);
      // As in rows: hidden from dbeta, and selected, as q may be NaN.
      const bool counts = kFull || bits >> (i * V + j) & 1;
      if (!counts) logit = map[j].nothing();
      const A dy = y + static_cast<A>(i * ty) - map[j].q.mean_y;
      A q = column[j].constant + dy * (column[j].slope + map[j].q.yy * dy);
      if (done + i * ty == column[j].peak) q += map[j].q.at_peak;
      dh[j] = gradient(logit, q, map[j], dbeta[j]);
      if (!counts) dh[j] = 0;
    }
    store<T, V>(to, narrow(dh, T{}));
  }
}

template <class T, int V>
KPFUSED_DEVICE void channels_moments_gradient(const T* image, T* out, const ChannelsPart& part, const BackwardParams& p,
                                              const Plan& plan, int64_t n, const MapPolynomial<Acc<T>> (&map)[V],
                                              const PeakPixel (&peak)[V], Acc<T> (&dbeta)[V]) {
  using A = Acc<T>;
  constexpr int N = kGradientItems<T, V>;
  const int64_t step = plan.ty * p.view.stride_y, out_step = plan.ty * p.grad_view.stride_y;
  const int unchecked = p.pixels.all() ? (N - 1) * plan.ty : kEveryStep;
  const T* from_column = image + part.top * p.view.stride_y + part.left * p.view.stride_x + part.channel;
  T* out_column = out + part.top * p.grad_view.stride_y + part.left * p.grad_view.stride_x + part.channel;
  const A left = centred<A>(part.left, p.view.width);
  for (int done = 0; done < part.columns; done += plan.tx) {
    const A x = left + static_cast<A>(done);
    ColumnPolynomial<A> column[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      column[j] = {map[j].q.along_x(x), map[j].q.y + map[j].q.along_both(x), peak[j].column == done ? peak[j].row : -1};
    }
    const T* from = from_column;
    T* to = out_column;
    A y = centred<A>(part.top, p.view.height);
    int rows = part.rows;
    const auto advance = [&] {
      rows -= N * plan.ty;
      from += N * step;
      to += N * out_step;
      y += static_cast<A>(N * plan.ty);
    };
    for (; rows > unchecked; advance()) {
      moments_gradient_step<true>(from, to, step, out_step, rows, part.rows - rows, plan.ty, map, column, y, p.pixels,
                                  CountedColumn<V>{}, dbeta);
    }
    // Asked for no sooner, so that the loop above has its registers.
    const CountedColumn<V> counted = counted_column<V>(p.pixels, p.view, part, n, part.left + done);
    if (!p.pixels.all()) rows = counted.most;
    for (; rows > 0; advance()) {
      moments_gradient_step<false>(from, to, step, out_step, rows, counted.most - rows, plan.ty, map, column, y, p.pixels,
                                   counted, dbeta);
    }
    if (!p.pixels.all()) fill_below<T, V>(out_column, p.grad_view.stride_y, counted.most, part.rows, plan.ty);
    from_column += plan.tx * p.view.stride_x;
    out_column += plan.tx * p.grad_view.stride_x;
  }
}

// Bytes: reads the image once, and where there is one the mask; writes its gradient once.
template <class T, int V>
__global__ void __launch_bounds__(plan_detail::kChannelThreads, kMomentBlocks<T>)
    channels_moments_backward(Launch<BackwardParams> launch) {
  const auto& [p, plan] = launch;
  using A = Acc<T>;
  const ChannelsPart part = channels_part(plan, p.view);
  const int64_t n = part.image * p.view.inner + part.channel;
  MapPolynomial<A> map[V];
  PeakPixel peak[V];
  A dbeta[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    map[j] = map_polynomial<A>(p, part.active ? n + j : 0);
    peak[j] = peak_pixel(map[j], part);
    dbeta[j] = 0;
  }
  if (part.active) {
    channels_moments_gradient<T, V>(static_cast<const T*>(p.heatmap) + part.image * p.view.stride_outer,
                                    static_cast<T*>(p.grad_heatmap) + part.image * p.grad_view.stride_outer, part, p,
                                    plan, n, map, peak, dbeta);
  }
  if (!p.grad_beta) return;
  KPFUSED_SHARED(A, shared);
  const Add op[V] = {};
  reduce_pixels(dbeta, part.pixel, plan, shared, op);
  if (part.pixel != 0 || !part.active) return;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const A sum = dbeta[j] * map[j].sharp.sign;
    if (plan.parts() > 1) {
      static_cast<A*>(p.workspace)[(n + j) * plan.parts() + part.part] = sum;
    } else {
      write_grad_beta(p, n + j, sum);
    }
  }
}

}  // namespace kpfused::cuda
