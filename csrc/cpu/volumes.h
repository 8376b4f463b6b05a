// SPDX-License-Identifier: MIT
// Volumes from their slices on the CPU, and back.
#pragma once

#include "../params.h"

namespace kpfused::cpu {

void merge_slices(const VolumeForwardParams& params);
void spread_gradients(const VolumeBackwardParams& params);

}  // namespace kpfused::cpu
