// SPDX-License-Identifier: MIT
// Masks from one order to another. Eight rows of bytes become one of bits, squares of such bytes are transposed, an eighth of
// what there was, and a column's bits become bytes again.
#pragma once

#include "counting.h"
#include "masks.h"
#include "parallel.h"

namespace kpfused::cpu::KPFUSED_ISA {

constexpr int kByteSquare = 16;

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KPFUSED_BYTE_SQUARES 1

typedef uint8_t ByteRow __attribute__((vector_size(kByteSquare)));

// Of a and b the lower halves, or the upper ones, byte by byte in turn.
template <int kHalf, size_t... i>
KPFUSED_INLINE ByteRow interleave(ByteRow a, ByteRow b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (kHalf * (kByteSquare / 2) + int(i) / 2 + int(i) % 2 * kByteSquare)...);
}

// An element's place is four bits of its row and four of its column. To interleave rows r and r + 8 turns all eight by one
// place: after four turns rows are columns.
template <int kTurns>
KPFUSED_INLINE void turn(const ByteRow (&rows)[kByteSquare], ByteRow (&columns)[kByteSquare]) {
  constexpr std::make_index_sequence<kByteSquare> all;
  constexpr int kHalf = kByteSquare / 2;
  ByteRow turned[kByteSquare];
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

// Of sixteen columns a bit for each of eight rows, the lowest for the first.
KPFUSED_INLINE ByteRow pack_rows(const uint8_t* from, int64_t from_row) {
  ByteRow bits = {};
  for (int i = 8; i-- > 0;) {
    ByteRow row;
    __builtin_memcpy(&row, from + i * from_row, sizeof(row));
    bits = bits + bits + ones(row);
  }
  return bits;
}

// Bytes of a column, eight for each byte of its bits.
KPFUSED_INLINE void unpack_column(const uint8_t* bits, int64_t count, uint8_t* to) {
  int64_t i = 0;
#if KPFUSED_AVX512
  for (; i + 8 <= count; i += 8) {
    uint64_t set;
    __builtin_memcpy(&set, bits + i, sizeof(set));
    _mm512_storeu_si512(to + i * 8, _mm512_maskz_mov_epi8(set, _mm512_set1_epi8(1)));
  }
#elif KPFUSED_AVX2
  const __m256i index = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201u));
  for (; i + 4 <= count; i += 4) {
    int32_t set;
    __builtin_memcpy(&set, bits + i, sizeof(set));
    const __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(set), index), bit);
    _mm256_storeu_si256((__m256i*)(to + i * 8), _mm256_min_epu8(own, _mm256_set1_epi8(1)));
  }
#endif
  for (; i < count; ++i) {
    const uint64_t bytes = spread_bits(bits[i]);
    __builtin_memcpy(to + i * 8, &bytes, sizeof(bytes));
  }
}

// The first 8 * count rows, and columns [first, past), read as the sixteen from `col` on.
KPFUSED_INLINE void transpose_square(const ByteMatrices& m, const uint8_t* from, uint8_t* to, int64_t count, int64_t col,
                                     int64_t first, int64_t past) {
  ByteRow rows[kByteSquare] = {}, columns[kByteSquare];
  for (int64_t k = 0; k < count; ++k) rows[k] = pack_rows(from + k * 8 * m.from_row + col, m.from_row);
  turn<4>(rows, columns);
  for (int64_t c = first; c < past; ++c) {
    alignas(kByteSquare) uint8_t bits[kByteSquare];
    __builtin_memcpy(bits, &columns[c - col], sizeof(bits));
    unpack_column(bits, count, to + c * m.to_col);
  }
}

// Rows from `begin` on of one matrix, in whole eights; returns how far it got. Where rows are narrower than a square, bytes
// between them and of the next ones are read too, within the matrix.
KPFUSED_INLINE int64_t transpose_rows(const ByteMatrices& m, const uint8_t* from, uint8_t* to, int64_t begin, int64_t end) {
  const int64_t wide = at_least(m.cols, kByteSquare), last = (m.rows - 1) * m.from_row + m.cols;
  if (last < wide) return begin;
  const int64_t readable = at_most(end, (last - wide) / m.from_row + 1);
  int64_t i = begin;
  for (int64_t count; (count = at_most((readable - i) / 8, kByteSquare)) > 0; i += count * 8) {
    for (int64_t j = 0; j < m.cols; j += kByteSquare) {
      // The last square begins with columns of the one before it.
      const int64_t col = at_most(j, wide - kByteSquare), past = at_most(j + kByteSquare, m.cols);
      const uint8_t* const p = from + i * m.from_row;
      // A count that the compiler knows is unrolled.
      count == kByteSquare ? transpose_square(m, p, to + i, kByteSquare, col, j, past)
                           : transpose_square(m, p, to + i, count, col, j, past);
    }
  }
  return i;
}
#endif
#endif

void transpose(const ByteMatrices& m) {
  constexpr int64_t kRows = 8 * kByteSquare;  // of a square, and whole lines of most copies
  const int64_t block = at_least(kGrainElements / m.cols / kRows * kRows, kRows), blocks = ceil_div(m.rows, block);
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
        for (const int64_t step = m.from_row; i < end_row; ++i) to[i] = from[i * step] != 0;
        continue;
      }
#ifdef KPFUSED_BYTE_SQUARES
      i = transpose_rows(m, from, to, i, end_row);
#endif
      for (; i < end_row; ++i) {
        for (int64_t j = 0; j < m.cols; ++j) to[j * m.to_col + i] = from[i * m.from_row + j] != 0;
      }
    }
  });
}

}  // namespace kpfused::cpu::KPFUSED_ISA
