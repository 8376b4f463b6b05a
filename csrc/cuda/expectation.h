// SPDX-License-Identifier: MIT
// Expectations of values under the softmax P of a map, E_c = sum_i P_i V_ci, and their gradients.
//
// Threads lie over maps as plan.h has it for single elements, over rows and over channels_last images alike: neighbours
// take neighbouring pixels of one, neighbouring maps of the other. Each keeps its column and walks down the rows, a few
// independent loads at a time. Values come from memory in any layout, or from the pixel's place.
#pragma once

#include "channels.h"
#include "pixels.h"

namespace kpfused::cuda {

// Elements of a thread's step: rows of its column, and channels of the values at each.
constexpr int kStepRows = 4, kStepChannels = 4;

// Blocks a multiprocessor holds, which bounds a thread's registers: 128, or as many as there are for float64.
template <class T>
constexpr int kExpectationBlocks = sizeof(Acc<T>) == 8 ? 1 : 2;

KPFUSED_HD bool in_channels(const Plan& plan) {
  return plan.regime == Regime::channels || plan.regime == Regime::channels_split;
}

// Passes over the map that the channels of its values take.
KPFUSED_HD int64_t channel_passes(int64_t channels) { return (channels + kStepChannels - 1) / kStepChannels; }

KPFUSED_DEVICE int some_channels(int64_t left, int most) { return left < most ? static_cast<int>(left) : most; }

// ---- Places ---------------------------------------------------------------------------------------------------------

// Row y, counted from `first`, as far as 32 bits go: a part has fewer rows.
KPFUSED_DEVICE int row_of(int64_t y, int64_t first) {
  const int64_t row = y - first, most = 0x7fffffff;
  return row < 0 ? 0 : static_cast<int>(row < most ? row : most);
}

// A part of a map, or what is left of it to walk, and the thread's place among the tx x ty that walk it.
struct Area {
  int64_t map, part;
  int64_t top, bottom, left, right;
  int ry, rx;
  int pixel;    // rank among the threads of the map
  bool active;  // others have no map, or no place over it

  KPFUSED_DEVICE void clip(const Box& box) {
    top = top > box.top ? top : box.top;
    left = left > box.left ? left : box.left;
    bottom = bottom < box.bottom ? bottom : box.bottom;
    right = right < box.right ? right : box.right;
  }
  // The thread's first row and column, and rows from there on.
  KPFUSED_DEVICE int64_t first_row() const { return top + ry; }
  KPFUSED_DEVICE int64_t first_column() const { return left + rx; }
  KPFUSED_DEVICE int rows_until(int64_t end) const { return active ? row_of(end, first_row()) : 0; }
};

KPFUSED_DEVICE Area area_of(const Plan& plan, const MapView& view, int64_t block) {
  Area area;
  if (in_channels(plan)) {
    area.pixel = threadIdx.x / plan.groups;
    area.part = block % plan.parts();
    const int64_t tile = block / plan.parts() % plan.tiles, image = block / plan.parts() / plan.tiles;
    const int64_t channel = tile * plan.groups + threadIdx.x % plan.groups;
    area.map = image * view.inner + channel;
    area.active = channel < view.inner;
  } else {
    area.pixel = threadIdx.x % plan.team;
    const int64_t item = block * plan.teams() + threadIdx.x / plan.team;
    area.map = item / plan.parts();
    area.part = item % plan.parts();
    area.active = area.map < view.maps();
  }
  area.ry = area.pixel / plan.tx;
  area.rx = area.pixel % plan.tx;
  area.active = area.active && area.ry < plan.ty;
  const auto end = [](int64_t begin, int64_t size, int64_t most) { return most - begin < size ? most : begin + size; };
  area.top = area.part / plan.parts_x * plan.rows_per_part;
  area.left = area.part % plan.parts_x * plan.columns_per_part;
  area.bottom = end(area.top, plan.rows_per_part, view.height);
  area.right = end(area.left, plan.columns_per_part, view.width);
  return area;
}

// Sums over the threads of a map, valid in the one of pixel 0. All threads must call.
template <class S>
KPFUSED_DEVICE S reduce_area(const S& s, const Area& area, const Plan& plan, S* shared) {
  if (!in_channels(plan)) return reduce_team(s, plan.team, shared, Add{});
  S of_pixel[1] = {s};
  const Add op[1] = {};
  reduce_pixels(of_pixel, area.pixel, plan, shared, op);
  return of_pixel[0];
}

// ---- P --------------------------------------------------------------------------------------------------------------

// What P needs of one map; of a probability map nothing.
template <class A>
struct Softmax {
  A sign, scale, peak, inverse;  // 1 / sum
  bool is_probability, empty;

  KPFUSED_DEVICE A distance(A logit) const { return logit * sign - peak; }
  KPFUSED_DEVICE A operator()(A logit) const {
    return is_probability ? logit : Exp2{}(distance(logit) * scale) * inverse;
  }
};

// One beta for all maps costs no division: kernels that sum over maps come here for each.
template <class A>
KPFUSED_DEVICE A softmax_beta(const BetaView& beta, int64_t n) {
  return beta.values && beta.modulus == 1 ? *static_cast<const A*>(beta.values) : beta_of<A>(beta, n);
}

template <class A>
KPFUSED_DEVICE Stats<A> stats_of(const SoftmaxParams& p, int64_t n) {
  return *reinterpret_cast<const Stats<A>*>(static_cast<const A*>(p.stats) + n * p.stats_stride);
}

template <class A>
KPFUSED_DEVICE Softmax<A> softmax_of(const Stats<A>& stats, A beta) {
  const Sharpness<A> sharp = sharpness(beta);
  return {sharp.sign, sharp.scale, stats.peak, A(1) / stats.sum, false, false};
}

template <class A>
KPFUSED_DEVICE Softmax<A> softmax_of(const SoftmaxParams& p, int64_t n) {
  if (p.is_probability) return {A(1), A(1), A(0), A(1), true, false};
  const Stats<A> stats = stats_of<A>(p, n);
  Softmax<A> softmax = softmax_of(stats, softmax_beta<A>(p.beta, n));
  softmax.empty = is_empty(p.pixels, stats.sum);
  return softmax;
}

// N rows, ty apart, of which the first `rows` are read.
template <int N, class T>
KPFUSED_DEVICE void load_logits(const T* p, int64_t step, int rows, int ty, Acc<T> (&logit)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) logit[i] = i * ty < rows ? widen(p[i * step]) : Acc<T>(0);
}

// ---- Values ---------------------------------------------------------------------------------------------------------

// Those of one map, of which a thread's first row is row 0.
template <class T>
struct MapValues {
  using A = Acc<T>;
  const Values& of;
  const MapView& view;
  const T* data;        // of row 0; all strides are zero where there is none
  A y;                  // row 0, centred
  int64_t left, right;  // columns and rows outside which values that are not in memory are zero
  int top, bottom;

  KPFUSED_DEVICE MapValues(const Values& values, const SoftmaxParams& softmax, int64_t n, const Box& box,
                           int64_t first)
      : of(values), view(softmax.view), y(centred<A>(first, view.height)), left(box.left), right(box.right) {
    top = row_of(box.top, first);
    bottom = row_of(box.bottom, first);
    data = static_cast<const T*>(of.data) + n / view.inner * of.view.stride_outer +
           n % view.inner * of.view.stride_inner + first * of.view.stride_y;
  }

  // Channel `channel` and those after it, of one column.
  struct Column {
    const T* p;  // where row 0 lies in memory
    A x;         // or its value: the coordinate, or 1 within the window
  };

  KPFUSED_DEVICE Column column(int64_t channel, int64_t x) const {
    Column column{data + channel * of.view.stride_channel + x * of.view.stride_x, A(0)};
    if (of.kind == ValueKind::window) {
      column.x = left <= x && x < right ? A(1) : A(0);
    } else if (of.kind == ValueKind::coordinates) {
      column.x = static_cast<A>(of.units.scale_x) * centred<A>(x, view.width) + static_cast<A>(of.units.offset_x);
    }
    return column;
  }

  // `channels` of them, one at least, at N rows from `row` on, ty apart, of which `rows` are read. The others, and channels
  // beyond, are zero. Of a tensor, p: where they lie.
  template <int N, int C>
  KPFUSED_DEVICE void load(const Column& column, const T* p, int channels, int row, int rows, int ty,
                           A (&v)[N][C]) const {
    if (of.kind != ValueKind::tensor) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const int at = row + i * ty;
        v[i][0] = top <= at && at < bottom ? column.x : A(0);
        v[i][1] = static_cast<A>(of.units.scale_y) * (y + static_cast<A>(at)) + static_cast<A>(of.units.offset_y);
#pragma unroll
        for (int j = 2; j < C; ++j) v[i][j] = 0;
      }
      return;
    }
    const int64_t step = ty * of.view.stride_y;
#pragma unroll
    for (int i = 0; i < N; ++i) v[i][0] = i * ty < rows ? widen(p[i * step]) : A(0);
    // One channel is what most ask for.
    if (channels == 1) return;
#pragma unroll
    for (int j = 1; j < C; ++j) {
      p += of.view.stride_channel;
#pragma unroll
      for (int i = 0; i < N; ++i) v[i][j] = j < channels && i * ty < rows ? widen(p[i * step]) : A(0);
    }
  }
};

// Where values other than a tensor's are not zero: within the window, or all of the map.
template <class A>
KPFUSED_DEVICE Box value_box(const Values& values, const SoftmaxParams& softmax, int64_t n) {
  if (values.kind != ValueKind::window) return {0, softmax.view.width, 0, softmax.view.height};
  return window_of(values, softmax.view, stats_of<A>(softmax, n), n);
}

// ---- Kernels --------------------------------------------------------------------------------------------------------

// Bytes: reads the map and, where they are in memory, the values. More than a few channels are taken by several blocks,
// each of which makes P again: an exp2 costs less than to bring P from elsewhere.
template <class T>
__global__ void __launch_bounds__(plan_detail::kRowThreads, kExpectationBlocks<T>)
    expectation_sums(Launch<ExpectationParams> launch) {
  const auto& [p, plan] = launch;
  using A = Acc<T>;
  using Sums = Tuple<A, kStepChannels>;
  constexpr int N = kStepRows, C = kStepChannels;
  const SoftmaxParams& of = p.softmax;
  const int64_t channels = p.values.view.channels, passes = channel_passes(channels);
  const int64_t channel = blockIdx.x % passes * C;
  const int some = some_channels(channels - channel, C);
  Area area = area_of(plan, of.view, blockIdx.x / passes);
  const int64_t n = area.active ? area.map : 0;
  const CountedPixels counted = counted_pixels(of.pixels, of.view, n);
  const Softmax<A> softmax = softmax_of<A>(of, n);
  const Box box = value_box<A>(p.values, of, n);
  area.clip({0, counted.width, 0, counted.height});
  area.clip(box);
  const MapValues<T> values(p.values, of, n, box, area.first_row());
  const int rows = area.rows_until(area.bottom);
  const int64_t step = plan.ty * of.view.stride_y, value_step = plan.ty * p.values.view.stride_y;
  const int64_t first = area.first_row();
  const T* const map = static_cast<const T*>(of.heatmap) + map_offset(of.view, n);
  Sums sum = {};
  for (int64_t x = area.first_column(); x < area.right; x += plan.tx) {
    const T* h = map + first * of.view.stride_y + x * of.view.stride_x;
    const auto column = values.column(channel, x);
    const T* value = column.p;
    const uint8_t* mask = mask_at(counted, first, x);
    for (int row = 0; row < rows; row += N * plan.ty) {
      const int left = rows - row;
      A w[N], v[N][C];
      load_logits(h, step, left, plan.ty, w);
      values.load(column, value, some, row, left, plan.ty, v);
      bool counts[N];
      count_rows(counted, mask, left, plan.ty, counts);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        // Selected: beside a pixel that does not count, the value may be NaN.
        w[i] = softmax(w[i]);
        if (counts[i]) sum.at[0] += w[i] * v[i][0];
      }
      if (some > 1) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (!counts[i]) continue;
#pragma unroll
          for (int j = 1; j < C; ++j) sum.at[j] += w[i] * v[i][j];
        }
      }
      h += N * step;
      value += N * value_step;
    }
  }
  KPFUSED_SHARED(Sums, shared);
  sum = reduce_area(sum, area, plan, shared);
  if (area.pixel != 0 || !area.active) return;
  A* const to = static_cast<A*>(plan.parts() > 1 ? p.workspace : p.expectation);
  // Zero, or NaN of a map of NaN, which has no mass even where nothing of it counts within the window.
  const A nothing = softmax.inverse - softmax.inverse;
  // The parts of an empty map add up to its value.
  const A value = static_cast<A>(area.part == 0 ? of.pixels.empty_value : 0);
#pragma unroll
  for (int j = 0; j < C; ++j) {
    if (j >= some) continue;
    to[(n * channels + channel + j) * plan.parts() + area.part] = softmax.empty ? value : sum.at[j] + nothing;
  }
}

// Bytes: reads the map and the values, writes the map's gradient. All channels in one pass.
template <class T>
__global__ void __launch_bounds__(plan_detail::kRowThreads, kExpectationBlocks<T>)
    expectation_gradient(Launch<ExpectationHeatmapParams> launch) {
  const auto& [p, plan] = launch;
  using A = Acc<T>;
  constexpr int N = kStepRows, C = 2;  // more would not fit into registers
  const SoftmaxParams& of = p.softmax;
  const int64_t channels = p.values.view.channels;
  const Area area = area_of(plan, of.view, blockIdx.x);
  const int64_t n = area.active ? area.map : 0;
  const CountedPixels counted = counted_pixels(of.pixels, of.view, n);
  const Softmax<A> softmax = softmax_of<A>(of, n);
  const MapValues<T> values(p.values, of, n, value_box<A>(p.values, of, n), area.first_row());
  const A beta = of.is_probability ? A(1) : softmax_beta<A>(of.beta, n);
  const A* const grad = static_cast<const A*>(p.grad) + n * channels;
  const bool ones = !p.grad;
  const A* const mean = static_cast<const A*>(p.expectation) + n * channels;
  const int rows = area.rows_until(area.bottom);
  const int64_t step = plan.ty * of.view.stride_y, out_step = plan.ty * p.grad_view.stride_y;
  const int64_t value_step = plan.ty * p.values.view.stride_y;
  const int64_t first = area.first_row();
  const T* const map = static_cast<const T*>(of.heatmap) + map_offset(of.view, n);
  T* const out = static_cast<T*>(p.grad_heatmap) + map_offset(p.grad_view, n);
  A dbeta = 0;
  for (int64_t x = area.first_column(); x < area.right; x += plan.tx) {
    const T* h = map + first * of.view.stride_y + x * of.view.stride_x;
    T* to = out + first * p.grad_view.stride_y + x * p.grad_view.stride_x;
    const uint8_t* mask = mask_at(counted, first, x);
    // Beyond the valid size nothing is read, in an empty map neither.
    const int valid = softmax.empty || x >= counted.width ? 0 : area.rows_until(counted.height);
    const auto column = values.column(0, x);
    const T* row_values = column.p;
    for (int row = 0; row < rows; row += N * plan.ty) {
      const int left = valid < rows ? valid - row : rows - row;
      A logit[N], q[N] = {};
      load_logits(h, step, left, plan.ty, logit);
      const T* value = row_values;
      for (int64_t c = 0; c < channels; c += C, value += C * p.values.view.stride_channel) {
        A v[N][C];
        const int some = some_channels(channels - c, C);
        values.load(column, value, some, row, left, plan.ty, v);
        const auto add = [&](int j) {
          const A g = ones ? A(1) : grad[c + j], e = softmax.is_probability ? A(0) : mean[c + j];
#pragma unroll
          for (int i = 0; i < N; ++i) q[i] += g * (v[i][j] - e);
        };
        add(0);
        if (some == 1) break;
#pragma unroll
        for (int j = 1; j < C; ++j) {
          if (j < some) add(j);
        }
      }
      bool counts[N];
      count_rows(counted, mask, left, plan.ty, counts);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const A wq = of.is_probability ? q[i] : softmax(logit[i]) * q[i];
        // Selected: beside a pixel that does not count, values may be NaN.
        if (counts[i] && !of.is_probability) dbeta += finite_distance(softmax.distance(logit[i])) * wq;
        const A dh[1] = {counts[i] ? beta * wq : A(0)};
        if (i * plan.ty < rows - row) store<T, 1>(to + i * out_step, narrow(dh, T{}));
      }
      h += N * step;
      to += N * out_step;
      row_values += N * value_step;
    }
  }
  if (!p.grad_beta) return;
  KPFUSED_SHARED(A, shared);
  dbeta = reduce_area(dbeta, area, plan, shared) * softmax.sign;
  if (area.pixel != 0 || !area.active) return;
  static_cast<A*>(plan.parts() > 1 ? p.workspace : p.grad_beta)[n * plan.parts() + area.part] = dbeta;
}

// The maps that have values of their own, each for the others that share them.
KPFUSED_HD MapView own_values(const MapView& maps, const ValueView& values) {
  MapView own = maps;
  if (values.stride_outer == 0) own.outer = 1;
  if (values.stride_inner == 0) own.inner = 1;
  return own;
}

// The maps that share values with map `first`, kStepRows of them at a time: of one sample where they share there, else of
// neighbouring samples.
template <class T>
struct Sharing {
  using A = Acc<T>;
  const ExpectationValuesParams& p;
  int64_t first;  // map
  const T* map;
  int64_t far, far_maps, far_stride;
  int64_t near, near_maps, near_stride;

  KPFUSED_DEVICE Sharing(const ExpectationValuesParams& params, const MapView& own, int64_t outer, int64_t inner)
      : p(params) {
    const MapView& view = p.softmax.view;
    const int64_t of_outer = own.outer == view.outer ? 1 : view.outer;
    const int64_t of_inner = own.inner == view.inner ? 1 : view.inner;
    const bool along_inner = of_inner > 1;
    first = outer * view.inner + inner;
    map = static_cast<const T*>(p.softmax.heatmap) + outer * view.stride_outer + inner * view.stride_inner;
    far = along_inner ? of_outer : 1;
    far_maps = view.inner;
    far_stride = view.stride_outer;
    near = along_inner ? of_inner : of_outer;
    near_maps = along_inner ? 1 : view.inner;
    near_stride = along_inner ? view.stride_inner : view.stride_outer;
  }

  // sum[k] += P g of every kStepRows-th map at one pixel.
  KPFUSED_DEVICE void add(int64_t y, int64_t x, int64_t channel, A (&sum)[kStepRows][kStepChannels]) const {
    const T* row = map + y * p.softmax.view.stride_y + x * p.softmax.view.stride_x;
    for (int64_t o = 0; o < far; ++o, row += far_stride) {
      const T* h = row;
      for (int64_t i = 0; i < near; i += kStepRows, h += kStepRows * near_stride) {
        add_maps(first + o * far_maps + i * near_maps, h, near - i, y, x, channel, sum);
      }
    }
  }

 private:
  // Up to kStepRows maps from n on: all loads before the first use.
  KPFUSED_DEVICE void add_maps(int64_t n, const T* h, int64_t maps, int64_t y, int64_t x, int64_t channel,
                               A (&sum)[kStepRows][kStepChannels]) const {
    constexpr int N = kStepRows;
    const SoftmaxParams& of = p.softmax;
    A w[N];
    unsigned bits = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      w[k] = k < maps ? widen(h[k * near_stride]) : A(0);
      if (k < maps) bits |= 1u << k;
    }
    const unsigned all = bits;
    if (!of.pixels.all()) {
      // Not unrolled: rare, and long.
#pragma unroll 1
      for (int k = 0; k < N; ++k) {
        if (k < maps && !counts_at(counted_pixels(of.pixels, of.view, n + k * near_maps), y, x)) bits &= ~(1u << k);
      }
    }
    if (!of.is_probability) {
      Stats<A> stats[N];
      A beta[N];
#pragma unroll
      for (int k = 0; k < N; ++k) stats[k] = stats_of<A>(of, k < maps ? n + k * near_maps : n);
#pragma unroll
      for (int k = 0; k < N; ++k) beta[k] = softmax_beta<A>(of.beta, k < maps ? n + k * near_maps : n);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        w[k] = softmax_of(stats[k], beta[k])(w[k]);
        if (!is_empty(of.pixels, stats[k].sum)) continue;
        // The softmax map of an empty map is its value everywhere.
        w[k] = static_cast<A>(of.pixels.empty_value);
        bits = p.grad ? bits & ~(1u << k) : bits | (all & 1u << k);
      }
    }
    const int64_t channels = p.value_view.channels;
    const A* const grad = static_cast<const A*>(p.grad) + n * channels + channel;
#pragma unroll
    for (int k = 0; k < N; ++k) w[k] = bits >> k & 1 ? w[k] : A(0);
#pragma unroll
    for (int j = 0; j < kStepChannels; ++j) {
      if (channel + j >= channels) break;
      A g[N];
#pragma unroll
      for (int k = 0; k < N; ++k) {
        g[k] = !(bits >> k & 1) ? A(0) : p.grad ? grad[k * near_maps * channels + j] : A(1);
      }
#pragma unroll
      for (int k = 0; k < N; ++k) sum[k][j] += w[k] * g[k];
    }
  }
};

// Bytes: reads the maps, writes the values' gradient. As for E, a few channels a block. kShared: a thread takes one pixel
// after another and of each a few maps at a time, instead of a few pixels of one map.
template <class T, bool kShared>
__global__ void __launch_bounds__(plan_detail::kRowThreads, kExpectationBlocks<T>)
    values_gradient(Launch<ExpectationValuesParams> launch) {
  const auto& [p, plan] = launch;
  using A = Acc<T>;
  // Of one map there is less to keep, which leaves registers for more loads.
  constexpr int N = kShared ? kStepRows : 2 * kStepRows, C = kStepChannels;
  const SoftmaxParams& of = p.softmax;
  const ValueView& to = p.value_view;
  const int64_t passes = channel_passes(to.channels), channel = blockIdx.x % passes * C;
  const MapView own = own_values(of.view, to);
  const Area area = area_of(plan, own, blockIdx.x / passes);
  if (!area.active) return;
  const int64_t outer = area.map / own.inner, inner = area.map % own.inner;
  const int rows = area.rows_until(area.bottom);
  const int some = some_channels(to.channels - channel, C);
  const int64_t first = area.first_row(), out_step = plan.ty * to.stride_y;
  T* const out = static_cast<T*>(p.grad_values) + outer * to.stride_outer + inner * to.stride_inner +
                 channel * to.stride_channel + first * to.stride_y;
  const auto write = [&](T* q, const A(&v)[C]) {
    const A one[1] = {v[0]};
    store<T, 1>(q, narrow(one, T{}));
    if (some == 1) return;
#pragma unroll
    for (int j = 1; j < C; ++j) {
      q += to.stride_channel;
      const A another[1] = {v[j]};
      if (j < some) store<T, 1>(q, narrow(another, T{}));
    }
  };
  if constexpr (kShared) {
    const Sharing<T> sharing(p, own, outer, inner);
    for (int64_t x = area.first_column(); x < area.right; x += plan.tx) {
      T* q = out + x * to.stride_x;
      for (int row = 0; row < rows; row += plan.ty, q += out_step) {
        A sum[N][C] = {}, all[C];
        sharing.add(first + row, x, channel, sum);
#pragma unroll
        for (int j = 0; j < C; ++j) all[j] = (sum[0][j] + sum[1][j]) + (sum[2][j] + sum[3][j]);
        write(q, all);
      }
    }
  } else {
    const int64_t n = area.map, step = plan.ty * of.view.stride_y;
    const CountedPixels counted = counted_pixels(of.pixels, of.view, n);
    const Softmax<A> softmax = softmax_of<A>(of, n);
    const T* const map = static_cast<const T*>(of.heatmap) + map_offset(of.view, n);
    const A* const grad = static_cast<const A*>(p.grad) + n * to.channels + channel;
    // Without an upstream gradient, the softmax map of an empty map is its value everywhere.
    const A otherwise = static_cast<A>(softmax.empty && !p.grad ? of.pixels.empty_value : 0);
    A g[C];
#pragma unroll
    for (int j = 0; j < C; ++j) g[j] = p.grad && j < some ? grad[j] : A(1);
    for (int64_t x = area.first_column(); x < area.right; x += plan.tx) {
      T* q = out + x * to.stride_x;
      const T* h = map + first * of.view.stride_y + x * of.view.stride_x;
      const uint8_t* mask = mask_at(counted, first, x);
      const int valid = softmax.empty || x >= counted.width ? 0 : area.rows_until(counted.height);
      for (int row = 0; row < rows; row += N * plan.ty) {
        const int left = valid < rows ? valid - row : rows - row;
        A logit[N];
        load_logits(h, step, left, plan.ty, logit);
        bool counts[N];
        count_rows(counted, mask, left, plan.ty, counts);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const A w = softmax(logit[i]);
          A v[C];
#pragma unroll
          for (int j = 0; j < C; ++j) v[j] = counts[i] ? w * g[j] : otherwise;
          if (i * plan.ty < rows - row) write(q + i * out_step, v);
        }
        h += N * step;
        q += N * out_step;
      }
    }
  }
}

// Second launch of split maps: one warp a sum over its parts, [sums, parts].
template <class A>
struct PartialSums {
  const A* partial;
  A* sums;
  int64_t count, parts;
};

template <class A>
__global__ void __launch_bounds__(kMergeThreads, 1) add_parts(PartialSums<A> of) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kMergeThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (n >= of.count) return;  // a whole warp
  A sum = 0;
  for (int64_t i = lane; i < of.parts; i += kWarp) sum += of.partial[n * of.parts + i];
  sum = reduce_lanes(sum, kWarp, Add{});
  if (lane == 0) of.sums[n] = sum;
}

}  // namespace kpfused::cuda
