// SPDX-License-Identifier: MIT
// Expectations where a map is one run of pixels, of which a mask may leave out some, and its values are runs too: the usual
// case, and the softmax of contiguous maps. What expectation.h does tile by tile in any layout is done here map by map, in
// place, with the same operations in the same order, so that results have the same bits.
//
//   forward    peak of the map; weights into a buffer, and their sum; P V, or P itself
//   backward   P into the buffer; P V where it is not known; P (g V - mean) and P g
#pragma once

#include "expectation.h"

namespace kpfused::cpu::KPFUSED_ISA {

template <class T, bool kMasked>
class WholeMaps {
 public:
  using A = Acc<T>;
  using PixelRun = std::conditional_t<kMasked, MaskedRun<T>, Run<T>>;
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
    return run(softmax.view) && pixels <= kKept<A> && !softmax.pixels.sizes && !softmax.is_probability &&
           (!steps.expectation || runs(steps.expectation->values)) &&
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
      if constexpr (kMasked) take_mask(n);
      // What fills the last vector weighs nothing.
      heatmap_ = run_of(static_cast<const T*>(softmax_.heatmap) + walk.offset(), A(-INFINITY) * sharpness(beta_).sign,
                        last_heatmap_);
      if (steps_.expectation) {
        take_values(steps_.expectation->values, walk);
      } else if (steps_.heatmap) {
        take_values(steps_.heatmap->values, walk);
      }
      A factor = A(1);  // from what p holds to P
      if (steps_.stats) {
        const A sum = find_stats(n);
        empty_ = is_empty(softmax_.pixels, sum), factor = A(1) / sum;
        if (!empty_ && (steps_.expectation || steps_.heatmap)) scale(factor), factor = A(1);
      } else {
        const Stats<A> stats = stats_of<A>(softmax_, n);
        empty_ = is_empty(softmax_.pixels, stats.sum);
        if (!empty_) weigh(stats.peak, A(1) / stats.sum, kReadAhead);
      }
      if (empty_) {
        write_empty(n, walk);
        continue;
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

  // A run of the map's pixels, with `fill` behind them up to a whole vector, and in place of what does not count. The last
  // vector is put together in a buffer.
  KPFUSED_INLINE PixelRun run_of(const T* p, A fill, T* buffer) const {
    const Rest rest = this->rest();
    if (rest.pixels > 0) store(buffer, load_first(p + rest.begin, rest.pixels, splat(fill)));
    const Run<T> run = {p, buffer, rest.pixels > 0 ? rest.begin : -1};
    if constexpr (kMasked) {
      return {run, mask_, fill};
    } else {
      return run;
    }
  }

  // Of map n, as a run of bytes: put together where it is none, unless the map before has the same.
  void take_mask(int64_t n) {
    const MaskView& view = softmax_.pixels.mask_view;
    const uint8_t* p = softmax_.pixels.mask + view.offset(n);
    if (view.stride_x != 1 || view.stride_y != softmax_.view.width) {
      if (!bytes_) bytes_.reset(new uint8_t[size_t(pixels_)]);
      if (p != gathered_) gather_rows(gathered_ = p, view, bytes_.get());
      p = bytes_.get();
    }
    const Rest rest = this->rest();
    for (int64_t i = 0; i < rest.pixels; ++i) last_mask_[i] = p[rest.begin + i];
    mask_ = {p, last_mask_, rest.pixels > 0 ? rest.begin : -1};
  }
  void gather_rows(const uint8_t* p, const MaskView& view, uint8_t* to) const {
    const int64_t width = softmax_.view.width;
    for (int64_t r = 0; r < softmax_.view.height; ++r, p += view.stride_y, to += width) {
      for (int64_t c = 0; c < width; ++c) to[c] = p[c * view.stride_x];
    }
  }

  // Zero in place of what does not count.
  KPFUSED_INLINE Vec<A> keep_counted(int64_t i, Vec<A> v) const {
    if constexpr (kMasked) return (Vec<A>)choose<A>(mask_.at(i), (BitsVector<A>)v, BitsVector<A>{});
    return v;
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
      if constexpr (kMasked) prefetch_run(mask_.p + first, whole, kReadAhead);
      sum += weights(heatmap_.from(first), whole, of_, factor, ahead, p_.get() + first);
    });
    return sum;
  }

  // What values will be read of soon.
  KPFUSED_INLINE void fetch_values(int64_t first, int64_t count) const {
    for (int64_t c = 0; c < channels_; ++c) prefetch_run(place(values_[c], first), count, kReadAhead);
  }

  A peak_of_map() const {
    const A sign = sharpness(beta_).sign;
    if constexpr (kMasked) {
      Vec<A> peak[kBlock];
      for (int j = 0; j < kBlock; ++j) peak[j] = splat(Limits<A>::lowest);
      const auto block = [&](auto size, int64_t i) __attribute__((always_inline)) {
        for (int j = 0; j < size.value; ++j) peak[j] = maximum(load_at(heatmap_, i + j * L) * sign, peak[j]);
      };
      int64_t i = 0;
      for (; i + kBlock * L <= pixels_; i += kBlock * L) block(Count<kBlock>{}, i);
      for (; i < pixels_; i += L) block(Count<1>{}, i);
      for (int j = 1; j < kBlock; ++j) peak[0] = maximum(peak[j], peak[0]);
      return reduce_max<A>(peak[0]);
    } else {
      const int64_t count = at_least(pixels_, L);
      const T* const run = pixels_ < L ? heatmap_.last : heatmap_.p;
      return peak_of<T>({run, count, 1, count, A(0), A(0), nullptr, 0}, sign);
    }
  }

  // Leaves the weights, and returns their sum.
  A find_stats(int64_t n) {
    const A peak = peak_of_map();
    const A sum = weigh(peak, A(1), pixels_ * int64_t(sizeof(T)));  // this map has been read
    static_cast<Stats<A>*>(steps_.stats->stats)[n] = {peak, sum, A(0), A(0)};
    return sum;
  }

  void scale(A factor) {
    for (int64_t i = 0; i < pixels_; i += L) store_vector(p_.get() + i, load_vector(p_.get() + i) * factor);
  }

  // Channels of the map at hand.
  void take_values(const Values& of, const MapWalk& walk) {
    const ValueView& view = of.view;
    const T* p = static_cast<const T*>(of.data) + walk.offset(view);
    for (int64_t c = 0; c < view.channels; ++c, p += view.stride_channel) values_[c] = run_of(p, A(0), last_values_[c]);
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
        PixelRun tile[kSome];
        for (int i = 0; i < some; ++i) {
          tile[i] = values_[c + i].from(first);
          // Beyond the end of a plane is the next one, of this map or the next, whose beginning weigh() is too late for.
          prefetch_run(place(tile[i], 0), whole, kReadAhead);
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
      PixelRun values[kTileChannels];
      for (int64_t c = 0; c < channels_; ++c) values[c] = values_[c].from(first);
      const A* const p = p_.get() + first;
      const PixelRun h = heatmap_.from(first);
      Vec<A> sum = {};
      const auto finish = [&](auto wants_beta, int64_t i, Vec<A> q) __attribute__((always_inline)) {
        q *= load_vector(p + i);
        if (wants_beta) sum += distance(load_at(h, i), of) * keep_counted(first + i, q);
        rest.put(keep_counted(first + i, q * beta), grad, first + i);
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
          rest.put(keep_counted(first + i, g * (load_vector(p + i) * times)), to, first + i);
        }
      });
    }
  }

  // What an empty map gives, and its gradients.
  void write_empty(int64_t n, const MapWalk& walk) const {
    const A value = A(softmax_.pixels.empty_value);
    const auto fill = [&](T* to, A with) {
      const Rest rest = this->rest();
      for (int64_t i = 0; i < pixels_; i += L) rest.put(splat(with), to, i);
    };
    if (steps_.expectation) fill_empty<A>(*steps_.expectation, n);
    if (const ExpectationHeatmapParams* const of = steps_.heatmap) {
      fill(static_cast<T*>(of->grad_heatmap) + walk.offset(of->grad_view), A(0));
      if (of->grad_beta) static_cast<A*>(of->grad_beta)[n] = A(0);
    }
    if (const ExpectationValuesParams* const of = steps_.values) {
      T* const to = static_cast<T*>(of->grad_values) + walk.offset(of->value_view);
      for (int64_t c = 0; c < of->value_view.channels; ++c) fill(to + c * of->value_view.stride_channel, of->grad ? A(0) : value);
    }
  }

  const ExpectationSteps& steps_;
  const SoftmaxParams& softmax_;
  const int64_t pixels_;    // of a map
  std::unique_ptr<A[]> p_;  // of the map at hand
  A beta_;
  int64_t channels_ = 0;
  Falloff<A> of_;
  bool empty_;
  PixelRun heatmap_, values_[kTileChannels];
  alignas(64) T last_heatmap_[L], last_values_[kTileChannels][L];
  Run<uint8_t> mask_;
  uint8_t last_mask_[L] = {};
  std::unique_ptr<uint8_t[]> bytes_;  // of a mask that is no run
  const uint8_t* gathered_ = nullptr;
};

}  // namespace kpfused::cpu::KPFUSED_ISA
