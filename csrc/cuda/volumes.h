// SPDX-License-Identifier: MIT
// Volumes from their slices on CUDA devices, and back: the launchers, for callers that know no CUDA header.
#pragma once

#include "soft_argmax2d.h"

namespace kpfused::cuda {

// Enqueue on `stream` of the current device; one launch. At least one volume. Return a cudaError_t.
int merge_slices(const VolumeForwardParams& params, Stream stream);
int spread_gradients(const VolumeBackwardParams& params, Stream stream);

}  // namespace kpfused::cuda
