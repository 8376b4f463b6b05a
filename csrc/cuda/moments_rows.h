// SPDX-License-Identifier: MIT
// Moments of maps whose rows are contiguous (stride_x == 1), with or without masks: threads lie over a map as in rows.h.
//
// A thread measures y from the row of its running peak, and x from the peak's column in its vectors, which weighs the
// columns' sums once at the end. When a step raises the peak, the sums move to the new one. Beside what rows.h spends on
// an element: two multiply-adds and a maximum, which keeps the distance of -inf out of the arithmetic; once a step, a
// search for the peak's pixel in registers. One read of the map forward, one read and one write backward.
#pragma once

#include "pixels.h"
#include "rows.h"

namespace kpfused::cuda {

// Rows beyond which no step needs a check are none where some pixels may not count: the step that ends a column checks.
constexpr int kEveryStep = 0x7fffffff;

// Such a step takes half as many loads, which leaves registers for masks.
template <bool kFull, class T, int V>
constexpr int kStepItems = kFull ? kItems<T, V> : kItems<T, V> / 2;

// Blocks a multiprocessor holds, as kRowBlocks: 128 registers a thread.
template <class T>
constexpr int kMomentBlocks = sizeof(Acc<T>) == 8 ? 1 : 2;

// One thread's columns: sums of weights for each, and for all of them together with y from the peak's row and x, which has
// no square in it, from the first column.
template <class A, int V>
struct MomentColumns {
  A peak;   // -inf before the first pixel
  A at_y;   // of the first pixel, in row order, whose key is the peak
  int at;    // its column
  A sum[V], all, x, y, xy, yy, distance;

  KPFUSED_DEVICE void clear() {
    peak = -INFINITY;
    at_y = kNowhere<A>;
    at = 0;
    all = x = y = xy = yy = distance = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] = 0;
  }

  // N rows, ty apart, the first at `first`; `to` is the highest key of all so far.
  template <int N>
  KPFUSED_DEVICE void raise(const A (&key)[N][V], A to, A first, int ty, A scale) {
    if (!(to > peak)) return;
    int pixel = 0;
#pragma unroll
    for (int k = N * V - 1; k >= 0; --k) pixel = key[k / V][k % V] == to ? k : pixel;
    const A to_y = first + static_cast<A>(pixel / V * ty);
    const A down = peak - to, w = Exp2{}(down * scale), dy = at_y - to_y;
    yy = w * (yy + dy * (y + y + dy * all));
    xy = w * (xy + dy * x);
    y = w * (y + dy * all);
    all *= w;
    x *= w;
    distance = w * distance + all * larger(down, Limits<A>::lowest);
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] *= w;
    peak = to;
    at_y = to_y;
    at = pixel % V;
  }

  template <int N>
  KPFUSED_DEVICE void add(const A (&key)[N][V], A first, int ty, A scale) {
    const A base = larger(peak, Limits<A>::lowest), dy = first - at_y;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      A row = 0, row_x = 0, row_distance = 0;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A d = key[i][j] - base, w = Exp2{}(d * scale), finite = larger(d, Limits<A>::lowest);
        row = j == 0 ? w : row + w;
        if (j == 1) row_x = w;
        if (j > 1) row_x += w * static_cast<A>(j);
        row_distance = j == 0 ? w * finite : row_distance + w * finite;
        sum[j] += w;
      }
      const A row_dy = dy + static_cast<A>(i * ty), weighed = row * row_dy;
      all += row;
      x += row_x;
      y += weighed;
      xy += row_x * row_dy;
      yy += weighed * row_dy;
      distance += row_distance;
    }
  }

  // left: the first column, centred.
  KPFUSED_DEVICE Moments<A> moments(A left) const {
    const A column = static_cast<A>(at);
    Moments<A> m = empty_moments<A>();
    m.peak = larger(peak, Limits<A>::lowest);
    m.at_x = peak < Limits<A>::lowest ? kNowhere<A> : left + column;
    m.at_y = at_y;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const A dx = static_cast<A>(j) - column, weighed = sum[j] * dx;
      m.sum += sum[j];
      m.x += weighed;
      m.xx += weighed * dx;
    }
    m.y = y;
    m.xy = xy - column * y;
    m.yy = yy;
    m.distance = distance;
    return m;
  }
};

// Gives pixels that do not count a value of no weight.
template <int N, int V, class A>
KPFUSED_DEVICE void hide(unsigned bits, A nothing, A (&key)[N][V]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (!(bits >> (i * V + j) & 1)) key[i][j] = nothing;
    }
  }
}

template <bool kFull, class T, int V>
KPFUSED_DEVICE void moments_step(const T* p, int64_t step, int rows, const Plan& plan, const Sharpness<Acc<T>>& beta,
                                 Acc<T> y, const CountedPixels& counted, const uint8_t* mask, int columns_left,
                                 MomentColumns<Acc<T>, V>& columns) {
  using A = Acc<T>;
  constexpr int N = kStepItems<kFull, T, V>;
  Pack<T, V> pack[N];
  load_packs<kFull>(p, step, rows, plan.ty, pack);
  unsigned bits = 0;
  if (!kFull && !counted.all) bits = counted_bits<N, V>(counted, mask, rows, plan.ty, columns_left);
  A key[N][V];
  keys_of<kFull>(pack, rows, plan.ty, beta.sign, key);
  if (!kFull && !counted.all) hide(bits, A(-INFINITY), key);
  A top = columns.peak;
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int j = 0; j < V; ++j) top = larger(top, key[i][j]);
  }
  columns.raise(key, top, y, plan.ty, beta.scale);
  columns.add(key, y, plan.ty, beta.scale);
}

template <class T, int V>
KPFUSED_DEVICE Moments<Acc<T>> rows_moments_state(const T* map, const RowsPart& part, const MapView& view,
                                                  const Plan& plan, const Sharpness<Acc<T>>& beta,
                                                  const CountedPixels& counted) {
  using A = Acc<T>;
  constexpr int N = kItems<T, V>, kChecked = kStepItems<false, T, V>;
  Moments<A> state = empty_moments<A>();
  const int64_t step = plan.ty * view.stride_y;
  const int tx = plan.tx * V;
  const T* column = map + part.top * view.stride_y + part.left;
  const uint8_t* mask_column = mask_at(counted, part.top, part.left);
  A x = centred<A>(part.left, view.width);
  const int unchecked = counted.all ? (N - 1) * plan.ty : kEveryStep;
  for (int left = part.columns; left > 0; left -= tx, column += tx, x += static_cast<A>(tx)) {
    MomentColumns<A, V> columns;
    columns.clear();
    const T* p = column;
    const uint8_t* mask = mask_column;
    A y = centred<A>(part.top, view.height);
    int rows = part.rows;
    const auto advance = [&](int items) {
      rows -= items * plan.ty;
      p += items * step;
      y += static_cast<A>(items * plan.ty);
    };
    for (; rows > unchecked; advance(N)) {
      moments_step<true>(p, step, rows, plan, beta, y, counted, mask, left, columns);
    }
    for (; rows > 0; advance(kChecked)) {
      moments_step<false>(p, step, rows, plan, beta, y, counted, mask, left, columns);
      if (mask) mask += kChecked * plan.ty * counted.stride_y;
    }
    state = merge(state, columns.moments(x), beta.scale, Exp2{});
    if (mask) mask_column += tx * counted.stride_x;
  }
  return state;
}

// The part that lies within the valid size.
KPFUSED_DEVICE RowsPart clipped(RowsPart part, const CountedPixels& counted) {
  const auto smaller = [](int a, int64_t b) { return b < 0 ? 0 : b < a ? static_cast<int>(b) : a; };
  part.rows = smaller(part.rows, counted.height - part.top);
  part.columns = smaller(part.columns, counted.width - part.left);
  return part;
}

// Bytes: reads the map once, and where there is one the mask; writes 17 numbers.
template <class T, int V>
__global__ void __launch_bounds__(plan_detail::kRowThreads, kMomentBlocks<T>)
    rows_moments(Launch<ForwardParams> launch) {
  const auto& [p, plan] = launch;
  using A = Acc<T>;
  KPFUSED_SHARED(Moments<A>, shared);
  const RowsPart whole = rows_part(plan, p.view);
  const int64_t n = whole.map < p.view.maps() ? whole.map : 0;
  const CountedPixels counted = counted_pixels(p.pixels, p.view, n);
  const RowsPart part = clipped(whole, counted);
  const Sharpness<A> beta = sharpness(beta_of<A>(p.beta, n));
  Moments<A> state = empty_moments<A>();
  if (part.rows > 0) {
    state = rows_moments_state<T, V>(static_cast<const T*>(p.heatmap) + map_offset(p.view, n), part, p.view, plan, beta,
                                     counted);
  }
  state = reduce_team(state, plan.team, shared, Merge<A>{beta.scale});
  if (threadIdx.x % plan.team != 0 || part.map >= p.view.maps()) return;
  if (plan.parts() > 1) {
    static_cast<Moments<A>*>(p.workspace)[part.item] = state;
  } else {
    write_map(p, part.map, state);
  }
}

// What the element loops of backward need of one map. Distances are in logits: times a scale as small as that of beta = 0,
// the terms of dbeta would be flushed to zero.
template <class A>
struct MapPolynomial {
  A peak, floor;  // a key, and a distance from it at which nothing has weight: finite, so that what q makes of it is
  Sharpness<A> sharp;
  A beta;
  Polynomial<A> q;
  int64_t peak_x, peak_y;  // the pixel whose gradient is greater by q.at_peak

  // The logit that weighs nothing.
  KPFUSED_DEVICE A nothing() const { return sharp.sign < A(0) ? A(INFINITY) : A(-INFINITY); }
};

// Without moments, q.at_peak is zero.
template <class A>
KPFUSED_DEVICE MapPolynomial<A> map_polynomial(const BackwardParams& p, int64_t n) {
  constexpr A kNoWeight = sizeof(A) == 8 ? -1100 : -200;  // an exponent
  const A beta = beta_of<A>(p.beta, n);
  const Sharpness<A> sharp = sharpness(beta);
  const MomentStats<A> stats = moment_stats<A>(p, n);
  MapPolynomial<A> map{stats.peak, larger(kNoWeight / sharp.scale, Limits<A>::lowest), sharp, beta, {}, -1, -1};
  if (is_empty(p.pixels, stats.sum)) return map;
  map.q = backward_polynomial(stats, field_gradients<A>(p, n), beta, A(1));
  if (p.with_moments) {
    map.peak_x = p.moments.peak[2 * n];
    map.peak_y = p.moments.peak[2 * n + 1];
  }
  return map;
}

// One element: returns dh, and adds to what times the sign of beta is dbeta.
template <class A>
KPFUSED_DEVICE A gradient(A logit, A q, const MapPolynomial<A>& map, A& dbeta) {
  const A d = larger(logit * map.sharp.sign - map.peak, map.floor);
  const A wq = Exp2{}(d * map.sharp.scale) * (q + map.q.distance * d);
  dbeta += d * wq;
  return map.beta * wq;
}

// cross: what Polynomial::along_both gives for the first column; from there on it grows from column to column.
// to_peak: rows from the first to that of the peak's pixel; at: its column. Neither need lie in this step.
template <bool kFull, class T, int V>
KPFUSED_DEVICE void moments_gradient_step(const T* from, T* to, int64_t step, int64_t out_step, int rows, int ty,
                                          const MapPolynomial<Acc<T>>& map, const Acc<T> (&along_x)[V],
                                          Acc<T> cross, Acc<T> y, int to_peak, int at,
                                          const CountedPixels& counted, const uint8_t* mask, int columns_left,
                                          Acc<T>& dbeta) {
  using A = Acc<T>;
  constexpr int N = kStepItems<kFull, T, V>;
  Pack<T, V> pack[N];
  load_packs<kFull>(from, step, rows, ty, pack);
  unsigned bits = 0;
  if (!kFull && !counted.all) bits = counted_bits<N, V>(counted, mask, rows, ty, columns_left);
  A logit[N][V];
  keys_of<kFull>(pack, rows, ty, A(1), logit);
  if (!kFull && !counted.all) hide(bits, map.nothing(), logit);
#pragma unroll
  for (int i = 0; i < N; ++i, to += out_step) {
    if (!kFull && i * ty >= rows) continue;
    const A row_y = y + static_cast<A>(i * ty), dy = row_y - map.q.mean_y;
    const A along_y = map.q.along_y(row_y) + cross * dy, per_column = map.q.xy * dy;
    A q[V], dh[V];
#pragma unroll
    for (int j = 0; j < V; ++j) q[j] = along_x[j] + along_y + per_column * static_cast<A>(j);
    if (i * ty == to_peak) {
#pragma unroll
      for (int j = 0; j < V; ++j) q[j] += j == at ? map.q.at_peak : A(0);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) dh[j] = gradient(logit[i][j], q[j], map, dbeta);
    if (!kFull && !counted.all) {
      // Selected: what the other pixels made of the map's q may be NaN.
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (!(bits >> (i * V + j) & 1)) dh[j] = 0;
      }
    }
    store<T, V>(to, narrow(dh, T{}));
  }
}

// Zeros for the rows of a part that lie beyond the valid ones.
template <class T, int V>
KPFUSED_DEVICE void fill_below(T* to, int64_t stride_y, int valid, int rows, int ty) {
  const Acc<T> zero[V] = {};
  int row = 0;
  while (row < valid) row += ty;
  for (; row < rows; row += ty) store<T, V>(to + row * stride_y, narrow(zero, T{}));
}

template <class T, int V>
KPFUSED_DEVICE Acc<T> rows_moments_gradient(const T* map, T* out, const RowsPart& part, const BackwardParams& p,
                                            const Plan& plan, const MapPolynomial<Acc<T>>& at,
                                            const CountedPixels& counted) {
  using A = Acc<T>;
  constexpr int N = kItems<T, V>, kChecked = kStepItems<false, T, V>;
  A dbeta = 0;
  const int64_t step = plan.ty * p.view.stride_y, out_step = plan.ty * p.grad_view.stride_y;
  const int tx = plan.tx * V;
  const RowsPart valid = clipped(part, counted);
  const int unchecked = counted.all ? (N - 1) * plan.ty : kEveryStep;
  // The peak's pixel from the thread's first on, or a row that is none.
  const int64_t right = at.peak_x - part.left, down = at.peak_y - part.top;
  const int peak_x = 0 <= right && right < part.columns ? static_cast<int>(right) : -1;
  const int peak_y = 0 <= down && down < part.rows ? static_cast<int>(down) : -1;
  const int64_t first = part.top * p.view.stride_y + part.left;
  T* const out_first = out + part.top * p.grad_view.stride_y + part.left;
  for (int done = 0; done < part.columns; done += tx) {
    const A x = centred<A>(part.left + done, p.view.width);
    A along_x[V];
#pragma unroll
    for (int j = 0; j < V; ++j) along_x[j] = at.q.along_x(x + static_cast<A>(j));
    const A cross = at.q.along_both(x);
    const int columns_left = valid.columns - done;
    const int peak_column = peak_x - done;
    int to_peak = 0 <= peak_column && peak_column < V ? peak_y : -1;
    const T* from = map + first + done;
    T* to = out_first + done;
    const uint8_t* mask = mask_at(counted, part.top, part.left + done);
    A y = centred<A>(part.top, p.view.height);
    int rows = columns_left > 0 ? valid.rows : 0;
    const auto advance = [&](int items) {
      rows -= items * plan.ty;
      from += items * step;
      to += items * out_step;
      y += static_cast<A>(items * plan.ty);
      to_peak -= items * plan.ty;
    };
    for (; rows > unchecked; advance(N)) {
      moments_gradient_step<true>(from, to, step, out_step, rows, plan.ty, at, along_x, cross, y, to_peak,
                                  peak_column, counted, mask, columns_left, dbeta);
    }
    for (; rows > 0; advance(kChecked)) {
      moments_gradient_step<false>(from, to, step, out_step, rows, plan.ty, at, along_x, cross, y, to_peak,
                                   peak_column, counted, mask, columns_left, dbeta);
      if (mask) mask += kChecked * plan.ty * counted.stride_y;
    }
    if (!counted.all) {
      fill_below<T, V>(out_first + done, p.grad_view.stride_y, columns_left > 0 ? valid.rows : 0, part.rows, plan.ty);
    }
  }
  return dbeta;
}

// Bytes: reads the map once, and where there is one the mask; writes its gradient once.
template <class T, int V>
__global__ void __launch_bounds__(plan_detail::kRowThreads, kMomentBlocks<T>)
    rows_moments_backward(Launch<BackwardParams> launch) {
  const auto& [p, plan] = launch;
  using A = Acc<T>;
  const RowsPart part = rows_part(plan, p.view);
  const int64_t n = part.map < p.view.maps() ? part.map : 0;
  const MapPolynomial<A> at = map_polynomial<A>(p, n);
  const CountedPixels counted = counted_pixels(p.pixels, p.view, n);
  A dbeta = 0;
  if (part.rows > 0) {
    dbeta = rows_moments_gradient<T, V>(static_cast<const T*>(p.heatmap) + map_offset(p.view, n),
                                        static_cast<T*>(p.grad_heatmap) + map_offset(p.grad_view, n), part, p, plan, at,
                                        counted);
  }
  if (!p.grad_beta) return;
  KPFUSED_SHARED(A, shared);
  dbeta = reduce_team(dbeta, plan.team, shared, Add{}) * at.sharp.sign;
  if (threadIdx.x % plan.team != 0 || part.map >= p.view.maps()) return;
  if (plan.parts() > 1) {
    static_cast<A*>(p.workspace)[part.item] = dbeta;
  } else {
    write_grad_beta(p, part.map, dbeta);
  }
}

}  // namespace kpfused::cuda
