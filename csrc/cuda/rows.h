// SPDX-License-Identifier: MIT
// Maps whose rows are contiguous (stride_x == 1).
//
// A team of threads (some lanes of a warp, or a block) takes one map, or one part of a split map, and lies over it as
// tx x ty: each thread owns vectors of fixed columns and walks down the rows, `items` loads at a time. So an element
// needs no index: its column is the place in the vector, x weighs a column's sum once at the end, and y weighs the sum
// of a vector. One read of the map forward, one read and one write backward.
#pragma once

#include "../moments.h"
#include "merge.h"

namespace kpfused::cuda {

// Loads a thread issues before it uses the first: as plan.h says, for as many elements as registers hold.
template <class T, int V>
constexpr int kItems = items_of(static_cast<int>(sizeof(T)), V);

// Blocks a multiprocessor holds, which bounds a thread's registers: 80; 128 where dbeta's sum would spill; all there are
// for float64.
template <class T, bool kBeta>
constexpr int kRowBlocks = sizeof(Acc<T>) == 8 ? 1 : kBeta ? 2 : 3;

// The part of a map that a thread's team takes, and the thread's place in it. Within a part, 32 bits count rows and
// columns; offsets in memory are 64-bit.
struct RowsPart {
  int64_t map, item;   // item: map * parts + part
  int64_t top, left;   // the thread's first row and column in the map
  int rows, columns;   // from there to the end of the part; no rows for a thread without work
};

KPFUSED_DEVICE RowsPart rows_part(const Plan& plan, const MapView& view) {
  const int team = threadIdx.x / plan.team, rank = threadIdx.x % plan.team;
  const int ry = rank / plan.tx, rx = rank % plan.tx * plan.vector;
  RowsPart part;
  part.item = static_cast<int64_t>(blockIdx.x) * plan.teams() + team;
  part.map = part.item;
  part.top = part.left = 0;
  if (plan.parts() > 1) {
    part.map = part.item / plan.parts();
    const int64_t index = part.item % plan.parts();
    part.top = index / plan.parts_x * plan.rows_per_part;
    part.left = index % plan.parts_x * plan.columns_per_part;
  }
  const bool working = part.map < view.maps() && ry < plan.ty;
  const int64_t below = view.height - part.top, right = view.width - part.left;
  part.rows = working ? static_cast<int>(below < plan.rows_per_part ? below : plan.rows_per_part) - ry : 0;
  part.columns = static_cast<int>(right < plan.columns_per_part ? right : plan.columns_per_part) - rx;
  part.top += ry;
  part.left += rx;
  return part;
}

// One thread's columns: V running sums of weights relative to a running peak.
template <class A, int V>
struct Columns {
  A peak, sum[V], sum_y;

  KPFUSED_DEVICE void clear() {
    peak = Limits<A>::lowest;
    sum_y = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] = 0;
  }

  KPFUSED_DEVICE void raise(A to, A scale) {
    if (!(to > peak)) return;
    const A w = Exp2{}((peak - to) * scale);
    peak = to;
    sum_y *= w;
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] *= w;
  }

  // N rows, ty apart, the first at y. Their distance from the first weighs each row's weight, y weighs all of it once:
  // a row's own y would cost an addition.
  template <int N>
  KPFUSED_DEVICE void add(const A (&key)[N][V], A y, int ty, A scale) {
    A total = 0, below = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      A row;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const A w = Exp2{}((key[i][j] - peak) * scale);
        row = j == 0 ? w : row + w;
        if (V > 1) sum[j] += w;
      }
      total = i == 0 ? row : total + row;
      if (i == 1) below = row * static_cast<A>(ty);
      if (i > 1) below += row * static_cast<A>(i * ty);
    }
    if (V == 1) sum[0] += total;
    sum_y += total * y + below;
  }

  // x: of the first column, centred.
  KPFUSED_DEVICE State<A> state(A x) const {
    State<A> s{peak, 0, 0, sum_y};
#pragma unroll
    for (int j = 0; j < V; ++j) {
      s.sum += sum[j];
      s.sum_x += sum[j] * (x + static_cast<A>(j));
    }
    return s;
  }
};

// N vectors, ty rows apart, all loaded before the first is used. kFull: all of them lie in the map, as in every step but
// a thread's last.
template <bool kFull, class T, int V, int N>
KPFUSED_DEVICE void load_packs(const T* p, int64_t step, int rows, int ty, Pack<T, V> (&pack)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i, p += step) {
    if (kFull || i * ty < rows) pack[i] = load<T, V>(p);
  }
}

// Those vectors as keys; rows beyond the end weigh nothing.
template <bool kFull, class T, int V, int N>
KPFUSED_DEVICE void keys_of(const Pack<T, V> (&pack)[N], int rows, int ty, Acc<T> sign, Acc<T> (&key)[N][V]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int j = 0; j < V; ++j) key[i][j] = kFull || i * ty < rows ? widen(pack[i].value[j]) * sign : -INFINITY;
  }
}

template <bool kFull, class T, int V, int N>
KPFUSED_DEVICE void load_keys(const T* p, int64_t step, int rows, int ty, Acc<T> sign, Acc<T> (&key)[N][V]) {
  Pack<T, V> pack[N];
  load_packs<kFull>(p, step, rows, ty, pack);
  keys_of<kFull>(pack, rows, ty, sign, key);
}

template <bool kFull, class T, int V>
KPFUSED_DEVICE void rows_step(const T* p, int64_t step, int rows, const Plan& plan, const Sharpness<Acc<T>>& beta,
                              Acc<T> y, Columns<Acc<T>, V>& columns) {
  using A = Acc<T>;
  constexpr int N = kItems<T, V>;
  A key[N][V];
  load_keys<kFull>(p, step, rows, plan.ty, beta.sign, key);
  A top = columns.peak;
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int j = 0; j < V; ++j) top = larger(top, key[i][j]);
  }
  columns.raise(top, beta.scale);
  columns.add(key, y, plan.ty, beta.scale);
}

template <class T, int V>
KPFUSED_DEVICE State<Acc<T>> rows_state(const T* map, const RowsPart& part, const MapView& view, const Plan& plan,
                                        const Sharpness<Acc<T>>& beta) {
  using A = Acc<T>;
  constexpr int N = kItems<T, V>;
  State<A> state = empty_state<A>();
  const int64_t step = plan.ty * view.stride_y;
  const int tx = plan.tx * V;
  const T* column = map + part.top * view.stride_y + part.left;
  A x = centred<A>(part.left, view.width);
  for (int left = part.columns; left > 0; left -= tx, column += tx, x += static_cast<A>(tx)) {
    Columns<A, V> columns;
    columns.clear();
    const T* p = column;
    A y = centred<A>(part.top, view.height);
    int rows = part.rows;
    for (; rows > (N - 1) * plan.ty; rows -= N * plan.ty, p += N * step, y += static_cast<A>(N * plan.ty)) {
      rows_step<true>(p, step, rows, plan, beta, y, columns);
    }
    if (rows > 0) rows_step<false>(p, step, rows, plan, beta, y, columns);
    state = merge(state, columns.state(x), beta.scale, Exp2{});
  }
  return state;
}

// Bytes: reads the map once, writes 6 numbers.
template <class T, int V>
__global__ void __launch_bounds__(plan_detail::kRowThreads, kRowBlocks<T, false>)
    rows_forward(Launch<ForwardParams> launch) {
  const auto& [p, plan] = launch;
  using A = Acc<T>;
  KPFUSED_SHARED(State<A>, shared);
  const RowsPart part = rows_part(plan, p.view);
  const int64_t n = part.map < p.view.maps() ? part.map : 0;
  const Sharpness<A> beta = sharpness(beta_of<A>(p.beta, n));
  State<A> state = empty_state<A>();
  if (part.rows > 0) {
    state = rows_state<T, V>(static_cast<const T*>(p.heatmap) + map_offset(p.view, n), part, p.view, plan, beta);
  }
  state = reduce_team(state, plan.team, shared, Merge<A>{beta.scale});
  if (threadIdx.x % plan.team != 0 || part.map >= p.view.maps()) return;
  if (plan.parts() > 1) {
    static_cast<State<A>*>(p.workspace)[part.item] = state;
  } else {
    write_map(p, part.map, state);
  }
}

// What the element loops of backward need of one map.
template <class A>
struct MapSlope {
  A peak, beta;
  Sharpness<A> sharp;
  Slope<A> slope;
};

template <class A>
KPFUSED_DEVICE MapSlope<A> map_slope(const BackwardParams& p, int64_t n, bool with_beta) {
  const A beta = beta_of<A>(p.beta, n);
  const Stats<A> stats = static_cast<const Stats<A>*>(p.stats)[n];
  const A* const grad = static_cast<const A*>(p.grad_coordinates) + n * p.grad_stride_map;
  const A x = grad[0] * static_cast<A>(p.units.scale_x), y = grad[p.grad_stride_xy] * static_cast<A>(p.units.scale_y);
  MapSlope<A> map{stats.peak, beta, sharpness(beta), {}};
  if (!is_empty(p.pixels, stats.sum)) map.slope = backward_slope(stats, x, y, with_beta ? A(1) : beta);
  return map;
}

// One element: returns dh, and adds to dbeta where it is wanted.
template <bool kBeta, class A>
KPFUSED_DEVICE A gradient(A key, A q, const MapSlope<A>& map, A& dbeta) {
  const A d = key - map.peak;
  const A wq = Exp2{}(d * map.sharp.scale) * q;
  if (!kBeta) return wq;
  dbeta += finite_distance(d) * wq;
  return map.beta * wq;
}

template <bool kFull, int V, bool kBeta, class T>
KPFUSED_DEVICE void rows_gradient_step(const T* from, T* to, int64_t step, int64_t out_step, int rows, int ty,
                                       const MapSlope<Acc<T>>& at, const Acc<T> (&along_x)[V], Acc<T> y,
                                       Acc<T>& dbeta) {
  using A = Acc<T>;
  constexpr int N = kItems<T, V>;
  A key[N][V];
  load_keys<kFull>(from, step, rows, ty, at.sharp.sign, key);
#pragma unroll
  for (int i = 0; i < N; ++i, to += out_step) {
    if (!kFull && i * ty >= rows) continue;
    const A along_y = at.slope.along_y(y + static_cast<A>(i * ty));
    A dh[V];
#pragma unroll
    for (int j = 0; j < V; ++j) dh[j] = gradient<kBeta>(key[i][j], along_x[j] + along_y, at, dbeta);
    store<T, V>(to, narrow(dh, T{}));
  }
}

template <class T, int V, bool kBeta>
KPFUSED_DEVICE Acc<T> rows_gradient(const T* map, T* out, const RowsPart& part, const BackwardParams& p,
                                    const Plan& plan, const MapSlope<Acc<T>>& at) {
  using A = Acc<T>;
  constexpr int N = kItems<T, V>;
  A dbeta = 0;
  const int64_t step = plan.ty * p.view.stride_y, out_step = plan.ty * p.grad_view.stride_y;
  const int tx = plan.tx * V;
  const T* column = map + part.top * p.view.stride_y + part.left;
  T* out_column = out + part.top * p.grad_view.stride_y + part.left;
  A x = centred<A>(part.left, p.view.width);
  for (int left = part.columns; left > 0; left -= tx, column += tx, out_column += tx, x += static_cast<A>(tx)) {
    A along_x[V];
#pragma unroll
    for (int j = 0; j < V; ++j) along_x[j] = at.slope.along_x(x + static_cast<A>(j));
    const T* from = column;
    T* to = out_column;
    A y = centred<A>(part.top, p.view.height);
    int rows = part.rows;
    for (; rows > (N - 1) * plan.ty; rows -= N * plan.ty) {
      rows_gradient_step<true, V, kBeta>(from, to, step, out_step, rows, plan.ty, at, along_x, y, dbeta);
      from += N * step;
      to += N * out_step;
      y += static_cast<A>(N * plan.ty);
    }
    if (rows > 0) rows_gradient_step<false, V, kBeta>(from, to, step, out_step, rows, plan.ty, at, along_x, y, dbeta);
  }
  return dbeta;
}

// Bytes: reads the map once, writes its gradient once.
template <class T, int V, bool kBeta>
__global__ void __launch_bounds__(plan_detail::kRowThreads, kRowBlocks<T, kBeta>)
    rows_backward(Launch<BackwardParams> launch) {
  const auto& [p, plan] = launch;
  using A = Acc<T>;
  const RowsPart part = rows_part(plan, p.view);
  const int64_t n = part.map < p.view.maps() ? part.map : 0;
  const MapSlope<A> at = map_slope<A>(p, n, kBeta);
  A dbeta = 0;
  if (part.rows > 0) {
    dbeta = rows_gradient<T, V, kBeta>(static_cast<const T*>(p.heatmap) + map_offset(p.view, n),
                                       static_cast<T*>(p.grad_heatmap) + map_offset(p.grad_view, n), part, p, plan, at);
  }
  if (!kBeta) return;
  KPFUSED_SHARED(A, shared);
  dbeta = reduce_team(dbeta, plan.team, shared, Add{}) * at.sharp.sign;
  if (threadIdx.x % plan.team != 0 || part.map >= p.view.maps()) return;
  static_cast<A*>(plan.parts() > 1 ? p.workspace : p.grad_beta)[part.item] = dbeta;
}

}  // namespace kpfused::cuda
