// SPDX-License-Identifier: MIT
// The sums of one chunk, or one flat span, where lanes run along rows (stride_x == 1).
//
//   peak = max k, then sum w, sum w x, sum w y with w = 2^((k - peak) * scale)
//
// Reads every element once from memory and once more from the nearest caches. Per vector
// of float32: load and maximum; then subtract, clamp, 3 to split the exponent, 3 for the polynomial, 3 for the power of
// two, multiply, and two additions, one to the sum of its column and one to that of its row. Columns stay in registers
// while the rows of a chunk go by, so x costs one multiplication a column and y one a row of the block.
#pragma once

#include "maps.h"

namespace kpfused::cpu::KPFUSED_ISA {

template <class A>
struct Sums {
  Vec<A> sum, x, y;
};

template <class T>
struct RowsChunk {
  using A = Acc<T>;
  const T* p;
  int64_t stride_y, rows, cols;
  A x0, y0;       // centred coordinates of the first pixel
  int64_t ahead;  // bytes from here to the chunk that comes next, fetched meanwhile
  const A* peak = nullptr;  // where it is known
};

// The greatest key of n >= lanes elements, lane by lane. The last vector overlaps the one before it.
template <class T, bool kNegative>
KPFUSED_INLINE Vec<Acc<T>> peak_of_span(const T* p, int64_t n, Vec<Acc<T>> start) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Vec<A> m[4] = {start, start, start, start};
  const auto key = [](const T* q) __attribute__((always_inline)) { return kNegative ? -load(q) : load(q); };
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    for (int j = 0; j < 4; ++j) m[j] = maximum(key(p + i + j * L), m[j]);
  }
  for (; i + L <= n; i += L) m[0] = maximum(key(p + i), m[0]);
  if (i < n) m[1] = maximum(key(p + n - L), m[1]);
  return maximum(maximum(m[0], m[1]), maximum(m[2], m[3]));
}

template <class T, bool kNegative>
KPFUSED_INLINE Acc<T> peak_of_rows(const RowsChunk<T>& chunk) {
  using A = Acc<T>;
  Vec<A> m = splat(Limits<A>::lowest);
  if (chunk.stride_y == chunk.cols || chunk.rows == 1) {
    m = peak_of_span<T, kNegative>(chunk.p, chunk.rows * chunk.cols, m);
  } else {
    for (int64_t r = 0; r < chunk.rows; ++r) {
      m = peak_of_span<T, kNegative>(chunk.p + r * chunk.stride_y, chunk.cols, m);
    }
  }
  return reduce_max<A>(m);
}

template <class T>
KPFUSED_INLINE Acc<T> peak_of(const RowsChunk<T>& chunk, Acc<T> sign) {
  if (chunk.peak) return *chunk.peak;
  return sign < 0 ? peak_of_rows<T, true>(chunk) : peak_of_rows<T, false>(chunk);
}

// N vectors side by side, from column `first` on, over all rows of the chunk. With Tail the last of them is the last
// vector of the row, which overlaps columns already counted.
template <class T, int N, bool Tail>
void sum_columns(const RowsChunk<T>& chunk, int64_t first, const Falloff<Acc<T>>& of, Sums<Acc<T>>& sums) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const Falloff<Vec<A>> falloff = in_lanes(of);
  const int64_t last = Tail ? chunk.cols - L : first + (N - 1) * L;
  const Mask<A> mask = last_lanes<A>(chunk.cols - first - (N - 1) * L);
  Vec<A> column[N] = {}, sum_y = {}, y = splat(chunk.y0);
  const T* p = chunk.p;
  for (int64_t r = 0; r < chunk.rows; ++r, p += chunk.stride_y, y += A(1)) {
    Vec<A> w[N];
    for (int j = 0; j < N; ++j) {
      const T* q = p + (j < N - 1 ? first + j * L : last);
      w[j] = distance(load(q), falloff);
      if (j * L * int(sizeof(T)) % 64 == 0) prefetch(q, chunk.ahead);
    }
    exp2<A, N>(w, falloff.scale);
    if (Tail) w[N - 1] = keep<A>(w[N - 1], mask);
    for (int j = 0; j < N; ++j) column[j] += w[j];
    for (int j = 1; j < N; ++j) w[0] += w[j];
    sum_y += w[0] * y;
  }
  const Vec<A> x = iota<A>() + chunk.x0;
  for (int j = 0; j < N; ++j) {
    sums.sum += column[j];
    sums.x += column[j] * (x + A(j < N - 1 ? first + j * L : last));
  }
  sums.y += sum_y;
}

template <class T>
State<Acc<T>> chunk_sums(const RowsChunk<T>& chunk, const Sharpness<Acc<T>>& sharp) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const A peak = peak_of(chunk, sharp.sign);
  const Falloff<A> of = falloff(sharp, peak);
  const int64_t vectors = ceil_div(chunk.cols, L);
  Sums<A> sums = {};
  for_blocks<kBlock>(vectors, [&](auto n, int64_t first) {
    const bool tail = chunk.cols % L != 0 && first + n == vectors;
    tail ? sum_columns<T, n, true>(chunk, first * L, of, sums) : sum_columns<T, n, false>(chunk, first * L, of, sums);
  });
  const Triple<A> total = reduce<A>(sums.sum, sums.x, sums.y);
  return {peak, total.sum, total.x, total.y};
}

// n elements in a row whose coordinates are in a table. Where there are fewer than a vector of them, p points to a
// whole vector all the same, the rest of it copies of the first element.
template <class T>
KPFUSED_INLINE State<Acc<T>> flat_sums(const T* p, int64_t n, const FlatTable<Acc<T>>& table,
                                               const Sharpness<Acc<T>>& sharp) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t end = at_least(n, L), last = end - L;
  const A peak = peak_of(RowsChunk<T>{p, end, 1, end, A(0), A(0), 0}, sharp.sign);
  const Falloff<Vec<A>> of = in_lanes(falloff(sharp, peak));
  Sums<A> sums = {};
  const auto add = [&](Vec<A> w, int64_t i) __attribute__((always_inline)) {
    sums.sum += w;
    sums.x += w * load_vector(table.x + i);
    sums.y += w * load_vector(table.y + i);
  };
  int64_t i = 0;
  for (; i + L <= n; i += L) add(weight(p + i, of), i);
  if (i < n) {
    const Mask<A> mask = n < L ? ~last_lanes<A>(L - n) : last_lanes<A>(n - i);
    add(keep<A>(weight(p + last, of), mask), last);
  }
  const Triple<A> total = reduce<A>(sums.sum, sums.x, sums.y);
  return {peak, total.sum, total.x, total.y};
}

}  // namespace kpfused::cpu::KPFUSED_ISA
