// SPDX-License-Identifier: MIT
// What the harness runs: maps, their layout in memory, beta and values.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "layout.h"
#include "params.h"
#include "units.h"
#include "values.h"

namespace harness {

enum class Betas { value, tensor, per_keypoint, per_sample, per_map, negative, zero, nan };
enum class Upstream { dense, expanded, transposed };  // how grad_coordinates lies in memory

using Strides = std::array<int64_t, 4>;

struct Case {
  const char* group;
  Dtype dtype;
  int64_t outer, inner, height, width;
  bool channels_last = false;
  int64_t row_pad = 0;  // elements behind every row (channels_last: channels left out behind every pixel)
  int64_t map_pad = 0;  // elements behind every map (channels_last: pixels left out behind every row)
  int lead = 0;         // elements in front of the first map, to misalign it
  int64_t map_stride = 0, row_stride = 0;  // where not 0, of the heatmap and of its gradient: beyond 32 bits
  Values values = Values::random;
  Betas betas = Betas::value;
  Upstream upstream = Upstream::dense;
  kpfused::Coordinates units = kpfused::Coordinates::pixel;
  int orders = 4;      // of simt::Order; big maps run in fewer
  bool alone = false;  // the first and last map (channels_last: sample) are run by themselves as well

  std::string name() const;
  // Strides of a tensor (outer, inner, height, width) that holds the maps, and of their gradients.
  Strides strides() const;
  Strides grad_strides() const;
  kpfused::MapView view() const;           // as forward gets it
  kpfused::Layout backward_views() const;  // as backward gets them: heatmap and gradient
  int64_t maps() const { return outer * inner; }
  size_t beta_count() const;
  Real beta(int64_t map) const;
};

std::vector<Case> all_cases();

}  // namespace harness
