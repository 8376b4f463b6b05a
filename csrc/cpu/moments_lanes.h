// SPDX-License-Identifier: MIT
// Forward with moments where lanes are channels: the sums of moments_rows.h, every lane about the peak of its own map.
//
// Beside what sums_lanes.h spends on a vector: two additions, a multiplication and two multiply-adds; and a comparison
// and two selections for eight of them, since the first reading keeps the segment of the peak, in which it is then found.
#pragma once

#include "sums_lanes.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Pixels of a row, of those that are read, which the search for the peak takes as one.
constexpr int64_t kSegment = 8;

template <class T>
KPFUSED_INLINE int64_t segments_of_row(const LanesChunk<T>& chunk) {
  return ceil_div(chunk.cols, kSegment);
}

// The peak of every lane, and the first segment of the chunk that has it.
template <class A>
struct LanePeak {
  Vec<A> peak, segment;
};

template <Counts kCounts, class T, int N>
KPFUSED_INLINE void peaks_and_segments(const LanesChunk<T>& chunk, const int64_t (&offset)[N],
                                       const Mask<Acc<T>> (&flip)[N], LanePeak<Acc<T>> (&at)[N]) {
  using A = Acc<T>;
  // Below all logits that weigh, of which the lowest may be all there is.
  const Vec<A> none = splat(A(-INFINITY));
  for (int j = 0; j < N; ++j) at[j] = {none, splat(kNowhere<A>)};
  for (int64_t r = 0; r < chunk.rows; ++r) {
    Vec<A> segment = splat(A(r * segments_of_row(chunk)));
    const int64_t count = pixels_of_row<kCounts>(chunk, r);
    for (int64_t i = 0; i < count; i += kSegment, segment += A(1)) {
      Vec<A> top[N];
      for (int j = 0; j < N; ++j) top[j] = none;
      const auto pixel = [&](const T* p, Vec<A>, const PixelBit<A>& bit, const T*) __attribute__((always_inline)) {
        for (int j = 0; j < N; ++j) {
          top[j] = counted<kCounts, A>(bit, offset[j], maximum(key(p, offset[j], flip[j]), top[j]), top[j]);
        }
      };
      for_pixels<kCounts>(chunk, r, i, at_most(i + kSegment, count), pixel);
      for (int j = 0; j < N; ++j) {
        const Mask<A> higher = top[j] > at[j].peak;
        at[j] = {higher ? top[j] : at[j].peak, higher ? segment : at[j].segment};
      }
    }
  }
  for (int j = 0; j < N; ++j) at[j].peak = maximum(at[j].peak, splat(Limits<A>::lowest));
}

// Makes the pixels of the peaks what the sums are about, except where an earlier chunk has a higher one.
template <Counts kCounts, class T>
KPFUSED_INLINE void place_peaks(const LanesChunk<T>& chunk, int64_t offset, const Mask<Acc<T>>& flip,
                                const LanePeak<Acc<T>>& peak, const Mask<Acc<T>>& earlier,
                                Moments<Acc<T>, Vec<Acc<T>>>& m) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const uint32_t segments = uint32_t(segments_of_row(chunk));
  m.at_x = earlier ? m.at_x : splat(kNowhere<A>);
  m.at_y = earlier ? m.at_y : splat(kNowhere<A>);
  A x[L], y[L], segment[L];
  store_vector(x, m.at_x), store_vector(y, m.at_y), store_vector(segment, peak.segment);
  // Which lanes, and how far it is to their peaks, could not be predicted: bit by bit, and through all of a segment.
  for (uint32_t bits = lane_bits<A>(~earlier & (peak.segment < kNowhere<A>)); bits != 0; bits &= bits - 1) {
    const int i = __builtin_ctz(bits);
    const uint32_t index = uint32_t(segment[i]), row = index / segments;
    const int64_t first = int64_t(index - row * segments) * kSegment;
    Vec<A> left = splat(-kNowhere<A>);
    const auto pixel = [&](const T* p, Vec<A> at, const PixelBit<A>& bit, const T*) __attribute__((always_inline)) {
      const Vec<A> here = key(p, offset, flip) == peak.peak ? -at : splat(-kNowhere<A>);
      left = counted<kCounts, A>(bit, offset, maximum(here, left), left);
    };
    for_pixels<kCounts>(chunk, row, first, at_most(first + kSegment, pixels_of_row<kCounts>(chunk, row)), pixel);
    A columns[L];
    store_vector(columns, left);
    x[i] = -columns[i];
    y[i] = chunk.y0 + A(row);
  }
  m.at_x = load_vector(x), m.at_y = load_vector(y);
}

// N vectors of channels over all pixels of a chunk.
template <class T, int N, Counts kCounts>
void lane_moments(const LanesChunk<T>& chunk, int64_t group, LaneStates<Acc<T>, Moments<Acc<T>, Vec<Acc<T>>>>& lanes) {
  using A = Acc<T>;
  int64_t offset[N];
  Mask<A> flip[N];
  LanePeak<A> at[N];
  for (int j = 0; j < N; ++j) {
    offset[j] = group_begin<A>(group + j, chunk.channels);
    flip[j] = flip_of<A>(lanes.sign[group + j]);
  }
  peaks_and_segments<kCounts, T, N>(chunk, offset, flip, at);
  Falloff<Vec<A>> of[N];
  Moments<A, Vec<A>> more[N];
  for (int j = 0; j < N; ++j) {
    const Vec<A> scale = lanes.scale[group + j];
    of[j] = {lanes.sign[group + j], at[j].peak, scale, Exp2Constants<A>::kLowest / scale};
    Mask<A> earlier = {};
    more[j] = empty_moments<A, Vec<A>>();
    more[j].peak = at[j].peak;
    if (!chunk.first) {
      const Moments<A, Vec<A>>& state = lanes.state[group + j];
      earlier = at[j].peak < state.peak;
      more[j].at_x = state.at_x, more[j].at_y = state.at_y;
    }
    place_peaks<kCounts>(chunk, offset[j], flip[j], at[j], earlier, more[j]);
  }
  Vec<A> y = splat(chunk.y0);
  for (int64_t r = 0; r < chunk.rows; ++r, y += A(1)) {
    Vec<A> row[N] = {}, row_x[N] = {}, row_xx[N] = {}, distances[N] = {};
    const auto pixel = [&](const T* p, Vec<A> x, const PixelBit<A>& bit, const T* next) __attribute__((always_inline)) {
      for (int j = 0; j < N; ++j) {
        const Vec<A> dx = x - more[j].at_x;
        const Vec<A> d = counted<kCounts, A>(bit, offset[j], distance(load(p + offset[j]), of[j]));
        Vec<A> w[1] = {d};
        exp2<A, 1>(w, of[j].scale);
        w[0] = counted<kCounts, A>(bit, offset[j], w[0]);
        fetch_ahead<kCounts>(chunk, next, offset[j], j);
        const Vec<A> weighed = w[0] * dx;
        row[j] += w[0];
        row_x[j] += weighed;
        row_xx[j] += weighed * dx;
        distances[j] += w[0] * d;
      }
    };
    for_pixels<kCounts>(chunk, r, 0, pixels_of_row<kCounts>(chunk, r), pixel);
    for (int j = 0; j < N; ++j) {
      const Vec<A> dy = y - more[j].at_y, weighed = row[j] * dy;
      more[j].sum += row[j];
      more[j].x += row_x[j];
      more[j].y += weighed;
      more[j].xx += row_xx[j];
      more[j].xy += row_x[j] * dy;
      more[j].yy += weighed * dy;
      more[j].distance += distances[j];
    }
  }
  for (int j = 0; j < N; ++j) {
    Moments<A, Vec<A>>& state = lanes.state[group + j];
    state = chunk.first ? more[j] : merge(state, more[j], lanes.scale[group + j], VectorExp2{});
  }
}

}  // namespace kpfused::cpu::KPFUSED_ISA
