// SPDX-License-Identifier: MIT
// Expectations where lanes are channels: the softmax of channels_last maps, and expectations of values that lie as the maps
// do. What expectation.h does tile by tile, transposed, is done here pixel after pixel, as memory has it; pixels may stand
// abreast (lanes.h).
#pragma once

#include "lane_runs.h"

namespace kpfused::cpu::KPFUSED_ISA {

template <class T>
class LaneMaps : public LaneRuns<T> {
  using Base = LaneRuns<T>;

 public:
  using typename Base::A;
  using Base::L;

  // Whether these steps read and write what lies as the maps do, with one channel a map.
  static bool fit(const ExpectationSteps& steps) {
    bool one = true;
    Base::for_views(steps, [&](const SoftmaxParams&, const auto& view) { one = one && Base::channels_of(view) == 1; });
    return one && Base::are_lanes(steps);
  }

  LaneMaps(const ExpectationSteps& steps, const SoftmaxParams& softmax) : Base(steps, softmax, kRun) {}

  void run(int64_t begin, int64_t end) {
    this->for_items(begin, end, [&](const Item& at) {
      if (softmax_.holds == Holds::softmax) {
        if (steps_.expectation) expect<true>(at);
        if (steps_.heatmap) write<true, false, false, true>(at);
      } else {
        if (steps_.expectation) expect<false>(at);
        this->with_gradients([&](auto heatmap, auto beta, auto values) { write<heatmap, beta, values, false>(at); });
      }
    });
  }

 private:
  static constexpr int64_t kRun = 64;

  using typename Base::Item;
  using typename Base::Lane;
  template <class P>
  using Pixels = typename Base::template Pixels<P>;
  using Base::abreast_, Base::empty_, Base::empty_maps_, Base::lanes_, Base::parts_, Base::softmax_, Base::steps_, Base::view_;
  using Base::add_row, Base::clear_sums, Base::for_runs, Base::is_run, Base::pixels, Base::read, Base::sum_of, Base::to_p;

  // kHeld: the maps hold P.
  template <bool kHeld>
  void expect(const Item& at) {
    const ExpectationParams& params = *steps_.expectation;
    const auto heatmap = read(softmax_.heatmap, view_, at), values = read(params.values.data, params.values.view, at);
    clear_sums();
    const T *h = nullptr, *v = nullptr;
    for_runs(
        at, is_run(at, heatmap) && is_run(at, values),
        [&](int64_t r, int64_t c) { h = heatmap.at(r, c), v = values.at(r, c); },
        [&](auto size, int64_t c, int64_t g, int64_t k, auto counted) __attribute__((always_inline)) {
          constexpr int N = decltype(size)::value;
          Lane& lane = lanes_[g];
          const T *const h_at = h + c * heatmap.stride_x + k, *const v_at = v + c * values.stride_x + k;
          Vec<A> p[N];
          for (int j = 0; j < N; ++j) {
            prefetch(h_at + j * heatmap.stride_x, kReadAhead), prefetch(v_at + j * values.stride_x, kReadAhead);
            p[j] = counted.load(h_at + j * heatmap.stride_x);
            if (!kHeld) p[j] = distance(p[j], lane.of);
          }
          if (!kHeld) to_p(lane, p);
          // A product by itself with a mask and without: a channel's bits do not depend on what counts of others.
          Vec<A> sum = lane.row;
          for (int j = 0; j < N; ++j) sum += KPFUSED_PRODUCT(counted.keep(j, p[j] * counted.load(v_at + j * values.stride_x)));
          lane.row = sum;
        },
        [&](int64_t, int64_t vectors) { add_row(vectors); });
    const int64_t parts = parts_.count();
    A* const to = static_cast<A*>(parts > 1 ? params.workspace : params.expectation);
    for (int64_t c = 0; c < at.channels; ++c) {
      const int64_t n = at.outer * view_.inner + at.first + c;
      to[n * parts + at.part] = sum_of(at, c);
      if (parts == 1) fill_empty<A>(params, n);
    }
  }

  // Gradients of the heatmap, beta and values; or of values alone.
  template <bool kHeatmap, bool kBeta, bool kValues, bool kHeld>
  void write(const Item& at) {
    static_assert(!kHeld || !kBeta, "how far a pixel lies below the peak is not known");
    const int64_t first_map = at.outer * view_.inner + at.first;
    for_lanes<A>(at.channels, abreast_, [&](int64_t g, int i, int64_t, int64_t c) {
      const int64_t n = first_map + c;
      lanes_[g].upstream[i] = kHeatmap ? upstream_of<A>(*steps_.heatmap, n) : upstream_of<A>(*steps_.values, n);
      if (kHeatmap) lanes_[g].mean[i] = lanes_[g].upstream[i] * static_cast<const A*>(steps_.heatmap->expectation)[n];
    });
    if (kBeta) clear_sums();
    const auto heatmap = read(softmax_.heatmap, view_, at);
    Pixels<const T*> values{};
    Pixels<T*> to{}, to_values{};
    if constexpr (kHeatmap) {
      values = read(steps_.heatmap->values.data, steps_.heatmap->values.view, at);
      to = pixels(static_cast<T*>(steps_.heatmap->grad_heatmap), steps_.heatmap->grad_view, at);
    }
    if constexpr (kValues) to_values = pixels(static_cast<T*>(steps_.values->grad_values), steps_.values->value_view, at);
    const bool dense = is_run(at, heatmap) && (!kHeatmap || (is_run(at, values) && is_run(at, to))) &&
                       (!kValues || is_run(at, to_values));
    const T *h = nullptr, *v = nullptr;
    T *out = nullptr, *out_values = nullptr;
    for_runs(
        at, dense,
        [&](int64_t r, int64_t c) {
          h = heatmap.at(r, c);
          if (kHeatmap) v = values.at(r, c), out = to.at(r, c);
          if (kValues) out_values = to_values.at(r, c);
        },
        [&](auto size, int64_t c, int64_t g, int64_t k, auto counted) __attribute__((always_inline)) {
          constexpr int N = decltype(size)::value;
          Lane& lane = lanes_[g];
          Vec<A> below[N], p[N];
          for (int j = 0; j < N; ++j) {
            p[j] = counted.load(h + (c + j) * heatmap.stride_x + k);
            if (!kHeld) p[j] = below[j] = distance(p[j], lane.of);
          }
          if (!kHeld) to_p(lane, p);
          for (int j = 0; kValues && j < N; ++j) {
            T* const pixel = out_values + (c + j) * to_values.stride_x + k;
            prefetch_for_write(pixel, kWriteAhead);
            store(pixel, counted.keep(j, lane.upstream * p[j]));
          }
          if constexpr (kHeatmap) {
            Vec<A> of_beta = lane.row;
            for (int j = 0; j < N; ++j) {
              T* const pixel = out + (c + j) * to.stride_x + k;
              prefetch_for_write(pixel, kWriteAhead);
              const Vec<A> q = (lane.upstream * counted.load(v + (c + j) * values.stride_x + k) - lane.mean) * p[j];
              if (kBeta) of_beta += KPFUSED_PRODUCT(counted.keep(j, below[j] * q));
              store(pixel, counted.keep(j, lane.beta * q));
            }
            if (kBeta) lane.row = of_beta;
          }
        },
        [&](int64_t groups, int64_t vectors) {
          if (kBeta) add_row(vectors);
          if (kHeatmap) this->replace_empty(out, to.stride_x, groups, A(0));
          if (kValues) this->replace_empty(out_values, to_values.stride_x, groups, in_empty<A>(*steps_.values));
        });
    if (softmax_.pixels.sizes) {
      if (kHeatmap) this->clear_beyond(at, to, A(0));
      if (kValues) this->clear_beyond(at, to_values, in_empty<A>(*steps_.values));
    }
    if (kBeta) this->write_beta(at);
  }
};

}  // namespace kpfused::cpu::KPFUSED_ISA
