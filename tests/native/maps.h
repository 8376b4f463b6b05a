// SPDX-License-Identifier: MIT
// Maps in memory. They end where their heap allocation ends, so that whatever is read or written beyond a map is an
// error of the sanitizer, and the gaps of sliced maps are checked for what is written between.
#pragma once

#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "simt/harness/values.h"

namespace native {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// What memory holds before a kernel writes to it.
constexpr unsigned char kUntouched = 0x5a;

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16};

enum class Layout { contiguous, sliced, channels_last, channels_sliced };
constexpr Layout kLayouts[] = {Layout::contiguous, Layout::sliced, Layout::channels_last, Layout::channels_sliced};

inline MapView make_view(Layout layout, int64_t outer, int64_t inner, int64_t height, int64_t width) {
  switch (layout) {
    case Layout::contiguous: return {outer, inner, height, width, inner * height * width, height * width, width, 1};
    case Layout::sliced:
      return {outer, inner, height, width, (inner + 1) * (height + 1) * (width + 3), (height + 1) * (width + 3),
              width + 3, 1};
    case Layout::channels_last: return {outer, inner, height, width, inner * height * width, 1, width * inner, inner};
    default:
      return {outer, inner, height, width, (height + 1) * (width + 2) * (inner + 5), 1, (width + 2) * (inner + 5),
              inner + 5};
  }
}

inline int64_t element(const MapView& v, int64_t map, int64_t y, int64_t x) {
  return map / v.inner * v.stride_outer + map % v.inner * v.stride_inner + y * v.stride_y + x * v.stride_x;
}

inline double get(Dtype dtype, const char* p) { return double(harness::load(dtype, p, 0)); }

// Of the NaNs of two bytes, the one next to infinity: what is easiest to take for a number.
inline void put(Dtype dtype, char* p, double value) {
  harness::store(dtype, p, 0, value);
  if (!std::isnan(value) || element_size(dtype) != 2) return;
  const uint16_t bits = dtype == Dtype::float16 ? 0x7c01 : 0x7f81;
  std::memcpy(p, &bits, 2);
}

// Memory that ends with the last element of the last map.
struct Buffer {
  Dtype dtype;
  MapView view;
  int64_t count;
  std::unique_ptr<char[]> bytes;

  Buffer(Dtype d, const MapView& v, unsigned char fill)
      : dtype(d), view(v), count(element(v, v.maps() - 1, v.height - 1, v.width - 1) + 1),
        bytes(new char[size_t(count * element_size(d))]) {
    std::memset(bytes.get(), fill, size_t(count * element_size(d)));
  }
  char* at(int64_t map, int64_t y, int64_t x) const {
    return bytes.get() + element(view, map, y, x) * element_size(dtype);
  }
  double value(int64_t map, int64_t y, int64_t x) const { return get(dtype, at(map, y, x)); }
};

struct Case {
  Dtype dtype;
  Layout layout;
  int64_t outer, inner, height, width;

  MapView view() const { return make_view(layout, outer, inner, height, width); }
  int64_t maps() const { return outer * inner; }
  std::string name() const {
    const char* const layouts[] = {"contiguous", "sliced", "channels_last", "channels_sliced"};
    std::string s = std::string(harness::dtype_name(dtype)) + " " + layouts[int(layout)];
    for (int64_t n : {outer, inner, height, width}) s += " " + std::to_string(n);
    return s;
  }
};

// Logits of spread 3 about a peak, and by map number: plain, -inf in places, one pixel alone, a NaN, a +inf, no weight
// at all, huge.
inline void fill(Buffer& h, bool odd) {
  const MapView& v = h.view;
  for (int64_t map = 0; map < v.maps(); ++map) {
    const int64_t kind = odd ? map % 8 : 0;
    const int64_t special = (map * 7919 + 3) % (v.height * v.width);
    for (int64_t y = 0; y < v.height; ++y) {
      for (int64_t x = 0; x < v.width; ++x) {
        const bool here = y * v.width + x == special;
        double value = 6 * uniform() - 3 + (here ? 4 : 0);
        if (kind == 1 && uniform() < 0.5 && !here) value = -kInfinity;
        if (kind == 2 && !here) value = -kInfinity;
        if (kind == 3 && here) value = NAN;
        if (kind == 4 && here) value = kInfinity;
        if (kind == 5) value = -kInfinity;
        if (kind == 6) value *= 1e4;
        put(h.dtype, h.at(map, y, x), value);
      }
    }
  }
}

// The maps of a case, NaN in the gaps between them.
inline Buffer heatmap_of(const Case& c, bool odd) {
  Buffer h(c.dtype, c.view(), 0xff);
  fill(h, odd);
  return h;
}

// Whether what lies between the maps is as it was.
inline bool gaps_untouched(const Buffer& grad) {
  std::vector<bool> written(size_t(grad.count), false);
  const MapView& v = grad.view;
  for (int64_t i = 0; i < v.maps() * v.height * v.width; ++i) {
    written[size_t(element(v, i / v.width / v.height, i / v.width % v.height, i % v.width))] = true;
  }
  const int64_t size = element_size(grad.dtype);
  for (int64_t i = 0; i < grad.count * size; ++i) {
    if (!written[size_t(i / size)] && grad.bytes[size_t(i)] != kUntouched) return false;
  }
  return true;
}

}  // namespace native
