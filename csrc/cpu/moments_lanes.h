// SPDX-License-Identifier: MIT
// Forward with moments where lanes are channels: the sums of moments_rows.h, every lane about the peak of its own map.
//
// Beside what sums_lanes.h spends on a vector: two additions, a multiplication and two multiply-adds; and a comparison
// and two selections for eight of them, since the first reading keeps the segment of the peak, in which it is then found.
#pragma once

#include "sums_lanes.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Pixels of a row that the search for the peak takes as one.
constexpr int64_t kSegment = 8;

// The peak of every lane, and the first segment of the chunk that has it.
template <class A>
struct LanePeak {
  Vec<A> peak, segment;
};

template <class T, int N>
KPFUSED_INLINE void peaks_and_segments(const LanesChunk<T>& chunk, const int64_t (&offset)[N],
                                       const Mask<Acc<T>> (&flip)[N], LanePeak<Acc<T>> (&at)[N]) {
  using A = Acc<T>;
  for (int j = 0; j < N; ++j) at[j] = {splat(Limits<A>::lowest), splat(kNowhere<A>)};
  Vec<A> segment = {};
  for (int64_t r = 0; r < chunk.rows; ++r) {
    const T* p = chunk.p + r * chunk.stride_y;
    for (int64_t c = 0; c < chunk.cols; c += kSegment, segment += A(1)) {
      Vec<A> top[N];
      for (int j = 0; j < N; ++j) top[j] = splat(Limits<A>::lowest);
      for (const T* const end = p + at_most(kSegment, chunk.cols - c) * chunk.stride_x; p != end; p += chunk.stride_x) {
        for (int j = 0; j < N; ++j) top[j] = maximum(key<A>(load(p + offset[j]), flip[j]), top[j]);
      }
      for (int j = 0; j < N; ++j) {
        const Mask<A> higher = top[j] > at[j].peak;
        at[j] = {higher ? top[j] : at[j].peak, higher ? segment : at[j].segment};
      }
    }
  }
}

// Makes the pixels of the peaks what the sums are about, except where an earlier chunk has a higher one.
template <class T>
KPFUSED_INLINE void place_peaks(const LanesChunk<T>& chunk, int64_t offset, const Mask<Acc<T>>& flip,
                                const LanePeak<Acc<T>>& peak, const Mask<Acc<T>>& earlier,
                                Moments<Acc<T>, Vec<Acc<T>>>& m) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const uint32_t segments = uint32_t(ceil_div(chunk.cols, kSegment));
  A x[L], y[L];
  store_vector(x, m.at_x), store_vector(y, m.at_y);
  for (int i = 0; i < L; ++i) {
    if (earlier[i]) continue;
    x[i] = y[i] = kNowhere<A>;
    if (!(peak.segment[i] < kNowhere<A>)) continue;
    const uint32_t segment = uint32_t(peak.segment[i]), row = segment / segments;
    const int64_t first = (segment - row * segments) * kSegment, count = at_most(kSegment, chunk.cols - first);
    // All columns, the first last: how far it is to the peak could not be predicted.
    const T* p = chunk.p + row * chunk.stride_y + (first + count) * chunk.stride_x + offset;
    Vec<A> col = {}, back = splat(A(count));
    for (int64_t c = 0; c < count; ++c) {
      p -= chunk.stride_x, back -= A(1);
      col = key<A>(load(p), flip) == peak.peak ? back : col;
    }
    A cols[L];
    store_vector(cols, col);
    x[i] = chunk.x0 + (A(first) + cols[i]);
    y[i] = chunk.y0 + A(row);
  }
  m.at_x = load_vector(x), m.at_y = load_vector(y);
}

// N vectors of channels over all pixels of a chunk.
template <class T, int N>
void lane_moments(const LanesChunk<T>& chunk, int64_t group, LaneStates<Acc<T>, Moments<Acc<T>, Vec<Acc<T>>>>& lanes) {
  using A = Acc<T>;
  int64_t offset[N];
  Mask<A> flip[N];
  LanePeak<A> at[N];
  for (int j = 0; j < N; ++j) {
    offset[j] = group_begin<A>(group + j, chunk.channels);
    flip[j] = flip_of<A>(lanes.sign[group + j]);
  }
  peaks_and_segments<T, N>(chunk, offset, flip, at);
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
    place_peaks(chunk, offset[j], flip[j], at[j], earlier, more[j]);
  }
  Vec<A> y = splat(chunk.y0);
  for (int64_t r = 0; r < chunk.rows; ++r, y += A(1)) {
    const T* p = chunk.p + r * chunk.stride_y;
    Vec<A> row[N] = {}, row_x[N] = {}, row_xx[N] = {}, distances[N] = {}, dx[N];
    for (int j = 0; j < N; ++j) dx[j] = chunk.x0 - more[j].at_x;
    for (int64_t c = 0; c < chunk.cols; ++c, p += chunk.stride_x) {
      for (int j = 0; j < N; ++j) {
        const Vec<A> d = distance(load(p + offset[j]), of[j]);
        Vec<A> w[1] = {d};
        exp2<A, 1>(w, of[j].scale);
        if (j * kLanes<A> * int(sizeof(T)) % 64 == 0) prefetch(p + offset[j], chunk.ahead);
        const Vec<A> weighed = w[0] * dx[j];
        row[j] += w[0];
        row_x[j] += weighed;
        row_xx[j] += weighed * dx[j];
        distances[j] += w[0] * d;
        dx[j] += A(1);
      }
    }
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
