// SPDX-License-Identifier: MIT
// Everything a case hands to the kernels, and what they should make of it.
#pragma once

#include <utility>
#include <vector>

#include "buffers.h"
#include "check.h"

namespace harness {

using kpfused::BetaView;
using kpfused::PixelView;

inline size_t size_of(Dtype dtype) { return static_cast<size_t>(kpfused::element_size(dtype)); }

// A heatmap, what comes with it, and room for the results; the case's own, or some of its maps by themselves.
struct Problem {
  Dtype dtype;
  MapView view;              // forward's
  kpfused::Layout backward;  // backward's: of heatmap and gradient
  PixelView pixels;
  BetaView beta;
  kpfused::Units units;
  const void* heatmap;
  const void* grad_coordinates;
  int64_t grad_stride_map, grad_stride_xy;
  bool with_moments;
  const void* grad_fields[4];  // covariance, entropy, logsumexp, peak_probability
};

constexpr int64_t kFieldValues[] = {4, 1, 1, 1};

class Fixture {
 public:
  explicit Fixture(const Case& c)
      : c_(c),
        view_(c.view()),
        heatmap_(extent(view_), size_of(c.dtype), static_cast<size_t>(c.lead)),
        betas_(c.beta_count(), size_of(accumulator(c.dtype))),
        upstream_(static_cast<size_t>(c.upstream == Upstream::expanded ? 1 : 2 * view_.maps()),
                  size_of(accumulator(c.dtype))),
        pixels_(heatmap_.huge() ? 0 : extent(view_), 0),
        mask_(c.has_mask() ? c.mask_bytes() : 0, 1),
        sizes_(c.has_sizes() ? static_cast<size_t>(2 * c.outer) : 0, 8),
        fields_{Buffer(4 * maps(), wide()), Buffer(maps(), wide()), Buffer(maps(), wide()), Buffer(maps(), wide())} {
    heatmap_.fill(0xff);  // NaN between the maps
    each_pixel(view_, [&](int64_t n, int64_t y, int64_t x, int64_t offset) {
      store(c.dtype, heatmap_.data(), offset, c.logit(n, y, x));
      if (!pixels_.empty()) pixels_[static_cast<size_t>(offset)] = 1;
    });
    const Dtype wide = accumulator(c.dtype);
    const auto [divisor, modulus] = beta_folding();
    for (int64_t n = 0; n < view_.maps(); ++n) {
      store(wide, betas_.data(), n / divisor % modulus, c.beta(n));
      for (int axis = 0; axis < 2; ++axis)
        store(wide, upstream_.data(), n * stride_map() + axis * stride_xy(), wanted_upstream(n, axis));
      for (int k = 0; k < 4; ++k)
        for (int64_t i = 0; i < kFieldValues[k]; ++i)
          store(wide, fields_[k].data(), n * kFieldValues[k] + i,
                (2 * uniform(static_cast<uint64_t>(n) + 131, static_cast<uint64_t>(k * 4 + i)) - 1) * 0.9L);
    }
    if (c.has_mask())
      each_pixel(view_, [&](int64_t n, int64_t y, int64_t x, int64_t) {
        const int64_t at = c.mask_at(n, y, x);
        static_cast<uint8_t*>(mask_.data())[at] = static_cast<uint8_t>(c.mask(n, y, x) ? 1 + at % 255 : 0);
      });
    for (int64_t o = 0; c.has_sizes() && o < c.outer; ++o) {
      static_cast<int64_t*>(sizes_.data())[2 * o] = c.valid_height(o * c.inner);
      static_cast<int64_t*>(sizes_.data())[2 * o + 1] = c.valid_width(o * c.inner);
    }
  }

  Problem problem() const {
    const auto [divisor, modulus] = beta_folding();
    const bool number = c_.betas == Betas::value;
    Problem p{c_.dtype,
            view_,
            c_.backward_views(),
            {},
            {number ? nullptr : betas_.data(), number ? static_cast<double>(c_.beta(0)) : 0, divisor, modulus},
            kpfused::units_of(c_.units, c_.height, c_.width),
            heatmap_.data(),
            upstream_.data(),
            stride_map(),
            stride_xy(),
            c_.moments,
            {}};
    p.pixels.empty_value = kEmpty;
    p.pixels.fills_empty = c_.fills_empty();
    p.pixels.divisor = p.pixels.modulus = 1;
    if (c_.has_mask()) p.pixels.mask = static_cast<const uint8_t*>(mask_.data()), p.pixels.mask_view = c_.mask_view();
    if (c_.has_sizes()) {
      p.pixels.sizes = static_cast<const int64_t*>(sizes_.data());
      p.pixels.divisor = c_.inner, p.pixels.modulus = c_.outer;
    }
    if (!c_.moments) return p;
    if (!gives(kMeanGradient)) p.grad_coordinates = nullptr;
    for (int k = 0; k < 4; ++k) p.grad_fields[k] = gives(kCovarianceGradient << k) ? fields_[k].data() : nullptr;
    return p;
  }

  // As the kernels see them: after rounding to the accumulation dtype; in pixels.
  FieldGradient upstream(int64_t map) const {
    const kpfused::Units units = kpfused::units_of(c_.units, c_.height, c_.width);
    const Real sx = units.scale_x, sy = units.scale_y;
    const Dtype dtype = accumulator(c_.dtype);
    FieldGradient g;
    if (!c_.moments || gives(kMeanGradient)) {
      g.x = sx * load(dtype, upstream_.data(), map * stride_map());
      g.y = sy * load(dtype, upstream_.data(), map * stride_map() + stride_xy());
    }
    if (!c_.moments) return g;
    const auto field = [&](int k, int64_t i) {
      return gives(kCovarianceGradient << k) ? load(dtype, fields_[k].data(), map * kFieldValues[k] + i) : 0;
    };
    g.xx = sx * sx * field(0, 0), g.xy = sx * sy * field(0, 1), g.yx = sx * sy * field(0, 2), g.yy = sy * sy * field(0, 3);
    g.entropy = field(1, 0), g.logsumexp = field(2, 0), g.peak_probability = field(3, 0);
    return g;
  }

  // As it lies in memory.
  Real logit(int64_t map, int64_t i) const {
    const Strides strides = c_.strides();
    return load(c_.dtype, heatmap_.data(),
                map / c_.inner * strides[0] + map % c_.inner * strides[1] + i / c_.width * strides[2] + i % c_.width * strides[3]);
  }

  Reference expected(int64_t map) const {
    const auto pixels = static_cast<size_t>(c_.height * c_.width);
    std::vector<Real> logits(pixels);
    std::vector<uint8_t> counts(pixels);
    for (int64_t i = 0; i < c_.height * c_.width; ++i) {
      logits[static_cast<size_t>(i)] = logit(map, i);
      counts[static_cast<size_t>(i)] = c_.counted(map, i / c_.width, i % c_.width);
    }
    return reference({logits, counts, c_.height, c_.width, c_.beta(map), upstream(map)});
  }

  const Buffer* watched() const { return heatmap_.huge() ? nullptr : &heatmap_; }
  const std::vector<uint8_t>& pixels() const { return pixels_; }

 private:
  int64_t stride_map() const {
    return c_.upstream == Upstream::expanded ? 0 : c_.upstream == Upstream::transposed ? 1 : 2;
  }
  int64_t stride_xy() const {
    return c_.upstream == Upstream::expanded ? 0 : c_.upstream == Upstream::transposed ? view_.maps() : 1;
  }
  Real wanted_upstream(int64_t map, int axis) const {
    if (c_.upstream == Upstream::expanded) return 1;
    return 3 * uniform(static_cast<uint64_t>(map) + 991, static_cast<uint64_t>(axis)) - 1;
  }
  std::pair<int64_t, int64_t> beta_folding() const {
    switch (c_.betas) {
      case Betas::per_keypoint: return {1, c_.inner};
      case Betas::per_sample: return {c_.inner, c_.outer};
      case Betas::per_map: return {1, view_.maps()};
      default: return {1, 1};
    }
  }

  size_t maps() const { return static_cast<size_t>(c_.maps()); }
  size_t wide() const { return size_of(accumulator(c_.dtype)); }
  bool gives(int field) const { return (c_.upstream_fields & field) != 0; }

  const Case& c_;
  MapView view_;
  Buffer heatmap_, betas_, upstream_;
  std::vector<uint8_t> pixels_;
  Buffer mask_, sizes_, fields_[4];
};

}  // namespace harness
