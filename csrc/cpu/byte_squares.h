// SPDX-License-Identifier: MIT
// Masks from one order to another. Eight rows of bytes become one of bits, squares of such bytes are transposed, an eighth of
// what there was, and a column's bits are what is wanted, or become bytes again.
#pragma once

#include "maps.h"
#include "mask_vectors.h"
#include "masks.h"
#include "parallel.h"

namespace kpfused::cpu::KPFUSED_ISA {

constexpr int kByteSquare = 16;

// Of a column of the copy, rows from i on, eight for each byte of their bits.
KPFUSED_INLINE void put_bits(const ByteMatrices& m, const uint8_t* bits, int64_t count, uint8_t* column, int64_t i) {
  if (!m.bits) return unpack_bits(bits, count, column + i);
  if (count == kByteSquare) return void(__builtin_memcpy(column + i / 8, bits, kByteSquare));  // of constant size: one store
  __builtin_memcpy(column + i / 8, bits, size_t(count));
}

typedef uint8_t ByteRow __attribute__((vector_size(kByteSquare)));

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KPFUSED_BYTE_SQUARES 1

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

// Columns that are packed at once.
constexpr int kPacked = KPFUSED_AVX512 || KPFUSED_AVX2 ? 2 * kByteSquare : kByteSquare;

// Of these columns a bit for each of up to eight rows, the lowest for the first.
KPFUSED_INLINE void pack_rows(const uint8_t* from, int64_t from_row, int rows, uint8_t* to) {
  typedef uint8_t Row __attribute__((vector_size(kPacked)));
  Row bits = {};
  for (int i = rows; i-- > 0;) {
    Row row;
    __builtin_memcpy(&row, from + i * from_row, sizeof(row));
    bits = bits + bits + ones(row);
  }
  __builtin_memcpy(to, &bits, sizeof(bits));
}

// Up to so many columns of a square are taken from it byte by byte.
constexpr int64_t kFewColumns = 3;

// What is transposed at once.
struct ByteSquare {
  int64_t row, last_rows;    // eights of rows from this one on, of which the last may have fewer
  int64_t col, first, past;  // columns [first, past), read as kPacked of them from `col` on
  int64_t ahead, share;      // of what lies `ahead` bytes from the first row on, each eight fetch a share
};

KPFUSED_INLINE void transpose_square(const ByteMatrices& m, const uint8_t* from, uint8_t* to, int64_t eights, ByteSquare at) {
  alignas(kPacked) uint8_t packed[kByteSquare][kPacked];
  for (int64_t k = 0; k < eights; ++k) {
    const uint8_t* const eight = from + (at.row + k * 8) * m.from_row + at.col;
    k < eights - 1 || at.last_rows == 8 ? pack_rows(eight, m.from_row, 8, packed[k])
                                        : pack_rows(eight, m.from_row, int(at.last_rows), packed[k]);
    for (int64_t b = 0; b < at.share; b += 64) {
      prefetch(from + at.row * m.from_row, at.ahead + k * at.share + b);
      if (at.first == 0) prefetch_near(eight, kReadAhead / 4 + b);
    }
  }
  for (int j = 0; j < kPacked; j += kByteSquare) {
    const int64_t col = at.col + j, begin = at_least(at.first, col), end = at_most(at.past, col + kByteSquare);
    alignas(kByteSquare) uint8_t columns[kByteSquare][kByteSquare];
    if (end - begin > kFewColumns) {
      ByteRow rows[kByteSquare] = {}, turned[kByteSquare];
      for (int64_t k = 0; k < eights; ++k) __builtin_memcpy(&rows[k], packed[k] + j, sizeof(rows[k]));
      turn<4>(rows, turned);
      __builtin_memcpy(columns, turned, sizeof(columns));
    } else {
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t k = 0; k < eights; ++k) columns[c - col][k] = packed[k][j + c - col];
      }
    }
    for (int64_t c = begin; c < end; ++c) put_bits(m, columns[c - col], eights, to + c * m.to_col, at.row);
  }
}

// Rows from `begin` on of one matrix, in whole eights where the copy is not bits; returns how far it got. Where rows are
// narrower than a square, bytes between them and of what comes next are read too, of `readable` from the matrix on.
KPFUSED_INLINE int64_t transpose_rows(const ByteMatrices& m, const uint8_t* from, int64_t readable, uint8_t* to, int64_t begin,
                                      int64_t end) {
  const int64_t wide = at_least(m.cols, kPacked);
  if (readable < wide) return begin;
  const int64_t whole = at_most(end, (readable - wide) / m.from_row + 1);
  // Eights, of which the last may have fewer rows.
  const int64_t eights = m.bits && whole == end ? ceil_div(end - begin, 8) : (whole - begin) / 8;
  int64_t i = begin;
  for (int64_t left = eights, count; (count = at_most(left, kByteSquare)) > 0; left -= count, i += count * 8) {
    const int64_t last_rows = at_most(end - i - (count - 1) * 8, 8);
    // Of rows that lie far apart most lines would be fetched in vain.
    const int64_t eight = m.from_row < m.cols + 64 ? 8 * m.from_row : 0, share = eight / ceil_div(m.cols, kPacked);
    // Further ahead than elsewhere: bytes go by faster than weights are made of elements.
    int64_t ahead = at_least(count * eight, 2 * kReadAhead);
    for (int64_t j = 0; j < m.cols; j += kPacked, ahead += count * share) {
      // The last ones begin with columns of those before them.
      const int64_t col = at_most(j, wide - kPacked), past = at_most(j + kPacked, m.cols);
      const ByteSquare at = {i, last_rows, col, j, past, ahead, share};
      // A count that the compiler knows is unrolled.
      count == kByteSquare ? transpose_square(m, from, to, kByteSquare, at) : transpose_square(m, from, to, count, at);
    }
  }
  return at_most(i, end);
}
#endif
#endif

// A bit for each of 64 bytes that are kStep apart, whether it is set; what lies between them and behind the last is read too.
template <int kStep>
KPFUSED_INLINE uint64_t bits_apart(const uint8_t* p) {
  static_assert(kStep == 2 || kStep == 4);
  uint64_t bits = 0;
#if KPFUSED_AVX512
  for (int i = 0; i < kStep; ++i) {
    const __m512i bytes = _mm512_loadu_si512(p + 64 * i);
    const uint64_t some = kStep == 2 ? uint64_t(_mm512_test_epi16_mask(bytes, _mm512_set1_epi16(0xff)))
                                     : uint64_t(_mm512_test_epi32_mask(bytes, _mm512_set1_epi32(0xff)));
    bits |= some << 64 / kStep * i;
  }
#elif KPFUSED_AVX2
  for (int i = 0; i < 2 * kStep; ++i) {
    const __m256i bytes = _mm256_loadu_si256((const __m256i*)(p + 32 * i)), none = _mm256_setzero_si256();
    if constexpr (kStep == 4) {
      const __m256i clear = _mm256_cmpeq_epi32(_mm256_and_si256(bytes, _mm256_set1_epi32(0xff)), none);
      bits |= uint64_t(~_mm256_movemask_ps((__m256)clear) & 0xff) << 8 * i;
    } else {
      const __m256i clear = _mm256_cmpeq_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(0xff)), none);
      const __m128i sixteen = _mm_packs_epi16(_mm256_castsi256_si128(clear), _mm256_extracti128_si256(clear, 1));
      bits |= uint64_t(~_mm_movemask_epi8(sixteen) & 0xffff) << 16 * i;
    }
  }
#else
  constexpr int kOwn = 8 / kStep;  // of a word of eight
  for (int i = 0; i < 64; i += 2 * kOwn) {
    typedef uint64_t Words __attribute__((vector_size(kByteSquare)));
    ByteRow bytes;
    __builtin_memcpy(&bytes, p + i * kStep, sizeof(bytes));
    Words words = (Words)ones(bytes);
    if constexpr (kStep == 4) {
      words = (words | words >> 31) & 3;
    } else {
      words = (words & 0x0001000100010001u) * 0x1000200040008000u >> 60;  // each to a place of its own, the highest four
    }
    bits |= (words[0] | words[1] << kOwn) << i;
  }
#endif
  return bits;
}

// Rows from `begin` on of a matrix of one column, in which every second or fourth byte counts; returns how far it got.
KPFUSED_INLINE int64_t gather_column(const ByteMatrices& m, const uint8_t* from, uint8_t* to, int64_t begin, int64_t end) {
  if (m.from_row != 2 && m.from_row != 4) return begin;
  int64_t i = begin;
  for (int64_t count; (count = at_most(end - i, 64)) == 64 || (m.bits && count > 0); i += count) {
    const uint8_t* p = from + i * m.from_row;
    prefetch_run(p, 64 * m.from_row, kReadAhead);
    uint8_t last[64 * 4];
    if (i + count == m.rows) {  // what lies behind the last may not be there
      __builtin_memcpy(last, p, size_t((count - 1) * m.from_row + 1));
      p = last;
    }
    const uint64_t bits = m.from_row == 2 ? bits_apart<2>(p) : bits_apart<4>(p);
    uint8_t bytes[8];
    __builtin_memcpy(bytes, &bits, sizeof(bytes));
    put_bits(m, bytes, ceil_div(count, 8), to, i);
  }
  return i;
}

// Rows [begin, end), from a whole eight on where the copy is bits. What is in `m` is read ahead of loops that write bytes:
// compilers would read it anew after each.
KPFUSED_INLINE void copy_one_by_one(const ByteMatrices& m, const uint8_t* from, uint8_t* to, int64_t begin, int64_t end) {
  const int64_t cols = m.cols, from_row = m.from_row, to_col = m.to_col;
  if (!m.bits) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < cols; ++j) to[j * to_col + i] = from[i * from_row + j] != 0;
    }
    return;
  }
  for (int64_t i = begin; i < end; i += 8) {
    for (int64_t j = 0; j < cols; ++j) {
      uint8_t bits = 0;
      for (int64_t k = 0; k < at_most(end - i, 8); ++k) bits = uint8_t(bits | (from[(i + k) * from_row + j] != 0) << k);
      to[j * to_col + i / 8] = bits;
    }
  }
}

void transpose(const ByteMatrices& m) {
  constexpr int64_t kRows = 8 * kByteSquare;  // of a square, and whole lines of most copies
  const int64_t block = at_least(kGrainElements / m.cols / kRows * kRows, kRows), blocks = ceil_div(m.rows, block);
  int64_t matrices = 1, bytes = (m.rows - 1) * m.from_row + m.cols;
  for (int d = 0; d < m.dims; ++d) matrices *= m.size[d], bytes += (m.size[d] - 1) * m.from_step[d];
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
        i = gather_column(m, from, to, i, end_row);
      } else {
#ifdef KPFUSED_BYTE_SQUARES
        i = transpose_rows(m, from, bytes - (from - m.from), to, i, end_row);
#endif
      }
      copy_one_by_one(m, from, to, i, end_row);
    }
  });
}

}  // namespace kpfused::cpu::KPFUSED_ISA
