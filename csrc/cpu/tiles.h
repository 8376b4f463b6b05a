// SPDX-License-Identifier: MIT
// Tiles of P and of values: runs of the accumulation dtype that stay in the nearest cache, whatever the layouts are.
#pragma once

#include "lanes.h"
#include "lines.h"
#include "planes.h"
#include "products.h"
#include "sums_rows.h"

namespace kpfused::cpu::KPFUSED_ISA {

constexpr int kTileMaps = 24, kTileChannels = 16;

// What P needs of one map.
template <class A>
struct SoftmaxMap {
  Falloff<A> of;
  A inverse, beta;  // 1 / sum
  bool empty;       // gives the value of empty maps
  Counting counting;
};

template <class A>
KPFUSED_INLINE bool is_finite(A value) {
  return value - value == A(0);
}

template <class A>
KPFUSED_INLINE Stats<A> stats_of(const SoftmaxParams& params, int64_t map) {
  const A* const of_map = static_cast<const A*>(params.stats) + map * params.stats_stride;
  return {of_map[0], of_map[1], of_map[2], of_map[3]};
}

// p[i] = `factor` times the weight of run[i], of whole vectors; returns their sum, whose bits vectors of no weight behind them
// do not change. Fetches what lies `ahead` meanwhile.
template <class A, class R>
KPFUSED_INLINE A weights(const R& run, int64_t count, const Falloff<A>& of_map, A factor, int64_t ahead, A* p) {
  constexpr int L = kLanes<A>;
  const Falloff<Vec<A>> of = in_lanes(of_map);
  Vec<A> sum[kBlock] = {};
  int64_t i = 0;
  const auto block = [&](auto size, int first) __attribute__((always_inline)) {
    constexpr int N = decltype(size)::value;
    Vec<A> w[N];
    for (int j = 0; j < N; ++j) {
      w[j] = distance(load_at(run, i + j * L), of);
      prefetch(place(run, i + j * L), ahead);
    }
    exp2<A, N>(w, of.scale);
    for (int j = 0; j < N; ++j) {
      w[j] *= factor;
      sum[first + j] += w[j];
      store_vector(p + i + j * L, w[j]);
    }
    i += N * L;
  };
  while (i + kBlock * L <= count) block(Count<kBlock>{}, 0);
  for (int j = 0; j < kBlock && i < count; ++j) block(Count<1>{}, j);
  return total<A>(sum);
}

// p[i] = run[i] of a map that holds P.
template <class A, class R>
KPFUSED_INLINE void copy_run(const R& run, int64_t count, int64_t ahead, A* p) {
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    prefetch(place(run, i), ahead);
    store_vector(p + i, load_at(run, i));
  }
}

// P of whole maps that is kept stays in the second-level cache. Several at once have more room, since those that share values
// save another reading of them; not more than twice as much, so that each would be kept alone too, on which its bits depend.
template <class A>
constexpr int64_t kKept = 262144 / int64_t(sizeof(A));
template <class A>
constexpr int64_t kKeptTogether = 2 * kKept<A>;

// P of some maps side by side, tile by tile.
template <class T>
class SoftmaxTiles {
 public:
  using A = Acc<T>;
  static constexpr int L = kLanes<A>;

  explicit SoftmaxTiles(const SoftmaxParams& params) : params_(params) {}

  const A* const* p() const { return p_; }
  const A* p(int m) const { return p_[m]; }
  const SoftmaxMap<A>& map(int m) const { return maps_[m]; }
  // Null where all pixels count.
  const Counting* counting(int m) const { return params_.pixels.all() ? nullptr : &maps_[m].counting; }

  // With `keep`, P of whole maps is kept from its first reading for the next, as far as there is room.
  void start(int64_t first_map, int count, bool keep = false) {
    place(first_map, count, keep);
    for (int m = 0; m < count; ++m) {
      const Stats<A> stats = stats_of<A>(params_, first_map + m);
      set_stats(m, sharpness(maps_[m].beta), stats.peak, stats.sum);
    }
  }

  bool can_keep(int count) const { return pixels() * count <= (count > 1 ? kKeptTogether<A> : kKept<A>); }

  // Of maps whose stats are not known yet: they are found on the way to P, which is kept if asked for, and written, but for the
  // mean.
  __attribute__((noinline)) void start_with_stats(int64_t first_map, int count, Stats<A>* stats, bool keep) {
    place(first_map, count, keep);
    ahead_ = pixels() * int64_t(sizeof(T));  // this map has been read
    A peak[kTileMaps];
    for (int m = 0; m < count; ++m) peak[m] = empty_state<A>().peak;
    for_tiles([&](int64_t first, int64_t pixels) {
      read(first, pixels);
      const int64_t whole = whole_vectors<A>(pixels);
      for (int m = 0; m < count; ++m) {
        for (int64_t i = pixels; i < whole; ++i) buffer_[m][i] = run_[m][0];
        peak[m] = larger(peak[m], peak_of<T>({run_[m], whole, 1, whole, A(0), A(0), nullptr, 0}, maps_[m].of.sign));
      }
    });
    for (int m = 0; m < count; ++m) set_stats(m, sharpness(maps_[m].beta), peak[m], A(1));
    A sums[kTileMaps] = {};
    for_tiles([&](int64_t first, int64_t pixels) {
      load(first, pixels);
      for (int m = 0; m < count; ++m) sums[m] += sum_of(p_[m], whole_vectors<A>(pixels));
    });
    for (int m = 0; m < count; ++m) {
      const A sum = sums[m];
      set_stats(m, sharpness(maps_[m].beta), peak[m], sum);
      stats[first_map + m] = {peak[m], sum, A(0), A(0)};
      if (!keep) continue;
      A* const p = memory_.get() + m * whole_vectors<A>(room_);
      const Vec<A> inverse = splat(maps_[m].inverse);
      for (int64_t i = 0; i < room_; i += L) store_vector(p + i, load_vector(p + i) * inverse);
      if (counting(m) && sum != sum) clear_uncounted(p, maps_[m].counting, planes_.width, 0, room_);
    }
  }

  // From here on, pixels of the one map are those of a box.
  void narrow(const Box& box) {
    planes_.p = planes_.at(0, box.top, box.left);
    planes_.width = box.right - box.left;
    if (!counting(0)) return;
    maps_[0].counting.begin_at(box.top, box.left);
  }

  // P of the maps at pixels [first, first + count), with zeros up to a whole vector. With `keys`, for distance_at() too.
  __attribute__((noinline)) void load(int64_t first, int64_t count, bool keys = false) {
    first_ = first, pixels_ = count;
    const bool kept = first + count <= kept_;
    if (!kept || keys) read(first, count);
    // Room for the last vector of the last tile of every map.
    const int64_t stride = whole_vectors<A>(room_);
    for (int m = 0; m < count_; ++m) {
      A* const p = room_ ? memory_.get() + m * stride + first : tile_[m];
      p_[m] = p;
      if (!kept) load_map(maps_[m], counting(m), run_[m], first, count, p);
    }
    if (room_ && first == kept_) kept_ = first + count;
  }

  // Zero in place of what does not count, in a tile of the pixels at hand.
  void clear(int m, A* tile) const { clear_uncounted(tile, maps_[m].counting, planes_.width, first_, pixels_); }

  // How far the keys of the tile at hand lie below the peak.
  KPFUSED_INLINE Vec<A> distance_at(int m, int64_t i) const {
    return distance(kpfused::cpu::KPFUSED_ISA::load(run_[m] + i), in_lanes(maps_[m].of));
  }

 private:
  int64_t pixels() const { return params_.view.height * params_.view.width; }
  bool is_held() const { return params_.holds == Holds::softmax; }

  // Where maps lie, and all that is known of them before their stats are.
  void place(int64_t first_map, int count, bool keep) {
    const MapView& view = params_.view;
    count_ = count;
    kept_ = 0;
    ahead_ = kReadAhead;
    room_ = keep && can_keep(count) ? pixels() : 0;
    if (room_ && !memory_) memory_ = make_lines<A>(kKeptTogether<A> + kTileMaps * L);
    const T* const heatmap = static_cast<const T*>(params_.heatmap);
    planes_ = {heatmap + map_offset(view, first_map), view.stride_inner, view.stride_y, view.stride_x, view.width};
    for (int m = 0; m < count; ++m) {
      SoftmaxMap<A>& map = maps_[m];
      if (!params_.pixels.all()) map.counting = counting_of(params_.pixels, view, first_map + m);
      map.empty = false;
      map.beta = beta_of<A>(params_.beta, first_map + m);
      map.of.sign = sharpness(map.beta).sign;
    }
  }

  void set_stats(int m, const Sharpness<A>& sharp, A peak, A sum) {
    maps_[m].of = falloff(sharp, peak);
    maps_[m].inverse = A(1) / sum;
    maps_[m].empty = is_empty(params_.pixels, sum);
  }

  template <class F>
  void for_tiles(const F& tile) const {
    for (int64_t first = 0; first < pixels(); first += kTile<A>) tile(first, at_most(pixels() - first, kTile<A>));
  }

  void read(int64_t first, int64_t count) {
    T otherwise[kTileMaps];
    const Counting* of_maps[kTileMaps];
    for (int m = 0; m < count_; ++m) {
      of_maps[m] = counting(m);
      otherwise[m] = of_maps[m] && !is_held() ? weightless<T>(maps_[m].of.sign) : T{};
    }
    read_planes<T>(planes_, count_, first, count, of_maps, otherwise, buffer_[0], run_);
  }

  void load_map(const SoftmaxMap<A>& map, const Counting* counting, const T* run, int64_t first, int64_t count, A* p) const {
    const int64_t whole = whole_vectors<A>(count);
    if (is_held()) {
      copy_run(run, whole, ahead_, p);
    } else {
      weights(run, whole, map.of, map.inverse, ahead_, p);
    }
    // A map of NaN has it even where nothing weighs.
    if (counting && map.inverse != map.inverse) clear_uncounted(p, *counting, planes_.width, first, count);
    for (int64_t i = count; i < whole; ++i) p[i] = A(0);
  }

  const SoftmaxParams& params_;
  Planes<const T> planes_;
  int count_ = 0;
  int64_t first_ = 0, pixels_ = 0;  // of the tile at hand
  int64_t room_ = 0, kept_ = 0;  // pixels of a map
  int64_t ahead_ = 0;            // bytes from what is read to what is fetched meanwhile
  SoftmaxMap<A> maps_[kTileMaps];
  const T* run_[kTileMaps];
  const A* p_[kTileMaps];
  alignas(64) T buffer_[kTileMaps][kTile<A>];
  alignas(64) A tile_[kTileMaps][kTile<A>];
  Lines<A> memory_;
};

// Whether in each pixel the channels of one map come after those of the map before, side by side.
KPFUSED_INLINE bool channels_follow(const ValueView& view) {
  return view.stride_inner == view.channels && (view.channels == 1 || view.stride_channel == 1);
}

// Planes of values that are read or written together, as they lie side by side where they do: of some maps, some channels
// each, `stride` from plane to plane.
struct PlaneGroup {
  int64_t maps, channels, stride;
};
KPFUSED_INLINE PlaneGroup group_of(const ValueView& view, int64_t maps) {
  if (maps > 1 && view.stride_inner == 1) return {maps, 1, 1};
  if (maps > 1 && channels_follow(view) && view.channels > 0 && view.channels <= kTileChannels) {
    return {kTileChannels / view.channels, view.channels, 1};
  }
  return {1, kTileChannels, view.stride_channel};
}

// Values of some channels of some maps, tile by tile.
template <class T>
class ValueTiles {
 public:
  using A = Acc<T>;

  ValueTiles(const Values& values, const SoftmaxParams& softmax)
      : values_(values), softmax_(softmax), shared_(share_values(values, softmax)) {}

  // Whether maps side by side have the same values. They may be NaN where they do not count, so that the same have to count.
  static bool share_values(const Values& values, const SoftmaxParams& softmax) {
    return softmax.view.inner > 1 && values.kind == ValueKind::tensor && values.view.stride_inner == 0 &&
           counts_of(softmax.pixels, softmax.view) != Counts::by_lanes;
  }

  bool shared() const { return shared_; }

  // Values of `count` maps, as of(m, maps, c, channels, runs): channels [c, c + channels), for maps [m, m + maps) of them,
  // are the runs at pixels [first, first + pixels), with zeros up to a whole vector.
  template <class F>
  void for_each(const SoftmaxTiles<T>& tiles, int64_t first_map, int count, int64_t first, int64_t pixels, const F& of,
                int64_t first_channel = 0) {
    const int64_t channels = values_.view.channels;
    // Those of one map are those of all that share them.
    const int sharing = shared_ ? count : 1;
    // What is left of channels does not follow on what is left of the map before.
    const PlaneGroup group = group_of(values_.view, first_channel > 0 ? 1 : count / sharing);
    for (int m = 0; m < count; m += int(group.maps) * sharing) {
      const int maps = int(at_most(count / sharing - m, group.maps));
      for (int64_t c = first_channel; c < channels; c += group.channels) {
        const int some = int(at_most(channels - c, group.channels));
        for (int i = 0; i < maps * some; ++i) counting_[i] = tiles.counting(m + i / some);
        load(first_map + m, maps * some, group.stride, c, first, pixels);
        for (int i = 0; i < maps; ++i) of(m + i, sharing, c, some, run_ + i * some);
      }
    }
  }

  // E of as many channels as are whole vectors of one pixel, which then need not be transposed; returns their number.
  int64_t add_channels(const SoftmaxTiles<T>& tiles, int64_t first_map, int count, int64_t first, int64_t pixels, A* sums,
                       int64_t stride) {
    constexpr int64_t L = kLanes<A>, kMost = kTileChannels * kTile<A> / kTileMaps / L * L;
    const ValueView& view = values_.view;
    const int64_t channels = view.channels / L * L;
    // What does not count may be NaN, and no weight of zero takes that away.
    if (values_.kind != ValueKind::tensor || view.stride_channel != 1 || channels == 0 || tiles.counting(0)) return 0;
    const int maps = shared_ ? count : 1;
    A* const of_tile = buffer_[0];
    for (int m = 0; m < count; m += maps) {
      for (int64_t c = 0; c < channels; c += kMost) {
        const int64_t some = at_most(channels - c, kMost);
        const Planes<const T> planes = planes_of(first_map + m, c, 1);
        for (int64_t i = 0; i < maps * some; i += L) store_vector(of_tile + i, Vec<A>{});
        for_pieces(first, pixels, planes.row_length(first + pixels), [&](int64_t at, int64_t row, int64_t col, int64_t n) {
          add_all_pixels<T>(tiles.p() + m, maps, at, n, planes.at(0, row, col), view.stride_x, some, of_tile, some);
        });
        for (int i = 0; i < maps; ++i) {
          A* const to = sums + (m + i) * stride + c;
          for (int64_t k = 0; k < some; k += L) add_vector(to + k, load_vector(of_tile + i * some + k));
        }
      }
    }
    return channels;
  }

 private:
  Planes<const T> planes_of(int64_t n, int64_t channel, int64_t stride) const {
    const ValueView& view = values_.view;
    const int64_t outer = n / softmax_.view.inner, inner = n - outer * softmax_.view.inner;
    const T* const from = static_cast<const T*>(values_.data) + outer * view.stride_outer + inner * view.stride_inner +
                          channel * view.stride_channel;
    return {from, stride, view.stride_y, view.stride_x, softmax_.view.width};
  }

  // How far further on what is fetched meanwhile lies, of plane i from `channel` on: hardware follows a plane to the end of a
  // page, and takes it up again too late. Where there are many channels it would leave the caches again before its turn: there
  // it is the same tile of the next channels, and the next tile of the first ones after the last.
  int64_t ahead_of_plane(int64_t channel, int64_t i, int64_t pixels) const {
    const ValueView& view = values_.view;
    if (view.channels <= kTileChannels) return kReadAhead / int64_t(sizeof(T));
    const bool last = channel + kTileChannels + i >= view.channels;
    return last ? pixels - channel * view.stride_channel : kTileChannels * view.stride_channel;
  }

  // `count` planes, from `channel` of map n on.
  void load(int64_t n, int count, int64_t stride, int64_t channel, int64_t first, int64_t pixels) {
    const int64_t whole = whole_vectors<A>(pixels);
    for (int i = 0; i < count; ++i) run_[i] = buffer_[i];
    if (values_.kind == ValueKind::window) {
      for (int i = 0; i < count; ++i) {
        window(n, first, pixels, buffer_[i]);
        for (int64_t k = pixels; k < whole; ++k) buffer_[i][k] = A(0);
      }
      return;
    }
    const Planes<const T> planes = planes_of(n, channel, stride);
    const T none[kTileChannels] = {};
    for (int i = 0; i < count && planes.dense(); ++i) {
      prefetch_run(planes.at(i, 0, 0) + first, pixels, ahead_of_plane(channel, i, pixels) * int64_t(sizeof(T)));
    }
    if constexpr (std::is_same_v<T, A>) {
      read_planes<T>(planes, count, first, pixels, counting_, none, buffer_[0], run_);
    } else {
      alignas(64) T narrow[kTileChannels][kTile<A>];
      const T* run[kTileChannels];
      read_planes<T>(planes, count, first, pixels, counting_, none, narrow[0], run);
      for (int i = 0; i < count; ++i) {
        for (int64_t k = 0; k < whole; k += kLanes<A>) {
          store_vector(buffer_[i] + k, kpfused::cpu::KPFUSED_ISA::load(run[i] + k));
        }
      }
    }
  }

  void window(int64_t map, int64_t first, int64_t count, A* to) const {
    const Box box = window_of<A>(values_, softmax_.view, stats_of<A>(softmax_, map), map);
    for_pieces(first, count, softmax_.view.width, [&](int64_t i, int64_t row, int64_t col, int64_t n) {
      for (int64_t k = 0; k < n; ++k) to[i + k] = A(box.has(row, col + k));
    });
  }

  const Values& values_;
  const SoftmaxParams& softmax_;
  const bool shared_;
  const Counting* counting_[kTileChannels];
  const A* run_[kTileChannels];
  alignas(64) A buffer_[kTileChannels][kTile<A>];
};

}  // namespace kpfused::cpu::KPFUSED_ISA
