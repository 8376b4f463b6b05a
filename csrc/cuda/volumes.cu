// SPDX-License-Identifier: MIT
#include "volumes.h"

#include "../volumes.h"
#include "launch.h"

namespace kpfused::cuda {

// The lanes of a warp, of which the first has the sums.
struct Lanes {
  int lane;

  KPFUSED_DEVICE int64_t first() const { return lane; }
  KPFUSED_DEVICE int64_t step() const { return kWarp; }
  template <class A>
  KPFUSED_DEVICE Place<A> highest(const Place<A>& place) const {
    return butterfly(place, kWarp, Higher{});
  }
  template <class A>
  KPFUSED_DEVICE VolumeSums<A> add(const VolumeSums<A>& sums) const {
    Tuple<A, kVolumeSums> tuple;
#pragma unroll
    for (int i = 0; i < kVolumeSums; ++i) tuple.at[i] = sums.at[i];
    tuple = reduce_lanes(tuple, kWarp, Add{});
    VolumeSums<A> all;
#pragma unroll
    for (int i = 0; i < kVolumeSums; ++i) all.at[i] = tuple.at[i];
    return all;
  }
};

// One warp a volume.
template <class A>
__global__ void __launch_bounds__(kMergeThreads, 1) merge_volumes(VolumeForwardParams p) {
  const int64_t v = static_cast<int64_t>(blockIdx.x) * (kMergeThreads / kWarp) + threadIdx.x / kWarp;
  const Lanes lanes{static_cast<int>(threadIdx.x) % kWarp};
  if (v >= p.volume.view.volumes) return;  // a whole warp
  const A beta = beta_of<A>(p.volume.beta, p.volume.view.slice(v, 0));
  const VolumeStats<A> stats = volume_stats<A>(p.volume, v, sharpness(beta).scale, lanes, Exp2{});
  if (lanes.lane == 0) write_volume(p, v, stats, beta);
}

// One thread a slice.
template <class A>
__global__ void __launch_bounds__(kMergeThreads, 1) slice_gradients(VolumeBackwardParams p) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  if (n < p.volume.view.slices()) write_slice_gradients<A>(p, n, beta_of<A>(p.volume.beta, n), Exp2{});
}

int merge_slices(const VolumeForwardParams& params, Stream stream) {
  const dim3 grid = grid_of(params.volume.view.volumes, kMergeThreads / kWarp);
  if (params.volume.dtype == Dtype::float64) {
    KPFUSED_LAUNCH((merge_volumes<double>), grid, kMergeThreads, 0, stream, params);
  } else {
    KPFUSED_LAUNCH((merge_volumes<float>), grid, kMergeThreads, 0, stream, params);
  }
  return static_cast<int>(cudaGetLastError());
}

int spread_gradients(const VolumeBackwardParams& params, Stream stream) {
  const dim3 grid = grid_of(params.volume.view.slices(), kMergeThreads);
  if (params.volume.dtype == Dtype::float64) {
    KPFUSED_LAUNCH((slice_gradients<double>), grid, kMergeThreads, 0, stream, params);
  } else {
    KPFUSED_LAUNCH((slice_gradients<float>), grid, kMergeThreads, 0, stream, params);
  }
  return static_cast<int>(cudaGetLastError());
}

}  // namespace kpfused::cuda
