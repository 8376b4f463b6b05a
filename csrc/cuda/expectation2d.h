// SPDX-License-Identifier: MIT
// Expectations under the spatial softmax on CUDA devices, and the softmax itself: the launchers, for callers that know no
// CUDA header.
#pragma once

#include "soft_argmax2d.h"

namespace kpfused::cuda {

// Bytes of the parameters' workspace; zero where no map is split.
int64_t expectation_workspace(const ExpectationParams& params);
int64_t expectation_heatmap_workspace(const ExpectationHeatmapParams& params);

// Enqueue on `stream` of the current device; at most one launch, two where maps are split. No synchronisation.
// Maps with stride_x == 1 or stride_inner == 1, at least one of them, height and width at least 1; at least one channel;
// values in any layout. Return a cudaError_t.
int expectation(const ExpectationParams& params, Stream stream);
int expectation_heatmap(const ExpectationHeatmapParams& params, Stream stream);
int expectation_values(const ExpectationValuesParams& params, Stream stream);

}  // namespace kpfused::cuda
