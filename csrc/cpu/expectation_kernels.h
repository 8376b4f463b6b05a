// SPDX-License-Identifier: MIT
// Expectations and the softmax itself, from parameters to kernels on one instruction set.
#pragma once

#include <optional>

#include "coordinates.h"
#include "dealt_maps.h"
#include "expectation.h"
#include "forward_rows.h"
#include "lane_maps.h"
#include "parallel.h"
#include "whole_maps.h"
#include "window.h"

namespace kpfused::cpu::KPFUSED_ISA {

void forward(const ForwardParams& params);  // kernels.h

// Some steps of one op, for a block of maps and one part of their pixels; several steps where maps are one part each.
template <class T>
class MapByMap {
 public:
  explicit MapByMap(const ExpectationSteps& steps) : steps_(steps), tiles_(softmax_of(steps)) {
    if (steps.stats) stats_.emplace(*steps.stats);
    if (steps.expectation) expectation_.emplace(ExpectationKernel<T>{*steps.expectation});
    if (steps.heatmap) heatmap_.emplace(ExpectationHeatmapKernel<T>{*steps.heatmap});
    if (steps.values) values_.emplace(ExpectationValuesKernel<T>{*steps.values});
    several_ = expectation_.has_value() + heatmap_.has_value() + values_.has_value() > 1;
  }

  void operator()(int64_t map, int count, int64_t part) {
    if (!steps_.stats || !find_stats(map, count)) tiles_.start(map, count, several_);
    if (expectation_) (*expectation_)(tiles_, map, count, part);
    if (heatmap_) (*heatmap_)(tiles_, map, count, part);
    if (values_) (*values_)(tiles_, map, count, part);
  }

 private:
  // Whether P is kept then.
  bool find_stats(int64_t map, int count) {
    auto* const stats = static_cast<Stats<Acc<T>>*>(steps_.stats->stats);
    if (tiles_.can_keep(count)) {
      tiles_.start_with_stats(map, count, stats, true);
      return true;
    }
    // The same bits, whether P is kept or not.
    if (tiles_.can_keep(1)) {
      for (int m = 0; m < count; ++m) tiles_.start_with_stats(map + m, 1, stats, false);
    } else {
      stats_->run(map, map + count);
    }
    return false;
  }

  const ExpectationSteps& steps_;
  SoftmaxTiles<T> tiles_;
  std::optional<ForwardRows<T, false>> stats_;
  std::optional<ExpectationKernel<T>> expectation_;
  std::optional<ExpectationHeatmapKernel<T>> heatmap_;
  std::optional<ExpectationValuesKernel<T>> values_;
  bool several_;  // steps that ask for P
};

// Steps on blocks of `items`, which are maps, or the values of several.
template <class T>
void run_blocks(const ExpectationSteps& steps, const MapView& items, int64_t at_once, int64_t channels) {
  const int64_t parts = pixel_parts(softmax_of(steps).view).count;
  for_blocks(items, at_once, parts, channels, [&] { return MapByMap<T>(steps); });
}

template <class T>
void run_whole_maps(const ExpectationSteps& steps, int64_t channels) {
  const SoftmaxParams& softmax = softmax_of(steps);
  const int64_t work = softmax.view.height * softmax.view.width * (channels + 1);
  parallel_for(softmax.view.maps(), at_least(kGrainElements / work, 1), [&](int64_t begin, int64_t end) {
    softmax.pixels.mask ? WholeMaps<T, true>(steps, softmax).run(begin, end)
                        : WholeMaps<T, false>(steps, softmax).run(begin, end);
  });
}

// Maps: one of those whose items are parts of maps, or of channels_last ones.
template <class Maps>
void run_items(const ExpectationSteps& steps, int64_t items) {
  const SoftmaxParams& softmax = softmax_of(steps);
  const int64_t elements = softmax.view.maps() * softmax.view.height * softmax.view.width;
  parallel_for(items, at_least(kGrainElements / at_least(elements / items, 1), 1),
               [&](int64_t begin, int64_t end) { Maps(steps, softmax).run(begin, end); });
}

// LaneMaps and the like. Work items as those of ForwardLanes.
template <class Maps>
void run_lanes(const ExpectationSteps& steps) {
  run_items<Maps>(steps, count_items(softmax_of(steps).view));
}

// All steps at once; or step after step, where maps are several parts or steps read different copies of them. Returns whether
// the layout allows it.
template <class Maps>
bool run_in_lanes(const ExpectationSteps& steps) {
  using A = typename Maps::A;
  const ExpectationParams* const e = steps.expectation;
  const ExpectationHeatmapParams* const h = steps.heatmap;
  const ExpectationValuesParams* const v = steps.values;
  if (Maps::fit(steps) && Maps::in_turn(steps, softmax_of(steps))) return run_lanes<Maps>(steps), true;
  const ExpectationSteps of_e = {nullptr, e, nullptr, nullptr}, of_h = {nullptr, nullptr, h, nullptr},
                         of_v = {nullptr, nullptr, nullptr, v};
  if ((e && !Maps::fit(of_e)) || (h && !Maps::fit(of_h)) || (v && !Maps::fit(of_v))) return false;
  const auto parts_of = [](const auto* params) { return part_tiling(params->softmax.view).count(); };
  if (steps.stats) forward(*steps.stats);
  if (e) {
    run_lanes<Maps>(of_e);
    if (parts_of(e) > 1) sum_expectations<A>(*e, parts_of(e));
  }
  if (h) {
    run_lanes<Maps>(of_h);
    if (h->grad_beta && parts_of(h) > 1) sum_parts<A>(h->workspace, h->softmax.view.maps(), parts_of(h), 1, h->grad_beta);
  }
  if (v) run_lanes<Maps>(of_v);
  return true;
}

// Whether ForwardRows finishes a map at a time.
KPFUSED_INLINE bool are_whole_rows(const MapView& view) { return !is_channels_last(view) && part_tiling(view).count() == 1; }

// Whether stats are found on the way to a P that is kept: a matter of the map alone, since they have other bits then.
template <class T>
bool keeps_maps(const MapView& view) {
  return are_whole_rows(view) && view.height * view.width <= kKept<Acc<T>>;
}

// Stats where the steps that follow take maps in another order.
template <class T>
void stats_of(const ForwardParams& params, const SoftmaxParams& softmax) {
  if (!keeps_maps<T>(params.view)) return forward(params);
  const int64_t grain = at_least(kGrainElements / (params.view.height * params.view.width), 1);
  parallel_for(params.view.maps(), grain, [&](int64_t begin, int64_t end) {
    SoftmaxTiles<T> tiles(softmax);
    for (int64_t map = begin; map < end; ++map) tiles.start_with_stats(map, 1, static_cast<Stats<Acc<T>>*>(params.stats), false);
  });
}

// Coordinates under maps that are probability maps.
template <class T>
void coordinates_of(const ExpectationSteps& steps) {
  const MapView& view = softmax_of(steps).view;
  const int64_t parts = part_tiling(view).count();
  if (CoordinateLanes<T>::fit(steps)) {
    run_lanes<CoordinateLanes<T>>(steps);
  } else {
    run_items<CoordinateRows<T>>(steps, view.maps() * parts);
  }
  if (steps.expectation && parts > 1) sum_expectations<Acc<T>>(*steps.expectation, parts);
}

// One map after the other where that can be: it is then still in a near cache when it is read again.
template <class T>
void expectation_of(const ExpectationSteps& steps) {
  if (steps.expectation && steps.expectation->values.kind == ValueKind::window) {
    if (steps.stats) forward(*steps.stats);
    return window_mass<T>(*steps.expectation);
  }
  if (softmax_of(steps).holds == Holds::probabilities) return coordinates_of<T>(steps);
  const MapView& view = softmax_of(steps).view;
  if (run_in_lanes<LaneMaps<T>>(steps) || run_in_lanes<DealtMaps<T>>(steps)) return;
  int64_t at_once = kTileMaps, channels = 1;
  // Beside values, a copy of the maps may be read where stats read them as they lie.
  bool same = pixel_parts(view).count == 1 &&
              (!steps.stats || (are_whole_rows(view) && are_whole_rows(steps.stats->view)));
  const auto see = [&](const auto& kernel) {
    same = same && view.inner == kernel.params.softmax.view.inner;
    at_once = at_most(at_once, kernel.maps_at_once());
    channels = at_least(channels, kernel.channels());
  };
  if (steps.expectation) see(ExpectationKernel<T>{*steps.expectation});
  if (steps.heatmap) see(ExpectationHeatmapKernel<T>{*steps.heatmap});
  if (steps.values) {
    see(ExpectationValuesKernel<T>{*steps.values});
    same = same && !ExpectationValuesKernel<T>{*steps.values}.shares();
  }
  if (same && are_whole_maps<T>(steps, softmax_of(steps))) return run_whole_maps<T>(steps, channels);
  // Of a few maps at least it is better to keep P than to take more of them at once.
  const int64_t kept = kKeptTogether<Acc<T>> / (view.height * view.width);
  if (steps.stats && kept >= 4) at_once = at_most(at_once, ceil_div(view.inner, ceil_div(view.inner, kept)));
  if (same) return run_blocks<T>(steps, view, at_once, channels);
  if (steps.stats) stats_of<T>(*steps.stats, softmax_of(steps));
  if (steps.expectation) {
    const ExpectationKernel<T> kernel{*steps.expectation};
    run_blocks<T>({nullptr, steps.expectation, nullptr, nullptr}, kernel.params.softmax.view, kernel.maps_at_once(), kernel.channels());
    kernel.finish();
  }
  if (steps.heatmap) {
    const ExpectationHeatmapKernel<T> kernel{*steps.heatmap};
    run_blocks<T>({nullptr, nullptr, steps.heatmap, nullptr}, kernel.params.softmax.view, kernel.maps_at_once(), kernel.channels());
    kernel.finish();
  }
  if (steps.values) {
    const ExpectationValuesKernel<T> kernel{*steps.values};
    run_blocks<T>({nullptr, nullptr, nullptr, steps.values}, kernel.own(), kernel.maps_at_once(), kernel.channels());
  }
}

void expectation(const ExpectationSteps& steps) {
  switch (softmax_of(steps).dtype) {
    case Dtype::float32: return expectation_of<float>(steps);
    case Dtype::float64: return expectation_of<double>(steps);
    case Dtype::float16: return expectation_of<Half>(steps);
    case Dtype::bfloat16: return expectation_of<BFloat16>(steps);
  }
}

}  // namespace kpfused::cpu::KPFUSED_ISA
