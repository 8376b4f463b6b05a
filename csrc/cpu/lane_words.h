// SPDX-License-Identifier: MIT
// Which pixels count where lanes are channels: a word for each vector of lanes, pixel after pixel, as kernels go through them.
// Where several pixels stand abreast in the lanes (lanes.h), read "group of pixels" for pixel.
//
// Masks come in three ways. Channels side by side are bits in the order of lanes. Of planes, one for each channel or for
// several, those of eight channels at a time give a byte of bits to each pixel, whole vectors of pixels at once, and so does
// one mask for all; bytes are then dealt to lanes.
#pragma once

#include "abreast_words.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Words that a chunk may need: lane_chunks() sees to it that no chunk needs more, and those through a buffer need fewer.
constexpr int64_t kChunkWords = 8192;

// The bytes of a mask for the next chunk: in runs, `between` bytes from the beginning of one to that of the next. Of one mask
// for all there are few, and of planes for several channels not as many: nothing is fetched.
struct MaskAhead {
  uintptr_t at;  // as a number: it may lie beyond the mask
  int64_t run, between;
};

// Goes through them in order, from byte `begin` on, `step` bytes at a time.
class MaskWalk {
 public:
  KPFUSED_INLINE MaskWalk(const MaskAhead& ahead, int64_t begin, int64_t step)
      : at_(ahead.at), run_(ahead.run), gap_(ahead.between - ahead.run), left_(0), step_(ahead.run > 0 ? step : 0) {
    if (run_ == 0) return;
    const int64_t index = begin / run_;
    at_ += uintptr_t(begin + index * gap_), left_ = (index + 1) * run_ - begin;
  }
  // How many steps, at most `count`, are in the same run; where they begin, `otherwise` where there is nothing to fetch; and
  // how far it is from one to the next.
  KPFUSED_INLINE int64_t steps(int64_t count) const { return left_ >= count * step_ ? count : ceil_div(left_, step_); }
  KPFUSED_INLINE uintptr_t at(const void* otherwise) const {
    return run_ == 0 ? reinterpret_cast<uintptr_t>(otherwise) : at_;
  }
  KPFUSED_INLINE uintptr_t step() const { return uintptr_t(step_); }

  KPFUSED_INLINE void advance(int64_t steps) {
    at_ += uintptr_t(steps * step_), left_ -= steps * step_;
    while (left_ <= 0 && run_ > 0) at_ += uintptr_t(gap_), left_ += run_;
  }

 private:
  uintptr_t at_;
  int64_t run_, gap_, left_, step_;
};

// The words of a chunk; null if all count.
template <class A>
struct ChunkWords {
  const LaneWord<A>* words;
  int64_t stride_y, stride_x;
  MaskAhead ahead;

  KPFUSED_INLINE const LaneWord<A>* at(int64_t row, int64_t pixel) const {
    return words + row * stride_y + pixel * stride_x;
  }
};

// Which pixels of a chunk count, for each channel of a block. `abreast` as in pixels_abreast(): a lane is a channel of one of
// the pixels of a group.
template <class A>
class LaneWords {
 public:
  static constexpr int L = kLanes<A>;
  using Word = LaneWord<A>;

  LaneWords(const PixelView& pixels, const MapView& view, const AbreastWords<A>& abreast_words, int64_t first_map,
          int64_t channels, int64_t abreast)
      : first_(counting_of(pixels, view, first_map)),
        channels_(channels),
        abreast_(abreast),
        lanes_(at_least(channels * abreast, L)),
        vectors_(ceil_div(lanes_, L)),
        same_size_(one_size(pixels, view)),
        between_(pixels.mask_view.even(view.inner) ? pixels.mask_view.stride_inner() : kUneven),
        abreast_words_(abreast_words) {
    const MaskView& mask = pixels.mask_view;
    const int64_t planes = pixels.mask && !is_in_order() ? channels : 0;
    for (int64_t c = 0; c < planes; ++c) {
      plane_[c] = between_ == kUneven ? mask.offset(first_map + c) - mask.offset(first_map) : c * between_;
    }
    if (!pixels.sizes) return;
    A rows[2 * kChannelBlock], cols[2 * kChannelBlock];
    for (int64_t c = 0; c < channels; ++c) {
      const Counting each = counting_of(pixels, view, first_map + c);
      rows[c] = A(each.rows), cols[c] = A(each.cols);
    }
    for_lanes<A>(channels, abreast, [&](int64_t g, int i, int64_t pixel, int64_t c) {
      rows_[g][i] = rows[c], cols_[g][i] = cols[c] - A(pixel);
    });
  }

  // Whether words would be no more than the mask's own bytes, which lie in the order of lanes.
  bool is_mask() const { return first_.mask && same_size_ && is_in_order(); }
  // From the first pixel of a range on.
  const uint8_t* mask_of(const PixelRange& range) const {
    return first_.mask + range.row * first_.stride_y + range.col * first_.stride_x;
  }

  // `next`: how many bytes of the mask further on that of the next chunk is to be fetched; zero: it is not.
  ChunkWords<A> of(const PixelRange& range, int64_t next) {
    const bool sized = !same_size_ || range.row + range.rows > first_.rows || range.col + range.cols > first_.cols;
    if (!first_.mask && !sized) return {};
    // All pixels have the words of the first, unless a size parts them.
    if (!sized && first_.by_maps()) {
      masked({range.row, 1, range.col, abreast_});
      return all_count(vectors_) ? ChunkWords<A>{} : ChunkWords<A>{words_, 0, 0, {}};
    }
    const int64_t pixels = range.cols / abreast_, words = range.rows * pixels * vectors_;
    if (first_.mask) masked(range);
    if (sized) within_size(range);
    if (all_count(words)) return {};
    return {words_, pixels * vectors_, vectors_, ahead(range, next)};
  }

 private:
  static constexpr int64_t kPiece = 256;  // pixels whose bits are found at once
  static constexpr int64_t kUneven = -1;  // masks of channels are not all equally far apart: some share theirs

  bool is_in_order() const {
    return between_ == 1 && (abreast_ == 1 || first_.stride_x == channels_) && channels_ * abreast_ == lanes_;
  }

  MaskAhead ahead(const PixelRange& range, int64_t next) const {
    if (!first_.mask || next == 0 || between_ <= 0) return {};
    const int64_t pixels = range.rows * range.cols;
    return {reinterpret_cast<uintptr_t>(mask_of(range)) + uintptr_t(next), between_ == 1 ? pixels * channels_ : pixels,
            between_};
  }

  void within_size(const PixelRange& range) {
    Word* to = words_;
    for (int64_t r = 0; r < range.rows; ++r) {
      for (int64_t c = 0; c < range.cols; c += abreast_, to += vectors_) {
        const Vec<A> row = splat(A(range.row + r)), col = splat(A(range.col + c));
        for (int64_t g = 0; g < vectors_; ++g) {
          const Word valid = lane_word<A>(lane_bits<A>((rows_[g] > row) & (cols_[g] > col)));
          to[g] = first_.mask ? to[g] & valid : valid;
        }
      }
    }
  }

  // Seldom all of them: as many as fill some vectors at a time.
  bool all_count(int64_t words) const {
    constexpr int64_t kSome = 4 * kVectorBytes / int64_t(sizeof(Word));
    for (int64_t i = 0; i < words; i += kSome) {
      Word common = Word(~Word(0));
      for (int64_t k = i; k < at_most(words, i + kSome); ++k) common &= words_[k];
      if (common != Word(~Word(0))) return false;
    }
    return true;
  }

  void masked(const PixelRange& range) {
    const uint8_t* const mask = mask_of(range);
    const int64_t pixels = range.cols / abreast_;
    if (is_in_order()) {
      for (int64_t r = 0; r < range.rows; ++r) {
        side_by_side(mask + r * first_.stride_y, pixels, words_ + r * pixels * vectors_);
      }
      return;
    }
    // Rows that follow each other, in the mask as in the words, are one.
    const bool one_row = first_.stride_y == range.cols * first_.stride_x;
    const int64_t rows = one_row ? 1 : range.rows, count = one_row ? range.rows * range.cols : range.cols;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < count; i += kPiece) {
        const uint8_t* const from = mask + r * first_.stride_y + i * first_.stride_x;
        Word* const to = words_ + (r * pixels + i / abreast_) * vectors_;
        const int64_t some = at_most(count - i, kPiece);
        abreast_ > 1 ? abreast(from, some, to) : planes(from, some, to);
      }
    }
  }

  // Words of lanes whose bytes are side by side.
  template <int kBytes>
  static KPFUSED_INLINE void set_lanes(const uint8_t* p, Word* to) {
#if KPFUSED_AVX512
    if constexpr (kBytes == 64) {
      const uint64_t set = set_bits(_mm512_loadu_si512(p));
      __builtin_memcpy(to, &set, sizeof(set));
    } else {
      const __m128i bytes = L == 16 ? _mm_loadu_si128((const __m128i*)p) : _mm_loadl_epi64((const __m128i*)p);
      *to = Word(_mm_test_epi8_mask(bytes, bytes));
    }
#else
    typedef uint8_t Bytes __attribute__((vector_size(kBytes)));
    Bytes bytes;
    __builtin_memcpy(&bytes, p, sizeof(bytes));
    bytes = (Bytes)(bytes != 0);
    __builtin_memcpy(to, &bytes, sizeof(bytes));
#endif
  }

  // Lanes as they are in memory. Whole vectors of them that follow each other are those of one long pixel.
  KPFUSED_INLINE void side_by_side(const uint8_t* mask, int64_t pixels, Word* to) const {
    constexpr int64_t kVectors = kVectorBytes / L;
    const int64_t step = first_.stride_x * abreast_;
    const bool one_run = step == lanes_ && lanes_ % L == 0;
    const int64_t count = one_run ? 1 : pixels, lanes = one_run ? pixels * lanes_ : lanes_, vectors = ceil_div(lanes, L);
    for (int64_t c = 0; c < count; ++c, mask += step, to += vectors) {
      int64_t g = 0;
      for (; (g + kVectors) * L <= lanes; g += kVectors) set_lanes<kVectorBytes>(mask + g * L, to + g);
      for (; g < vectors; ++g) set_lanes<L>(mask + group_begin<A>(g, lanes), to + g);
    }
  }

  // Of each pixel, bits of some channels from `channel` on, at most eight. Of one mask for all, only the first is its.
  KPFUSED_INLINE void bits_of(const uint8_t* mask, int64_t channel, int64_t channels, int64_t pixels, uint8_t* to) const {
    const int64_t planes = between_ == 0 ? 1 : channels, *const plane = plane_ + channel;
    const auto of_pixel = [&](int64_t i) {
      uint8_t bits = 0;
      for (int64_t k = 0; k < planes; ++k) bits |= uint8_t((mask[plane[k] + i * first_.stride_x] != 0) << k);
      return bits;
    };
    if (first_.by_rows()) return void(__builtin_memset(to, of_pixel(0), size_t(pixels)));
    if (first_.stride_x != 1 || pixels < kVectorBytes) {
      for (int64_t i = 0; i < pixels; ++i) to[i] = of_pixel(i);
      return;
    }
    // Several vectors of each plane in turn: memory is quickest in order, and steps wait for the ones before.
    constexpr int64_t kSome = 4 * kVectorBytes;
    int64_t i = 0;
    for (; i + kSome <= pixels; i += kSome) pack_planes<4>(mask + i, plane, planes, to + i);
    for (; i < pixels; i += kVectorBytes) {
      const int64_t at = at_most(i, pixels - kVectorBytes);
      pack_planes<1>(mask + at, plane, planes, to + at);
    }
  }

  template <int N>
  static KPFUSED_INLINE void pack_planes(const uint8_t* mask, const int64_t* plane, int64_t planes, uint8_t* to) {
    ByteVector bits[N] = {};
    for (int64_t k = planes - 1; k >= 0; --k) {
      const uint8_t* const p = mask + plane[k];
      for (int n = 0; n < N; ++n) bits[n] = bits[n] + bits[n] + ones(load_mask(p + n * kVectorBytes));
    }
    for (int n = 0; n < N; ++n) __builtin_memcpy(to + n * kVectorBytes, &bits[n], sizeof(bits[n]));
  }

  // One pixel after the other: of the channels of each vector.
  void planes(const uint8_t* mask, int64_t pixels, Word* to) const {
    constexpr bool kAll = sizeof(Word) * 8 == L;  // of all vectors, or of one after the other
    constexpr int64_t kBytes = ceil_div(L, 8);
    uint8_t bits[kAll ? ceil_div(2 * kChannelBlock, L) * kBytes : kBytes][kPiece];
    if (between_ == 0) {
      bits_of(mask, 0, 1, pixels, bits[0]);
      for (int64_t i = 0; i < pixels; ++i) {
        for (int64_t g = 0; g < vectors_; ++g) to[i * vectors_ + g] = bits[0][i] ? Word(~Word(0)) : Word(0);
      }
      return;
    }
    for (int64_t g = 0; g < vectors_; ++g) {
      uint8_t(*const of_vector)[kPiece] = bits + (kAll ? g * kBytes : 0);
      for (int64_t b = 0; b < kBytes; ++b) {
        // Lanes beyond the channels of a padded buffer count, if anyone asks.
        const int64_t first = at_least(at_most(g * L, channels_ - L), 0) + b * 8;
        const int64_t channels = at_most(at_least(channels_ - first, 0), at_most(L, 8));
        channels > 0 ? bits_of(mask, first, channels, pixels, of_vector[b]) : void(__builtin_memset(of_vector[b], 0, pixels));
        for (int64_t i = 0; i < pixels && channels < 8; ++i) of_vector[b][i] |= uint8_t(0xff << channels);
      }
      for (int64_t i = 0; i < pixels && !kAll; ++i) {
        const uint32_t more = kBytes > 1 ? of_vector[kBytes - 1][i] << 8 : 0;
        to[i * vectors_ + g] = lane_word<A>(of_vector[0][i] | more);
      }
    }
    if (kAll) deal_bits(bits, vectors_ * kBytes, pixels, to);
  }

  // Where words are bits: those of a pixel, eight bytes at a time. What is written beyond them is overwritten by the next.
  void deal_bits(const uint8_t (*bits)[kPiece], int64_t bytes, int64_t pixels, Word* to) const {
    constexpr int64_t kParts = ceil_div(2 * kChannelBlock, 64);
    uint64_t part[kParts][kPiece];
    const int64_t parts = ceil_div(bytes, 8);
    for (int64_t q = 0; q < parts; ++q) {
      for (int64_t i = 0; i < pixels; ++i) part[q][i] = 0;
      for (int64_t b = q * 8; b < at_most(bytes, q * 8 + 8); ++b) {
        for (int64_t i = 0; i < pixels; ++i) part[q][i] |= uint64_t(bits[b][i]) << b % 8 * 8;
      }
    }
    for (int64_t i = 0; i < pixels; ++i, to += vectors_) {
      for (int64_t q = 0; q < parts; ++q) __builtin_memcpy(reinterpret_cast<uint8_t*>(to) + q * 8, &part[q][i], 8);
    }
  }

  // Pixels abreast. While words are made, the next piece of each plane comes from the second-level cache: they are often more
  // than a processor follows by itself.
  void abreast(const uint8_t* mask, int64_t pixels, Word* to) const {
    uint8_t bits[AbreastWords<A>::kMost][kPiece + AbreastWords<A>::kPixels];
    for (int64_t b = 0; b < abreast_words_.bytes(); ++b) {
      bits_of(mask, b * 8, at_most(channels_ - b * 8, 8), pixels, bits[b]);
    }
    const bool apart = between_ == kUneven || between_ >= kPiece;
    const int64_t planes = apart && first_.stride_x == 1 ? channels_ : 0;
    for (int64_t k = 0; k < planes; ++k) {
      for (int64_t i = 0; i < kPiece; i += 64) prefetch_near(mask + plane_[k], kPiece + i);
    }
#if KPFUSED_AVX512
    if (abreast_words_.has_pairs()) {
      for (int64_t i = 0; i < pixels; i += abreast_, to += vectors_) abreast_words_.pairs(bits[0] + i, to);
      return;
    }
#endif
    const auto words = [&](auto bytes) __attribute__((always_inline)) {
      constexpr int kBytes = decltype(bytes)::value;
#if KPFUSED_AVX512
      if constexpr (kBytes > 1) {
        return abreast_words_.template windows<kBytes>(bits[0], sizeof(bits[0]), pixels, abreast_, vectors_, to);
      }
#endif
      for (int64_t i = 0; i < pixels; i += abreast_, to += vectors_) {
        abreast_words_.template shuffled<kBytes>(bits[0] + i, sizeof(bits[0]), to);
      }
    };
    switch (abreast_words_.bytes()) {
      case 1: return words(Count<1>{});
      case 2: return words(Count<2>{});
      case 3: return words(Count<3>{});
      case 4: return words(Count<4>{});
    }
  }

  const Counting first_;
  const int64_t channels_, abreast_, lanes_, vectors_;
  const bool same_size_;
  const int64_t between_;  // the masks of two channels, or kUneven
  int64_t plane_[2 * kChannelBlock];  // from the first channel's mask to each, where they are not in order
  Vec<A> rows_[kGroups<A>], cols_[kGroups<A>];  // the valid size for each lane, columns counted from a group's first pixel
  const AbreastWords<A>& abreast_words_;
  Word words_[kChunkWords + kAbreastChannels];  // with room for the last ones written at once
};

}  // namespace kpfused::cpu::KPFUSED_ISA
