// SPDX-License-Identifier: MIT
// What host code hands to a kernel: plain pointers, sizes and strides. No torch, no CUDA API, no ownership.
#pragma once

#include <cstdint>

#include "macros.h"

namespace kpfused {

enum class Dtype : int { float32 = 0, float64 = 1, float16 = 2, bfloat16 = 3 };

constexpr int element_size(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// The accumulation dtype, and that of coordinates, stats and beta: float64 for float64 maps, float32 for all others.
constexpr int accumulator_size(Dtype dtype) { return dtype == Dtype::float64 ? 8 : 4; }

// A batch of maps in memory. Map number n = o * inner + i starts at o * stride_outer + i * stride_inner; all strides
// count elements and are never negative. Two leading extents are enough for every layout that is read in place:
// contiguous maps and their slices have stride_x == 1, channels_last maps have stride_inner == 1.
struct MapView {
  int64_t outer, inner;
  int64_t height, width;
  int64_t stride_outer, stride_inner, stride_y, stride_x;

  KPFUSED_HD constexpr int64_t maps() const { return outer * inner; }
};

// beta of map n is values[(n / divisor) % modulus] in the accumulation dtype, or `value` where values is null.
// The pair (divisor, modulus) covers a scalar (1, 1), one per keypoint (1, K), one per sample (K, B) and one per map.
struct BetaView {
  const void* values;
  double value;
  int64_t divisor, modulus;
};

template <class A>
KPFUSED_HD A beta_of(const BetaView& beta, int64_t n) {
  if (!beta.values) return static_cast<A>(beta.value);
  // One beta for all maps costs no division: kernels that sum over maps come here for each.
  return static_cast<const A*>(beta.values)[beta.modulus == 1 ? 0 : n / beta.divisor % beta.modulus];
}

// Where the masks of maps begin. Maps that share one have strides of zero, and those of one image or clip may do so in any of
// its dimensions, so that a mask has up to kMaskRuns extents of its own, the innermost first: their product is the number of
// maps.
constexpr int kMaskRuns = 4;
// stride_x of a mask that has a bit for each pixel, the lowest of a byte first, where rows begin with a byte; its other strides
// are of bytes all the same. The CPU's kernels along rows read such.
constexpr int64_t kMaskBits = -1;
struct MaskView {
  int runs;
  int64_t size[kMaskRuns], stride[kMaskRuns];
  int64_t stride_y, stride_x;

  // Of the maps of an image, `inner` of them: whether their masks are all stride_inner() apart, and whether they share one.
  KPFUSED_HD constexpr bool even(int64_t inner) const { return runs == 1 || size[0] % inner == 0; }
  KPFUSED_HD constexpr bool shared(int64_t inner) const { return even(inner) && stride[0] == 0; }
  KPFUSED_HD constexpr int64_t stride_inner() const { return stride[0]; }
  // Of map n.
  KPFUSED_HD constexpr int64_t offset(int64_t n) const {
    int64_t at = 0;
    for (int r = 0; r < kMaskRuns - 1 && r < runs - 1; ++r) {
      const int64_t rest = n / size[r];
      at += (n - rest * size[r]) * stride[r], n = rest;
    }
    return at + n * stride[runs - 1];
  }
};

// Which pixels count: all, or those where the mask is not zero and that lie within the map's valid size, (height, width) in
// sizes[(n / divisor) % modulus * 2], clamped to the map's own. A pixel that does not count is not needed: its logit may
// be anything, it weighs nothing and its gradient is zero, whatever the others are. With `fills_empty`, a map in which
// nothing counts or all that counts is -inf has `empty_value` for each of its real results, and no gradient.
struct PixelView {
  const uint8_t* mask;  // null: all pixels within the valid size
  MaskView mask_view;
  const int64_t* sizes;  // null: the whole map
  int64_t divisor, modulus;
  bool fills_empty;  // always so where not all pixels count
  double empty_value;

  KPFUSED_HD constexpr bool all() const { return !mask && !sizes; }
};

// Kernels measure pixels from the centre of the map, ((W - 1) / 2, (H - 1) / 2), where float32 sums lose least.
// A coordinate in the caller's units is scale * centred + offset; every preset is such an affine map.
struct Units {
  double scale_x, offset_x;
  double scale_y, offset_y;
};

// Per map, `stats` keeps what backward needs to recompute P exactly: the values of Stats or of MomentStats (moments.h), in
// the accumulation dtype.
constexpr int kStats = 4, kMomentStats = 8;

// What spatial_moments2d gives beside the mean, per map and in the accumulation dtype unless said otherwise.
struct MomentFields {
  void* covariance;        // [maps, 2, 2], in the caller's units
  void* entropy;           // [maps], nats
  void* logsumexp;         // [maps]
  void* peak_probability;  // [maps]
  int64_t* peak;           // [maps, 2], (x, y): the first pixel, in row order, of the maximum
};

// Gradients with respect to these fields, dense in the same shapes; null where there is none.
struct MomentGradients {
  const void* covariance;
  const void* entropy;
  const void* logsumexp;
  const void* peak_probability;
  const int64_t* peak;  // as forward left it
};

struct ForwardParams {
  Dtype dtype;
  const void* heatmap;
  MapView view;
  PixelView pixels;
  BetaView beta;
  Units units;
  void* coordinates;  // [maps, 2], (x, y)
  void* stats;        // [maps, kStats], or kMomentStats with moments
  bool with_moments;  // all fields of `moments` are wanted too, or none
  MomentFields moments;
  void* workspace;    // partial states of split maps: ForwardPlan's bytes; null where the plan asks for none
};

struct BackwardParams {
  Dtype dtype;
  const void* heatmap;
  MapView view;
  PixelView pixels;
  BetaView beta;
  Units units;
  const void* stats;             // as forward left it
  const void* grad_coordinates;  // of map n: [n * grad_stride_map] for x, one grad_stride_xy further for y; with
                                 // moments it may be null
  bool with_moments;
  MomentGradients moments;
  int64_t grad_stride_map, grad_stride_xy;
  void* grad_heatmap;  // same dtype as heatmap
  MapView grad_view;   // same extents as view; same kind of layout, dense
  void* grad_beta;     // [maps], d loss / d beta of that map, in the accumulation dtype; null where it is not wanted
  void* workspace;     // partial sums of grad_beta of split maps; null where the plan asks for none
};

// Volumes as stacks of slices, each of which is a map: that at depth d of volume v = o * inner + i is map
// (o * depth + d) * inner + i.
struct SliceView {
  int64_t volumes, depth, inner;

  KPFUSED_HD constexpr int64_t slices() const { return volumes * depth; }
  KPFUSED_HD constexpr int64_t slice(int64_t v, int64_t d) const { return (v / inner * depth + d) * inner + v % inner; }
};

// Per volume, what its slices' gradients need of the whole: the values of VolumeStats (volumes.h), in the accumulation
// dtype.
constexpr int kVolumeStats = 13;

// What merging slices, and taking the gradients of volumes apart, share.
struct VolumeParams {
  Dtype dtype;  // of the heatmap
  SliceView view;
  BetaView beta;  // of the slices
  Units units;
  double scale_z, offset_z;  // as Units
  const void* slice_stats;   // [slices, kMomentStats], as the maps' forward left them
};

struct VolumeForwardParams {
  VolumeParams volume;
  const int64_t* slice_peaks;  // [slices, 2], likewise
  bool fills_empty;            // of volumes in which nothing weighs, as in PixelView
  double empty_value;
  void* mean;           // [volumes, 3], (x, y, z)
  MomentFields fields;  // as of maps, but covariance [volumes, 3, 3] and peak [volumes, 3]
  void* stats;          // [volumes, kVolumeStats]
};

struct VolumeBackwardParams {
  VolumeParams volume;
  const void* stats;  // as forward left them
  // With respect to the volumes' fields, dense in their shapes; null where there is none.
  const void *grad_mean, *grad_covariance, *grad_entropy, *grad_logsumexp, *grad_peak_probability;
  // And with respect to those of the slices: of the mean and the log-sum-exp always, of the others where they are asked
  // for, which is null where they are not.
  void *slice_mean, *slice_covariance, *slice_entropy, *slice_logsumexp, *slice_peak_probability;
};

// Values beside a batch of maps: that of channel c at pixel (y, x) of map (o, i) is at o * stride_outer + i *
// stride_inner + c * stride_channel + y * stride_y + x * stride_x. Maps that share values have zeros there.
struct ValueView {
  int64_t channels;
  int64_t stride_outer, stride_inner, stride_channel, stride_y, stride_x;
};

enum class ValueKind : int { tensor = 0, coordinates = 1, window = 2 };

// What an expectation is of: a tensor, the coordinates of the pixels, two channels (x, y) in `units`, or one channel that
// is 1 within a square of 2 radius + 1 pixels a side around one pixel of the map, and 0 without (window_of in fields.h).
// Of the last two nothing is in memory, and all strides are zero.
struct Values {
  ValueKind kind;
  const void* data;  // of the heatmap's dtype
  ValueView view;
  Units units;
  int64_t radius;
  const int64_t* centre;  // [maps, 2], (x, y); null: the pixel nearest to the mean that stats have
};

// What a map holds. logits: P is their softmax. softmax: that P itself, where its gradient has no need of the logits; not of
// beta, for which there is none, nor of values. probabilities: P, of which it is not known what it came from, so that beta,
// stats and empty maps mean nothing.
enum class Holds : int { logits, softmax, probabilities };

// The spatial softmax P that three kernels are about.
struct SoftmaxParams {
  Dtype dtype;  // of heatmap, values and their gradients
  Holds holds;
  const void* heatmap;
  MapView view;
  PixelView pixels;
  BetaView beta;
  const void* stats;  // [maps, stats_stride], of which the first are Stats, as forward left them
  int64_t stats_stride;
};

// Expectation: E_c = sum_i P_i V_ci.
struct ExpectationParams {
  SoftmaxParams softmax;
  Values values;
  void* expectation;  // [maps, channels], accumulation dtype
  void* workspace;    // partial sums of split maps
};

// Its gradient with respect to the heatmap, dh_i = beta P_i sum_c g_c (V_ci - E_c), or sum_c g_c V_ci of a probability
// map; and with respect to beta, sum_i h_i dh_i / beta, summed relative to the peak.
struct ExpectationHeatmapParams {
  SoftmaxParams softmax;
  Values values;
  const void* expectation;  // as forward left it
  const void* grad;         // [maps, channels], accumulation dtype; null: 1 each
  void* grad_heatmap;
  MapView grad_view;
  void* grad_beta;  // [maps], accumulation dtype; null where it is not wanted
  void* workspace;  // partial sums of grad_beta of split maps
};

// And with respect to the values: dV_ci = sum of P_i g_c over the maps that share them. With one channel, no shared
// values and g = 1 it is the softmax itself.
struct ExpectationValuesParams {
  SoftmaxParams softmax;
  const void* grad;  // as above
  void* grad_values;
  ValueView value_view;
};

// What one op asks for of one heatmap, in this order; null where it does not. One of the last three is there, and an
// expectation of a window is the last.
struct ExpectationSteps {
  const ForwardParams* stats;
  const ExpectationParams* expectation;
  const ExpectationHeatmapParams* heatmap;
  const ExpectationValuesParams* values;
};

}  // namespace kpfused
