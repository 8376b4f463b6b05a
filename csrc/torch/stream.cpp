// SPDX-License-Identifier: MIT
#include "stream.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

namespace kpfused {
namespace {

using CurrentStream = AOTITorchError (*)(int32_t, void**);

// Looked for in torch's CUDA library, not linked with: so one build loads beside a CPU build of torch too. Nor is it a
// weak symbol, which a linker that drops libraries without a strong one leaves null: torch keeps its own to itself.
CurrentStream find() {
  void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  // A library of another name may still be open to all.
  return reinterpret_cast<CurrentStream>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
}

CurrentStream accessor() {
  static const CurrentStream found = find();
  return found;
}

}  // namespace

bool has_cuda_streams() { return accessor() != nullptr; }

void* current_cuda_stream(int32_t device) {
  STD_TORCH_CHECK(has_cuda_streams(), "kpfused: the CUDA streams of torch were not found (see python -m kpfused.info)");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(accessor()(device, &stream));
  return stream;
}

}  // namespace kpfused
