// SPDX-License-Identifier: MIT
// Backward where lanes are channels (stride_inner == 1, channels_last): the formula and the bytes of backward_rows.h.
//
// Pixels in the order of memory, or groups of those that stand abreast, all lanes of a block at each; what belongs to a lane
// waits in the first-level cache, with what the row gives to q folded into one value, and with moments into a second one
// that goes with x.
#pragma once

#include <utility>

#include "backward_rows.h"
#include "lanes.h"

namespace kpfused::cpu::KPFUSED_ISA {

template <class A, bool kMoments>
struct LaneGradients {
  struct Group {
    Falloff<Vec<A>> of;
    Vec<A> x, y, mean_x, mean_y, beta;
    Vec<A> pixel;  // which of those abreast a lane is
    Vec<A> of_row, dbeta;
  };
  struct MomentGroup : Group {
    Vec<A> constant, xx, xy, yy, distance;
    Vec<A> slope_of_row;
  };
  std::conditional_t<kMoments, MomentGroup, Group> group[kGroups<A>];
};

// A mask from the first pixel of a chunk on, for all channels; null: all count.
struct PixelMask {
  const uint8_t* p;
  int64_t stride_y, stride_x;

  KPFUSED_INLINE const uint8_t* row(int64_t r) const { return p ? p + r * stride_y : nullptr; }
  KPFUSED_INLINE bool at(const uint8_t* of_row, int64_t c) const { return !of_row || of_row[c * stride_x] != 0; }
};

template <class T>
struct GradientChunk {
  const T* h;
  T* out;
  int64_t stride_y, stride_x, out_y, out_x, rows, cols, row, col;
  int64_t lanes;     // at least one vector of them
  int64_t abreast;   // pixels in them: cols and stride_x count groups of these
  PixelMask mask;                // where all channels count alike
  ChunkWords<Acc<T>> words;  // Counts::by_lanes
};

// The backward of one thread's range of (outer, part, block of channels).
template <class T, bool kBeta, bool kMoments>
class BackwardLanes {
 public:
  using A = Acc<T>;
  using Map = MapGradient<A, std::conditional_t<kMoments, Polynomial<A>, Slope<A>>>;
  using Lanes = LaneGradients<A, kMoments>;
  static constexpr int L = kLanes<A>;

  explicit BackwardLanes(const BackwardParams& params)
      : params_(params),
        view_(params.view),
        parts_(part_tiling(view_)),
        blocks_(channel_blocks(view_.inner)),
        abreast_(params.grad_view.stride_x == view_.inner ? pixels_abreast<A>(view_, parts_, params.pixels) : 1),
        abreast_words_(params.pixels, view_.inner, abreast_) {}

  void run(int64_t begin, int64_t end) const {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item % blocks_.count, part = item / blocks_.count % parts_.count();
      const int64_t outer = item / blocks_.count / parts_.count();
      const int64_t first = blocks_.begin(block), channels = blocks_.begin(block + 1) - first;
      Lanes lanes;
      load_maps(outer * view_.inner + first, channels, lanes);
      const int64_t i = part / parts_.x.count, j = part % parts_.x.count;
      const int64_t row = parts_.y.begin(i), col = parts_.x.begin(j);
      const MapView &v = view_, &g = params_.grad_view;
      const T* h = static_cast<const T*>(params_.heatmap) + outer * v.stride_outer + first * v.stride_inner;
      T* out = static_cast<T*>(params_.grad_heatmap) + outer * g.stride_outer + first * g.stride_inner;
      const GradientChunk<T> all = {h + row * v.stride_y + col * v.stride_x,
                                    out + row * g.stride_y + col * g.stride_x,
                                    v.stride_y,
                                    v.stride_x * abreast_,
                                    g.stride_y,
                                    g.stride_x * abreast_,
                                    parts_.y.size(i),
                                    parts_.x.size(j) / abreast_,
                                    row,
                                    col,
                                    channels * abreast_,
                                    abreast_,
                                    {},
                                    {}};
      const int64_t first_map = outer * view_.inner + first;
      if (all.lanes < L) {
        buffered(all, first_map, lanes);
      } else if (lane_counts(params_.pixels, view_, abreast_) == Counts::by_lanes) {
        counted_by_lanes(all, first_map, lanes);
      } else {
        counted(all, first_map, lanes);
      }
      for (int64_t c = 0; (kBeta || kMoments) && c < channels; ++c) {
        const int64_t map = outer * view_.inner + first + c, count = parts_.count();
        A of_peak = A(0);
        if constexpr (kMoments) {
          Map m;
          load_gradient(params_, map, m);
          of_peak = finish_peak<T, kBeta>(params_, map, m, all.out + c, {row, all.rows, col, parts_.x.size(j)});
        }
        if (!kBeta || !params_.grad_beta) continue;
        A dbeta = of_peak;
        for (int64_t lane = c; lane < channels * abreast_; lane += channels) {
          dbeta += lanes.group[lane / L].dbeta[lane - group_begin<A>(lane / L, at_least(all.lanes, L))];
        }
        A* to = static_cast<A*>(count == 1 ? params_.grad_beta : params_.workspace);
        to[map * count + part] = sharpness(beta_of<A>(params_.beta, map)).sign * dbeta;
      }
    }
  }

 private:
  void load_maps(int64_t map, int64_t channels, Lanes& lanes) const {
    Map maps[2 * kChannelBlock];
    for (int64_t c = 0; c < channels; ++c) load_gradient(params_, map + c, maps[c]);
    for_lanes<A>(channels, abreast_, [&](int64_t g, int i, int64_t pixel, int64_t c) {
      auto& group = lanes.group[g];
      const Map& m = maps[c];
      group.pixel[i] = A(pixel), group.dbeta[i] = A(0);
      group.of.sign[i] = m.of.sign, group.of.peak[i] = m.of.peak, group.beta[i] = m.beta;
      group.of.scale[i] = m.of.scale, group.of.lowest[i] = m.of.lowest;
      group.x[i] = m.q.x, group.y[i] = m.q.y, group.mean_x[i] = m.q.mean_x, group.mean_y[i] = m.q.mean_y;
      if constexpr (kMoments) {
        group.constant[i] = m.q.constant, group.distance[i] = m.q.distance;
        group.xx[i] = m.q.xx, group.xy[i] = m.q.xy, group.yy[i] = m.q.yy;
      }
    });
  }

  // How many rows, and pixels of each, lie within the valid size.
  std::pair<int64_t, int64_t> valid_part(const GradientChunk<T>& all, int64_t first_map) const {
    const PixelRange valid =
        valid_of(params_.pixels, view_, {all.row, all.rows, all.col, all.cols * all.abreast}, first_map);
    return {valid.rows, valid.cols};
  }

  // The part that lies within the valid size; gradients of the rest are zero.
  void counted(const GradientChunk<T>& all, int64_t first_map, Lanes& lanes) const {
    const Counting counting = counting_of(params_.pixels, view_, first_map);
    GradientChunk<T> chunk = all;
    const auto [rows, cols] = valid_part(all, first_map);
    chunk.rows = rows, chunk.cols = cols / all.abreast;
    if (counting.mask) {
      chunk.mask = {counting.mask + all.row * counting.stride_y + all.col * counting.stride_x, counting.stride_y,
                    counting.stride_x};
    }
    pixels<false>(chunk, lanes);
    clear_beyond(all, chunk.rows, chunk.cols);
  }

  void counted_by_lanes(const GradientChunk<T>& all, int64_t first_map, Lanes& lanes) const {
    const auto [rows, pixels_of_row] = valid_part(all, first_map);
    const int64_t cols = pixels_of_row / all.abreast, rest = pixels_of_row - cols * all.abreast;
    clear_beyond(all, rows, cols);
    if (rows == 0 || pixels_of_row == 0) return;
    LaneWords<A> words(params_.pixels, view_, abreast_words_, first_map, all.lanes / all.abreast, all.abreast);
    if (rest > 0) rest_of_rows(all, rows, cols, rest, words, lanes);
    if (cols == 0) return;
    const Tiling chunks = lane_chunks<T>(Counts::by_lanes, rows, cols, all.lanes, all.abreast);
    for (int64_t i = 0; i < chunks.y.count; ++i) {
      for (int64_t j = 0; j < chunks.x.count; ++j) {
        const int64_t y = chunks.y.begin(i), x = chunks.x.begin(j);
        GradientChunk<T> chunk = all;
        chunk.h += y * all.stride_y + x * all.stride_x, chunk.out += y * all.out_y + x * all.out_x;
        chunk.row += y, chunk.rows = chunks.y.size(i), chunk.col += x * all.abreast, chunk.cols = chunks.x.size(j);
        chunk.words = words.of({chunk.row, chunk.rows, chunk.col, chunk.cols * all.abreast}, 0);
        pixels<true>(chunk, lanes);
      }
    }
  }

  // Fewer pixels of each row than stand abreast, up to a valid size: through buffers, so that those beyond are not read.
  void rest_of_rows(const GradientChunk<T>& all, int64_t rows, int64_t cols, int64_t rest, LaneWords<A>& words,
                    Lanes& lanes) const {
    T from[kGatherBytes / sizeof(T)], to[kGatherBytes / sizeof(T)];
    __builtin_memset(from, 0, sizeof(from));
    const Cut chunks = cut(rows, kGatherBytes / int64_t(sizeof(T)) / all.lanes);
    const int64_t col = all.col + cols * all.abreast, run = rest * (all.lanes / all.abreast);
    for (int64_t i = 0; i < chunks.count; ++i) {
      const int64_t y = chunks.begin(i);
      const PixelRange range = {all.row + y, chunks.size(i), col, all.abreast};
      copy_rows(all.h + y * all.stride_y + cols * all.stride_x, all.stride_y, from, all.lanes, range.rows, run);
      pixels<true>({from, to, all.lanes, all.lanes, all.lanes, all.lanes, range.rows, 1, range.row, col, all.lanes, all.abreast,
                    {}, words.of(range, 0)},
                   lanes);
      copy_rows(to, all.lanes, all.out + y * all.out_y + cols * all.out_x, all.out_y, range.rows, run);
    }
  }

  // Zero, of which all bytes are.
  void clear_beyond(const GradientChunk<T>& all, int64_t rows, int64_t cols) const {
    const int64_t pixel = all.lanes * int64_t(sizeof(T));
    for (int64_t r = 0; r < all.rows; ++r) {
      int64_t c = r < rows ? cols : 0;
      T* out = all.out + r * all.out_y + c * all.out_x;
      if (all.out_x == all.lanes) {
        __builtin_memset(out, 0, size_t((all.cols - c) * pixel));
      } else {
        for (; c < all.cols; ++c, out += all.out_x) __builtin_memset(out, 0, size_t(pixel));
      }
    }
  }

  static KPFUSED_INLINE void clear(T* out, int64_t lanes) {
    for (int64_t g = 0; g < ceil_div(lanes, L); ++g) store(out + group_begin<A>(g, lanes), Vec<A>{});
  }

  template <bool kByLanes>
  void pixels(const GradientChunk<T>& chunk, Lanes& lanes) const {
    if (kByLanes && !chunk.words.words) return pixels<false>(chunk, lanes);
    const int64_t groups = ceil_div(chunk.lanes, L);
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const Vec<A> y = splat(centred<A>(chunk.row + r, view_.height));
      for (int64_t g = 0; g < groups; ++g) {
        auto& m = lanes.group[g];
        const Vec<A> dy = y - m.mean_y;
        if constexpr (kMoments) {
          m.of_row = m.constant + dy * (m.y + m.yy * dy);
          m.slope_of_row = m.x + m.xy * dy;
        } else {
          m.of_row = m.y * dy;
        }
      }
      const T* h = chunk.h + r * chunk.stride_y;
      T* out = chunk.out + r * chunk.out_y;
      const uint8_t* const mask = chunk.mask.row(r);
      const LaneWord<A>* of_pixel = kByLanes ? chunk.words.at(r, 0) : nullptr;
      const A step = A(chunk.abreast);
      Vec<A> x = splat(centred<A>(chunk.col, view_.width));
      const int64_t words = chunk.words.stride_x;
      for (int64_t c = 0; c < chunk.cols; ++c, h += chunk.stride_x, out += chunk.out_x, x += step, of_pixel += words) {
        if (!chunk.mask.at(mask, c)) {
          clear(out, chunk.lanes);
          continue;
        }
        for (int64_t g = 0; g < groups; ++g) {
          auto& m = lanes.group[g];
          const int64_t k = group_begin<A>(g, chunk.lanes);
          const Vec<A> dx = x + m.pixel - m.mean_x;
          Vec<A> v[1] = {load(h + k)}, q[1], dbeta[1], by_distance = {};
          if constexpr (kMoments) {
            q[0] = (m.slope_of_row + m.xx * dx) * dx + m.of_row;
            by_distance = m.distance;
          } else {
            q[0] = m.x * dx + m.of_row;
          }
          gradient<A, kBeta, kMoments, 1>(v, q, m.of, by_distance, m.beta, dbeta);
          if constexpr (kByLanes) {
            v[0] = keep_lanes<A>(of_pixel + g, v[0]);
            if (kBeta) dbeta[0] = keep_lanes<A>(of_pixel + g, dbeta[0]);
          }
          store(out + k, v[0]);
          if (kBeta) m.dbeta += dbeta[0];
        }
      }
    }
  }

  // Fewer channels than lanes: through buffers.
  void buffered(const GradientChunk<T>& all, int64_t first_map, Lanes& lanes) const {
    const auto [rows, cols] = valid_part(all, first_map);
    clear_beyond(all, rows, cols);
    if (rows == 0 || cols == 0) return;
    const int64_t padded = padded_channels<A>(all.lanes);
    const Tiling chunks = buffer_chunks<T>(rows, cols, all.lanes);
    LaneWords<A> words(params_.pixels, view_, abreast_words_, first_map, all.lanes, 1);
    T from[kGatherBytes / sizeof(T)], to[kGatherBytes / sizeof(T)];
    __builtin_memset(from, 0, sizeof(from));
    for (int64_t i = 0; i < chunks.y.count; ++i) {
      for (int64_t j = 0; j < chunks.x.count; ++j) {
        const int64_t y = chunks.y.begin(i), x = chunks.x.begin(j);
        const PixelRange range = {all.row + y, chunks.y.size(i), all.col + x, chunks.x.size(j)};
        const int64_t stride_y = range.cols * padded;
        copy_pixels(all.h + y * all.stride_y + x * all.stride_x, all.stride_y, all.stride_x, from, stride_y, padded,
                    range.rows, range.cols, all.lanes);
        GradientChunk<T> chunk = {from,       to,        stride_y,  padded, stride_y, padded, range.rows,
                                  range.cols, range.row, range.col, padded, 1,        {},     {}};
        if (!params_.pixels.all()) chunk.words = words.of(range, 0);
        pixels<true>(chunk, lanes);
        copy_pixels(to, stride_y, padded, all.out + y * all.out_y + x * all.out_x, all.out_y, all.out_x, range.rows,
                    range.cols, all.lanes);
      }
    }
  }

  const BackwardParams& params_;
  const MapView& view_;
  Tiling parts_;
  ChannelBlocks blocks_;
  int64_t abreast_;
  AbreastWords<A> abreast_words_;
};

}  // namespace kpfused::cpu::KPFUSED_ISA
