// SPDX-License-Identifier: MIT
// What all ops are told beside the heatmap, from tensors to a kernel's parameters.
//
// Users reach the ops through kpfused/functional.py, whose checks name the argument at fault. What is checked here is
// what would otherwise touch memory that is not there.
#pragma once

#include <array>
#include <limits>
#include <optional>

#include "../cpu/masks.h"
#include "../cpu/pages.h"
#include "../units.h"
#include "tensors.h"

namespace kpfused {

inline void check_device(const Tensor& tensor, const Tensor& heatmap, const char* name) {
  int32_t own = 0, wanted = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &own));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(heatmap.get(), &wanted));
  STD_TORCH_CHECK(own == wanted && tensor.get_device_index() == heatmap.get_device_index(), name,
                  " must be on the device of heatmap");
}

// The first `dims` sizes of a tensor against the leading dimensions of heatmap.
inline void check_broadcast(const Tensor& heatmap, const Tensor& tensor, int64_t dims, const char* name) {
  const int64_t leading = heatmap.dim() - 2;
  bool fits = dims <= leading;
  for (int64_t d = 0; fits && d < dims; ++d) {
    fits = tensor.size(d) == 1 || tensor.size(d) == heatmap.size(leading - dims + d);
  }
  STD_TORCH_CHECK(fits, name, " must broadcast against the leading dimensions of heatmap");
}

inline BetaView beta_view(const Tensor& heatmap, const std::optional<Tensor>& beta, double value) {
  BetaView view{nullptr, value, 1, 1};
  if (!beta) return view;
  check_device(*beta, heatmap, "beta");
  STD_TORCH_CHECK(beta->scalar_type() == accumulator_of(dtype_of(heatmap)) && beta->is_contiguous(),
                  "beta must be contiguous and of the dtype of the coordinates");
  check_broadcast(heatmap, *beta, beta->dim(), "beta");
  STD_TORCH_CHECK(fold_beta(heatmap.sizes().data(), heatmap.dim() - 2, beta->sizes().data(), beta->dim(), &view),
                  "beta broadcasts along separate dimensions; expand it");
  view.values = beta->const_data_ptr();
  return view;
}

// What an op is told beside the heatmap.
struct Settings {
  std::optional<Tensor> beta;
  double beta_value;
  int64_t coordinates;
  std::optional<Tensor> mask;        // bool, of the heatmap's shape; strides may be zero
  std::optional<Tensor> valid_size;  // int64 (..., 2), (height, width), leading dimensions as those of beta
  std::optional<double> empty_value;
  bool mask_in_bits = false;  // as kMaskBits: a copy that kernels along rows read
};

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// A valid size broadcasts against the leading dimensions of heatmap as beta does.
inline PixelView pixel_view(const Tensor& heatmap, const Settings& settings, const MaskView& mask_view) {
  PixelView view{nullptr, mask_view, nullptr, 1, 1, false, settings.empty_value.value_or(kNan)};
  view.fills_empty = settings.mask || settings.valid_size || settings.empty_value;
  if (settings.mask) view.mask = static_cast<const uint8_t*>(settings.mask->const_data_ptr());
  if (!settings.valid_size) return view;
  const Tensor& size = *settings.valid_size;
  check_device(size, heatmap, "valid_size");
  const int64_t dims = size.dim() - 1;
  STD_TORCH_CHECK(size.scalar_type() == ScalarType::Long && size.is_contiguous() && dims >= 0 && size.size(dims) == 2,
                  "valid_size must be a contiguous int64 tensor (..., 2)");
  BetaView run{};
  check_broadcast(heatmap, size, dims, "valid_size");
  STD_TORCH_CHECK(fold_beta(heatmap.sizes().data(), heatmap.dim() - 2, size.sizes().data(), dims, &run),
                  "valid_size broadcasts along separate dimensions; expand it");
  view.sizes = static_cast<const int64_t*>(size.const_data_ptr());
  view.divisor = run.divisor;
  view.modulus = run.modulus;
  return view;
}

// Values (..., C, H, W) whose leading dimensions broadcast against those of heatmap.
inline void check_values(const Tensor& heatmap, const Tensor& values) {
  check_device(values, heatmap, "values");
  const int64_t dims = values.dim();
  STD_TORCH_CHECK(dims >= 3 && values.scalar_type() == heatmap.scalar_type() &&
                      values.size(dims - 1) == heatmap.size(heatmap.dim() - 1) &&
                      values.size(dims - 2) == heatmap.size(heatmap.dim() - 2),
                  "values must be (..., C, H, W) of the dtype and the H and W of heatmap");
  check_broadcast(heatmap, values, dims - 3, "values");
}

// Their strides, but for that of the channels, as those of a tensor of the heatmap's shape.
inline std::vector<int64_t> broadcast_strides(const Tensor& heatmap, const Tensor& values) {
  const int64_t leading = heatmap.dim() - 2, own = values.dim() - 3;
  std::vector<int64_t> strides(static_cast<size_t>(heatmap.dim()), 0);
  for (int64_t d = 0; d < own; ++d) {
    if (values.size(d) != 1) strides[static_cast<size_t>(leading - own + d)] = values.stride(d);
  }
  strides[static_cast<size_t>(leading)] = values.stride(own + 1);
  strides[static_cast<size_t>(leading + 1)] = values.stride(own + 2);
  return strides;
}

inline ValueView value_view(const Layout& layout, const Tensor& values) {
  const MapView& v = layout.values;
  const int64_t channel = values.dim() - 3;
  return {values.size(channel), v.stride_outer, v.stride_inner, values.stride(channel), v.stride_y, v.stride_x};
}

// A copy of a mask of more separate dimensions than a view has, expanded along the outermost, as few as that takes. Inside an
// image it stays as it is: whether channels share theirs decides on the bits, and those of an image alone are not copied.
inline Tensor copied(const Tensor& mask) {
  const auto sizes = mask.sizes();
  const int64_t dims = mask.dim();
  const auto stays = [&](int64_t d, int64_t expanded) { return d >= expanded && mask.stride(d) == 0; };
  int64_t expanded = 0;
  for (MaskView view; expanded < dims - 2; ++expanded) {
    std::vector<int64_t> strides(static_cast<size_t>(dims), 0);
    for (int64_t d = dims, bytes = 1; d-- > 0;) {
      if (!stays(d, expanded)) strides[static_cast<size_t>(d)] = bytes, bytes *= sizes[d];
    }
    if (detail::fold_mask(sizes.data(), dims, strides.data(), &view)) break;
  }
  Tensor one = mask;
  for (int64_t d = expanded; d < dims; ++d) {
    if (stays(d, expanded)) one = torch::stable::narrow(one, d, 0, 1);
  }
  one = torch::stable::contiguous(one);
  std::array<StableIValue, 3> stack{torch::stable::detail::from(one), torch::stable::detail::from(mask.sizes()),
                                    torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::expand", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A copy of a mask in the order of its dimensions, where its last is not the nearest in memory: kernels would touch a line of
// memory for a few bytes, and do so again for each map that shares it. What it is expanded along it still is. With `bits` it is
// one for each pixel, and all strides but the last are those of their bytes. Of the CPU's masks only: on a GPU maps side by
// side are read at the same time, and find these lines in its cache. Planes that are written side by side do not begin an even
// number of kilobytes apart, where they would share a few places of the nearest cache.
inline std::optional<Tensor> in_row_order(const Tensor& mask, bool bits) {
  constexpr int64_t kCrowded = 2048, kLine = 64;
  const auto sizes = mask.sizes(), strides = mask.strides();
  const int64_t dims = mask.dim(), width = sizes[dims - 1];
  if (strides[dims - 1] <= 1 || width == 1 || mask.numel() == 0) return std::nullopt;
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(mask.get(), &device_type));
  if (device_type != aoti_torch_device_type_cpu()) return std::nullopt;
  std::vector<int64_t> dense(static_cast<size_t>(dims), 0);
  int64_t columns = -1, bytes = bits ? (width + 7) / 8 : width;
  dense.back() = 1;
  for (int64_t d = dims - 1; d-- > 0;) {
    if (sizes[d] == 1 || strides[d] == 0) continue;
    if (strides[d] == 1) {
      columns = d;
      // Of the innermost maps only: those further out then still follow each other evenly, as in any other order.
      if (d == dims - 3 && bytes % kCrowded == 0) bytes += kLine;
    }
    dense[static_cast<size_t>(d)] = bytes, bytes *= sizes[d];
  }
  cpu::ByteMatrices m{};
  m.bits = bits, m.rows = width, m.from_row = strides[dims - 1], m.cols = 1;
  if (columns >= 0) m.cols = sizes[columns], m.to_col = dense[static_cast<size_t>(columns)];
  for (int64_t d = dims - 1; d-- > 0;) {
    const int64_t to = dense[static_cast<size_t>(d)];
    if (to == 0 || d == columns) continue;
    if (m.dims == 0 && strides[d] == m.rows * m.from_row && (bits ? to * 8 : to) == m.rows) {
      m.rows *= sizes[d];  // rows that follow each other are one
    } else if (m.dims == cpu::ByteMatrices::kExtents) {
      return std::nullopt;
    } else {
      m.size[m.dims] = sizes[d], m.from_step[m.dims] = strides[d], m.to_step[m.dims++] = to;
    }
  }
  Tensor result = empty_strided(mask, sizes.data(), dense.data(), dims, ScalarType::Bool);
  m.from = static_cast<const uint8_t*>(mask.const_data_ptr()), m.to = static_cast<uint8_t*>(result.mutable_data_ptr());
  cpu::prefer_huge_pages(m.to, static_cast<size_t>(bytes));
  cpu::transpose(m);
  return result;
}

// How a kernel reads the heatmap and writes `target`, where there is one. Copies the heatmap to contiguous where no kernel
// reads its layout, and then the target; and a mask that is expanded along more separate dimensions than a view has. `values`,
// whose elements are not read here, are not copied: they may be gradients to be written.
inline Layout layout_of(Tensor& heatmap, std::optional<Tensor>& mask, Tensor* target, const Tensor* values) {
  const auto fold = [&](bool with_mask = true, bool with_values = true) {
    std::vector<int64_t> of_values;
    if (values && with_values) of_values = broadcast_strides(heatmap, *values);
    return fold_layout(heatmap.sizes().data(), heatmap.dim(), heatmap.strides().data(),
                       target ? target->strides().data() : nullptr, mask && with_mask ? mask->strides().data() : nullptr,
                       values && with_values ? of_values.data() : nullptr);
  };
  if (mask) {
    check_device(*mask, heatmap, "mask");
    bool same = mask->dim() == heatmap.dim() && mask->scalar_type() == ScalarType::Bool;
    for (int64_t d = 0; same && d < heatmap.dim(); ++d) same = mask->size(d) == heatmap.size(d);
    STD_TORCH_CHECK(same, "mask must be bool and of the shape of heatmap");
  }
  Layout layout = fold();
  if (layout.in_place) return layout;
  if (!fold(false).in_place) {
    heatmap = torch::stable::contiguous(heatmap);
    if (target) {
      const auto sizes = heatmap.sizes();
      *target = empty(heatmap, {sizes.begin(), sizes.end()}, heatmap.scalar_type());
    }
    layout = fold();
    if (layout.in_place || !mask) return layout;
  }
  if (values && fold(true, false).in_place) return layout;  // it is the values that do not
  mask = copied(*mask);
  return fold();
}

// Likewise; and a copy of a mask that lies otherwise than kernels go, along rows or along channels.
inline Layout readable(Tensor& heatmap, Settings& settings, Tensor* target = nullptr, const Tensor* values = nullptr) {
  std::optional<Tensor>& mask = settings.mask;
  const auto fold = [&] {
    Layout layout = layout_of(heatmap, mask, target, values);
    if (settings.mask_in_bits) layout.mask.stride_x = kMaskBits;
    return layout;
  };
  const Layout layout = fold();
  if (!mask || settings.mask_in_bits || !layout.in_place) return layout;
  const MapView& maps = layout.first;
  const bool bits = maps.stride_x == 1;
  if (!bits && layout.mask.stride_inner() == 1 && layout.mask.even(maps.inner)) return layout;
  const std::optional<Tensor> copy = in_row_order(*mask, bits);
  if (!copy) return layout;
  mask = copy, settings.mask_in_bits = bits;
  return fold();
}

// What forward and backward share of their parameters.
template <class Params>
Params common_params(const Tensor& heatmap, const Layout& layout, const Settings& settings) {
  const MapView& view = layout.first;
  const int64_t coordinates = settings.coordinates;
  STD_TORCH_CHECK(0 <= coordinates && coordinates < kCoordinates, "unknown coordinates");
  STD_TORCH_CHECK(view.height > 0 && view.width > 0, "heatmap must have at least one pixel");
  Params p{};
  p.dtype = dtype_of(heatmap);
  p.heatmap = heatmap.const_data_ptr();
  p.view = view;
  p.pixels = pixel_view(heatmap, settings, layout.mask);
  p.beta = beta_view(heatmap, settings.beta, settings.beta_value);
  p.units = units_of(static_cast<Coordinates>(coordinates), view.height, view.width);
  return p;
}

template <class Backend, class Params>
void run(Params& p, const Tensor& heatmap) {
  if (p.view.maps() == 0) return;
  std::optional<Tensor> workspace;
  if (const int64_t bytes = Backend::workspace(p)) {
    workspace = empty(heatmap, {(bytes + 7) / 8}, ScalarType::Double);  // aligned for either accumulator
    p.workspace = workspace->mutable_data_ptr();
  }
  Backend::run(p, heatmap);
}

}  // namespace kpfused
