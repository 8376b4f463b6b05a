// SPDX-License-Identifier: MIT
#include "cases.h"

#include <cstdio>

namespace harness {

namespace {

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16};

const char* betas_name(Betas betas) {
  constexpr const char* names[] = {"number",   "tensor", "per-keypoint", "per-sample", "per-map",
                                   "negative", "zero",   "tiny",         "nan"};
  return names[static_cast<int>(betas)];
}

const char* upstream_name(Upstream upstream) {
  constexpr const char* names[] = {"dense", "expanded", "transposed"};
  return names[static_cast<int>(upstream)];
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
  add("map-stride", map_stride);
  add("row-stride", row_stride);
  name += std::string("/") + values_name(values) + "/beta-" + betas_name(betas) + "/" + upstream_name(upstream);
  add("units", static_cast<int>(units));
  if (moments) name += "/moments";
  if (moments && upstream_fields != kAllGradients) add("fields", upstream_fields);
  constexpr const char* of_counts[] = {"",  "/mask", "/shared-mask", "/mask-of-columns", "/mask-of-channels", "/grouped-mask",
                                       "/size", "/mask+size"};
  if (fills) name += "/fills";
  return name + of_counts[static_cast<int>(counts)];
}

Strides Case::strides() const {
  if (channels_last) {
    const int64_t x = inner + row_pad, y = row_stride ? row_stride : (width + map_pad) * x;
    if (map_stride) return {map_stride, 1, y, x};
    return {height * y, 1, y, x};
  }
  const int64_t y = row_stride ? row_stride : width + row_pad, map = map_stride ? map_stride : height * y + map_pad;
  return {inner * map + map_pad, map, y, 1};
}

Strides Case::grad_strides() const {
  if (map_stride || row_stride) return strides();
  if (channels_last) return {height * width * inner, 1, width * inner, inner};
  return {inner * height * width, height * width, width, 1};
}

kpfused::Layout views(const Case& c, int64_t outer, int64_t inner, const Strides& first, const Strides& second) {
  const int64_t sizes[] = {outer, inner, c.height, c.width};
  return kpfused::fold_layout(sizes, 4, first.data(), second.data());
}

MapView unfolded(const Case& c, int64_t outer, int64_t inner, const Strides& s) {
  MapView v{outer, inner, c.height, c.width, s[0], s[1], s[2], s[3]};
  if (c.width == 1) v.stride_x = 1;
  if (c.height == 1) v.stride_y = v.stride_x * c.width;
  return v;
}

MapView Case::view() const { return views(*this, outer, inner, strides(), strides()).first; }

kpfused::Layout Case::backward_views() const { return views(*this, outer, inner, strides(), grad_strides()); }

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
    case Betas::tiny: return -0x1p-110L;
    case Betas::nan: return kNan;
  }
  return 0;
}

kpfused::MaskView Case::mask_view() const {
  const int64_t row = width + 3, plane = height * row, own = inner / groups_of(inner);
  const auto even = [this](int64_t of_image, int64_t of_map, int64_t of_row, int64_t of_pixel) {
    return kpfused::MaskView{2, {inner, outer}, {of_map, of_image}, of_row, of_pixel};
  };
  switch (counts) {
    case Counts::shared: return even(0, 0, width, 1);
    case Counts::columns: return even(inner * width, width, 0, 1);
    case Counts::channels: return even(height * width * inner, 1, width * inner, inner);
    case Counts::grouped: return {3, {own, groups_of(inner), outer}, {plane, 0, own * plane}, row, 1};
    default: return even(inner * plane, plane, row, 1);
  }
}

int64_t Case::mask_at(int64_t map, int64_t y, int64_t x) const {
  const kpfused::MaskView view = mask_view();
  return view.offset(map) + y * view.stride_y + x * view.stride_x;
}

size_t Case::mask_bytes() const { return static_cast<size_t>(mask_at(maps() - 1, height - 1, width - 1) + 1); }

bool Case::mask(int64_t map, int64_t y, int64_t x) const {
  if (counts == Counts::shared) map = 0;
  if (counts == Counts::columns) y = 0;
  if (counts == Counts::grouped) map = map / inner * inner + map % inner % (inner / groups_of(inner));
  if (map % 5 == 3) return false;
  return uniform(static_cast<uint64_t>(map) + 4001, static_cast<uint64_t>(y * width + x)) < 0.7L;
}

int64_t Case::valid_height(int64_t map) const {
  const auto sample = static_cast<uint64_t>(map / inner);
  if (sample % 4 == 3) return sample % 8 == 3 ? 0 : height + 5;
  return 1 + static_cast<int64_t>(uniform(sample + 71, 3) * static_cast<Real>(height));
}

int64_t Case::valid_width(int64_t map) const {
  return 1 + static_cast<int64_t>(uniform(static_cast<uint64_t>(map / inner) + 72, 3) * static_cast<Real>(width));
}

bool Case::counted(int64_t map, int64_t y, int64_t x) const {
  if (has_sizes() && (y >= valid_height(map) || x >= valid_width(map))) return false;
  return !has_mask() || mask(map, y, x);
}

Real Case::logit(int64_t map, int64_t y, int64_t x) const {
  if (counted(map, y, x)) return harness::logit(values, map, y, x, height, width);
  constexpr Real nothing[] = {kNan, kInfinity, -kInfinity, 60000};
  return nothing[(map + y + x) % 4];
}

namespace {

struct Size {
  int64_t height, width;
};

// Adds one case for every dtype, or for those whose range holds the values.
void add(std::vector<Case>& cases, Case c) {
  for (const Dtype dtype : kDtypes) {
    if ((c.values == Values::offset_1e30 || c.values == Values::ties) && dtype == Dtype::float16) continue;
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

// Sizes around the changes of kernel, of vector width and of the threads' shape over a map. Each map of its own beta,
// alone and among others.
void add_rows(std::vector<Case>& cases) {
  // Maps for part of a warp: up to 256 elements one at a time, 512 in float32 vectors and 1024 in half-precision ones.
  const Size team[] = {{1, 1},   {1, 2},   {2, 1},   {1, 5},   {5, 1},   {3, 3},   {5, 5},   {7, 9},    {8, 8},
                       {4, 16},  {10, 12}, {1, 17},  {17, 1},  {16, 16}, {1, 128}, {128, 1}, {15, 17},  {1, 256},
                       {1, 257}, {256, 1}, {2, 129}, {16, 32}, {8, 68},  {32, 32}, {33, 32}, {1, 1024}, {300, 1}};
  for (const Size size : team) {
    Case c = maps("team", 1, 7, size);
    c.alone = true;
    c.betas = Betas::per_map;
    add(cases, c);
  }
  const Size block[] = {{17, 31}, {47, 53}, {48, 64}, {64, 64}, {61, 67}, {96, 72}, {1, 3000}, {3001, 1}, {80, 80}};
  for (const Size size : block) {
    Case c = maps("block", 1, 3, size);
    c.alone = true;
    c.betas = Betas::per_map;
    add(cases, c);
  }
  for (const Size size : {Size{127, 129}, Size{160, 160}, Size{5, 2052}}) {
    Case c = maps("block", 1, 2, size);
    c.orders = 2;
    add(cases, c);
  }
}

// A map is split by its size alone, above 512 KB. Parts are rows of it, or of one row; the last may be a short one.
void add_split(std::vector<Case>& cases) {
  for (const Dtype dtype : kDtypes) {
    const int64_t most = (512 << 10) / kpfused::element_size(dtype);
    const auto one = [&](int64_t inner, Size size, Values values, int orders) {
      Case c = maps("split", 1, inner, size);
      c.dtype = dtype;
      c.values = values;
      c.orders = orders;
      c.alone = inner > 1;
      cases.push_back(c);
    };
    one(1, {most / 512, 512}, Values::random, 2);
    one(2, {most / 512 + 1, 512}, Values::random, 2);
    one(1, {most / 509 + 1, 509}, Values::peaked, 2);
    one(1, {1, most + 3}, Values::random, 1);
    one(1, {2, most / 2 + 16}, Values::random, 1);
    one(1, {most + 1, 1}, Values::random, 1);
    one(1, {most / 512 + 1, 512}, Values::left_masked, 1);
    if (dtype == Dtype::float32) one(5, {most / 512 + 1, 512}, Values::degenerate, 1);
  }
}

void add_channels(std::vector<Case>& cases) {
  for (const int64_t channels : {2, 3, 4, 5, 7, 8, 16, 17, 24, 32, 33, 64, 128, 133, 512, 1030, 1032}) {
    for (const Size size : {Size{7, 9}, Size{16, 16}, Size{1, 2}, Size{31, 23}}) {
      // Wide tiles differ from others in their channels, not in their pixels.
      if (channels > 100 && size.height > (channels > 133 ? 7 : 16)) continue;
      Case c = maps("channels", 2, channels, size);
      c.channels_last = true;
      c.alone = channels < 40;
      c.orders = channels < 40 ? 4 : 2;
      add(cases, c);
    }
  }
  for (const Size size : {Size{1, 33}, Size{33, 1}, Size{1, 1}, Size{1, 700}, Size{700, 2}, Size{47, 53}}) {
    for (const int64_t channels : {4, 8, 17}) {
      Case c = maps("channels", 2, channels, size);
      c.channels_last = true;
      c.orders = 2;
      add(cases, c);
    }
  }
  // A slice of the channels, of the columns, and a first channel that no vector load may start at.
  for (const int64_t channels : {8, 17}) {
    for (int variant = 0; variant < 4; ++variant) {
      Case c = maps("channels", 2, channels, {9, 14});
      c.channels_last = true;
      c.row_pad = variant == 0 ? 8 : variant == 1 ? 1 : 0;
      c.map_pad = variant == 2 ? 2 : 0;
      c.lead = variant == 3 ? 1 : 0;
      c.betas = Betas::per_keypoint;
      add(cases, c);
    }
  }
  // Images above 96 KB: parts of some rows, of one, or of a row: signals.
  const struct {
    int64_t channels;
    Size size;
  } split[] = {{17, {64, 48}}, {8, {96, 72}}, {16, {3, 2200}}, {5, {40, 300}}, {133, {18, 24}}, {520, {20, 12}}, {17, {1, 6001}}, {16, {2, 3100}}};
  for (const auto& s : split) {
    Case c = maps("channels-split", 2, s.channels, s.size);
    c.channels_last = true;
    c.orders = 2;
    c.alone = s.channels == 17;
    add(cases, c);
    if (s.channels != 8) continue;
    c.values = Values::left_masked;
    add(cases, c);
  }
}

// Views that start or go on at places where no vector load may: sliced rows, columns and maps.
void add_views(std::vector<Case>& cases) {
  const Size sizes[] = {{3, 5}, {7, 9}, {8, 8}, {10, 12}, {16, 32}, {40, 48}, {47, 53}};
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

// Offsets that no 32-bit integer holds, between maps and within one.
void add_far(std::vector<Case>& cases) {
  const int64_t far = int64_t{1} << 31;
  for (const Dtype dtype : {Dtype::float32, Dtype::bfloat16}) {
    for (const bool channels_last : {false, true}) {
      for (const Size size : {Size{7, 9}, Size{40, 48}}) {
        for (const bool rows : {false, true}) {
          Case c = maps("far", channels_last ? 2 : 1, channels_last ? 8 : 2, size);
          c.dtype = dtype;
          c.channels_last = channels_last;
          c.row_stride = rows ? far / (size.height - 2) / 64 * 64 : 0;
          c.map_stride = rows ? far * 2 : far + 64;
          c.orders = 1;
          cases.push_back(c);
        }
      }
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
    }
  }
}

// Every preset of coordinates, with gradients that autograd hands over expanded or transposed.
void add_units(std::vector<Case>& cases) {
  for (const bool channels_last : {false, true}) {
    for (const Size size : {Size{7, 9}, Size{32, 40}, Size{1, 12}}) {
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

// The kernels of moments and masks walk as those of means do, so they get the same maps, fewer of them. What counts goes
// round from case to case.
void add_moments(std::vector<Case>& cases) {
  const std::vector<Case> means = cases;
  constexpr Counts kinds[] = {Counts::own,  Counts::both,    Counts::shared,  Counts::grouped,
                              Counts::size, Counts::columns, Counts::channels};
  constexpr int kFields[] = {kAllGradients, kMeanGradient, kAllGradients, kCovarianceGradient, kEntropyGradient,
                             kAllGradients, kLogsumexpGradient, kPeakGradient};
  const char* last = "";
  int number = 0, kind = 0;
  for (Case c : means) {
    const std::string group = c.group;
    if (group != last) number = 0;
    last = c.group;
    const int64_t pixels = c.maps() * c.height * c.width;
    // Of the many alike, some; of the large ones, one of each dtype.
    const int every = group == "views" ? 5 : group == "channels" || group == "betas" || group == "units" ? 3 : 1;
    const int turn = number++;
    if (turn % every != 0 || (pixels > 100000 && group != "split" && group != "channels-split")) continue;
    c.orders = c.orders > 2 ? 2 : c.orders;
    c.moments = true;
    if (group == "units" || group == "betas") c.upstream_fields = kFields[turn / every % 8];
    cases.push_back(c);
    if (group == "far" || (pixels > 100000 && turn % 2 == 0)) continue;
    // Masks without moments go through the same kernels.
    c.moments = kind / 7 % 3 != 0;
    c.counts = kinds[kind++ % 7];
    cases.push_back(c);
  }
  const Size sizes[] = {{7, 9}, {16, 16}, {48, 40}, {96, 72}, {20, 12}};
  for (int variant = 0; variant < 5; ++variant) {
    for (const Values values : {Values::border, Values::ties}) {
      for (const Counts counts : {Counts::all, Counts::own, Counts::both}) {
        Case c = maps("moments", variant == 4 ? 2 : 1, 5, sizes[variant]);
        c.channels_last = variant == 4;
        c.values = values;
        c.counts = counts;
        c.moments = true;
        c.betas = values == Values::border ? Betas::value : Betas::negative;
        if (values == Values::ties) c.betas = variant % 2 ? Betas::zero : Betas::tensor;
        c.orders = 2;
        add(cases, c);
      }
    }
  }
  // Whole pairs of channels, but no whole vectors of 16 bytes: as aligned as the loads of moments have to be.
  // Groups of nine share masks: a pair has the last of one and the first of the next.
  for (const Counts counts : {Counts::all, Counts::own, Counts::grouped}) {
    Case c = maps("moments", 3, 18, {5, 7});
    c.channels_last = true;
    c.counts = counts;
    c.moments = true;
    c.orders = 1;
    add(cases, c);
  }
  // What scales with beta lies below the smallest float32 here; dbeta does not.
  for (const bool channels_last : {false, true}) {
    for (const Betas betas : {Betas::zero, Betas::tiny}) {
      for (const Counts counts : {Counts::all, Counts::own}) {
        Case c = maps("moments", 2, 4, {32, 40});
        c.channels_last = channels_last;
        c.betas = betas;
        c.counts = counts;
        c.moments = true;
        c.upstream_fields = counts == Counts::all ? kMeanGradient : kAllGradients;
        c.orders = 1;
        add(cases, c);
      }
    }
  }
  for (int variant = 0; variant < 5; ++variant) {
    for (const bool moments : {false, true}) {
      Case c = maps("fills", variant == 4 ? 2 : 1, 5, sizes[variant]);
      c.channels_last = variant == 4;
      c.values = Values::degenerate;
      c.moments = moments;
      c.fills = true;
      c.orders = 2;
      add(cases, c);
    }
  }
  for (const bool channels_last : {false, true}) {
    Case c = maps("moments", 1, 2, {256, 256});
    c.channels_last = channels_last;
    c.values = Values::border;
    c.moments = true;
    c.orders = 1;
    c.dtype = Dtype::float32;
    cases.push_back(c);
  }
}

}  // namespace

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  add_rows(cases);
  add_split(cases);
  add_channels(cases);
  add_views(cases);
  add_far(cases);
  add_values(cases);
  add_betas(cases);
  add_units(cases);
  add_moments(cases);
  return cases;
}

}  // namespace harness
