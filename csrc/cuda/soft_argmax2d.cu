// SPDX-License-Identifier: MIT
#include "soft_argmax2d.h"

#include "launch_moments.h"

namespace kpfused::cuda {

// Compiled in a file for each element type, means and moments.
#define KPFUSED_ELSEWHERE(T)                                      \
  extern template int forward<T>(const ForwardParams&, Stream);   \
  extern template int backward<T>(const BackwardParams&, Stream); \
  extern template int moments<T>(const ForwardParams&, Stream);   \
  extern template int moments<T>(const BackwardParams&, Stream)
KPFUSED_ELSEWHERE(float);
KPFUSED_ELSEWHERE(double);
KPFUSED_ELSEWHERE(Float16);
KPFUSED_ELSEWHERE(Bfloat16);
#undef KPFUSED_ELSEWHERE

int64_t soft_argmax2d_forward_workspace(const ForwardParams& params) {
  const int64_t parts = plan_of(params).parts();
  if (parts == 1) return 0;
  const int64_t values = (takes_moments(params) ? sizeof(Moments<double>) : sizeof(State<double>)) / sizeof(double);
  return params.view.maps() * parts * values * accumulator_size(params.dtype);
}

int64_t soft_argmax2d_backward_workspace(const BackwardParams& params) {
  const int64_t parts = plan_of(params).parts();
  return parts > 1 && params.grad_beta ? params.view.maps() * parts * accumulator_size(params.dtype) : 0;
}

namespace {

template <class T>
int run(const ForwardParams& p, Stream stream) {
  return takes_moments(p) ? moments<T>(p, stream) : forward<T>(p, stream);
}
template <class T>
int run(const BackwardParams& p, Stream stream) {
  return takes_moments(p) ? moments<T>(p, stream) : backward<T>(p, stream);
}

template <class Params>
int run_dtype(const Params& p, Stream stream) {
  switch (p.dtype) {
    case Dtype::float32: return run<float>(p, stream);
    case Dtype::float64: return run<double>(p, stream);
    case Dtype::float16: return run<Float16>(p, stream);
    case Dtype::bfloat16: return run<Bfloat16>(p, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace

int soft_argmax2d_forward(const ForwardParams& params, Stream stream) { return run_dtype(params, stream); }

int soft_argmax2d_backward(const BackwardParams& params, Stream stream) { return run_dtype(params, stream); }

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace kpfused::cuda
