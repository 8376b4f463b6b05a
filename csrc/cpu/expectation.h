// SPDX-License-Identifier: MIT
// Expectations of values under the softmax of a map, their gradients, and the softmax itself.
//
// All three kernels walk the pixels of a map in tiles that stay in the nearest cache: P of some maps that lie side by side
// in memory, and the values of some channels, each as one run of the accumulation dtype, whatever the layouts are. What
// is left is then products of small matrices: sums over the pixels forward, sums over the channels or maps backward.
#pragma once

#include <memory>

#include "lanes.h"
#include "parallel.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Pixels of a tile.
template <class A>
constexpr int64_t kTile = 1024 / int64_t(sizeof(A));
constexpr int kTileMaps = 8, kTileChannels = 12;

template <class A>
KPFUSED_INLINE int64_t whole_vectors(int64_t count) {
  return ceil_div(count, kLanes<A>) * kLanes<A>;
}

// Calls piece(i, row, col, n) for every piece of a row among pixels [first, first + count) in row order; i counts from first.
template <class F>
KPFUSED_INLINE void for_pieces(int64_t first, int64_t count, int64_t width, const F& piece) {
  int64_t row = first / width, col = first - row * width;
  for (int64_t i = 0; i < count; ++row, col = 0) {
    const int64_t n = at_most(width - col, count - i);
    piece(i, row, col, n);
    i += n;
  }
}

// Where the pixels of one plane lie: a map, or one channel of its values.
template <class T>
struct Plane {
  T* p;
  int64_t stride_y, stride_x;

  KPFUSED_INLINE bool dense(int64_t width) const { return stride_x == 1 && stride_y == width; }
};

// `count` pixels of a plane from `first` on as one run of whole vectors: in place, or copied to `buffer`. Pixels that do
// not count are `otherwise` there; `counting` is null where all do.
template <class T>
KPFUSED_INLINE const T* run_of(const Plane<const T>& plane, int64_t width, int64_t first, int64_t count,
                               const Counting* counting, T otherwise, T* buffer) {
  if (!counting && plane.dense(width) && count % kLanes<Acc<T>> == 0) return plane.p + first;
  for_pieces(first, count, width, [&](int64_t i, int64_t row, int64_t col, int64_t n) {
    const T* from = plane.p + row * plane.stride_y + col * plane.stride_x;
    T* const to = buffer + i;
    if (plane.stride_x != 1) {
      // Only what counts may be read.
      const int64_t valid = !counting ? n : row < counting->rows ? at_most(at_least(counting->cols - col, 0), n) : 0;
      for (int64_t k = 0; k < valid; ++k) to[k] = from[k * plane.stride_x];
      from = to;
    }
    if (counting) {
      copy_counting(from, to, n, otherwise, *counting, row, col);
    } else if (from != to) {
      __builtin_memcpy(to, from, size_t(n) * sizeof(T));
    }
  });
  for (int64_t i = count; i < whole_vectors<Acc<T>>(count); ++i) buffer[i] = T{};
  return buffer;
}

// A tile back into a plane.
template <class T>
KPFUSED_INLINE void write_run(const Acc<T>* tile, const Plane<T>& plane, int64_t width, int64_t first, int64_t count) {
  using A = Acc<T>;
  T buffer[kTile<A>];
  const bool in_place = plane.dense(width) && count % kLanes<A> == 0;
  T* const run = in_place ? plane.p + first : buffer;
  for (int64_t i = 0; i < count; i += kLanes<A>) store(run + i, load_vector(tile + i));
  if (in_place) return;
  for_pieces(first, count, width, [&](int64_t i, int64_t row, int64_t col, int64_t n) {
    T* const to = plane.p + row * plane.stride_y + col * plane.stride_x;
    if (plane.stride_x == 1) {
      __builtin_memcpy(to, run + i, size_t(n) * sizeof(T));
    } else {
      for (int64_t k = 0; k < n; ++k) to[k * plane.stride_x] = run[i + k];
    }
  });
}

// Zero in place of what does not count.
template <class A>
KPFUSED_INLINE void clear_uncounted(A* tile, const Counting& counting, int64_t width, int64_t first, int64_t count) {
  for_pieces(first, count, width, [&](int64_t i, int64_t row, int64_t col, int64_t n) {
    copy_counting(tile + i, tile + i, n, A(0), counting, row, col);
  });
}

// ---- Products of tiles ----------------------------------------------------------------------------------------------

// sums[m * channels + c] += sum over pixels of p[m] v[c], for M x C of them. Each has its own sum over the same lanes, so
// that it gets the same bits whatever stands beside it.
template <class A, int M, int C>
KPFUSED_INLINE void add_products(const A* const* p, const A* const* v, int64_t pixels, A* sums, int64_t channels) {
  Vec<A> sum[M][C] = {};
  for (int64_t i = 0; i < pixels; i += kLanes<A>) {
    Vec<A> of_channel[C];
    for (int c = 0; c < C; ++c) of_channel[c] = load_vector(v[c] + i);
    for (int m = 0; m < M; ++m) {
      const Vec<A> of_map = load_vector(p[m] + i);
      for (int c = 0; c < C; ++c) sum[m][c] += of_map * of_channel[c];
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int c = 0; c < C; ++c) sums[m * channels + c] += reduce_generic<A>(sum[m][c]);
  }
}

template <class A, int M>
KPFUSED_INLINE void add_products_of_channels(const A* const* p, const A* const* v, int count, int64_t pixels, A* sums,
                                             int64_t channels) {
  int c = 0;
  for (; c + 3 <= count; c += 3) add_products<A, M, 3>(p, v + c, pixels, sums + c, channels);
  for (; c < count; ++c) add_products<A, M, 1>(p, v + c, pixels, sums + c, channels);
}

template <class A>
void add_all_products(const A* const* p, int maps, const A* const* v, int count, int64_t pixels, A* sums,
                      int64_t channels) {
  int m = 0;
  for (; m + 4 <= maps; m += 4) {
    add_products_of_channels<A, 4>(p + m, v, count, pixels, sums + m * channels, channels);
  }
  for (; m < maps; ++m) add_products_of_channels<A, 1>(p + m, v, count, pixels, sums + m * channels, channels);
}

// to[i] += sum over j of factor(j) * of[j][i].
template <class A, class F>
KPFUSED_INLINE void add_weighted(const A* const* of, int count, const F& factor, int64_t pixels, A* to) {
  constexpr int N = 4, L = kLanes<A>;
  int64_t i = 0;
  for (; i + N * L <= pixels; i += N * L) {
    Vec<A> sum[N];
    for (int k = 0; k < N; ++k) sum[k] = load_vector(to + i + k * L);
    for (int j = 0; j < count; ++j) {
      const Vec<A> f = splat(factor(j));
      for (int k = 0; k < N; ++k) sum[k] += f * load_vector(of[j] + i + k * L);
    }
    for (int k = 0; k < N; ++k) store_vector(to + i + k * L, sum[k]);
  }
  for (; i < pixels; i += L) {
    Vec<A> sum = load_vector(to + i);
    for (int j = 0; j < count; ++j) sum += splat(factor(j)) * load_vector(of[j] + i);
    store_vector(to + i, sum);
  }
}

// ---- Tiles of P and of values ---------------------------------------------------------------------------------------

// What P needs of one map.
template <class T>
struct SoftmaxMap {
  using A = Acc<T>;
  Plane<const T> plane;
  int64_t width;
  Falloff<A> of;
  A inverse, beta;  // 1 / sum
  bool empty;       // gives the value of empty maps
  Counting counting;
};

template <class A>
KPFUSED_INLINE Stats<A> stats_of(const SoftmaxParams& params, int64_t map) {
  const A* const of_map = static_cast<const A*>(params.stats) + map * params.stats_stride;
  return {of_map[0], of_map[1], of_map[2], of_map[3]};
}

// P of some maps side by side, tile by tile.
template <class T>
class SoftmaxTiles {
 public:
  using A = Acc<T>;
  static constexpr int L = kLanes<A>;

  explicit SoftmaxTiles(const SoftmaxParams& params) : params_(params), view_(params.view) {}

  const MapView& view() const { return view_; }
  const A* p(int m) const { return p_[m]; }
  const SoftmaxMap<T>& map(int m) const { return maps_[m]; }
  // Null where all pixels count.
  const Counting* counting(int m) const { return params_.pixels.all() ? nullptr : &maps_[m].counting; }

  void start(int64_t first_map, int count) {
    for (int m = 0; m < count; ++m) {
      const int64_t n = first_map + m;
      SoftmaxMap<T>& map = maps_[m];
      map.width = view_.width;
      map.plane = {static_cast<const T*>(params_.heatmap) + map_offset(view_, n), view_.stride_y, view_.stride_x};
      if (!params_.pixels.all()) map.counting = counting_of(params_.pixels, view_, n);
      map.empty = false;
      if (params_.is_probability) continue;
      const Stats<A> stats = stats_of<A>(params_, n);
      map.beta = beta_of<A>(params_.beta, n);
      map.of = falloff(sharpness(map.beta), stats.peak);
      map.inverse = A(1) / stats.sum;
      map.empty = is_empty(params_.pixels, stats.sum);
    }
  }

  // From here on, pixels of map m are those of a box.
  void keep(int m, const Box& box) {
    SoftmaxMap<T>& map = maps_[m];
    map.plane.p += box.top * map.plane.stride_y + box.left * map.plane.stride_x;
    map.width = box.right - box.left;
    if (!counting(m)) return;
    map.counting.rows -= box.top, map.counting.cols -= box.left;
    if (map.counting.mask) map.counting.mask += box.top * map.counting.stride_y + box.left * map.counting.stride_x;
  }

  // P of map m at pixels [first, first + count), with zeros up to a whole vector.
  void load_tile(int m, int64_t first, int64_t count) {
    const SoftmaxMap<T>& map = maps_[m];
    A* const p = p_[m];
    const int64_t whole = whole_vectors<A>(count);
    const T otherwise = params_.is_probability ? T{} : weightless<T>(map.of.sign);
    run_[m] = run_of(map.plane, map.width, first, count, counting(m), otherwise, buffer_[m]);
    if (params_.is_probability) {
      for (int64_t i = 0; i < whole; i += L) store_vector(p + i, load(run_[m] + i));
    } else {
      weights(run_[m], whole, map, p);
      // A map of NaN has it even where nothing weighs.
      if (counting(m) && map.inverse != map.inverse) clear_uncounted(p, map.counting, map.width, first, count);
    }
    for (int64_t i = count; i < whole; ++i) p[i] = A(0);
  }

  // How far the keys of the tile at hand lie below the peak.
  KPFUSED_INLINE Vec<A> distance_at(int m, int64_t i) const {
    return distance(load(run_[m] + i), in_lanes(maps_[m].of));
  }

 private:
  static KPFUSED_INLINE void weights(const T* run, int64_t count, const SoftmaxMap<T>& map, A* p) {
    const Falloff<Vec<A>> of = in_lanes(map.of);
    int64_t i = 0;
    const auto block = [&](auto size) __attribute__((always_inline)) {
      constexpr int N = decltype(size)::value;
      Vec<A> w[N];
      for (int j = 0; j < N; ++j) {
        w[j] = distance(load(run + i + j * L), of);
        prefetch(run + i + j * L, kReadAhead);
      }
      exp2<A, N>(w, of.scale);
      for (int j = 0; j < N; ++j) store_vector(p + i + j * L, w[j] * map.inverse);
      i += N * L;
    };
    while (i + kBlock * L <= count) block(Count<kBlock>{});
    while (i < count) block(Count<1>{});
  }

  const SoftmaxParams& params_;
  const MapView& view_;
  SoftmaxMap<T> maps_[kTileMaps];
  const T* run_[kTileMaps];
  T buffer_[kTileMaps][kTile<A>];
  A p_[kTileMaps][kTile<A>];
};

// Values of some channels of one map, tile by tile.
template <class T>
class ValueTiles {
 public:
  using A = Acc<T>;

  ValueTiles(const Values& values, const SoftmaxParams& softmax) : values_(values), softmax_(softmax) {}

  const A* const* runs() const { return run_; }

  // Channels [channel, channel + channels) of map n at pixels [first, first + count), with zeros up to a whole vector.
  void load_tile(int64_t n, int64_t channel, int channels, int64_t first, int64_t count, const Counting* counting) {
    const MapView& maps = softmax_.view;
    const ValueView& view = values_.view;
    const int64_t outer = n / maps.inner, inner = n - outer * maps.inner;
    const int64_t whole = whole_vectors<A>(count);
    for (int c = 0; c < channels; ++c) {
      run_[c] = buffer_[c];
      if (values_.kind != ValueKind::tensor) {
        values_.kind == ValueKind::window ? window(n, first, count, buffer_[c])
                                          : coordinates(channel + c, first, count, buffer_[c]);
        for (int64_t i = count; i < whole; ++i) buffer_[c][i] = A(0);
        continue;
      }
      const int64_t at = outer * view.stride_outer + inner * view.stride_inner + (channel + c) * view.stride_channel;
      const Plane<const T> plane = {static_cast<const T*>(values_.data) + at, view.stride_y, view.stride_x};
      if constexpr (std::is_same_v<T, A>) {
        run_[c] = run_of(plane, maps.width, first, count, counting, T{}, buffer_[c]);
      } else {
        T narrow[kTile<A>];
        const T* run = run_of(plane, maps.width, first, count, counting, T{}, narrow);
        for (int64_t i = 0; i < whole; i += kLanes<A>) store_vector(buffer_[c] + i, load(run + i));
      }
    }
  }

 private:
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
  const A* run_[kTileChannels];
  A buffer_[kTileChannels][kTile<A>];
};

// ---- Kernels ---------------------------------------------------------------------------------------------------------

// Maps that a work item takes at once: those that share cache lines or values.
KPFUSED_INLINE int64_t maps_at_once(const MapView& view, bool share_values) {
  return is_channels_last(view) || share_values ? at_most(view.inner, kTileMaps) : 1;
}

// Whether maps side by side have the same values, and the same of them count.
KPFUSED_INLINE bool share_values(const SoftmaxParams& p, const Values& values) {
  return values.view.stride_inner == 0 && values.kind != ValueKind::window && (p.pixels.all() || counts_by_pixel(p.pixels, p.view));
}

// Items (outer, block of maps, part), each with some channels to a pixel: make() once for the items of a thread, and what
// it returns for every item as (first map, maps, part).
template <class Make>
void for_blocks(const MapView& view, int64_t at_once, int64_t parts, int64_t channels, const Make& make) {
  const int64_t blocks = ceil_div(view.inner, at_once), items = view.outer * blocks * parts;
  const int64_t work = view.maps() * view.height * view.width / at_least(items, 1) * (channels + 1);
  parallel_for(items, at_least(kGrainElements / at_least(work, 1), 1), [&](int64_t begin, int64_t end) {
    const auto of_block = make();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item % parts, block = item / parts % blocks, outer = item / parts / blocks;
      const int64_t first = block * at_once;
      of_block(outer * view.inner + first, int(at_most(at_once, view.inner - first)), part);
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
      tiles.keep(0, box);
      A mass = A(0);
      for (int64_t first = 0; first < pixels; first += kTile<A>) {
        const int64_t count = at_most(pixels - first, kTile<A>);
        tiles.load_tile(0, first, count);
        Vec<A> sum = {};
        for (int64_t i = 0; i < count; i += kLanes<A>) sum += load_vector(tiles.p(0) + i);
        mass += reduce_generic<A>(sum);
      }
      static_cast<A*>(params.expectation)[n] = mass;
      fill_empty<A>(params, n);
    }
  });
}

// E of a block of maps, of one part of their pixels.
template <class T>
struct ExpectationKernel {
  using A = Acc<T>;
  using Params = ExpectationParams;
  const Params& params;

  int64_t channels() const { return params.values.view.channels; }
  int64_t maps_at_once() const {
    return KPFUSED_ISA::maps_at_once(params.softmax.view, share_values(params.softmax, params.values));
  }

  void operator()(int64_t map, int count, int64_t part) const {
    const SoftmaxParams& softmax = params.softmax;
    const MapView& view = softmax.view;
    const Cut parts = pixel_parts(view);
    const int64_t channels = this->channels();
    const bool shared = share_values(softmax, params.values);
    SoftmaxTiles<T> tiles(softmax);
    ValueTiles<T> values(params.values, softmax);
    tiles.start(map, count);
    // Of one part, the sums of a map do not follow those of the one before it.
    const int64_t stride = parts.count * channels;
    A* const sums = static_cast<A*>(parts.count > 1 ? params.workspace : params.expectation) +
                    (map * parts.count + part) * channels;
    int64_t end = softmax.pixels.all() ? view.height : 0;
    for (int m = 0; m < count; ++m) {
      for (int64_t c = 0; c < channels; ++c) sums[m * stride + c] = A(0);
      if (tiles.counting(m)) end = at_least(end, tiles.counting(m)->rows);
    }
    end = at_most(parts.begin(part + 1), end * view.width);
    for (int64_t first = parts.begin(part); first < end; first += kTile<A>) {
      const int64_t pixels = at_most(end - first, kTile<A>), whole = whole_vectors<A>(pixels);
      const A* p[kTileMaps];
      for (int m = 0; m < count; ++m) tiles.load_tile(m, first, pixels), p[m] = tiles.p(m);
      for (int64_t c = 0; c < channels; c += kTileChannels) {
        const int some = int(at_most(channels - c, kTileChannels));
        for (int m = 0; m < count; m += shared ? count : 1) {
          values.load_tile(map + m, c, some, first, pixels, tiles.counting(m));
          add_all_products(p + m, shared ? count : 1, values.runs(), some, whole, sums + m * stride + c, stride);
        }
      }
    }
    for (int m = 0; m < count && parts.count == 1; ++m) fill_empty<A>(params, map + m);
  }

  void finish() const {
    const Cut parts = pixel_parts(params.softmax.view);
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
  using Params = ExpectationHeatmapParams;
  static constexpr int L = kLanes<A>;
  const Params& params;

  int64_t channels() const { return params.values.view.channels; }
  int64_t maps_at_once() const {
    return KPFUSED_ISA::maps_at_once(params.softmax.view, share_values(params.softmax, params.values));
  }

  void operator()(int64_t map, int count, int64_t part) const {
    const SoftmaxParams& softmax = params.softmax;
    const MapView &view = softmax.view, &to = params.grad_view;
    const Cut parts = pixel_parts(view);
    const int64_t channels = this->channels();
    const bool shared = share_values(softmax, params.values);
    SoftmaxTiles<T> tiles(softmax);
    ValueTiles<T> values(params.values, softmax);
    A q[kTileMaps][kTile<A>], mean[kTileMaps] = {}, sum[kTileMaps] = {};
    tiles.start(map, count);
    for (int m = 0; m < count && !softmax.is_probability; ++m) {
      const A* const expectation = static_cast<const A*>(params.expectation) + (map + m) * channels;
      double total = 0;
      for (int64_t c = 0; c < channels; ++c) total += double(upstream(map + m, c)) * double(expectation[c]);
      mean[m] = A(total);
    }
    for (int64_t first = parts.begin(part); first < parts.begin(part + 1); first += kTile<A>) {
      const int64_t pixels = at_most(parts.begin(part + 1) - first, kTile<A>), whole = whole_vectors<A>(pixels);
      for (int m = 0; m < count; ++m) {
        if (!softmax.is_probability) tiles.load_tile(m, first, pixels);
        for (int64_t i = 0; i < whole; i += L) store_vector(q[m] + i, splat(-mean[m]));
      }
      for (int64_t c = 0; c < channels; c += kTileChannels) {
        const int some = int(at_most(channels - c, kTileChannels));
        for (int m = 0; m < count; ++m) {
          if (m == 0 || !shared) values.load_tile(map + m, c, some, first, pixels, tiles.counting(m));
          add_weighted(values.runs(), some, [&](int j) { return upstream(map + m, c + j); }, whole, q[m]);
        }
      }
      for (int m = 0; m < count; ++m) {
        const SoftmaxMap<T>& of = tiles.map(m);
        if (!softmax.is_probability) sum[m] += weigh(tiles, m, whole, first, pixels, q[m]);
        if (of.empty) {
          for (int64_t i = 0; i < whole; ++i) q[m][i] = A(0);
        } else if (tiles.counting(m)) {
          clear_uncounted(q[m], of.counting, view.width, first, pixels);
        }
        T* const out = static_cast<T*>(params.grad_heatmap) + map_offset(to, map + m);
        write_run<T>(q[m], {out, to.stride_y, to.stride_x}, view.width, first, pixels);
      }
    }
    if (!params.grad_beta) return;
    A* const dbeta = static_cast<A*>(parts.count > 1 ? params.workspace : params.grad_beta);
    for (int m = 0; m < count; ++m) dbeta[(map + m) * parts.count + part] = sum[m];
  }

  void finish() const {
    const Cut parts = pixel_parts(params.softmax.view);
    if (!params.grad_beta || parts.count == 1) return;
    sum_parts<A>(params.workspace, params.softmax.view.maps(), parts.count, 1, params.grad_beta);
  }

 private:
  KPFUSED_INLINE A upstream(int64_t n, int64_t c) const {
    return params.grad ? static_cast<const A*>(params.grad)[n * channels() + c] : A(1);
  }

  // q becomes dh; returns dbeta's sum over the tile.
  KPFUSED_INLINE A weigh(const SoftmaxTiles<T>& tiles, int m, int64_t whole, int64_t first, int64_t pixels, A* q) const {
    const SoftmaxMap<T>& of = tiles.map(m);
    const A* const p = tiles.p(m);
    if (!params.grad_beta) {
      const Vec<A> beta = splat(of.beta);
      for (int64_t i = 0; i < whole; i += L) store_vector(q + i, load_vector(q + i) * load_vector(p + i) * beta);
      return A(0);
    }
    for (int64_t i = 0; i < whole; i += L) store_vector(q + i, load_vector(q + i) * load_vector(p + i));
    if (of.empty) return A(0);
    if (tiles.counting(m)) clear_uncounted(q, of.counting, params.softmax.view.width, first, pixels);
    Vec<A> sum = {};
    for (int64_t i = 0; i < whole; i += L) {
      const Vec<A> of_pixels = load_vector(q + i);
      sum += tiles.distance_at(m, i) * of_pixels;
      store_vector(q + i, of_pixels * of.beta);
    }
    return of.of.sign * reduce_generic<A>(sum);
  }
};

// The gradient of values, or with no upstream gradient and values for every map the softmax itself.
template <class T>
struct ExpectationValuesKernel {
  using A = Acc<T>;
  using Params = ExpectationValuesParams;
  const Params& params;

  int64_t channels() const { return params.value_view.channels; }

  // The maps that have values of their own, each for others that share them.
  MapView own() const {
    MapView view = params.softmax.view;
    if (params.value_view.stride_outer == 0) view.outer = 1;
    if (params.value_view.stride_inner == 0) view.inner = 1;
    return view;
  }

  int64_t maps_at_once() const { return own().inner > 1 ? KPFUSED_ISA::maps_at_once(params.softmax.view, false) : 1; }

  // Of values, a few of them side by side.
  void operator()(int64_t value, int count, int64_t part) const {
    const MapView& view = params.softmax.view;
    const ValueView& to = params.value_view;
    const MapView own = this->own();
    const Cut parts = pixel_parts(view);
    const int64_t sharing_outer = view.outer / own.outer, sharing_inner = view.inner / own.inner;
    SoftmaxTiles<T> tiles(params.softmax);
    A few[kTileChannels * kTile<A>];
    const std::unique_ptr<A[]> many(to.channels > kTileChannels ? new A[size_t(to.channels * kTile<A>)] : nullptr);
    A* const sums = many ? many.get() : few;
    for (int64_t first = parts.begin(part); first < parts.begin(part + 1); first += kTile<A>) {
      const int64_t pixels = at_most(parts.begin(part + 1) - first, kTile<A>);
      for (int v = 0; v < count; ++v) {
        const int64_t outer = (value + v) / own.inner, inner = (value + v) % own.inner;
        const A* of_channels = sums;
        if (!params.grad && to.channels == 1 && sharing_outer * sharing_inner == 1 && is_softmax(tiles, value + v)) {
          tiles.load_tile(0, first, pixels);
          of_channels = tiles.p(0);
        } else {
          for (int64_t i = 0; i < to.channels * kTile<A>; ++i) sums[i] = A(0);
          for (int64_t o = 0; o < sharing_outer; ++o) {
            for (int64_t i = 0; i < sharing_inner; i += kTileMaps) {
              const int64_t map = (outer + o) * view.inner + inner + i;
              add_maps(tiles, map, int(at_most(sharing_inner - i, kTileMaps)), first, pixels, sums);
            }
          }
        }
        for (int64_t c = 0; c < to.channels; ++c) {
          T* const out = static_cast<T*>(params.grad_values) + outer * to.stride_outer + inner * to.stride_inner +
                         c * to.stride_channel;
          write_run<T>(of_channels + c * kTile<A>, {out, to.stride_y, to.stride_x}, view.width, first, pixels);
        }
      }
    }
  }

  void finish() const {}

 private:
  // Whether P of a map is all there is to write.
  KPFUSED_INLINE bool is_softmax(SoftmaxTiles<T>& tiles, int64_t map) const {
    tiles.start(map, 1);
    return !tiles.map(0).empty;
  }

  // sums[c] += P g_c of some maps side by side at pixels [first, first + count). Empty maps add their value instead, where
  // it is the softmax itself that is wanted, or nothing.
  void add_maps(SoftmaxTiles<T>& tiles, int64_t map, int maps, int64_t first, int64_t count, A* sums) const {
    const int64_t channels = params.value_view.channels, whole = whole_vectors<A>(count);
    const A* const grad = static_cast<const A*>(params.grad);
    const A* p[kTileMaps];
    int64_t index[kTileMaps];
    int some = 0;
    tiles.start(map, maps);
    for (int m = 0; m < maps; ++m) {
      if (!tiles.map(m).empty) {
        tiles.load_tile(m, first, count);
        p[some] = tiles.p(m), index[some] = map + m;
        ++some;
      } else if (!grad) {
        for (int64_t c = 0; c < channels; ++c) {
          for (int64_t i = 0; i < whole; ++i) sums[c * kTile<A> + i] += A(params.softmax.pixels.empty_value);
        }
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      const auto factor = [&](int j) { return grad ? grad[index[j] * channels + c] : A(1); };
      add_weighted(p, some, factor, whole, sums + c * kTile<A>);
    }
  }
};

}  // namespace kpfused::cpu::KPFUSED_ISA
