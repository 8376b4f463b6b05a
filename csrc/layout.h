// SPDX-License-Identifier: MIT
// From sizes and strides of any rank to the MapView that kernels read in place. Pure; no torch.
#pragma once

#include <cstdint>

#include "params.h"

namespace kpfused {

// The views of up to three tensors of one shape (..., H, W) that one kernel walks together: heatmap, its gradient, and
// values, which may lie in any way. Their leading dimensions must fold to the same (outer, inner). Those of a mask need not:
// they do where they can, so that maps side by side share one or have each their own.
struct Layout {
  MapView first, second, values;
  MaskView mask;
  bool in_place;  // false: no kernel reads this layout; copy to contiguous first
};

namespace detail {

constexpr int kTensors = 4;

struct Run {
  int64_t size, stride[kTensors];
};

inline MapView view_of(const Run& outer, const Run& inner, int64_t height, int64_t width, const int64_t* strides,
                       int64_t dims, int tensor) {
  MapView v{outer.size, inner.size, height, width, outer.stride[tensor], inner.stride[tensor], strides[dims - 2],
            strides[dims - 1]};
  // The stride of an axis of one pixel means nothing; say what a dense row would.
  if (width == 1) v.stride_x = 1;
  if (height == 1) v.stride_y = v.stride_x * width;
  return v;
}

// Leading dimensions of some tensors as runs, the innermost first; returns how many, or -1 where they are more than `most`.
inline int fold_runs(const int64_t* sizes, int64_t dims, const int64_t* const* strides, int tensors, Run* runs, int most) {
  int used = 0;
  for (int64_t d = dims - 3; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    Run* const last = used > 0 ? &runs[used - 1] : nullptr;
    bool continues = last != nullptr;
    for (int t = 0; continues && t < tensors; ++t) continues = strides[t][d] == last->stride[t] * last->size;
    if (continues) {
      last->size *= sizes[d];
      continue;
    }
    if (used == most) return -1;
    Run& run = runs[used++];
    run.size = sizes[d];
    for (int t = 0; t < tensors; ++t) run.stride[t] = strides[t][d];
  }
  return used;
}

// False where there are more runs than a view has.
inline bool fold_mask(const int64_t* sizes, int64_t dims, const int64_t* strides, MaskView* view) {
  Run runs[kMaskRuns] = {{1, {}}};
  const int used = fold_runs(sizes, dims, &strides, 1, runs, kMaskRuns);
  *view = {used > 0 ? used : 1, {}, {}, strides[dims - 2], strides[dims - 1]};
  for (int r = 0; r < view->runs; ++r) view->size[r] = runs[r].size, view->stride[r] = runs[r].stride[0];
  return used >= 0;
}

}  // namespace detail

// All but `first` may be null. dims >= 2; strides are never negative in torch.
inline Layout fold_layout(const int64_t* sizes, int64_t dims, const int64_t* first, const int64_t* second,
                          const int64_t* mask = nullptr, const int64_t* values = nullptr) {
  const int64_t height = sizes[dims - 2], width = sizes[dims - 1];
  for (int64_t d = 0; d < dims - 2; ++d) {
    if (sizes[d] > 0) continue;
    const MapView none{0, 0, height, width, 0, 0, width, 1};
    return {none, none, none, {1, {1}, {}, 0, 0}, true};
  }
  const int64_t* const strides[detail::kTensors] = {first, second ? second : first, values ? values : first, mask};
  const bool rows = width == 1 || (strides[0][dims - 1] == 1 && strides[1][dims - 1] == 1);
  detail::Run runs[2];  // inner, outer
  const auto fold = [&](int tensors) {
    runs[0] = runs[1] = {1, {}};
    return detail::fold_runs(sizes, dims, strides, tensors, runs, 2) >= 0;
  };
  // Channels are lanes, whatever a mask is.
  const bool with_mask = mask && rows && fold(detail::kTensors);
  if (!with_mask && !fold(detail::kTensors - 1)) return {};
  const auto view = [&](int t) { return detail::view_of(runs[1], runs[0], height, width, strides[t], dims, t); };
  Layout layout{view(0), view(1), view(2), {}, true};
  // Kernels tell the two kinds apart by stride_x alone, so both tensors must be of the same one.
  const bool channels = layout.first.stride_inner == 1 && layout.second.stride_inner == 1 &&
                        layout.first.stride_x != 1 && layout.second.stride_x != 1;
  layout.in_place = rows || channels;
  if (mask) {
    const bool folds = detail::fold_mask(sizes, dims, mask, &layout.mask);
    layout.in_place = layout.in_place && folds;
  }
  return layout;
}

// Where every map takes its beta from. `sizes` are the leading sizes of the heatmap, `beta` those of a contiguous
// tensor that broadcasts against them. False where its broadcast dimensions do not leave one contiguous run.
inline bool fold_beta(const int64_t* sizes, int64_t dims, const int64_t* beta, int64_t beta_dims, BetaView* view) {
  int64_t divisor = 1, modulus = 1;
  int stage = 0;  // 0: broadcast dimensions behind the run, 1: in the run, 2: broadcast dimensions in front of it
  for (int64_t d = dims - 1; d >= 0; --d) {
    const int64_t b = d - (dims - beta_dims);
    const int64_t kept = b >= 0 ? beta[b] : 1;
    if (sizes[d] == 1) continue;
    if (kept == 1) {
      if (stage == 0) divisor *= sizes[d];
      if (stage == 1) stage = 2;
    } else {
      if (stage == 2) return false;
      stage = 1;
      modulus *= kept;
    }
  }
  view->divisor = divisor;
  view->modulus = modulus;
  return true;
}

}  // namespace kpfused
