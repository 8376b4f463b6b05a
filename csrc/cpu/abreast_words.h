// SPDX-License-Identifier: MIT
// From a mask's bits of pixels to words of lanes (lane_words.h) where pixels stand abreast: a byte of bits for each pixel, or
// one for every eight of its channels.
//
//   shuffle    every lane gets the byte of its pixel in which its channel is a bit, and counts where that bit is set
//   windows    with mask registers, of more than eight channels: the bits of pixels one after the other are those of lanes, of
//              which a vector sees its own
//   pairs      with mask registers, of one mask for more than eight channels: a vector has lanes of two pixels
#pragma once

#include "counting.h"
#include "lane_vectors.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Whether all channels of a pixel count, or none.
KPFUSED_INLINE bool one_mask(const PixelView& pixels, int64_t channels) {
  return !pixels.mask || pixels.mask_view.shared(channels);
}
KPFUSED_INLINE bool one_size(const PixelView& pixels, const MapView& view) {
  return !pixels.sizes || pixels.modulus == 1 || pixels.divisor % view.inner == 0;
}

template <class A>
class AbreastWords {
 public:
  static constexpr int L = kLanes<A>, kPixels = 16, kMost = int(kAbreastChannels) / 8;

  AbreastWords(const PixelView& pixels, int64_t channels, int64_t abreast)
      : bytes_(one_mask(pixels, channels) ? 1 : ceil_div(channels, 8)), blocks_(0) {
    if (!pixels.mask || abreast == 1) return;
    const int64_t lanes = abreast * channels, vectors = ceil_div(lanes, L);
    // What is written beyond the last vector repeats it.
    const auto first_lane = [&](int64_t v) { return group_begin<A>(at_most(v, vectors - 1), lanes); };
#if KPFUSED_AVX512
    pairs_ = sizeof(A) == 4 && one_mask(pixels, channels) && channels > 8;
    for (int64_t v = 0; v < vectors && pairs_; ++v) pairs_ = (first_lane(v) / channels + 2) * channels >= first_lane(v) + L;
    for (int64_t v = 0; v < kAbreastChannels; ++v) {
      if (pairs_) set_pair(v, first_lane(v), channels, abreast);
      if (bytes_ > 1) set_window(v, first_lane(v), channels);
    }
    if (pairs_ || bytes_ > 1) return;
#endif
    blocks_ = int(ceil_div(vectors, kVectors));
    for (int64_t v = 0; v < blocks_ * kVectors; ++v) set_shuffle(v, first_lane(v), channels, one_mask(pixels, channels));
  }

  // Of bits for a pixel: those of eight channels each, or the first of them for all.
  int64_t bytes() const { return bytes_; }

  // By shuffles, for some pixels abreast, the bytes of which lie `stride` apart. Writes whole blocks. Of several bytes a pixel
  // has four side by side; sixteen lanes have theirs in four pixels at most, which are brought near first.
  template <int kBytes>
  KPFUSED_INLINE void shuffled(const uint8_t* bits, int64_t stride, LaneWord<A>* to) const {
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
  // By windows, for pixels from `bits` on, in halves of sixteen bits: a vector sees three at most, the first of them shifted
  // down, the others up. Writes kAbreastChannels words.
  template <int kBytes>
  void windows(const uint8_t* bits, int64_t stride, int64_t pixels, int64_t abreast, int64_t vectors,
                        LaneWord<A>* to) const {
    static_assert(kAbreastChannels == 32, "words of one vector of halves");
    __m512i half[kSeen], shift[kSeen];
    for (int k = 0; k < kSeen; ++k) half[k] = _mm512_load_si512(half_[k]), shift[k] = _mm512_load_si512(shift_[k]);
    const auto byte = [&](int b) __attribute__((always_inline)) { return _mm_loadu_si128((const __m128i*)(bits + b * stride)); };
    for (; pixels > 0; pixels -= abreast, bits += abreast, to += vectors) {
      __m256i low = _mm256_castsi128_si256(byte(0)), high = _mm256_castsi128_si256(byte(1));
      if (kBytes > 2) low = _mm256_inserti128_si256(low, byte(2), 1);
      if (kBytes > 3) high = _mm256_inserti128_si256(high, byte(3), 1);
      if (kBytes == 3) high = _mm256_zextsi128_si256(byte(1));
      const __m512i halves = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_unpacklo_epi8(low, high)),
                                                _mm256_unpackhi_epi8(low, high), 1);
      __m512i seen = _mm512_srlv_epi16(_mm512_permutexvar_epi16(half[0], halves), shift[0]);
      for (int k = 1; k < kSeen; ++k) {
        seen = _mm512_or_si512(seen, _mm512_sllv_epi16(_mm512_permutexvar_epi16(half[k], halves), shift[k]));
      }
      if constexpr (sizeof(A) == 4) _mm512_storeu_si512(to, seen);
      if constexpr (sizeof(A) == 8) _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi16_epi8(seen));
    }
  }

  // Whether there is one mask for all, and no vector with lanes of three pixels.
  bool has_pairs() const { return pairs_; }

  // By pairs then, for some pixels abreast; writes kAbreastChannels words.
  KPFUSED_INLINE void pairs(const uint8_t* bits, LaneWord<A>* to) const {
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

  // `begin`: the first lane of vector v.
  void set_shuffle(int64_t v, int64_t begin, int64_t channels, bool one_mask) {
    Block& block = block_[v / kVectors];
    for (int64_t i = 0; i < L; ++i) {
      const int64_t pixel = (begin + i) / channels, channel = begin + i - pixel * channels, at = v % kVectors * L + i;
      uint32_t* const near = block.near + at / kShuffled * 4;
      for (int k = 0; k < 4 && at % kShuffled == 0; ++k) near[k] = uint32_t(at_most(pixel + k, kPixels - 1));
      block.index[at] = uint8_t(bytes_ == 1 ? pixel : (pixel - near[0]) * 4 + channel / 8);
      block.bit[at] = uint8_t(one_mask ? 1 : 1 << channel % 8);
    }
  }

#if KPFUSED_AVX512
  static constexpr int kSeen = 3, kHalf = 16;  // halves, and bits of one

  void set_window(int64_t v, int64_t begin, int64_t channels) {
    const int64_t halves = ceil_div(channels, kHalf);
    int64_t pixel = begin / channels, half = (begin - pixel * channels) / kHalf;
    int64_t shift = (begin - pixel * channels) % kHalf, seen = -shift;
    for (int k = 0; k < kSeen; ++k) {
      const int64_t of = at_most(pixel, kPixels - 1);
      half_[k][v] = uint16_t(of / 8 * 16 + half * 8 + of % 8);  // as unpacking leaves them, eight pixels at a time
      shift_[k][v] = uint16_t(k == 0 ? shift : seen);
      seen += at_most(channels - half * kHalf, kHalf);
      if (++half == halves) half = 0, ++pixel;
    }
  }
  void set_pair(int64_t v, int64_t begin, int64_t channels, int64_t abreast) {
    const int64_t pixel = begin / channels;
    pixel_[v] = uint16_t(pixel), next_[v] = uint16_t(at_most(pixel + 1, abreast - 1));
    of_pixel_[v] = uint16_t((1u << at_most((pixel + 1) * channels - begin, L)) - 1);
  }

  alignas(64) uint16_t half_[kSeen][kAbreastChannels], shift_[kSeen][kAbreastChannels];
  alignas(64) uint16_t pixel_[kAbreastChannels], next_[kAbreastChannels], of_pixel_[kAbreastChannels];
  bool pairs_ = false;
#endif
  int64_t bytes_;
  int blocks_;
  Block block_[kBlocks];
};

}  // namespace kpfused::cpu::KPFUSED_ISA
