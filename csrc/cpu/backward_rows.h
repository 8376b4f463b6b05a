// SPDX-License-Identifier: MIT
// Backward where lanes run along rows (stride_x == 1).
//
//   dh = beta * w * q,  q = X (x - mean x) + Y (y - mean y),  w = 2^((k - peak) * scale)
//   dbeta = sign(beta) * sum (k - peak) * w * q
//
// and with moments the q of Polynomial. Reads every element once and writes its gradient once. The part of q that
// depends on the column is tabulated once a map, so an element costs its weight, one addition and one multiplication;
// dbeta adds two multiplications and an addition, moments add two multiply-adds.
#pragma once

#include <cmath>
#include <initializer_list>
#include <type_traits>

#include "counting.h"

namespace kpfused::cpu::KPFUSED_ISA {

// What the element loops need of one map. Q: Slope or Polynomial, times beta where dbeta is not wanted.
template <class A, class Q>
struct MapGradient {
  Falloff<A> of;
  Q q;
  A beta;
};

// Without moments.
template <class A>
KPFUSED_INLINE void load_gradient(const BackwardParams& params, int64_t map, MapGradient<A, Slope<A>>& to) {
  const Stats<A>& stats = static_cast<const Stats<A>*>(params.stats)[map];
  const A* g = static_cast<const A*>(params.grad_coordinates) + map * params.grad_stride_map;
  to.beta = beta_of<A>(params.beta, map);
  to.of = falloff(sharpness(to.beta), stats.peak);
  to.q = backward_slope(stats, g[0] * A(params.units.scale_x), g[params.grad_stride_xy] * A(params.units.scale_y),
                        params.grad_beta ? A(1) : to.beta);
  if (is_empty(params.pixels, stats.sum)) to.q = {};
}

template <class A>
KPFUSED_INLINE void load_gradient(const BackwardParams& params, int64_t map, MapGradient<A, Polynomial<A>>& to) {
  const MomentStats<A>& stats = static_cast<const MomentStats<A>*>(params.stats)[map];
  to.beta = beta_of<A>(params.beta, map);
  to.of = falloff(sharpness(to.beta), stats.peak);
  to.q = backward_polynomial(stats, field_gradients<A>(params, map), to.beta, A(1));
  if (is_empty(params.pixels, stats.sum)) to.q = {};
}

// The coefficient of the distance in q.
template <class A>
KPFUSED_INLINE A along_distance(const Slope<A>&) {
  return A(0);
}
template <class A>
KPFUSED_INLINE A along_distance(const Polynomial<A>& q) {
  return q.distance;
}

template <class A>
KPFUSED_INLINE bool all_below(A most, std::initializer_list<A> values) {
  bool below = true;
  for (A value : values) below = below && std::fabs(value) < most;
  return below;
}

// Whether a logit of no weight has a gradient of zero: q is finite wherever it may lie, as sums of up to three factors that are
// no larger are, and so is the distance times q.
template <class A>
KPFUSED_INLINE bool is_tame(const MapGradient<A, Slope<A>>& map) {
  return all_below(A(1e15), {map.q.x, map.q.y, map.q.mean_x, map.q.mean_y, map.of.peak, map.beta});
}
template <class A>
KPFUSED_INLINE bool is_tame(const MapGradient<A, Polynomial<A>>& map) {
  const Polynomial<A>& q = map.q;
  return all_below(A(1e9), {q.constant, q.x, q.y, q.xx, q.xy, q.yy, q.mean_x, q.mean_y, map.of.peak, map.beta}) &&
         all_below(A(1e30), {q.distance, map.of.lowest, q.distance * map.of.lowest});
}

// N vectors: h in, dh out, and dbeta's terms without their sign. A distance raised to `lowest` has weight zero.
template <class A, bool kBeta, bool kMoments, int N>
KPFUSED_INLINE void gradient(Vec<A> (&h)[N], const Vec<A> (&q)[N], const Falloff<Vec<A>>& of, Vec<A> along_distance,
                             Vec<A> beta, Vec<A> (&dbeta)[N]) {
  Vec<A> w[N];
  for (int j = 0; j < N; ++j) w[j] = h[j] = distance(h[j], of);
  exp2<A, N>(w, of.scale);
  for (int j = 0; j < N; ++j) w[j] = w[j] * (kMoments ? q[j] + along_distance * h[j] : q[j]);
  for (int j = 0; kBeta && j < N; ++j) dbeta[j] = h[j] * w[j];
  for (int j = 0; j < N; ++j) h[j] = kBeta ? beta * w[j] : w[j];
}

// Column (axis 0) or row (axis 1) of the peak's pixel.
KPFUSED_INLINE int64_t peak_of_map(const BackwardParams& params, int64_t map, int axis) {
  return params.moments.peak[map * 2 + axis];
}

// The gradient at the peak's pixel, which its probability raises, where the pixel lies in the range; `out` is that of the
// range's first pixel. Returns what dbeta needs once a map.
template <class T, bool kBeta>
KPFUSED_INLINE Acc<T> finish_peak(const BackwardParams& params, int64_t index,
                                  const MapGradient<Acc<T>, Polynomial<Acc<T>>>& map, T* out, const PixelRange& range) {
  using A = Acc<T>;
  const int64_t col = peak_of_map(params, index, 0), row = peak_of_map(params, index, 1);
  const int64_t x = col - range.col, y = row - range.row;
  if (x < 0 || x >= range.cols || y < 0 || y >= range.rows) return A(0);
  // The peak of a map of NaN may be any pixel.
  if (!params.pixels.all() && !counting_of(params.pixels, params.view, index).at(row, col)) return A(0);
  const A q = map.q.value_at_peak(centred<A>(col, params.view.width), centred<A>(row, params.view.height));
  out[y * params.grad_view.stride_y + x * params.grad_view.stride_x] = as_element<T>(kBeta ? map.beta * q : q);
  return kBeta ? grad_beta_of_peak<A>(params, index) : A(0);
}

// n >= lanes elements of one row; q of the column comes from column(i). The last vector overlaps the one before it and
// writes the same values there once more.
template <class T, bool kBeta, bool kMoments, class Map, class Q>
KPFUSED_INLINE void backward_span(const T* h, T* out, int64_t n, const Map& map, const Q& q, Vec<Acc<T>>& dbeta) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const Falloff<Vec<A>> of = in_lanes(map.of);
  const Vec<A> beta = splat(map.beta), by_distance = splat(along_distance(map.q));
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
    gradient<A, kBeta, kMoments, N>(v, slope, of, by_distance, beta, more);
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
    gradient<A, kBeta, kMoments, 1>(v, slope, of, by_distance, beta, more);
    store(out + n - L, v[0]);
    if (kBeta) dbeta += keep<A>(more[0], last_lanes<A>(n - i));
  }
}

// The backward of one thread's range of (map, part).
template <class T, bool kBeta, bool kMoments>
class BackwardRows {
 public:
  using A = Acc<T>;
  using Map = MapGradient<A, std::conditional_t<kMoments, Polynomial<A>, Slope<A>>>;
  static constexpr int L = kLanes<A>;

  explicit BackwardRows(const BackwardParams& params) : params_(params), view_(params.view), plan_(view_) {
    if (plan_.flat) table_.fill(view_.height, view_.width);
  }

  void run(int64_t begin, int64_t end) const {
    const T* h = static_cast<const T*>(params_.heatmap);
    T* out = static_cast<T*>(params_.grad_heatmap);
    A* const dbeta = static_cast<A*>(split() && params_.grad_beta ? params_.workspace : params_.grad_beta);
    Area area = {begin, h, out, 0, view_.height, 0, view_.width, plan_.chunks(view_.height, view_.width).y};
    MapWalk from(view_, split() ? 0 : begin), to(params_.grad_view, split() ? 0 : begin);
    if (!kMoments && plan_.flat && params_.pixels.all() && !split() && area.chunks.count == 1) {
      // Tiny maps: what goes on between their pixels is most of their time.
      for (int64_t map = begin; map < end; ++map, from.advance(), to.advance()) {
        Map gradient;
        load_gradient(params_, map, gradient);
        Vec<A> sum = {};
        flat_chunk(h + from.offset(), out + to.offset(), 0, view_.height, nullptr, gradient, sum);
        if (kBeta) dbeta[map] = gradient.of.sign * reduce_sum<A>(sum);
      }
      return;
    }
    // One call for whole maps and parts, since the compiler unfolds its loops into each.
    for (int64_t item = begin; item < end; ++item) {
      if (split()) {
        area = part_of(h, out, item);
      } else {
        area.map = item, area.h = h + from.offset(), area.out = out + to.offset();
        from.advance(), to.advance();
      }
      const A sum = of_area(area);
      if (kBeta && dbeta) dbeta[item] = sum;
    }
  }

 private:
  struct Area {
    int64_t map;
    const T* h;  // of the map
    T* out;
    int64_t row, rows, col, cols;
    Cut chunks;  // of a flat map's rows
  };

  bool split() const { return plan_.parts.count() > 1; }

  Area part_of(const T* h, T* out, int64_t item) const {
    const Tiling& parts = plan_.parts;
    const int64_t map = item / parts.count(), index = item % parts.count();
    const int64_t i = index / parts.x.count, j = index % parts.x.count;
    const int64_t rows = parts.y.size(i), cols = parts.x.size(j);
    return {map,  h + map_offset(view_, map), out + map_offset(params_.grad_view, map), parts.y.begin(i),
            rows, parts.x.begin(j),           cols,
            plan_.chunks(rows, cols).y};
  }

  KPFUSED_INLINE A of_area(const Area& area) const {
    const T* const h = area.h;
    T* const out = area.out;
    const int64_t index = area.map;
    Vec<A> dbeta = {};
    Map map;
    load_gradient(params_, index, map);
    Counting some, *counting = nullptr;
    if (!params_.pixels.all()) some = counting_of(params_.pixels, view_, index), counting = &some;
    if (plan_.flat) {
      flat_area(h, out, area, counting, map, dbeta);
    } else {
      const Cut blocks = cut(area.cols, kTable<A>, kRowMultiple);
      for (int64_t b = 0; b < blocks.count; ++b) {
        columns(h, out, {area.row, area.rows, area.col + blocks.begin(b), blocks.size(b)}, counting, map, dbeta);
      }
    }
    A of_peak = A(0);
    if constexpr (kMoments) {
      const MapView& to = params_.grad_view;
      of_peak = finish_peak<T, kBeta>(params_, index, map, out + area.row * to.stride_y + area.col,
                                      {area.row, area.rows, area.col, area.cols});
    }
    return kBeta ? map.of.sign * (reduce_sum<A>(dbeta) + of_peak) : A(0);
  }

  // `counting` is null where all pixels count.
  void columns(const T* h, T* out, const PixelRange& range, const Counting* counting, const Map& map,
               Vec<A>& dbeta) const {
    const int64_t col = range.col, cols = range.cols;
    const T otherwise = weightless<T>(map.of.sign);
    alignas(64) T counted[kTable<A>];
    // What the column gives to q, and with moments what it gives times dy.
    alignas(64) A table[kTable<A>], cross[kMoments ? kTable<A> : 1];
    const Vec<A> x = iota<A>() + centred<A>(col, view_.width);
    const auto fill = [&](int64_t i) {
      const Vec<A> dx = x + A(i) - map.q.mean_x;
      if constexpr (kMoments) {
        store_vector(table + i, map.q.constant + dx * (map.q.x + map.q.xx * dx));
        store_vector(cross + i, dx * map.q.xy);
      } else {
        store_vector(table + i, dx * map.q.x);
      }
    };
    for (int64_t i = 0; i + L <= cols; i += L) fill(i);
    fill(cols - L);
    // In place, what lies within a valid size, and rows of a mask by rows; copied under any other, or where that is less than a
    // vector.
    const int64_t valid = counting ? at_most(counting->cols - col, cols) : cols;
    const bool by_rows = counting && counting->by_rows(), copies = counting && ((counting->mask && !by_rows) || valid < L);
    const bool clear = counting && !is_tame(map);
    for (int64_t r = range.row; r < range.row + range.rows; ++r) {
      if (counting && (r >= counting->rows || rows_are(false, *counting, r, 1))) {
        __builtin_memset(out + r * params_.grad_view.stride_y + col, 0, size_t(cols) * sizeof(T));
        continue;
      }
      const A y = centred<A>(r, view_.height);
      const Vec<A> of_row = splat(map.q.along_y(y)), dy = splat(y - map.q.mean_y);
      const T* from = h + r * view_.stride_y + col;
      T* to = out + r * params_.grad_view.stride_y + col;
      if (copies) copy_counting(from, counted, cols, otherwise, *counting, r, col), from = counted;
      backward_span<T, kBeta, kMoments>(
          from, to, copies ? cols : valid, map,
          [&](int64_t i) __attribute__((always_inline)) {
            const Vec<A> q = load_vector(table + i) + of_row;
            return kMoments ? q + load_vector(cross + (kMoments ? i : 0)) * dy : q;
          },
          dbeta);
      if (copies && clear) copy_counting(to, to, cols, T{}, *counting, r, col);
      if (!copies) clear_row(to + valid, cols - valid);
    }
  }

  KPFUSED_INLINE void flat_area(const T* h, T* out, const Area& area, const Counting* counting, const Map& map,
                                Vec<A>& dbeta) const {
    for (int64_t i = 0; i < area.chunks.count; ++i) {
      const int64_t r = area.row + area.chunks.begin(i);
      Map shifted = map;
      shifted.q.mean_y -= table_.shift(r, view_.height);
      T* to = out + r * params_.grad_view.stride_y;
      flat_chunk(h + r * view_.stride_y, to, r, area.chunks.size(i), counting, shifted, dbeta);
    }
  }

  void flat_chunk(const T* h, T* out, int64_t row, int64_t rows, const Counting* counting, const Map& map,
                  Vec<A>& dbeta) const {
    const int64_t width = view_.width, n = rows * width;
    const auto dense = [&](int64_t stride_y) { return n >= L && (stride_y == width || rows == 1); };
    alignas(64) T from[kTable<A>], to[kTable<A>];
    if (counting || !dense(view_.stride_y)) {
      if (counting) {
        copy_counting_rows(h, view_.stride_y, rows, width, from, weightless<T>(map.of.sign), *counting, row, 0);
      } else {
        gather_rows(h, view_.stride_y, rows, width, from);
      }
      for (int64_t i = n; i < L; ++i) from[i] = from[0];
      h = from;
    }
    const bool scatter = !dense(params_.grad_view.stride_y);
    const auto q = [&](int64_t i) __attribute__((always_inline)) {
      const Vec<A> x = load_vector(table_.x + i) - map.q.mean_x, y = load_vector(table_.y + i) - map.q.mean_y;
      if constexpr (kMoments) {
        return map.q.constant + x * (map.q.x + map.q.xx * x + map.q.xy * y) + y * (map.q.y + map.q.yy * y);
      } else {
        return x * map.q.x + y * map.q.y;
      }
    };
    Vec<A> more = {};
    backward_span<T, kBeta, kMoments>(h, scatter ? to : out, at_least(n, L), map, q, more);
    if (kBeta) dbeta += n < L ? keep<A>(more, ~last_lanes<A>(L - n)) : more;
    if (!scatter && !counting) return;
    for (int64_t r = 0; r < rows; ++r) {
      T* const row_out = out + r * params_.grad_view.stride_y;
      for (int64_t c = 0; scatter && c < width; ++c) row_out[c] = to[r * width + c];
      if (counting) copy_counting(row_out, row_out, width, T{}, *counting, row + r, 0);
    }
  }

  const BackwardParams& params_;
  const MapView& view_;
  RowPlan<T> plan_;
  FlatTable<A> table_;
};

}  // namespace kpfused::cpu::KPFUSED_ISA
