// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <vector>

#include "cases.h"
#include "check.h"
#include "simt.h"

namespace harness {

// Runs a case in every one of `orders`.
Outcome run_case(const Case& c, const std::vector<simt::Order>& orders, uint64_t seed);

}  // namespace harness
