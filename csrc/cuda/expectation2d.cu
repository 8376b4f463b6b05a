// SPDX-License-Identifier: MIT
#include "expectation2d.h"

#include "bfloat16.h"
#include "float16.h"
#include "launch_expectation.h"

namespace kpfused::cuda {

int64_t expectation_workspace(const ExpectationParams& params) {
  const SoftmaxParams& softmax = params.softmax;
  const int64_t parts = plan_of(softmax).parts(), sums = softmax.view.maps() * params.values.view.channels;
  return parts > 1 ? sums * parts * accumulator_size(softmax.dtype) : 0;
}

int64_t expectation_heatmap_workspace(const ExpectationHeatmapParams& params) {
  const SoftmaxParams& softmax = params.softmax;
  const int64_t parts = plan_of(softmax).parts();
  return parts > 1 && params.grad_beta ? softmax.view.maps() * parts * accumulator_size(softmax.dtype) : 0;
}

namespace {

template <class Params>
int run_dtype(const Params& p, Stream stream) {
  switch (p.softmax.dtype) {
    case Dtype::float32: return expectation_step<float>(p, stream);
    case Dtype::float64: return expectation_step<double>(p, stream);
    case Dtype::float16: return expectation_step<Float16>(p, stream);
    case Dtype::bfloat16: return expectation_step<Bfloat16>(p, stream);
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace

int expectation(const ExpectationParams& params, Stream stream) { return run_dtype(params, stream); }

int expectation_heatmap(const ExpectationHeatmapParams& params, Stream stream) { return run_dtype(params, stream); }

int expectation_values(const ExpectationValuesParams& params, Stream stream) { return run_dtype(params, stream); }

}  // namespace kpfused::cuda
