// SPDX-License-Identifier: MIT
// Forward with moments where lanes are channels: the sums of moments_rows.h, every lane about the peak of its own map.
//
// Beside what sums_lanes.h spends on a vector: two multiply-adds, and of few rows an addition and a multiplication; and a
// comparison and two selections for eight of them, since the first reading keeps the segment of the peak, in which it is then
// found.
#pragma once

#include "sums_lanes.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Pixels of a row, of those that are read, which the search for the peak takes as one.
constexpr int64_t kSegment = 8;

template <class T>
KPFUSED_INLINE int64_t segments_of_row(const LanesChunk<T>& chunk) {
  return ceil_div(chunk.cols, kSegment);
}

template <class A>
struct MomentLanes : LaneStates<A, Moments<A, Vec<A>>> {
  Vec<A> segment[kGroups<A>];  // of the chunk, the first that has the peak
};

// The peaks of N vectors of lanes, and their segments.
template <class T, int N, Counts kCounts>
void lane_peaks(const LanesChunk<T>& chunk, int64_t group, MomentLanes<Acc<T>>& lanes) {
  using A = Acc<T>;
  // Below all logits that weigh, of which the lowest may be all there is.
  const Vec<A> none = splat(A(-INFINITY));
  int64_t offset[N];
  Mask<A> flip[N];
  Vec<A> peak[N], at[N];
  for (int j = 0; j < N; ++j) {
    offset[j] = group_begin<A>(group + j, chunk.lanes);
    flip[j] = flip_of<A>(lanes.sign[group + j]);
    peak[j] = none, at[j] = splat(kNowhere<A>);
  }
  for (int64_t r = 0; r < chunk.rows; ++r) {
    Vec<A> segment = splat(A(r * segments_of_row(chunk)));
    const int64_t count = pixels_of_row<kCounts>(chunk, r);
    for (int64_t i = 0; i < count; i += kSegment, segment += A(1)) {
      Vec<A> top[N];
      for (int j = 0; j < N; ++j) top[j] = none;
      const auto pixel = [&](const T* p, Vec<A>, const LaneWord<A>* of_pixel, int64_t) __attribute__((always_inline)) {
        PixelWords<kCounts, A> words(of_pixel, group);
        for (int j = 0; j < N; ++j) top[j] = words.next(maximum(key(p, offset[j], flip[j]), top[j]), top[j]);
      };
      for_pixels<kCounts>(chunk, r, i, at_most(i + kSegment, count), {}, pixel);
      for (int j = 0; j < N; ++j) {
        const Mask<A> higher = top[j] > peak[j];
        peak[j] = higher ? top[j] : peak[j], at[j] = higher ? segment : at[j];
      }
    }
  }
  for (int j = 0; j < N; ++j) {
    lanes.peak[group + j] = maximum(peak[j], splat(Limits<A>::lowest));
    lanes.segment[group + j] = at[j];
  }
}

template <class A>
struct Place {
  A x, y;
};

// Where the peak of a lane is first, in a segment that has it.
template <Counts kCounts, class T>
KPFUSED_INLINE Place<Acc<T>> find_in_segment(const LanesChunk<T>& chunk, const MomentLanes<Acc<T>>& lanes, int64_t lane,
                                             Acc<T> segment) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const uint32_t segments = uint32_t(segments_of_row(chunk)), index = uint32_t(segment), row = index / segments;
  const int64_t begin = int64_t(index - row * segments) * kSegment;
  const int64_t end = at_most(begin + kSegment, pixels_of_row<kCounts>(chunk, row));
  const int64_t group = lane / L, offset = group_begin<A>(group, chunk.lanes);
  const Mask<A> flip = flip_of<A>(lanes.sign[group]);
  const Vec<A> peak = lanes.peak[group];
  // How far it is to the peak could not be predicted: through all of the segment.
  Vec<A> left = splat(-kNowhere<A>);
  const auto pixel = [&](const T* p, Vec<A> at, const LaneWord<A>* of_pixel, int64_t) __attribute__((always_inline)) {
    const Vec<A> here = key(p, offset, flip) == peak ? -at : splat(-kNowhere<A>);
    left = PixelWords<kCounts, A>(of_pixel, group).next(maximum(here, left), left);
  };
  for_pixels<kCounts>(chunk, row, begin, end, {}, pixel);
  A columns[L];
  store_vector(columns, left);
  return {-columns[lane - offset], chunk.y0 + A(row)};
}

// Makes the pixels of the peaks what the sums of `count` groups are about, except where an earlier chunk has a higher one.
template <Counts kCounts, class T>
void place_peaks(const LanesChunk<T>& chunk, int64_t group, int64_t count, MomentLanes<Acc<T>>& lanes) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>;
  const int64_t channels = chunk.lanes / chunk.abreast;
  const Vec<A> nowhere = splat(kNowhere<A>);
  LaneRow<A> each, first[1], x, y;  // the segments of each lane and of each channel, and the pixels of the peaks
  if (chunk.abreast == 1) {
    for (int64_t g = group; g < group + count; ++g) each.set(g, chunk.lanes, lanes.segment[g]);
  } else {
    Vec<A> own[kGroups<A>];
    for (int64_t g = 0; g < count; ++g) own[g] = lanes.peak[g];
    share_peaks<A>(chunk.lanes, chunk.abreast, lanes.peak);
    for (int64_t g = 0; g < count; ++g) {
      const Vec<A> segment = own[g] == lanes.peak[g] ? lanes.segment[g] : nowhere;
      each.set(g, chunk.lanes, segment), first[0].set(g, chunk.lanes, segment);
    }
    fold(first, chunk.abreast, channels, [](Vec<A> a, Vec<A> b) __attribute__((always_inline)) { return -maximum(-a, -b); });
  }
  const LaneRow<A>& segment = chunk.abreast > 1 ? first[0] : each;
  for (int64_t g = group; g < group + at_most(count, ceil_div(channels, L)); ++g) {
    Mask<A> earlier = {};
    if (!chunk.first) earlier = lanes.peak[g] < lanes.state[g].peak;
    x.set(g, chunk.lanes, earlier ? lanes.state[g].at_x : nowhere);
    y.set(g, chunk.lanes, earlier ? lanes.state[g].at_y : nowhere);
    // Which lanes these are could not be predicted: bit by bit.
    uint32_t bits = lane_bits<A>(~earlier & (segment.get(g, chunk.lanes) < nowhere));
    for (; bits != 0; bits &= bits - 1) {
      const int64_t c = group_begin<A>(g, chunk.lanes) + __builtin_ctz(bits);
      for (int64_t a = 0; a < chunk.abreast && c < channels; ++a) {
        const int64_t lane = a * channels + c;
        if (each.values[lane] != segment.values[c]) continue;
        const Place<A> place = find_in_segment<kCounts>(chunk, lanes, lane, segment.values[c]);
        if (place.x + A(a) < x.values[c]) x.values[c] = place.x + A(a), y.values[c] = place.y;
      }
    }
  }
  if (chunk.abreast > 1) x.spread(chunk.abreast, channels), y.spread(chunk.abreast, channels);
  for (int64_t g = group; g < group + count; ++g) {
    lanes.chunk[g].at_x = x.get(g, chunk.lanes) - lanes.pixel[g];
    lanes.chunk[g].at_y = y.get(g, chunk.lanes);
  }
}

// How far columns are from the pixels that the sums of a vector of lanes are about, and the squares. They are the same for all
// rows: of a few rows at least they are worked out once.
template <class A>
struct Offsets {
  static constexpr int64_t kMost = 64, kRows = 4;
  Vec<A> x[kMost], xx[kMost];
};

// Pixels of a row that are too few to fetch anything beside them.
constexpr int64_t kNarrow = 16;

// Pixels that are weighed at once.
constexpr int kPixels = KPFUSED_AVX512 ? 4 : 2;

// What a vector of lanes has of the mask of the next chunk, row by row.
template <class T>
KPFUSED_INLINE MaskWalk next_mask(const LanesChunk<T>& chunk, int64_t g) {
  const int64_t of_row = chunk.cols * kLanes<Acc<T>>;
  return {chunk.words.ahead, g * chunk.rows * of_row, of_row};
}

// Fetches that of some rows.
template <class T>
KPFUSED_INLINE void fetch_mask(const LanesChunk<T>& chunk, int64_t rows, MaskWalk& mask) {
  for (int64_t r = 0; r < rows; ++r, mask.advance(1)) {
    for (int64_t b = 0; b < chunk.cols * kLanes<Acc<T>>; b += 64) prefetch_at(mask.at(nullptr) + uintptr_t(b));
  }
}

// Adds the sums of a vector of lanes over columns [first, past) of a chunk, about these pixels. With kFetch rows fetch their
// share of the next mask, all of it at once: for a walk, pixel by pixel, the loop over them has no register left.
template <class T, Counts kCounts, bool kTabled, bool kFetch>
void add_moments(const LanesChunk<T>& chunk, int64_t g, int64_t first, int64_t past, const Falloff<Vec<Acc<T>>>& of,
                 Moments<Acc<T>, Vec<Acc<T>>>& to) {
  using A = Acc<T>;
  constexpr bool kListed = kCounts == Counts::listed;  // rows have columns of their own
  const int64_t offset = group_begin<A>(g, chunk.lanes);
  Moments<A, Vec<A>> sums = to;
  const A step = A(chunk.abreast);
  const Vec<A> x0 = splat(chunk.x0 + A(first) * step) - sums.at_x;
  Offsets<A> offsets;
  for (int64_t i = 0; kTabled && i < past - first; ++i) {
    const Vec<A> dx = x0 + A(i) * step;
    offsets.x[i] = dx, offsets.xx[i] = dx * dx;
  }
  MaskWalk mask = next_mask(chunk, g);
  Vec<A> dy = splat(chunk.y0) - sums.at_y;
  for (int64_t r = 0; r < chunk.rows; ++r, dy += A(1)) {
    if (kFetch && first == 0) fetch_mask(chunk, 1, mask);
    const T* const p = chunk.p + r * chunk.stride_y + offset;
    const LaneWord<A>* const words = kCounts == Counts::by_lanes ? chunk.words.at(r, 0) : nullptr;
    const Ahead ahead = ahead_of_row<1, kCounts>(chunk, g, r);
    const uint16_t* columns = nullptr;
    if constexpr (kListed) columns = chunk.list->columns + chunk.list->begins[r], past = pixels_of_row<kCounts>(chunk, r);
    const ListSpread spread(chunk.cols, past);
    Vec<A> row = {}, row_x = {}, row_xx = {}, dx = x0;
    const auto pixels = [&](auto size, int64_t i) __attribute__((always_inline)) {
      constexpr int N = decltype(size)::value;
      Vec<A> d[N], w[N];
      for (int j = 0; j < N; ++j) {
        const int64_t col = kListed ? columns[i + j] : i + j;
        PixelWords<kCounts, A> of_pixel(words + (i + j) * chunk.words.stride_x, g);
        w[j] = d[j] = of_pixel.next(distance(load(p + col * chunk.stride_x), of), of.lowest);
        fetch_ahead<kCounts>(chunk, ahead.at + (kListed ? spread.at(i + j) : i + j) * ahead.step, 0);
      }
      exp2<A, N>(w, of.scale);
      for (int j = 0; j < N; ++j) {
        if (kListed) dx = x0 + A(columns[i + j]);
        row += w[j];
        row_x += w[j] * (kTabled ? offsets.x[i + j - first] : dx);
        row_xx += w[j] * (kTabled ? offsets.xx[i + j - first] : dx * dx);
        sums.distance += w[j] * d[j];
        if (!kTabled) dx += step;
      }
    };
    int64_t i = first;
    for (; i + kPixels <= past; i += kPixels) pixels(Count<kPixels>{}, i);
    for (; i < past; ++i) pixels(Count<1>{}, i);
    const Vec<A> weighed = row * dy;
    sums.sum += row;
    sums.x += row_x;
    sums.y += weighed;
    sums.xx += row_xx;
    sums.xy += row_x * dy;
    sums.yy += weighed * dy;
  }
  to = sums;
}

template <class T, Counts kCounts>
KPFUSED_INLINE void lane_moments(const LanesChunk<T>& chunk, int64_t g, MomentLanes<Acc<T>>& lanes) {
  using A = Acc<T>;
  Moments<A, Vec<A>> sums = empty_moments<A, Vec<A>>();
  sums.peak = lanes.peak[g], sums.at_x = lanes.chunk[g].at_x, sums.at_y = lanes.chunk[g].at_y;
  const Falloff<Vec<A>> of = {lanes.sign[g], lanes.peak[g], lanes.scale[g], lanes.lowest[g]};
  const bool fetches = kCounts == Counts::by_lanes && chunk.words.ahead.run > 0, narrow = chunk.cols < kNarrow;
  // Narrow rows are over before a walk beside them is paid for.
  if (fetches && narrow) {
    MaskWalk mask = next_mask(chunk, g);
    fetch_mask(chunk, chunk.rows, mask);
  }
  const auto add = [&](auto tabled, int64_t first, int64_t past) __attribute__((always_inline)) {
    if constexpr (kCounts == Counts::by_lanes) {
      if (fetches && !narrow) return add_moments<T, kCounts, tabled, true>(chunk, g, first, past, of, sums);
    }
    add_moments<T, kCounts, tabled, false>(chunk, g, first, past, of, sums);
  };
  if constexpr (kCounts != Counts::listed) {
    for (int64_t first = 0; chunk.rows >= Offsets<A>::kRows && first < chunk.cols; first += Offsets<A>::kMost) {
      add(std::true_type{}, first, at_most(first + Offsets<A>::kMost, chunk.cols));
    }
  }
  if (kCounts == Counts::listed || chunk.rows < Offsets<A>::kRows) add(std::false_type{}, 0, chunk.cols);
  lanes.chunk[g] = sums;
}

}  // namespace kpfused::cpu::KPFUSED_ISA
