// SPDX-License-Identifier: MIT
// Expectations where a map is one run of pixels, and its values are runs too: the usual case, and the softmax of contiguous
// maps. What expectation.h does tile by tile in any layout is done here map by map, in place, with the same operations in the
// same order, so that results have the same bits. A mask may leave out some pixels; and of a valid size narrower than the map,
// copies are read, in which nothing lies beyond it.
//
//   forward    peak of the map; weights into a buffer, and their sum; P V, or P itself
//   backward   P into the buffer; P V where it is not known; P (g V - mean) and P g
#pragma once

#include "expectation.h"
#include "softmax_gradient.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Channels of values that are copied.
constexpr int64_t kCopiedChannels = 3;

// Whether all steps read and write runs. They walk the same maps.
template <class T>
bool are_whole_maps(const ExpectationSteps& steps, const SoftmaxParams& softmax) {
  const int64_t width = softmax.view.width, pixels = softmax.view.height * width;
  const auto run = [&](const auto& view) { return view.stride_x == 1 && view.stride_y == width; };
  const auto runs = [&](const Values& values) {
    const ValueView& view = values.view;
    // Channels side by side have sums of other bits, pixel after pixel (add_channels).
    return values.kind == ValueKind::tensor && run(view) &&
           view.channels <= (softmax.pixels.sizes ? kCopiedChannels : kTileChannels) &&
           (view.stride_channel != 1 || view.channels < kLanes<Acc<T>>) && !ValueTiles<T>::share_values(values, softmax);
  };
  return run(softmax.view) && pixels <= kKept<Acc<T>> &&
         (!steps.expectation || runs(steps.expectation->values)) &&
         (!steps.heatmap || (runs(steps.heatmap->values) && run(steps.heatmap->grad_view))) &&
         (!steps.values || run(steps.values->value_view));
}

template <class T, bool kMasked>
class WholeMaps {
 public:
  using A = Acc<T>;
  using Rest = LastVector<T>;
  using PixelRun = std::conditional_t<kMasked, MaskedRun<T>, Run<T>>;
  static constexpr int L = kLanes<A>;

  WholeMaps(const ExpectationSteps& steps, const SoftmaxParams& softmax)
      : steps_(steps),
        softmax_(softmax),
        all_(softmax.view.height * softmax.view.width),
        p_(make_lines<A>(whole_vectors<A>(all_))) {}

  void run(int64_t begin, int64_t end) {
    const bool of_softmax = is_softmax_gradient(steps_);
    MapWalk walk(softmax_.view, begin), next(softmax_.view, begin);
    for (int64_t n = begin; n < end; ++n, walk.advance()) {
      if (n + 1 < end) next.advance();
      if (of_softmax && write_softmax_gradient<T>(steps_, n, walk)) continue;
      beta_ = beta_of<A>(softmax_.beta, n);
      take_pixels(n);
      // What fills the last vector weighs nothing.
      const A nothing = is_held() ? A(0) : A(-INFINITY) * sharpness(beta_).sign;
      const T* const heatmap = static_cast<const T*>(softmax_.heatmap) + walk.offset();
      const T* const within = within_size(heatmap, next.offset() - walk.offset(), nothing, 0);
      heatmap_ = under_mask(run_of(within, nothing, last_heatmap_), nothing);
      if (steps_.expectation) {
        take_values(steps_.expectation->values, walk, next);
      } else if (steps_.heatmap) {
        take_values(steps_.heatmap->values, walk, next);
      }
      A factor = A(1);  // from what p holds to P
      bool empty;
      if (steps_.stats) {
        const A sum = find_stats(n);
        empty = is_empty(softmax_.pixels, sum), factor = inverse_ = A(1) / sum;
        if (!empty && (steps_.expectation || steps_.heatmap)) scale(factor), factor = A(1);
      } else {
        const Stats<A> stats = stats_of<A>(softmax_, n);
        empty = is_empty(softmax_.pixels, stats.sum);
        inverse_ = A(1) / stats.sum;
        if (!empty) is_held() ? copy_softmax() : void(weigh(heatmap_, stats.peak, inverse_, kReadAhead));
      }
      if (empty) {
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

  // A run of the map's pixels, with `fill` behind them up to a whole vector: the last one is put together in a buffer.
  KPFUSED_INLINE Run<T> run_of(const T* p, A fill, T* buffer) const {
    const Rest rest = Rest::of(pixels_);
    if (rest.pixels > 0) store(buffer, load_first(p + rest.begin, rest.pixels, splat(fill)));
    return {p, buffer, rest.pixels > 0 ? rest.begin : -1};
  }

  // With `fill` also in place of what does not count.
  KPFUSED_INLINE PixelRun under_mask(const Run<T>& run, A fill) const {
    if constexpr (kMasked) {
      return {run, mask_, fill};
    } else {
      return run;
    }
  }

  // Which pixels of map n count: of whole rows as many as the valid size has, and of them those of a mask as a run of bytes,
  // which is put together where it is none, unless the map before has the same.
  void take_pixels(int64_t n) {
    const int64_t width = softmax_.view.width;
    const Counting counting = counting_of(softmax_.pixels, softmax_.view, n);
    cols_ = counting.cols, pixels_ = cols_ > 0 ? counting.rows * width : 0;
    if constexpr (kMasked) {
      const uint8_t* p = counting.mask;
      if (!counting.is_run(counting.rows, width)) {
        if (!bytes_) bytes_.reset(new uint8_t[size_t(all_ + kMaskRoom)]);
        if (p != copied_) copy_mask(counting, softmax_.view.height, width, bytes_.get());
        copied_ = p, p = bytes_.get();
      }
      const Rest rest = Rest::of(pixels_);
      for (int64_t i = 0; i < rest.pixels; ++i) last_mask_[i] = p[rest.begin + i];
      mask_ = {p, last_mask_, rest.pixels > 0 ? rest.begin : -1};
    }
  }

  // A map or one channel of its values, in one of some buffers with `fill` beyond a valid size that is narrower. That of the
  // next map lies `to_next` further on, which is kept for fetch_next().
  const T* within_size(const T* p, int64_t to_next, A fill, int64_t buffer) {
    if (!is_narrow()) return p;
    constexpr int64_t kVector = kElements<T>;
    const int64_t width = softmax_.view.width, cols = cols_, room = all_ + kVector;
    if (!buffers_) buffers_ = make_lines<T>((1 + kCopiedChannels) * room);
    T* const to = buffers_.get() + buffer * room;
    next_[buffer] = p + to_next;
    T beyond[kVector];
    const T value = as_element<T>(fill);
    for (int64_t i = 0; i < kVector; ++i) beyond[i] = value;
    for (int64_t i = 0; i < pixels_; i += width) {
      copy_row(p + i, to + i, cols);
      // What the last of these writes behind a row, the next row writes again; behind the last row there is room.
      for (int64_t j = cols; j < width; j += kVector) __builtin_memcpy(to + i + j, beyond, sizeof(beyond));
    }
    return to;
  }

  bool is_held() const { return softmax_.holds == Holds::softmax; }
  bool is_narrow() const { return cols_ < softmax_.view.width; }

  // Of a result, zero beyond the valid size.
  void clear_beyond(T* to) const {
    const int64_t width = softmax_.view.width;
    for (int64_t i = cols_; is_narrow() && i < pixels_; i += width) clear_row(to + i, width - cols_);
    if (pixels_ < all_) clear_row(to + pixels_, all_ - pixels_);
  }

  // Zero in place of what does not count.
  KPFUSED_INLINE Vec<A> keep_counted(int64_t i, Vec<A> v) const {
    if constexpr (kMasked) return (Vec<A>)choose<A>(mask_.at(i), (BitsVector<A>)v, BitsVector<A>{});
    return v;
  }

  // What find_peak() leaves of a run under a mask.
  struct Filled {
    const A* filled;
    const T* p;

    KPFUSED_INLINE Filled from(int64_t first) const { return {filled + first, p + first}; }
    friend KPFUSED_INLINE Vec<A> load_at(const Filled& run, int64_t i) { return load_vector(run.filled + i); }
    friend KPFUSED_INLINE const T* place(const Filled& run, int64_t i) { return run.p + i; }
  };

  // The map after find_peak().
  auto seen() const {
    if constexpr (kMasked) {
      return Filled{p_.get(), heatmap_.run.p};
    } else {
      return heatmap_;
    }
  }

  // Weights of the map, times a factor, into p_; returns their sum.
  template <class R>
  A weigh(const R& heatmap, A peak, A factor, int64_t ahead) {
    of_ = falloff(sharpness(beta_), peak);
    A sum = A(0);
    for_tiles([&](int64_t first, int64_t whole) {
      fetch(first, whole);
      if constexpr (kMasked) prefetch_run(mask_.p + first, whole, at_most(ahead, pixels_));
      sum += weights(heatmap.from(first), whole, of_, factor, ahead, p_.get() + first);
    });
    return sum;
  }

  // P, of a map that holds it, into p_.
  void copy_softmax() {
    of_ = falloff(sharpness(beta_), A(0));
    for_tiles([&](int64_t first, int64_t whole) {
      fetch(first, whole);
      if constexpr (kMasked) prefetch_run(mask_.p + first, whole, at_most(kReadAhead, pixels_));
      copy_run(heatmap_.from(first), whole, kReadAhead, p_.get() + first);
    });
  }

  // What will be read of values soon; or of the next map, where it is copied as a whole before anything is done with it.
  KPFUSED_INLINE void fetch(int64_t first, int64_t count) const {
    if (is_narrow()) return fetch_next(first, count);
    for (int64_t c = 0; c < channels_; ++c) prefetch_run(place(values_[c], first), count, kReadAhead);
  }
  // Inlined with its lambda: GCC takes a call that only fetches for one without effect, and leaves it out.
  KPFUSED_INLINE void fetch_next(int64_t first, int64_t count) const {
    const int64_t width = softmax_.view.width;
    for_pieces(first, count, width, [&](int64_t, int64_t row, int64_t col, int64_t n) __attribute__((always_inline)) {
      const int64_t at = row * width + col, some = at_most(n, cols_ - col);
      for (int64_t c = 0; c <= channels_; ++c) prefetch_run(next_[c] + at, some, 0);
    });
  }

  // With a mask, also leaves the map in p_, with what does not count filled.
  A find_peak() {
    const A sign = sharpness(beta_).sign;
    if (pixels_ == 0) return empty_state<A>().peak;
    if constexpr (!kMasked) {
      const int64_t count = at_least(pixels_, L);
      const T* const run = pixels_ < L ? heatmap_.last : heatmap_.p;
      return peak_of<T>({run, count, 1, count, A(0), A(0), nullptr, 0}, sign);
    } else {
      Vec<A> peak[kBlock];
      for (int j = 0; j < kBlock; ++j) peak[j] = splat(Limits<A>::lowest);
      A* const p = p_.get();
      const PixelRun heatmap = heatmap_;
      const auto see = [&](int64_t i, int j) __attribute__((always_inline)) {
        const Vec<A> v = load_at(heatmap, i);
        store_vector(p + i, v);
        peak[j] = maximum(v * sign, peak[j]);
      };
      int64_t i = 0;
      for (; i + kBlock * L <= pixels_; i += kBlock * L) {
        for (int j = 0; j < kBlock; ++j) see(i + j * L, j);
      }
      for (; i < pixels_; i += L) see(i, 0);
      for (int j = 1; j < kBlock; ++j) peak[0] = maximum(peak[j], peak[0]);
      return reduce_max<A>(peak[0]);
    }
  }

  // Leaves the weights, and returns their sum.
  A find_stats(int64_t n) {
    const A peak = find_peak();
    const A sum = weigh(seen(), peak, A(1), pixels_ * int64_t(sizeof(T)));  // this map has been read
    static_cast<Stats<A>*>(steps_.stats->stats)[n] = {peak, sum, A(0), A(0)};
    return sum;
  }

  void scale(A factor) {
    for (int64_t i = 0; i < pixels_; i += L) store_vector(p_.get() + i, load_vector(p_.get() + i) * factor);
  }

  // Channels of the map at hand.
  void take_values(const Values& of, const MapWalk& walk, const MapWalk& next) {
    const ValueView& view = of.view;
    const T* p = static_cast<const T*>(of.data) + walk.offset(view);
    const int64_t to_next = next.offset(view) - walk.offset(view);
    for (int64_t c = 0; c < view.channels; ++c, p += view.stride_channel) {
      values_[c] = run_of(within_size(p, to_next, A(0), 1 + c), A(0), last_values_[c]);
    }
    channels_ = view.channels;
  }

  // A few channels in turn, through all of the map: memory is quickest in order.
  void expect(int64_t n) {
    A* const sums = static_cast<A*>(steps_.expectation->expectation) + n * channels_;
    add_expectations(sums, [](const Run<T>& run) { return run; });
    if constexpr (!kMasked) return;
    // What does not count weighs nothing, unless it is infinite or NaN.
    bool finite = true;
    for (int64_t c = 0; c < channels_; ++c) finite = finite && is_finite(sums[c]);
    if (!finite) add_expectations(sums, [&](const Run<T>& run) { return under_mask(run, A(0)); });
  }
  template <class Read>
  void add_expectations(A* sums, const Read& read) {
    constexpr int kSome = 3;
    for (int64_t c = 0; c < channels_; ++c) sums[c] = A(0);
    for (int64_t c = 0; c < channels_; c += kSome) {
      const int some = int(at_most(channels_ - c, kSome));
      for_tiles([&](int64_t first, int64_t whole) {
        decltype(read(values_[0])) tile[kSome];
        for (int i = 0; i < some; ++i) {
          tile[i] = read(values_[c + i]).from(first);
          // Beyond the end of a plane is the next one, of this map or the next, whose beginning weigh() is too late for; of
          // maps of one tile it has fetched all.
          if (pixels_ > kTile<A>) prefetch_run(place(tile[i], 0), whole, kReadAhead);
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
    const Rest rest = Rest::of(pixels_);
    A of_beta = A(0);
    for_tiles([&](int64_t first, int64_t whole) {
      Run<T> values[kTileChannels];
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
    clear_beyond(grad);
    if (params.grad_beta) static_cast<A*>(params.grad_beta)[n] = of_beta;
  }

  // P g, or P itself.
  void write_values(int64_t n, const MapWalk& walk, A factor) {
    const ExpectationValuesParams& params = *steps_.values;
    const ExpectationValuesKernel<T> kernel{params};
    const ValueView& view = params.value_view;
    const Rest rest = Rest::of(pixels_);
    T* to = static_cast<T*>(params.grad_values) + walk.offset(view);
    for (int64_t c = 0; c < view.channels; ++c, to += view.stride_channel) {
      const A upstream = kernel.upstream(n, c);
      const auto write = [&](const auto& kept) __attribute__((always_inline)) {
        const Vec<A> g = splat(upstream), times = splat(factor);
        for_tiles([&](int64_t first, int64_t whole) {
          const A* const p = p_.get() + first;
          for (int64_t i = 0; i < whole; i += L) rest.put(kept(first + i, g * (load_vector(p + i) * times)), to, first + i);
        });
      };
      // What does not count weighs nothing, and only what is infinite or NaN makes something else of that.
      const bool finite = !kMasked || (is_finite(upstream) && is_finite(inverse_));
      const auto counted = [&](int64_t i, Vec<A> v) __attribute__((always_inline)) { return keep_counted(i, v); };
      const auto all = [](int64_t, Vec<A> v) __attribute__((always_inline)) { return v; };
      finite ? write(all) : write(counted);
      clear_beyond(to);
    }
  }

  // What an empty map gives, and its gradients.
  void write_empty(int64_t n, const MapWalk& walk) const {
    const auto fill = [&](T* to, A with) {
      const Rest rest = Rest::of(all_);
      for (int64_t i = 0; i < all_; i += L) rest.put(splat(with), to, i);
    };
    if (steps_.expectation) fill_empty<A>(*steps_.expectation, n);
    if (const ExpectationHeatmapParams* const of = steps_.heatmap) {
      fill(static_cast<T*>(of->grad_heatmap) + walk.offset(of->grad_view), A(0));
      if (of->grad_beta) static_cast<A*>(of->grad_beta)[n] = A(0);
    }
    if (const ExpectationValuesParams* const of = steps_.values) {
      T* const to = static_cast<T*>(of->grad_values) + walk.offset(of->value_view);
      for (int64_t c = 0; c < of->value_view.channels; ++c) fill(to + c * of->value_view.stride_channel, in_empty<A>(*of));
    }
  }

  const ExpectationSteps& steps_;
  const SoftmaxParams& softmax_;
  const int64_t all_;       // pixels of a map
  int64_t cols_, pixels_;   // those of a row that count, and of all rows with such
  Lines<A> p_;              // of the map at hand
  A beta_;
  int64_t channels_ = 0;
  Falloff<A> of_;
  A inverse_;  // of the sum of weights
  PixelRun heatmap_;
  Run<T> values_[kTileChannels];
  alignas(64) T last_heatmap_[L], last_values_[kTileChannels][L];
  Run<uint8_t> mask_;
  uint8_t last_mask_[L] = {};
  std::unique_ptr<uint8_t[]> bytes_;  // of a mask that is no run
  const uint8_t* copied_ = nullptr;
  Lines<T> buffers_;  // of a narrower valid size: the heatmap, and channels of values
  const T* next_[1 + kCopiedChannels];  // what will be copied there of the next map
};

}  // namespace kpfused::cpu::KPFUSED_ISA
