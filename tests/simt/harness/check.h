// SPDX-License-Identifier: MIT
// Comparing with the reference, and with itself, bit by bit.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cases.h"
#include "reference.h"

namespace harness {

struct Outcome {
  std::vector<std::string> failures;  // the first few
  double worst = 0;                   // the largest error, as a share of its tolerance

  void fail(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    char text[400];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    if (failures.size() < 5) failures.emplace_back(text);
  }

  // NaN must meet NaN; a number must come within the tolerance, and what the result's own rounding takes.
  bool close(Real got, Real want, Real tolerance, Real rounding = 0) {
    if (std::isnan(want)) return std::isnan(got);
    const Real share = (std::fabs(got - want) - rounding) / tolerance;
    if (!(share <= 1)) return false;
    worst = std::max(worst, static_cast<double>(share));
    return true;
  }
};

// Errors that rounding explains, for sums of some thousand terms with arguments of exp2 up to some thirty. They are a
// small part of a pixel and of the largest gradient: zero, x for y or a neighbour's place is far outside.
struct Tolerance {
  static constexpr Real smallest = 0x1p-126L;  // results below it may be flushed to zero
  Real unit;                                   // the accumulation dtype's epsilon

  explicit Tolerance(Dtype dtype) : unit(epsilon(accumulator(dtype))) {}
  Real pixels(int64_t size) const { return unit * 8 * static_cast<Real>(size); }
  // `largest`: of the map's gradients. `terms`: of the two that q = g . (r - mu) is the difference of.
  Real gradient(Real largest, Real terms) const { return unit * (16 * largest + 2 * terms) + smallest; }
  Real grad_beta(Real largest, Real terms) const { return unit * (16 * largest + 2 * terms) + smallest; }
};

// How large g . (r - mu) can be.
inline Real slope_of(const Case& c, Real gx, Real gy) {
  return std::fabs(gx) * static_cast<Real>(c.width) + std::fabs(gy) * static_cast<Real>(c.height);
}

inline void check_coordinates(const Case& c, int64_t map, const Reference& r, const void* coordinates, Outcome& out) {
  const kpfused::Units units = kpfused::units_of(c.units, c.height, c.width);
  const Dtype dtype = accumulator(c.dtype);
  const Tolerance tolerance(c.dtype);
  const int64_t sizes[] = {c.width, c.height};
  const double scales[] = {units.scale_x, units.scale_y}, offsets[] = {units.offset_x, units.offset_y};
  const Real means[] = {r.x, r.y};
  for (int axis = 0; axis < 2; ++axis) {
    const Real scale = scales[axis] != 0 ? Real(scales[axis]) : 1;
    const Real centred = means[axis] - static_cast<Real>(sizes[axis] - 1) / 2;
    const Real want = (scales[axis] * centred + offsets[axis]) / scale;
    const Real got = load(dtype, coordinates, map * 2 + axis) / scale;
    if (!out.close(got, want, tolerance.pixels(sizes[axis])))
      out.fail("coordinate %c of map %lld: %.9Lg pixels instead of %.9Lg", "xy"[axis], static_cast<long long>(map), got,
               want);
  }
}

// gx, gy: gradient with respect to x and y in pixels. gradient: that of all maps' pixels, one map after another.
inline void check_gradient(const Case& c, int64_t map, const Reference& r, Real gx, Real gy, const void* gradient,
                           Outcome& out) {
  const Tolerance tolerance(c.dtype);
  const Real beta = std::fabs(c.beta(map));
  Real largest = 0;
  for (const Real g : r.gradient) largest = std::max(largest, std::fabs(g));
  for (int64_t i = 0; i < c.height * c.width; ++i) {
    const Real want = r.gradient[static_cast<size_t>(i)];
    const Real got = load(c.dtype, gradient, map * c.height * c.width + i);
    const Real p = r.probability[static_cast<size_t>(i)];
    const Real bound = tolerance.gradient(largest, beta * p * slope_of(c, gx, gy));
    const Real rounding = epsilon(c.dtype) / 2 * std::fabs(want) + (c.dtype == Dtype::float16 ? 0x1p-25L : 0);
    if (!out.close(got, want, bound, rounding))
      out.fail("gradient of map %lld at (x, y) = (%lld, %lld): %.9Lg instead of %.9Lg, of at most %.3Lg",
               static_cast<long long>(map), static_cast<long long>(i % c.width), static_cast<long long>(i / c.width),
               got, want, largest);
  }
}

inline void check_grad_beta(const Case& c, int64_t map, const Reference& r, Real gx, Real gy, const void* grad_beta,
                            Outcome& out) {
  const Tolerance tolerance(c.dtype);
  const Real bound = tolerance.grad_beta(r.grad_beta_size, r.distance * slope_of(c, gx, gy));
  const Real got = load(accumulator(c.dtype), grad_beta, map);
  if (!out.close(got, r.grad_beta, bound))
    out.fail("grad_beta of map %lld: %.9Lg instead of %.9Lg", static_cast<long long>(map), got, r.grad_beta);
}

// What one order of threads left behind.
using Bits = std::vector<char>;

inline Bits bits_of(const void* data, size_t bytes) {
  const char* p = static_cast<const char*>(data);
  return Bits(p, p + bytes);
}

inline void check_same(const Bits& got, const Bits& want, const char* what, const char* among, Outcome& out) {
  if (got == want) return;
  const auto at = std::mismatch(got.begin(), got.end(), want.begin()).first - got.begin();
  out.fail("%s differs %s, from byte %td of %zu on", what, among, at, got.size());
}

}  // namespace harness
