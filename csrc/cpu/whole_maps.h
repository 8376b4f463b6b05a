// SPDX-License-Identifier: MIT
// Expectations where a map is one run of pixels, all of which count, and its values are runs too: the usual case, and the
// softmax of contiguous maps. What expectation.h does tile by tile in any layout is done here map by map, in place, with the
// same operations in the same order, so that results have the same bits.
//
//   forward    peak of the map; weights into a buffer, and their sum; P V, or P itself
//   backward   P into the buffer; P V where it is not known; P (g V - mean) and P g
#pragma once

#include "expectation.h"

namespace kpfused::cpu::KPFUSED_ISA {

template <class T>
class WholeMaps {
 public:
  using A = Acc<T>;
  static constexpr int L = kLanes<A>;

  // Whether all steps read and write runs. They walk the same maps.
  static bool fit(const ExpectationSteps& steps, const SoftmaxParams& softmax) {
    const int64_t width = softmax.view.width, pixels = softmax.view.height * width;
    const auto run = [&](const auto& view) { return view.stride_x == 1 && view.stride_y == width; };
    const auto runs = [&](const Values& values) {
      const ValueView& view = values.view;
      // Channels side by side have sums of other bits, pixel after pixel (add_channels).
      return values.kind == ValueKind::tensor && run(view) && view.channels <= kTileChannels &&
             (view.stride_channel != 1 || view.channels < L) && !ValueTiles<T>::share_values(values, softmax);
    };
    return run(softmax.view) && pixels <= kKept<A> && softmax.pixels.all() && !softmax.pixels.fills_empty &&
           !softmax.is_probability && (!steps.expectation || runs(steps.expectation->values)) &&
           (!steps.heatmap || (runs(steps.heatmap->values) && run(steps.heatmap->grad_view))) &&
           (!steps.values || run(steps.values->value_view));
  }

  WholeMaps(const ExpectationSteps& steps, const SoftmaxParams& softmax)
      : steps_(steps),
        softmax_(softmax),
        pixels_(softmax.view.height * softmax.view.width),
        p_(new A[size_t(whole_vectors<A>(pixels_))]) {}

  void run(int64_t begin, int64_t end) {
    MapWalk walk(softmax_.view, begin);
    for (int64_t n = begin; n < end; ++n, walk.advance()) {
      beta_ = beta_of<A>(softmax_.beta, n);
      // What fills the last vector weighs nothing.
      heatmap_ = run_of(static_cast<const T*>(softmax_.heatmap) + walk.offset(), splat(A(-INFINITY) * sharpness(beta_).sign),
                       last_heatmap_);
      if (steps_.expectation) {
        take_values(steps_.expectation->values, walk);
      } else if (steps_.heatmap) {
        take_values(steps_.heatmap->values, walk);
      }
      A factor = A(1);  // from what p holds to P
      if (steps_.stats) {
        factor = find_stats(n);
        if (steps_.expectation || steps_.heatmap) scale(factor), factor = A(1);
      } else {
        const Stats<A> stats = stats_of<A>(softmax_, n);
        weigh(stats.peak, A(1) / stats.sum, kReadAhead);
      }
      if (steps_.expectation) expect(n);
      if (steps_.heatmap) write_heatmap_gradient(n, walk);
      if (steps_.values) write_values(n, walk, factor);
    }
  }

 private:
  // Calls tile(first pixel, pixels rounded up to whole vectors) for one tile after the other.
  template <class F>
  KPFUSED_INLINE void for_tiles(const F& tile) const {
    for (int64_t first = 0; first < pixels_; first += kTile<A>) {
      tile(first, whole_vectors<A>(at_most(pixels_ - first, kTile<A>)));
    }
  }

  // A run of the map's pixels, with `fill` behind them up to a whole vector. That one is put together in a buffer.
  KPFUSED_INLINE Run<T> run_of(const T* p, Vec<A> fill, T* buffer) const {
    const Rest rest = this->rest();
    if (rest.pixels > 0) store(buffer, load_first(p + rest.begin, rest.pixels, fill));
    return {p, buffer, rest.pixels > 0 ? rest.begin : -1};
  }

  // Where the last vector of a map begins, if it is not whole, and how many pixels it has. Taken out of the object ahead of
  // loops that write: compilers would read it anew after every vector.
  struct Rest {
    int64_t begin, pixels;

    // Vector i of a result.
    KPFUSED_INLINE void put(Vec<A> v, T* to, int64_t i) const {
      prefetch_for_write(to + i, kWriteAhead);
      i == begin ? store_first(to + i, pixels, v) : store(to + i, v);
    }
  };
  Rest rest() const { return {pixels_ / L * L, pixels_ % L}; }

  // Weights of the map, times a factor; returns their sum.
  A weigh(A peak, A factor, int64_t ahead) {
    of_ = falloff(sharpness(beta_), peak);
    A sum = A(0);
    for_tiles([&](int64_t first, int64_t whole) {
      fetch_values(first, whole);
      sum += weights(heatmap_.from(first), whole, of_, factor, ahead, p_.get() + first);
    });
    return sum;
  }

  // What values will be read of soon.
  KPFUSED_INLINE void fetch_values(int64_t first, int64_t count) const {
    for (int64_t c = 0; c < channels_; ++c) prefetch_run(values_[c].p + first, count, kReadAhead);
  }

  // Leaves the weights, and returns what makes P of them.
  A find_stats(int64_t n) {
    const int64_t count = at_least(pixels_, L);
    const T* const run = pixels_ < L ? heatmap_.last : heatmap_.p;
    const A peak = peak_of<T>({run, count, 1, count, A(0), A(0), nullptr, 0}, sharpness(beta_).sign);
    const A sum = weigh(peak, A(1), pixels_ * int64_t(sizeof(T)));  // this map has been read
    static_cast<Stats<A>*>(steps_.stats->stats)[n] = {peak, sum, A(0), A(0)};
    return A(1) / sum;
  }

  void scale(A factor) {
    for (int64_t i = 0; i < pixels_; i += L) store_vector(p_.get() + i, load_vector(p_.get() + i) * factor);
  }

  // Channels of the map at hand.
  void take_values(const Values& of, const MapWalk& walk) {
    const ValueView& view = of.view;
    const T* p = static_cast<const T*>(of.data) + walk.offset(view);
    for (int64_t c = 0; c < view.channels; ++c, p += view.stride_channel) values_[c] = run_of(p, Vec<A>{}, last_values_[c]);
    channels_ = view.channels;
  }

  // A few channels in turn, through all of the map: memory is quickest in order.
  void expect(int64_t n) {
    constexpr int kSome = 3;
    A* const sums = static_cast<A*>(steps_.expectation->expectation) + n * channels_;
    for (int64_t c = 0; c < channels_; ++c) sums[c] = A(0);
    for (int64_t c = 0; c < channels_; c += kSome) {
      const int some = int(at_most(channels_ - c, kSome));
      for_tiles([&](int64_t first, int64_t whole) {
        Run<T> tile[kSome];
        for (int i = 0; i < some; ++i) {
          tile[i] = values_[c + i].from(first);
          // Beyond the end of a plane is the next one, of this map or the next, whose beginning weigh() is too late for.
          prefetch_run(tile[i].p, whole, kReadAhead);
        }
        const A* const p = p_.get() + first;
        add_all_products(&p, 1, tile, some, whole, sums + c, channels_);
      });
    }
  }

  void write_heatmap_gradient(int64_t n, const MapWalk& walk) {
    const ExpectationHeatmapParams& params = *steps_.heatmap;
    const ExpectationHeatmapKernel<T> kernel{params};
    T* const grad = static_cast<T*>(params.grad_heatmap) + walk.offset(params.grad_view);
    const auto factor = [&](int c) { return kernel.upstream(n, c); };
    const Vec<A> minus_mean = splat(-kernel.mean_of(n)), beta = splat(beta_);
    const auto start = [&](int64_t) { return minus_mean; };
    const Falloff<Vec<A>> of = in_lanes(of_);
    const Rest rest = this->rest();
    A of_beta = A(0);
    for_tiles([&](int64_t first, int64_t whole) {
      Run<T> values[kTileChannels];
      for (int64_t c = 0; c < channels_; ++c) values[c] = values_[c].from(first);
      const A* const p = p_.get() + first;
      const Run<T> h = heatmap_.from(first);
      Vec<A> sum = {};
      const auto finish = [&](auto wants_beta, int64_t i, Vec<A> q) __attribute__((always_inline)) {
        q *= load_vector(p + i);
        if (wants_beta) sum += distance(load(at(h, i)), of) * q;
        rest.put(q * beta, grad, first + i);
      };
      const auto sums = [&](auto wants_beta) __attribute__((always_inline)) {
        weighted_sums<A>(values, int(channels_), factor, whole, start, [&](int64_t i, Vec<A> q)
                             __attribute__((always_inline)) { finish(wants_beta, i, q); });
      };
      params.grad_beta ? sums(std::true_type{}) : sums(std::false_type{});
      of_beta += of_.sign * reduce_sum<A>(sum);
    });
    if (params.grad_beta) static_cast<A*>(params.grad_beta)[n] = of_beta;
  }

  // P g, or P itself.
  void write_values(int64_t n, const MapWalk& walk, A factor) {
    const ExpectationValuesParams& params = *steps_.values;
    const ExpectationValuesKernel<T> kernel{params};
    const ValueView& view = params.value_view;
    const Rest rest = this->rest();
    T* to = static_cast<T*>(params.grad_values) + walk.offset(view);
    for (int64_t c = 0; c < view.channels; ++c, to += view.stride_channel) {
      const Vec<A> g = splat(kernel.upstream(n, c)), times = splat(factor);
      for_tiles([&](int64_t first, int64_t whole) {
        const A* const p = p_.get() + first;
        for (int64_t i = 0; i < whole; i += L) {
          rest.put(g * (load_vector(p + i) * times), to, first + i);
        }
      });
    }
  }

  const ExpectationSteps& steps_;
  const SoftmaxParams& softmax_;
  const int64_t pixels_;    // of a map
  std::unique_ptr<A[]> p_;  // of the map at hand
  A beta_;
  int64_t channels_ = 0;
  Falloff<A> of_;
  Run<T> heatmap_, values_[kTileChannels];
  alignas(64) T last_heatmap_[L], last_values_[kTileChannels][L];
};

}  // namespace kpfused::cpu::KPFUSED_ISA
