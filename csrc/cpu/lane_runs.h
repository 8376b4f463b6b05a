// SPDX-License-Identifier: MIT
// Work items where lanes are channels, of expectations and the softmax map: what of the maps belongs to each lane, and the
// runs of pixels that kernels take in turn. Pixels may stand abreast (lanes.h).
#pragma once

#include <optional>

#include "expectation.h"
#include "forward_lanes.h"

namespace kpfused::cpu::KPFUSED_ISA {

// The steps of one thread's range of (outer, part, block of channels).
template <class T>
class LaneRuns {
 public:
  using Element = T;
  using A = Acc<T>;
  static constexpr int L = kLanes<A>;

  // Whether an item can take all steps in turn, stats included: it is then still in a near cache when it is read again.
  static bool in_turn(const ExpectationSteps& steps, const SoftmaxParams& softmax) {
    const auto alike = [&](const MapView& view) {
      return is_channels_last(view) && view.inner == softmax.view.inner && part_tiling(view).count() == 1;
    };
    bool together = !steps.stats || alike(steps.stats->view);
    for_views(steps, [&](const SoftmaxParams& of, const auto&) { together = together && alike(of.view); });
    return together;
  }

 protected:
  // Groups of pixels side by side.
  static constexpr int kGroupsAtOnce = KPFUSED_AVX512 ? 4 : 2;

  struct Item {
    int64_t outer, first, channels, part;
    PixelRange all, range;  // what is written, and what is read of it
  };

  // What belongs to a lane waits in the first-level cache.
  struct Lane {
    Falloff<Vec<A>> of;
    Vec<A> inverse, beta, upstream, mean;
    Vec<A> row, sum;
  };

  // Which lanes count: all, or as words say, or bytes of a mask that lies in the order of lanes.
  enum class By { all, words, bytes };

  // How a vector is read, of groups side by side, and which of its lanes count.
  template <By kBy, bool kSome = false>
  struct Counted {
    const std::conditional_t<kBy == By::bytes, uint8_t, LaneWord<A>>* marks;
    int64_t stride;
    int64_t lanes;  // that are read with kSome, from this vector's first on

    KPFUSED_INLINE Vec<A> load(const T* p) const {
      if (!kSome || lanes >= L) return kpfused::cpu::KPFUSED_ISA::load(p);
      return lanes > 0 ? load_first(p, lanes, Vec<A>{}) : Vec<A>{};
    }

    KPFUSED_INLINE Vec<A> keep(int group, Vec<A> v) const {
      if constexpr (kBy == By::words) return keep_lanes<A>(marks + group * stride, v);
      return choose(group, v, Vec<A>{});
    }
    KPFUSED_INLINE Vec<A> choose(int group, Vec<A> v, Vec<A> otherwise) const {
      if constexpr (kBy == By::words) return choose_lanes<A>(marks + group * stride, v, otherwise);
      if constexpr (kBy == By::bytes) {
        return (Vec<A>)cpu::KPFUSED_ISA::choose<A>(marks + group * stride, (BitsVector<A>)v, (BitsVector<A>)otherwise);
      }
      return v;
    }
  };

  template <By kBy>
  using Is = std::integral_constant<By, kBy>;

  // Where an item's pixels are of a tensor, or what marks them, with strides of groups abreast.
  template <class P>
  struct Pixels {
    P p;
    int64_t stride_y, stride_x;

    KPFUSED_INLINE P at(int64_t r, int64_t c) const { return p + r * stride_y + c * stride_x; }
  };

  static int64_t channels_of(const ValueView& view) { return view.channels; }
  static int64_t channels_of(const MapView&) { return 1; }
  // Whether what belongs to the maps of a pixel lies side by side, in their order.
  static bool follow(const ValueView& view) { return channels_follow(view); }
  static bool follow(const MapView& view) { return view.stride_inner == 1; }

  // Calls see(softmax, view) for all that steps read and write beside the maps; coordinates are not in memory.
  template <class F>
  static void for_views(const ExpectationSteps& steps, const F& see) {
    const auto see_values = [&](const auto* step) {
      if (step && step->values.kind != ValueKind::coordinates) see(step->softmax, step->values.view);
    };
    see_values(steps.expectation), see_values(steps.heatmap);
    if (steps.heatmap) see(steps.heatmap->softmax, steps.heatmap->grad_view);
    if (steps.values) see(steps.values->softmax, steps.values->value_view);
  }

  // Whether all that steps read and write lies in the order of lanes, and fills vectors of them. What several samples share is
  // read by each, but not written.
  static bool are_lanes(const ExpectationSteps& steps) {
    bool are = !steps.values || !ExpectationValuesKernel<T>{*steps.values}.shares();
    for_views(steps, [&](const SoftmaxParams& softmax, const auto& view) {
      are = are && is_channels_last(softmax.view) && follow(view) &&
            softmax.view.inner * abreast_of(steps, softmax.view) >= L;
    });
    return are;
  }

  static int64_t abreast_of(const ExpectationSteps& steps, const MapView& maps) {
    bool side_by_side = true;
    for_views(steps, [&](const SoftmaxParams&, const auto& view) {
      side_by_side = side_by_side && view.stride_x == maps.inner * channels_of(view);
    });
    return side_by_side ? pixels_abreast<A>(maps, part_tiling(maps), {}) : 1;
  }

  template <class View, class P>
  Pixels<P> pixels(P p, const View& view, const Item& at) const {
    return {p + at.outer * view.stride_outer + at.first * view.stride_inner + at.range.row * view.stride_y +
                at.range.col * view.stride_x,
            view.stride_y, view.stride_x * abreast_};
  }
  template <class P>
  bool is_run(const Item& at, const Pixels<P>& pixels) const {
    return pixels.stride_y == at.range.cols / abreast_ * pixels.stride_x;
  }
  template <class View>
  Pixels<const T*> read(const void* p, const View& view, const Item& at) const {
    return pixels(static_cast<const T*>(p), view, at);
  }

  // `run`: groups of pixels that are taken in turn, and whose sums are taken before they are added to others.
  LaneRuns(const ExpectationSteps& steps, const SoftmaxParams& softmax, int64_t run)
      : steps_(steps),
        softmax_(softmax),
        view_(softmax.view),
        parts_(part_tiling(view_)),
        blocks_(channel_blocks(view_.inner)),
        abreast_(abreast_of(steps, softmax.view)),
        run_(run),
        abreast_words_(softmax.pixels, view_.inner, abreast_) {
    if (steps.stats) stats_.emplace(*steps.stats);
  }

  // Calls item(at) for one after the other, with stats and maps loaded.
  template <class F>
  void for_items(int64_t begin, int64_t end, const F& item) {
    const int64_t parts = parts_.count();
    for (int64_t n = begin; n < end; ++n) {
      const int64_t block = n % blocks_.count, part = n / blocks_.count % parts;
      const int64_t outer = n / blocks_.count / parts;
      if (stats_) stats_->run(n, n + 1);
      const int64_t i = part / parts_.x.count, j = part % parts_.x.count;
      const int64_t first = blocks_.begin(block), channels = blocks_.begin(block + 1) - first;
      const PixelRange all = {parts_.y.begin(i), parts_.y.size(i), parts_.x.begin(j), parts_.x.size(j)};
      const PixelRange valid = valid_of(softmax_.pixels, view_, all, outer * view_.inner + first);
      const Item at = {outer, first, channels, part, all, valid};
      if (softmax_.holds != Holds::probabilities) load_maps(at);
      if (!softmax_.pixels.all()) {
        words_.emplace(softmax_.pixels, view_, abreast_words_, outer * view_.inner + first, channels, abreast_);
      }
      item(at);
    }
  }

  // A map that is empty has the fields of any other, of which nothing is kept.
  void load_maps(const Item& at) {
    empty_maps_ = 0;
    for (int64_t c = 0; c < at.channels && softmax_.pixels.fills_empty; ++c) {
      const int64_t n = at.outer * view_.inner + at.first + c;
      if (is_empty(softmax_.pixels, stats_of<A>(softmax_, n).sum)) empty_[empty_maps_++] = uint8_t(c);
    }
    for_lanes<A>(at.channels, abreast_, [&](int64_t g, int i, int64_t, int64_t c) {
      Lane& lane = lanes_[g];
      const int64_t n = at.outer * view_.inner + at.first + c;
      const A beta = beta_of<A>(softmax_.beta, n);
      const Stats<A> stats = stats_of<A>(softmax_, n);
      const Falloff<A> of = falloff(sharpness(beta), stats.peak);
      lane.of.sign[i] = of.sign, lane.of.peak[i] = of.peak, lane.of.scale[i] = of.scale, lane.of.lowest[i] = of.lowest;
      lane.inverse[i] = A(1) / stats.sum, lane.beta[i] = beta;
    });
  }

  // Calls body(number of groups, the first) for all of a run.
  template <class Body>
  static KPFUSED_INLINE void for_groups(int64_t groups, const Body& body) {
    int64_t c = 0;
    for (; c + kGroupsAtOnce <= groups; c += kGroupsAtOnce) body(Count<kGroupsAtOnce>{}, c);
    for (; c < groups; ++c) body(Count<1>{}, c);
  }

  // Calls begin(row, column) for runs of groups of pixels, then body(groups from there, N, vector, its first lane, Counted) for
  // every vector of N groups side by side, which read what belongs to its lanes once, and end(groups, vectors) after each run.
  template <class Begin, class Body, class End>
  KPFUSED_INLINE void for_runs(const Item& at, bool dense, const Begin& begin, const Body& body, const End& end) {
    const int64_t lanes = at.channels * abreast_, rows = at.range.rows, groups = at.range.cols / abreast_;
    if (!words_) {
      return for_runs<By::all>(Pixels<const LaneWord<A>*>{}, lanes, 0, dense ? 1 : rows, 0, dense ? rows * groups : groups,
                               begin, body, end);
    }
    if (at.range.cols > groups * abreast_) for_rest(at, groups, begin, body, end);
    if (groups == 0) return;
    const Tiling chunks = lane_chunks<T>(Counts::by_lanes, rows, groups, lanes, abreast_);
    // Groups of whole rows may be numbered through.
    const bool one_row = dense && chunks.x.count == 1;
    // Bytes are needed once each: to make words of them takes longer. Chunks are those of words all the same, and so are sums.
    const bool in_order = words_->is_mask();
    const Pixels<const uint8_t*> mask = {in_order ? words_->mask_of(at.range) : nullptr, softmax_.pixels.mask_view.stride_y,
                                         softmax_.pixels.mask_view.stride_x * abreast_};
    const bool by_bytes = in_order && (!one_row || rows == 1 || is_run(at, mask));
    for (int64_t i = 0; i < chunks.y.count; ++i) {
      for (int64_t j = 0; j < chunks.x.count; ++j) {
        const int64_t y = chunks.y.begin(i), x = chunks.x.begin(j), of_y = chunks.y.size(i), of_x = chunks.x.size(j);
        const auto run = [&](auto by, const auto& marks) __attribute__((always_inline)) {
          for_runs<by>(marks, lanes, y, one_row ? 1 : of_y, x, one_row ? of_y * of_x : of_x, begin, body, end);
        };
        if (by_bytes) {
          run(Is<By::bytes>{}, Pixels<const uint8_t*>{mask.at(y, x), mask.stride_y, mask.stride_x});
          continue;
        }
        const ChunkWords<A> chunk = words_->of({at.range.row + y, of_y, at.range.col + x * abreast_, of_x * abreast_}, 0);
        const Pixels<const LaneWord<A>*> words = {chunk.words, chunk.stride_y, chunk.stride_x};
        words.p ? run(Is<By::words>{}, words) : run(Is<By::all>{}, words);
      }
    }
  }

  // Fewer pixels of each row than stand abreast, up to a valid size: those beyond are not read.
  template <class Begin, class Body, class End>
  KPFUSED_INLINE void for_rest(const Item& at, int64_t groups, const Begin& begin, const Body& body, const End& end) {
    const int64_t lanes = at.channels * abreast_, vectors = ceil_div(lanes, L), col = groups * abreast_;
    const int64_t read = at.channels * (at.range.cols - col);
    for (int64_t r = 0; r < at.range.rows; ++r) {
      const ChunkWords<A> words = words_->of({at.range.row + r, 1, at.range.col + col, abreast_}, 0);
      begin(r, groups);
      for (int64_t g = 0; g < vectors; ++g) {
        const int64_t k = group_begin<A>(g, lanes);
        body(Count<1>{}, 0, g, k, Counted<By::words, true>{words.words + g, 0, read - k});
      }
      end(1, vectors);
    }
  }

  // Of the rows and groups of one chunk, or of all.
  template <By kBy, class Marks, class Begin, class Body, class End>
  KPFUSED_INLINE void for_runs(const Marks& marks, int64_t lanes, int64_t row, int64_t rows, int64_t first, int64_t groups,
                               const Begin& begin, const Body& body, const End& end) const {
    const int64_t vectors = ceil_div(lanes, L);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t run = 0; run < groups; run += run_) {
        begin(row + r, first + run);
        const int64_t count = at_most(groups - run, run_);
        for_groups(count, [&](auto size, int64_t c) __attribute__((always_inline)) {
          const auto of_groups = kBy == By::all ? marks.p : marks.at(r, run + c);
          for (int64_t g = 0; g < vectors; ++g) {
            const int64_t k = group_begin<A>(g, lanes);
            const auto of_vector = kBy == By::all ? marks.p : of_groups + (kBy == By::bytes ? k : g);
            body(size, c, g, k, Counted<kBy>{of_vector, marks.stride_x, L});
          }
        });
        end(count, vectors);
      }
    }
  }

  // Sums of lanes, of those abreast together: channel c's.
  template <class Of>
  A sum_of(const Item& at, int64_t c, const Of* lanes, Vec<A> Of::* field) const {
    A sum = A(0);
    for (int64_t lane = c; lane < at.channels * abreast_; lane += at.channels) {
      sum += (lanes[lane / L].*field)[lane - group_begin<A>(lane / L, at.channels * abreast_)];
    }
    return sum;
  }
  A sum_of(const Item& at, int64_t c) const { return sum_of(at, c, lanes_, &Lane::sum); }
  void clear_sums() {
    for (Lane& lane : lanes_) lane.row = lane.sum = Vec<A>{};
  }
  KPFUSED_INLINE void add_row(int64_t groups) {
    for (int64_t g = 0; g < groups; ++g) lanes_[g].sum += lanes_[g].row, lanes_[g].row = Vec<A>{};
  }

  // P from how far N vectors lie below the peak.
  template <int N>
  KPFUSED_INLINE static void to_p(const Lane& lane, Vec<A> (&v)[N]) {
    exp2<A, N>(v, lane.of.scale);
    for (int j = 0; j < N; ++j) v[j] *= lane.inverse;
  }

  // Puts a value in place of what has been written of empty maps.
  KPFUSED_INLINE void replace_empty(T* to, int64_t stride_x, int64_t groups, A value) const {
    if (empty_maps_ == 0) return;
    const T element = as_element<T>(value);
    for (int64_t i = 0; i < groups * abreast_; ++i) {
      for (int e = 0; e < empty_maps_; ++e) to[i * (stride_x / abreast_) + empty_[e]] = element;
    }
  }

  // Of a result, what lies beyond what has been read.
  void clear_beyond(const Item& at, const Pixels<T*>& to, A empty_value) const {
    const int64_t groups = at.all.cols / abreast_, read = ceil_div(at.range.cols, abreast_);
    const int64_t bytes = at.channels * abreast_ * int64_t(sizeof(T));
    for (int64_t r = 0; r < at.all.rows; ++r) {
      const int64_t done = r < at.range.rows ? read : 0;
      for (int64_t c = done; c < groups; ++c) __builtin_memset(to.at(r, c), 0, size_t(bytes));
      replace_empty(to.at(r, done), to.stride_x, groups - done, empty_value);
    }
  }

  // Calls write(of the heatmap, of beta, of values), constants, if steps ask for any of these gradients.
  template <class F>
  void with_gradients(const F& write) const {
    const std::true_type yes;
    const std::false_type no;
    const bool wants_beta = steps_.heatmap && steps_.heatmap->grad_beta;
    if (!steps_.heatmap) return steps_.values ? write(no, no, yes) : void();
    if (wants_beta) return steps_.values ? write(yes, yes, yes) : write(yes, yes, no);
    steps_.values ? write(yes, no, yes) : write(yes, no, no);
  }

  // The sums are those of the gradient of beta.
  void write_beta(const Item& at) const {
    const int64_t parts = parts_.count(), first_map = at.outer * view_.inner + at.first;
    A* const dbeta = static_cast<A*>(parts > 1 ? steps_.heatmap->workspace : steps_.heatmap->grad_beta);
    for (int64_t c = 0; c < at.channels; ++c) {
      const A sign = sharpness(beta_of<A>(softmax_.beta, first_map + c)).sign;
      dbeta[(first_map + c) * parts + at.part] = sign * sum_of(at, c);
    }
    for (int e = 0; e < empty_maps_; ++e) dbeta[(first_map + empty_[e]) * parts + at.part] = A(0);
  }

  const ExpectationSteps& steps_;
  const SoftmaxParams& softmax_;
  const MapView& view_;
  const Tiling parts_;
  const ChannelBlocks blocks_;
  const int64_t abreast_, run_;
  const AbreastWords<A> abreast_words_;
  std::optional<ForwardLanes<T, false>> stats_;
  std::optional<LaneWords<A>> words_;  // of the item at hand, where not all count
  int empty_maps_ = 0;
  uint8_t empty_[2 * kChannelBlock];  // their channels
  Lane lanes_[kGroups<A>];
};

}  // namespace kpfused::cpu::KPFUSED_ISA
