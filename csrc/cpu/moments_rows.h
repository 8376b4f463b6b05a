// SPDX-License-Identifier: MIT
// Forward with moments where lanes run along rows (stride_x == 1): the sums of one chunk or of one flat span about the
// pixel of its peak, or of the higher peak found before.
//
// Beside what sums_rows.h spends on a vector: two multiply-adds, one with the row's offset and one with the distance,
// and a search for the pixel of the peak, which ends at the first and is left out where an earlier chunk's is higher.
#pragma once

#include "sums_rows.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Vectors side by side: with two more sums a column, and distances kept beside weights, fewer fit the registers.
constexpr int kMomentBlock = KPFUSED_AVX512 ? 4 : 2;

struct Pixel {
  int64_t row, col;  // negative where there is none
};

// The first of n >= lanes elements that equals `value`, or -1.
template <class T>
KPFUSED_INLINE int64_t find_in_span(const T* p, int64_t n, Acc<T> value) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  constexpr int kStep = 8;  // vectors compared before the first branch
  const Vec<A> wanted = splat(value);
  int64_t i = 0;
  for (; i + kStep * L <= n; i += kStep * L) {
    Mask<A> hit[kStep];
    for (int j = 0; j < kStep; ++j) hit[j] = load(p + i + j * L) == wanted;
    for (int half = kStep / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j) hit[j] |= hit[j + half];
    }
    if (any<A>(hit[0])) break;
  }
  for (; i < n; i += L) {
    const int64_t at = at_most(i, n - L);
    const Vec<A> v = load(p + at);
    for (int j = 0; any<A>(v == wanted) && j < L; ++j) {
      if (v[j] == value) return at + j;
    }
  }
  return -1;
}

// The first pixel, in row order, whose key is the peak.
template <class T>
KPFUSED_INLINE Pixel find_peak(const RowsChunk<T>& chunk, Acc<T> sign, Acc<T> peak) {
  const bool dense = chunk.stride_y == chunk.cols;
  const int64_t rows = dense ? 1 : chunk.rows, cols = dense ? chunk.rows * chunk.cols : chunk.cols;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = find_in_span(chunk.p + r * chunk.stride_y, cols, peak * sign);
    if (i >= 0) return {r + i / chunk.cols, i % chunk.cols};
  }
  return {-1, -1};
}

template <class A>
struct MomentSums {
  Vec<A> sum, x, y, xx, xy, yy, distance;
};

template <class A>
KPFUSED_INLINE Moments<A> moments_of(A peak, A at_x, A at_y, const MomentSums<A>& s) {
  const Triple<A> first = reduce<A>(s.sum, s.x, s.y), second = reduce<A>(s.xx, s.xy, s.yy);
  return {peak, first.sum, at_x, at_y, first.x, first.y, second.sum, second.x, second.y, reduce_sum<A>(s.distance)};
}

// As sum_columns, with x0 and y0 counted from the pixel that the sums are about.
template <class T, int N, bool Tail>
void moment_columns(const RowsChunk<T>& chunk, int64_t first, const Falloff<Acc<T>>& of, MomentSums<Acc<T>>& sums) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const Falloff<Vec<A>> falloff = in_lanes(of);
  const int64_t last = Tail ? chunk.cols - L - first : (N - 1) * L;
  const Mask<A> mask = last_lanes<A>(chunk.cols - first - (N - 1) * L);
  Vec<A> column[N] = {}, cross[N] = {}, sum_yy = {}, distances = {}, y = splat(chunk.y0);
  const T* p = chunk.p + first;
  RowsAhead<T> ahead(chunk, first, N);
  for (int64_t r = 0; r < chunk.rows; ++r, p += chunk.stride_y, y += A(1)) {
    Vec<A> d[N], w[N];
    for (int j = 0; j < N; ++j) {
      const T* q = p + (j < N - 1 ? j * L : last);
      w[j] = d[j] = distance(load(q), falloff);
      ahead.fetch(chunk, j);
    }
    ahead.next_row(chunk);
    exp2<A, N>(w, falloff.scale);
    if (Tail) w[N - 1] = keep<A>(w[N - 1], mask);
    for (int j = 0; j < N; ++j) {
      column[j] += w[j];
      cross[j] += w[j] * y;
      d[0] = j ? d[0] + w[j] * d[j] : w[0] * d[0];
    }
    distances += d[0];
    for (int j = 1; j < N; ++j) w[0] += w[j];
    sum_yy += w[0] * (y * y);
  }
  const Vec<A> x0 = iota<A>() + chunk.x0;
  for (int j = 0; j < N; ++j) {
    const Vec<A> x = x0 + A(first + (j < N - 1 ? j * L : last)), weighed = column[j] * x;
    sums.sum += column[j];
    sums.x += weighed;
    sums.y += cross[j];
    sums.xx += weighed * x;
    sums.xy += cross[j] * x;
  }
  sums.yy += sum_yy;
  sums.distance += distances;
}

template <class T>
Moments<Acc<T>> chunk_moments(RowsChunk<T> chunk, const Sharpness<Acc<T>>& sharp, const Moments<Acc<T>>& so_far) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const A peak = peak_of(chunk, sharp.sign);
  A at_x = so_far.at_x, at_y = so_far.at_y;
  if (!(peak < so_far.peak)) {
    const Pixel pixel = find_peak(chunk, sharp.sign, peak);
    at_x = pixel.row < 0 ? kNowhere<A> : chunk.x0 + A(pixel.col);
    at_y = pixel.row < 0 ? kNowhere<A> : chunk.y0 + A(pixel.row);
  }
  chunk.x0 -= at_x;
  chunk.y0 -= at_y;
  const Falloff<A> of = falloff(sharp, peak);
  MomentSums<A> sums = {};
  const int64_t vectors = ceil_div(chunk.cols, L);
  for_blocks<kMomentBlock>(vectors, [&](auto n, int64_t first) {
    const bool tail = chunk.cols % L != 0 && first + n == vectors;
    tail ? moment_columns<T, n, true>(chunk, first * L, of, sums) : moment_columns<T, n, false>(chunk, first * L, of, sums);
  });
  return moments_of(peak, at_x, at_y, sums);
}

// As flat_sums. shift: of the table's rows to those of the span.
template <class T>
KPFUSED_INLINE Moments<Acc<T>> flat_moments(const T* p, int64_t n, const FlatTable<Acc<T>>& table, Acc<T> shift,
                                            const Sharpness<Acc<T>>& sharp, const Moments<Acc<T>>& so_far) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t end = at_least(n, L), last = end - L;
  const A peak = peak_of(RowsChunk<T>{p, end, 1, end, A(0), A(0), nullptr, 0}, sharp.sign);
  A at_x = so_far.at_x, at_y = so_far.at_y;
  if (!(peak < so_far.peak)) {
    const int64_t i = find_in_span(p, end, peak * sharp.sign);
    at_x = i < 0 ? kNowhere<A> : table.x[i];
    at_y = i < 0 ? kNowhere<A> : table.y[i] + shift;
  }
  const Falloff<Vec<A>> of = in_lanes(falloff(sharp, peak));
  MomentSums<A> sums = {};
  const auto add = [&](int64_t i, bool whole, Mask<A> mask) __attribute__((always_inline)) {
    const Vec<A> d = distance(load(p + i), of);
    Vec<A> one[1] = {d};
    exp2<A, 1>(one, of.scale);
    const Vec<A> w = whole ? one[0] : keep<A>(one[0], mask);
    const Vec<A> x = load_vector(table.x + i) - at_x, y = load_vector(table.y + i) - (at_y - shift);
    const Vec<A> wx = w * x, wy = w * y;
    sums.sum += w;
    sums.x += wx;
    sums.y += wy;
    sums.xx += wx * x;
    sums.xy += wx * y;
    sums.yy += wy * y;
    sums.distance += w * d;
  };
  int64_t i = 0;
  for (; i + L <= n; i += L) add(i, true, Mask<A>{});
  if (i < n) add(last, false, n < L ? ~last_lanes<A>(L - n) : last_lanes<A>(n - i));
  return moments_of(peak, at_x, at_y, sums);
}

}  // namespace kpfused::cpu::KPFUSED_ISA
