// SPDX-License-Identifier: MIT
// Torch's current CUDA stream, which only a CUDA build of torch can name.
#pragma once

#include <cstdint>

namespace kpfused {

// Whether the torch that is loaded can.
bool has_cuda_streams();

void* current_cuda_stream(int32_t device);

}  // namespace kpfused
