// SPDX-License-Identifier: MIT
// The sums of one chunk where lanes are channels (stride_inner == 1, channels_last): every lane holds another map.
//
// The same sums as sums_rows.h and the same bytes. Per vector and pixel: the weight, an addition to the sum of the
// row, and a multiply-add with x; y costs one multiplication a row. Lanes never mix. The last vector of channels
// overlaps the one before it, whose lanes it repeats bit by bit; fewer channels than lanes are copied to a padded
// buffer first, a chunk at a time.
#pragma once

#include "lanes.h"

namespace kpfused::cpu::KPFUSED_ISA {

template <class T>
struct LanesChunk {
  using A = Acc<T>;
  const T* p;
  int64_t stride_y, stride_x, rows, cols;
  A x0, y0;
  int64_t ahead;
  int64_t channels;  // at least one vector of them
  bool first;        // no state to merge with yet
  PixelMask mask;
};

// S: State or Moments of vectors.
template <class A, class S>
struct LaneStates {
  Vec<A> sign[kGroups<A>], scale[kGroups<A>];
  S state[kGroups<A>];
};

// The sign of beta as bits: a logit's key is the logit with them changed.
template <class A>
KPFUSED_INLINE Mask<A> flip_of(Vec<A> sign) {
  return (Mask<A>)sign & (Mask<A>)splat(A(-0.0));
}
template <class A>
KPFUSED_INLINE Vec<A> key(Vec<A> logit, Mask<A> flip) {
  return (Vec<A>)((Mask<A>)logit ^ flip);
}

template <class T, int N>
KPFUSED_INLINE void peaks_of_lanes(const LanesChunk<T>& chunk, const int64_t (&offset)[N],
                                   const Mask<Acc<T>> (&flip)[N], Vec<Acc<T>> (&peak)[N]) {
  using A = Acc<T>;
  for (int j = 0; j < N; ++j) peak[j] = splat(Limits<A>::lowest);
  for (int64_t r = 0; r < chunk.rows; ++r) {
    const T* p = chunk.p + r * chunk.stride_y;
    const uint8_t* const mask = chunk.mask.row(r);
    for (int64_t c = 0; c < chunk.cols; ++c, p += chunk.stride_x) {
      if (!chunk.mask.at(mask, c)) continue;
      for (int j = 0; j < N; ++j) {
        peak[j] = maximum(key<A>(load(p + offset[j]), flip[j]), peak[j]);
      }
    }
  }
}

// N vectors of channels over all pixels of a chunk.
template <class T, int N>
void lane_sums(const LanesChunk<T>& chunk, int64_t group, LaneStates<Acc<T>, State<Vec<Acc<T>>>>& lanes) {
  using A = Acc<T>;
  int64_t offset[N];
  Mask<A> flip[N];
  Vec<A> peak[N], sum[N] = {}, sum_x[N] = {}, sum_y[N] = {};
  Falloff<Vec<A>> of[N];
  for (int j = 0; j < N; ++j) {
    offset[j] = group_begin<A>(group + j, chunk.channels);
    flip[j] = flip_of<A>(lanes.sign[group + j]);
  }
  peaks_of_lanes<T, N>(chunk, offset, flip, peak);
  for (int j = 0; j < N; ++j) {
    const Vec<A> scale = lanes.scale[group + j];
    of[j] = {lanes.sign[group + j], peak[j], scale, Exp2Constants<A>::kLowest / scale};
  }
  Vec<A> y = splat(chunk.y0);
  for (int64_t r = 0; r < chunk.rows; ++r, y += A(1)) {
    const T* p = chunk.p + r * chunk.stride_y;
    const uint8_t* const mask = chunk.mask.row(r);
    Vec<A> row[N] = {}, row_x[N] = {}, x = splat(chunk.x0);
    for (int64_t c = 0; c < chunk.cols; ++c, p += chunk.stride_x, x += A(1)) {
      if (!chunk.mask.at(mask, c)) continue;
      for (int j = 0; j < N; ++j) {
        const Vec<A> w = weight(p + offset[j], of[j]);
        if (j * kLanes<A> * int(sizeof(T)) % 64 == 0) prefetch(p + offset[j], chunk.ahead);
        row[j] += w;
        row_x[j] += w * x;
      }
    }
    for (int j = 0; j < N; ++j) {
      sum[j] += row[j];
      sum_x[j] += row_x[j];
      sum_y[j] += row[j] * y;
    }
  }
  for (int j = 0; j < N; ++j) {
    const State<Vec<A>> more = {peak[j], sum[j], sum_x[j], sum_y[j]};
    State<Vec<A>>& state = lanes.state[group + j];
    state = chunk.first ? more : merge(state, more, lanes.scale[group + j], VectorExp2{});
  }
}

}  // namespace kpfused::cpu::KPFUSED_ISA
