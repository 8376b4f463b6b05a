// SPDX-License-Identifier: MIT
// The Python module kpfused._C. Importing it registers the ops; it says how it was built.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/soft_argmax2d.h"
#include "plan.h"
#include "torch/stream.h"

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
  info["torch_streams"] = kpfused::has_cuda_streams();
  return info;
}

kpfused::Dtype dtype_of(const std::string& name) {
  using kpfused::Dtype;
  if (name == "float32") return Dtype::float32;
  if (name == "float64") return Dtype::float64;
  if (name == "float16") return Dtype::float16;
  if (name == "bfloat16") return Dtype::bfloat16;
  throw py::value_error("dtype must be 'float32', 'float64', 'float16' or 'bfloat16'; got '" + name + "'");
}

py::dict launch_plan(int64_t height, int64_t width, const std::string& dtype, int64_t channels, bool aligned,
                     bool moments) {
  if (height < 1 || width < 1 || channels < 0) throw py::value_error("height and width must be at least 1, channels 0");
  const kpfused::Plan plan = kpfused::choose_plan({dtype_of(dtype), height, width, channels, aligned, moments});
  py::dict d;
  d["regime"] = kpfused::regime_name(plan.regime);
  d["vector"] = plan.vector;
  d["items"] = plan.items;
  d["threads"] = plan.threads;
  d["team"] = plan.team;
  d["tx"] = plan.tx;
  d["ty"] = plan.ty;
  d["groups"] = plan.groups;
  d["tiles"] = plan.tiles;
  d["rows_per_part"] = plan.rows_per_part;
  d["columns_per_part"] = plan.columns_per_part;
  d["parts"] = plan.parts();
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of kpfused.";
  m.def("build_info", &build_info, "How this module was built and which CPU kernels it uses.");
  m.def("launch_plan", &launch_plan, py::arg("height"), py::arg("width"), py::arg("dtype"), py::arg("channels") = 0,
        py::arg("aligned") = true, py::arg("moments") = false,
        "How the CUDA kernels take a map: regime and launch shape. channels: those of a channels_last image, 0 for maps "
        "whose rows are contiguous. aligned: vectors of 16 bytes start on 16 bytes. moments: for moments, or for means of "
        "maps with a mask or valid size.");
}
