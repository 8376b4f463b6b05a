// SPDX-License-Identifier: MIT
// channels_last maps (stride_inner == 1): the keypoints of a pixel are neighbours in memory.
//
// A block takes one image, or one part of its rows, and of its channels all or one tile. Threads lie over it as
// groups (vectors along the channels) x tx x ty (pixels), so that a row of them reads one contiguous span; each thread
// keeps its channels and its column while it walks down the rows, `items` loads at a time. x weighs a column's sum
// once, y costs one multiply an element. One read of the map forward, one read and one write backward, no copy.
#pragma once

#include "rows.h"

namespace kpfused::cuda {

// Blocks a multiprocessor holds, which bounds a thread's registers: 128, or as many as there are where it would spill.
template <class T, int V, bool kBeta>
constexpr int kChannelBlocks = sizeof(Acc<T>) == 8 || (kBeta && V == 8) ? 1 : 2;

// The part of an image that a block takes, and the thread's place in it.
struct ChannelsPart {
  int64_t image, part;
  int64_t channel;           // first of the thread's V
  int64_t row, row_end, column;
  int pixel;                 // rank among the threads of the same channels
  bool active;
};

KPFUSED_DEVICE ChannelsPart channels_part(const Plan& plan, const MapView& view) {
  ChannelsPart part;
  const int64_t block = blockIdx.x;
  part.part = block % plan.parts_y;
  const int64_t tile = block / plan.parts_y % plan.tiles;
  part.image = block / plan.parts_y / plan.tiles;
  const int group = threadIdx.x % plan.groups;
  part.pixel = threadIdx.x / plan.groups;
  part.channel = (tile * plan.groups + group) * plan.vector;
  const int64_t top = part.part * plan.rows_per_part;
  part.row_end = top + plan.rows_per_part < view.height ? top + plan.rows_per_part : view.height;
  part.row = top + part.pixel / plan.tx;
  part.column = part.pixel % plan.tx;
  part.active = part.pixel < plan.tx * plan.ty && part.channel < view.inner;
  return part;
}

// One thread's channels in one column: running sums relative to a running peak, each its own.
template <class A, int V>
struct Channels {
  A peak[V], sum[V], sum_x[V], sum_y[V];

  KPFUSED_DEVICE void clear() {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      peak[j] = Limits<A>::lowest;
      sum[j] = sum_x[j] = sum_y[j] = 0;
    }
  }
};

template <class T, int V>
KPFUSED_DEVICE void channels_states(const T* image, const ChannelsPart& part, const MapView& view, const Plan& plan,
                                    const Sharpness<Acc<T>> (&beta)[V], Channels<Acc<T>, V>& all) {
  using A = Acc<T>;
  constexpr int N = kItems<T, V>;
  const int64_t step = plan.ty * view.stride_y;
  for (int64_t column = part.column; column < view.width; column += plan.tx) {
    A sum[V];
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] = 0;
    const T* p = image + part.row * view.stride_y + column * view.stride_x + part.channel;
    A y = centred<A>(part.row, view.height);
    const A x = centred<A>(column, view.width);
    for (int rows = static_cast<int>(part.row_end - part.row); rows > 0; rows -= N * plan.ty) {
      Pack<T, V> pack[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i * plan.ty < rows) pack[i] = load<T, V>(p + i * step);
      }
#pragma unroll
      for (int j = 0; j < V; ++j) {
        A key[N], top = all.peak[j];
#pragma unroll
        for (int i = 0; i < N; ++i) {
          key[i] = i * plan.ty < rows ? widen(pack[i].value[j]) * beta[j].sign : -INFINITY;
          top = larger(top, key[i]);
        }
        const A lower = Exp2{}((all.peak[j] - top) * beta[j].scale);
        all.peak[j] = top;
        sum[j] *= lower;
        all.sum[j] *= lower;
        all.sum_x[j] *= lower;
        all.sum_y[j] *= lower;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const A w = Exp2{}((key[i] - top) * beta[j].scale);
          sum[j] += w;
          all.sum_y[j] += w * (y + static_cast<A>(i * plan.ty));
        }
      }
      p += N * step;
      y += static_cast<A>(N * plan.ty);
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      all.sum[j] += sum[j];
      all.sum_x[j] += sum[j] * x;
    }
  }
}

// A tree over the pixels of each channel, in shared memory: [pixel][group][V] states. Result in pixel 0.
template <class S, int V, class Op>
KPFUSED_DEVICE void reduce_pixels(S (&s)[V], const ChannelsPart& part, const Plan& plan, S* shared, const Op (&op)[V]) {
  const int pixels = plan.tx * plan.ty;
  S* const mine = shared + static_cast<int>(threadIdx.x) * V;
  int half = 1;
  while (half < pixels) half *= 2;
#pragma unroll
  for (int j = 0; j < V; ++j) mine[j] = s[j];
  __syncthreads();
  for (half /= 2; half > 0; half /= 2) {
    if (part.pixel < half && part.pixel + half < pixels) {
#pragma unroll
      for (int j = 0; j < V; ++j) mine[j] = s[j] = op[j](s[j], mine[half * plan.groups * V + j]);
    }
    __syncthreads();
  }
}

// Bytes: reads the image once, writes 6 numbers a map.
template <class T, int V>
__global__ void __launch_bounds__(plan_detail::kChannelThreads, kChannelBlocks<T, V, false>)
    channels_forward(Launch<ForwardParams> launch) {
  const auto& [p, plan] = launch;
  using A = Acc<T>;
  KPFUSED_SHARED(State<A>, shared);
  const ChannelsPart part = channels_part(plan, p.view);
  const int64_t n = part.image * p.view.inner + part.channel;
  Sharpness<A> beta[V];
  Merge<A> op[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    beta[j] = sharpness(beta_of<A>(p.beta, part.active ? n + j : 0));
    op[j].scale = beta[j].scale;
  }
  Channels<A, V> all;
  all.clear();
  if (part.active) {
    channels_states<T, V>(static_cast<const T*>(p.heatmap) + part.image * p.view.stride_outer, part, p.view, plan, beta,
                          all);
  }
  State<A> state[V];
#pragma unroll
  for (int j = 0; j < V; ++j) state[j] = {all.peak[j], all.sum[j], all.sum_x[j], all.sum_y[j]};
  reduce_pixels(state, part, plan, shared, op);
  if (part.pixel != 0 || !part.active) return;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (plan.parts() > 1) {
      static_cast<State<A>*>(p.workspace)[(n + j) * plan.parts() + part.part] = state[j];
    } else {
      write_map(p, n + j, state[j]);
    }
  }
}

template <class T, int V, bool kBeta>
KPFUSED_DEVICE void channels_gradient(const T* image, T* out, const ChannelsPart& part, const BackwardParams& p,
                                      const Plan& plan, const MapSlope<Acc<T>> (&at)[V], Acc<T> (&dbeta)[V]) {
  using A = Acc<T>;
  constexpr int N = kItems<T, V>;
  const int64_t step = plan.ty * p.view.stride_y, out_step = plan.ty * p.grad_view.stride_y;
  for (int64_t column = part.column; column < p.view.width; column += plan.tx) {
    const A x = centred<A>(column, p.view.width);
    A along_x[V];
#pragma unroll
    for (int j = 0; j < V; ++j) along_x[j] = at[j].slope.along_x(x);
    const T* from = image + part.row * p.view.stride_y + column * p.view.stride_x + part.channel;
    T* to = out + part.row * p.grad_view.stride_y + column * p.grad_view.stride_x + part.channel;
    A y = centred<A>(part.row, p.view.height);
    for (int rows = static_cast<int>(part.row_end - part.row); rows > 0; rows -= N * plan.ty) {
      Pack<T, V> pack[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i * plan.ty < rows) pack[i] = load<T, V>(from + i * step);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i * plan.ty >= rows) continue;
        A dh[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const A q = along_x[j] + at[j].slope.along_y(y + static_cast<A>(i * plan.ty));
          dh[j] = gradient<kBeta>(widen(pack[i].value[j]) * at[j].sharp.sign, q, at[j], dbeta[j]);
        }
        store<T, V>(to + i * out_step, narrow(dh, T{}));
      }
      from += N * step;
      to += N * out_step;
      y += static_cast<A>(N * plan.ty);
    }
  }
}

// Bytes: reads the image once, writes its gradient once.
template <class T, int V, bool kBeta>
__global__ void __launch_bounds__(plan_detail::kChannelThreads, kChannelBlocks<T, V, kBeta>)
    channels_backward(Launch<BackwardParams> launch) {
  const auto& [p, plan] = launch;
  using A = Acc<T>;
  const ChannelsPart part = channels_part(plan, p.view);
  const int64_t n = part.image * p.view.inner + part.channel;
  MapSlope<A> at[V];
  A dbeta[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    at[j] = map_slope<A>(p, part.active ? n + j : 0, kBeta);
    dbeta[j] = 0;
  }
  if (part.active) {
    channels_gradient<T, V, kBeta>(static_cast<const T*>(p.heatmap) + part.image * p.view.stride_outer,
                                   static_cast<T*>(p.grad_heatmap) + part.image * p.grad_view.stride_outer, part, p,
                                   plan, at, dbeta);
  }
  if (!kBeta) return;
  KPFUSED_SHARED(A, shared);
  const Add<A> op[V] = {};
  reduce_pixels(dbeta, part, plan, shared, op);
  if (part.pixel != 0 || !part.active) return;
  A* const target = static_cast<A*>(plan.parts() > 1 ? p.workspace : p.grad_beta);
#pragma unroll
  for (int j = 0; j < V; ++j) target[(n + j) * plan.parts() + part.part] = dbeta[j] * at[j].sharp.sign;
}

}  // namespace kpfused::cuda
