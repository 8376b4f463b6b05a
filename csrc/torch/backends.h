// SPDX-License-Identifier: MIT
// Where parameters are run: the CPU's kernels, and those of CUDA on torch's current stream.
#pragma once

#include "../cpu/expectation2d.h"
#include "../cpu/pages.h"
#include "../cpu/soft_argmax2d.h"
#include "../cpu/volumes.h"
#include "../cuda/expectation2d.h"
#include "../cuda/soft_argmax2d.h"
#include "../cuda/volumes.h"
#include "stream.h"
#include "tensors.h"

namespace kpfused {

struct Cpu {
  static int64_t workspace(const ForwardParams& p) {
    return cpu::soft_argmax2d_forward_workspace(p.view, p.dtype, p.with_moments);
  }
  static int64_t workspace(const BackwardParams& p) {
    return cpu::soft_argmax2d_backward_workspace(p.view, p.dtype, p.grad_beta != nullptr);
  }
  static int64_t workspace(const ExpectationParams& p) { return cpu::expectation_workspace(p); }
  static int64_t workspace(const ExpectationHeatmapParams& p) { return cpu::expectation_heatmap_workspace(p); }

  static void run(const ForwardParams& p, const Tensor&) { cpu::soft_argmax2d_forward(p); }
  static void run(const BackwardParams& p, const Tensor&) { cpu::soft_argmax2d_backward(p); }
  static void run(const ExpectationSteps& steps, const Tensor&) { cpu::expectation(steps); }
  static void run(const VolumeForwardParams& p, const Tensor&) { cpu::merge_slices(p); }
  static void run(const VolumeBackwardParams& p, const Tensor&) { cpu::spread_gradients(p); }

  // Of memory that a kernel is to fill.
  static void prepare(const Tensor& dense) {
    const int64_t bytes = dense.numel() * element_size(dtype_of(dense));
    cpu::prefer_huge_pages(dense.mutable_data_ptr(), static_cast<size_t>(bytes));
  }
};

#if KPFUSED_CUDA
struct Cuda {
  static int64_t workspace(const ForwardParams& p) { return cuda::soft_argmax2d_forward_workspace(p); }
  static int64_t workspace(const BackwardParams& p) { return cuda::soft_argmax2d_backward_workspace(p); }
  static int64_t workspace(const ExpectationParams& p) { return cuda::expectation_workspace(p); }
  static int64_t workspace(const ExpectationHeatmapParams& p) { return cuda::expectation_heatmap_workspace(p); }

  template <class Params>
  static void run(const Params& p, const Tensor& heatmap) {
    const torch::stable::accelerator::DeviceGuard guard(heatmap.get_device_index());
    check(launch(p, static_cast<cuda::Stream>(current_cuda_stream(heatmap.get_device_index()))));
  }
  static int launch(const ForwardParams& p, cuda::Stream stream) { return cuda::soft_argmax2d_forward(p, stream); }
  static int launch(const BackwardParams& p, cuda::Stream stream) { return cuda::soft_argmax2d_backward(p, stream); }
  static int launch(const ExpectationSteps& steps, cuda::Stream stream) {
    int error = steps.stats ? cuda::soft_argmax2d_forward(*steps.stats, stream) : 0;
    if (error == 0 && steps.expectation) error = cuda::expectation(*steps.expectation, stream);
    if (error == 0 && steps.heatmap) error = cuda::expectation_heatmap(*steps.heatmap, stream);
    if (error == 0 && steps.values) error = cuda::expectation_values(*steps.values, stream);
    return error;
  }
  static int launch(const VolumeForwardParams& p, cuda::Stream stream) { return cuda::merge_slices(p, stream); }
  static int launch(const VolumeBackwardParams& p, cuda::Stream stream) { return cuda::spread_gradients(p, stream); }
  static void prepare(const Tensor&) {}
  static void check(int error) {
    STD_TORCH_CHECK(error == 0, "kpfused: a CUDA kernel could not be launched: ", cuda::error_string(error),
                    ". A kernel before it may be the cause: set CUDA_LAUNCH_BLOCKING=1 to see which");
  }
};
#endif

}  // namespace kpfused
