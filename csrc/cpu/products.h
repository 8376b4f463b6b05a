// SPDX-License-Identifier: MIT
// Products of tiles: of P of some maps and of the values of some channels, over the pixels that they share.
#pragma once

#include "counting.h"

namespace kpfused::cpu::KPFUSED_ISA {

// A run of elements whose last vector, at `last_at`, may lie elsewhere: where that one is not whole.
template <class T>
struct Run {
  const T *p, *last;
  int64_t last_at;

  KPFUSED_INLINE Run from(int64_t first) const { return {p + first, last, last_at - first}; }
  KPFUSED_INLINE const T* at(int64_t i) const { return i == last_at ? last : p + i; }
};

// A run under a mask: what does not count is something else.
template <class T>
struct MaskedRun {
  Run<T> run;
  Run<uint8_t> mask;
  Acc<T> otherwise;

  KPFUSED_INLINE MaskedRun from(int64_t first) const { return {run.from(first), mask.from(first), otherwise}; }
};

// Vector i of a run, and where it lies in memory.
template <class T>
KPFUSED_INLINE Vec<Acc<T>> load_at(const T* run, int64_t i) {
  return load(run + i);
}
template <class T>
KPFUSED_INLINE Vec<Acc<T>> load_at(const Run<T>& run, int64_t i) {
  return load(run.at(i));
}
template <class T>
KPFUSED_INLINE Vec<Acc<T>> load_at(const MaskedRun<T>& run, int64_t i) {
  using A = Acc<T>;
  const BitsVector<A> v = (BitsVector<A>)load_at(run.run, i), otherwise = (BitsVector<A>)splat(run.otherwise);
  return (Vec<A>)choose<A>(run.mask.at(i), v, otherwise);
}
template <class T>
KPFUSED_INLINE const T* place(const T* run, int64_t i) {
  return run + i;
}
template <class T>
KPFUSED_INLINE const T* place(const Run<T>& run, int64_t i) {
  return run.p + i;
}
template <class T>
KPFUSED_INLINE const T* place(const MaskedRun<T>& run, int64_t i) {
  return run.run.p + i;
}

template <class A>
KPFUSED_INLINE void add_vector(A* to, Vec<A> v) {
  store_vector(to, load_vector(to) + v);
}

// sums[m * channels + c] += sum over pixels of p[m] v[c], for M x C of them, each in U sums over the same lanes, since sums
// that follow on each other cost their latency. With as many for any M and C, a map gets the same bits whatever stands
// beside it.
template <int M, int C, class A, class R>
KPFUSED_INLINE void add_products(const A* const* p, const R* v, int64_t pixels, A* sums, int64_t channels) {
  constexpr int L = kLanes<A>, U = 2;
  Vec<A> sum[U][M][C] = {};
  const auto add = [&](int64_t i, int u) __attribute__((always_inline)) {
    Vec<A> of_channel[C];
    for (int c = 0; c < C; ++c) of_channel[c] = load_at(v[c], i);
    for (int m = 0; m < M; ++m) {
      Vec<A> of_map = load_vector(p[m] + i);
      if constexpr (C > 1) of_map = in_register(of_map);  // not read again for every channel
      for (int c = 0; c < C; ++c) sum[u][m][c] += of_map * of_channel[c];
    }
  };
  int64_t i = 0;
  for (; i + U * L <= pixels; i += U * L) {
    for (int u = 0; u < U; ++u) add(i + u * L, u);
  }
  for (; i < pixels; i += L) add(i, 0);
  for (int m = 0; m < M; ++m) {
    for (int c = 0; c < C; ++c) {
      Vec<A> total = sum[0][m][c];
      for (int u = 1; u < U; ++u) total += sum[u][m][c];
      sums[m * channels + c] += reduce_sum<A>(total);
    }
  }
}

// `maps` that share their values, or one alone. All of them take a few channels in turn: planes of values are often a
// power of two apart, so that the nearest cache has room for no more.
template <class A, class R>
void add_all_products(const A* const* p, int maps, const R* v, int count, int64_t pixels, A* sums, int64_t channels) {
  constexpr int M = KPFUSED_AVX512 ? 4 : 2;  // as many as there are registers for their sums
  int c = 0;
  const auto block = [&](auto size) __attribute__((always_inline)) {
    constexpr int C = decltype(size)::value;
    int m = 0;
    for (; m + M <= maps; m += M) add_products<M, C>(p + m, v + c, pixels, sums + m * channels + c, channels);
    for (; m < maps; ++m) add_products<1, C>(p + m, v + c, pixels, sums + m * channels + c, channels);
    c += C;
  };
  while (c + 3 <= count) block(Count<3>{});
  while (c < count) block(Count<1>{});
}

// sums[m * stride + c] += sum over n pixels of p[m][i] v[i * stride_x + c], for M maps and C vectors of channels. These few
// are summed before they are added: pixel after pixel, the sums would lose digits.
template <class T, int M, int C>
KPFUSED_INLINE void add_pixels(const Acc<T>* const* p, int64_t at, int64_t n, const T* v, int64_t stride_x, Acc<T>* sums,
                               int64_t stride) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Vec<A> sum[M][C] = {};
  for (int64_t i = 0; i < n; ++i) {
    Vec<A> of_channels[C];
    for (int c = 0; c < C; ++c) of_channels[c] = load(v + i * stride_x + c * L);
    for (int m = 0; m < M; ++m) {
      const Vec<A> of_map = splat(p[m][at + i]);
      for (int c = 0; c < C; ++c) sum[m][c] += of_map * of_channels[c];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int c = 0; c < C; ++c) add_vector(sums + m * stride + c * L, sum[m][c]);
  }
}

// As add_all_products(), of whole vectors of channels that stand side by side, pixel after pixel.
template <class T>
void add_all_pixels(const Acc<T>* const* p, int maps, int64_t at, int64_t n, const T* v, int64_t stride_x,
                    int64_t channels, Acc<T>* sums, int64_t stride) {
  constexpr int L = kLanes<Acc<T>>, kNear = 32;  // pixels whose values stay near for all maps
  for (int64_t i = 0; i < n; i += kNear) {
    const int64_t some = at_most(n - i, kNear);
    const T* const from = v + i * stride_x;
    int64_t c = 0;
    const auto block = [&](auto size) __attribute__((always_inline)) {
      constexpr int C = decltype(size)::value;
      int m = 0;
      for (; m + 4 <= maps; m += 4) add_pixels<T, 4, C>(p + m, at + i, some, from + c, stride_x, sums + m * stride + c, stride);
      for (; m < maps; ++m) add_pixels<T, 1, C>(p + m, at + i, some, from + c, stride_x, sums + m * stride + c, stride);
      c += C * L;
    };
    while (c + 3 * L <= channels) block(Count<3>{});
    while (c + L <= channels) block(Count<1>{});
  }
}

template <class A>
KPFUSED_INLINE A total(const Vec<A> (&sum)[kBlock]) {
  Vec<A> all = sum[0];
  for (int j = 1; j < kBlock; ++j) all += sum[j];
  return reduce_sum<A>(all);
}

// As many sums as weights() has.
template <class A>
KPFUSED_INLINE A sum_of(const A* p, int64_t count) {
  constexpr int L = kLanes<A>;
  Vec<A> sum[kBlock] = {};
  int64_t i = 0;
  for (; i + kBlock * L <= count; i += kBlock * L) {
    for (int j = 0; j < kBlock; ++j) sum[j] += load_vector(p + i + j * L);
  }
  for (int j = 0; j < kBlock && i < count; ++j, i += L) sum[j] += load_vector(p + i);
  return total<A>(sum);
}

// finish(i, start(i) + sum over j of factor(j) * of[j][i]), a vector at a time.
template <class A, class R, class Factor, class Start, class Finish>
KPFUSED_INLINE void weighted_sums(const R* of, int count, const Factor& factor, int64_t pixels, const Start& start,
                                  const Finish& finish) {
  constexpr int N = 4, L = kLanes<A>;
  int64_t i = 0;
  for (; i + N * L <= pixels; i += N * L) {
    Vec<A> sum[N];
    for (int k = 0; k < N; ++k) sum[k] = start(i + k * L);
    for (int j = 0; j < count; ++j) {
      const Vec<A> f = splat(factor(j));
      for (int k = 0; k < N; ++k) sum[k] += f * load_at(of[j], i + k * L);
    }
    for (int k = 0; k < N; ++k) finish(i + k * L, sum[k]);
  }
  for (; i < pixels; i += L) {
    Vec<A> sum = start(i);
    for (int j = 0; j < count; ++j) sum += splat(factor(j)) * load_at(of[j], i);
    finish(i, sum);
  }
}

}  // namespace kpfused::cpu::KPFUSED_ISA
