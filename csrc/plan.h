// SPDX-License-Identifier: MIT
// Which kernel a map goes to, and the shape of its launch. A pure function of the map's own height, width, dtype, layout,
// that of its mask, and alignment, never of how many maps there are: a map gives the same bits alone or among thousands.
#pragma once

#include <cstdint>

#include "params.h"

namespace kpfused {

enum class Regime : int {
  team,            // tiny maps: a power of two of lanes within a warp for each, many maps a block
  block,           // a block for each map
  split,           // huge maps: a block for each part, a second launch merges the parts
  channels,        // channels_last: a block for each image, or for each tile of its channels
  channels_split,  // likewise, for each part of the image
};

inline const char* regime_name(Regime regime) {
  switch (regime) {
    case Regime::team: return "team";
    case Regime::block: return "block";
    case Regime::split: return "split";
    case Regime::channels: return "channels";
    case Regime::channels_split: return "channels_split";
  }
  return "?";
}

// What a plan depends on.
struct PlanKey {
  Dtype dtype;
  int64_t height, width;
  int64_t channels;  // of one pixel in channels_last; 0 for rows
  bool aligned;      // where vectors are read and written they start at multiples of their size, and their masks are even
  bool moments;      // the kernels of moments and of masks, which keep more numbers for every column and channel
};

struct Plan {
  Regime regime;
  int vector;   // elements of one load: 16 bytes, 2 of channels with moments, or one element
  int items;    // loads a thread issues before it uses the first
  int threads;  // of a block
  int team;     // threads that share a map, or a part of one
  int tx, ty;   // how they lie over it: along x (vectors for rows, pixels for channels) and along y
  int groups;   // channels: vectors along the channels of a block's tile; 1 for rows
  int64_t tiles;                     // channels: tiles of the channels; 1 for rows
  int64_t rows_per_part, parts_y;    // parts of a map
  int64_t columns_per_part, parts_x;

  KPFUSED_HD constexpr int64_t parts() const { return parts_y * parts_x; }
  KPFUSED_HD constexpr int teams() const { return threads / team; }
};

// Loads that a thread issues before it uses the first: 16 elements, in float64 four vectors, and 8 single elements.
constexpr int items_of(int element_bytes, int vector) {
  return vector == 1 ? 8 : element_bytes == 8 ? 4 : 16 / vector;
}

// Elements of a load where memory is aligned. With moments, a thread has registers for 2 channels, and neighbours' loads
// still join to whole sectors; float64 is bound by arithmetic, so single elements do.
constexpr int widest(int element_bytes, bool channels, bool moments) {
  if (!moments) return 16 / element_bytes;
  return element_bytes == 8 ? 1 : channels ? 2 : 16 / element_bytes;
}

namespace plan_detail {

constexpr int64_t kSplitBytes = 512 << 10;  // a block alone takes maps up to this size; see choose_rows
constexpr int64_t kPartBytes = 64 << 10;    // what a block takes of a larger one
constexpr int64_t kImageBytes = 96 << 10;   // channels_last images up to this size are not split; nor are rows
constexpr int kRowThreads = 256;            // limits that the kernels are compiled for
constexpr int kChannelThreads = 256;
constexpr int kChannelGroups = 128;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

// Tiles of `items` rows that each thread walks.
constexpr int64_t steps(int64_t height, int64_t columns, int64_t tx, int64_t ty, int items) {
  return ceil_div(columns, tx) * ceil_div(ceil_div(height, ty), items);
}

// Rows of a part of about kPartBytes: whole steps of a thread.
constexpr int64_t part_rows(int64_t height, int64_t row_bytes, int items) {
  return smaller(height, at_least(kPartBytes / row_bytes / items, 1) * items);
}

// tx x ty lanes of one warp over height x columns vectors: the fewest lane-steps, and whole rows side by side.
constexpr void arrange_team(Plan& plan, int64_t height, int64_t columns) {
  plan.tx = static_cast<int>(smaller(columns, 32));
  int64_t best = INT64_MAX;
  for (int team = 1; team <= 32; team *= 2) {
    if (team < plan.tx) continue;
    const int ty = static_cast<int>(smaller(height, team / plan.tx));
    const int64_t cost = team * steps(height, columns, plan.tx, ty, plan.items);
    if (cost < best) {
      best = cost;
      plan.team = team;
      plan.ty = ty;
    }
  }
  plan.threads = 128;
}

// A block over height x columns vectors: the fewest thread-steps; of equals, the most threads, so that a few maps keep
// the device busy too.
constexpr void arrange_block(Plan& plan, int64_t height, int64_t columns) {
  int64_t best = INT64_MAX;
  for (int threads = kRowThreads; threads >= 64; threads -= 32) {
    const int tx = static_cast<int>(smaller(columns, threads));
    const int ty = static_cast<int>(smaller(height, threads / tx));
    const int64_t cost = threads * steps(height, columns, tx, ty, plan.items);
    if (cost < best) {
      best = cost;
      plan.threads = plan.team = threads;
      plan.tx = tx;
      plan.ty = ty;
    }
  }
}

constexpr Plan choose_rows(const PlanKey& key) {
  const int size = element_size(key.dtype);
  const int wide = widest(size, false, key.moments);
  Plan plan{};
  plan.vector = key.aligned && key.width % wide == 0 ? wide : 1;
  plan.items = items_of(size, plan.vector);
  plan.groups = 1;
  plan.tiles = 1;
  plan.rows_per_part = key.height;
  plan.columns_per_part = key.width;
  const bool split = key.height * key.width > kSplitBytes / size;
  if (split) {
    plan.columns_per_part = smaller(key.width, kPartBytes / size / plan.items);
    plan.rows_per_part = part_rows(key.height, plan.columns_per_part * size, plan.items);
  }
  plan.parts_y = ceil_div(key.height, plan.rows_per_part);
  plan.parts_x = ceil_div(key.width, plan.columns_per_part);
  const int64_t columns = plan.columns_per_part / plan.vector;
  if (plan.rows_per_part * columns <= 32 * plan.items) {
    plan.regime = Regime::team;
    arrange_team(plan, plan.rows_per_part, columns);
  } else {
    plan.regime = split ? Regime::split : Regime::block;
    arrange_block(plan, plan.rows_per_part, columns);
  }
  return plan;
}

// Pixels of tx x ty over an image: the fewest thread-steps that the threads allow, and whole rows side by side.
constexpr void arrange_channels(Plan& plan, int64_t height, int64_t width) {
  const int64_t lanes = at_least(kChannelThreads / plan.groups, 1);
  int64_t best = INT64_MAX;
  for (int64_t tx = smaller(width, lanes); tx >= 1; --tx) {
    const int64_t ty = smaller(height, lanes / tx);
    const int64_t cost = steps(height, width, tx, ty, plan.items);
    if (cost < best) {
      best = cost;
      plan.tx = static_cast<int>(tx);
      plan.ty = static_cast<int>(ty);
    }
  }
  plan.team = plan.threads = static_cast<int>(ceil_div(plan.groups * plan.tx * plan.ty, 32) * 32);
}

constexpr Plan choose_channels(const PlanKey& key) {
  const int size = element_size(key.dtype);
  const int wide = widest(size, true, key.moments);
  Plan plan{};
  plan.vector = key.aligned && key.channels % wide == 0 ? wide : 1;
  plan.items = items_of(size, plan.vector);
  const int64_t groups = key.channels / plan.vector;
  const int64_t column_bytes = key.height * key.width * plan.vector * size;  // of one group
  plan.tiles = ceil_div(groups, kChannelGroups);
  // Narrower tiles where they save the second launch: 32 vectors are still one span of whole sectors.
  const int64_t narrow = ceil_div(groups, 32);
  if (narrow > plan.tiles && plan.vector > 1 && column_bytes <= kImageBytes / 32) plan.tiles = narrow;
  plan.groups = static_cast<int>(ceil_div(groups, plan.tiles));
  const int64_t pixel_bytes = plan.groups * plan.vector * size, row_bytes = key.width * pixel_bytes;
  // Of a long row, as of a signal, parts of one size.
  plan.columns_per_part = row_bytes > kImageBytes ? ceil_div(key.width, ceil_div(row_bytes, kPartBytes)) : key.width;
  const bool split = row_bytes > kImageBytes / key.height;
  plan.rows_per_part = split ? part_rows(key.height, plan.columns_per_part * pixel_bytes, plan.items) : key.height;
  plan.parts_x = ceil_div(key.width, plan.columns_per_part);
  plan.parts_y = ceil_div(key.height, plan.rows_per_part);
  plan.regime = plan.parts() > 1 ? Regime::channels_split : Regime::channels;
  arrange_channels(plan, plan.rows_per_part, plan.columns_per_part);
  return plan;
}

}  // namespace plan_detail

constexpr Plan choose_plan(const PlanKey& key) {
  return key.channels > 0 ? plan_detail::choose_channels(key) : plan_detail::choose_rows(key);
}

}  // namespace kpfused
