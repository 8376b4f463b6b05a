// SPDX-License-Identifier: MIT
// A few numbers a slice: no instruction set of its own.
#include "volumes.h"

#include "../volumes.h"
#include "parallel.h"

namespace kpfused::cpu {

namespace {

struct Exp2 {
  template <class A>
  A operator()(A x) const {
    return std::exp2(x);
  }
};

// A thread takes all slices of a volume, in order.
struct Alone {
  int64_t first() const { return 0; }
  int64_t step() const { return 1; }
  template <class T>
  T highest(T place) const {
    return place;
  }
  template <class T>
  T add(T sums) const {
    return sums;
  }
};

constexpr int64_t kSlicesOfThread = 512;

template <class A>
void merge(const VolumeForwardParams& p) {
  const VolumeParams& volume = p.volume;
  const int64_t grain = kSlicesOfThread / volume.view.depth + 1;
  parallel_for(volume.view.volumes, grain, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      const A beta = beta_of<A>(volume.beta, volume.view.slice(v, 0));
      write_volume(p, v, volume_stats<A>(volume, v, sharpness(beta).scale, Alone{}, Exp2{}), beta);
    }
  });
}

template <class A>
void spread(const VolumeBackwardParams& p) {
  parallel_for(p.volume.view.slices(), kSlicesOfThread, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) write_slice_gradients<A>(p, n, beta_of<A>(p.volume.beta, n), Exp2{});
  });
}

}  // namespace

void merge_slices(const VolumeForwardParams& params) {
  params.volume.dtype == Dtype::float64 ? merge<double>(params) : merge<float>(params);
}

void spread_gradients(const VolumeBackwardParams& params) {
  params.volume.dtype == Dtype::float64 ? spread<double>(params) : spread<float>(params);
}

}  // namespace kpfused::cpu
