// SPDX-License-Identifier: MIT
// Chooses the instruction set, once per process.
#include "soft_argmax2d.h"

#include "expectation2d.h"
#include "masks.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../moments.h"
#include "plan.h"

namespace kpfused::cpu {

#define KPFUSED_DECLARE(isa)                 \
  namespace isa {                            \
  void forward(const ForwardParams&);        \
  void backward(const BackwardParams&);      \
  void expectation(const ExpectationSteps&); \
  void transpose(const ByteMatrices&);       \
  }
KPFUSED_DECLARE(baseline)
#if defined(__x86_64__)
KPFUSED_DECLARE(avx2)
KPFUSED_DECLARE(avx512)
#endif
#undef KPFUSED_DECLARE

namespace {

struct Kernels {
  const char* name;
  void (*forward)(const ForwardParams&);
  void (*backward)(const BackwardParams&);
  void (*expectation)(const ExpectationSteps&);
  void (*transpose)(const ByteMatrices&);
};

Kernels choose() {
  const char* wish = std::getenv("KPFUSED_CPU_CAPABILITY");
  const auto wished = [wish](const char* name) { return wish && std::strcmp(wish, name) == 0; };
  const bool baseline_only = wished("baseline"), no_avx512 = baseline_only || wished("avx2");
  if (wish && *wish && !no_avx512 && !wished("avx512")) {
    throw std::invalid_argument(std::string("KPFUSED_CPU_CAPABILITY must be avx512, avx2 or baseline; got ") + wish);
  }
#if defined(__x86_64__)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && !no_avx512) return {"avx512", avx512::forward, avx512::backward, avx512::expectation, avx512::transpose};
  if (has_avx2 && !baseline_only) return {"avx2", avx2::forward, avx2::backward, avx2::expectation, avx2::transpose};
#endif
  return {"baseline", baseline::forward, baseline::backward, baseline::expectation, baseline::transpose};
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

int64_t soft_argmax2d_forward_workspace(const MapView& view, Dtype dtype, bool with_moments) {
  const int64_t parts = part_tiling(view).count(), values = sizeof(Moments<double>) / sizeof(double);
  return parts == 1 ? 0 : view.maps() * parts * (with_moments ? values : 4) * accumulator_size(dtype);
}

int64_t soft_argmax2d_backward_workspace(const MapView& view, Dtype dtype, bool grad_beta) {
  const int64_t parts = part_tiling(view).count();
  return parts == 1 || !grad_beta ? 0 : view.maps() * parts * accumulator_size(dtype);
}

void soft_argmax2d_forward(const ForwardParams& params) {
  if (params.view.maps() > 0) kernels().forward(params);
}

void soft_argmax2d_backward(const BackwardParams& params) {
  if (params.view.maps() > 0) kernels().backward(params);
}

// Of kernels that take pixels in row order and of those that take them otherwise, whichever will run.
int64_t parts_of(const MapView& view) { return at_least(pixel_parts(view).count, part_tiling(view).count()); }

int64_t expectation_workspace(const ExpectationParams& params) {
  const SoftmaxParams& p = params.softmax;
  const int64_t parts = parts_of(p.view);
  if (parts == 1 || params.values.kind == ValueKind::window) return 0;
  return p.view.maps() * parts * params.values.view.channels * accumulator_size(p.dtype);
}

int64_t expectation_heatmap_workspace(const ExpectationHeatmapParams& params) {
  const SoftmaxParams& p = params.softmax;
  const int64_t parts = parts_of(p.view);
  return parts == 1 || !params.grad_beta ? 0 : p.view.maps() * parts * accumulator_size(p.dtype);
}

void expectation(const ExpectationSteps& steps) { kernels().expectation(steps); }

void transpose(const ByteMatrices& matrices) { kernels().transpose(matrices); }

const char* capability() { return kernels().name; }

}  // namespace kpfused::cpu
