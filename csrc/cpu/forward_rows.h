// SPDX-License-Identifier: MIT
// Forward where lanes run along rows (stride_x == 1).
//
//   peak = max k, then sum w, sum w x, sum w y with w = 2^((k - peak) * scale); chunk by chunk, merged in order
//
// Reads every element once from memory and once more from the nearest caches; writes 6 accumulators a map. Per vector
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

template <class T, bool Tail>
KPFUSED_INLINE void sum_block(int64_t n, const RowsChunk<T>& chunk, int64_t first, const Falloff<Acc<T>>& of,
                              Sums<Acc<T>>& sums) {
  if constexpr (kBlock > 3) {
    if (n == 4) return sum_columns<T, 4, Tail>(chunk, first, of, sums);
  }
  if (n == 3) return sum_columns<T, 3, Tail>(chunk, first, of, sums);
  if (n == 2) return sum_columns<T, 2, Tail>(chunk, first, of, sums);
  return sum_columns<T, 1, Tail>(chunk, first, of, sums);
}

template <class T>
State<Acc<T>> forward_rows_chunk(const RowsChunk<T>& chunk, const Sharpness<Acc<T>>& sharp) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const A peak = peak_of(chunk, sharp.sign);
  const Falloff<A> of = falloff(sharp, peak);
  // Blocks of as equal a width as possible: one vector alone has nothing to hide the latency of its row sum.
  const int64_t vectors = ceil_div(chunk.cols, L), blocks = ceil_div(vectors, kBlock);
  const int64_t narrow = vectors / blocks, wide = vectors % blocks;
  const bool tail = chunk.cols % L != 0;
  Sums<A> sums = {};
  int64_t first = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t n = narrow + (b < wide);
    if (tail && b == blocks - 1) {
      sum_block<T, true>(n, chunk, first, of, sums);
    } else {
      sum_block<T, false>(n, chunk, first, of, sums);
    }
    first += n * L;
  }
  const Triple<A> total = reduce<A>(sums.sum, sums.x, sums.y);
  return {peak, total.sum, total.x, total.y};
}

// n elements in a row whose coordinates are in a table. Where there are fewer than a vector of them, p points to a
// whole vector all the same, the rest of it copies of the first element.
template <class T>
KPFUSED_INLINE State<Acc<T>> forward_flat_span(const T* p, int64_t n, const FlatTable<Acc<T>>& table,
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

// One chunk of a flat map.
template <class T>
KPFUSED_INLINE State<Acc<T>> forward_flat_chunk(const T* p, int64_t stride_y, int64_t rows, int64_t width,
                                                Acc<T> shift, const FlatTable<Acc<T>>& table,
                                                const Sharpness<Acc<T>>& sharp) {
  using A = Acc<T>;
  const int64_t n = rows * width;
  T buffer[kTable<A>];
  if (n < kLanes<A> || (stride_y != width && rows > 1)) {
    gather_rows(p, stride_y, rows, width, buffer);
    for (int64_t i = n; i < kLanes<A>; ++i) buffer[i] = buffer[0];
    p = buffer;
  }
  State<A> state = forward_flat_span(p, n, table, sharp);
  state.sum_y += state.sum * shift;
  return state;
}

// The forward of one thread's range of (map, part).
template <class T>
class ForwardRows {
 public:
  using A = Acc<T>;

  explicit ForwardRows(const ForwardParams& params) : params_(params), view_(params.view), plan_(view_) {
    if (plan_.flat) table_.fill(view_.height, view_.width);
  }

  void run(int64_t begin, int64_t end) const {
    const T* base = static_cast<const T*>(params_.heatmap);
    if (plan_.parts.count() > 1) {
      for (int64_t item = begin; item < end; ++item) run_part(base, item);
      return;
    }
    const Tiling chunks = plan_.chunks(view_.height, view_.width);
    MapWalk walk(view_, begin);
    for (int64_t map = begin; map < end; ++map) {
      const T* p = base + walk.offset();
      walk.advance();
      const Part part = {p, 0, 0, chunks, map + 1 < end ? base + walk.offset() : p};
      write_result(params_, map, of_part(part, sharpness(beta_of<A>(params_.beta, map))));
    }
  }

 private:
  struct Part {
    const T* p;
    int64_t row, col;
    Tiling chunks;
    const T* next;  // where to read on afterwards
  };

  void run_part(const T* base, int64_t item) const {
    const Tiling& parts = plan_.parts;
    const int64_t map = item / parts.count(), index = item % parts.count();
    const int64_t i = index / parts.x.count, j = index % parts.x.count;
    const int64_t row = parts.y.begin(i), col = parts.x.begin(j);
    const T* p = base + map_offset(view_, map) + row * view_.stride_y + col;
    const T* next = j + 1 == parts.x.count ? p - col + parts.y.size(i) * view_.stride_y : p + parts.x.size(j);
    const Part part = {p, row, col, plan_.chunks(parts.y.size(i), parts.x.size(j)), next};
    write_state(params_, item, of_part(part, sharpness(beta_of<A>(params_.beta, map))));
  }

  KPFUSED_INLINE State<A> of_part(const Part& part, const Sharpness<A>& sharp) const {
    State<A> state = chunk(part, 0, 0, sharp);
    if (part.chunks.count() == 1) return state;
    for (int64_t i = 0; i < part.chunks.y.count; ++i) {
      for (int64_t j = i == 0 ? 1 : 0; j < part.chunks.x.count; ++j) {
        state = merge(state, chunk(part, i, j, sharp), sharp.scale, ScalarExp2{});
      }
    }
    return state;
  }

  KPFUSED_INLINE State<A> chunk(const Part& part, int64_t i, int64_t j, const Sharpness<A>& sharp) const {
    const Cut &y = part.chunks.y, &x = part.chunks.x;
    const int64_t row = part.row + y.begin(i), col = part.col + x.begin(j);
    const T* p = part.p + y.begin(i) * view_.stride_y + x.begin(j);
    if (plan_.flat) {
      return forward_flat_chunk(p, view_.stride_y, y.size(i), view_.width, table_.shift(row, view_.height), table_,
                                sharp);
    }
    const T* next = j + 1 < x.count   ? p + x.size(j)
                    : i + 1 < y.count ? part.p + y.begin(i + 1) * view_.stride_y
                                      : part.next;
    return forward_rows_chunk<T>({p, view_.stride_y, y.size(i), x.size(j), centred<A>(col, view_.width),
                                  centred<A>(row, view_.height), (next - p) * int64_t(sizeof(T))},
                                 sharp);
  }

  const ForwardParams& params_;
  const MapView& view_;
  RowPlan<T> plan_;
  FlatTable<A> table_;
};

}  // namespace kpfused::cpu::KPFUSED_ISA
