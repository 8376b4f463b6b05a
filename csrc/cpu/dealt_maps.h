// SPDX-License-Identifier: MIT
// Expectations of values of a few channels where lanes are maps: values of an image, (B, K C, H, W) in channels_last, with the
// channels of one map after those of the other in each pixel. P of some groups of pixels is left in a buffer, from which it is
// dealt to the lanes of the values. There, minus zero is P of what does not count: beside it nothing else counts either.
#pragma once

#include "deal.h"
#include "lane_runs.h"

namespace kpfused::cpu::KPFUSED_ISA {

template <class T>
class DealtMaps : public LaneRuns<T> {
  using Base = LaneRuns<T>;

 public:
  using typename Base::A;
  using Base::L;

  // Valid sizes, beyond which values are not to be read, are left to tiles; and maps that hold P, which come with one channel.
  static bool fit(const ExpectationSteps& steps) {
    const int64_t channels = channels_of(steps);
    bool left = false;
    Base::for_views(steps, [&](const SoftmaxParams& softmax, const auto&) {
      left = left || softmax.pixels.sizes || softmax.holds == Holds::softmax;
    });
    return channels > 1 && channels <= kDealt && !left && Base::are_lanes(steps);
  }

  DealtMaps(const ExpectationSteps& steps, const SoftmaxParams& softmax)
      : Base(steps, softmax, groups_of(steps, softmax)), channels_(channels_of(steps)), deal_(channels_) {
    const int64_t lanes = most_lanes(steps, softmax), maps = this->run_ * lanes + L;
    p_ = make_zero_lines<A>(maps);
    sums_ = make_lines<A>(2 * whole_vectors<A>(lanes * channels_));
    if (steps.heatmap && steps.heatmap->grad_beta) below_ = make_zero_lines<A>(maps);
    if (steps.heatmap) products_ = make_zero_lines<A>(maps * channels_);
  }

  void run(int64_t begin, int64_t end) {
    this->for_items(begin, end, [&](const Item& at) {
      deal_.set_lanes(at.channels * abreast_);
      if (steps_.expectation) softmax_.pixels.fills_empty ? expect<true>(at) : expect<false>(at);
      this->with_gradients([&](auto heatmap, auto beta, auto values) { write<heatmap, beta, values>(at); });
    });
  }

 private:
  using typename Base::Item;
  using typename Base::Lane;
  template <class P>
  using Pixels = typename Base::template Pixels<P>;
  using Base::kGroupsAtOnce;
  using Base::for_groups;
  using Base::abreast_, Base::empty_, Base::empty_maps_, Base::lanes_, Base::parts_, Base::softmax_, Base::steps_, Base::view_;

  static int64_t channels_of(const ExpectationSteps& steps) {
    int64_t channels = 1;
    Base::for_views(steps, [&](const SoftmaxParams&, const auto& view) {
      channels = at_least(channels, Base::channels_of(view));
    });
    return channels;
  }
  static int64_t most_lanes(const ExpectationSteps& steps, const SoftmaxParams& softmax) {
    const ChannelBlocks blocks = channel_blocks(softmax.view.inner);  // the last is the largest
    return (blocks.channels - blocks.begin(blocks.count - 1)) * Base::abreast_of(steps, softmax.view);
  }
  // P of as many as stays in the nearest cache.
  static int64_t groups_of(const ExpectationSteps& steps, const SoftmaxParams& softmax) {
    constexpr int64_t kElements = 2048;
    return at_least(kElements / most_lanes(steps, softmax) / kGroupsAtOnce, 1) * kGroupsAtOnce;
  }

  static KPFUSED_INLINE Vec<A> uncounted() { return splat(A(-0.0)); }
  static KPFUSED_INLINE Mask<A> is_counted(Vec<A> p) { return (Mask<A>)p != (Mask<A>)uncounted(); }
  // Zero where P is that of what does not count.
  static KPFUSED_INLINE Vec<A> keep_counted(Vec<A> p, Vec<A> v) { return keep<A>(v, is_counted(p)); }

  // Calls begin(row, column) and end(groups) for runs of groups, P of which p_ has in between.
  template <bool kBelow, class Begin, class End>
  KPFUSED_INLINE void for_runs_of_p(const Item& at, bool dense, const Begin& begin, const End& end) {
    const auto heatmap = Base::read(softmax_.heatmap, view_, at);
    const int64_t lanes = deal_.lanes();
    const T* h = nullptr;
    Base::for_runs(
        at, dense && Base::is_run(at, heatmap),
        [&](int64_t r, int64_t c) { h = heatmap.at(r, c), begin(r, c); },
        [&](auto size, int64_t c, int64_t g, int64_t k, auto counted) __attribute__((always_inline)) {
          constexpr int N = decltype(size)::value;
          Vec<A> p[N];
          for (int j = 0; j < N; ++j) {
            const T* const pixels = h + (c + j) * heatmap.stride_x + k;
            prefetch(pixels, kReadAhead);
            p[j] = distance(counted.load(pixels), lanes_[g].of);
            if (kBelow) store_vector(below_.get() + (c + j) * lanes + k, p[j]);
          }
          Base::to_p(lanes_[g], p);
          for (int j = 0; j < N; ++j) store_vector(p_.get() + (c + j) * lanes + k, counted.choose(j, p[j], uncounted()));
        },
        [&](int64_t groups, int64_t) {
          for (int64_t pixel = 0; empty_maps_ > 0 && pixel < groups * abreast_; ++pixel) {
            for (int e = 0; e < empty_maps_; ++e) p_[size_t(pixel * at.channels + empty_[e])] = A(-0.0);
          }
          end(groups);
        });
  }

  template <bool kSome>  // not all count
  void expect(const Item& at) {
    const ExpectationParams& params = *steps_.expectation;
    const auto values = Base::read(params.values.data, params.values.view, at);
    const int64_t lanes = deal_.lanes(), vectors = deal_.vectors(), maps = at.channels, parts = parts_.count();
    A *const sums = sums_.get(), *const of_run = sums + vectors * L;  // vector by vector
    for (int64_t i = 0; i < 2 * vectors * L; ++i) sums[i] = A(0);
    const T* v = nullptr;
    for_runs_of_p<false>(
        at, Base::is_run(at, values), [&](int64_t r, int64_t c) { v = values.at(r, c); },
        [&](int64_t groups) {
          for_groups(groups, [&](auto size, int64_t c) __attribute__((always_inline)) {
            constexpr int N = decltype(size)::value;
            const A* const p = p_.get() + c * lanes;
            const T* const of_groups = v + c * values.stride_x;
            for (int64_t g = 0; g < vectors; ++g) {
              const auto of = deal_.vector(g);
              Vec<A> sum = load_vector(of_run + g * L);
              for (int j = 0; j < N; ++j) {
                const T* const pixels = of_groups + j * values.stride_x + of.lane;
                prefetch(pixels, kReadAhead);
                const Vec<A> of_maps = deal_.of_maps(p + j * lanes, of);
                const Vec<A> then = sum + of_maps * load(pixels);
                if constexpr (kSome) {
                  sum = is_counted(of_maps) ? then : sum;
                } else {
                  sum = then;
                }
              }
              store_vector(of_run + g * L, sum);
            }
          });
          for (int64_t i = 0; i < vectors * L; ++i) sums[i] += of_run[i], of_run[i] = A(0);
        });
    A* const to = static_cast<A*>(parts > 1 ? params.workspace : params.expectation);
    for (int64_t i = 0; i < maps * channels_; ++i) {
      const int64_t map = i / channels_, n = at.outer * view_.inner + at.first + map;
      A sum = A(0);
      for (int64_t lane = i; lane < deal_.dealt(); lane += maps * channels_) {
        sum += sums[lane / L * L + lane - deal_.vector(lane / L).lane];
      }
      to[(n * parts + at.part) * channels_ + i - map * channels_] = sum;
    }
    for (int64_t map = 0; parts == 1 && map < maps; ++map) fill_empty<A>(params, at.outer * view_.inner + at.first + map);
  }

  // Gradients of the heatmap, beta and values; or of values alone. All have the same upstream gradient, and of empty maps zeros.
  template <bool kHeatmap, bool kBeta, bool kValues>
  void write(const Item& at) {
    const int64_t first_map = at.outer * view_.inner + at.first, dealt = deal_.dealt(), lanes = deal_.lanes();
    A* const upstream = sums_.get();
    for (int64_t lane = 0; lane < dealt; ++lane) {
      const int64_t i = first_map * channels_ + lane % (at.channels * channels_);
      upstream[lane] = kHeatmap ? upstream_of<A>(*steps_.heatmap, i) : upstream_of<A>(*steps_.values, i);
    }
    Pixels<const T*> values{};
    Pixels<T*> to{}, to_values{};
    if constexpr (kHeatmap) {
      const ExpectationHeatmapKernel<T> kernel{*steps_.heatmap};
      for_lanes<A>(at.channels, abreast_, [&](int64_t g, int i, int64_t, int64_t c) {
        lanes_[g].mean[i] = kernel.mean_of(first_map + c);
      });
      values = Base::read(steps_.heatmap->values.data, steps_.heatmap->values.view, at);
      to = Base::pixels(static_cast<T*>(steps_.heatmap->grad_heatmap), steps_.heatmap->grad_view, at);
    }
    if (kBeta) Base::clear_sums();
    if constexpr (kValues) to_values = Base::pixels(static_cast<T*>(steps_.values->grad_values), steps_.values->value_view, at);
    const bool dense = (!kHeatmap || (Base::is_run(at, values) && Base::is_run(at, to))) &&
                       (!kValues || Base::is_run(at, to_values));
    const T* v = nullptr;
    T *out = nullptr, *out_values = nullptr;
    for_runs_of_p<kBeta>(
        at, dense,
        [&](int64_t r, int64_t c) {
          if (kHeatmap) v = values.at(r, c), out = to.at(r, c);
          if (kValues) out_values = to_values.at(r, c);
        },
        [&](int64_t groups) {
          for_groups(groups, [&](auto size, int64_t c) __attribute__((always_inline)) {
            constexpr int N = decltype(size)::value;
            for (int64_t g = 0; g < deal_.vectors(); ++g) {
              const auto of = deal_.vector(g);
              const Vec<A> factor = load_vector(upstream + of.lane);
              for (int64_t j = c; j < c + N; ++j) {
                if constexpr (kHeatmap) {
                  const T* const pixels = v + j * values.stride_x + of.lane;
                  prefetch(pixels, kReadAhead);
                  store_vector(products_.get() + j * dealt + of.lane, factor * load(pixels));
                }
                if constexpr (kValues) {
                  T* const pixels = out_values + j * to_values.stride_x + of.lane;
                  prefetch_for_write(pixels, kWriteAhead);
                  const Vec<A> of_maps = deal_.of_maps(p_.get() + j * lanes, of);
                  store(pixels, keep_counted(of_maps, factor * of_maps));
                }
              }
            }
          });
          if constexpr (kHeatmap) {
            switch (channels_) {
              case 2: return write_maps<kBeta, 2>(out, to.stride_x, groups);
              case 3: return write_maps<kBeta, 3>(out, to.stride_x, groups);
              case 4: return write_maps<kBeta, 4>(out, to.stride_x, groups);
              default: return write_maps<kBeta, 0>(out, to.stride_x, groups);
            }
          }
        });
    if (kBeta) this->write_beta(at);
  }

  // From the products of a run.
  template <bool kBeta, int kChannels>
  void write_maps(T* to, int64_t stride_x, int64_t groups) {
    const int64_t lanes = deal_.lanes(), dealt = deal_.dealt();
    for_groups(groups, [&](auto size, int64_t c) __attribute__((always_inline)) {
      constexpr int N = decltype(size)::value;
      for (int64_t g = 0; g < ceil_div(lanes, L); ++g) {
        const int64_t k = group_begin<A>(g, lanes);
        Lane& lane = lanes_[g];
        Vec<A> of_beta = lane.row;
        for (int64_t j = c; j < c + N; ++j) {
          const Vec<A> sum = deal_.template sum<kChannels>(products_.get() + j * dealt + k * channels_);
          const Vec<A> p = load_vector(p_.get() + j * lanes + k), q = (sum - lane.mean) * p;
          if (kBeta) of_beta += keep_counted(p, load_vector(below_.get() + j * lanes + k) * q);
          T* const pixels = to + j * stride_x + k;
          prefetch_for_write(pixels, kWriteAhead);
          store(pixels, keep_counted(p, lane.beta * q));
        }
        if (kBeta) lane.row = of_beta;
      }
    });
    if (kBeta) Base::add_row(ceil_div(lanes, L));
  }

  const int64_t channels_;
  Deal<A> deal_;
  // Of the run at hand: P, how far the keys lie below the peak, and values times their upstream gradients.
  Lines<A> p_, below_, products_;
  Lines<A> sums_;  // of all runs and of one; or the upstream gradients of the lanes
};

}  // namespace kpfused::cpu::KPFUSED_ISA
