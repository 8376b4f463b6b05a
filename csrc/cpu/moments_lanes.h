// SPDX-License-Identifier: MIT
// Forward with moments where lanes are channels: the sums of moments_rows.h, every lane about the peak of its own map.
//
// Beside what sums_lanes.h spends on a vector: a comparison and two selections in the search for the peak, then an
// addition and three multiply-adds.
#pragma once

#include "sums_lanes.h"

namespace kpfused::cpu::KPFUSED_ISA {

// The peak of every lane, and the first pixel that has it.
template <class A>
struct LanePeak {
  Vec<A> peak, x, y;
};

template <class T, int N>
KPFUSED_INLINE void find_peaks_of_lanes(const LanesChunk<T>& chunk, const int64_t (&offset)[N],
                                        const Vec<Acc<T>> (&sign)[N], LanePeak<Acc<T>> (&at)[N]) {
  using A = Acc<T>;
  for (int j = 0; j < N; ++j) at[j] = {splat(Limits<A>::lowest), splat(kNowhere<A>), splat(kNowhere<A>)};
  Vec<A> y = splat(chunk.y0);
  for (int64_t r = 0; r < chunk.rows; ++r, y += A(1)) {
    const T* p = chunk.p + r * chunk.stride_y;
    Vec<A> x = splat(chunk.x0);
    for (int64_t c = 0; c < chunk.cols; ++c, p += chunk.stride_x, x += A(1)) {
      for (int j = 0; j < N; ++j) {
        const Vec<A> key = load(p + offset[j]) * sign[j];
        const Mask<A> higher = key > at[j].peak;
        at[j] = {higher ? key : at[j].peak, higher ? x : at[j].x, higher ? y : at[j].y};
      }
    }
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
  find_peaks_of_lanes<T, N>(chunk, offset, sign, at);
  Falloff<Vec<A>> of[N];
  Moments<A, Vec<A>> more[N];
  for (int j = 0; j < N; ++j) {
    const Vec<A> scale = lanes.scale[group + j];
    of[j] = {sign[j], at[j].peak, scale, Exp2Constants<A>::kLowest / scale};
    more[j] = empty_moments<A, Vec<A>>();
    more[j].peak = at[j].peak;
    // About the higher peak, found earlier or here.
    const Moments<A, Vec<A>>& state = lanes.state[group + j];
    const Mask<A> lower = chunk.first ? Mask<A>{} : at[j].peak < state.peak;
    more[j].at_x = lower ? state.at_x : at[j].x;
    more[j].at_y = lower ? state.at_y : at[j].y;
  }
  Vec<A> y = splat(chunk.y0);
  for (int64_t r = 0; r < chunk.rows; ++r, y += A(1)) {
    const T* p = chunk.p + r * chunk.stride_y;
    Vec<A> row[N] = {}, row_x[N] = {}, x = splat(chunk.x0);
    for (int64_t c = 0; c < chunk.cols; ++c, p += chunk.stride_x, x += A(1)) {
      for (int j = 0; j < N; ++j) {
        const Vec<A> d = distance(load(p + offset[j]), of[j]), dx = x - more[j].at_x;
        Vec<A> w[1] = {d};
        exp2<A, 1>(w, of[j].scale);
        if (j * kLanes<A> * int(sizeof(T)) % 64 == 0) prefetch(p + offset[j], chunk.ahead);
        const Vec<A> weighed = w[0] * dx;
        row[j] += w[0];
        row_x[j] += weighed;
        more[j].xx += weighed * dx;
        more[j].distance += w[0] * d;
      }
    }
    for (int j = 0; j < N; ++j) {
      const Vec<A> dy = y - more[j].at_y, weighed = row[j] * dy;
      more[j].sum += row[j];
      more[j].x += row_x[j];
      more[j].y += weighed;
      more[j].xy += row_x[j] * dy;
      more[j].yy += weighed * dy;
    }
  }
  for (int j = 0; j < N; ++j) {
    Moments<A, Vec<A>>& state = lanes.state[group + j];
    state = chunk.first ? more[j] : merge(state, more[j], lanes.scale[group + j], VectorExp2{});
  }
}

}  // namespace kpfused::cpu::KPFUSED_ISA
