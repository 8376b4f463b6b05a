// SPDX-License-Identifier: MIT
// What the ops need of torch beyond its stable headers.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <utility>
#include <vector>

#include "../layout.h"
#include "../params.h"

namespace kpfused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& heatmap) {
  switch (heatmap.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default: STD_TORCH_CHECK(false, "heatmap must be float32, float64, float16 or bfloat16");
  }
}

inline ScalarType accumulator_of(Dtype dtype) {
  return dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

inline int64_t elements(const int64_t* sizes, int64_t dims) {
  int64_t count = 1;
  for (int64_t d = 0; d < dims; ++d) count *= sizes[d];
  return count;
}

// An uninitialised tensor on the device of `like`. Through the C shim: stable::new_empty and stable::empty_like go through
// the dispatcher with boxed arguments, which costs a multiple of the allocation.
inline Tensor empty_strided(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dims, ScalarType dtype) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle;
  const AOTITorchError error = aoti_torch_empty_strided(
      dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
      like.get_device_index(), &handle);
  // The shim keeps torch's own error to itself. In these words, training loops look for what they can recover from.
  STD_TORCH_CHECK(error == 0, device_type == aoti_torch_device_type_cpu() ? "DefaultCPUAllocator: can't allocate memory"
                                                                         : "CUDA out of memory",
                  ". kpfused asked for a tensor of ", elements(sizes, dims), " elements");
  return Tensor(handle);
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  const size_t dims = sizes.size();
  sizes.resize(2 * dims, 1);  // behind them, strides: memory of their own takes as long as that of the tensor
  int64_t* const strides = sizes.data() + dims;
  for (size_t d = dims; d-- > 1;) strides[d - 1] = strides[d] * (sizes[d] > 0 ? sizes[d] : 1);
  return empty_strided(like, sizes.data(), strides, static_cast<int64_t>(dims), dtype);
}

// Whether a tensor's elements fill one stretch of memory, in whatever order of dimensions.
inline bool is_dense(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride and size
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) != 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline Tensor empty_like(const Tensor& tensor) {
  // Other strides have to be made dense, in the order that they have.
  if (!tensor.is_contiguous() && !is_dense(tensor)) return torch::stable::empty_like(tensor);
  return empty_strided(tensor, tensor.sizes().data(), tensor.strides().data(), tensor.dim(), tensor.scalar_type());
}

// Some sizes, followed by `last`, with room for what `empty` puts behind.
inline std::vector<int64_t> sizes_before(const int64_t* sizes, size_t count, std::initializer_list<int64_t> last) {
  std::vector<int64_t> result;
  result.reserve(2 * (count + last.size()));
  result.assign(sizes, sizes + count);
  result.insert(result.end(), last);
  return result;
}

// The sizes of the leading dimensions of (..., H, W), followed by `last`.
inline std::vector<int64_t> leading_sizes(const Tensor& heatmap, std::initializer_list<int64_t> last = {}) {
  const auto sizes = heatmap.sizes();
  return sizes_before(sizes.data(), sizes.size() - 2, last);
}

}  // namespace kpfused
