// SPDX-License-Identifier: MIT
// Expectations of values under the softmax of a map, their gradients, and the softmax itself.
//
// All kernels walk the pixels of a map in tiles that stay in the nearest cache: P of some maps that lie side by side in
// memory, and the values of some channels, each as one run of the accumulation dtype, whatever the layouts are. What is
// left is then products of small matrices: sums over the pixels forward, sums over the channels or maps backward.
#pragma once

#include <memory>

#include "lanes.h"
#include "parallel.h"
#include "planes.h"
#include "sums_rows.h"

namespace kpfused::cpu::KPFUSED_ISA {

constexpr int kTileMaps = 8, kTileChannels = 16;

// ---- Products of tiles ----------------------------------------------------------------------------------------------

template <class A>
KPFUSED_INLINE void add_vector(A* to, Vec<A> v) {
  store_vector(to, load_vector(to) + v);
}

// sums[m * channels + c] += sum over pixels of p[m] v[c], for M x C of them, each in U sums over the same lanes, since sums
// that follow on each other cost their latency. With as many for any M and C, a map gets the same bits whatever stands
// beside it.
template <class A, int M, int C>
KPFUSED_INLINE void add_products(const A* const* p, const A* const* v, int64_t pixels, A* sums, int64_t channels) {
  constexpr int L = kLanes<A>, U = 2;
  Vec<A> sum[U][M][C] = {};
  const auto add = [&](int64_t i, int u) __attribute__((always_inline)) {
    Vec<A> of_channel[C];
    for (int c = 0; c < C; ++c) of_channel[c] = load_vector(v[c] + i);
    for (int m = 0; m < M; ++m) {
      const Vec<A> of_map = load_vector(p[m] + i);
      for (int c = 0; c < C; ++c) sum[u][m][c] += of_map * of_channel[c];
    }
  };
  int64_t i = 0;
  for (; i + U * L <= pixels; i += U * L) {
    for (int u = 0; u < U; ++u) add(i + u * L, u);
  }
  for (; i < pixels; i += L) add(i, 0);
  for (int m = 0; m < M; ++m) {
    for (int c = 0; c < C; ++c) {
      Vec<A> total = sum[0][m][c];
      for (int u = 1; u < U; ++u) total += sum[u][m][c];
      sums[m * channels + c] += reduce_generic<A>(total);
    }
  }
}

template <class A, int M>
KPFUSED_INLINE void add_products_of_channels(const A* const* p, const A* const* v, int count, int64_t pixels, A* sums,
                                             int64_t channels) {
  int c = 0;
  for (; c + 3 <= count; c += 3) add_products<A, M, 3>(p, v + c, pixels, sums + c, channels);
  for (; c < count; ++c) add_products<A, M, 1>(p, v + c, pixels, sums + c, channels);
}

// `maps` that share their values, or one alone.
template <class A>
void add_all_products(const A* const* p, int maps, const A* const* v, int count, int64_t pixels, A* sums,
                      int64_t channels) {
  constexpr int M = KPFUSED_AVX512 ? 4 : 2;  // as many as there are registers for their sums
  int m = 0;
  for (; m + M <= maps; m += M) {
    add_products_of_channels<A, M>(p + m, v, count, pixels, sums + m * channels, channels);
  }
  for (; m < maps; ++m) add_products_of_channels<A, 1>(p + m, v, count, pixels, sums + m * channels, channels);
}

// sums[m * stride + c] += sum over n pixels of p[m][i] v[i * stride_x + c], for M maps and C vectors of channels. These few
// are summed before they are added: pixel after pixel, the sums would lose digits.
template <class T, int M, int C>
KPFUSED_INLINE void add_pixels(const Acc<T>* const* p, int64_t at, int64_t n, const T* v, int64_t stride_x, Acc<T>* sums,
                               int64_t stride) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  Vec<A> sum[M][C] = {};
  for (int64_t i = 0; i < n; ++i) {
    Vec<A> of_channels[C];
    for (int c = 0; c < C; ++c) of_channels[c] = load(v + i * stride_x + c * L);
    for (int m = 0; m < M; ++m) {
      const Vec<A> of_map = splat(p[m][at + i]);
      for (int c = 0; c < C; ++c) sum[m][c] += of_map * of_channels[c];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int c = 0; c < C; ++c) add_vector(sums + m * stride + c * L, sum[m][c]);
  }
}

// As add_all_products(), of whole vectors of channels that stand side by side, pixel after pixel.
template <class T>
void add_all_pixels(const Acc<T>* const* p, int maps, int64_t at, int64_t n, const T* v, int64_t stride_x,
                    int64_t channels, Acc<T>* sums, int64_t stride) {
  constexpr int L = kLanes<Acc<T>>, kNear = 32;  // pixels whose values stay near for all maps
  for (int64_t i = 0; i < n; i += kNear) {
    const int64_t some = at_most(n - i, kNear);
    const T* const from = v + i * stride_x;
    int64_t c = 0;
    const auto block = [&](auto size) __attribute__((always_inline)) {
      constexpr int C = decltype(size)::value;
      int m = 0;
      for (; m + 4 <= maps; m += 4) add_pixels<T, 4, C>(p + m, at + i, some, from + c, stride_x, sums + m * stride + c, stride);
      for (; m < maps; ++m) add_pixels<T, 1, C>(p + m, at + i, some, from + c, stride_x, sums + m * stride + c, stride);
      c += C * L;
    };
    while (c + 3 * L <= channels) block(Count<3>{});
    while (c + L <= channels) block(Count<1>{});
  }
}

template <class A>
KPFUSED_INLINE A sum_of(const A* p, int64_t count) {
  constexpr int U = 4, L = kLanes<A>;
  Vec<A> sum[U] = {};
  int64_t i = 0;
  for (; i + U * L <= count; i += U * L) {
    for (int u = 0; u < U; ++u) sum[u] += load_vector(p + i + u * L);
  }
  for (; i < count; i += L) sum[0] += load_vector(p + i);
  return reduce_generic<A>((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// finish(i, start(i) + sum over j of factor(j) * of[j][i]), a vector at a time.
template <class A, class Factor, class Start, class Finish>
KPFUSED_INLINE void weighted_sums(const A* const* of, int count, const Factor& factor, int64_t pixels, const Start& start,
                                  const Finish& finish) {
  constexpr int N = 4, L = kLanes<A>;
  int64_t i = 0;
  for (; i + N * L <= pixels; i += N * L) {
    Vec<A> sum[N];
    for (int k = 0; k < N; ++k) sum[k] = start(i + k * L);
    for (int j = 0; j < count; ++j) {
      const Vec<A> f = splat(factor(j));
      for (int k = 0; k < N; ++k) sum[k] += f * load_vector(of[j] + i + k * L);
    }
    for (int k = 0; k < N; ++k) finish(i + k * L, sum[k]);
  }
  for (; i < pixels; i += L) {
    Vec<A> sum = start(i);
    for (int j = 0; j < count; ++j) sum += splat(factor(j)) * load_vector(of[j] + i);
    finish(i, sum);
  }
}

// ---- Tiles of P and of values ---------------------------------------------------------------------------------------

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

// P of whole maps that is kept stays in the second-level cache.
template <class A>
constexpr int64_t kKept = 131072 / int64_t(sizeof(A));

// P of some maps side by side, tile by tile.
template <class T>
class SoftmaxTiles {
 public:
  using A = Acc<T>;
  static constexpr int L = kLanes<A>;

  // `at_once`: how many maps come at once, at most.
  explicit SoftmaxTiles(const SoftmaxParams& params, int64_t at_once = 1)
      : params_(params), can_keep_(params.view.height * params.view.width * at_once <= kKept<A>) {}

  const A* const* p() const { return p_; }
  const A* p(int m) const { return p_[m]; }
  const SoftmaxMap<A>& map(int m) const { return maps_[m]; }
  // Null where all pixels count.
  const Counting* counting(int m) const { return params_.pixels.all() ? nullptr : &maps_[m].counting; }

  // With `keep`, P of whole maps is kept from its first reading for the next, as far as there is room.
  void start(int64_t first_map, int count, bool keep = false) {
    place(first_map, count, keep);
    for (int m = 0; m < count && !params_.is_probability; ++m) {
      const Stats<A> stats = stats_of<A>(params_, first_map + m);
      set_stats(m, sharpness(maps_[m].beta), stats.peak, stats.sum);
    }
  }

  // Whether whole maps can be kept, of which the stats are not known yet: they are found on the way to P, and written, but
  // for the mean.
  __attribute__((noinline)) bool start_with_stats(int64_t first_map, int count, Stats<A>* stats) {
    if (!can_keep_) return false;
    place(first_map, count, true);
    ahead_ = room_ * int64_t(sizeof(T));  // this map has been read
    A peak[kTileMaps];
    for (int m = 0; m < count; ++m) peak[m] = empty_state<A>().peak;
    for_tiles([&](int64_t first, int64_t pixels) {
      read(first, pixels);
      const int64_t whole = whole_vectors<A>(pixels);
      for (int m = 0; m < count; ++m) {
        for (int64_t i = pixels; i < whole; ++i) buffer_[m][i] = run_[m][0];
        peak[m] = larger(peak[m], peak_of<T>({run_[m], whole, 1, whole, A(0), A(0), 0}, maps_[m].of.sign));
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
      A* const p = memory_.get() + m * whole_vectors<A>(room_);
      const Vec<A> inverse = splat(maps_[m].inverse);
      for (int64_t i = 0; i < room_; i += L) store_vector(p + i, load_vector(p + i) * inverse);
      if (counting(m) && sum != sum) clear_uncounted(p, maps_[m].counting, planes_.width, 0, room_);
    }
    return true;
  }

  // From here on, pixels of the one map are those of a box.
  void narrow(const Box& box) {
    planes_.p = planes_.at(0, box.top, box.left);
    planes_.width = box.right - box.left;
    if (!counting(0)) return;
    Counting& c = maps_[0].counting;
    c.rows -= box.top, c.cols -= box.left;
    if (c.mask) c.mask += box.top * c.stride_y + box.left * c.stride_x;
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
  // Where maps lie, and all that is known of them before their stats are.
  void place(int64_t first_map, int count, bool keep) {
    const MapView& view = params_.view;
    count_ = count;
    kept_ = 0;
    ahead_ = kReadAhead;
    room_ = keep && can_keep_ ? view.height * view.width : 0;
    if (room_ && !memory_) memory_.reset(new A[kKept<A> + kTileMaps * L]);
    const T* const heatmap = static_cast<const T*>(params_.heatmap);
    planes_ = {heatmap + map_offset(view, first_map), view.stride_inner, view.stride_y, view.stride_x, view.width};
    for (int m = 0; m < count; ++m) {
      SoftmaxMap<A>& map = maps_[m];
      if (!params_.pixels.all()) map.counting = counting_of(params_.pixels, view, first_map + m);
      map.empty = false;
      if (params_.is_probability) continue;
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
    for (int64_t first = 0; first < room_; first += kTile<A>) tile(first, at_most(room_ - first, kTile<A>));
  }

  void read(int64_t first, int64_t count) {
    T otherwise[kTileMaps];
    const Counting* of_maps[kTileMaps];
    for (int m = 0; m < count_; ++m) {
      of_maps[m] = counting(m);
      otherwise[m] = params_.is_probability || !of_maps[m] ? T{} : weightless<T>(maps_[m].of.sign);
    }
    read_planes<T>(planes_, count_, first, count, of_maps, otherwise, buffer_[0], run_);
  }

  void load_map(const SoftmaxMap<A>& map, const Counting* counting, const T* run, int64_t first, int64_t count, A* p) const {
    const int64_t whole = whole_vectors<A>(count);
    if (params_.is_probability) {
      for (int64_t i = 0; i < whole; i += L) store_vector(p + i, kpfused::cpu::KPFUSED_ISA::load(run + i));
    } else {
      weights(run, whole, map, ahead_, p);
      // A map of NaN has it even where nothing weighs.
      if (counting && map.inverse != map.inverse) clear_uncounted(p, *counting, planes_.width, first, count);
    }
    for (int64_t i = count; i < whole; ++i) p[i] = A(0);
  }

  static KPFUSED_INLINE void weights(const T* run, int64_t count, const SoftmaxMap<A>& map, int64_t ahead, A* p) {
    const Falloff<Vec<A>> of = in_lanes(map.of);
    int64_t i = 0;
    const auto block = [&](auto size) __attribute__((always_inline)) {
      constexpr int N = decltype(size)::value;
      Vec<A> w[N];
      for (int j = 0; j < N; ++j) {
        w[j] = distance(kpfused::cpu::KPFUSED_ISA::load(run + i + j * L), of);
        prefetch(run + i + j * L, ahead);
      }
      exp2<A, N>(w, of.scale);
      for (int j = 0; j < N; ++j) store_vector(p + i + j * L, w[j] * map.inverse);
      i += N * L;
    };
    while (i + kBlock * L <= count) block(Count<kBlock>{});
    while (i < count) block(Count<1>{});
  }

  const SoftmaxParams& params_;
  const bool can_keep_;
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
  std::unique_ptr<A[]> memory_;
};

// Values of some channels of some maps, tile by tile.
template <class T>
class ValueTiles {
 public:
  using A = Acc<T>;

  ValueTiles(const Values& values, const SoftmaxParams& softmax)
      : values_(values), softmax_(softmax), shared_(share_values(values, softmax)) {}

  // Whether maps side by side have the same values, and the same of them count.
  static bool share_values(const Values& values, const SoftmaxParams& softmax) {
    return values.view.stride_inner == 0 && values.kind != ValueKind::window &&
           counts_of(softmax.pixels, softmax.view) != Counts::by_bytes;
  }

  bool shared() const { return shared_; }

  // Values of `count` maps, as of(m, maps, c, channels, runs): channels [c, c + channels), for maps [m, m + maps) of them,
  // are the runs at pixels [first, first + pixels), with zeros up to a whole vector.
  template <class F>
  void for_each(const SoftmaxTiles<T>& tiles, int64_t first_map, int count, int64_t first, int64_t pixels, const F& of,
                int64_t first_channel = 0) {
    const int64_t channels = values_.view.channels;
    // Maps side by side are read together.
    const bool adjacent = !shared_ && values_.kind == ValueKind::tensor && values_.view.stride_inner == 1;
    const int maps = shared_ || adjacent ? count : 1, most = adjacent && maps > 1 ? 1 : kTileChannels;
    for (int m = 0; m < count; m += maps) {
      for (int64_t c = first_channel; c < channels; c += most) {
        const int some = int(at_most(channels - c, most));
        if (adjacent && maps > 1) {
          for (int i = 0; i < maps; ++i) counting_[i] = tiles.counting(i);
          load(first_map, maps, values_.view.stride_inner, c, first, pixels);
          for (int i = 0; i < maps; ++i) of(i, 1, c, 1, run_ + i);
          continue;
        }
        for (int i = 0; i < some; ++i) counting_[i] = tiles.counting(m);
        load(first_map + m, some, values_.view.stride_channel, c, first, pixels);
        of(m, maps, c, some, run_);
      }
    }
  }

  // E of as many channels as are whole vectors of one pixel, which then need not be transposed; returns their number.
  int64_t add_channels(const SoftmaxTiles<T>& tiles, int64_t first_map, int count, int64_t first, int64_t pixels, A* sums,
                       int64_t stride) {
    constexpr int64_t L = kLanes<A>, kMost = kTileChannels * kTile<A> / kTileMaps;
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

  // `count` planes, from `channel` of map n on.
  void load(int64_t n, int count, int64_t stride, int64_t channel, int64_t first, int64_t pixels) {
    const int64_t whole = whole_vectors<A>(pixels);
    for (int i = 0; i < count; ++i) run_[i] = buffer_[i];
    if (values_.kind != ValueKind::tensor) {
      for (int i = 0; i < count; ++i) {
        values_.kind == ValueKind::window ? window(n, first, pixels, buffer_[i])
                                          : coordinates(channel + i, first, pixels, buffer_[i]);
        for (int64_t k = pixels; k < whole; ++k) buffer_[i][k] = A(0);
      }
      return;
    }
    const Planes<const T> planes = planes_of(n, channel, stride);
    const T none[kTileChannels] = {};
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

  void coordinates(int64_t channel, int64_t first, int64_t count, A* to) const {
    const Units& units = values_.units;
    const MapView& maps = softmax_.view;
    for_pieces(first, count, maps.width, [&](int64_t i, int64_t row, int64_t col, int64_t n) {
      for (int64_t k = 0; k < n; ++k) {
        to[i + k] = channel == 0 ? A(units.scale_x * centred<double>(col + k, maps.width) + units.offset_x)
                                 : A(units.scale_y * centred<double>(row, maps.height) + units.offset_y);
      }
    });
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

// ---- Kernels ---------------------------------------------------------------------------------------------------------

// Maps that a work item takes at once: those that share cache lines or values.
KPFUSED_INLINE int64_t maps_at_once(const MapView& view, bool share_values) {
  return is_channels_last(view) || share_values ? at_most(view.inner, kTileMaps) : 1;
}

// Items (outer, block of maps, part), each with some channels to a pixel: make() once for the items of a thread, and what
// it returns for every item as (first map, maps, part).
template <class Make>
void for_blocks(const MapView& view, int64_t at_once, int64_t parts, int64_t channels, const Make& make) {
  const int64_t blocks = ceil_div(view.inner, at_once), items = view.outer * blocks * parts;
  const int64_t work = view.maps() * view.height * view.width / at_least(items, 1) * (channels + 1);
  parallel_for(items, at_least(kGrainElements / at_least(work, 1), 1), [&](int64_t begin, int64_t end) {
    auto of_block = make();
    int64_t part = begin % parts, block = begin / parts % blocks, outer = begin / parts / blocks;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = block * at_once;
      of_block(outer * view.inner + first, int(at_most(at_once, view.inner - first)), part);
      if (++part == parts) part = 0, ++block;
      if (block == blocks) block = 0, ++outer;
    }
  });
}

// Sums of split maps, [maps, parts, n] to [maps, n], in order.
template <class A>
void sum_parts(const void* workspace, int64_t maps, int64_t parts, int64_t n, void* to) {
  const A* partial = static_cast<const A*>(workspace);
  A* sums = static_cast<A*>(to);
  for (int64_t map = 0; map < maps; ++map, sums += n) {
    for (int64_t c = 0; c < n; ++c) sums[c] = A(0);
    for (int64_t i = 0; i < parts; ++i, partial += n) {
      for (int64_t c = 0; c < n; ++c) sums[c] += partial[c];
    }
  }
}

template <class A>
void fill_empty(const ExpectationParams& params, int64_t n) {
  const SoftmaxParams& p = params.softmax;
  const int64_t channels = params.values.view.channels;
  if (p.is_probability || !is_empty(p.pixels, stats_of<A>(p, n).sum)) return;
  A* const of_map = static_cast<A*>(params.expectation) + n * channels;
  for (int64_t c = 0; c < channels; ++c) of_map[c] = A(p.pixels.empty_value);
}

// E of a window: nothing but the window is read.
template <class T>
void window_mass(const ExpectationParams& params) {
  using A = Acc<T>;
  const SoftmaxParams& softmax = params.softmax;
  parallel_for(softmax.view.maps(), 64, [&](int64_t begin, int64_t end) {
    SoftmaxTiles<T> tiles(softmax);
    for (int64_t n = begin; n < end; ++n) {
      const Box box = window_of<A>(params.values, softmax.view, stats_of<A>(softmax, n), n);
      const int64_t pixels = (box.right - box.left) * (box.bottom - box.top);
      tiles.start(n, 1);
      tiles.narrow(box);
      A mass = A(0);
      for (int64_t first = 0; first < pixels; first += kTile<A>) {
        const int64_t count = at_most(pixels - first, kTile<A>);
        tiles.load(first, count);
        mass += sum_of(tiles.p(0), whole_vectors<A>(count));
      }
      // A map of NaN has no mass, even where nothing of it counts within the window.
      static_cast<A*>(params.expectation)[n] = is_finite(tiles.map(0).inverse) ? mass : A(NAN);
      fill_empty<A>(params, n);
    }
  });
}

// A kernel is called for a block of maps and one part of their pixels, on whose maps the tiles have been started.

template <class T>
struct ExpectationKernel {
  using A = Acc<T>;
  const ExpectationParams& params;
  const Cut parts = pixel_parts(params.softmax.view);

  int64_t channels() const { return params.values.view.channels; }
  int64_t maps_at_once() const {
    return KPFUSED_ISA::maps_at_once(params.softmax.view, ValueTiles<T>::share_values(params.values, params.softmax));
  }

  void operator()(SoftmaxTiles<T>& tiles, int64_t map, int count, int64_t part) const {
    const SoftmaxParams& softmax = params.softmax;
    const MapView& view = softmax.view;
    ValueTiles<T> values(params.values, softmax);
    // Of one part, the sums of a map do not follow those of the one before it.
    const int64_t stride = parts.count * channels();
    A* const sums = static_cast<A*>(parts.count > 1 ? params.workspace : params.expectation) +
                    (map * parts.count + part) * channels();
    int64_t end = softmax.pixels.all() ? view.height : 0;
    for (int m = 0; m < count; ++m) {
      for (int64_t c = 0; c < channels(); ++c) sums[m * stride + c] = A(0);
      if (tiles.counting(m)) end = at_least(end, tiles.counting(m)->rows);
    }
    end = at_most(parts.begin(part + 1), end * view.width);
    for (int64_t first = parts.begin(part); first < end; first += kTile<A>) {
      const int64_t pixels = at_most(end - first, kTile<A>), whole = whole_vectors<A>(pixels);
      tiles.load(first, pixels);
      const int64_t done = values.add_channels(tiles, map, count, first, pixels, sums, stride);
      const auto add = [&](int m, int maps, int64_t c, int some, const A* const* v) {
        add_all_products(tiles.p() + m, maps, v, some, whole, sums + m * stride + c, stride);
      };
      if (done < channels()) values.for_each(tiles, map, count, first, pixels, add, done);
    }
    for (int m = 0; m < count && parts.count == 1; ++m) fill_empty<A>(params, map + m);
  }

  void finish() const {
    if (parts.count == 1) return;
    const int64_t maps = params.softmax.view.maps();
    sum_parts<A>(params.workspace, maps, parts.count, channels(), params.expectation);
    for (int64_t n = 0; n < maps; ++n) fill_empty<A>(params, n);
  }
};

// The gradient of heatmap, and of beta where it is wanted.
template <class T>
struct ExpectationHeatmapKernel {
  using A = Acc<T>;
  static constexpr int L = kLanes<A>;
  const ExpectationHeatmapParams& params;
  const Cut parts = pixel_parts(params.softmax.view);

  int64_t channels() const { return params.values.view.channels; }
  int64_t maps_at_once() const {
    return KPFUSED_ISA::maps_at_once(params.softmax.view, ValueTiles<T>::share_values(params.values, params.softmax));
  }

  void operator()(SoftmaxTiles<T>& tiles, int64_t map, int count, int64_t part) const {
    const SoftmaxParams& softmax = params.softmax;
    const MapView &view = softmax.view, &to = params.grad_view;
    ValueTiles<T> values(params.values, softmax);
    alignas(64) A tile[kTileMaps][kTile<A>], mean[kTileMaps] = {}, sum[kTileMaps] = {};
    const A* q[kTileMaps];
    for (int m = 0; m < count; ++m) {
      q[m] = tile[m];
      if (!softmax.is_probability) mean[m] = mean_of(map + m);
    }
    T* const grad_heatmap = static_cast<T*>(params.grad_heatmap) + map_offset(to, map);
    const Planes<T> planes = {grad_heatmap, to.stride_inner, to.stride_y, to.stride_x, to.width};
    for (int64_t first = parts.begin(part); first < parts.begin(part + 1); first += kTile<A>) {
      const int64_t pixels = at_most(parts.begin(part + 1) - first, kTile<A>), whole = whole_vectors<A>(pixels);
      if (!softmax.is_probability) tiles.load(first, pixels, params.grad_beta != nullptr);
      const auto add = [&](int begin, int maps, int64_t c, int some, const A* const* v) {
        const bool last = c + some == channels();
        for (int m = begin; m < begin + maps; ++m) add_channels(tiles, m, map + m, c, some, last, v, whole, mean[m], tile[m]);
      };
      values.for_each(tiles, map, count, first, pixels, add);
      for (int m = 0; m < count; ++m) {
        const SoftmaxMap<A>& of = tiles.map(m);
        if (params.grad_beta && !of.empty) {
          if (tiles.counting(m)) tiles.clear(m, tile[m]);
          sum[m] += add_distances(tiles, m, whole, tile[m]);
        }
        if (of.empty) {
          for (int64_t i = 0; i < whole; ++i) tile[m][i] = A(0);
        } else if (tiles.counting(m)) {
          clear_uncounted(tile[m], of.counting, view.width, first, pixels);
        }
      }
      write_planes<T>(q, planes, count, first, pixels);
    }
    if (!params.grad_beta) return;
    A* const dbeta = static_cast<A*>(parts.count > 1 ? params.workspace : params.grad_beta);
    for (int m = 0; m < count; ++m) dbeta[(map + m) * parts.count + part] = sum[m];
  }

  void finish() const {
    if (!params.grad_beta || parts.count == 1) return;
    sum_parts<A>(params.workspace, params.softmax.view.maps(), parts.count, 1, params.grad_beta);
  }

 private:
  KPFUSED_INLINE A upstream(int64_t n, int64_t c) const {
    return params.grad ? static_cast<const A*>(params.grad)[n * channels() + c] : A(1);
  }

  // sum_c g_c E_c
  A mean_of(int64_t n) const {
    const A* const expectation = static_cast<const A*>(params.expectation) + n * channels();
    double total = 0;
    for (int64_t c = 0; c < channels(); ++c) total += double(upstream(n, c)) * double(expectation[c]);
    return A(total);
  }

  // g_c V_c of some channels on q, which starts as -mean, and on the last of them times P: dh / beta, or dh itself where
  // there is no need of the other.
  KPFUSED_INLINE void add_channels(const SoftmaxTiles<T>& tiles, int m, int64_t n, int64_t c, int some, bool last,
                                   const A* const* v, int64_t whole, A mean, A* q) const {
    const auto factor = [&](int j) { return upstream(n, c + j); };
    const auto sums = [&](const auto& finish) __attribute__((always_inline)) {
      if (c == 0) {
        weighted_sums(v, some, factor, whole, [&](int64_t) { return splat(-mean); }, finish);
      } else {
        weighted_sums(v, some, factor, whole, [&](int64_t i) { return load_vector(q + i); }, finish);
      }
    };
    if (!last || params.softmax.is_probability) {
      sums([&](int64_t i, Vec<A> sum) { store_vector(q + i, sum); });
    } else {
      const A* const p = tiles.p(m);
      const Vec<A> beta = splat(params.grad_beta ? A(1) : tiles.map(m).beta);
      sums([&](int64_t i, Vec<A> sum) { store_vector(q + i, sum * load_vector(p + i) * beta); });
    }
  }

  // q, dh / beta, becomes dh; returns dbeta's sum over the tile.
  KPFUSED_INLINE A add_distances(const SoftmaxTiles<T>& tiles, int m, int64_t whole, A* q) const {
    const SoftmaxMap<A>& of = tiles.map(m);
    Vec<A> sum = {};
    for (int64_t i = 0; i < whole; i += L) {
      const Vec<A> of_pixels = load_vector(q + i);
      sum += tiles.distance_at(m, i) * of_pixels;
      store_vector(q + i, of_pixels * of.beta);
    }
    return of.of.sign * reduce_generic<A>(sum);
  }
};

// The gradient of values, or with no upstream gradient and values for every map the softmax itself. Its items are the maps
// that have values of their own, each for others that share them.
template <class T>
struct ExpectationValuesKernel {
  using A = Acc<T>;
  const ExpectationValuesParams& params;
  const Cut parts = pixel_parts(params.softmax.view);

  int64_t channels() const { return params.value_view.channels; }

  MapView own() const {
    MapView view = params.softmax.view;
    if (params.value_view.stride_outer == 0) view.outer = 1;
    if (params.value_view.stride_inner == 0) view.inner = 1;
    return view;
  }
  bool shares() const { return own().maps() != params.softmax.view.maps(); }

  int64_t maps_at_once() const { return shares() ? 1 : KPFUSED_ISA::maps_at_once(params.softmax.view, false); }

  void operator()(SoftmaxTiles<T>& tiles, int64_t map, int count, int64_t part) const {
    shares() ? of_shared(tiles, map, part) : of_maps(tiles, map, count, part);
  }

 private:
  // Channels of values (outer, inner), `stride` from plane to plane.
  Planes<T> planes(int64_t outer, int64_t inner, int64_t channel, int64_t stride) const {
    const ValueView& to = params.value_view;
    const int64_t at = outer * to.stride_outer + inner * to.stride_inner + channel * to.stride_channel;
    return {static_cast<T*>(params.grad_values) + at, stride, to.stride_y, to.stride_x, params.softmax.view.width};
  }

  KPFUSED_INLINE A upstream(int64_t n, int64_t c) const {
    return params.grad ? static_cast<const A*>(params.grad)[n * channels() + c] : A(1);
  }

  // Maps side by side, each with values of its own.
  __attribute__((noinline)) void of_maps(SoftmaxTiles<T>& tiles, int64_t map, int count, int64_t part) const {
    const ValueView& to = params.value_view;
    const MapView& view = params.softmax.view;
    const int64_t outer = map / view.inner, inner = map - outer * view.inner;
    // Planes that are written together: maps, or channels of one of them.
    const bool adjacent = to.stride_inner == 1 && count > 1;
    const int64_t most = adjacent ? 1 : kTileMaps;
    alignas(64) A buffer[kTileMaps][kTile<A>];
    for (int64_t first = parts.begin(part); first < parts.begin(part + 1); first += kTile<A>) {
      const int64_t pixels = at_most(parts.begin(part + 1) - first, kTile<A>);
      tiles.load(first, pixels);
      const A* plane[kTileMaps];
      for (int m = 0; m < count; m += adjacent ? count : 1) {
        for (int64_t c = 0; c < channels(); c += most) {
          const int some = adjacent ? count : int(at_most(channels() - c, most));
          for (int i = 0; i < some; ++i) {
            const int of_map = adjacent ? i : m;
            plane[i] = plane_of(tiles, of_map, map + of_map, adjacent ? c : c + i, whole_vectors<A>(pixels), buffer[i]);
          }
          const int64_t stride = adjacent ? to.stride_inner : to.stride_channel;
          write_planes<T>(plane, planes(outer, inner + m, c, stride), some, first, pixels);
        }
      }
    }
  }

  // P g of map m, or what an empty one has in its place.
  KPFUSED_INLINE const A* plane_of(const SoftmaxTiles<T>& tiles, int m, int64_t n, int64_t c, int64_t whole, A* buffer) const {
    const A* const p = tiles.p(m);
    if (tiles.map(m).empty) {
      const A value = params.grad ? A(0) : A(params.softmax.pixels.empty_value);
      for (int64_t i = 0; i < whole; i += kLanes<A>) store_vector(buffer + i, splat(value));
      return buffer;
    }
    if (!params.grad) return p;
    const A g = upstream(n, c);
    for (int64_t i = 0; i < whole; i += kLanes<A>) store_vector(buffer + i, g * load_vector(p + i));
    if (tiles.counting(m) && !is_finite(g)) tiles.clear(m, buffer);
    return buffer;
  }

  // Values that several maps share.
  __attribute__((noinline)) void of_shared(SoftmaxTiles<T>& tiles, int64_t value, int64_t part) const {
    const MapView& view = params.softmax.view;
    const MapView own = this->own();
    const int64_t sharing_outer = view.outer / own.outer, sharing_inner = view.inner / own.inner;
    const int64_t outer = value / own.inner, inner = value - outer * own.inner;
    const int64_t size = channels() * kTile<A>;
    alignas(64) A few[2 * kTileChannels * kTile<A>];
    const std::unique_ptr<A[]> many(channels() > kTileChannels ? new A[size_t(2 * size)] : nullptr);
    A *const sums = many ? many.get() : few, *const of_run = sums + size;
    for (int64_t first = parts.begin(part); first < parts.begin(part + 1); first += kTile<A>) {
      const int64_t pixels = at_most(parts.begin(part + 1) - first, kTile<A>);
      const int64_t whole = whole_vectors<A>(pixels);
      // Map after map, sums over thousands would lose digits: runs of maps are summed before they are added.
      constexpr int64_t kRun = 64;
      int64_t maps = 0;
      A* to = sums;
      const auto end_run = [&] {
        for (int64_t c = 0; to == of_run && maps > 0 && c < size; c += kTile<A>) {
          for (int64_t k = 0; k < whole; k += kLanes<A>) add_vector(sums + c + k, load_vector(of_run + c + k));
        }
        to = of_run, maps = 0;
      };
      for (int64_t o = 0; o < sharing_outer; ++o) {
        for (int64_t i = 0; i < sharing_inner; i += kTileMaps) {
          const int64_t map = (outer + o) * view.inner + inner + i;
          const int some = int(at_most(sharing_inner - i, kTileMaps));
          tiles.start(map, some);
          tiles.load(first, pixels);
          add_maps(tiles, map, some, maps > 0, whole, to);
          if ((maps += some) >= kRun) end_run();
        }
      }
      end_run();
      for (int64_t c = 0; c < channels(); c += kTileMaps) {
        const int some = int(at_most(channels() - c, kTileMaps));
        const A* plane[kTileMaps];
        for (int i = 0; i < some; ++i) plane[i] = sums + (c + i) * kTile<A>;
        write_planes<T>(plane, planes(outer, inner, c, params.value_view.stride_channel), some, first, pixels);
      }
    }
  }

  // Beside a gradient that is not finite, a P of zero does not make zero of pixels that do not count.
  void add_one_by_one(const SoftmaxTiles<T>& tiles, int64_t map, int maps, int64_t c, bool begun, int64_t whole,
                      A* sum) const {
    for (int64_t i = 0; i < whole && !begun; ++i) sum[i] = A(0);
    alignas(64) A buffer[kTile<A>];
    for (int m = 0; m < maps; ++m) {
      if (tiles.map(m).empty) continue;
      const A* const plane = plane_of(tiles, m, map + m, c, whole, buffer);
      for (int64_t i = 0; i < whole; ++i) sum[i] += plane[i];
    }
  }

  // sums[c] += P g_c of some maps side by side, or = where nothing is begun. Empty maps add nothing.
  void add_maps(const SoftmaxTiles<T>& tiles, int64_t map, int maps, bool begun, int64_t whole, A* sums) const {
    const A* p[kTileMaps];
    int64_t index[kTileMaps];
    int some = 0;
    for (int m = 0; m < maps; ++m) {
      if (!tiles.map(m).empty) p[some] = tiles.p(m), index[some++] = map + m;
    }
    for (int64_t c = 0; c < channels(); ++c) {
      A* const sum = sums + c * kTile<A>;
      if (tiles.counting(0)) {
        bool finite = true;
        for (int j = 0; j < some; ++j) finite = finite && is_finite(upstream(index[j], c));
        if (!finite) {
          add_one_by_one(tiles, map, maps, c, begun, whole, sum);
          continue;
        }
      }
      const auto start = [&](int64_t i) { return begun ? load_vector(sum + i) : Vec<A>{}; };
      const auto finish = [&](int64_t i, Vec<A> v) { store_vector(sum + i, v); };
      weighted_sums(p, some, [&](int j) { return upstream(index[j], c); }, whole, start, finish);
    }
  }
};

}  // namespace kpfused::cpu::KPFUSED_ISA
