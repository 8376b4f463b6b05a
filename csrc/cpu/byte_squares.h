// SPDX-License-Identifier: MIT
// Bytes of a mask from one order to another, square by square.
#pragma once

#include "masks.h"
#include "parallel.h"
#include "simd.h"

namespace kpfused::cpu::KPFUSED_ISA {

constexpr int kByteSquare = 16;

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KPFUSED_BYTE_SQUARES 1

template <int kSquares>
struct BytesOf {
  typedef uint8_t type __attribute__((vector_size(kSquares * kByteSquare)));
};

// Of each sixteen bytes of a and b the lower halves, or the upper ones, byte by byte in turn.
template <int kHalf, class V, size_t... i>
KPFUSED_INLINE V interleave(V a, V b, std::index_sequence<i...>) {
  constexpr auto from = [](int at) {
    const int k = at % kByteSquare;
    return at - k + kHalf * (kByteSquare / 2) + k / 2 + k % 2 * int(sizeof(V));
  };
  return __builtin_shufflevector(a, b, from(int(i))...);
}

// An element's place is four bits of its row and four of its column. To interleave rows r and r + 8 turns all eight by one
// place: after four turns rows are columns.
template <int kTurns, class V>
KPFUSED_INLINE void turn(const V (&rows)[kByteSquare], V (&columns)[kByteSquare]) {
  constexpr std::make_index_sequence<sizeof(V)> all;
  constexpr int kHalf = kByteSquare / 2;
  V turned[kByteSquare];
  for (int i = 0; i < kHalf; ++i) {
    turned[2 * i] = interleave<0>(rows[i], rows[i + kHalf], all);
    turned[2 * i + 1] = interleave<1>(rows[i], rows[i + kHalf], all);
  }
  if constexpr (kTurns > 1) {
    turn<kTurns - 1>(turned, columns);
  } else {
    for (int i = 0; i < kByteSquare; ++i) columns[i] = turned[i];
  }
}

// Sixteen bytes of each of some rows, `step` bytes apart.
template <int kSquares>
KPFUSED_INLINE typename BytesOf<kSquares>::type gather_bytes(const uint8_t* p, int64_t step) {
  using V = typename BytesOf<kSquares>::type;
#if KPFUSED_AVX2 || KPFUSED_AVX512
  const auto at = [&](int i) __attribute__((always_inline)) { return _mm_loadu_si128((const __m128i*)(p + i * step)); };
  if constexpr (kSquares == 2) return (V)_mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1);
#if KPFUSED_AVX512
  if constexpr (kSquares == 4) {
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(at(0)), at(1), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(at(2)), at(3), 1);
    return (V)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
#endif
#endif
  uint8_t bytes[sizeof(V)];
  for (int i = 0; i < kSquares; ++i) __builtin_memcpy(bytes + i * kByteSquare, p + i * step, kByteSquare);
  V v;
  __builtin_memcpy(&v, bytes, sizeof(v));
  return v;
}

// Squares one below the other, of which `cols` columns are written.
template <int kSquares>
KPFUSED_INLINE void transpose_squares(const uint8_t* from, int64_t from_row, uint8_t* to, int64_t to_col, int64_t cols) {
  typename BytesOf<kSquares>::type rows[kByteSquare], columns[kByteSquare];
  for (int i = 0; i < kByteSquare; ++i) rows[i] = gather_bytes<kSquares>(from + i * from_row, kByteSquare * from_row);
  turn<4>(rows, columns);
  for (int j = 0; j < kByteSquare; ++j) {
    if (j < cols) __builtin_memcpy(to + j * to_col, &columns[j], sizeof(columns[j]));
  }
}

// Rows from `begin` on of one matrix, squares of them at a time; returns how far it got. Where rows are narrower than a square,
// bytes between them and of the next ones are read too, within the matrix.
template <int kSquares>
KPFUSED_INLINE int64_t transpose_rows(const ByteMatrices& m, const uint8_t* from, uint8_t* to, int64_t begin, int64_t end) {
  constexpr int64_t kRows = kSquares * kByteSquare;
  const int64_t wide = at_least(m.cols, kByteSquare), last = (m.rows - 1) * m.from_row + m.cols;
  int64_t i = begin;
  for (; i + kRows <= end && (i + kRows - 1) * m.from_row + wide <= last; i += kRows) {
    for (int64_t j = 0; j < m.cols; j += kByteSquare) {
      const int64_t col = at_most(j, wide - kByteSquare);
      transpose_squares<kSquares>(from + i * m.from_row + col, m.from_row, to + col * m.to_col + i, m.to_col, m.cols);
    }
  }
  return i;
}
#endif
#endif

void transpose(const ByteMatrices& m) {
  constexpr int64_t kLine = 64;
  const int64_t block = at_least(kGrainElements / m.cols / kLine * kLine, kLine), blocks = ceil_div(m.rows, block);
  int64_t matrices = 1;
  for (int d = 0; d < m.dims; ++d) matrices *= m.size[d];
  const int64_t grain = at_least(kGrainElements / (at_most(m.rows, block) * m.cols), 1);
  parallel_for(matrices * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const uint8_t* from = m.from;
      uint8_t* to = m.to;
      int64_t rest = item / blocks;
      for (int d = 0; d < m.dims; rest /= m.size[d++]) {
        from += rest % m.size[d] * m.from_step[d], to += rest % m.size[d] * m.to_step[d];
      }
      int64_t i = item % blocks * block;
      const int64_t end_row = at_most(i + block, m.rows);
      if (m.cols == 1) {
        for (const int64_t step = m.from_row; i < end_row; ++i) to[i] = from[i * step];
        continue;
      }
#ifdef KPFUSED_BYTE_SQUARES
      i = transpose_rows<kVectorBytes / kByteSquare>(m, from, to, i, end_row);
      i = transpose_rows<1>(m, from, to, i, end_row);
#endif
      for (; i < end_row; ++i) {
        for (int64_t j = 0; j < m.cols; ++j) to[j * m.to_col + i] = from[i * m.from_row + j];
      }
    }
  });
}

}  // namespace kpfused::cpu::KPFUSED_ISA
