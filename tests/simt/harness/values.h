// SPDX-License-Identifier: MIT
// Numbers of every dtype as long double, and the maps that the cases are made of.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "params.h"

namespace harness {

using kpfused::Dtype;
using Real = long double;

constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
constexpr Real kNan = std::numeric_limits<Real>::quiet_NaN();

// One over 2 to the number of bits behind the leading one: a rounding to nearest errs by at most half of that.
inline Real epsilon(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return 0x1p-52L;
    case Dtype::float32: return 0x1p-23L;
    case Dtype::float16: return 0x1p-10L;
    case Dtype::bfloat16: return 0x1p-7L;
  }
  return 0;
}

inline const char* dtype_name(Dtype dtype) {
  constexpr const char* names[] = {"float32", "float64", "float16", "bfloat16"};
  return names[static_cast<int>(dtype)];
}

// The fewest equal groups of channels, two or more where there are: the volumes of keypoints that share masks.
inline int64_t groups_of(int64_t channels) {
  int64_t groups = 2;
  while (groups < channels && channels % groups != 0) ++groups;
  return groups < channels ? groups : channels;
}

inline Dtype accumulator(Dtype dtype) { return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }

inline Real decode_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const Real sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return fraction ? kNan : sign * kInfinity;
  return sign * (exponent ? std::ldexp(Real(1024 + fraction), exponent - 25) : std::ldexp(Real(fraction), -24));
}

inline uint16_t encode_half(Real value) {
  if (std::isnan(value)) return 0x7e00;
  const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
  const Real size = std::fabs(value);
  if (size >= 65520) return sign | 0x7c00;
  if (size == 0) return sign;
  const int exponent = std::ilogb(size) < -14 ? -14 : std::ilogb(size);
  // nearbyint rounds to even; a fraction that rounds up to the next power of two carries into the exponent.
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return static_cast<uint16_t>(sign | (steps < 1024 ? steps : ((exponent + 14) << 10) + steps));
}

inline Real load(Dtype dtype, const void* base, int64_t i) {
  const char* p = static_cast<const char*>(base) + i * kpfused::element_size(dtype);
  if (dtype == Dtype::float64) {
    double v;
    std::memcpy(&v, p, 8);
    return v;
  }
  uint32_t bits = 0;
  std::memcpy(&bits, p, static_cast<size_t>(kpfused::element_size(dtype)));
  if (dtype == Dtype::float16) return decode_half(static_cast<uint16_t>(bits));
  if (dtype == Dtype::bfloat16) bits <<= 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline void store(Dtype dtype, void* base, int64_t i, Real value) {
  char* p = static_cast<char*>(base) + i * kpfused::element_size(dtype);
  if (dtype == Dtype::float64) {
    const auto v = static_cast<double>(value);
    std::memcpy(p, &v, 8);
    return;
  }
  const auto v = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  if (dtype == Dtype::float16) bits = encode_half(value);
  // Rounding twice, to float32 and on to bfloat16, may err in the last bit: inputs need no more.
  if (dtype == Dtype::bfloat16) bits = std::isnan(value) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  std::memcpy(p, &bits, static_cast<size_t>(kpfused::element_size(dtype)));
}

enum class Values { random, peaked, constant, masked, left_masked, degenerate, offset_1e4, offset_1e30, border, ties };

inline const char* values_name(Values values) {
  constexpr const char* names[] = {"random",      "peaked",     "constant", "masked",
                                   "left-masked", "degenerate", "1e4",      "1e30",   "border", "ties"};
  return names[static_cast<int>(values)];
}

// Uniform in [0, 1), a function of its arguments alone.
inline Real uniform(uint64_t seed, uint64_t i) {
  uint64_t z = seed * 0xd1342543de82ef95ull + (i + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return static_cast<Real>((z ^ z >> 31) >> 11) * 0x1p-53L;
}

// The logit of one pixel of map n.
inline Real logit(Values values, int64_t n, int64_t y, int64_t x, int64_t height, int64_t width) {
  const auto seed = static_cast<uint64_t>(n), pixel = static_cast<uint64_t>(y * width + x);
  const Real noise = 4 * uniform(seed, pixel) - 2;
  switch (values) {
    case Values::random: return noise;
    case Values::constant: return 1.5L;
    case Values::masked: return uniform(seed + 77, pixel) < 0.4L ? -kInfinity : noise;
    // Whole rows and the left of every row: parts of the map where a thread, a warp or a split sees nothing at all.
    case Values::left_masked: return 2 * x < width - 1 || 4 * y > 3 * height ? -kInfinity : noise;
    case Values::offset_1e4: return 1e4L + 8 * std::floor(noise);
    case Values::offset_1e30: return (n % 2 ? -1 : 1) * 1e30L * (1 + noise / 4);
    case Values::peaked: {
      // A bump that sits at another place of each map, a corner of the first.
      const Real px = uniform(seed, 1u << 30) * static_cast<Real>(n ? width - 1 : 0),
                 py = uniform(seed, 1u << 29) * static_cast<Real>(n ? height - 1 : 0);
      const Real dx = static_cast<Real>(x) - px, dy = static_cast<Real>(y) - py;
      return 20 * std::exp(-(dx * dx + dy * dy) / 8) + noise / 8;
    }
    case Values::border: {
      // A tenth of a pixel wide on either axis, on a border: far from the centre, and from where a thread begins.
      const Real dx = static_cast<Real>(x - (n % 2 ? width - 1 : width / 3)), dy = static_cast<Real>(y - (n % 3 ? height - 1 : 0));
      return -5 * std::fmin(dx * dx + dy * dy, 4) - noise / 8;
    }
    // Several pixels of the peak's value, among them the last of every row; all of them where nothing else is higher.
    case Values::ties: return n % 3 == 2 ? -3.4028234e38L : uniform(seed + 5, pixel) < 0.1L || x == width - 1 ? 3 : noise;
    case Values::degenerate: {
      const auto odd = static_cast<int64_t>(uniform(seed, 1u << 28) * static_cast<Real>(height * width));
      const bool here = y * width + x == odd;
      if (n % 5 == 1) return -kInfinity;
      if (n % 5 == 2 && here) return kNan;
      if (n % 10 == 7 && (y + x) % 4 == 0) return kNan;  // some of which counts, whatever is masked
      if (n % 5 == 3 && here) return kInfinity;
      return noise;
    }
  }
  return 0;
}

}  // namespace harness
