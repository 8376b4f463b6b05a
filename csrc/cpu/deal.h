// SPDX-License-Identifier: MIT
// From lanes that are maps to lanes that are channels of their values, some for each map, one map after the other, and back.
#pragma once

#include <memory>

#include "lane_vectors.h"

namespace kpfused::cpu::KPFUSED_ISA {

// At most so many channels of a map: what a sum over them costs grows with their number.
constexpr int64_t kDealt = 32;

template <class A>
class Deal {
 public:
  static constexpr int L = kLanes<A>;

  explicit Deal(int64_t channels) : channels_(channels) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int i = 0; i < L; ++i) map_[c][i] = (c + i) / channels, begins_[c][i] = i * channels / L == c ? -1 : 0;
    }
    for (int i = 0; i < L; ++i) first_[i] = i * channels % L;
  }

  void set_lanes(int64_t lanes) {
    if (lanes == lanes_) return;
    lanes_ = lanes;
    vectors_ = ceil_div(lanes * channels_, L);
    vector_.reset(new Vector[size_t(vectors_)]);
    for (int64_t g = 0; g < vectors_; ++g) {
      const int64_t lane = group_begin<A>(g, lanes * channels_);
      vector_[g] = {int32_t(lane), int32_t(lane / channels_), int32_t(lane % channels_)};
    }
  }

  int64_t lanes() const { return lanes_; }
  // Of a group of pixels: lanes of channels, and vectors of them, of which the last overlaps the one before.
  int64_t dealt() const { return lanes_ * channels_; }
  int64_t vectors() const { return vectors_; }

  // A vector of channels: its first lane, and for each lane what its map has. Reads up to a vector beyond the last map.
  struct Vector {
    int32_t lane, map, phase;
  };
  KPFUSED_INLINE const Vector& vector(int64_t g) const { return vector_[g]; }
  KPFUSED_INLINE Vec<A> of_maps(const A* maps, const Vector& at) const {
    return permute(load_vector(maps + at.map), map_[at.phase]);
  }

  // For a vector of maps, the sums over their channels, which begin there. Reads as many elements beyond them as there are
  // channels.
  template <int kChannels>
  KPFUSED_INLINE Vec<A> sum(const A* channels) const {
    const int64_t count = kChannels > 0 ? kChannels : channels_;
    Vec<A> sums = {};
    for (int64_t j = 0; j < count; ++j) {
      Vec<A> each = load_vector(channels + j * L);
      for (int64_t c = 1; c < count; ++c) each += load_vector(channels + j * L + c);
      const Vec<A> picked = permute(each, first_);
      sums = begins_[j] ? picked : sums;
    }
    return sums;
  }

 private:
  const int64_t channels_;
  int64_t lanes_ = 0, vectors_ = 0;
  std::unique_ptr<Vector[]> vector_;
  Mask<A> map_[kDealt];     // of a vector that begins with channel c, counted from its first map
  Mask<A> begins_[kDealt];  // maps whose channels begin in vector j of all
  Mask<A> first_;           // where they begin in it
};

}  // namespace kpfused::cpu::KPFUSED_ISA
