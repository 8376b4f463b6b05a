// SPDX-License-Identifier: MIT
// Forward where lanes are channels (stride_inner == 1, channels_last): sums_lanes.h and moments_lanes.h have what is done
// to a chunk.
#pragma once

#include <type_traits>

#include "moments_lanes.h"
#include "sums_lanes.h"

namespace kpfused::cpu::KPFUSED_ISA {

// The forward of one thread's range of (outer, part, block of channels).
template <class T, bool kMoments>
class ForwardLanes {
 public:
  using A = Acc<T>;
  using S = std::conditional_t<kMoments, Moments<A>, State<A>>;
  using Lanes = std::conditional_t<kMoments, MomentLanes<A>, LaneStates<A, State<Vec<A>>>>;

  explicit ForwardLanes(const ForwardParams& params)
      : params_(params),
        view_(params.view),
        parts_(part_tiling(view_)),
        blocks_(channel_blocks(view_.inner)),
        abreast_(pixels_abreast<A>(view_, parts_, params.pixels)),
        abreast_words_(params.pixels, view_.inner, abreast_) {}

  void run(int64_t begin, int64_t end) const {
    const int64_t parts = parts_.count();
    Lanes lanes;
    int64_t loaded = 0;  // channels for which lanes have their beta, as long as there is one
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item % blocks_.count, part = item / blocks_.count % parts;
      const int64_t outer = item / blocks_.count / parts;
      const int64_t first = blocks_.begin(block), channels = blocks_.begin(block + 1) - first;
      if (params_.beta.values || channels != loaded) load_beta(outer * view_.inner + first, channels, lanes);
      loaded = channels;
      const int64_t then = at_most(item + 1, end - 1);
      const Origin base = origin(outer, part, first);
      const Origin next =
          origin(then / blocks_.count / parts, then / blocks_.count % parts, blocks_.begin(then % blocks_.count));
      const int64_t first_map = outer * view_.inner + first;
      if (channels * abreast_ < kLanes<A>) {
        run_buffered(base.heatmap, part, first_map, channels, lanes);
      } else {
        switch (lane_counts(params_.pixels, view_, abreast_)) {
          case Counts::all: run_part<Counts::all>(base, next, part, first_map, channels, lanes); break;
          case Counts::listed: run_part<Counts::listed>(base, next, part, first_map, channels, lanes); break;
          case Counts::by_lanes: run_part<Counts::by_lanes>(base, next, part, first_map, channels, lanes); break;
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t map = outer * view_.inner + first + c;
        const S state = state_of(lanes, c, channels);
        parts == 1 ? write_result(params_, map, state) : write_state(params_, map * parts + part, state);
      }
    }
  }

 private:
  // In place of what a kind of counting needs none of.
  struct Nothing {
    Nothing() = default;
    Nothing(const PixelView&, const MapView&, const AbreastWords<A>&, int64_t, int64_t, int64_t) {}
  };

  void load_beta(int64_t map, int64_t channels, Lanes& lanes) const {
    Sharpness<A> sharp = sharpness(params_.beta.values ? A(1) : A(params_.beta.value));
    for_lanes<A>(channels, abreast_, [&](int64_t g, int i, int64_t pixel, int64_t c) {
      if (params_.beta.values) sharp = sharpness(beta_of<A>(params_.beta, map + c));
      lanes.sign[g][i] = sharp.sign, lanes.scale[g][i] = sharp.scale;
      lanes.lowest[g][i] = Exp2Constants<A>::kLowest / sharp.scale, lanes.pixel[g][i] = A(pixel);
    });
  }

  S state_of(const Lanes& lanes, int64_t c, int64_t channels) const {
    const int64_t g = c / kLanes<A>, i = c - group_begin<A>(g, at_least(channels * abreast_, kLanes<A>));
    const auto& s = lanes.state[g];
    if constexpr (kMoments) {
      return {s.peak[i], s.sum[i], s.at_x[i], s.at_y[i], s.x[i], s.y[i], s.xx[i], s.xy[i], s.yy[i], s.distance[i]};
    } else {
      return {s.peak[i], s.sum[i], s.sum_x[i], s.sum_y[i]};
    }
  }

  // Where an item begins; without a mask, null.
  struct Origin {
    const T* heatmap;
    const uint8_t* mask;
  };
  Origin origin(int64_t outer, int64_t part, int64_t first) const {
    const int64_t row = parts_.y.begin(part / parts_.x.count), col = parts_.x.begin(part % parts_.x.count);
    const MaskView& mask = params_.pixels.mask_view;
    const int64_t of_mask = params_.pixels.mask ? mask.offset(outer * view_.inner + first) : 0;
    return {static_cast<const T*>(params_.heatmap) + outer * view_.stride_outer + first * view_.stride_inner +
                row * view_.stride_y + col * view_.stride_x,
            params_.pixels.mask ? params_.pixels.mask + of_mask + row * mask.stride_y + col * mask.stride_x : nullptr};
  }

  PixelRange valid_part(int64_t part, int64_t first_map) const {
    const int64_t i = part / parts_.x.count, j = part % parts_.x.count;
    const PixelRange all = {parts_.y.begin(i), parts_.y.size(i), parts_.x.begin(j), parts_.x.size(j)};
    return valid_of(params_.pixels, view_, all, first_map);
  }

  // `next` is where the item after this one begins.
  template <Counts kCounts>
  void run_part(const Origin& base, const Origin& next, int64_t part, int64_t first_map, int64_t channels, Lanes& lanes) const {
    const Counting counting = counting_of(params_.pixels, view_, first_map);
    const auto [row, rows, col, cols] = valid_part(part, first_map);
    if (rows == 0 || cols == 0) return clear(channels, lanes);
    const int64_t n_lanes = channels * abreast_, stride_x = view_.stride_x * abreast_;
    const int64_t groups = cols / abreast_, rest = cols - groups * abreast_;
    const Tiling chunks = lane_chunks<T>(kCounts, rows, at_least(groups, 1), n_lanes, abreast_, kMoments);
    const auto begin = [&](int64_t n) -> Origin {
      if (n == chunks.count()) return next;
      const int64_t y = chunks.y.begin(n / chunks.x.count), x = chunks.x.begin(n % chunks.x.count);
      const MaskView& mask = params_.pixels.mask_view;
      return {base.heatmap + y * view_.stride_y + x * stride_x,
              base.mask ? base.mask + y * mask.stride_y + x * abreast_ * mask.stride_x : nullptr};
    };
    std::conditional_t<kCounts == Counts::listed, ColumnList, Nothing> list;
    std::conditional_t<kCounts == Counts::by_lanes, LaneWords<A>, Nothing> words(params_.pixels, view_, abreast_words_,
                                                                                first_map, channels, abreast_);
    for (int64_t n = 0; n < chunks.count() && groups > 0; ++n) {
      const int64_t ci = n / chunks.x.count, cj = n % chunks.x.count;
      const PixelRange range = {row + chunks.y.begin(ci), chunks.y.size(ci), col + chunks.x.begin(cj) * abreast_,
                                chunks.x.size(cj) * abreast_};
      const Origin here = begin(n), then = begin(n + 1);
      // Chunks that follow each other in memory need not be of one size: what is fetched is as far ahead as the largest.
      const auto ahead = [&](int64_t next, int64_t stride_y) {
        return next == range.rows * stride_y ? chunks.y.size(0) * stride_y : next;
      };
      LanesChunk<T> chunk = {here.heatmap, view_.stride_y, stride_x, range.rows, chunks.x.size(cj),
                             centred<A>(range.col, view_.width), centred<A>(range.row, view_.height),
                             ahead(then.heatmap - here.heatmap, view_.stride_y) * int64_t(sizeof(T)), n_lanes, abreast_,
                             n == 0, nullptr, {}};
      if constexpr (kCounts == Counts::listed) list.fill(counting, range), chunk.list = &list;
      if constexpr (kCounts == Counts::by_lanes) chunk.words = words.of(range, ahead(then.mask - here.mask, counting.stride_y));
      run_chunk<kCounts>(chunk, lanes);
    }
    if constexpr (kCounts == Counts::by_lanes) {
      const PixelRange valid = {row, rows, col + groups * abreast_, rest};
      if (rest > 0) run_rest(base.heatmap + groups * stride_x, valid, groups == 0, n_lanes, words, lanes);
    }
  }

  // Fewer pixels of each row than stand abreast, up to a valid size: through a buffer, so that those beyond are not read.
  void run_rest(const T* from, const PixelRange& valid, bool first, int64_t n_lanes, LaneWords<A>& words, Lanes& lanes) const {
    alignas(64) T buffer[kGatherBytes / sizeof(T)];
    __builtin_memset(buffer, 0, sizeof(buffer));
    const Cut chunks = cut(valid.rows, kGatherBytes / int64_t(sizeof(T)) / n_lanes);
    for (int64_t i = 0; i < chunks.count; ++i) {
      const PixelRange range = {valid.row + chunks.begin(i), chunks.size(i), valid.col, abreast_};
      copy_rows(from + chunks.begin(i) * view_.stride_y, view_.stride_y, buffer, n_lanes, range.rows, valid.cols * view_.stride_x);
      const LanesChunk<T> chunk = {buffer, n_lanes, n_lanes, range.rows, 1,
                                   centred<A>(range.col, view_.width), centred<A>(range.row, view_.height), 0, n_lanes, abreast_,
                                   first && i == 0, nullptr, words.of(range, 0)};
      run_chunk<Counts::by_lanes>(chunk, lanes);
    }
  }

  static void clear(int64_t channels, Lanes& lanes) {
    for (int64_t g = 0; g < ceil_div(channels, kLanes<A>); ++g) {
      if constexpr (kMoments) {
        lanes.state[g] = empty_moments<A, Vec<A>>();
      } else {
        lanes.state[g] = State<Vec<A>>{splat(Limits<A>::lowest), {}, {}, {}};
      }
    }
  }

  // Fewer channels than lanes: through a buffer.
  void run_buffered(const T* base, int64_t part, int64_t first_map, int64_t channels, Lanes& lanes) const {
    const PixelRange valid = valid_part(part, first_map);
    if (valid.rows == 0 || valid.cols == 0) return clear(channels, lanes);
    const int64_t padded = padded_channels<A>(channels);
    const Tiling chunks = buffer_chunks<T>(valid.rows, valid.cols, channels);
    LaneWords<A> words(params_.pixels, view_, abreast_words_, first_map, channels, 1);
    alignas(64) T buffer[kGatherBytes / sizeof(T)];
    __builtin_memset(buffer, 0, sizeof(buffer));
    for (int64_t n = 0; n < chunks.count(); ++n) {
      const int64_t y = chunks.y.begin(n / chunks.x.count), x = chunks.x.begin(n % chunks.x.count);
      const PixelRange range = {valid.row + y, chunks.y.size(n / chunks.x.count), valid.col + x,
                                chunks.x.size(n % chunks.x.count)};
      copy_pixels(base + y * view_.stride_y + x * view_.stride_x, view_.stride_y, view_.stride_x, buffer,
                  range.cols * padded, padded, range.rows, range.cols, channels);
      LanesChunk<T> chunk = {buffer, range.cols * padded, padded, range.rows, range.cols,
                             centred<A>(range.col, view_.width), centred<A>(range.row, view_.height), 0, padded, 1, n == 0,
                             nullptr, {}};
      if (!params_.pixels.all()) chunk.words = words.of(range, 0);
      run_chunk<Counts::by_lanes>(chunk, lanes);
    }
  }

  // Peaks, then sums: of a few vectors at a time where nothing passes between pixels abreast.
  template <Counts kCounts>
  static void run_chunk(const LanesChunk<T>& chunk, Lanes& lanes) {
    if (kCounts == Counts::by_lanes && !chunk.words.words) return run_chunk<Counts::all>(chunk, lanes);
    const int64_t groups = ceil_div(chunk.lanes, kLanes<A>);
    if (chunk.abreast > 1) {
      for_blocks<kLaneVectors>(groups, [&](auto n, int64_t g) { lane_peaks<T, n, kCounts>(chunk, g, lanes); });
      settle_peaks<kCounts>(chunk, 0, groups, lanes);
      for_blocks<kLaneVectors>(groups, [&](auto n, int64_t g) { sums<n, kCounts>(chunk, g, lanes); });
      fold_sums<A>(chunk.lanes, chunk.abreast, lanes.chunk);
    } else {
      for_blocks<kLaneVectors>(groups, [&](auto n, int64_t g) {
        lane_peaks<T, n, kCounts>(chunk, g, lanes);
        settle_peaks<kCounts>(chunk, g, n, lanes);
        sums<n, kCounts>(chunk, g, lanes);
      });
    }
    for (int64_t g = 0; g < ceil_div(chunk.lanes / chunk.abreast, kLanes<A>); ++g) {
      auto& state = lanes.state[g];
      state = chunk.first ? lanes.chunk[g] : merge(state, lanes.chunk[g], lanes.scale[g], VectorExp2{});
    }
  }

  template <int N, Counts kCounts>
  static KPFUSED_INLINE void sums(const LanesChunk<T>& chunk, int64_t group, Lanes& lanes) {
    if constexpr (kMoments) {
      for (int64_t g = group; g < group + N; ++g) lane_moments<T, kCounts>(chunk, g, lanes);
    } else {
      lane_sums<T, N, kCounts>(chunk, group, lanes);
    }
  }

  template <Counts kCounts>
  static KPFUSED_INLINE void settle_peaks(const LanesChunk<T>& chunk, int64_t group, int64_t count, Lanes& lanes) {
    if constexpr (kMoments) {
      place_peaks<kCounts>(chunk, group, count, lanes);
    } else if (chunk.abreast > 1) {
      share_peaks<A>(chunk.lanes, chunk.abreast, lanes.peak);
    }
  }

  const ForwardParams& params_;
  const MapView& view_;
  Tiling parts_;
  ChannelBlocks blocks_;
  int64_t abreast_;
  AbreastWords<A> abreast_words_;
};

}  // namespace kpfused::cpu::KPFUSED_ISA
