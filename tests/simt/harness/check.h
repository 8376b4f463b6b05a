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

// Of the reference, where all pixels with weight share a column.
constexpr Real kReferenceRounding = 1e-30L;

// What maps without weight give where not all pixels count.
constexpr double kEmpty = -7.5;

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
    if (std::isinf(want)) return got == want;
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
    Real want = (scales[axis] * centred + offsets[axis]) / scale, got = load(dtype, coordinates, map * 2 + axis);
    if (r.empty && c.fills_empty()) {
      want = kEmpty;
    } else {
      got /= scale;
    }
    if (!out.close(got, want, tolerance.pixels(sizes[axis])))
      out.fail("coordinate %c of map %lld: %.9Lg pixels instead of %.9Lg", "xy"[axis], static_cast<long long>(map), got,
               want);
  }
}

// The fields of moments beside the mean; field: [covariance, entropy, logsumexp, peak_probability].
inline void check_fields(const Case& c, int64_t map, const Reference& r, const void* const (&field)[4],
                         const void* peak, Outcome& out) {
  const kpfused::Units units = kpfused::units_of(c.units, c.height, c.width);
  const Dtype dtype = accumulator(c.dtype);
  const Tolerance tolerance(c.dtype);
  const bool empty = r.empty && c.fills_empty();
  const auto check = [&](const char* name, int which, int64_t i, Real want, Real bound) {
    const Real got = load(dtype, field[which], i);
    if (empty) want = kEmpty, bound = 0;
    if (!out.close(got, want, bound + kReferenceRounding))
      out.fail("%s of map %lld: %.9Lg instead of %.9Lg", name, static_cast<long long>(map), got, want);
  };
  // Moments about the peak, which their sums are about.
  const Real px = r.x - static_cast<Real>(r.peak % c.width), py = r.y - static_cast<Real>(r.peak / c.width);
  const Real sx = units.scale_x, sy = units.scale_y, share = tolerance.unit * 64;
  const Real about_x = r.xx + px * px, about_y = r.yy + py * py;
  check("variance of x", 0, map * 4, sx * sx * r.xx, sx * sx * share * about_x);
  // Within a thread's vectors, x is counted from the first column and not from the peak's.
  const Real across = share * std::sqrt(about_x * about_y) + 16 * tolerance.unit * about_y;
  check("covariance", 0, map * 4 + 1, sx * sy * r.xy, sx * sy * across);
  check("covariance", 0, map * 4 + 2, sx * sy * r.xy, sx * sy * across);
  check("variance of y", 0, map * 4 + 3, sy * sy * r.yy, sy * sy * share * about_y);
  if (!empty && (load(dtype, field[0], map * 4) < 0 || load(dtype, field[0], map * 4 + 3) < 0)) out.fail("a variance is negative");
  check("entropy", 1, map, r.entropy, share * (1 + r.entropy));
  check("logsumexp", 2, map, r.logsumexp, share * (1 + std::fabs(r.logsumexp)));
  check("peak_probability", 3, map, r.peak_probability, share * r.peak_probability);
  int64_t at[2];
  std::memcpy(at, static_cast<const char*>(peak) + map * 16, 16);
  if (!r.empty && !std::isnan(r.x) && (at[0] != r.peak % c.width || at[1] != r.peak / c.width))
    out.fail("peak of map %lld at (%lld, %lld) instead of (%lld, %lld)", static_cast<long long>(map),
             static_cast<long long>(at[0]), static_cast<long long>(at[1]), static_cast<long long>(r.peak % c.width),
             static_cast<long long>(r.peak / c.width));
  if (at[0] < 0 || at[0] >= c.width || at[1] < 0 || at[1] >= c.height)
    out.fail("peak of map %lld outside it", static_cast<long long>(map));
}

// gradient: that of all maps' pixels, one map after another.
inline void check_gradient(const Case& c, int64_t map, const Reference& r, const void* gradient, Outcome& out) {
  const Tolerance tolerance(c.dtype);
  Real largest = 0;
  for (const Real g : r.gradient) largest = std::max(largest, std::fabs(g));
  for (int64_t i = 0; i < c.height * c.width; ++i) {
    const auto k = static_cast<size_t>(i);
    // Exactly zero, whatever the rest of the map.
    const bool counted = c.counted(map, i / c.width, i % c.width) && !(r.empty && c.fills_empty());
    Real want = counted ? r.gradient[k] : 0;
    if (c.dtype == Dtype::float16 && std::fabs(want) >= 65520) want *= kInfinity;
    const Real got = load(c.dtype, gradient, map * c.height * c.width + i);
    const Real bound = counted ? tolerance.gradient(largest, r.gradient_terms[k]) : 1e-300L;
    const Real rounding = epsilon(c.dtype) / 2 * std::fabs(want) + (c.dtype == Dtype::float16 && counted ? 0x1p-25L : 0);
    if (!out.close(got, want, bound, rounding))
      out.fail("gradient of map %lld at (x, y) = (%lld, %lld): %.9Lg instead of %.9Lg, of at most %.3Lg",
               static_cast<long long>(map), static_cast<long long>(i % c.width), static_cast<long long>(i / c.width),
               got, want, largest);
  }
}

inline void check_grad_beta(const Case& c, int64_t map, const Reference& r, const void* grad_beta, Outcome& out) {
  const Tolerance tolerance(c.dtype);
  const Real bound = tolerance.grad_beta(r.grad_beta_size, r.grad_beta_terms);
  const Real got = load(accumulator(c.dtype), grad_beta, map);
  const Real want = r.empty && c.fills_empty() ? 0 : r.grad_beta;
  if (!out.close(got, want, r.empty ? Tolerance::smallest : bound))
    out.fail("grad_beta of map %lld: %.9Lg instead of %.9Lg", static_cast<long long>(map), got, want);
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
