// SPDX-License-Identifier: MIT
// Expectations of values under the softmax of a map, their gradients, and the softmax itself.
//
// All kernels walk the pixels of a map in tiles that stay in the nearest cache: P of some maps that lie side by side in
// memory, and the values of some channels, each as one run of the accumulation dtype, whatever the layouts are. What is
// left is then products of small matrices: sums over the pixels forward, sums over the channels or maps backward.
#pragma once

#include "parallel.h"
#include "products.h"
#include "tiles.h"

namespace kpfused::cpu::KPFUSED_ISA {

KPFUSED_INLINE const SoftmaxParams& softmax_of(const ExpectationSteps& steps) {
  return steps.expectation ? steps.expectation->softmax
         : steps.heatmap   ? steps.heatmap->softmax
                           : steps.values->softmax;
}

// Maps that a work item takes at once: those that share cache lines, as many as are transposed at once; or those that share
// values, which are read again for the next ones, as long as all threads have their part.
KPFUSED_INLINE int64_t maps_at_once(const MapView& view, bool share_values) {
  constexpr int64_t kTransposed = 8;
  constexpr int64_t kFew = 8;  // fewer are not worth another reading of the values
  static_assert(kTransposed <= kTileChannels, "values of maps side by side, of one channel, are a group of planes");
  if (!share_values) return is_channels_last(view) ? at_most(view.inner, kTransposed) : 1;
  const int64_t others = view.outer * pixel_parts(view).count;
  const int64_t blocks = at_most(ceil_div(threads(), others), ceil_div(view.inner, kFew));
  return ceil_div(view.inner, at_least(blocks, ceil_div(view.inner, kTileMaps)));
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
  if (p.holds == Holds::probabilities || !is_empty(p.pixels, stats_of<A>(p, n).sum)) return;
  A* const of_map = static_cast<A*>(params.expectation) + n * channels;
  for (int64_t c = 0; c < channels; ++c) of_map[c] = A(p.pixels.empty_value);
}

// E of split maps.
template <class A>
void sum_expectations(const ExpectationParams& params, int64_t parts) {
  const int64_t maps = params.softmax.view.maps();
  sum_parts<A>(params.workspace, maps, parts, params.values.view.channels, params.expectation);
  for (int64_t n = 0; n < maps; ++n) fill_empty<A>(params, n);
}

// The gradient of channel c of map n, where i = n * channels + c.
template <class A, class Params>
KPFUSED_INLINE A upstream_of(const Params& params, int64_t i) {
  return params.grad ? static_cast<const A*>(params.grad)[i] : A(1);
}

// What an empty map has at every pixel: of the softmax the value that was asked for, of a gradient zero.
template <class A>
KPFUSED_INLINE A in_empty(const ExpectationValuesParams& params) {
  return params.grad ? A(0) : A(params.softmax.pixels.empty_value);
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
    if (parts.count > 1) sum_expectations<A>(params, parts.count);
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

  KPFUSED_INLINE A upstream(int64_t n, int64_t c) const { return upstream_of<A>(params, n * channels() + c); }

  // sum_c g_c E_c
  A mean_of(int64_t n) const {
    const A* const expectation = static_cast<const A*>(params.expectation) + n * channels();
    double total = 0;
    for (int64_t c = 0; c < channels(); ++c) total += double(upstream(n, c)) * double(expectation[c]);
    return A(total);
  }

  void operator()(SoftmaxTiles<T>& tiles, int64_t map, int count, int64_t part) const {
    const SoftmaxParams& softmax = params.softmax;
    const MapView &view = softmax.view, &to = params.grad_view;
    ValueTiles<T> values(params.values, softmax);
    alignas(64) A tile[kTileMaps][kTile<A>], mean[kTileMaps] = {}, sum[kTileMaps] = {};
    const A* q[kTileMaps];
    for (int m = 0; m < count; ++m) {
      q[m] = tile[m];
      mean[m] = mean_of(map + m);
    }
    T* const grad_heatmap = static_cast<T*>(params.grad_heatmap) + map_offset(to, map);
    const Planes<T> planes = {grad_heatmap, to.stride_inner, to.stride_y, to.stride_x, to.width};
    for (int64_t first = parts.begin(part); first < parts.begin(part + 1); first += kTile<A>) {
      const int64_t pixels = at_most(parts.begin(part + 1) - first, kTile<A>), whole = whole_vectors<A>(pixels);
      tiles.load(first, pixels, params.grad_beta != nullptr);
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
  // g_c V_c of some channels on q, which starts as -mean, and on the last of them times P: dh / beta, or dh itself where
  // there is no need of the other.
  KPFUSED_INLINE void add_channels(const SoftmaxTiles<T>& tiles, int m, int64_t n, int64_t c, int some, bool last,
                                   const A* const* v, int64_t whole, A mean, A* q) const {
    const auto factor = [&](int j) { return upstream(n, c + j); };
    const auto sums = [&](const auto& finish) __attribute__((always_inline)) {
      if (c == 0) {
        weighted_sums<A>(v, some, factor, whole, [&](int64_t) { return splat(-mean); }, finish);
      } else {
        weighted_sums<A>(v, some, factor, whole, [&](int64_t i) { return load_vector(q + i); }, finish);
      }
    };
    if (!last) {
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
    return of.of.sign * reduce_sum<A>(sum);
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
  KPFUSED_INLINE A upstream(int64_t n, int64_t c) const { return upstream_of<A>(params, n * channels() + c); }

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

  // Maps side by side, each with values of its own.
  __attribute__((noinline)) void of_maps(SoftmaxTiles<T>& tiles, int64_t map, int count, int64_t part) const {
    const ValueView& to = params.value_view;
    const MapView& view = params.softmax.view;
    const int64_t outer = map / view.inner, inner = map - outer * view.inner;
    const PlaneGroup group = group_of(to, count);
    alignas(64) A buffer[kTileChannels][kTile<A>];
    for (int64_t first = parts.begin(part); first < parts.begin(part + 1); first += kTile<A>) {
      const int64_t pixels = at_most(parts.begin(part + 1) - first, kTile<A>);
      tiles.load(first, pixels);
      const A* plane[kTileChannels];
      for (int m = 0; m < count; m += int(group.maps)) {
        const int maps = int(at_most(count - m, group.maps));
        for (int64_t c = 0; c < channels(); c += group.channels) {
          const int some = int(at_most(channels() - c, group.channels));
          for (int i = 0; i < maps * some; ++i) {
            const int of_map = m + i / some;
            plane[i] = plane_of(tiles, of_map, map + of_map, c + i % some, whole_vectors<A>(pixels), buffer[i]);
          }
          write_planes<T>(plane, planes(outer, inner + m, c, group.stride), maps * some, first, pixels);
        }
      }
    }
  }

  // P g of map m, or what an empty one has in its place.
  KPFUSED_INLINE const A* plane_of(const SoftmaxTiles<T>& tiles, int m, int64_t n, int64_t c, int64_t whole, A* buffer) const {
    const A* const p = tiles.p(m);
    if (tiles.map(m).empty) {
      for (int64_t i = 0; i < whole; i += kLanes<A>) store_vector(buffer + i, splat(in_empty<A>(params)));
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
    const Lines<A> many = channels() > kTileChannels ? make_lines<A>(2 * size) : nullptr;
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
      for (int64_t c = 0; c < channels(); c += kTileChannels) {
        const int some = int(at_most(channels() - c, kTileChannels));
        const A* plane[kTileChannels];
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
      weighted_sums<A>(p, some, [&](int j) { return upstream(index[j], c); }, whole, start, finish);
    }
  }
};

}  // namespace kpfused::cpu::KPFUSED_ISA
