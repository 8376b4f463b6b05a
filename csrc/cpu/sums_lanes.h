// SPDX-License-Identifier: MIT
// The sums of one chunk where lanes are channels (stride_inner == 1, channels_last): every lane holds another map, or where
// pixels stand abreast (lanes.h) every lane another share of one, and shares have their peak in common.
//
// The same sums as sums_rows.h and the same bytes. Per vector and pixel: the weight, an addition to the sum of the
// row, and a multiply-add with x; y costs one multiplication a row. Only at the end of a chunk do lanes mix, those of one
// map. The last vector of lanes overlaps the one before it, whose lanes it repeats bit by bit; fewer lanes than a vector
// has are copied to a padded buffer first, a chunk at a time.
#pragma once

#include "lanes.h"

namespace kpfused::cpu::KPFUSED_ISA {

template <class T>
struct LanesChunk {
  using A = Acc<T>;
  const T* p;
  int64_t stride_y, stride_x, rows, cols;
  A x0, y0;
  int64_t ahead;     // bytes from here to the chunk that comes next
  int64_t lanes;     // at least one vector of them
  int64_t abreast;   // pixels in them: a "pixel" below is a group of these, and x that of the group's first
  bool first;        // no state to merge with yet
  const ColumnList* list;   // Counts::listed
  ChunkWords<A> words;  // Counts::by_lanes
};

// Pixels of a row that are to be read.
template <Counts kCounts, class T>
KPFUSED_INLINE int64_t pixels_of_row(const LanesChunk<T>& chunk, int64_t row) {
  if constexpr (kCounts == Counts::listed) return chunk.list->begins[row + 1] - chunk.list->begins[row];
  return chunk.cols;
}

// What to fetch of the next chunk while a row of this one is gone through for some vectors: bytes from chunk.p for the row's
// first pixel, and the step to the next one's.
struct Ahead {
  int64_t at, step;
};

// Where a chunk is one run in memory, the vectors' share of it in order, not what they themselves will read of it: memory
// is quickest in order. Elsewhere, and of a listed mask, the pixel below.
template <int N, Counts kCounts, class T>
KPFUSED_INLINE Ahead ahead_of_row(const LanesChunk<T>& chunk, int64_t group, int64_t row) {
  constexpr int64_t L = kLanes<Acc<T>>, size = int64_t(sizeof(T));
  if (kCounts != Counts::listed && chunk.stride_x == chunk.lanes && chunk.stride_y == chunk.cols * chunk.stride_x) {
    return {chunk.ahead + (group * chunk.rows + row * N) * chunk.cols * L * size, N * L * size};
  }
  return {chunk.ahead + (row * chunk.stride_y + group_begin<Acc<T>>(group, chunk.lanes)) * size, chunk.stride_x * size};
}

// Vector j of what there is to fetch: each line once. Of a list, for two pixels.
template <Counts kCounts, class T>
KPFUSED_INLINE void fetch_ahead(const LanesChunk<T>& chunk, int64_t at, int j) {
  constexpr int kBytes = kLanes<Acc<T>> * int(sizeof(T));
  if (j * kBytes % 64 != 0) return;
  prefetch(chunk.p, at + j * kBytes);
  if (kCounts == Counts::listed) prefetch(chunk.p, at + j * kBytes + chunk.stride_x * int64_t(sizeof(T)));
}

// A list of columns is gone through while the next chunk is fetched, of which it says nothing: which of that one's columns goes
// with number i of `count`, evenly.
struct ListSpread {
  int64_t step;

  KPFUSED_INLINE ListSpread(int64_t cols, int64_t count) : step((cols << 16) / at_least(count, 1)) {}
  KPFUSED_INLINE int64_t at(int64_t i) const { return i * step >> 16; }
};

// Calls body(pixel, its x, its words, what to fetch ahead) for these, from the one with number `begin` to `end`. The next chunk
// has another list: for it, two pixels are fetched for each of this one's, evenly.
template <Counts kCounts, class T, class Body>
KPFUSED_INLINE void for_pixels(const LanesChunk<T>& chunk, int64_t row, int64_t begin, int64_t end, const Ahead& ahead,
                               const Body& body) {
  using A = Acc<T>;
  const T* p = chunk.p + row * chunk.stride_y;
  if constexpr (kCounts == Counts::listed) {
    const uint16_t* const columns = chunk.list->columns + chunk.list->begins[row];
    const ListSpread spread(chunk.cols, end);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = ahead.at + spread.at(i) * ahead.step;
      body(p + columns[i] * chunk.stride_x, splat(chunk.x0 + A(columns[i])), nullptr, at);
    }
  } else {
    const A step = A(chunk.abreast);
    Vec<A> x = splat(chunk.x0 + A(begin) * step);
    int64_t at = ahead.at + begin * ahead.step;
    p += begin * chunk.stride_x;
    if constexpr (kCounts == Counts::by_lanes) {
      const LaneWord<A>* lanes = chunk.words.at(row, begin);
      for (int64_t i = begin; i < end; ++i, p += chunk.stride_x, x += step, lanes += chunk.words.stride_x, at += ahead.step) {
        body(p, x, lanes, at);
      }
    } else {
      for (int64_t i = begin; i < end; ++i, p += chunk.stride_x, x += step, at += ahead.step) body(p, x, nullptr, at);
    }
  }
}

// Puts `otherwise`, or zero, in lanes that do not count, of vectors side by side, one after the other from number `group` on.
template <Counts kCounts, class A>
class PixelWords {
 public:
  KPFUSED_INLINE PixelWords(const LaneWord<A>*, int64_t) {}
  KPFUSED_INLINE Vec<A> next(Vec<A> v, Vec<A>) { return v; }
  KPFUSED_INLINE Vec<A> next(Vec<A> v) { return v; }
};
template <class A>
class PixelWords<Counts::by_lanes, A> {
 public:
#if KPFUSED_AVX512
  // Words of several vectors in one register: shifts cost less than loads.
  KPFUSED_INLINE PixelWords(const LaneWord<A>* of_pixel, int64_t group) {
    __builtin_memcpy(&words_, of_pixel + group, sizeof(words_));
  }
  KPFUSED_INLINE Vec<A> next(Vec<A> v, Vec<A> otherwise) {
    const LaneWord<A> word = LaneWord<A>(words_);
    words_ = _kshiftri_mask64(words_, kLanes<A>);
    return choose_lanes<A>(&word, v, otherwise);
  }
  KPFUSED_INLINE Vec<A> next(Vec<A> v) { return next(v, Vec<A>{}); }

 private:
  __mmask64 words_;
#else
  KPFUSED_INLINE PixelWords(const LaneWord<A>* of_pixel, int64_t group) : words_(of_pixel + group) {}
  KPFUSED_INLINE Vec<A> next(Vec<A> v, Vec<A> otherwise) { return choose_lanes<A>(words_++, v, otherwise); }
  KPFUSED_INLINE Vec<A> next(Vec<A> v) { return keep_lanes<A>(words_++, v); }

 private:
  const LaneWord<A>* words_;
#endif
};

// S: State or Moments of vectors.
template <class A, class S>
struct LaneStates {
  Vec<A> sign[kGroups<A>], scale[kGroups<A>], lowest[kGroups<A>];  // as in Falloff
  Vec<A> pixel[kGroups<A>];  // which of those abreast a lane is
  Vec<A> peak[kGroups<A>];   // of the chunk at hand
  S chunk[kGroups<A>];       // its sums
  S state[kGroups<A>];       // of all before: of channels, as the first lanes are
};

// What pixels abreast have summed up, relative to the same peak, is left to their channel.
template <class A, class S, int N>
KPFUSED_INLINE void fold_fields(int64_t lanes, int64_t abreast, S (&sums)[kGroups<A>], Vec<A> S::* const (&fields)[N]) {
  const int64_t channels = lanes / abreast, groups = ceil_div(lanes, kLanes<A>);
  LaneRow<A> rows[N];
  for (int64_t g = 0; g < groups; ++g) {
    for (int f = 0; f < N; ++f) rows[f].set(g, lanes, sums[g].*fields[f]);
  }
  fold(rows, abreast, channels, [](Vec<A> a, Vec<A> b) __attribute__((always_inline)) { return a + b; });
  for (int64_t g = 0; g < ceil_div(channels, kLanes<A>); ++g) {
    for (int f = 0; f < N; ++f) sums[g].*fields[f] = rows[f].get(g, lanes);
  }
}
template <class A>
KPFUSED_INLINE void fold_sums(int64_t lanes, int64_t abreast, State<Vec<A>> (&sums)[kGroups<A>]) {
  using S = State<Vec<A>>;
  fold_fields<A>(lanes, abreast, sums, {&S::sum, &S::sum_x, &S::sum_y});
}
template <class A>
KPFUSED_INLINE void fold_sums(int64_t lanes, int64_t abreast, Moments<A, Vec<A>> (&sums)[kGroups<A>]) {
  using S = Moments<A, Vec<A>>;
  fold_fields<A>(lanes, abreast, sums, {&S::sum, &S::x, &S::y, &S::xx, &S::xy, &S::yy, &S::distance});
}

// The peak of a channel is that of all its pixels abreast.
template <class A>
KPFUSED_INLINE void share_peaks(int64_t lanes, int64_t abreast, Vec<A> (&peak)[kGroups<A>]) {
  const int64_t channels = lanes / abreast, groups = ceil_div(lanes, kLanes<A>);
  LaneRow<A> rows[1];
  for (int64_t g = 0; g < groups; ++g) rows[0].set(g, lanes, peak[g]);
  fold(rows, abreast, channels, [](Vec<A> a, Vec<A> b) __attribute__((always_inline)) { return maximum(a, b); });
  rows[0].spread(abreast, channels);
  for (int64_t g = 0; g < groups; ++g) peak[g] = rows[0].get(g, lanes);
}

// The sign of beta as bits: a logit's key is the logit with them changed.
template <class A>
KPFUSED_INLINE Mask<A> flip_of(Vec<A> sign) {
  return (Mask<A>)sign & (Mask<A>)splat(A(-0.0));
}
// The logit times the sign.
template <class T>
KPFUSED_INLINE Vec<Acc<T>> key(const T* pixel, int64_t channel, Mask<Acc<T>> flip) {
  return (Vec<Acc<T>>)((Mask<Acc<T>>)load(pixel + channel) ^ flip);
}

// The peaks of N vectors of lanes over all pixels of a chunk.
template <class T, int N, Counts kCounts>
void lane_peaks(const LanesChunk<T>& chunk, int64_t group, LaneStates<Acc<T>, State<Vec<Acc<T>>>>& lanes) {
  using A = Acc<T>;
  int64_t offset[N];
  Mask<A> flip[N];
  Vec<A> peak[N];
  for (int j = 0; j < N; ++j) {
    offset[j] = group_begin<A>(group + j, chunk.lanes);
    flip[j] = flip_of<A>(lanes.sign[group + j]);
    peak[j] = splat(Limits<A>::lowest);
  }
  for (int64_t r = 0; r < chunk.rows; ++r) {
    const auto pixel = [&](const T* p, Vec<A>, const LaneWord<A>* of_pixel, int64_t) __attribute__((always_inline)) {
      PixelWords<kCounts, A> words(of_pixel, group);
      for (int j = 0; j < N; ++j) peak[j] = words.next(maximum(key(p, offset[j], flip[j]), peak[j]), peak[j]);
    };
    for_pixels<kCounts>(chunk, r, 0, pixels_of_row<kCounts>(chunk, r), {}, pixel);
  }
  for (int j = 0; j < N; ++j) lanes.peak[group + j] = peak[j];
}

// Their sums, relative to these peaks.
template <class T, int N, Counts kCounts>
void lane_sums(const LanesChunk<T>& chunk, int64_t group, LaneStates<Acc<T>, State<Vec<Acc<T>>>>& lanes) {
  using A = Acc<T>;
  int64_t offset[N];
  Vec<A> sum[N] = {}, sum_x[N] = {}, sum_y[N] = {};
  Falloff<Vec<A>> of[N];
  for (int j = 0; j < N; ++j) {
    const int64_t g = group + j;
    offset[j] = group_begin<A>(g, chunk.lanes);
    of[j] = {lanes.sign[g], lanes.peak[g], lanes.scale[g], lanes.lowest[g]};
  }
  Vec<A> y = splat(chunk.y0);
  MaskWalk mask(chunk.words.ahead, group * chunk.rows * chunk.cols * kLanes<A>, N * kLanes<A>);
  for (int64_t r = 0; r < chunk.rows; ++r, y += A(1)) {
    Vec<A> row[N] = {}, row_x[N] = {};
    uintptr_t of_mask = 0;
    const auto pixel = [&](const T* p, Vec<A> x, const LaneWord<A>* of_pixel, int64_t ahead) __attribute__((always_inline)) {
      PixelWords<kCounts, A> words(of_pixel, group);
      for (int j = 0; j < N; ++j) {
        Vec<A> w[1] = {distance(load(p + offset[j]), of[j])};
        exp2<A, 1>(w, of[j].scale, [&](int, Vec<A> v) __attribute__((always_inline)) {
          return words.next(v);
        });
        fetch_ahead<kCounts>(chunk, ahead, j);
        if (kCounts == Counts::by_lanes && j == 0) prefetch_at(of_mask), of_mask += mask.step();
        row[j] += w[0];
        row_x[j] += w[0] * x;
      }
    };
    const Ahead ahead = ahead_of_row<N, kCounts>(chunk, group, r);
    const int64_t count = pixels_of_row<kCounts>(chunk, r);
    for (int64_t i = 0; i < count;) {
      const int64_t steps = kCounts == Counts::by_lanes ? mask.steps(count - i) : count;
      of_mask = mask.at(chunk.p);
      for_pixels<kCounts>(chunk, r, i, i + steps, ahead, pixel);
      if (kCounts == Counts::by_lanes) mask.advance(steps);
      i += steps;
    }
    for (int j = 0; j < N; ++j) {
      sum[j] += row[j];
      sum_x[j] += row_x[j];
      sum_y[j] += row[j] * y;
    }
  }
  for (int j = 0; j < N; ++j) {
    const int64_t g = group + j;
    lanes.chunk[g] = {lanes.peak[g], sum[j], sum_x[j] + sum[j] * lanes.pixel[g], sum_y[j]};
  }
}

}  // namespace kpfused::cpu::KPFUSED_ISA
