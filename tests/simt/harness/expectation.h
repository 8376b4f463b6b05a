// SPDX-License-Identifier: MIT
// Cases of the expectation steps: the maps of a Case, and what their expectation is of.
#pragma once

#include "cases.h"
#include "check.h"
#include "simt.h"

namespace harness {

using kpfused::ValueKind;

// How values lie in memory: one map's after another; the channels of a pixel side by side, and those of the maps that have
// values of their own behind each other; rows and channels apart, with gaps.
enum class ValueLayout { dense, pixels, gaps };

struct ExpectationCase {
  Case maps;
  ValueKind kind = ValueKind::tensor;
  int64_t channels = 1;
  bool share_outer = false, share_inner = false;
  ValueLayout layout = ValueLayout::dense;
  bool upstream = true;  // or no gradient, which stands for ones
  bool is_probability = false;
  int64_t radius = 0;
  bool centred = false;   // the window around given pixels
  bool far = false;       // values beyond 32 bits

  std::string name() const;
  kpfused::MapView view() const;
  kpfused::MapView grad_view() const;
  kpfused::ValueView value_view() const;
};

std::vector<ExpectationCase> expectation_cases();

// Runs a case in every one of `orders`.
Outcome run_expectation(const ExpectationCase& c, const std::vector<simt::Order>& orders, uint64_t seed);

}  // namespace harness
