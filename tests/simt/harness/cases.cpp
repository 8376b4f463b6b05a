// SPDX-License-Identifier: MIT
#include "cases.h"

#include <cstdio>

namespace harness {

using kpfused::MapView;

namespace {

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16};

const char* betas_name(Betas betas) {
  constexpr const char* names[] = {"number",  "tensor",   "per-keypoint", "per-sample",
                                   "per-map", "negative", "zero",         "nan"};
  return names[static_cast<int>(betas)];
}

const char* upstream_name(Upstream upstream) {
  constexpr const char* names[] = {"dense", "expanded", "transposed"};
  return names[static_cast<int>(upstream)];
}

// What kpfused::fold_layout makes of these: leading dimensions of one element have no stride.
MapView folded(MapView v) {
  if (v.inner == 1) v.stride_inner = 0;
  if (v.outer == 1) v.stride_outer = 0;
  return v;
}

}  // namespace

std::string Case::name() const {
  char text[300];
  std::snprintf(text, sizeof text, "%s/%s/%lldx%lldx%lldx%lld%s", group, dtype_name(dtype),
                static_cast<long long>(outer), static_cast<long long>(inner), static_cast<long long>(height),
                static_cast<long long>(width), channels_last ? "/channels-last" : "");
  std::string name = text;
  const auto add = [&](const char* label, long long value) {
    if (value) name += std::string("/") + label + std::to_string(value);
  };
  add("row-pad", row_pad);
  add("map-pad", map_pad);
  add("lead", lead);
  name += std::string("/") + values_name(values) + "/beta-" + betas_name(betas) + "/" + upstream_name(upstream);
  add("units", static_cast<int>(units));
  return name;
}

MapView Case::view() const {
  if (channels_last) {
    const int64_t x = inner + row_pad, y = (width + map_pad) * x;
    MapView v{outer, inner, height, width, height * y, 1, y, x};
    if (outer == 1) v.stride_outer = 0;
    return v;
  }
  const int64_t y = width + row_pad, map = height * y + map_pad;
  return folded({outer, inner, height, width, inner * map + map_pad, map, y, 1});
}

MapView Case::grad_view() const {
  const int64_t pixels = height * width;
  if (channels_last) {
    MapView v{outer, inner, height, width, pixels * inner, 1, width * inner, inner};
    if (outer == 1) v.stride_outer = 0;
    return v;
  }
  return folded({outer, inner, height, width, inner * pixels, pixels, width, 1});
}

size_t Case::beta_count() const {
  if (betas == Betas::per_keypoint) return static_cast<size_t>(inner);
  if (betas == Betas::per_sample) return static_cast<size_t>(outer);
  return betas == Betas::per_map ? static_cast<size_t>(outer * inner) : 1;
}

Real Case::beta(int64_t map) const {
  // Eighths: exact in float32.
  switch (betas) {
    case Betas::value: return 1.25L;
    case Betas::tensor: return 0.75L;
    case Betas::per_keypoint: return 0.5L + static_cast<Real>(map % inner) / 8;
    case Betas::per_sample: return 0.5L + static_cast<Real>(map / inner) / 2;
    case Betas::per_map: return 0.25L + static_cast<Real>(map) / 8;
    case Betas::negative: return -1.5L;
    case Betas::zero: return 0;
    case Betas::nan: return kNan;
  }
  return 0;
}

namespace {

struct Size {
  int64_t height, width;
};

// Adds one case for every dtype, or for those whose range holds the values.
void add(std::vector<Case>& cases, Case c) {
  for (const Dtype dtype : kDtypes) {
    if (c.values == Values::offset_1e30 && dtype == Dtype::float16) continue;
    c.dtype = dtype;
    cases.push_back(c);
  }
}

Case maps(const char* group, int64_t outer, int64_t inner, Size size) {
  Case c{};
  c.group = group;
  c.outer = outer, c.inner = inner, c.height = size.height, c.width = size.width;
  c.orders = 4;
  return c;
}

// Sizes around every change of kernel and of vector width, each alone and among others.
void add_sizes(std::vector<Case>& cases) {
  const Size tiny[] = {{1, 1}, {1, 2}, {2, 1},  {1, 5},   {5, 1},   {3, 3},  {5, 5},   {7, 9},
                       {8, 8}, {4, 16}, {10, 12}, {1, 17}, {17, 1}, {16, 16}, {1, 128}, {128, 1}, {15, 17}};
  for (const Size size : tiny) {
    Case c = maps("tiny", 1, 7, size);
    c.alone = true;
    c.betas = Betas::per_map;
    add(cases, c);
  }
  const Size block[] = {{17, 31}, {32, 32}, {47, 53}, {48, 64}, {64, 64}, {61, 67}, {96, 72}, {1, 3000}, {3001, 1}};
  for (const Size size : block) {
    Case c = maps("block", 1, 3, size);
    c.alone = true;
    c.betas = Betas::per_map;
    add(cases, c);
  }
  const Size large[] = {{80, 80}, {127, 129}, {128, 128}, {160, 160}, {256, 256}};
  for (const Size size : large) {
    Case c = maps("large", 1, 2, size);
    c.alone = size.height < 200;
    c.orders = 2;
    add(cases, c);
  }
}

void add_channels_last(std::vector<Case>& cases) {
  const int64_t channels[] = {1, 2, 3, 4, 5, 7, 8, 16, 17, 24, 32, 33, 64, 128, 133, 512, 1030};
  for (const int64_t c : channels) {
    const Size sizes[] = {{7, 9}, {16, 16}, {1, 1}, {31, 23}};
    for (const Size size : sizes) {
      if (c > 100 && size.height > 16) continue;
      Case k = maps("channels-last", 2, c, size);
      k.channels_last = true;
      k.alone = c < 40;
      add(cases, k);
    }
  }
  const Size sizes[] = {{1, 33}, {33, 1}, {64, 48}, {47, 53}, {80, 80}};
  for (const Size size : sizes) {
    for (const int64_t c : {int64_t{4}, int64_t{17}}) {
      Case k = maps("channels-last", 2, c, size);
      k.channels_last = true;
      k.orders = 2;
      add(cases, k);
    }
  }
  // A slice of the channels, of the columns, and a first channel that no vector load may start at.
  for (const int64_t c : {int64_t{8}, int64_t{17}}) {
    for (int variant = 0; variant < 4; ++variant) {
      Case k = maps("channels-last", 2, c, {9, 14});
      k.channels_last = true;
      if (variant == 0) k.row_pad = 8;
      if (variant == 1) k.row_pad = 1;
      if (variant == 2) k.map_pad = 2;
      if (variant == 3) k.lead = 1;
      k.betas = Betas::per_keypoint;
      add(cases, k);
    }
  }
}

// Views that start or go on at places where no vector load may: sliced rows, columns and maps.
void add_views(std::vector<Case>& cases) {
  const Size sizes[] = {{3, 5}, {7, 9}, {8, 8}, {10, 12}, {16, 32}, {47, 53}, {48, 64}};
  for (const Size size : sizes) {
    for (const int lead : {1, 2, 3, 4, 7}) {
      Case c = maps("views", 1, 3, size);
      c.lead = lead;
      c.orders = 2;
      add(cases, c);
    }
    for (const int row_pad : {1, 3, 8}) {
      Case c = maps("views", 2, 2, size);
      c.row_pad = row_pad;
      c.lead = row_pad == 8 ? 8 : 1;
      c.alone = true;
      c.betas = Betas::per_sample;
      add(cases, c);
    }
    for (const int map_pad : {1, 16}) {
      Case c = maps("views", 2, 2, size);
      c.map_pad = map_pad;
      c.betas = Betas::per_keypoint;
      c.orders = 2;
      add(cases, c);
    }
  }
}

// Maps that stress numbers rather than places; one size for each family of kernels.
void add_values(std::vector<Case>& cases) {
  const Size sizes[] = {{7, 9}, {16, 16}, {48, 40}, {96, 72}};
  for (int variant = 0; variant < 5; ++variant) {
    for (const Values values : {Values::peaked, Values::constant, Values::masked, Values::left_masked,
                                Values::degenerate, Values::offset_1e4, Values::offset_1e30}) {
      Case c = maps("values", variant == 4 ? 2 : 1, variant == 4 ? 5 : 5, variant == 4 ? Size{20, 12} : sizes[variant]);
      c.channels_last = variant == 4;
      c.values = values;
      c.orders = 2;
      add(cases, c);
    }
  }
}

void add_betas(std::vector<Case>& cases) {
  for (const bool channels_last : {false, true}) {
    for (const Size size : {Size{7, 9}, Size{32, 40}}) {
      for (const Betas betas : {Betas::value, Betas::tensor, Betas::per_keypoint, Betas::per_sample, Betas::per_map,
                                Betas::negative, Betas::zero, Betas::nan}) {
        for (const Values values : {Values::random, Values::masked}) {
          Case c = maps("betas", 3, 4, size);
          c.channels_last = channels_last;
          c.betas = betas;
          c.values = values;
          c.orders = 1;
          add(cases, c);
        }
      }
      for (int k = 1; k < kpfused::kCoordinates; ++k) {
        Case c = maps("units", 2, 3, size);
        c.channels_last = channels_last;
        c.units = static_cast<kpfused::Coordinates>(k);
        c.upstream = k % 2 ? Upstream::expanded : Upstream::transposed;
        c.orders = 1;
        add(cases, c);
      }
    }
  }
}

}  // namespace

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  add_sizes(cases);
  add_channels_last(cases);
  add_views(cases);
  add_values(cases);
  add_betas(cases);
  return cases;
}

}  // namespace harness
