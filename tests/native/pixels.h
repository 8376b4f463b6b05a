// SPDX-License-Identifier: MIT
// Which pixels count, and what the definition gives for the maps of which they are.
#pragma once

#include <sanitizer/asan_interface.h>

#include <memory>
#include <vector>

#include "maps.h"
#include "simt/harness/reference.h"

namespace native {

// rows_of_mask: a mask of whole rows. pixels_of_mask: one of which the channels of a pixel stand side by side;
// channels_of_mask: as the last of some more. grouped_mask: one that groups of channels have in common, as the volumes of some
// keypoints. sizes: of samples; sizes_of_maps: of each map, some of which have none.
// bits_of_mask: a bit for each pixel, of maps whose pixels stand side by side; bits_and_sizes: with sizes too.
enum class Counted {
  all,
  mask,
  shared_mask,
  rows_of_mask,
  pixels_of_mask,
  channels_of_mask,
  grouped_mask,
  sizes,
  sizes_of_maps,
  both,
  bits_of_mask,
  bits_and_sizes
};
constexpr Counted kCounted[] = {Counted::all,
                               Counted::mask,
                               Counted::shared_mask,
                               Counted::rows_of_mask,
                               Counted::pixels_of_mask,
                               Counted::channels_of_mask,
                               Counted::grouped_mask,
                               Counted::sizes,
                               Counted::sizes_of_maps,
                               Counted::both,
                               Counted::bits_of_mask,
                               Counted::bits_and_sizes};
constexpr int64_t kCountings = sizeof(kCounted) / sizeof(kCounted[0]);
constexpr int64_t kLaneCountings = kCountings - 2;  // where lanes are channels: without the last two

// What maps without weight give where not all pixels count.
constexpr double kEmpty = -5;

// In memory that ends with what the kernels may read.
struct Pixels {
  const Case& c;
  Counted kind;
  std::unique_ptr<uint8_t[]> mask;
  std::unique_ptr<int64_t[]> sizes;
  PixelView view{};
  int64_t first = 0;  // byte of the mask

  // columns: how many of them count where sizes do, of all rows; 0: any, and any rows.
  Pixels(const Case& k, Counted counted, int64_t columns = 0) : c(k), kind(counted) {
    view.divisor = view.modulus = 1;
    view.fills_empty = kind != Counted::all;
    view.empty_value = kEmpty;
    if (kind != Counted::all && kind != Counted::sizes && kind != Counted::sizes_of_maps) draw_mask();
    const bool both = kind == Counted::both || kind == Counted::bits_and_sizes;
    if (kind == Counted::sizes || kind == Counted::sizes_of_maps || both) draw_sizes(columns);
  }

  bool at(int64_t map, int64_t y, int64_t x) const {
    const size_t size = size_t(map / view.divisor % view.modulus * 2);
    if (view.sizes && (y >= sizes[size] || x >= sizes[size + 1])) return false;
    const MaskView& of = view.mask_view;
    if (!view.mask) return true;
    const int64_t row = first + of.offset(map) + y * of.stride_y;
    return of.stride_x == kMaskBits ? mask[size_t(row + x / 8)] >> x % 8 & 1 : mask[size_t(row + x * of.stride_x)] != 0;
  }

 private:
  void draw_mask() {
    const int64_t pixels = c.height * c.width, shared = kind == Counted::shared_mask ? 0 : pixels;
    const int64_t maps = shared ? c.maps() : 1;
    view.mask_view = {2, {c.inner, c.outer}, {shared, shared * c.inner}, c.width, 1};
    int64_t bytes = maps * pixels;
    if (kind == Counted::rows_of_mask) {
      view.mask_view = {2, {c.inner, c.outer}, {c.height, c.height * c.inner}, 1, 0};
      bytes = maps * c.height;
    }
    if (kind == Counted::pixels_of_mask || kind == Counted::channels_of_mask) {
      // Some more: as many as a vector has lanes, on some instruction set. Padded pixels are as far apart.
      const int64_t more = c.inner <= 4 ? 4 : c.inner <= 8 ? 8 : c.inner <= 16 ? 16 : c.inner + 1;
      const int64_t channels = kind == Counted::pixels_of_mask ? c.inner : more;
      first = channels - c.inner;
      bytes = c.outer * pixels * channels;
      view.mask_view = {2, {c.inner, c.outer}, {1, pixels * channels}, c.width * channels, channels};
    }
    if (kind == Counted::grouped_mask) {
      const int64_t groups = harness::groups_of(c.inner), own = c.inner / groups;
      bytes = c.outer * own * pixels;
      view.mask_view = {3, {own, groups, c.outer}, {pixels, 0, own * pixels}, c.width, 1};
    }
    const bool bits = (kind == Counted::bits_of_mask || kind == Counted::bits_and_sizes) && c.view().stride_x == 1;
    if (bits) {
      const int64_t row = (c.width + 7) / 8, plane = c.height * row;
      bytes = maps * plane;
      view.mask_view = {2, {c.inner, c.outer}, {plane, plane * c.inner}, row, kMaskBits};
    }
    mask.reset(new uint8_t[size_t(bytes)]);
    for (int64_t i = 0; i < bytes; ++i) {
      uint8_t value = 0;
      for (int b = 0; b < (bits ? 8 : 1); ++b) value |= uint8_t((uniform() < 0.6) << b);
      mask[size_t(i)] = i * maps / bytes == 3 ? 0 : value;
    }
    view.mask = mask.get() + first;
  }

  void draw_sizes(int64_t columns) {
    view.divisor = c.inner, view.modulus = c.outer;
    if (kind == Counted::sizes_of_maps) view.divisor = 1, view.modulus = c.maps();
    sizes.reset(new int64_t[size_t(2 * view.modulus)]);
    for (int64_t i = 0; i < view.modulus; ++i) {
      sizes[size_t(2 * i)] = columns ? c.height : 1 + int64_t(uniform() * double(c.height));
      sizes[size_t(2 * i + 1)] = columns ? columns : 1 + int64_t(uniform() * double(c.width));
      if (kind == Counted::sizes_of_maps && i % 5 == 3) sizes[size_t(2 * i)] = 0;
    }
    view.sizes = sizes.get();
  }
};

// NaN where no pixel counts: what is there may be anything.
inline void spoil(Buffer& h, const Pixels& pixels) {
  const MapView& v = h.view;
  for (int64_t i = 0; i < v.maps() * v.height * v.width; ++i) {
    const int64_t map = i / v.height / v.width, y = i / v.width % v.height, x = i % v.width;
    if (!pixels.at(map, y, x)) put(h.dtype, h.at(map, y, x), NAN);
  }
}

// As long as this lives, the sanitizer reports whoever reads a heatmap beyond the valid sizes of samples. Those of maps side by
// side in memory differ within a cache line.
class NotRead {
 public:
  NotRead(const Buffer& h, const Pixels& pixels) : h_(h) {
    if (!pixels.view.sizes || pixels.kind == Counted::sizes_of_maps) return;
    std::vector<bool> read(size_t(h.count), false);
    const MapView& v = h.view;
    for (int64_t i = 0; i < v.maps() * v.height * v.width; ++i) {
      const int64_t map = i / v.height / v.width, y = i / v.width % v.height, x = i % v.width;
      const int64_t* const size = pixels.view.sizes + map / pixels.view.divisor % pixels.view.modulus * 2;
      if (y < size[0] && x < size[1]) read[size_t(element(v, map, y, x))] = true;
    }
    const int64_t bytes = element_size(h.dtype);
    for (int64_t i = 0, end; i < h.count; i = end + 1) {
      for (end = i; end < h.count && !read[size_t(end)];) ++end;
      ASAN_POISON_MEMORY_REGION(h.bytes.get() + i * bytes, size_t((end - i) * bytes));
    }
  }
  ~NotRead() { ASAN_UNPOISON_MEMORY_REGION(h_.bytes.get(), size_t(h_.count * element_size(h_.dtype))); }
  NotRead(const NotRead&) = delete;

 private:
  const Buffer& h_;
};

// One map by the definition, and the gradients of the sum of g times what it gives.
inline harness::Reference reference(const Buffer& h, int64_t map, double beta, const Pixels& pixels,
                                    const harness::FieldGradient& g) {
  const MapView& v = h.view;
  std::vector<harness::Real> logits;
  std::vector<uint8_t> counts;
  for (int64_t i = 0; i < v.height * v.width; ++i) {
    logits.push_back(h.value(map, i / v.width, i % v.width));
    counts.push_back(pixels.at(map, i / v.width, i % v.width));
  }
  return harness::reference({logits, counts, v.height, v.width, beta, g});
}

// Means are measured from the centre of the map.
inline double from_centre(harness::Real coordinate, int64_t extent) {
  return double(coordinate - harness::Real(extent - 1) / 2);
}

}  // namespace native
