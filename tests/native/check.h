// SPDX-License-Identifier: MIT
// Counting what holds, and the numbers that are drawn for it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

#include "params.h"

namespace native {

using namespace kpfused;

inline int passed = 0, failed = 0;

inline void check(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok && failed <= 40) std::printf("FAILED %s\n", what.c_str());
}

inline bool near(double a, double b, double tolerance) {
  return std::isnan(b) ? std::isnan(a) : std::fabs(a - b) <= tolerance;
}

// What rounding to a map's own dtype may cost, as a share; beside it, the smallest number of float16.
inline double rounding(Dtype dtype) {
  return dtype == Dtype::float16 ? 1e-3 : dtype == Dtype::bfloat16 ? 8e-3 : 0;
}
constexpr double kSmallestHalf = 6e-8;

inline uint64_t random_state = 1;

inline double uniform() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return double(random_state >> 11) * 0x1p-53;
}

}  // namespace native
