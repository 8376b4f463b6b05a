// SPDX-License-Identifier: MIT
// A CUDA device that is no device, for fake tensors under a PyTorch without CUDA: indexing asks for one. A PyTorch with CUDA
// has it by itself on machines without a GPU.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
}
