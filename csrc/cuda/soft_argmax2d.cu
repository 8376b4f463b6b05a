// SPDX-License-Identifier: MIT
#include "soft_argmax2d.h"

#include "launch.h"

namespace kpfused::cuda {

extern template int forward<float>(const ForwardParams&, Stream);
extern template int forward<double>(const ForwardParams&, Stream);
extern template int forward<Float16>(const ForwardParams&, Stream);
extern template int forward<Bfloat16>(const ForwardParams&, Stream);
extern template int backward<float>(const BackwardParams&, Stream);
extern template int backward<double>(const BackwardParams&, Stream);
extern template int backward<Float16>(const BackwardParams&, Stream);
extern template int backward<Bfloat16>(const BackwardParams&, Stream);

int64_t soft_argmax2d_forward_workspace(const ForwardParams& params) {
  const int64_t parts = plan_of(params).parts();
  return parts > 1 ? params.view.maps() * parts * kStats * accumulator_size(params.dtype) : 0;
}

int64_t soft_argmax2d_backward_workspace(const BackwardParams& params) {
  const int64_t parts = plan_of(params).parts();
  return parts > 1 && params.grad_beta ? params.view.maps() * parts * accumulator_size(params.dtype) : 0;
}

int soft_argmax2d_forward(const ForwardParams& params, Stream stream) {
  switch (params.dtype) {
    case Dtype::float32: return forward<float>(params, stream);
    case Dtype::float64: return forward<double>(params, stream);
    case Dtype::float16: return forward<Float16>(params, stream);
    case Dtype::bfloat16: return forward<Bfloat16>(params, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

int soft_argmax2d_backward(const BackwardParams& params, Stream stream) {
  switch (params.dtype) {
    case Dtype::float32: return backward<float>(params, stream);
    case Dtype::float64: return backward<double>(params, stream);
    case Dtype::float16: return backward<Float16>(params, stream);
    case Dtype::bfloat16: return backward<Bfloat16>(params, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace kpfused::cuda
