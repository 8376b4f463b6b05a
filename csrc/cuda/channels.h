// SPDX-License-Identifier: MIT
// channels_last maps (stride_inner == 1): the keypoints of a pixel are neighbours in memory.
//
// A block takes one image, or one part of it, and of its channels all or one tile. Threads lie over it as
// groups (vectors along the channels) x tx x ty (pixels), so that a row of them reads one contiguous span; each thread
// keeps its channels and its column while it walks down the rows, `items` loads at a time. x weighs a column's sum
// once, y costs one multiply an element. One read of the map forward, one read and one write backward, no copy.
#pragma once

#include "rows.h"

namespace kpfused::cuda {

// Blocks a multiprocessor holds, which bounds a thread's registers: 128, or as many as there are where it would spill.
template <class T, int V, bool kBeta>
constexpr int kChannelBlocks = sizeof(Acc<T>) == 8 || (kBeta && V == 8) ? 1 : 2;

// The part of an image that a block takes, and the thread's place in it. As in RowsPart, 32 bits count within a part.
struct ChannelsPart {
  int64_t image, part;
  int64_t channel;    // first of the thread's V
  int64_t top, left;  // the thread's first row and column in the image
  int rows, columns;  // from there to the end of the part
  int pixel;          // rank among the threads of the same channels
  bool active;
};

KPFUSED_DEVICE ChannelsPart channels_part(const Plan& plan, const MapView& view) {
  ChannelsPart part;
  const int64_t block = blockIdx.x;
  part.part = block % plan.parts();
  const int64_t tile = block / plan.parts() % plan.tiles;
  part.image = block / plan.parts() / plan.tiles;
  const int group = threadIdx.x % plan.groups;
  part.pixel = threadIdx.x / plan.groups;
  part.channel = (tile * plan.groups + group) * plan.vector;
  const int ry = part.pixel / plan.tx, rx = part.pixel % plan.tx;
  part.top = part.part / plan.parts_x * plan.rows_per_part;
  part.left = part.part % plan.parts_x * plan.columns_per_part;
  const int64_t below = view.height - part.top, right = view.width - part.left;
  part.rows = static_cast<int>(below < plan.rows_per_part ? below : plan.rows_per_part) - ry;
  part.columns = static_cast<int>(right < plan.columns_per_part ? right : plan.columns_per_part) - rx;
  part.top += ry;
  part.left += rx;
  part.active = ry < plan.ty && part.channel < view.inner;
  return part;
}

// One channel of one thread: running sums relative to a running peak. `column` is the sum of the present column's
// weights, which x has not weighed yet.
template <class A>
struct Channel {
  State<A> all;
  A column;

  KPFUSED_DEVICE void clear() {
    all = empty_state<A>();
    column = 0;
  }

  // N rows, ty apart, the first at y; as Columns::add.
  template <int N>
  KPFUSED_DEVICE void add(const A (&key)[N], A y, int ty, A scale) {
    A top = all.peak;
#pragma unroll
    for (int i = 0; i < N; ++i) top = larger(top, key[i]);
    const A lower = Exp2{}((all.peak - top) * scale);
    A total = 0, below = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A w = Exp2{}((key[i] - top) * scale);
      total = i == 0 ? w : total + w;
      if (i == 1) below = w * static_cast<A>(ty);
      if (i > 1) below += w * static_cast<A>(i * ty);
    }
    all.peak = top;
    all.sum *= lower;
    all.sum_x *= lower;
    all.sum_y = all.sum_y * lower + (total * y + below);
    column = column * lower + total;
  }

  KPFUSED_DEVICE void end_column(A x) {
    all.sum += column;
    all.sum_x += column * x;
    column = 0;
  }
};

template <bool kFull, class T, int V>
KPFUSED_DEVICE void channels_step(const T* p, int64_t step, int rows, const Plan& plan,
                                  const Sharpness<Acc<T>> (&beta)[V], Acc<T> y, Channel<Acc<T>> (&channel)[V]) {
  using A = Acc<T>;
  constexpr int N = kItems<T, V>;
  Pack<T, V> pack[N];
  load_packs<kFull>(p, step, rows, plan.ty, pack);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    A key[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      key[i] = kFull || i * plan.ty < rows ? widen(pack[i].value[j]) * beta[j].sign : -INFINITY;
    }
    channel[j].add(key, y, plan.ty, beta[j].scale);
  }
}

template <class T, int V>
KPFUSED_DEVICE void channels_states(const T* image, const ChannelsPart& part, const MapView& view, const Plan& plan,
                                    const Sharpness<Acc<T>> (&beta)[V], Channel<Acc<T>> (&channel)[V]) {
  using A = Acc<T>;
  constexpr int N = kItems<T, V>;
  const int64_t step = plan.ty * view.stride_y;
  const T* column = image + part.top * view.stride_y + part.left * view.stride_x + part.channel;
  const A left = centred<A>(part.left, view.width);
  for (int done = 0; done < part.columns; done += plan.tx, column += plan.tx * view.stride_x) {
    const T* p = column;
    A y = centred<A>(part.top, view.height);
    int rows = part.rows;
    for (; rows > (N - 1) * plan.ty; rows -= N * plan.ty, p += N * step, y += static_cast<A>(N * plan.ty)) {
      channels_step<true>(p, step, rows, plan, beta, y, channel);
    }
    if (rows > 0) channels_step<false>(p, step, rows, plan, beta, y, channel);
#pragma unroll
    for (int j = 0; j < V; ++j) channel[j].end_column(left + static_cast<A>(done));
  }
}

// A tree over the pixels of each channel, in shared memory: [pixel][group][V] states. Result in pixel 0.
template <class S, int V, class Op>
KPFUSED_DEVICE void reduce_pixels(S (&s)[V], int pixel, const Plan& plan, S* shared, const Op (&op)[V]) {
  const int pixels = plan.tx * plan.ty;
  S* const mine = shared + static_cast<int>(threadIdx.x) * V;
  int half = 1;
  while (half < pixels) half *= 2;
#pragma unroll
  for (int j = 0; j < V; ++j) mine[j] = s[j];
  __syncthreads();
  for (half /= 2; half > 0; half /= 2) {
    if (pixel < half && pixel + half < pixels) {
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
  Channel<A> channel[V];
#pragma unroll
  for (int j = 0; j < V; ++j) channel[j].clear();
  if (part.active) {
    channels_states<T, V>(static_cast<const T*>(p.heatmap) + part.image * p.view.stride_outer, part, p.view, plan, beta,
                          channel);
  }
  State<A> state[V];
#pragma unroll
  for (int j = 0; j < V; ++j) state[j] = channel[j].all;
  reduce_pixels(state, part.pixel, plan, shared, op);
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

template <bool kFull, int V, bool kBeta, class T>
KPFUSED_DEVICE void channels_gradient_step(const T* from, T* to, int64_t step, int64_t out_step, int rows, int ty,
                                           const MapSlope<Acc<T>> (&at)[V], const Acc<T> (&along_x)[V], Acc<T> y,
                                           Acc<T> (&dbeta)[V]) {
  using A = Acc<T>;
  constexpr int N = kItems<T, V>;
  Pack<T, V> pack[N];
  load_packs<kFull>(from, step, rows, ty, pack);
#pragma unroll
  for (int i = 0; i < N; ++i, to += out_step) {
    if (!kFull && i * ty >= rows) continue;
    A dh[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const A q = along_x[j] + at[j].slope.along_y(y + static_cast<A>(i * ty));
      dh[j] = gradient<kBeta>(widen(pack[i].value[j]) * at[j].sharp.sign, q, at[j], dbeta[j]);
    }
    store<T, V>(to, narrow(dh, T{}));
  }
}

template <class T, int V, bool kBeta>
KPFUSED_DEVICE void channels_gradient(const T* image, T* out, const ChannelsPart& part, const BackwardParams& p,
                                      const Plan& plan, const MapSlope<Acc<T>> (&at)[V], Acc<T> (&dbeta)[V]) {
  using A = Acc<T>;
  constexpr int N = kItems<T, V>;
  const int64_t step = plan.ty * p.view.stride_y, out_step = plan.ty * p.grad_view.stride_y;
  const T* column = image + part.top * p.view.stride_y + part.left * p.view.stride_x + part.channel;
  T* out_column = out + part.top * p.grad_view.stride_y + part.left * p.grad_view.stride_x + part.channel;
  const A left = centred<A>(part.left, p.view.width);
  for (int done = 0; done < part.columns; done += plan.tx) {
    A along_x[V];
#pragma unroll
    for (int j = 0; j < V; ++j) along_x[j] = at[j].slope.along_x(left + static_cast<A>(done));
    const T* from = column;
    T* to = out_column;
    A y = centred<A>(part.top, p.view.height);
    int rows = part.rows;
    for (; rows > (N - 1) * plan.ty; rows -= N * plan.ty) {
      channels_gradient_step<true, V, kBeta>(from, to, step, out_step, rows, plan.ty, at, along_x, y, dbeta);
      from += N * step;
      to += N * out_step;
      y += static_cast<A>(N * plan.ty);
    }
    if (rows > 0) {
      channels_gradient_step<false, V, kBeta>(from, to, step, out_step, rows, plan.ty, at, along_x, y, dbeta);
    }
    column += plan.tx * p.view.stride_x;
    out_column += plan.tx * p.grad_view.stride_x;
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
  const Add op[V] = {};
  reduce_pixels(dbeta, part.pixel, plan, shared, op);
  if (part.pixel != 0 || !part.active) return;
  A* const target = static_cast<A*>(plan.parts() > 1 ? p.workspace : p.grad_beta);
#pragma unroll
  for (int j = 0; j < V; ++j) target[(n + j) * plan.parts() + part.part] = dbeta[j] * at[j].sharp.sign;
}

}  // namespace kpfused::cuda
