// SPDX-License-Identifier: MIT
// Cases of volumes: what their slices left, merged, and the gradients of the whole taken apart again.
#pragma once

#include "check.h"
#include "simt.h"

namespace harness {

// What is odd about the slices of some volumes.
enum class Slices { plain, ties, empty, degenerate, offset_1e30 };

struct VolumeCase {
  Dtype dtype;
  int64_t outer, inner, depth;
  Slices slices = Slices::plain;
  double beta = 1;
  bool betas = false;    // one of each slice's, in memory, that are those of its volume
  bool fills = false;    // empty volumes
  unsigned given = 31;   // gradients: 1 mean, 2 covariance, 4 entropy, 8 logsumexp, 16 peak_probability

  std::string name() const;
};

std::vector<VolumeCase> volume_cases();

Outcome run_volume(const VolumeCase& c, const std::vector<simt::Order>& orders);

}  // namespace harness
