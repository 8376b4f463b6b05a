// SPDX-License-Identifier: MIT
// The Python module kpfused._C. Importing it registers the ops; it says how it was built.
#include <pybind11/pybind11.h>

#include "cpu/soft_argmax2d.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = KPFUSED_VERSION;
  info["torch"] = KPFUSED_TORCH;
  info["compiler"] = __VERSION__;
  info["cuda"] = bool(KPFUSED_CUDA);
  info["cuda_architectures"] = KPFUSED_ARCHITECTURES;
  info["nvcc"] = KPFUSED_NVCC;
  info["flags"] = KPFUSED_FLAGS;
  info["cpu_capability"] = kpfused::cpu::capability();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of kpfused.";
  m.def("build_info", &build_info, "How this module was built and which CPU kernels it uses.");
}
