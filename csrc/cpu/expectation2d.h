// SPDX-License-Identifier: MIT
// Expectations under the spatial softmax on the CPU, and the softmax itself.
#pragma once

#include "../params.h"

namespace kpfused::cpu {

// Bytes of the parameters' workspace; zero where no map is split.
int64_t expectation_workspace(const ExpectationParams& params);
int64_t expectation_heatmap_workspace(const ExpectationHeatmapParams& params);

// Maps with stride_x == 1 or stride_inner == 1, at least one of them, height and width at least 1; values in any layout.
void expectation(const ExpectationSteps& steps);

}  // namespace kpfused::cpu
