// SPDX-License-Identifier: MIT
// Which pixels count where lanes are channels: a word for each vector of lanes, pixel after pixel, as kernels go through them.
// Where several pixels stand abreast in the lanes (lanes.h), read "group of pixels" for pixel.
//
// Masks come in three ways. Channels side by side are bits in the order of lanes. Of planes, a mask for each channel, eight
// at a time give a byte of bits to each pixel, whole vectors of pixels at once, and so does one mask for all; bytes are then
// dealt to lanes.
#pragma once

#include "counting.h"
#include "lane_vectors.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Whether all channels of a pixel count, or none.
KPFUSED_INLINE bool one_mask(const PixelView& pixels) { return !pixels.mask || pixels.mask_view.stride_inner == 0; }
KPFUSED_INLINE bool one_size(const PixelView& pixels, const MapView& view) {
  return !pixels.sizes || pixels.modulus == 1 || pixels.divisor % view.inner == 0;
}

// Words that a chunk may need: lane_chunks() sees to it that no chunk needs more, and those through a buffer need fewer.
constexpr int64_t kCountedWords = 8192;

// The bytes of a mask for the next chunk: in runs, `between` bytes from one to the next. Of one mask for all there are few:
// nothing is fetched.
struct MaskAhead {
  const uint8_t* p;
  int64_t run, between;
};

// Goes through them in order, from byte `begin` on, `step` bytes at a time.
class MaskWalk {
 public:
  KPFUSED_INLINE MaskWalk(const MaskAhead& ahead, int64_t begin, int64_t step)
      : p_(ahead.p), run_(ahead.run), gap_(ahead.between - ahead.run), at_(0), left_(0), step_(ahead.run > 0 ? step : 0) {
    if (run_ == 0) return;
    const int64_t index = begin / run_;
    at_ = begin + index * gap_, left_ = (index + 1) * run_ - begin;
  }
  // How many steps, at most `count`, are in the same run; where they begin; and how far it is from one to the next.
  KPFUSED_INLINE int64_t steps(int64_t count) const { return left_ >= count * step_ ? count : ceil_div(left_, step_); }
  KPFUSED_INLINE const uint8_t* at(const void* otherwise) const {
    return static_cast<const uint8_t*>(run_ == 0 ? otherwise : ahead_of(p_, at_));
  }
  KPFUSED_INLINE int64_t step() const { return step_; }

  KPFUSED_INLINE void advance(int64_t steps) {
    at_ += steps * step_, left_ -= steps * step_;
    if (left_ <= 0) at_ += gap_, left_ += run_;
  }

 private:
  const uint8_t* p_;
  int64_t run_, gap_, at_, left_, step_;
};

// The words of a chunk; null if all count.
template <class A>
struct CountedLanes {
  const LaneWord<A>* words;
  int64_t stride_y, stride_x;
  MaskAhead ahead;

  KPFUSED_INLINE const LaneWord<A>* at(int64_t row, int64_t pixel) const {
    return words + row * stride_y + pixel * stride_x;
  }
};

// From bits of pixels to words of lanes where pixels stand abreast. Every lane gets a byte of its pixel, the one in which its
// channel is a bit, and counts where that bit is set.
template <class A>
class LaneBytes {
 public:
  static constexpr int L = kLanes<A>, kPixels = 16, kMost = int(kAbreastChannels) / 8;

  LaneBytes(const PixelView& pixels, int64_t channels, int64_t abreast)
      : bytes_(one_mask(pixels) ? 1 : ceil_div(channels, 8)), blocks_(0) {
    if (!pixels.mask || abreast == 1) return;
    const int64_t lanes = abreast * channels, vectors = ceil_div(lanes, L);
    blocks_ = int(ceil_div(vectors, kVectors));
    for (int64_t v = 0; v < blocks_ * kVectors; ++v) {
      const int64_t begin = group_begin<A>(at_most(v, vectors - 1), lanes);
      Block& block = block_[v / kVectors];
      for (int64_t i = 0; i < L; ++i) {
        const int64_t pixel = (begin + i) / channels, channel = begin + i - pixel * channels, at = v % kVectors * L + i;
        uint32_t* const near = block.near + at / kShuffled * 4;
        for (int k = 0; k < 4 && at % kShuffled == 0; ++k) near[k] = uint32_t(at_most(pixel + k, kPixels - 1));
        block.index[at] = uint8_t(bytes_ == 1 ? pixel : (pixel - near[0]) * 4 + channel / 8);
        block.bit[at] = uint8_t(one_mask(pixels) ? 1 : 1 << channel % 8);
      }
    }
#if KPFUSED_AVX512
    for (int64_t v = 0; v < kAbreastChannels; ++v) {
      const int64_t begin = group_begin<A>(at_most(v, vectors - 1), lanes), pixel = begin / channels;
      Window& window = window_[v / kWindow];
      for (int64_t k = 0; k < 3; ++k) {
        window.pixel[k][v % kWindow] = uint32_t(at_most(pixel + k, kPixels - 1));
        window.shift[k][v % kWindow] = uint32_t(k == 0 ? begin - pixel * channels : (pixel + k) * channels - begin);
      }
    }
#endif
    pairs_ = KPFUSED_AVX512 && sizeof(A) == 4 && bytes_ == 1 && channels > 8;
    for (int64_t v = 0; v < vectors && pairs_; ++v) {
      const int64_t begin = group_begin<A>(v, lanes), pixel = begin / channels, left = (pixel + 1) * channels - begin;
      pixel_[v] = uint16_t(pixel), next_[v] = uint16_t(at_most(pixel + 1, abreast - 1));
      of_pixel_[v] = uint16_t((1u << at_most(left, L)) - 1);
      pairs_ = left + channels >= L;
    }
  }

  // Of bits for a pixel: those of eight channels each, or the first of them for all.
  int64_t bytes() const { return bytes_; }

  // Words for some pixels abreast, the bytes of which lie `stride` apart. Writes whole blocks. Of several bytes a pixel has
  // four side by side; sixteen lanes have theirs in four pixels at most, which are brought near first.
  template <int kBytes>
  KPFUSED_INLINE void words(const uint8_t* bits, int64_t stride, LaneWord<A>* to) const {
#if KPFUSED_AVX512
    const __m512i pixels = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)bits));
    for (const Block *block = block_, *end = block_ + blocks_; block != end; ++block, to += kVectors) {
      const __m512i lanes = _mm512_shuffle_epi8(pixels, _mm512_load_si512(block->index));
      const __mmask64 set = _mm512_test_epi8_mask(lanes, _mm512_load_si512(block->bit));
      __builtin_memcpy(to, &set, sizeof(set));
    }
#elif KPFUSED_AVX2
    __m256i pixels = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)bits));
    if (kBytes > 1) pixels = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bits));
    for (int b = 1; b < kBytes; ++b) {
      const __m256i more = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(bits + b * stride)));
      pixels = _mm256_or_si256(pixels, _mm256_slli_epi32(more, 8 * b));
    }
    for (const Block *block = block_, *end = block_ + blocks_; block != end; ++block, to += kVectors) {
      const __m256i near =
          kBytes == 1 ? pixels : _mm256_permutevar8x32_epi32(pixels, _mm256_load_si256((const __m256i*)block->near));
      const __m256i lanes = _mm256_shuffle_epi8(near, _mm256_load_si256((const __m256i*)block->index));
      const __m256i bit = _mm256_load_si256((const __m256i*)block->bit);
      _mm256_storeu_si256((__m256i*)to, _mm256_cmpeq_epi8(_mm256_and_si256(lanes, bit), bit));
    }
#else
    for (const Block *block = block_, *end = block_ + blocks_; block != end; ++block, to += kVectors) {
      uint8_t lanes[kVectorBytes];
      for (int i = 0; i < kVectorBytes; ++i) {
        const int index = block->index[i], near = int(block->near[i / kShuffled * 4]);
        const uint8_t byte = kBytes == 1 ? bits[index] : bits[index % 4 * stride + near + index / 4];
        lanes[i] = byte & block->bit[i] ? 0xff : 0;
      }
      __builtin_memcpy(to, lanes, sizeof(lanes));
    }
#endif
  }

#if KPFUSED_AVX512
  // Of more than eight channels: a vector sees bits of three pixels at most, those of the first shifted down, those of the
  // others up. As many channels as two bytes have bits make no more vectors than there are words in a window; more channels
  // leave no third pixel to be seen. Writes kAbreastChannels words for the last pixels.
  template <int kBytes>
  void words_of_windows(const uint8_t* bits, int64_t stride, int64_t pixels, int64_t abreast, int64_t vectors,
                        LaneWord<A>* to) const {
    constexpr int kWindows = kBytes == 2 ? 1 : 2, kSeen = kBytes == 2 ? 3 : 2;
    __m512i pixel[kWindows][kSeen], shift[kWindows][kSeen];
    for (int i = 0; i < kWindows; ++i) {
      for (int k = 0; k < kSeen; ++k) {
        pixel[i][k] = _mm512_load_si512(window_[i].pixel[k]), shift[i][k] = _mm512_load_si512(window_[i].shift[k]);
      }
    }
    for (; pixels > 0; pixels -= abreast, bits += abreast, to += vectors) {
      __m512i of_pixel = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bits));
      for (int b = 1; b < kBytes; ++b) {
        const __m512i more = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(bits + b * stride)));
        of_pixel = _mm512_or_si512(of_pixel, _mm512_slli_epi32(more, 8 * b));
      }
      for (int i = 0; i < kWindows; ++i) {
        __m512i seen = _mm512_srlv_epi32(_mm512_permutexvar_epi32(pixel[i][0], of_pixel), shift[i][0]);
        for (int k = 1; k < kSeen; ++k) {
          const __m512i more = _mm512_sllv_epi32(_mm512_permutexvar_epi32(pixel[i][k], of_pixel), shift[i][k]);
          seen = _mm512_or_si512(seen, more);
        }
        if constexpr (sizeof(A) == 4) _mm256_storeu_si256((__m256i*)(to + i * kWindow), _mm512_cvtepi32_epi16(seen));
        if constexpr (sizeof(A) == 8) _mm_storeu_si128((__m128i*)(to + i * kWindow), _mm512_cvtepi32_epi8(seen));
      }
    }
  }

  // Whether there is one mask for all, and no vector with lanes of three pixels.
  bool pairs() const { return pairs_; }

  // The words then; writes kAbreastChannels of them.
  KPFUSED_INLINE void words_of_pairs(const uint8_t* bits, LaneWord<A>* to) const {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)bits);
    const __m512i pixels = _mm512_movm_epi16(_mm_test_epi8_mask(bytes, bytes));
    const __m512i first = _mm512_permutexvar_epi16(_mm512_load_si512(pixel_), pixels);
    const __m512i second = _mm512_permutexvar_epi16(_mm512_load_si512(next_), pixels);
    constexpr int kChoose = 0xca;  // the first where set, else the second
    _mm512_storeu_si512(to, _mm512_ternarylogic_epi32(_mm512_load_si512(of_pixel_), first, second, kChoose));
  }
#endif

 private:
  static constexpr int kVectors = kVectorBytes / L;  // whose lanes are as many as a vector has bytes
  static constexpr int kBlocks = int(ceil_div(kAbreastChannels, kVectors));
  static constexpr int kShuffled = 16;  // lanes that a shuffle serves from the same bytes
  // For each lane of as many as a vector has bytes: which byte, of those near, and its bit there. The four pixels that are
  // near to sixteen of them.
  struct Block {
    alignas(kVectorBytes) uint8_t index[kVectorBytes], bit[kVectorBytes];
    uint32_t near[kVectorBytes / 4];
  };
#if KPFUSED_AVX512
  // Of more than eight channels, a vector sees those of three pixels at most: bits of the first shifted down, those of the
  // others up.
  static constexpr int64_t kWindow = 16;
  struct Window {
    alignas(64) uint32_t pixel[3][kWindow], shift[3][kWindow];
  };
  Window window_[kAbreastChannels / kWindow];
#endif
  int64_t bytes_;
  int blocks_;
  bool pairs_ = false;
  alignas(64) uint16_t pixel_[kAbreastChannels], next_[kAbreastChannels], of_pixel_[kAbreastChannels];
  Block block_[kBlocks];
};

// Which pixels of a chunk count, for each channel of a block. `abreast` as in pixels_abreast(): a lane is a channel of one of
// the pixels of a group.
template <class A>
class Counted {
 public:
  static constexpr int L = kLanes<A>;
  using Word = LaneWord<A>;

  Counted(const PixelView& pixels, const MapView& view, const LaneBytes<A>& lane_bytes, int64_t first_map,
          int64_t channels, int64_t abreast)
      : first_(counting_of(pixels, view, first_map)),
        channels_(channels),
        abreast_(abreast),
        lanes_(at_least(channels * abreast, L)),
        vectors_(ceil_div(lanes_, L)),
        same_size_(one_size(pixels, view)),
        between_(pixels.mask_view.stride_inner),
        lane_bytes_(lane_bytes) {
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

  // `next`: the mask from the first pixel of the next chunk on, to be fetched; or null.
  CountedLanes<A> of(const PixelRange& range, const uint8_t* next) {
    const bool sized = !same_size_ || range.row + range.rows > first_.rows || range.col + range.cols > first_.cols;
    if (!first_.mask && !sized) return {};
    const int64_t pixels = range.cols / abreast_, words = range.rows * pixels * vectors_;
    if (first_.mask) masked(range);
    if (sized) within_size(range);
    if (all_count(words)) return {};
    return {words_, pixels * vectors_, vectors_, ahead(range, next)};
  }

 private:
  static constexpr int64_t kPiece = 256;  // pixels whose bits are found at once

  MaskAhead ahead(const PixelRange& range, const uint8_t* next) const {
    if (!next || between_ == 0) return {};
    const int64_t pixels = range.rows * range.cols;
    return {next, between_ == 1 ? pixels * channels_ : pixels, between_};
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

  bool all_count(int64_t words) const {
    Word common = Word(~Word(0));
    for (int64_t i = 0; i < words; ++i) common &= words_[i];
    return common == Word(~Word(0));
  }

  void masked(const PixelRange& range) {
    const uint8_t* const mask = first_.mask + range.row * first_.stride_y + range.col * first_.stride_x;
    const int64_t pixels = range.cols / abreast_;
    const bool in_line = between_ == 1 && (abreast_ == 1 || first_.stride_x == channels_);
    if (in_line && channels_ * abreast_ == lanes_) {
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
      const __m512i bytes = _mm512_loadu_si512(p);
      const __mmask64 set = _mm512_test_epi8_mask(bytes, bytes);
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

  // Lanes as they are in memory.
  KPFUSED_INLINE void side_by_side(const uint8_t* mask, int64_t pixels, Word* to) const {
    constexpr int64_t kVectors = kVectorBytes / L;
    for (int64_t c = 0; c < pixels; ++c, mask += first_.stride_x * abreast_, to += vectors_) {
      int64_t g = 0;
      for (; (g + kVectors) * L <= lanes_; g += kVectors) set_lanes<kVectorBytes>(mask + g * L, to + g);
      for (; g < vectors_; ++g) set_lanes<L>(mask + group_begin<A>(g, lanes_), to + g);
    }
  }

  // Of each pixel, bits of some channels from `channel` on, at most eight. Of one mask for all, only the first is its.
  KPFUSED_INLINE void bits_of(const uint8_t* mask, int64_t channel, int64_t channels, int64_t pixels, uint8_t* to) const {
    const int64_t planes = between_ == 0 ? 1 : channels;
    mask += channel * between_;
    if (first_.stride_x != 1 || pixels < kVectorBytes) {
      for (int64_t i = 0; i < pixels; ++i) {
        uint8_t bits = 0;
        for (int64_t k = 0; k < planes; ++k) bits |= uint8_t((mask[k * between_ + i * first_.stride_x] != 0) << k);
        to[i] = bits;
      }
      return;
    }
    // Several vectors of each plane in turn: memory is quickest in order, and steps wait for the ones before.
    constexpr int64_t kSome = 4 * kVectorBytes;
    int64_t i = 0;
    for (; i + kSome <= pixels; i += kSome) pack_planes<4>(mask + i, planes, to + i);
    for (; i < pixels; i += kVectorBytes) {
      const int64_t at = at_most(i, pixels - kVectorBytes);
      pack_planes<1>(mask + at, planes, to + at);
    }
  }

  template <int N>
  KPFUSED_INLINE void pack_planes(const uint8_t* mask, int64_t planes, uint8_t* to) const {
    ByteVector bits[N] = {};
    const uint8_t* p = mask + (planes - 1) * between_;
    for (int64_t k = planes; k > 0; --k, p -= between_) {
      for (int n = 0; n < N; ++n) bits[n] = bits[n] + bits[n] + ones(load_mask(p + n * kVectorBytes));
    }
    for (int n = 0; n < N; ++n) __builtin_memcpy(to + n * kVectorBytes, &bits[n], sizeof(bits[n]));
  }

  // One pixel after the other: of the channels of each vector.
  void planes(const uint8_t* mask, int64_t pixels, Word* to) const {
    constexpr int64_t kBytes = ceil_div(L, 8), kMost = ceil_div(2 * kChannelBlock, L) * kBytes;
    uint8_t bits[kMost][kPiece];
    if (between_ == 0) {
      bits_of(mask, 0, 1, pixels, bits[0]);
      for (int64_t i = 0; i < pixels; ++i) {
        for (int64_t g = 0; g < vectors_; ++g) to[i * vectors_ + g] = bits[0][i] ? Word(~Word(0)) : Word(0);
      }
      return;
    }
    for (int64_t b = 0; b < vectors_ * kBytes; ++b) {
      // Lanes beyond the channels of a padded buffer count, if anyone asks.
      const int64_t first = at_least(at_most(b / kBytes * L, channels_ - L), 0) + b % kBytes * 8;
      const int64_t channels = at_most(at_least(channels_ - first, 0), at_most(L, 8));
      bits_of(mask, first, channels, pixels, bits[b]);
      for (int64_t i = 0; i < pixels && channels < 8; ++i) bits[b][i] |= uint8_t(0xff << channels);
    }
#if KPFUSED_AVX512
    // Bytes of a pixel's words follow each other, eight at a time. What is written beyond them is overwritten by the next.
    uint64_t eight[ceil_div(kMost, 8)][kPiece];
    const int64_t parts = ceil_div(vectors_ * kBytes, 8);
    for (int64_t q = 0; q < parts; ++q) {
      for (int64_t i = 0; i < pixels; ++i) eight[q][i] = 0;
      for (int64_t b = 0; b < at_most(vectors_ * kBytes - q * 8, 8); ++b) {
        for (int64_t i = 0; i < pixels; ++i) eight[q][i] |= uint64_t(bits[q * 8 + b][i]) << 8 * b;
      }
    }
    for (int64_t i = 0; i < pixels; ++i, to += vectors_) {
      for (int64_t q = 0; q < parts; ++q) __builtin_memcpy(reinterpret_cast<uint8_t*>(to) + q * 8, &eight[q][i], 8);
    }
#else
    for (int64_t g = 0; g < vectors_; ++g) {
      for (int64_t i = 0; i < pixels; ++i) {
        const uint32_t more = kBytes > 1 ? bits[(g + 1) * kBytes - 1][i] << 8 : 0;
        to[i * vectors_ + g] = lane_word<A>(bits[g * kBytes][i] | more);
      }
    }
#endif
  }

  // Pixels abreast.
  void abreast(const uint8_t* mask, int64_t pixels, Word* to) const {
    uint8_t bits[LaneBytes<A>::kMost][kPiece + LaneBytes<A>::kPixels];
    for (int64_t b = 0; b < lane_bytes_.bytes(); ++b) bits_of(mask, b * 8, at_most(channels_ - b * 8, 8), pixels, bits[b]);
#if KPFUSED_AVX512
    if (lane_bytes_.pairs()) {
      for (int64_t i = 0; i < pixels; i += abreast_, to += vectors_) lane_bytes_.words_of_pairs(bits[0] + i, to);
      return;
    }
#endif
    const auto words = [&](auto bytes) __attribute__((always_inline)) {
#if KPFUSED_AVX512
      constexpr int kBytes = decltype(bytes)::value;
      if constexpr (kBytes > 1) {
        return lane_bytes_.template words_of_windows<kBytes>(bits[0], sizeof(bits[0]), pixels, abreast_, vectors_, to);
      }
#endif
      for (int64_t i = 0; i < pixels; i += abreast_, to += vectors_) {
        lane_bytes_.template words<decltype(bytes)::value>(bits[0] + i, sizeof(bits[0]), to);
      }
    };
    switch (lane_bytes_.bytes()) {
      case 1: return words(Count<1>{});
      case 2: return words(Count<2>{});
      case 3: return words(Count<3>{});
      case 4: return words(Count<4>{});
    }
  }

  const Counting first_;
  const int64_t channels_, abreast_, lanes_, vectors_;
  const bool same_size_;
  const int64_t between_;  // the masks of two channels
  Vec<A> rows_[kGroups<A>], cols_[kGroups<A>];  // the valid size for each lane, columns counted from a group's first pixel
  const LaneBytes<A>& lane_bytes_;
  Word words_[kCountedWords + kAbreastChannels];  // with room for the last ones written at once
};

}  // namespace kpfused::cpu::KPFUSED_ISA
