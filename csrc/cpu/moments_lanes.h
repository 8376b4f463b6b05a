// SPDX-License-Identifier: MIT
// Forward with moments where lanes are channels: the sums of moments_rows.h, every lane about the peak of its own map.
//
// Beside what sums_lanes.h spends on a vector: two additions, a multiplication and two multiply-adds; the search for the
// peak is once a row.
#pragma once

#include "sums_lanes.h"

namespace kpfused::cpu::KPFUSED_ISA {

// The peak of every lane, and the first row of the chunk that has it.
template <class A>
struct LanePeak {
  Vec<A> peak, row;
};

template <class T, int N>
KPFUSED_INLINE void peaks_and_rows(const LanesChunk<T>& chunk, const int64_t (&offset)[N], const Vec<Acc<T>> (&sign)[N],
                                   LanePeak<Acc<T>> (&at)[N]) {
  using A = Acc<T>;
  for (int j = 0; j < N; ++j) at[j] = {splat(Limits<A>::lowest), splat(kNowhere<A>)};
  Vec<A> row = {};
  for (int64_t r = 0; r < chunk.rows; ++r, row += A(1)) {
    const T* p = chunk.p + r * chunk.stride_y;
    Vec<A> top[N];
    for (int j = 0; j < N; ++j) top[j] = splat(Limits<A>::lowest);
    for (int64_t c = 0; c < chunk.cols; ++c, p += chunk.stride_x) {
      for (int j = 0; j < N; ++j) top[j] = maximum(load(p + offset[j]) * sign[j], top[j]);
    }
    for (int j = 0; j < N; ++j) {
      const Mask<A> higher = top[j] > at[j].peak;
      at[j] = {higher ? top[j] : at[j].peak, higher ? row : at[j].row};
    }
  }
}

// Makes the pixels of the peaks what the sums are about, except where an earlier chunk has a higher one.
template <class T>
KPFUSED_INLINE void place_peaks(const LanesChunk<T>& chunk, int64_t offset, Vec<Acc<T>> sign,
                                const LanePeak<Acc<T>>& peak, const Mask<Acc<T>>& earlier,
                                Moments<Acc<T>, Vec<Acc<T>>>& m) {
  using A = Acc<T>;
  for (int i = 0; i < kLanes<A>; ++i) {
    if (earlier[i]) continue;
    m.at_x[i] = m.at_y[i] = kNowhere<A>;
    if (!(peak.row[i] < kNowhere<A>)) continue;
    Mask<A> lane = {};
    lane[i] = -1;
    const T* p = chunk.p + int64_t(peak.row[i]) * chunk.stride_y + offset;
    int64_t c = 0;
    while (!any<A>((load(p + c * chunk.stride_x) * sign == peak.peak) & lane)) ++c;
    m.at_x[i] = chunk.x0 + A(c);
    m.at_y[i] = chunk.y0 + peak.row[i];
  }
}

// N vectors of channels over all pixels of a chunk.
template <class T, int N>
void lane_moments(const LanesChunk<T>& chunk, int64_t group, LaneStates<Acc<T>, Moments<Acc<T>, Vec<Acc<T>>>>& lanes) {
  using A = Acc<T>;
  int64_t offset[N];
  Vec<A> sign[N];
  LanePeak<A> at[N];
  for (int j = 0; j < N; ++j) offset[j] = group_begin<A>(group + j, chunk.channels), sign[j] = lanes.sign[group + j];
  peaks_and_rows<T, N>(chunk, offset, sign, at);
  Falloff<Vec<A>> of[N];
  Moments<A, Vec<A>> more[N];
  for (int j = 0; j < N; ++j) {
    const Vec<A> scale = lanes.scale[group + j];
    of[j] = {sign[j], at[j].peak, scale, Exp2Constants<A>::kLowest / scale};
    Mask<A> earlier = {};
    more[j] = empty_moments<A, Vec<A>>();
    more[j].peak = at[j].peak;
    if (!chunk.first) {
      const Moments<A, Vec<A>>& state = lanes.state[group + j];
      earlier = at[j].peak < state.peak;
      more[j].at_x = state.at_x, more[j].at_y = state.at_y;
    }
    place_peaks(chunk, offset[j], sign[j], at[j], earlier, more[j]);
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
