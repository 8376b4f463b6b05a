// SPDX-License-Identifier: MIT
// What forward and backward share where lanes are channels.
#pragma once

#include "counting.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Channels of a map whose pixels may stand abreast.
constexpr int64_t kAbreastChannels = 32;

// How many pixels of a row stand abreast in the lanes: a power of two of them, such that lane a * channels + c is channel c
// of pixel a of a group, as they lie in memory. So channels fill vectors whatever their number. One where there is
// nothing to gain, or rows are no whole groups.
template <class A>
KPFUSED_INLINE int64_t pixels_abreast(const MapView& view, const Tiling& parts) {
  constexpr int64_t L = kLanes<A>;
  const int64_t channels = view.inner, vectors = ceil_div(channels, L);
  if (channels > kAbreastChannels || view.stride_x != channels || parts.x.count > 1) return 1;
  for (int64_t n = L; n > 1; n /= 2) {
    if (view.width % n != 0 || n * channels < L || view.width * view.height < 8 * n) continue;
    // What is done at the end of a chunk has to be won back.
    if (channels < L || 8 * ceil_div(n * channels, L) <= 7 * n * vectors) return n;
  }
  return 1;
}

// Vectors that hold the lanes of one work item.
template <class A>
constexpr int kGroups = int(at_least(2 * kChannelBlock / kLanes<A>, kAbreastChannels));

// First lane of a group.
template <class A>
KPFUSED_INLINE int64_t group_begin(int64_t group, int64_t lanes) {
  return at_most(group * kLanes<A>, lanes - kLanes<A>);
}

// The lanes of all groups one after the other, for what is done between channels and the pixels that stand abreast.
template <class A>
struct LaneRow {
  static constexpr int64_t L = kLanes<A>;
  A values[(kGroups<A> + 1) * L];

  KPFUSED_INLINE void set(int64_t group, int64_t lanes, Vec<A> v) { store_vector(values + group_begin<A>(group, lanes), v); }
  KPFUSED_INLINE Vec<A> get(int64_t group, int64_t lanes) const { return load_vector(values + group_begin<A>(group, lanes)); }

  // Gives all pixels what their channel has. What is written beyond one is overwritten by the next.
  KPFUSED_INLINE void spread(int64_t abreast, int64_t channels) {
    Vec<A> from[kAbreastChannels / L + 1];  // not read where it has just been written, which would have to be waited for
    const int64_t vectors = ceil_div(channels, L);
    for (int64_t i = 0; i < vectors; ++i) from[i] = load_vector(values + i * L);
    for (int64_t a = 1; a < abreast; ++a) {
      for (int64_t i = 0; i < vectors; ++i) store_vector(values + a * channels + i * L, from[i]);
    }
  }
};

// Leaves op over the pixels abreast in each channel, of several rows side by side: each step waits for the one before. The
// last vector of a half takes lanes along that were used already.
template <class A, int N, class Op>
KPFUSED_INLINE void fold(LaneRow<A> (&rows)[N], int64_t abreast, int64_t channels, const Op& op) {
  constexpr int64_t L = kLanes<A>;
  for (int64_t pixels = abreast / 2; pixels > 0; pixels /= 2) {
    const int64_t half = pixels * channels;
    for (int64_t i = 0; i < half; i += L) {
      for (LaneRow<A>& row : rows) {
        store_vector(row.values + i, op(load_vector(row.values + i), load_vector(row.values + half + i)));
      }
    }
  }
}

// Vectors of channels that a chunk is read for at once.
constexpr int kLaneVectors = 4;

// What counts among the pixels of a chunk.
enum class Counts {
  all,
  listed,    // the same for all channels: a list of columns
  by_bits,   // for each channel by itself: a bit
};

// Whether all channels of a pixel count, or none. Kernels then read none that does not count.
KPFUSED_INLINE bool one_mask(const PixelView& pixels) { return !pixels.mask || pixels.mask_view.stride_inner == 0; }
KPFUSED_INLINE bool one_size(const PixelView& pixels, const MapView& view) {
  return !pixels.sizes || pixels.modulus == 1 || pixels.divisor % view.inner == 0;
}
KPFUSED_INLINE Counts counts_of(const PixelView& pixels, const MapView& view) {
  if (!one_mask(pixels) || !one_size(pixels, view)) return Counts::by_bits;
  return pixels.mask ? Counts::listed : Counts::all;
}

// Pixels that a list has room for.
constexpr int64_t kListed = 2048;

// Channels of a block as a buffer holds them: at least a vector.
template <class A>
KPFUSED_INLINE int64_t padded_channels(int64_t channels) {
  return at_least(channels, kLanes<A>);
}

// Pixels that a buffer takes.
template <class T>
KPFUSED_INLINE Tiling buffer_chunks(int64_t rows, int64_t cols, int64_t channels) {
  return tile(rows, cols, kGatherBytes / (padded_channels<Acc<T>>(channels) * int64_t(sizeof(T))), 1);
}

// The columns that count, row after row: those of row r are columns[begins[r]] .. columns[begins[r + 1]].
struct ColumnList {
  uint16_t columns[kListed];
  uint32_t begins[kListed + 1];

  // From one mask; without branches, which noise in it would mislead.
  void fill(const Counting& counting, const PixelRange& range) {
    uint32_t n = 0;
    begins[0] = 0;
    for (int64_t r = 0; r < range.rows; ++r) {
      const uint8_t* const mask = counting.mask + (range.row + r) * counting.stride_y + range.col * counting.stride_x;
      for (int64_t c = 0; c < range.cols; ++c) columns[n] = uint16_t(c), n += mask[c * counting.stride_x] != 0;
      begins[r + 1] = n;
    }
  }
};

// Words of bits, each for one channel and as many pixels of a row as it has bits: ones where they do not count.
template <class A>
constexpr int kBits = 8 * int(sizeof(A));
template <class A>
KPFUSED_INLINE int64_t words_of(int64_t cols) {
  return ceil_div(cols, kBits<A>);
}

// Bytes of a chunk whose pixels stand abreast: what is done at the end of one is work for all its lanes.
constexpr int64_t kAbreastBytes = 8 * kChunkBytes;

// Chunks of groups of pixels, each with all lanes. Where pixels do not stand abreast, kChunkBytes are read twice in a row: those
// of a few vectors.
template <class T>
KPFUSED_INLINE Tiling lane_chunks(Counts counts, int64_t rows, int64_t cols, int64_t lanes, int64_t abreast = 1) {
  const int64_t at_once = at_most(lanes, kLaneVectors * kLanes<Acc<T>>);
  int64_t groups = (abreast == 1 ? kChunkBytes / at_once : kAbreastBytes / lanes) / int64_t(sizeof(T));
  if (counts == Counts::listed) groups = at_most(groups, kListed);
  if (counts == Counts::by_bits) groups = at_most(groups, at_least(kGatherBytes / (lanes * words_of<Acc<T>>(cols)), 1) * cols);
  return tile(rows, cols, groups, 1);
}

// The lowest `count` bits.
template <class A>
KPFUSED_INLINE Bits<A> low_bits(int64_t count) {
  return count >= kBits<A> ? ~Bits<A>(0) : Bits<A>((Bits<A>(1) << at_least(count, 0)) - 1);
}

// One pixel in the words of all channels.
template <class A>
struct PixelBit {
  const Bits<A>* words;
  BitsVector<A> bit;

  PixelBit() = default;
  KPFUSED_INLINE PixelBit(const Bits<A>* of_row, int64_t channels, int64_t col)
      : words(of_row + col / kBits<A> * channels), bit((BitsVector<A>{} + 1) << Bits<A>(col % kBits<A>)) {}

  // v, or `otherwise` in the lanes whose channel does not count.
  KPFUSED_INLINE Vec<A> choose(int64_t channel, Vec<A> v, Vec<A> otherwise) const {
    BitsVector<A> of_lanes;
    __builtin_memcpy(&of_lanes, words + channel, sizeof(of_lanes));
#if KPFUSED_AVX512  // one instruction, whose result others take along
    if constexpr (sizeof(A) == 4) {
      const __mmask16 counts = _mm512_testn_epi32_mask((__m512i)of_lanes, (__m512i)bit);
      return (Vec<A>)_mm512_mask_mov_ps((__m512)otherwise, counts, (__m512)v);
    }
#endif
    return (of_lanes & bit) != 0 ? otherwise : v;
  }
};

// Ones for each byte that is zero, of 32.
KPFUSED_INLINE uint32_t zero_bytes(const uint8_t* p) {
#if KPFUSED_AVX512
  const __m256i bytes = _mm256_loadu_si256((const __m256i*)p);
  return _mm256_testn_epi8_mask(bytes, bytes);
#elif KPFUSED_AVX2
  const __m256i bytes = _mm256_loadu_si256((const __m256i*)p);
  return uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256())));
#elif KPFUSED_SSE2
  const __m128i low = _mm_loadu_si128((const __m128i*)p), high = _mm_loadu_si128((const __m128i*)(p + 16));
  const __m128i zero = _mm_setzero_si128();
  return uint32_t(_mm_movemask_epi8(_mm_cmpeq_epi8(low, zero))) |
         uint32_t(_mm_movemask_epi8(_mm_cmpeq_epi8(high, zero))) << 16;
#else
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= uint32_t(p[i] == 0) << i;
  return bits;
#endif
}

// The same of as many bytes as a word has bits.
template <class A>
KPFUSED_INLINE Bits<A> word_of(const uint8_t* p) {
  Bits<A> bits = zero_bytes(p);
  if constexpr (kBits<A> == 64) bits |= Bits<A>(zero_bytes(p + 32)) << 32;
  return bits;
}

// The words of a chunk's rows; null if all count.
template <class A>
struct ExcludedRows {
  const Bits<A>* words;
  int64_t stride;

  KPFUSED_INLINE const Bits<A>* row(int64_t r) const { return words + r * stride; }
};

// Which pixels of a chunk do not count, for each channel of a block: the words of all lanes side by side.
template <class A>
class Excluded {
 public:
  using Word = Bits<A>;

  Excluded(const PixelView& pixels, const MapView& view, int64_t first_map, int64_t count, int64_t abreast = 1)
      : channels_(count), abreast_(abreast), same_size_(one_size(pixels, view)), between_(pixels.mask_view.stride_inner) {
    for (int64_t k = 0; k < count; ++k) each_[k] = counting_of(pixels, view, first_map + k);
  }

  // Words of the next lane of a row follow, those of the next groups are `to_next` words further.
  ExcludedRows<A> of(const PixelRange& range, int64_t to_next) {
    const int64_t words = words_of<A>(range.cols / abreast_);
    // Without a mask and within the one size there is, rows are alike.
    const bool alike = !each_[0].mask && same_size_ && range.row + range.rows <= each_[0].rows;
    Word any = 0;
    for (int64_t r = 0; r < (alike ? 1 : range.rows); ++r) {
      const int64_t row = range.row + r;
      Word* const to = words_ + r * words * to_next;
      if (each_[0].mask) {
        masked(each_[0].mask + row * each_[0].stride_y + range.col * each_[0].stride_x, range.cols / abreast_, to_next, to);
      } else {
        __builtin_memset(to, 0, words * to_next * sizeof(Word));
      }
      if (row >= each_[0].rows || range.col + range.cols > each_[0].cols || !same_size_) invalid(row, range, to_next, to);
      for (int64_t w = 0; w < words; ++w) {
        for (int64_t k = 0; k < abreast_ * channels_; ++k) any |= to[w * to_next + k];
      }
    }
    return {any ? words_ : nullptr, alike ? 0 : words * to_next};
  }

 private:
  static constexpr int kByteVector = 16;
  static constexpr int kRowsAhead = 2;

  void invalid(int64_t row, const PixelRange& range, int64_t to_next, Word* to) const {
    const int64_t groups = range.cols / abreast_;
    for (int64_t k = 0; k < channels_; ++k) {
      const int64_t valid = row < each_[k].rows ? at_least(each_[k].cols - range.col, 0) : 0;
      const int64_t whole = valid / abreast_, rest = valid % abreast_;
      for (int64_t a = 0; a < abreast_; ++a) {
        const int64_t valid_groups = whole + (a < rest);
        for (int64_t g = 0; g < groups; g += kBits<A>) {
          to[g / kBits<A> * to_next + a * channels_ + k] |= low_bits<A>(groups - g) & ~low_bits<A>(valid_groups - g);
        }
      }
    }
  }

  // One row.
  KPFUSED_INLINE void masked(const uint8_t* mask, int64_t groups, int64_t to_next, Word* to) const {
    const int64_t stride_x = each_[0].stride_x, lanes = abreast_ * channels_;
    if (stride_x == 1 && abreast_ == 1) return planes(mask, groups, to_next, to);
    if (stride_x == 1) {
      switch (abreast_) {
        case 2: return planes_abreast<2>(mask, groups, to_next, to);
        case 4: return planes_abreast<4>(mask, groups, to_next, to);
        case 8: return planes_abreast<8>(mask, groups, to_next, to);
        case 16: return planes_abreast<16>(mask, groups, to_next, to);
      }
    }
    const bool in_line = between_ == 1 && (abreast_ == 1 || stride_x == channels_);
    if (in_line && lanes >= kByteVector) return side_by_side(mask, stride_x * abreast_, groups, lanes, to_next, to);
    __builtin_memset(to, 0, words_of<A>(groups) * to_next * sizeof(Word));
    for (int64_t c = 0; c < groups * abreast_; ++c) {
      const int64_t group = c / abreast_;
      Word* const words = to + group / kBits<A> * to_next + c % abreast_ * channels_;
      for (int64_t k = 0; k < channels_; ++k) {
        words[k] |= Word(mask[k * between_ + c * stride_x] == 0) << (group % kBits<A>);
      }
    }
  }

  // One channel after the other, or one for all.
  template <int kPixels>
  KPFUSED_INLINE void planes_abreast(const uint8_t* mask, int64_t groups, int64_t to_next, Word* to) const {
    static_assert(kPixels <= kByteVector);
    for (int64_t k = 0; k < (between_ == 0 ? 1 : channels_); ++k) {
      for (int64_t g = 0; g < groups; g += kBits<A>) {
        Word words[kPixels];
        const uint8_t* const from = mask + k * between_ + g * kPixels;
        for (int64_t i = 0; i < at_most(kBits<A>, groups - g) * kPixels; i += 64) prefetch(from + i, kRowsAhead * each_[0].stride_y);
        words_of_bytes<kPixels>(from, kPixels, at_most(kBits<A>, groups - g), words);
        Word* const each = to + g / kBits<A> * to_next + k;
        for (int a = 0; a < kPixels; ++a) each[a * channels_] = words[a];
      }
    }
    if (between_ != 0) return;
    for (int64_t w = 0; w < words_of<A>(groups); ++w) {
      for (int64_t a = 0; a < kPixels; ++a) {
        Word* const each = to + w * to_next + a * channels_;
        for (int64_t k = 1; k < channels_; ++k) each[k] = each[0];
      }
    }
  }

  // Lines of eight channels at a time: where maps lie a power of two apart, the cache has room for no more of them.
  KPFUSED_INLINE void planes(const uint8_t* mask, int64_t cols, int64_t to_next, Word* to) const {
    const int64_t some = at_most(channels_, 8);
    for (int64_t line = 0; line < cols; line += 64) {
      for (int64_t k = 0; k < channels_; k += some) {
        const int64_t channel = at_most(k, channels_ - some);
        const int64_t next = k + some < channels_ ? at_most(k + some, channels_ - some) : 0;
        const int64_t ahead = next * between_ + (next ? line : line + 64);
        for (int64_t i = 0; i < some; ++i) prefetch(mask, ahead + i * between_);
        for (int64_t c = line; c < at_most(line + 64, cols); c += kBits<A>) {
          Word* const words = to + c / kBits<A> * to_next + channel;
          for (int64_t i = 0; i < some; ++i) words[i] = word(mask + (channel + i) * between_, c, cols);
        }
      }
    }
  }

  // Of the pixels from `col` on. The last ones of a row come with those before them, which are then shifted out.
  static KPFUSED_INLINE Word word(const uint8_t* mask, int64_t col, int64_t cols) {
    const int64_t count = cols - col;
    if (count >= kBits<A>) return word_of<A>(mask + col);
    if (cols >= kBits<A>) return word_of<A>(mask + cols - kBits<A>) >> (kBits<A> - count);
    Word bits = 0;
    for (int64_t i = 0; i < count; ++i) bits |= Word(mask[i] == 0) << i;
    return bits;
  }

  // A byte of each lane for eight groups at a time.
  KPFUSED_INLINE void side_by_side(const uint8_t* mask, int64_t stride, int64_t groups, int64_t lanes, int64_t to_next,
                                   Word* to) const {
    for (int64_t i = 0; i < groups * stride; i += 64) prefetch(mask + i, kRowsAhead * each_[0].stride_y);
    for (int64_t g = 0; g < groups; g += kBits<A>, to += to_next) {
      for (int64_t k = 0; k < lanes; k += kByteVector) {
        const int64_t lane = at_most(k, lanes - kByteVector);
        Word words[kByteVector];
        words_of_bytes<kByteVector>(mask + g * stride + lane, stride, at_most(kBits<A>, groups - g), words);
        __builtin_memcpy(to + lane, words, sizeof(words));
      }
    }
  }

  // The words of kBytes lanes side by side from their first `count` groups, no more than a word has bits.
  template <int kBytes>
  static KPFUSED_INLINE void words_of_bytes(const uint8_t* from, int64_t stride, int64_t count, Word (&words)[kBytes]) {
#if KPFUSED_AVX512  // from bytes to mask registers
    if constexpr (kBytes == 16 && sizeof(Word) == 4) {
      __m512i all = _mm512_setzero_si512(), bit = _mm512_set1_epi32(1);
      for (int64_t i = 0; i < count; ++i, from += stride, bit = _mm512_add_epi32(bit, bit)) {
        const __m128i bytes = _mm_loadu_si128((const __m128i*)from);
        all = _mm512_mask_or_epi32(all, _mm_testn_epi8_mask(bytes, bytes), all, bit);
      }
      _mm512_storeu_si512(words, all);
      return;
    }
#endif
    typedef uint8_t Bytes __attribute__((vector_size(kBytes)));
    for (int i = 0; i < kBytes; ++i) words[i] = 0;
    for (int64_t first = 0; first < count; first += 8) {
      Bytes bits = {}, bit = Bytes{} + 1;
      const auto groups = [&](int64_t some) __attribute__((always_inline)) {
        for (int64_t i = 0; i < some; ++i, from += stride, bit += bit) {
          Bytes bytes;
          __builtin_memcpy(&bytes, from, sizeof(bytes));
          bits |= (Bytes)(bytes == 0) & bit;
        }
      };
      first + 8 <= count ? groups(8) : groups(count - first);
      uint8_t each[kBytes];
      __builtin_memcpy(each, &bits, sizeof(each));
      for (int i = 0; i < kBytes; ++i) words[i] |= Word(each[i]) << first;
    }
  }

  int64_t channels_, abreast_;
  bool same_size_;
  int64_t between_;  // the masks of two channels
  Counting each_[2 * kChannelBlock];
  // A word for each pixel of each channel, for chunks of one column.
  Word words_[kGatherBytes];
};

// Copies pixels of `channels` elements each between rows of them.
template <class T>
KPFUSED_INLINE void copy_pixels(const T* from, int64_t from_y, int64_t from_x, T* to, int64_t to_y, int64_t to_x,
                                int64_t rows, int64_t cols, int64_t channels) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t k = 0; k < channels; ++k) to[r * to_y + c * to_x + k] = from[r * from_y + c * from_x + k];
    }
  }
}

}  // namespace kpfused::cpu::KPFUSED_ISA
