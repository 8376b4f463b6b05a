// SPDX-License-Identifier: MIT
// Backward where lanes run along rows (stride_x == 1).
//
//   dh = beta * w * q,  q = X (x - mean x) + Y (y - mean y),  w = 2^((k - peak) * scale)
//   dbeta = sign(beta) * sum (k - peak) * w * q
//
// Reads every element once and writes its gradient once. The part of q that depends on the column is tabulated once a
// map, so an element costs its weight, one addition and one multiplication; dbeta adds two multiplications and an
// addition.
#pragma once

#include "maps.h"

namespace kpfused::cpu::KPFUSED_ISA {

// What the element loops need of one map.
template <class A>
struct MapGradient {
  Falloff<A> of;
  Slope<A> q;  // times beta where dbeta is not wanted
  A beta;
};

template <class A>
KPFUSED_INLINE MapGradient<A> map_gradient(const BackwardParams& params, int64_t map) {
  const A* s = static_cast<const A*>(params.stats) + map * kStats;
  const A* g = static_cast<const A*>(params.grad_coordinates) + map * params.grad_stride_map;
  const A beta = beta_of<A>(params.beta, map);
  const Slope<A> q = backward_slope(Stats<A>{s[0], s[1], s[2], s[3]}, g[0] * A(params.units.scale_x),
                                    g[params.grad_stride_xy] * A(params.units.scale_y), params.grad_beta ? A(1) : beta);
  return {falloff(sharpness(beta), s[0]), q, beta};
}

// N vectors: h in, dh out, and dbeta's terms without their sign. A distance raised to `lowest` has weight zero.
template <class A, bool kBeta, int N>
KPFUSED_INLINE void gradient(Vec<A> (&h)[N], const Vec<A> (&q)[N], const Falloff<Vec<A>>& of, Vec<A> beta,
                             Vec<A> (&dbeta)[N]) {
  Vec<A> w[N];
  for (int j = 0; j < N; ++j) w[j] = h[j] = distance(h[j], of);
  exp2<A, N>(w, of.scale);
  for (int j = 0; j < N; ++j) w[j] = w[j] * q[j];
  for (int j = 0; kBeta && j < N; ++j) dbeta[j] = h[j] * w[j];
  for (int j = 0; j < N; ++j) h[j] = kBeta ? beta * w[j] : w[j];
}

// Bytes that rows are fetched ahead of their use, beyond where hardware stops at the end of a page.
constexpr int64_t kReadAhead = 4096, kWriteAhead = 2048;

template <int N>
struct Count {
  static constexpr int value = N;
};

// n >= lanes elements of one row; q of the column comes from column(i). The last vector overlaps the one before it and
// writes the same values there once more.
template <class T, bool kBeta, class Q>
KPFUSED_INLINE void backward_span(const T* h, T* out, int64_t n, const MapGradient<Acc<T>>& map, const Q& q,
                                  Vec<Acc<T>>& dbeta) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const Falloff<Vec<A>> of = in_lanes(map.of);
  const Vec<A> beta = splat(map.beta);
  const auto block = [&](auto count, int64_t at) __attribute__((always_inline)) {
    constexpr int N = decltype(count)::value;
    Vec<A> v[N], slope[N], more[N];
    for (int j = 0; j < N; ++j) {
      v[j] = load(h + at + j * L), slope[j] = q(at + j * L);
      if (j * L * int(sizeof(T)) % 64 == 0) {
        prefetch(h + at + j * L, kReadAhead);
        prefetch_for_write(out + at + j * L, kWriteAhead);
      }
    }
    gradient<A, kBeta, N>(v, slope, of, beta, more);
    for (int j = 0; j < N; ++j) store(out + at + j * L, v[j]);
    for (int j = 0; kBeta && j < N; ++j) dbeta += more[j];
  };
  // Blocks of as equal a width as possible: one vector alone has nothing to hide the latency of its exp2.
  int64_t i = 0;
  for (int64_t left = n / L; left > 0;) {
    const int64_t count = ceil_div(left, ceil_div(left, int64_t(kBlock)));
    if constexpr (kBlock > 3) {
      if (count == 4) block(Count<4>{}, i);
    }
    if (count == 3) block(Count<3>{}, i);
    if (count == 2) block(Count<2>{}, i);
    if (count == 1) block(Count<1>{}, i);
    left -= count, i += count * L;
  }
  if (i < n) {
    Vec<A> v[1] = {load(h + n - L)}, slope[1] = {q(n - L)}, more[1];
    gradient<A, kBeta, 1>(v, slope, of, beta, more);
    store(out + n - L, v[0]);
    if (kBeta) dbeta += keep<A>(more[0], last_lanes<A>(n - i));
  }
}

// The backward of one thread's range of (map, part).
template <class T, bool kBeta>
class BackwardRows {
 public:
  using A = Acc<T>;
  static constexpr int L = kLanes<A>;

  explicit BackwardRows(const BackwardParams& params) : params_(params), view_(params.view), plan_(view_) {
    if (plan_.flat) table_.fill(view_.height, view_.width);
  }

  void run(int64_t begin, int64_t end) const {
    const T* h = static_cast<const T*>(params_.heatmap);
    T* out = static_cast<T*>(params_.grad_heatmap);
    if (plan_.parts.count() > 1) {
      for (int64_t item = begin; item < end; ++item) run_part(h, out, item);
      return;
    }
    const Area whole = {0, view_.height, 0, view_.width, plan_.chunks(view_.height, view_.width).y};
    MapWalk from(view_, begin), to(params_.grad_view, begin);
    for (int64_t map = begin; map < end; ++map, from.advance(), to.advance()) {
      const A dbeta = of_area(h + from.offset(), out + to.offset(), whole, map_gradient<A>(params_, map));
      if (kBeta) static_cast<A*>(params_.grad_beta)[map] = dbeta;
    }
  }

 private:
  struct Area {
    int64_t row, rows, col, cols;
    Cut chunks;  // of a flat map's rows
  };

  void run_part(const T* h, T* out, int64_t item) const {
    const Tiling& parts = plan_.parts;
    const int64_t map = item / parts.count(), index = item % parts.count();
    const int64_t i = index / parts.x.count, j = index % parts.x.count;
    const int64_t rows = parts.y.size(i), cols = parts.x.size(j);
    const Area area = {parts.y.begin(i), rows, parts.x.begin(j), cols, plan_.chunks(rows, cols).y};
    const A dbeta = of_area(h + map_offset(view_, map), out + map_offset(params_.grad_view, map), area,
                            map_gradient<A>(params_, map));
    if (kBeta) static_cast<A*>(params_.workspace)[item] = dbeta;
  }

  KPFUSED_INLINE A of_area(const T* h, T* out, const Area& area, const MapGradient<A>& map) const {
    Vec<A> dbeta = {};
    if (plan_.flat) {
      flat_area(h, out, area, map, dbeta);
    } else {
      const Cut blocks = cut(area.cols, kTable<A>, kRowMultiple);
      for (int64_t b = 0; b < blocks.count; ++b) {
        columns(h, out, area.row, area.rows, area.col + blocks.begin(b), blocks.size(b), map, dbeta);
      }
    }
    return kBeta ? map.of.sign * reduce_generic<A>(dbeta) : A(0);
  }

  void columns(const T* h, T* out, int64_t row, int64_t rows, int64_t col, int64_t cols, const MapGradient<A>& map,
               Vec<A>& dbeta) const {
    A table[kTable<A>];
    const Vec<A> x = iota<A>() + centred<A>(col, view_.width);
    const auto fill = [&](int64_t i) { store_vector(table + i, (x + A(i) - map.q.mean_x) * map.q.x); };
    for (int64_t i = 0; i + L <= cols; i += L) fill(i);
    fill(cols - L);
    for (int64_t r = row; r < row + rows; ++r) {
      const Vec<A> of_row = splat(map.q.along_y(centred<A>(r, view_.height)));
      backward_span<T, kBeta>(
          h + r * view_.stride_y + col, out + r * params_.grad_view.stride_y + col, cols, map,
          [&](int64_t i) __attribute__((always_inline)) { return load_vector(table + i) + of_row; }, dbeta);
    }
  }

  KPFUSED_INLINE void flat_area(const T* h, T* out, const Area& area, const MapGradient<A>& map, Vec<A>& dbeta) const {
    for (int64_t i = 0; i < area.chunks.count; ++i) {
      const int64_t r = area.row + area.chunks.begin(i);
      MapGradient<A> shifted = map;
      shifted.q.mean_y -= table_.shift(r, view_.height);
      flat_chunk(h + r * view_.stride_y, out + r * params_.grad_view.stride_y, area.chunks.size(i), shifted, dbeta);
    }
  }

  void flat_chunk(const T* h, T* out, int64_t rows, const MapGradient<A>& map, Vec<A>& dbeta) const {
    const int64_t width = view_.width, n = rows * width;
    const auto dense = [&](int64_t stride_y) { return n >= L && (stride_y == width || rows == 1); };
    T from[kTable<A>], to[kTable<A>];
    if (!dense(view_.stride_y)) {
      gather_rows(h, view_.stride_y, rows, width, from);
      for (int64_t i = n; i < L; ++i) from[i] = from[0];
      h = from;
    }
    const bool scatter = !dense(params_.grad_view.stride_y);
    const auto q = [&](int64_t i) __attribute__((always_inline)) {
      const Vec<A> x = load_vector(table_.x + i) - map.q.mean_x, y = load_vector(table_.y + i) - map.q.mean_y;
      return x * map.q.x + y * map.q.y;
    };
    Vec<A> more = {};
    backward_span<T, kBeta>(h, scatter ? to : out, at_least(n, L), map, q, more);
    if (kBeta) dbeta += n < L ? keep<A>(more, ~last_lanes<A>(L - n)) : more;
    if (!scatter) return;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < width; ++c) out[r * params_.grad_view.stride_y + c] = to[r * width + c];
    }
  }

  const BackwardParams& params_;
  const MapView& view_;
  RowPlan<T> plan_;
  FlatTable<A> table_;
};

}  // namespace kpfused::cpu::KPFUSED_ISA
