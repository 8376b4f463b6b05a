// SPDX-License-Identifier: MIT
// Which pixels do not count, as bits: a word for each lane and as many pixels of a row, or of several short rows, as it has
// bits. The words of all lanes are side by side as the lanes are, so that one test of a pixel's bit gives the lanes that
// count. Where several pixels stand abreast in the lanes (lanes.h), read "group of pixels" for pixel.
#pragma once

#include "counting.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Channels of a map whose pixels may stand abreast.
constexpr int64_t kAbreastChannels = 32;

// Whether all channels of a pixel count, or none.
KPFUSED_INLINE bool one_mask(const PixelView& pixels) { return !pixels.mask || pixels.mask_view.stride_inner == 0; }
KPFUSED_INLINE bool one_size(const PixelView& pixels, const MapView& view) {
  return !pixels.sizes || pixels.modulus == 1 || pixels.divisor % view.inner == 0;
}

// Bits of a word: ones where pixels do not count.
template <class A>
constexpr int kBits = 8 * int(sizeof(A));
template <class A>
KPFUSED_INLINE int64_t words_of(int64_t cols) {
  return ceil_div(cols, kBits<A>);
}

// The lowest `count` bits.
template <class A>
KPFUSED_INLINE Bits<A> low_bits(int64_t count) {
  return count >= kBits<A> ? ~Bits<A>(0) : Bits<A>((Bits<A>(1) << at_least(count, 0)) - 1);
}

// One pixel in the words of all lanes.
template <class A>
struct PixelBit {
  const Bits<A>* words;
  BitsVector<A> bit;

  PixelBit() = default;
  KPFUSED_INLINE PixelBit(const Bits<A>* of_row, int64_t lanes, int64_t col)
      : words(of_row + col / kBits<A> * lanes), bit((BitsVector<A>{} + 1) << Bits<A>(col % kBits<A>)) {}

  // v, or `otherwise` in the lanes, from `lane` on, that do not count.
  KPFUSED_INLINE Vec<A> choose(int64_t lane, Vec<A> v, Vec<A> otherwise) const {
    BitsVector<A> of_lanes;
    __builtin_memcpy(&of_lanes, words + lane, sizeof(of_lanes));
#if KPFUSED_AVX512  // one instruction, whose result others take along
    if constexpr (sizeof(A) == 4) {
      const __mmask16 counts = _mm512_testn_epi32_mask((__m512i)of_lanes, (__m512i)bit);
      return (Vec<A>)_mm512_mask_mov_ps((__m512)otherwise, counts, (__m512)v);
    }
#endif
    return (of_lanes & bit) != 0 ? otherwise : v;
  }
};

// Ones for each byte that is zero, of as many as a word has bits.
template <class A>
KPFUSED_INLINE Bits<A> word_of(const uint8_t* p) {
  Bits<A> bits = zero_bytes(p);
  if constexpr (kBits<A> == 64) bits |= Bits<A>(zero_bytes(p + 32)) << 32;
  return bits;
}

// Words that a chunk may need: lane_chunks() sees to it that no chunk needs more.
constexpr int64_t kExcludedWords = 16384;

// The words of a chunk's rows; null if all count. Short rows share a word.
template <class A>
struct ExcludedRows {
  const Bits<A>* words;
  int64_t stride;
  int log2_rows;  // of a word
  int64_t groups;

  KPFUSED_INLINE const Bits<A>* row(int64_t r) const { return words + (r >> log2_rows) * stride; }
  KPFUSED_INLINE int64_t first_bit(int64_t r) const { return (r & ((int64_t(1) << log2_rows) - 1)) * groups; }
};

// Which pixels of a chunk do not count, for each channel of a block: the words of all lanes side by side. `abreast` as in
// pixels_abreast(): a lane is a channel of one of the pixels of a group.
template <class A>
class Excluded {
 public:
  using Word = Bits<A>;

  Excluded(const PixelView& pixels, const MapView& view, int64_t first_map, int64_t count, int64_t abreast = 1)
      : channels_(count), abreast_(abreast), same_size_(one_size(pixels, view)), between_(pixels.mask_view.stride_inner) {
    for (int64_t k = 0; k < count; ++k) each_[k] = counting_of(pixels, view, first_map + k);
  }

  // Words of the next lane follow, those of the next groups of a row are `to_next` words further.
  ExcludedRows<A> of(const PixelRange& range, int64_t to_next) {
    const int64_t groups = range.cols / abreast_, words = words_of<A>(groups);
    // Without a mask and within the one size there is, rows are alike.
    const bool alike = !each_[0].mask && same_size_ && range.row + range.rows <= each_[0].rows;
    int log2_rows = 0;
    while (abreast_ > 1 && !alike && groups << (log2_rows + 1) <= kBits<A>) ++log2_rows;
    const int64_t rows = alike ? 1 : range.rows, at_once = int64_t(1) << log2_rows;
    ahead_ = range.rows * each_[0].stride_y;
    Word any = 0;
    for (int64_t r = 0; r < rows; r += at_once) {
      const PixelRange some = {range.row + r, at_most(at_once, rows - r), range.col, range.cols};
      Word* const to = words_ + (r >> log2_rows) * words * to_next;
      if (each_[0].mask) {
        masked(some, to_next, to);
      } else {
        __builtin_memset(to, 0, words * to_next * sizeof(Word));
      }
      if (some.row + some.rows > each_[0].rows || range.col + range.cols > each_[0].cols || !same_size_) {
        invalid(some, to_next, to);
      }
      for (int64_t w = 0; w < words; ++w) {
        for (int64_t k = 0; k < abreast_ * channels_; ++k) any |= to[w * to_next + k];
      }
    }
    return {any ? words_ : nullptr, alike ? 0 : words * to_next, log2_rows, groups};
  }

 private:
  static constexpr int kByteVector = 16;

  // Rows of one word, or one row of several words; so too below.
  void invalid(const PixelRange& range, int64_t to_next, Word* to) const {
    const int64_t groups = range.cols / abreast_;
    for (int64_t k = 0; k < channels_; ++k) {
      for (int64_t r = 0; r < range.rows; ++r) {
        const int64_t valid = range.row + r < each_[k].rows ? at_least(each_[k].cols - range.col, 0) : 0;
        const int64_t whole = valid / abreast_, rest = valid % abreast_;
        for (int64_t a = 0; a < abreast_; ++a) {
          const int64_t valid_groups = whole + (a < rest);
          for (int64_t g = 0; g < groups; g += kBits<A>) {
            const Word bits = low_bits<A>(groups - g) & ~low_bits<A>(valid_groups - g);
            to[g / kBits<A> * to_next + a * channels_ + k] |= bits << (r * groups);
          }
        }
      }
    }
  }

  KPFUSED_INLINE void masked(const PixelRange& range, int64_t to_next, Word* to) const {
    const Counting& first = each_[0];
    const uint8_t* const mask = first.mask + range.row * first.stride_y + range.col * first.stride_x;
    const int64_t groups = range.cols / abreast_, lanes = abreast_ * channels_;
    if (first.stride_x == 1) {
      switch (abreast_) {
        case 1: return planes(mask, groups, to_next, to);
        case 2: return planes_abreast<2>(mask, range.rows, groups, to_next, to);
        case 4: return planes_abreast<4>(mask, range.rows, groups, to_next, to);
        case 8: return planes_abreast<8>(mask, range.rows, groups, to_next, to);
        case 16: return planes_abreast<16>(mask, range.rows, groups, to_next, to);
      }
    }
    const bool in_line = between_ == 1 && (abreast_ == 1 || first.stride_x == channels_);
    if (in_line && lanes >= kByteVector) {
      return side_by_side(mask, first.stride_x * abreast_, range.rows, groups, lanes, to_next, to);
    }
    __builtin_memset(to, 0, words_of<A>(groups) * to_next * sizeof(Word));
    for (int64_t r = 0; r < range.rows; ++r) {
      for (int64_t c = 0; c < range.cols; ++c) {
        const int64_t group = c / abreast_;
        Word* const words = to + group / kBits<A> * to_next + c % abreast_ * channels_;
        const uint8_t* const pixel = mask + r * first.stride_y + c * first.stride_x;
        for (int64_t k = 0; k < channels_; ++k) {
          words[k] |= Word(pixel[k * between_] == 0) << (group % kBits<A> + r * groups);
        }
      }
    }
  }

  // One channel after the other, or one for all.
  template <int kPixels>
  KPFUSED_INLINE void planes_abreast(const uint8_t* mask, int64_t rows, int64_t groups, int64_t to_next, Word* to) const {
    static_assert(kPixels <= kByteVector);
    const int64_t channels = channels_, planes = between_ == 0 ? 1 : channels;
    for (int64_t g = 0; g < groups; g += kBits<A>, to += to_next) {
      const int64_t count = at_most(kBits<A>, groups - g);
      const auto row = [&](int64_t k, int64_t r) { return mask + k * between_ + r * each_[0].stride_y + g * kPixels; };
      const auto put = [&](const Word (&words)[kPixels], int64_t k) __attribute__((always_inline)) {
        Word* each = to + k;
        if (planes > 1) {
          for (int a = 0; a < kPixels; ++a, each += channels) *each = words[a];
          return;
        }
        // One word for all channels, whole vectors of it: what is written beyond them is still to come.
        for (int a = 0; a < kPixels; ++a, each += channels) {
          const BitsVector<A> word = words[a] - BitsVector<A>{};
          for (int64_t c = 0; c < channels; c += kLanes<A>) __builtin_memcpy(each + c, &word, sizeof(word));
        }
      };
      // Of all planes before the first is turned: what has just been written in parts is slow to read as a whole.
      constexpr bool kTurns = kTurnsBits<kPixels>;
      alignas(64) uint8_t bits[kTurns ? kAbreastChannels : 1][kBits<A> * kPixels / 8];
      for (int64_t k = 0; kTurns && k < planes; ++k) {
        __builtin_memset(bits[k], 0, sizeof(bits[k]));
        for (int64_t r = 0; r < rows; ++r) pack_bits(row(k, r), count * kPixels, bits[k] + r * groups * kPixels / 8);
      }
      for (int64_t k = 0; k < planes; ++k) {
        Word words[kPixels] = {};
        if constexpr (kTurns) {
          turn_bits<kPixels>(bits[k], words);
        } else {
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < count * kPixels; i += 64) prefetch(row(k, r) + i, ahead_);
            add_bytes<kPixels>(row(k, r), kPixels, count, int(r * groups), words);
          }
        }
        put(words, k);
      }
    }
  }

  // A bit for each of `count` bytes, a multiple of eight, that is zero. Fetches ahead.
  KPFUSED_INLINE void pack_bits(const uint8_t* from, int64_t count, uint8_t* to) const {
    const int64_t ahead = ahead_;
    const auto pack = [&] {
      const uint32_t bits = zero_bytes(from);
      __builtin_memcpy(to, &bits, sizeof(bits));
      from += 32, to += 4, count -= 32;
    };
    while (count >= 64) prefetch(from, ahead), pack(), pack();
    prefetch(from, ahead);
    if (count >= 32) pack();
    for (; count > 0; count -= 8, from += 8) {
      uint64_t bytes;
      __builtin_memcpy(&bytes, from, sizeof(bytes));
      bytes |= bytes >> 4, bytes |= bytes >> 2, bytes |= bytes >> 1;
      *to++ = uint8_t(~((bytes & 0x0101010101010101u) * 0x0102040810204080u >> 56));
    }
  }

  // Whether groups of as many pixels are the lanes of a vector of their bits.
  template <int kPixels>
  static constexpr bool kTurnsBits = KPFUSED_AVX512 ? kPixels == 8 || (kPixels == 16 && kBits<A> == 32)
                                                    : KPFUSED_AVX2 && kPixels == 8 && kBits<A> == 32;

  // From a bit for each pixel of a group to a word for each pixel, with a bit for each group.
  template <int kPixels>
  static KPFUSED_INLINE void turn_bits(const uint8_t* bits, Word (&words)[kPixels]) {
#if KPFUSED_AVX512  // the highest bit of all groups, and then the next
    if constexpr (kPixels == 16) {
      __m512i v = _mm512_loadu_si512(bits);
      for (int a = 15; a >= 0; --a, v = _mm512_add_epi16(v, v)) words[a] = Word(_mm512_movepi16_mask(v));
    } else if constexpr (kBits<A> == 64) {
      __m512i v = _mm512_loadu_si512(bits);
      for (int a = 7; a >= 0; --a, v = _mm512_add_epi8(v, v)) words[a] = Word(_mm512_movepi8_mask(v));
    } else {
      __m256i v = _mm256_loadu_si256((const __m256i*)bits);
      for (int a = 7; a >= 0; --a, v = _mm256_add_epi8(v, v)) words[a] = Word(_mm256_movepi8_mask(v));
    }
#elif KPFUSED_AVX2
    __m256i v = _mm256_loadu_si256((const __m256i*)bits);
    for (int a = 7; a >= 0; --a, v = _mm256_add_epi8(v, v)) words[a] = Word(uint32_t(_mm256_movemask_epi8(v)));
#endif
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

  // A byte of each lane, `stride` bytes from one group to the next; a line of them at a time.
  KPFUSED_INLINE void side_by_side(const uint8_t* mask, int64_t stride, int64_t rows, int64_t groups, int64_t lanes,
                                   int64_t to_next, Word* to) const {
    for (int64_t g = 0; g < groups; g += kBits<A>, to += to_next) {
      const int64_t count = at_most(kBits<A>, groups - g);
      const uint8_t* const from = mask + g * stride;
      int64_t k = 0;
      for (; k + 4 * kByteVector <= lanes; k += 4 * kByteVector) add_lines<4>(from + k, stride, rows, groups, count, to + k);
      for (; k < lanes; k += kByteVector) {
        const int64_t lane = at_most(k, lanes - kByteVector);
        add_lines<1>(from + lane, stride, rows, groups, count, to + lane);
      }
    }
  }

  template <int kVectors>
  KPFUSED_INLINE void add_lines(const uint8_t* mask, int64_t stride, int64_t rows, int64_t groups, int64_t count,
                                Word* to) const {
    Word words[kVectors][kByteVector] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* const from = mask + r * each_[0].stride_y;
      for (int64_t i = 0; i < count; ++i) prefetch(from + i * stride, ahead_);
      for (int j = 0; j < kVectors; ++j) {
        add_bytes<kByteVector>(from + j * kByteVector, stride, count, int(r * groups), words[j]);
      }
    }
    __builtin_memcpy(to, words, sizeof(words));
  }

  // Adds bits from `bit` on to the words of kBytes lanes side by side, one for each of `count` groups.
  template <int kBytes>
  static KPFUSED_INLINE void add_bytes(const uint8_t* from, int64_t stride, int64_t count, int bit, Word (&words)[kBytes]) {
#if KPFUSED_AVX512  // from bytes to mask registers
    if constexpr (kBytes == 16 && sizeof(Word) == 4) {
      __m512i all = _mm512_loadu_si512(words), one = _mm512_set1_epi32(1 << bit);
      for (int64_t i = 0; i < count; ++i, one = _mm512_add_epi32(one, one)) {
        const __m128i bytes = _mm_loadu_si128((const __m128i*)(from + i * stride));
        all = _mm512_mask_or_epi32(all, _mm_testn_epi8_mask(bytes, bytes), all, one);
      }
      _mm512_storeu_si512(words, all);
      return;
    }
#endif
    // Eight groups at a time, as a byte has room for.
    typedef uint8_t Bytes __attribute__((vector_size(kBytes)));
    for (int64_t first = 0; first < count; first += 8) {
      Bytes bits = {}, one = Bytes{} + 1;
      const auto groups = [&](int64_t some) __attribute__((always_inline)) {
        for (int64_t i = 0; i < some; ++i, one += one) {
          Bytes bytes;
          __builtin_memcpy(&bytes, from + (first + i) * stride, sizeof(bytes));
          bits |= (Bytes)(bytes == 0) & one;
        }
      };
      first + 8 <= count ? groups(8) : groups(count - first);
      uint8_t each[kBytes];
      __builtin_memcpy(each, &bits, sizeof(each));
      for (int i = 0; i < kBytes; ++i) words[i] |= Word(each[i]) << (first + bit);
    }
  }

  int64_t channels_, abreast_;
  bool same_size_;
  int64_t between_;  // the masks of two channels
  int64_t ahead_;    // from the masks of this chunk to those of the next
  Counting each_[2 * kChannelBlock];
  Word words_[kExcludedWords + kLanes<A>];  // with room for the last vector
};

}  // namespace kpfused::cpu::KPFUSED_ISA
