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

#include "counting.h"

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
  A x0, y0;  // centred coordinates of the first pixel
  const T* next;   // the chunk that is fetched meanwhile
  int64_t next_y;  // between its rows
  const uint8_t* mask = nullptr;  // its own; what lies below it is fetched meanwhile
  int64_t mask_y = 0;
  const A* peak = nullptr;        // where it is known
  const uint8_t* bits = nullptr;  // a mask's own, or from count_bits() or count_rows(); null: all pixels count
  int64_t bits_y = 0;             // bytes between their rows
};

// What is fetched of the next chunk and its mask while the vectors from column `first` on of this one's rows are gone through.
// Where rows follow each other in memory it is their share in that order, not what they themselves will read: memory is
// quickest in order.
template <class T>
class RowsAhead {
 public:
  KPFUSED_INLINE RowsAhead(const RowsChunk<T>& chunk, int64_t first, int vectors)
      : next_(chunk, first, vectors, chunk.next_y), mask_(chunk, first, vectors, chunk.mask_y) {
    next_.at *= int64_t(sizeof(T)), next_.step *= int64_t(sizeof(T));
    mask_.at += chunk.rows * chunk.mask_y;
  }

  // A vector of them: each line once.
  KPFUSED_INLINE void fetch(const RowsChunk<T>& chunk, int vector) const {
    const int bytes = vector * kLanes<Acc<T>> * int(sizeof(T));
    if (bytes % 64 == 0) prefetch(chunk.next, next_.at + bytes);
  }
  KPFUSED_INLINE void next_row(const RowsChunk<T>& chunk) {
    next_.at += next_.step;
    if (!chunk.mask) return;
    prefetch(chunk.mask, mask_.at);
    mask_.at += mask_.step;
  }

 private:
  struct Place {
    int64_t at, step;

    KPFUSED_INLINE Place(const RowsChunk<T>& chunk, int64_t first, int vectors, int64_t stride_y)
        : at(stride_y == chunk.cols ? first * chunk.rows : first),
          step(stride_y == chunk.cols ? vectors * kLanes<Acc<T>> : stride_y) {}
  };
  Place next_, mask_;
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

#if KPFUSED_AVX512
// The greatest key of the pixels that count. word(row, column, how many) has a bit for each of up to 64, a multiple of eight;
// where the mask is dense and the map is too, they are one row.
template <class T, bool kNegative, class Word>
KPFUSED_INLINE Acc<T> peak_of_counted(const RowsChunk<T>& chunk, bool dense, const Word& word) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>, kWord = 64, kPeaks = 4;
  Vec<A> peak[kPeaks];
  for (int j = 0; j < kPeaks; ++j) peak[j] = splat(Limits<A>::lowest);
  dense = dense && chunk.stride_y == chunk.cols;
  const int64_t rows = dense ? 1 : chunk.rows, cols = dense ? chunk.rows * chunk.cols : chunk.cols;
  const T* p = chunk.p;
  for (int64_t r = 0; r < rows; ++r, p += chunk.stride_y) {
    const auto see = [&](int64_t col, int j, __mmask64 lanes) __attribute__((always_inline)) {
      const Vec<A> key = kNegative ? -load(p + col) : load(p + col);
      const LaneWord<A> few = LaneWord<A>(lanes);
      peak[j] = choose_lanes<A>(&few, maximum(key, peak[j]), peak[j]);
    };
    int64_t col = 0;
    for (; col + kWord <= cols; col += kWord) {
      __mmask64 set = word(r, col, kWord);
      for (int j = 0; j < kWord / L; ++j, set = _kshiftri_mask64(set, L)) see(col + j * L, j % kPeaks, set);
    }
    if (col == cols) continue;
    const __mmask64 set = word(r, col, cols - col);
    for (int64_t i = col; i < cols; i += L) {
      const int64_t at = at_most(i, cols - L);
      see(at, 0, set >> (i - col) << (i - at));
    }
  }
  for (int j = 1; j < kPeaks; ++j) peak[0] = maximum(peak[j], peak[0]);
  return reduce_max<A>(peak[0]);
}

// Writes a bit for each pixel, whether it counts, row after row of whole bytes, and up to seven bytes more. Returns the
// greatest key of those that do.
template <class T, bool kNegative>
Acc<T> count_bits(const RowsChunk<T>& chunk, uint8_t* bits) {
  const auto word = [&](int64_t row, int64_t col, int64_t n) __attribute__((always_inline)) {
    const uint8_t* const p = chunk.mask + row * chunk.mask_y + col;
    const __mmask64 set = set_bits(n == 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((1ull << n) - 1, p));
    __builtin_memcpy(bits + (row * chunk.cols + col) / 8, &set, sizeof(set));
    return set;
  };
  return peak_of_counted<T, kNegative>(chunk, chunk.mask_y == chunk.cols, word);
}

// Of a mask that has bits already.
template <class T, bool kNegative>
Acc<T> peak_of_bits(const RowsChunk<T>& chunk) {
  const auto word = [&](int64_t row, int64_t col, int64_t n) __attribute__((always_inline)) {
    const uint8_t* const p = chunk.bits + row * chunk.bits_y + col / 8;
    const __m128i bits = n == 64 ? _mm_loadl_epi64((const __m128i*)p) : _mm_maskz_loadu_epi8(__mmask16((1u << n / 8) - 1), p);
    return __mmask64(_mm_cvtsi128_si64(bits));
  };
  return peak_of_counted<T, kNegative>(chunk, chunk.bits_y * 8 == chunk.cols, word);
}

// Bits and greatest key of a mask that has one byte for each row, from `flags` on: rows that follow each other and count are
// taken at once.
template <class T, bool kNegative>
Acc<T> count_rows(const RowsChunk<T>& chunk, const uint8_t* flags, int64_t flags_y, uint8_t* bits) {
  Acc<T> peak = Limits<Acc<T>>::lowest;
  for (int64_t r = 0, end; r < chunk.rows; r = end) {
    const bool counts = flags[r * flags_y] != 0;
    for (end = r + 1; end < chunk.rows && (flags[end * flags_y] != 0) == counts;) ++end;
    __builtin_memset(bits + r * chunk.cols / 8, counts ? 0xff : 0, size_t((end - r) * chunk.cols / 8));
    RowsChunk<T> some = chunk;
    some.p += r * chunk.stride_y, some.rows = end - r;
    if (counts) peak = larger(peak, peak_of_rows<T, kNegative>(some));
  }
  return peak;
}
#endif

// N vectors side by side, from column `first` on, over all rows of the chunk. With Tail the last of them is the last
// vector of the row, which overlaps columns already counted. With kCounted not all pixels count.
template <class T, int N, bool Tail, bool kCounted>
void sum_columns(const RowsChunk<T>& chunk, int64_t first, const Falloff<Acc<T>>& of, Sums<Acc<T>>& sums) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const Falloff<Vec<A>> falloff = in_lanes(of);
  const int64_t last = Tail ? chunk.cols - L - first : (N - 1) * L;
  const Mask<A> mask = last_lanes<A>(chunk.cols - first - (N - 1) * L);
  Vec<A> column[N] = {}, sum_y = {}, y = splat(chunk.y0);
  const T* p = chunk.p + first;
  const uint8_t* bits = kCounted ? chunk.bits + (first >> 3) : nullptr;
  RowsAhead<T> ahead(chunk, first, N);
  for (int64_t r = 0; r < chunk.rows; ++r, p += chunk.stride_y, y += A(1)) {
    Vec<A> w[N];
    for (int j = 0; j < N; ++j) {
      const T* q = p + (j < N - 1 ? j * L : last);
      w[j] = distance(load(q), falloff);
      ahead.fetch(chunk, j);
    }
    ahead.next_row(chunk);
    exp2<A, N>(w, falloff.scale, [&](int j, Vec<A> v) __attribute__((always_inline)) {
      return kCounted ? keep_lanes<A>(bits + ((j < N - 1 ? j * L : last) >> 3), v) : v;
    });
    if (kCounted) bits += chunk.bits_y;
    if (Tail) w[N - 1] = keep<A>(w[N - 1], mask);
    for (int j = 0; j < N; ++j) column[j] += w[j];
    for (int j = 1; j < N; ++j) w[0] += w[j];
    sum_y += w[0] * y;
  }
  const Vec<A> x = iota<A>() + chunk.x0;
  for (int j = 0; j < N; ++j) {
    sums.sum += column[j];
    sums.x += column[j] * (x + A(first + (j < N - 1 ? j * L : last)));
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
    const auto sum = [&](auto counted) {
      tail ? sum_columns<T, n, true, counted>(chunk, first * L, of, sums)
           : sum_columns<T, n, false, counted>(chunk, first * L, of, sums);
    };
    if constexpr (KPFUSED_AVX512) {
      if (chunk.bits) return sum(std::true_type{});
    }
    sum(std::false_type{});
  });
  const Triple<A> total = reduce<A>(sums.sum, sums.x, sums.y);
  return {peak, total.sum, total.x, total.y};
}

#if KPFUSED_AVX512
// Of the pixels of a mask, where they are, whatever the others hold. `flags`, `flags_y`: those of rows, where the
// chunk has no mask of its own, neither bytes nor bits.
template <int64_t kBytes, class T>
KPFUSED_INLINE State<Acc<T>> sums_by_bits(RowsChunk<T> chunk, const uint8_t* flags, int64_t flags_y,
                                          const Sharpness<Acc<T>>& sharp) {
  constexpr int64_t kMost = 2 * kBytes / int64_t(sizeof(T));  // as of a copy
  uint8_t bits[kMost / 8 + 8];
  const auto count = [&](auto negative) {
    if (chunk.bits) return peak_of_bits<T, negative>(chunk);
    return chunk.mask ? count_bits<T, negative>(chunk, bits) : count_rows<T, negative>(chunk, flags, flags_y, bits);
  };
  const Acc<T> peak = sharp.sign < 0 ? count(std::true_type{}) : count(std::false_type{});
  if (!chunk.bits) chunk.bits = bits, chunk.bits_y = chunk.cols >> 3;
  chunk.peak = &peak;
  return chunk_sums(chunk, sharp);
}
#endif

// n elements in a row whose coordinates are in a table. Where there are fewer than a vector of them, p points to a
// whole vector all the same, the rest of it copies of the first element.
template <class T>
KPFUSED_INLINE State<Acc<T>> flat_sums(const T* p, int64_t n, const FlatTable<Acc<T>>& table,
                                               const Sharpness<Acc<T>>& sharp) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t end = at_least(n, L), last = end - L;
  const A peak = peak_of(RowsChunk<T>{p, end, 1, end, A(0), A(0), nullptr, 0}, sharp.sign);
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
