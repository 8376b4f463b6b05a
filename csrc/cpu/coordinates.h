// SPDX-License-Identifier: MIT
// Expected coordinates of maps that are probability maps already, E_c = sum of P_i X_ci, and their gradient, dP_i = sum of
// g_c X_ci. There are no weights to work out: forward reads every element once, backward writes every element once and reads
// none.
#pragma once

#include "lane_runs.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Where columns and rows are.
template <class A>
KPFUSED_INLINE A x_of(const Units& units, const MapView& view, int64_t col) {
  return A(units.scale_x * centred<double>(col, view.width) + units.offset_x);
}
template <class A>
KPFUSED_INLINE A y_of(const Units& units, const MapView& view, int64_t row) {
  return A(units.scale_y * centred<double>(row, view.height) + units.offset_y);
}

KPFUSED_INLINE const Units& units_of(const ExpectationSteps& steps) {
  return steps.expectation ? steps.expectation->values.units : steps.heatmap->values.units;
}

// Of part `part` of map n.
template <class A>
KPFUSED_INLINE void write_expected(const ExpectationParams& params, int64_t n, int64_t parts, int64_t part, A x, A y) {
  A* const to = static_cast<A*>(parts > 1 ? params.workspace : params.expectation) + 2 * (n * parts + part);
  to[0] = x, to[1] = y;
}

// Map by map, row after row, in one thread's range of (map, part). Rows whose pixels are not side by side go through a buffer;
// narrow ones that follow each other are one row.
template <class T>
class CoordinateRows {
 public:
  using A = Acc<T>;
  static constexpr int L = kLanes<A>;
  static constexpr int64_t kRows = 16;
  static constexpr int64_t kNarrow = 64;  // pixels of rows whose columns are added up, some vectors after the others
  static constexpr int64_t kElementsAhead = kReadAhead / int64_t(sizeof(T));

  CoordinateRows(const ExpectationSteps& steps, const SoftmaxParams& softmax)
      : steps_(steps),
        softmax_(softmax),
        view_(softmax.view),
        units_(units_of(steps)),
        written_(steps.heatmap ? steps.heatmap->grad_view : view_),
        parts_(part_tiling(view_)),
        flat_(is_flat<A>(view_) && view_.height * view_.width <= kTable<A> && is_dense(view_) && is_dense(written_)),
        x_(make_zero_lines<A>(view_.width + L)) {
    const int64_t width = view_.width, pixels = flat_ ? view_.height * width : 0;
    for (int64_t i = 0; i < width; ++i) x_[i] = x_of<A>(units_, view_, i);
    for (int64_t i = 0; i < whole_vectors<A>(pixels); ++i) flat_x_[i] = flat_y_[i] = A(0);
    for (int64_t i = 0; i < pixels; ++i) flat_x_[i] = x_[i % width], flat_y_[i] = y_of<A>(units_, view_, i / width);
  }

  void run(int64_t begin, int64_t end) {
    const int64_t parts = parts_.count();
    MapWalk walk(view_, begin / parts);
    Part at = {begin / parts, begin % parts, nullptr, nullptr, {}, {}, {}};
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = at.index / parts_.x.count, j = at.index - i * parts_.x.count;
      at.all = {parts_.y.begin(i), parts_.y.size(i), parts_.x.begin(j), parts_.x.size(j)};
      at.counting = counting_of(softmax_.pixels, view_, at.map);
      if (rows_are(true, at.counting, at.all.row, at.all.rows)) at.counting.mask = nullptr;
      if (rows_are(false, at.counting, at.all.row, at.all.rows)) at.counting.rows = 0;
      at.ahead = parts == 1 && item + 1 < end ? ahead_of(walk, at.counting.rows * view_.stride_y) : Ahead{0, 0, 0};
      if (steps_.expectation) at.p = static_cast<const T*>(softmax_.heatmap) + walk.offset();
      if (steps_.heatmap) at.out = static_cast<T*>(steps_.heatmap->grad_heatmap) + walk.offset(written_);
      at.counting.mask ? take<true>(at) : take<false>(at);
      if (++at.index == parts) at.index = 0, ++at.map, walk.advance();
    }
  }

 private:
  // How far on lies what is fetched while a row is read: kReadAhead, of elements that are read. From one map to the next some
  // are skipped, and it is so many maps, or one more once no more than `rest` elements of this one are left.
  struct Ahead {
    int64_t skipped, maps, rest;
  };

  // Of one map, of which so many elements are read.
  Ahead ahead_of(MapWalk walk, int64_t elements) const {
    if (elements <= 0 || view_.stride_x != 1) return {0, 0, 0};  // gathered rows are fetched by nobody
    const int64_t here = walk.offset();
    walk.advance();
    return {walk.offset() - here - elements, kElementsAhead / elements, kElementsAhead % elements};
  }

  struct Part {
    int64_t map, index;
    const T* p;  // of the map, and of its gradient
    T* out;
    PixelRange all;
    Counting counting;
    Ahead ahead;
  };

  static bool is_dense(const MapView& view) { return view.stride_x == 1 && (view.stride_y == view.width || view.height == 1); }

  template <bool kMasked>
  void take(Part& at) {
    Counting& c = at.counting;
    const int64_t rows = view_.height, cols = view_.width;
    if (!flat_ || c.rows != rows || c.cols != cols) return c.by_rows() ? take<false, false>(at) : take<kMasked, false>(at);
    if (kMasked && !c.is_run(rows, cols)) {
      copy_mask(c, rows, cols, mask_);
      c.mask = mask_, c.stride_x = 1;
    }
    at.all = {0, 1, 0, rows * cols}, c.rows = 1, c.cols = rows * cols;
    take<kMasked, true>(at);
  }
  template <bool kMasked, bool kFlat>
  void take(const Part& at) {
    if (steps_.expectation) expect<kMasked, kFlat>(at);
    if (steps_.heatmap) write<kMasked, kFlat>(at);
  }

  // Calls block(first column, columns, where they are) for as many columns as stay in the nearest cache with that.
  template <bool kFlat, class Block>
  KPFUSED_INLINE void for_blocks(const PixelRange& range, const Block& block) {
    if (kFlat) return block(0, range.cols, flat_x_);
    const Cut blocks = cut(range.cols, kTable<A>, kRowMultiple);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t col = range.col + blocks.begin(b);
      block(col, blocks.size(b), x_.get() + col);
    }
  }

  // n elements of a row.
  KPFUSED_INLINE const T* elements_of(const T* p, int64_t n) {
    if (view_.stride_x == 1) return p;
    for (int64_t i = 0; i < n; ++i) row_[i] = p[i * view_.stride_x];
    return row_;
  }

  // Calls vector(i, j, whether fewer pixels than a vector are left) for a row, j of kBlock in turn: sums that follow on each
  // other have to wait.
  template <class Vector>
  static KPFUSED_INLINE void for_vectors(int64_t n, const Vector& vector) {
    int64_t i = 0;
    for (; i + kBlock * L <= n; i += kBlock * L) {
      for (int j = 0; j < kBlock; ++j) vector(i + j * L, j, std::false_type{});
    }
    for (int j = 0; j < kBlock && i < n; ++j, i += L) {
      i + L <= n ? vector(i, j, std::false_type{}) : vector(i, j, std::true_type{});
    }
  }

  // Zero in place of what does not count; with kSome, of the first `count` lanes.
  template <bool kSome>
  static KPFUSED_INLINE Vec<A> keep_counted(const uint8_t* mask, int64_t count, Vec<A> v) {
    if (!kSome) return (Vec<A>)choose<A>(mask, (BitsVector<A>)v, BitsVector<A>{});
    uint8_t some[16] = {};
    static_assert(L <= int(sizeof(some)));
#if KPFUSED_AVX512
    _mm_storeu_si128((__m128i*)some, _mm_maskz_loadu_epi8(__mmask16((1u << count) - 1), mask));
#else
    for (int64_t i = 0; i < count; ++i) some[i] = mask[i];
#endif
    return keep_counted<false>(some, L, v);
  }

  template <bool kMasked, bool kFlat>
  void expect(const Part& at) {
    const Counting& counting = at.counting;
    const int64_t end = at_most(at.all.row + at.all.rows, counting.rows);
    Vec<A> sum_x = {}, sum_y = {};
    for_blocks<kFlat>(at.all, [&](int64_t col, int64_t cols, const A* columns) __attribute__((always_inline)) {
      const int64_t count = at_most(cols, counting.cols - col);
      for (int64_t first = at.all.row; first < end && count > 0; first += kRows) {
        // Of some rows, before they are added to others: long sums lose digits.
        const Rows some = {first, at_most(first + kRows, end), col, count, columns};
        Vec<A> x = {}, y = {};
        if (kFlat || count > kNarrow) {
          add_wide<kMasked, kFlat>(at, some, x, y);
        } else {
          const int64_t vectors = ceil_div(count, int64_t(L));
          cpu::KPFUSED_ISA::for_blocks<4>(vectors, [&](auto size, int64_t vector) __attribute__((always_inline)) {
            constexpr int N = decltype(size)::value;
            const int64_t i = vector * L;
            add_narrow<kMasked, N>(at, {some.first, some.end, col + i, at_most(count - i, int64_t(N * L)), columns + i}, x, y);
          });
        }
        sum_x += x, sum_y += y;
      }
    });
    const Triple<A> sums = reduce<A>(sum_x, sum_y, Vec<A>{});
    write_expected(*steps_.expectation, at.map, parts_.count(), at.index, sums.sum, sums.x);
  }

  // Some rows of some columns.
  struct Rows {
    int64_t first, end, col, count;
    const A* columns;  // where they are
  };

  // Calls row(its index, its elements, which of them count) for the rows that count.
  template <bool kMasked, class Row>
  KPFUSED_INLINE void for_rows(const Part& at, const Rows& rows, const Row& row) {
    for (int64_t r = rows.first; r < rows.end; ++r) {
      if (rows_are(false, at.counting, r, 1)) continue;
      const T* const p = elements_of(at.p + r * view_.stride_y + rows.col * view_.stride_x, rows.count);
      const uint8_t* const mask = kMasked ? mask_bytes(at.counting, r, rows.col, rows.count, mask_) : nullptr;
      row(r, p, mask);
    }
  }

  template <bool kMasked, bool kSome>
  static KPFUSED_INLINE Vec<A> load_counted(const T* p, const uint8_t* mask, int64_t i, int64_t count) {
    const Vec<A> v = kSome ? load_first(p + i, count - i, Vec<A>{}) : load(p + i);
    return kMasked ? keep_counted<kSome>(mask + i, count - i, v) : v;
  }

  // Bytes from row r to what is to be fetched.
  KPFUSED_INLINE int64_t bytes_ahead(const Part& at, int64_t r) const {
    const int64_t left = (at.counting.rows - r) * view_.stride_y, maps = at.ahead.maps + (left <= at.ahead.rest);
    return (kElementsAhead + maps * at.ahead.skipped) * int64_t(sizeof(T));
  }

  template <bool kMasked, bool kFlat>
  KPFUSED_INLINE void add_wide(const Part& at, const Rows& rows, Vec<A>& sum_x, Vec<A>& sum_y) {
    Vec<A> x[kBlock] = {}, y[kBlock] = {};
    for_rows<kMasked>(at, rows, [&](int64_t r, const T* p, const uint8_t* mask) __attribute__((always_inline)) {
      Vec<A> of_row[kBlock] = {};
      const int64_t ahead = kFlat ? kReadAhead : bytes_ahead(at, r);
      for_vectors(rows.count, [&](int64_t i, int j, auto some) __attribute__((always_inline)) {
        prefetch(p + i, ahead);
        if (kMasked && j == 0) prefetch(mask + i, kReadAhead);
        const Vec<A> v = load_counted<kMasked, some>(p, mask, i, rows.count);
        x[j] += v * load_vector(rows.columns + i);
        kFlat ? y[j] += v * load_vector(flat_y_ + i) : of_row[j] += v;
      });
      const Vec<A> of_y = splat(kFlat ? A(0) : y_of<A>(units_, view_, r));
      for (int j = 0; j < kBlock && !kFlat; ++j) y[j] += of_row[j] * of_y;
    });
    for (int j = 0; j < kBlock; ++j) sum_x += x[j], sum_y += y[j];
  }

  // N vectors of each row: a column is added up before it is multiplied by its x.
  template <bool kMasked, int N>
  KPFUSED_INLINE void add_narrow(const Part& at, const Rows& rows, Vec<A>& sum_x, Vec<A>& sum_y) {
    constexpr int64_t kLast = (N - 1) * L;
    Vec<A> of_columns[N] = {}, y[N] = {};
    for_rows<kMasked>(at, rows, [&](int64_t r, const T* p, const uint8_t* mask) __attribute__((always_inline)) {
      const Vec<A> of_row = splat(y_of<A>(units_, view_, r));
      const auto add = [&](int j, Vec<A> v) __attribute__((always_inline)) { of_columns[j] += v, y[j] += v * of_row; };
      const int64_t ahead = bytes_ahead(at, r);
      for (int j = 0; j < N; ++j) prefetch(p + j * L, ahead);
      if (kMasked) prefetch(mask, kReadAhead);
      for (int j = 0; j + 1 < N; ++j) add(j, load_counted<kMasked, false>(p, mask, j * L, rows.count));
      add(N - 1, kLast + L <= rows.count ? load_counted<kMasked, false>(p, mask, kLast, rows.count)
                                        : load_counted<kMasked, true>(p, mask, kLast, rows.count));
    });
    for (int j = 0; j < N; ++j) sum_x += of_columns[j] * load_vector(rows.columns + j * L), sum_y += y[j];
  }

  template <bool kMasked, bool kFlat>
  void write(const Part& at) {
    const Counting& counting = at.counting;
    const A g_x = upstream_of<A>(*steps_.heatmap, 2 * at.map), g_y = upstream_of<A>(*steps_.heatmap, 2 * at.map + 1);
    const Vec<A> of_x = splat(g_x), of_y = splat(g_y);
    for_blocks<kFlat>(at.all, [&](int64_t col, int64_t count, const A* columns) __attribute__((always_inline)) {
      const int64_t most = at_least(at_most(count, counting.cols - col), 0);
      for (int64_t r = at.all.row; r < at.all.row + at.all.rows; ++r) {
        T* const out = at.out + r * written_.stride_y + col * written_.stride_x;
        T* const to = written_.stride_x == 1 ? out : row_;
        const int64_t valid = r < counting.rows && !rows_are(false, counting, r, 1) ? most : 0;
        const uint8_t* const mask = kMasked && valid > 0 ? mask_bytes(counting, r, col, valid, mask_) : nullptr;
        const Vec<A> of_row = splat(kFlat ? A(0) : g_y * y_of<A>(units_, view_, r));
        for_vectors(valid, [&](int64_t i, int, auto some) __attribute__((always_inline)) {
          Vec<A> v = of_x * load_vector(columns + i) + (kFlat ? of_y * load_vector(flat_y_ + i) : of_row);
          if (kMasked) v = keep_counted<some>(mask + i, valid - i, v);
          prefetch_for_write(to + i, kWriteAhead);
          some ? store_first(to + i, valid - i, v) : store(to + i, v);
        });
        if (valid < count) clear_row(to + valid, count - valid);
        for (int64_t i = 0; to != out && i < count; ++i) out[i * written_.stride_x] = to[i];
      }
    });
  }

  const ExpectationSteps& steps_;
  const SoftmaxParams& softmax_;
  const MapView& view_;
  const Units units_;
  const MapView written_;
  const Tiling parts_;
  const bool flat_;
  const Lines<A> x_;  // of columns, and zeros that are read behind them
  alignas(64) A flat_x_[kTable<A>], flat_y_[kTable<A>];  // of a flat map's pixels
  alignas(64) T row_[kTable<A>];
  uint8_t mask_[kTable<A> + kMaskRoom];
};

// Where lanes are channels: pixel after pixel, as memory has them.
template <class T>
class CoordinateLanes : public LaneRuns<T> {
  using Base = LaneRuns<T>;

 public:
  using typename Base::A;
  using Base::L;

  static bool fit(const ExpectationSteps& steps) {
    const MapView& view = softmax_of(steps).view;
    return is_channels_last(view) && view.inner * Base::abreast_of(steps, view) >= L && Base::are_lanes(steps);
  }

  CoordinateLanes(const ExpectationSteps& steps, const SoftmaxParams& softmax)
      : Base(steps, softmax, softmax.view.width), units_(units_of(steps)), x_(make_lines<A>(softmax.view.width)) {
    for (int64_t i = 0; i < view_.width; ++i) x_[i] = x_of<A>(units_, view_, i);
  }

  void run(int64_t begin, int64_t end) {
    this->for_items(begin, end, [&](const Item& at) {
      if (steps_.expectation) expect(at);
      if (steps_.heatmap) write(at);
    });
  }

 private:
  using typename Base::Item;
  using Base::abreast_, Base::parts_, Base::softmax_, Base::steps_, Base::view_;

  // From the first pixel of a group to a lane's, in x.
  template <class F>
  void for_coordinates(const Item& at, const F& set) {
    for_lanes<A>(at.channels, abreast_, [&](int64_t g, int i, int64_t pixel, int64_t c) {
      of_lanes_[g].from_first[i] = A(units_.scale_x * double(pixel));
      set(of_lanes_[g], i, at.outer * view_.inner + at.first + c);
    });
  }

  void expect(const Item& at) {
    for_coordinates(at, [](OfLane& lane, int, int64_t) { lane.row = lane.x = lane.y = Vec<A>{}; });
    const auto heatmap = this->read(softmax_.heatmap, view_, at);
    const T* h = nullptr;
    const A* x = nullptr;
    Vec<A> y{};
    this->for_runs(
        at, false,
        [&](int64_t r, int64_t c) {
          h = heatmap.at(r, c), x = x_.get() + at.range.col + c * abreast_;
          y = splat(y_of<A>(units_, view_, at.range.row + r));
        },
        [&](auto size, int64_t c, int64_t g, int64_t k, auto counted) __attribute__((always_inline)) {
          constexpr int N = decltype(size)::value;
          OfLane& lane = of_lanes_[g];
          Vec<A> row = lane.row, of_x = lane.x;
          for (int j = 0; j < N; ++j) {
            const T* const p = h + (c + j) * heatmap.stride_x + k;
            const Vec<A> v = counted.keep(j, counted.load(p));
            prefetch(p, kReadAhead);
            row += v;
            of_x += v * (lane.from_first + splat(x[(c + j) * abreast_]));
          }
          lane.row = row, lane.x = of_x;
        },
        [&](int64_t, int64_t vectors) {
          for (int64_t g = 0; g < vectors; ++g) of_lanes_[g].y += of_lanes_[g].row * y, of_lanes_[g].row = Vec<A>{};
        });
    for (int64_t c = 0; c < at.channels; ++c) {
      const auto sum = [&](Vec<A> OfLane::* field) { return this->sum_of(at, c, of_lanes_, field); };
      write_expected(*steps_.expectation, at.outer * view_.inner + at.first + c, parts_.count(), at.part, sum(&OfLane::x),
                     sum(&OfLane::y));
    }
  }

  void write(const Item& at) {
    const ExpectationHeatmapParams& params = *steps_.heatmap;
    for_coordinates(at, [&](OfLane& lane, int i, int64_t n) {
      lane.x[i] = upstream_of<A>(params, 2 * n), lane.y[i] = upstream_of<A>(params, 2 * n + 1);
    });
    const auto to = this->pixels(static_cast<T*>(params.grad_heatmap), params.grad_view, at);
    const int64_t vectors = ceil_div(at.channels * abreast_, int64_t(L));
    T* out = nullptr;
    const A* x = nullptr;
    this->for_runs(
        at, false,
        [&](int64_t r, int64_t c) {
          out = to.at(r, c), x = x_.get() + at.range.col + c * abreast_;
          const Vec<A> y = splat(y_of<A>(units_, view_, at.range.row + r));
          for (int64_t g = 0; g < vectors; ++g) of_lanes_[g].row = of_lanes_[g].y * y;
        },
        [&](auto size, int64_t c, int64_t g, int64_t k, auto counted) __attribute__((always_inline)) {
          const OfLane& lane = of_lanes_[g];
          for (int j = 0; j < decltype(size)::value; ++j) {
            T* const pixel = out + (c + j) * to.stride_x + k;
            prefetch_for_write(pixel, kWriteAhead);
            store(pixel, counted.keep(j, lane.x * (lane.from_first + splat(x[(c + j) * abreast_])) + lane.row));
          }
        },
        [](int64_t, int64_t) {});
    if (softmax_.pixels.sizes) this->clear_beyond(at, to, A(0));
  }

  // Forward sums, backward what comes from upstream.
  struct OfLane {
    Vec<A> from_first, row, x, y;
  };

  const Units units_;
  const Lines<A> x_;  // of columns
  OfLane of_lanes_[kGroups<A>];
};

}  // namespace kpfused::cpu::KPFUSED_ISA
