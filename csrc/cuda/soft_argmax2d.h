// SPDX-License-Identifier: MIT
// Fused spatial softmax and expected coordinates on CUDA devices: the launchers, for callers that know no CUDA header.
#pragma once

#include "../params.h"

struct CUstream_st;

namespace kpfused::cuda {

using Stream = CUstream_st*;

// Bytes of ForwardParams::workspace and BackwardParams::workspace; zero where no map is split.
int64_t soft_argmax2d_forward_workspace(const ForwardParams& params);
int64_t soft_argmax2d_backward_workspace(const BackwardParams& params);

// Enqueue on `stream` of the current device; at most one launch, two where maps are split. No synchronisation.
// Maps with stride_x == 1 or stride_inner == 1; height and width at least 1. Return a cudaError_t.
int soft_argmax2d_forward(const ForwardParams& params, Stream stream);
int soft_argmax2d_backward(const BackwardParams& params, Stream stream);

// The CUDA runtime's text for such an error.
const char* error_string(int error);

}  // namespace kpfused::cuda
