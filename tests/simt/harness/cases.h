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

enum class Betas { value, tensor, per_keypoint, per_sample, per_map, negative, zero, tiny, nan };
enum class Upstream { dense, expanded, transposed };  // how grad_coordinates lies in memory

// Which pixels count: all; a mask of every map's own, one for all maps, one row of it for all rows, one whose channels are
// neighbours, one that groups of channels have in common; a valid size; a mask and a valid size.
enum class Counts { all, own, shared, columns, channels, grouped, size, both };

using kpfused::MapView;
using Strides = std::array<int64_t, 4>;

// Which gradients come back to the fields of moments, as bits of Case::upstream_fields.
constexpr int kMeanGradient = 1, kCovarianceGradient = 2, kEntropyGradient = 4, kLogsumexpGradient = 8,
              kPeakGradient = 16, kAllGradients = 31;

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

  bool moments = false;
  int upstream_fields = kAllGradients;
  Counts counts = Counts::all;
  bool fills = false;  // maps without weight, even where all pixels count

  std::string name() const;
  // Strides of a tensor (outer, inner, height, width) that holds the maps, and of their gradients.
  Strides strides() const;
  Strides grad_strides() const;
  MapView view() const;           // as forward gets it
  kpfused::Layout backward_views() const;  // as backward gets them: heatmap and gradient
  int64_t maps() const { return outer * inner; }
  size_t beta_count() const;
  Real beta(int64_t map) const;
  bool fills_empty() const { return fills || counts != Counts::all; }
  bool has_mask() const { return counts != Counts::all && counts != Counts::size; }
  bool has_sizes() const { return counts == Counts::size || counts == Counts::both; }
  kpfused::MaskView mask_view() const;
  // Where the byte of a pixel is, and how many there are.
  int64_t mask_at(int64_t map, int64_t y, int64_t x) const;
  size_t mask_bytes() const;
  bool mask(int64_t map, int64_t y, int64_t x) const;
  // Valid sizes are those of samples.
  int64_t valid_height(int64_t map) const;
  int64_t valid_width(int64_t map) const;
  bool counted(int64_t map, int64_t y, int64_t x) const;
  Real logit(int64_t map, int64_t y, int64_t x) const;
};

// Maps as they are said to lie, as a kernel gets them; and by image and channel, as values that some share have them.
kpfused::Layout views(const Case& c, int64_t outer, int64_t inner, const Strides& first, const Strides& second);
MapView unfolded(const Case& c, int64_t outer, int64_t inner, const Strides& strides);

std::vector<Case> all_cases();

}  // namespace harness
