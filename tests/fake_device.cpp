// SPDX-License-Identifier: MIT
// A CUDA device that is no device, for fake tensors under a PyTorch built without CUDA: indexing asks for one. FakeTensorMode
// does the same on machines without a GPU (_ensureCUDADeviceGuardSet), but of a PyTorch with CUDA alone.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
}
