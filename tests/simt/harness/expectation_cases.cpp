// SPDX-License-Identifier: MIT
#include "expectation.h"

namespace harness {

std::string ExpectationCase::name() const {
  std::string name = maps.name();
  if (kind == ValueKind::coordinates) name += "/of-coordinates";
  if (kind == ValueKind::window) name += "/window" + std::to_string(radius) + (centred ? "-around" : "");
  if (channels > 1) name += "/channels" + std::to_string(channels);
  if (share_outer) name += "/share-outer";
  if (share_inner) name += "/share-inner";
  constexpr const char* layouts[] = {"", "/pixels", "/gaps"};
  name += layouts[static_cast<int>(layout)];
  if (!upstream) name += "/ones";
  if (is_probability) name += "/probability";
  if (far) name += "/far-values";
  return name;
}

// Never folded: values that only some maps share would not fold likewise.
MapView ExpectationCase::view() const { return unfolded(maps, maps.outer, maps.inner, maps.strides()); }
MapView ExpectationCase::grad_view() const { return unfolded(maps, maps.outer, maps.inner, maps.grad_strides()); }

kpfused::ValueView ExpectationCase::value_view() const {
  if (kind != ValueKind::tensor) return {channels, 0, 0, 0, 0, 0};
  const int64_t inner = share_inner ? 1 : maps.inner, h = maps.height, w = maps.width;
  kpfused::ValueView v{};
  if (layout == ValueLayout::pixels) {
    const int64_t pixel = inner * channels;
    v = {channels, h * w * pixel, channels, 1, w * pixel, pixel};
  } else {
    const int64_t row = w + (layout == ValueLayout::gaps ? 3 : 0), plane = h * row + (layout == ValueLayout::gaps ? 5 : 0);
    v = {channels, inner * channels * plane, channels * plane, plane, row, 1};
  }
  if (far) v.stride_channel = (int64_t{1} << 31) + 3;
  if (share_outer) v.stride_outer = 0;
  if (share_inner) v.stride_inner = 0;
  return v;
}

namespace {

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16};

struct Size {
  int64_t height, width;
};

ExpectationCase of_maps(const char* group, int64_t outer, int64_t inner, Size size) {
  ExpectationCase c{};
  c.maps.group = group;
  c.maps.outer = outer, c.maps.inner = inner, c.maps.height = size.height, c.maps.width = size.width;
  c.maps.orders = 2;
  return c;
}

void add(std::vector<ExpectationCase>& cases, ExpectationCase c) {
  for (const Dtype dtype : kDtypes) {
    c.maps.dtype = dtype;
    cases.push_back(c);
  }
}

// Sizes for part of a warp, a warp, and a block; layouts; channels below, at and beyond what one pass takes.
void add_sizes(std::vector<ExpectationCase>& cases) {
  int turn = 0;
  for (const Size size : {Size{1, 1}, Size{1, 2}, Size{3, 1}, Size{3, 3}, Size{7, 9}, Size{1, 33}, Size{16, 16}, Size{17, 31},
                          Size{300, 1}, Size{31, 23}}) {
    for (const bool channels_last : {false, true}) {
      ExpectationCase c = of_maps("expectation", 2, 3, size);
      c.maps.channels_last = channels_last;
      c.maps.betas = Betas::per_map;
      c.channels = 1 + turn % 9;
      c.layout = static_cast<ValueLayout>(turn % 3);
      c.upstream = turn % 4 != 1;
      ++turn;
      add(cases, c);
    }
  }
  for (int64_t channels = 1; channels <= 9; ++channels) {
    ExpectationCase c = of_maps("expectation", 2, 5, {7, 9});
    c.maps.channels_last = channels % 2 == 0;
    c.channels = channels;
    c.maps.betas = channels % 3 ? Betas::negative : Betas::per_keypoint;
    c.layout = static_cast<ValueLayout>(channels % 3);
    c.upstream = channels != 1;
    add(cases, c);
  }
  for (const int64_t maps : {33, 133}) {
    ExpectationCase c = of_maps("expectation", 2, maps, {5, 7});
    c.maps.channels_last = true;
    c.channels = 2;
    c.layout = ValueLayout::pixels;
    add(cases, c);
  }
}

// Maps above 512 KB and images above 96 KB, whose parts a second launch adds.
void add_split(std::vector<ExpectationCase>& cases) {
  for (const Dtype dtype : kDtypes) {
    const int64_t most = (512 << 10) / kpfused::element_size(dtype);
    ExpectationCase c = of_maps("expectation-split", 1, 2, {most / 512 + 1, 512});
    c.maps.dtype = dtype;
    c.maps.orders = 1;
    c.channels = dtype == Dtype::float32 ? 5 : 1;
    c.share_inner = dtype == Dtype::float64;
    c.upstream = dtype != Dtype::float16;
    cases.push_back(c);
    c = of_maps("expectation-split", 2, 17, {64, 48});
    c.maps.dtype = dtype;
    c.maps.channels_last = true;
    c.maps.counts = dtype == Dtype::float32 ? Counts::both : Counts::all;
    c.kind = dtype == Dtype::float16 ? ValueKind::coordinates : ValueKind::tensor;
    c.channels = 2;
    c.share_outer = c.share_inner = c.kind == ValueKind::tensor;
    cases.push_back(c);
    // A row in parts.
    c.maps.height = 1, c.maps.width = 64 * 48 * 2;
    c.maps.counts = dtype == Dtype::float32 ? Counts::all : Counts::own;
    cases.push_back(c);
  }
  for (const ValueKind kind : {ValueKind::coordinates, ValueKind::window}) {
    ExpectationCase c = of_maps("expectation-split", 1, 5, {257, 512});
    c.maps.orders = 1;
    c.maps.values = Values::degenerate;
    c.maps.fills = true;
    c.kind = kind;
    c.channels = kind == ValueKind::window ? 1 : 2;
    c.radius = 40;
    cases.push_back(c);
  }
}

// Who shares values: nobody, maps of a sample, samples, all; and what counts.
void add_sharing(std::vector<ExpectationCase>& cases) {
  constexpr Counts kinds[] = {Counts::all, Counts::own, Counts::both, Counts::shared, Counts::size, Counts::columns, Counts::channels};
  int turn = 0;
  for (const Counts counts : kinds) {
    for (int sharing = 0; sharing < 4; ++sharing) {
      for (const bool channels_last : {false, true}) {
        ExpectationCase c = of_maps("expectation-shared", 3, 5, turn % 3 ? Size{7, 9} : Size{20, 13});
        c.maps.counts = counts;
        c.maps.channels_last = channels_last;
        c.share_outer = sharing & 1, c.share_inner = sharing & 2;
        c.channels = 1 + turn % 6;
        c.maps.betas = turn % 5 == 0 ? Betas::per_sample : turn % 5 == 1 ? Betas::tensor : Betas::value;
        c.maps.values = turn % 2 ? Values::random : Values::degenerate;
        c.upstream = turn % 3 != 0;
        c.maps.moments = turn % 4 == 0;
        c.is_probability = turn % 7 == 3;
        if (c.is_probability) c.maps.values = Values::random;
        ++turn;
        add(cases, c);
      }
    }
  }
}

void add_kinds(std::vector<ExpectationCase>& cases) {
  for (const bool channels_last : {false, true}) {
    for (const Size size : {Size{7, 9}, Size{24, 20}, Size{1, 12}}) {
      for (int k = 0; k < kpfused::kCoordinates; ++k) {
        ExpectationCase c = of_maps("expectation-kinds", 2, 3, size);
        c.kind = ValueKind::coordinates;
        c.channels = 2;
        c.maps.channels_last = channels_last;
        c.maps.units = static_cast<kpfused::Coordinates>(k);
        c.is_probability = k % 2;
        c.maps.counts = k == 3 ? Counts::both : Counts::all;
        c.maps.orders = 1;
        add(cases, c);
      }
      for (int k = 0; k < 6; ++k) {
        ExpectationCase c = of_maps("expectation-kinds", 2, 5, size);
        c.kind = ValueKind::window;
        c.radius = k == 5 ? 1000 : k;
        c.centred = k % 2;
        c.maps.moments = k % 3 != 1;
        c.maps.channels_last = channels_last;
        c.maps.values = k == 1 || k == 2 ? Values::degenerate : Values::peaked;  // NaN within the window and beside it
        c.maps.counts = k == 3 ? Counts::both : k == 4 ? Counts::own : Counts::all;
        c.maps.fills = k == 2;
        c.maps.orders = 1;
        add(cases, c);
      }
    }
  }
}

// Numbers: weights of nothing, NaN, infinity, empty maps, any beta.
void add_numbers(std::vector<ExpectationCase>& cases) {
  int turn = 0;
  for (const bool channels_last : {false, true}) {
    for (const Values values : {Values::masked, Values::degenerate, Values::constant, Values::offset_1e4}) {
      for (const Betas betas : {Betas::value, Betas::negative, Betas::zero, Betas::nan}) {
        ExpectationCase c = of_maps("expectation-values", 2, 5, {7, 9});
        c.maps.channels_last = channels_last;
        c.maps.values = values;
        c.maps.betas = betas;
        c.maps.fills = turn % 2;
        c.upstream = turn % 3 != 1;
        c.channels = 1 + turn % 2;
        c.maps.orders = 1;
        ++turn;
        add(cases, c);
      }
    }
  }
}

// Views of larger tensors, and offsets that no 32-bit integer holds.
void add_views(std::vector<ExpectationCase>& cases) {
  for (const bool channels_last : {false, true}) {
    for (const int variant : {0, 1, 2}) {
      ExpectationCase c = of_maps("expectation-views", 2, 3, {9, 14});
      c.maps.channels_last = channels_last;
      c.maps.row_pad = variant == 0 ? 3 : 0;
      c.maps.map_pad = variant == 1 ? 2 : 0;
      c.maps.lead = variant == 2 ? 1 : 0;
      c.layout = ValueLayout::gaps;
      c.channels = 3;
      add(cases, c);
    }
  }
  for (const bool channels_last : {false, true}) {
    for (int variant = 0; variant < 3; ++variant) {
      ExpectationCase c = of_maps("expectation-far", 2, channels_last ? 5 : 2, {7, 9});
      c.maps.channels_last = channels_last;
      const int64_t far = int64_t{1} << 31;
      if (variant == 0) c.maps.map_stride = far + 64;
      if (variant == 1) c.maps.row_stride = far / 5 / 64 * 64, c.maps.map_stride = far * 2;
      if (variant == 2) c.far = true, c.share_outer = c.share_inner = true;
      c.channels = 2;
      c.maps.orders = 1;
      cases.push_back(c);
    }
  }
}

}  // namespace

std::vector<ExpectationCase> expectation_cases() {
  std::vector<ExpectationCase> cases;
  add_sizes(cases);
  add_split(cases);
  add_sharing(cases);
  add_kinds(cases);
  add_numbers(cases);
  add_views(cases);
  return cases;
}

}  // namespace harness
