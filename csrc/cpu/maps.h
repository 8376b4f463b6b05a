// SPDX-License-Identifier: MIT
// What forward and backward share: where maps lie, their beta, and the coordinate tables of small maps.
#pragma once

#include <type_traits>

#include "../fields.h"
#include "exp2.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Accumulators that a table on the stack may hold.
constexpr int64_t kTableBytes = 8192;
template <class A>
constexpr int64_t kTable = kTableBytes / int64_t(sizeof(A));
// Bytes of a stack buffer that gathers elements too far apart for a vector.
constexpr int64_t kGatherBytes = 16384;
// Register blocks: this many vectors side by side, as the registers hold.
constexpr int kBlock = KPFUSED_AVX512 ? 4 : 3;

KPFUSED_INLINE int64_t map_offset(const MapView& view, int64_t map) {
  if (view.inner == 1) return map * view.stride_outer;
  const int64_t outer = map / view.inner;
  return outer * view.stride_outer + (map - outer * view.inner) * view.stride_inner;
}

// map_offset() of one map after the other, without a division for each.
struct MapWalk {
  const MapView& view;
  int64_t index, row;

  KPFUSED_INLINE MapWalk(const MapView& v, int64_t map) : view(v), index(map % v.inner), row(map / v.inner) {}
  KPFUSED_INLINE int64_t offset() const { return offset(view); }
  // Of another view of the same maps.
  template <class View>
  KPFUSED_INLINE int64_t offset(const View& other) const { return row * other.stride_outer + index * other.stride_inner; }
  KPFUSED_INLINE void advance() {
    if (++index == view.inner) index = 0, ++row;
  }
};

// The centred coordinate of pixel i, exact to the last bit below 2^23 pixels.
template <class A>
KPFUSED_INLINE A centred(int64_t i, int64_t extent) {
  return A(double(i) - 0.5 * double(extent - 1));
}

// From an element to its weight: w = 2^(d * scale) with d = h * sign - peak, how far its key lies below the peak. The
// product is exact and costs nothing as part of a multiply-add. Below `lowest` the weight is zero; raising d to it keeps
// -inf out of the arithmetic.
template <class V>
struct Falloff {
  V sign, peak, scale, lowest;
};

template <class A>
KPFUSED_INLINE Falloff<A> falloff(const Sharpness<A>& sharp, A peak) {
  return {sharp.sign, peak, sharp.scale, Exp2Constants<A>::kLowest / sharp.scale};
}

template <class A>
KPFUSED_INLINE Falloff<Vec<A>> in_lanes(const Falloff<A>& of) {
  return {splat(of.sign), splat(of.peak), splat(of.scale), splat(of.lowest)};
}

template <class V>
KPFUSED_INLINE V distance(V h, const Falloff<V>& of) {
  return maximum(of.lowest, h * of.sign - of.peak);
}

template <class T>
KPFUSED_INLINE Vec<Acc<T>> weight(const T* p, const Falloff<Vec<Acc<T>>>& of) {
  using A = Acc<T>;
  Vec<A> w[1] = {distance(load(p), of)};
  exp2<A, 1>(w, of.scale);
  return w[0];
}

// Hints: an address outside the map does no harm. Integers, as a pointer beyond the end may not even be formed.
KPFUSED_INLINE const void* ahead_of(const void* p, int64_t bytes) {
  return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + uintptr_t(bytes));
}
KPFUSED_INLINE void prefetch_at(uintptr_t address) { __builtin_prefetch(reinterpret_cast<const void*>(address), 0, 2); }
KPFUSED_INLINE void prefetch(const void* p, int64_t ahead) { __builtin_prefetch(ahead_of(p, ahead), 0, 2); }
KPFUSED_INLINE void prefetch_near(const void* p, int64_t ahead) { __builtin_prefetch(ahead_of(p, ahead), 0, 3); }
// The lines of a run of n elements that lies `ahead` bytes further on.
template <class T>
KPFUSED_INLINE void prefetch_run(const T* p, int64_t n, int64_t ahead) {
  for (int64_t i = 0; i < n; i += 64 / int64_t(sizeof(T))) prefetch(p + i, ahead);
}
KPFUSED_INLINE void prefetch_for_write(const void* p, int64_t ahead) { __builtin_prefetch(ahead_of(p, ahead), 1, 3); }

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls body(its number of vectors, a constant; the first of them) for blocks of up to kMost vectors, as equal as possible: a
// vector alone may have nothing to hide its latencies.
template <int kMost, class Body>
KPFUSED_INLINE void for_blocks(int64_t vectors, const Body& body) {
  static_assert(kMost >= 2 && kMost <= 4);
  const int64_t blocks = ceil_div(vectors, kMost), narrow = vectors / blocks, wide = vectors % blocks;
  for (int64_t b = 0, first = 0; b < blocks; ++b) {
    const int64_t n = narrow + (b < wide);
    if constexpr (kMost > 3) {
      if (n == 4) body(std::integral_constant<int, 4>{}, first);
    }
    if constexpr (kMost > 2) {
      if (n == 3) body(std::integral_constant<int, 3>{}, first);
    }
    if (n == 2) body(std::integral_constant<int, 2>{}, first);
    if (n == 1) body(std::integral_constant<int, 1>{}, first);
    first += n;
  }
}

// Bytes that rows are fetched ahead of their use, beyond where hardware stops at the end of a page.
constexpr int64_t kReadAhead = 4096, kWriteAhead = 2048;

// Maps whose rows would leave too many lanes idle are run through as one row of all their pixels, the coordinates of
// which come from two tables. Rows shorter than a vector leave no other way; rows of up to four vectors may choose.
template <class A>
KPFUSED_INLINE bool is_flat(const MapView& view) {
  const int64_t w = view.width;
  const bool dense = view.stride_y == w || view.height == 1;
  return w < kLanes<A> || (dense && w % kLanes<A> != 0 && w < 4 * kLanes<A> && w * view.height <= kTable<A>);
}

template <class A>
struct FlatTable {
  alignas(64) A x[kTable<A>], y[kTable<A>];

  int64_t rows;

  // As many rows as fit, and the map has: x from the centre of the map, y from that of these rows.
  void fill(int64_t height, int64_t width) {
    rows = at_most(height, kTable<A> / width);
    for (int64_t i = 0; i < kLanes<A>; ++i) x[i] = y[i] = A(0);
    for (int64_t r = 0, i = 0; r < rows; ++r) {
      for (int64_t c = 0; c < width; ++c, ++i) x[i] = centred<A>(c, width), y[i] = centred<A>(r, rows);
    }
  }

  // What to add to y where the table is laid on the rows from `row` on. Twice it is whole.
  A shift(int64_t row, int64_t height) const { return A(0.5 * double(2 * row + rows - height)); }
};

// Bytes of a chunk: with more to do at the end of one, as with moments, twice as many.
constexpr int64_t chunk_bytes(bool long_end = false) { return long_end ? 2 * kChunkBytes : kChunkBytes; }

// What is left to do when all rows of a few columns have gone by costs as much as some rows.
constexpr int64_t kChunkRows = 4;

// How one map is cut on this instruction set. Chunks are those of the part at hand.
template <class T>
struct RowPlan {
  bool flat;
  Tiling parts;

  explicit RowPlan(const MapView& view) : flat(is_flat<Acc<T>>(view)), parts(part_tiling(view)) {}

  // `bytes`: what stays near from its first reading to the second.
  Tiling chunks(int64_t rows, int64_t cols, int64_t bytes = chunk_bytes()) const {
    if (flat) return tile(rows, cols, kTable<Acc<T>>, kRowMultiple);
    const int64_t elements = bytes / int64_t(sizeof(T));
    const Cut x = cut(cols, elements / at_most(rows, kChunkRows), kRowMultiple);
    return {cut(rows, at_least(elements / ceil_div(cols, x.count), 1)), x};
  }
};

// The result of a map, into its two destinations.
template <class A>
KPFUSED_INLINE void write_result(const ForwardParams& params, int64_t map, const State<A>& state) {
  const Stats<A> stats = finish(state);
  A* out = static_cast<A*>(params.stats) + map * kStats;
  out[0] = stats.peak, out[1] = stats.sum, out[2] = stats.mean_x, out[3] = stats.mean_y;
  A* coordinates = static_cast<A*>(params.coordinates) + map * 2;
  if (is_empty(params.pixels, state.sum)) {
    coordinates[0] = coordinates[1] = A(params.pixels.empty_value);
    return;
  }
  // Rounded once: a mean in float32 would already cost as much as small maps lose in their sums.
  const double sum = double(state.sum);
  coordinates[0] = A(params.units.scale_x * (double(state.sum_x) / sum) + params.units.offset_x);
  coordinates[1] = A(params.units.scale_y * (double(state.sum_y) / sum) + params.units.offset_y);
}

template <class A>
KPFUSED_INLINE void write_result(const ForwardParams& params, int64_t map, const Moments<A>& s) {
  const Moments<double> wide = {s.peak, s.sum, s.at_x, s.at_y, s.x, s.y, s.xx, s.xy, s.yy, s.distance};
  write_fields<A>(params, map, wide, double(beta_of<A>(params.beta, map)));
}

// The state of one part of a split map, to be merged. Item: map * parts + part.
template <class S>
KPFUSED_INLINE void write_state(const ForwardParams& params, int64_t item, const S& state) {
  static_cast<S*>(params.workspace)[item] = state;
}

// Rounded as vectors are.
template <class T>
KPFUSED_INLINE T as_element(Acc<T> value) {
  T lanes[kLanes<Acc<T>>];
  store(lanes, splat(value));
  return lanes[0];
}

// n elements, or n times one value. A call of memcpy takes longer than a short row; the last vector overlaps the one before
// it.
template <class T>
KPFUSED_INLINE void copy_row(const T* from, T* to, int64_t n) {
  constexpr int64_t kElements = kVectorBytes / int64_t(sizeof(T));
  const auto move = [&](int64_t i) __attribute__((always_inline)) {
    T vector[kElements];
    __builtin_memcpy(vector, from + i, sizeof(vector));
    __builtin_memcpy(to + i, vector, sizeof(vector));
  };
  if (n < kElements) return void(__builtin_memcpy(to, from, size_t(n) * sizeof(T)));
  int64_t i = 0;
  for (; i + kElements <= n; i += kElements) move(i);
  if (i < n) move(n - kElements);
}
template <class T>
KPFUSED_INLINE void fill_row(T* to, int64_t n, T value) {
  constexpr int64_t kElements = kVectorBytes / int64_t(sizeof(T));
  if (n < kElements) {
    for (int64_t i = 0; i < n; ++i) to[i] = value;
    return;
  }
  T vector[kElements];
  for (int64_t i = 0; i < kElements; ++i) vector[i] = value;
  int64_t i = 0;
  for (; i + kElements <= n; i += kElements) __builtin_memcpy(to + i, vector, sizeof(vector));
  if (i < n) __builtin_memcpy(to + n - kElements, vector, sizeof(vector));
}
template <class T>
KPFUSED_INLINE void clear_row(T* to, int64_t n) {
  fill_row(to, n, T{});
}

template <class T>
KPFUSED_INLINE void copy_rows(const T* from, int64_t from_y, T* to, int64_t to_y, int64_t rows, int64_t count) {
  for (int64_t r = 0; r < rows; ++r) copy_row(from + r * from_y, to + r * to_y, count);
}

// Copies rows that do not follow each other in memory, for the flat kernels.
template <class T>
KPFUSED_INLINE void gather_rows(const T* p, int64_t stride_y, int64_t rows, int64_t width, T* out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < width; ++c) *out++ = p[r * stride_y + c];
  }
}

}  // namespace kpfused::cpu::KPFUSED_ISA
