// SPDX-License-Identifier: MIT
// Forward where lanes are channels (stride_inner == 1, channels_last): every lane holds another map.
//
// The same sums as forward_rows.h and the same bytes. Per vector and pixel: the weight, an addition to the sum of the
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
};

template <class A>
struct LaneStates {
  Vec<A> sign[kGroups<A>], scale[kGroups<A>];
  State<Vec<A>> state[kGroups<A>];
};

template <class T, int N>
KPFUSED_INLINE void peaks_of_lanes(const LanesChunk<T>& chunk, const int64_t (&offset)[N],
                                   const Mask<Acc<T>> (&flip)[N], Vec<Acc<T>> (&peak)[N]) {
  using A = Acc<T>;
  for (int j = 0; j < N; ++j) peak[j] = splat(Limits<A>::lowest);
  for (int64_t r = 0; r < chunk.rows; ++r) {
    const T* p = chunk.p + r * chunk.stride_y;
    for (int64_t c = 0; c < chunk.cols; ++c, p += chunk.stride_x) {
      for (int j = 0; j < N; ++j) {
        peak[j] = maximum((Vec<A>)((Mask<A>)load(p + offset[j]) ^ flip[j]), peak[j]);
      }
    }
  }
}

// N vectors of channels over all pixels of a chunk.
template <class T, int N>
void forward_lanes_block(const LanesChunk<T>& chunk, int64_t group, LaneStates<Acc<T>>& lanes) {
  using A = Acc<T>;
  int64_t offset[N];
  Mask<A> flip[N];
  Vec<A> peak[N], sum[N] = {}, sum_x[N] = {}, sum_y[N] = {};
  Falloff<Vec<A>> of[N];
  for (int j = 0; j < N; ++j) {
    offset[j] = group_begin<A>(group + j, chunk.channels);
    flip[j] = (Mask<A>)lanes.sign[group + j] & (Mask<A>)splat(A(-0.0));
  }
  peaks_of_lanes<T, N>(chunk, offset, flip, peak);
  for (int j = 0; j < N; ++j) {
    const Vec<A> scale = lanes.scale[group + j];
    of[j] = {lanes.sign[group + j], peak[j], scale, Exp2Constants<A>::kLowest / scale};
  }
  Vec<A> y = splat(chunk.y0);
  for (int64_t r = 0; r < chunk.rows; ++r, y += A(1)) {
    const T* p = chunk.p + r * chunk.stride_y;
    Vec<A> row[N] = {}, row_x[N] = {}, x = splat(chunk.x0);
    for (int64_t c = 0; c < chunk.cols; ++c, p += chunk.stride_x, x += A(1)) {
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

template <class T>
void forward_lanes_chunk(const LanesChunk<T>& chunk, LaneStates<Acc<T>>& lanes) {
  const int64_t groups = ceil_div(chunk.channels, kLanes<Acc<T>>);
  int64_t g = 0;
  for (; g + 4 <= groups; g += 4) forward_lanes_block<T, 4>(chunk, g, lanes);
  if (groups - g == 3) forward_lanes_block<T, 3>(chunk, g, lanes);
  if (groups - g == 2) forward_lanes_block<T, 2>(chunk, g, lanes);
  if (groups - g == 1) forward_lanes_block<T, 1>(chunk, g, lanes);
}

// The forward of one thread's range of (outer, part, block of channels).
template <class T>
class ForwardLanes {
 public:
  using A = Acc<T>;

  explicit ForwardLanes(const ForwardParams& params)
      : params_(params), view_(params.view), parts_(part_tiling(view_)), blocks_(channel_blocks(view_.inner)) {}

  void run(int64_t begin, int64_t end) const {
    const int64_t parts = parts_.count();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item % blocks_.count, part = item / blocks_.count % parts;
      const int64_t outer = item / blocks_.count / parts;
      const int64_t first = blocks_.begin(block), channels = blocks_.begin(block + 1) - first;
      LaneStates<A> lanes;
      load_beta(outer * view_.inner + first, channels, lanes);
      const int64_t then = at_most(item + 1, end - 1);
      run_part(origin(outer, part, first),
               origin(then / blocks_.count / parts, then / blocks_.count % parts, blocks_.begin(then % blocks_.count)),
               part, channels, lanes);
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t map = outer * view_.inner + first + c;
        const State<A> state = state_of(lanes, c, channels);
        parts == 1 ? write_result(params_, map, state) : write_state(params_, map * parts + part, state);
      }
    }
  }

 private:
  // Lanes beyond the channels of a padded buffer get a beta of one.
  void load_beta(int64_t map, int64_t channels, LaneStates<A>& lanes) const {
    constexpr int L = kLanes<A>;
    const int64_t padded = at_least(channels, L), groups = ceil_div(padded, L);
    Sharpness<A> sharp = sharpness(params_.beta.values ? A(1) : A(params_.beta.value));
    for (int64_t g = 0; g < groups; ++g) {
      A sign[L], scale[L];
      for (int i = 0; i < L; ++i) {
        const int64_t c = group_begin<A>(g, padded) + i;
        if (params_.beta.values && c < channels) sharp = sharpness(beta_of<A>(params_.beta, map + c));
        sign[i] = sharp.sign, scale[i] = sharp.scale;
      }
      lanes.sign[g] = load_vector(sign);
      lanes.scale[g] = load_vector(scale);
    }
  }

  static State<A> state_of(const LaneStates<A>& lanes, int64_t c, int64_t channels) {
    const int64_t padded = at_least(channels, kLanes<A>), g = c / kLanes<A>, i = c - group_begin<A>(g, padded);
    const State<Vec<A>>& s = lanes.state[g];
    return {s.peak[i], s.sum[i], s.sum_x[i], s.sum_y[i]};
  }

  const T* origin(int64_t outer, int64_t part, int64_t first) const {
    const int64_t row = parts_.y.begin(part / parts_.x.count), col = parts_.x.begin(part % parts_.x.count);
    return static_cast<const T*>(params_.heatmap) + outer * view_.stride_outer + first * view_.stride_inner +
           row * view_.stride_y + col * view_.stride_x;
  }

  // `next` is where the item after this one begins.
  void run_part(const T* base, const T* next, int64_t part, int64_t channels, LaneStates<A>& lanes) const {
    constexpr int L = kLanes<A>;
    const int64_t i = part / parts_.x.count, j = part % parts_.x.count;
    const bool pad = channels < L;
    const Tiling chunks = lane_chunks<T>(parts_.y.size(i), parts_.x.size(j), channels);
    const auto begin = [&](int64_t n) {
      return n == chunks.count() ? next
                                 : base + chunks.y.begin(n / chunks.x.count) * view_.stride_y +
                                       chunks.x.begin(n % chunks.x.count) * view_.stride_x;
    };
    T buffer[kGatherBytes / sizeof(T)];
    if (pad) __builtin_memset(buffer, 0, sizeof(buffer));
    for (int64_t n = 0; n < chunks.count(); ++n) {
      const int64_t ci = n / chunks.x.count, cj = n % chunks.x.count;
      LanesChunk<T> chunk = {begin(n),
                             view_.stride_y,
                             view_.stride_x,
                             chunks.y.size(ci),
                             chunks.x.size(cj),
                             centred<A>(parts_.x.begin(j) + chunks.x.begin(cj), view_.width),
                             centred<A>(parts_.y.begin(i) + chunks.y.begin(ci), view_.height),
                             (begin(n + 1) - begin(n)) * int64_t(sizeof(T)),
                             channels,
                             n == 0};
      if (pad) pad_channels(chunk, buffer);
      forward_lanes_chunk(chunk, lanes);
    }
  }

  static void pad_channels(LanesChunk<T>& chunk, T* buffer) {
    constexpr int L = kLanes<A>;
    copy_pixels(chunk.p, chunk.stride_y, chunk.stride_x, buffer, chunk.cols * L, L, chunk.rows, chunk.cols,
                chunk.channels);
    chunk.p = buffer, chunk.stride_x = L, chunk.stride_y = chunk.cols * L, chunk.channels = L, chunk.ahead = 0;
  }

  const ForwardParams& params_;
  const MapView& view_;
  Tiling parts_;
  ChannelBlocks blocks_;
};

}  // namespace kpfused::cpu::KPFUSED_ISA
