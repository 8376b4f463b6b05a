// SPDX-License-Identifier: MIT
// How threads lie over maps for expectations, and how their sums come together.
//
// Threads lie as plan.h has it for single elements, over rows and over channels_last images alike: neighbours take
// neighbouring pixels of one, neighbouring maps of the other. Each keeps its column and walks down the rows, a few
// independent loads at a time.
#pragma once

#include "channels.h"

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

// Second launch of split maps: one warp a sum over its parts, [sums, parts].
template <class A>
struct PartialSums {
  const A* partial;
  A* sums;
  int64_t count, parts;
  A most;  // that a sum can be
};

template <class A>
__global__ void __launch_bounds__(kMergeThreads, 1) add_parts(PartialSums<A> of) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kMergeThreads / kWarp) + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (n >= of.count) return;  // a whole warp
  A sum = 0;
  for (int64_t i = lane; i < of.parts; i += kWarp) sum += of.partial[n * of.parts + i];
  sum = reduce_lanes(sum, kWarp, Add{});
  if (lane == 0) of.sums[n] = sum > of.most ? of.most : sum;
}

}  // namespace kpfused::cuda
