// SPDX-License-Identifier: MIT
// Pixels that do not count: a mask, of bytes or of bits, or beyond the valid size. Rows go through a buffer in the nearest
// cache, in which these pixels hold a logit of no weight, and their gradients are set to zero afterwards; with mask registers,
// sums take bits of a mask in place of that. What counts as a whole is read in place. Where lanes are channels, words say
// which of them count (lane_words.h), or the bytes of the mask themselves, or kernels skip pixels of which no channel does.
#pragma once

#include "maps.h"
#include "mask_vectors.h"

namespace kpfused::cpu::KPFUSED_ISA {

struct PixelRange {
  int64_t row, rows, col, cols;
};

// Which pixels of one map count.
struct Counting {
  const uint8_t* mask;  // of the map's first pixel; null: all within the valid size
  int64_t stride_y, stride_x;
  int64_t rows, cols;  // the valid size
  int64_t bit = 0;     // where rows begin in their first byte, of a mask of bits

  KPFUSED_INLINE bool in_bits() const { return mask && stride_x == kMaskBits; }
  KPFUSED_INLINE bool at(int64_t row, int64_t col) const {
    if (row >= rows || col >= cols || !mask) return row < rows && col < cols;
    const uint8_t* const p = mask + row * stride_y;
    return in_bits() ? p[(bit + col) / 8] >> (bit + col) % 8 & 1 : p[col * stride_x] != 0;
  }
  // Of what remains of the map from (row, col) on.
  KPFUSED_INLINE void begin_at(int64_t row, int64_t col) {
    rows -= row, cols -= col;
    if (!mask) return;
    const int64_t first = bit + col;
    mask += row * stride_y + (in_bits() ? first / 8 : col * stride_x);
    if (in_bits()) bit = first % 8;
  }
  // Whether these rows of a mask are one run of bytes.
  KPFUSED_INLINE bool is_run(int64_t of_rows, int64_t of_cols) const {
    return stride_x == 1 && (stride_y == of_cols || of_rows <= 1);
  }
  // Whether a mask has one byte for all of a row, as flags of keypoints have.
  KPFUSED_INLINE bool by_rows() const { return mask && stride_x == 0; }
  // Or one for all of the map.
  KPFUSED_INLINE bool by_maps() const { return by_rows() && stride_y == 0; }
};

KPFUSED_INLINE Counting counting_of(const PixelView& pixels, const MapView& view, int64_t map) {
  Counting c = {nullptr, pixels.mask_view.stride_y, pixels.mask_view.stride_x, view.height, view.width};
  if (pixels.mask) c.mask = pixels.mask + pixels.mask_view.offset(map);
  if (pixels.sizes) {
    const int64_t* size = pixels.sizes + map / pixels.divisor % pixels.modulus * 2;
    c.rows = at_most(at_least(size[0], 0), view.height);
    c.cols = at_most(at_least(size[1], 0), view.width);
  }
  return c;
}

// The logit whose weight is zero, as an element.
template <class T>
KPFUSED_INLINE T weightless(Acc<T> sign) {
  return as_element<T>(Acc<T>(-INFINITY) * sign);
}

// What unpacking bits may write beyond the pixels that are asked for: up to seven on either side.
constexpr int64_t kMaskRoom = 16;

// The bytes of n pixels of a mask from (row, col) on: where they are side by side its own, elsewhere in `buffer`, which has
// kMaskRoom more.
KPFUSED_INLINE const uint8_t* mask_bytes(const Counting& counting, int64_t row, int64_t col, int64_t n, uint8_t* buffer) {
  const uint8_t* p = counting.mask + row * counting.stride_y;
  if (counting.in_bits()) {
    const int64_t first = counting.bit + col;
    unpack_bits(p + first / 8, ceil_div(first % 8 + n, 8), buffer);
    return buffer + first % 8;
  }
  p += col * counting.stride_x;
  if (counting.stride_x == 1) return p;
  if (counting.by_rows()) return fill_row(buffer, n, *p), buffer;
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i * counting.stride_x];
  return buffer;
}

// Those of whole rows, one behind the other.
KPFUSED_INLINE void copy_mask(const Counting& counting, int64_t rows, int64_t cols, uint8_t* to) {
  for (int64_t r = 0; r < rows; ++r, to += cols) {
    const uint8_t* const bytes = mask_bytes(counting, r, 0, cols, to);
    if (counting.stride_x == 1) copy_row(bytes, to, cols);
    else if (bytes != to) __builtin_memmove(to, bytes, size_t(cols));  // of bits that do not begin with a byte
  }
}

// Vectors that are selected at once.
constexpr int kSelected = 4;

// to[i] = mask[i] ? from[i] : otherwise, vectors of which seen(v, j) sees, j of kSelected in turn: what follows on each
// other need not wait. Also reads what is not taken. `from` and `to` may be the same. With kFetch what comes next is fetched,
// and with kFetchMask that of the mask.
template <bool kFetch, bool kFetchMask, class T, class Seen>
KPFUSED_INLINE void select(const uint8_t* mask, const T* from, T* to, int64_t n, T otherwise, const Seen& seen) {
  constexpr int L = kElements<T>;
  using V = BitsVector<T>;
  Bits<T> bits;
  __builtin_memcpy(&bits, &otherwise, sizeof(bits));
  const V other = bits - V{};
  const auto vector = [&](int64_t i, int j) __attribute__((always_inline)) {
    V v;
    __builtin_memcpy(&v, from + i, sizeof(v));
    v = choose<T>(mask + i, v, other);
    __builtin_memcpy(to + i, &v, sizeof(v));
    if (kFetch) prefetch(from + i, kReadAhead);
    if (kFetchMask && j == 0) prefetch(mask + i, kReadAhead);
    seen(v, j);
  };
  int64_t i = 0;
  for (; i + kSelected * L <= n; i += kSelected * L) {
    for (int j = 0; j < kSelected; ++j) vector(i + j * L, j);
  }
  for (; i + L <= n; i += L) vector(i, 0);
  // The last vector overlaps the one before it.
  if (i < n && n >= L) return vector(n - L, 1);
  for (; i < n; ++i) {
    to[i] = mask[i] ? from[i] : otherwise;
    __builtin_memcpy(&bits, &to[i], sizeof(bits));
    seen(bits - V{}, 0);
  }
}

// Whether rows of a mask that has one byte for each of them are all set, or none.
KPFUSED_INLINE bool rows_are(bool set, const Counting& counting, int64_t row, int64_t rows) {
  if (!counting.by_rows()) return false;
  if (counting.stride_y == 0) rows = at_most(rows, 1);
  const uint8_t* const mask = counting.mask + row * counting.stride_y;
  for (int64_t r = 0; r < rows; ++r) {
    if ((mask[r * counting.stride_y] != 0) != set) return false;
  }
  return true;
}

KPFUSED_INLINE bool all_bits_set(const Counting& counting, const PixelRange& range) {
  const int64_t first = counting.bit + range.col, bytes = range.cols / 8;
  if (first % 8 != 0 || range.cols % 8 != 0) return false;
  const uint8_t* bits = counting.mask + range.row * counting.stride_y + first / 8;
  for (int64_t r = 0; r < range.rows; ++r, bits += counting.stride_y) {
    uint64_t common = ~uint64_t(0);
    int64_t i = 0;
    for (uint64_t word; i + 8 <= bytes; i += 8, common &= word) __builtin_memcpy(&word, bits + i, sizeof(word));
    for (; i < bytes; ++i) common &= ~uint64_t(0xff) | bits[i];
    if (~common != 0) return false;
  }
  return true;
}

// Whether all of a range of a mask is set, as most of one is beside its edges. Of bytes that are not as torch writes them,
// and of narrow ranges, it may say no.
KPFUSED_INLINE bool all_set(const Counting& counting, const PixelRange& range) {
  if (rows_are(true, counting, range.row, range.rows)) return true;
  if (counting.in_bits()) return all_bits_set(counting, range);
  typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
  constexpr uint64_t kSet = 0x0101010101010101u;
  if (counting.stride_x != 1 || range.cols < kVectorBytes) return false;
  const uint8_t* mask = counting.mask + range.row * counting.stride_y + range.col;
  for (int64_t r = 0; r < range.rows; ++r, mask += counting.stride_y) {
    Words common;
    __builtin_memcpy(&common, mask + range.cols - kVectorBytes, sizeof(common));
    for (int64_t i = 0; i + kVectorBytes <= range.cols; i += kVectorBytes) {
      Words bytes;
      __builtin_memcpy(&bytes, mask + i, sizeof(bytes));
      common &= bytes;
    }
    for (int i = 0; i < kVectorBytes / 8; ++i) {
      if (common[i] != kSet) return false;
    }
  }
  return true;
}

// Whether rows of `cols` from (row, col) on are one long row, of the map and of its mask.
KPFUSED_INLINE bool is_one_row(const Counting& counting, int64_t stride_y, int64_t rows, int64_t cols, int64_t row,
                               int64_t col) {
  const bool follow = counting.in_bits() ? counting.stride_y * 8 == cols : counting.stride_x == 1 && counting.stride_y == cols;
  return counting.mask && follow && stride_y == cols && row + rows <= counting.rows && col + cols <= counting.cols;
}

// `to` gets the n elements from (row, col) on of which the mask is set, and `otherwise` in place of the others.
template <class T>
KPFUSED_INLINE void copy_masked(const T* from, T* to, int64_t n, T otherwise, const Counting& counting, int64_t row,
                                int64_t col) {
  const auto unseen = [](const auto&, int) {};
  constexpr int64_t kBytes = 64;
  uint8_t bytes[kBytes + kMaskRoom];
  const auto mask_at = [&](int64_t first, int64_t count) { return mask_bytes(counting, row, col + first, count, bytes); };
  if (counting.stride_x == 1) return select<true, true>(mask_at(0, n), from, to, n, otherwise, unseen);
  for (int64_t first = 0; first < n; first += kBytes) {
    const int64_t count = at_most(kBytes, n - first);
    const uint8_t* const mask = mask_at(first, count);
    select<true, false>(mask, from + first, to + first, count, otherwise, unseen);
  }
}

// `to` gets the n elements of a row from (row, col) on that count, and `otherwise` in place of the others. `from` and
// `to` may be the same.
template <class T>
KPFUSED_INLINE void copy_counting(const T* from, T* to, int64_t n, T otherwise, const Counting& counting, int64_t row,
                                  int64_t col) {
  const int64_t valid = row < counting.rows ? at_most(at_least(counting.cols - col, 0), n) : 0;
  if (counting.mask && !counting.by_rows()) {
    copy_masked(from, to, valid, otherwise, counting, row, col);
  } else {
    if (rows_are(false, counting, row, 1)) return fill_row(to, n, otherwise);
    if (from != to) copy_row(from, to, valid);
  }
  fill_row(to + valid, n - valid, otherwise);
}

// Likewise for rows; those of `to` are dense.
template <class T>
KPFUSED_INLINE void copy_counting_rows(const T* from, int64_t stride_y, int64_t rows, int64_t cols, T* to, T otherwise,
                                       const Counting& counting, int64_t row, int64_t col) {
  if (is_one_row(counting, stride_y, rows, cols, row, col)) {
    return copy_masked(from, to, rows * cols, otherwise, counting, row, col);
  }
  for (int64_t r = 0; r < rows; ++r) {
    copy_counting(from + r * stride_y, to + r * cols, cols, otherwise, counting, row + r, col);
  }
}

// Likewise of a mask whose columns are side by side; returns the greatest key.
template <class A>
KPFUSED_INLINE A copy_counting_with_peak(const A* from, int64_t stride_y, int64_t rows, int64_t cols, A* to, A otherwise,
                                         const Counting& counting, int64_t row, int64_t col) {
  // What has no weight is infinite, and its sign the opposite of that of beta.
  const BitsVector<A> flip = ~(BitsVector<A>)splat(otherwise) & (BitsVector<A>)splat(A(-0.0));
  Vec<A> peak[kSelected];
  for (int j = 0; j < kSelected; ++j) peak[j] = splat(Limits<A>::lowest);
  const auto seen = [&](const BitsVector<A>& v, int j) __attribute__((always_inline)) {
    peak[j] = maximum((Vec<A>)(v ^ flip), peak[j]);
  };
  const uint8_t* mask = counting.mask + row * counting.stride_y + col;
  int64_t valid = at_most(at_least(counting.cols - col, 0), cols);
  if (is_one_row(counting, stride_y, rows, cols, row, col)) valid = cols *= rows, rows = 1;
  for (int64_t r = 0; r < rows; ++r, from += stride_y, to += cols, mask += counting.stride_y) {
    select<false, false>(mask, from, to, valid, otherwise, seen);
    fill_row(to + valid, cols - valid, otherwise);
  }
  for (int j = 1; j < kSelected; ++j) peak[0] = maximum(peak[j], peak[0]);
  return reduce_max<A>(peak[0]);
}

}  // namespace kpfused::cpu::KPFUSED_ISA
