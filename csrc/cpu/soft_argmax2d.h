// SPDX-License-Identifier: MIT
// Fused spatial softmax and expected coordinates on the CPU. The instruction set is chosen at run time.
#pragma once

#include "../params.h"

namespace kpfused::cpu {

// Bytes of ForwardParams::workspace and BackwardParams::workspace; zero where no map is split.
int64_t soft_argmax2d_forward_workspace(const MapView& view, Dtype dtype, bool with_moments);
int64_t soft_argmax2d_backward_workspace(const MapView& view, Dtype dtype, bool grad_beta);

// Maps with stride_x == 1 or stride_inner == 1; height and width at least 1.
void soft_argmax2d_forward(const ForwardParams& params);
void soft_argmax2d_backward(const BackwardParams& params);

// "avx512", "avx2" or "baseline": what this process uses. The environment variable KPFUSED_CPU_CAPABILITY lowers it.
const char* capability();

}  // namespace kpfused::cpu
