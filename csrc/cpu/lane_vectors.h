// SPDX-License-Identifier: MIT
// How the lanes of a work item, channels of one pixel or of several abreast (lanes.h), lie in vectors.
#pragma once

#include "maps.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Channels of a map whose pixels may stand abreast.
constexpr int64_t kAbreastChannels = 32;

// Vectors that hold the lanes of one work item. Numbers of these are called group; groups of pixels are those abreast.
template <class A>
constexpr int kGroups = int(at_least(2 * kChannelBlock / kLanes<A>, kAbreastChannels));

// First lane of such a vector: the last one overlaps the one before.
template <class A>
KPFUSED_INLINE int64_t group_begin(int64_t group, int64_t lanes) {
  return at_most(group * kLanes<A>, lanes - kLanes<A>);
}

// The lanes of all vectors one after the other, for what is done between channels and the pixels that stand abreast.
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

// Calls body(vector, its lane, the pixel abreast, the channel) for every lane. Those beyond the channels of a padded buffer
// repeat the last one.
template <class A, class Body>
KPFUSED_INLINE void for_lanes(int64_t channels, int64_t abreast, const Body& body) {
  const int64_t lanes = at_least(channels * abreast, kLanes<A>);
  for (int64_t g = 0; g < ceil_div(lanes, kLanes<A>); ++g) {
    int64_t pixel = group_begin<A>(g, lanes) / channels, channel = group_begin<A>(g, lanes) - pixel * channels;
    for (int i = 0; i < kLanes<A>; ++i) {
      body(g, i, pixel, channel);
      if (channel + 1 < channels) {
        ++channel;
      } else if (pixel + 1 < abreast) {
        channel = 0, ++pixel;
      }
    }
  }
}

}  // namespace kpfused::cpu::KPFUSED_ISA
