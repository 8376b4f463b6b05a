// SPDX-License-Identifier: MIT
// Forward where lanes run along rows (stride_x == 1): maps chunk by chunk, merged in order; sums_rows.h and
// moments_rows.h have what is done to a chunk. Writes 6 accumulators a map, or 17 with moments.
#pragma once

#include <type_traits>

#include "counting.h"
#include "moments_rows.h"
#include "sums_rows.h"

namespace kpfused::cpu::KPFUSED_ISA {

// The forward of one thread's range of (map, part).
template <class T, bool kMoments>
class ForwardRows {
 public:
  using A = Acc<T>;
  using S = std::conditional_t<kMoments, Moments<A>, State<A>>;

  explicit ForwardRows(const ForwardParams& params) : params_(params), view_(params.view), plan_(view_) {
    if (plan_.flat) table_.fill(view_.height, view_.width);
  }

  __attribute__((noinline)) void run(int64_t begin, int64_t end) const {
    const T* base = static_cast<const T*>(params_.heatmap);
    const bool split = plan_.parts.count() > 1, all = params_.pixels.all();
    const Tiling chunks = chunks_of(view_.height, view_.width);
    MapWalk walk(view_, split ? 0 : begin);
    if (plan_.flat && all && !split && chunks.count() == 1) {
      // Tiny maps: what goes on between their pixels is most of their time.
      for (int64_t map = begin; map < end; ++map, walk.advance()) {
        const Sharpness<A> sharp = sharpness(beta_of<A>(params_.beta, map));
        write_result(params_, map, flat_span(base + walk.offset(), view_.stride_y, view_.height, 0, sharp, nothing()));
      }
      return;
    }
    // One call for whole maps and parts, since the compiler unfolds all of a part's loops into each.
    for (int64_t item = begin; item < end; ++item) {
      Part part = {item, base + walk.offset(), 0, 0, chunks, nullptr};
      if (split) {
        part = part_of(base, item);
      } else {
        walk.advance();
        part.next = item + 1 < end ? base + walk.offset() : part.p;
      }
      const S state = all ? of_part(part) : of_counting(part);
      split ? write_state(params_, item, state) : write_result(params_, item, state);
    }
  }

 private:
  struct Part {
    int64_t map;
    const T* p;
    int64_t row, col;
    Tiling chunks;
    const T* next;  // where to read on afterwards
  };

  static constexpr int64_t kBytes = chunk_bytes(kMoments);

  // Whether bits of a mask are what the sums take, rather than a copy of what counts: they are whole bytes for each row.
  bool by_bits(int64_t cols) const { return KPFUSED_AVX512 && !kMoments && !plan_.flat && cols % 8 == 0; }

  // Beside a copy, a chunk is two: as it is in memory, and in the buffer. The mask's layout must not matter: it may be another
  // for a map alone.
  Tiling chunks_of(int64_t rows, int64_t cols) const {
    return plan_.chunks(rows, cols, params_.pixels.mask && !by_bits(view_.width) ? kGatherBytes : kBytes);
  }

  Part part_of(const T* base, int64_t item) const {
    const Tiling& parts = plan_.parts;
    const int64_t map = item / parts.count(), index = item % parts.count();
    const int64_t i = index / parts.x.count, j = index % parts.x.count;
    const int64_t row = parts.y.begin(i), col = parts.x.begin(j);
    const T* p = base + map_offset(view_, map) + row * view_.stride_y + col;
    const T* next = j + 1 == parts.x.count ? p - col + parts.y.size(i) * view_.stride_y : p + parts.x.size(j);
    return {map, p, row, col, chunks_of(parts.y.size(i), parts.x.size(j)), next};
  }

  static S nothing() {
    if constexpr (kMoments) {
      return empty_moments<A>();
    } else {
      return empty_state<A>();
    }
  }

  KPFUSED_INLINE S of_part(const Part& part) const {
    const Sharpness<A> sharp = sharpness(beta_of<A>(params_.beta, part.map));
    S state = nothing();
    for (int64_t i = 0; i < part.chunks.y.count; ++i) {
      for (int64_t j = 0; j < part.chunks.x.count; ++j) {
        const S next = chunk(part, i, j, sharp, state);
        state = i + j == 0 ? next : merge(state, next, sharp.scale, ScalarExp2{});
      }
    }
    return state;
  }

  KPFUSED_INLINE S chunk(const Part& part, int64_t i, int64_t j, const Sharpness<A>& sharp, const S& so_far) const {
    const Cut &y = part.chunks.y, &x = part.chunks.x;
    const int64_t row = part.row + y.begin(i), col = part.col + x.begin(j);
    const T* p = part.p + y.begin(i) * view_.stride_y + x.begin(j);
    if (plan_.flat) return flat_chunk(p, view_.stride_y, y.size(i), row, sharp, so_far);
    return rows_chunk({p, view_.stride_y, y.size(i), x.size(j), centred<A>(col, view_.width),
                       centred<A>(row, view_.height), after(part, i, j), view_.stride_y},
                      sharp, so_far);
  }

  static KPFUSED_INLINE S rows_chunk(const RowsChunk<T>& chunk, const Sharpness<A>& sharp, const S& so_far) {
    if constexpr (kMoments) {
      return chunk_moments(chunk, sharp, so_far);
    } else {
      return chunk_sums(chunk, sharp);
    }
  }

  KPFUSED_INLINE S flat_span(const T* p, int64_t stride_y, int64_t rows, int64_t row, const Sharpness<A>& sharp,
                             const S& so_far) const {
    const A shift = table_.shift(row, view_.height);
    const int64_t n = rows * view_.width;
    alignas(64) T buffer[kTable<A>];
    if (n < kLanes<A> || (stride_y != view_.width && rows > 1)) {
      gather_rows(p, stride_y, rows, view_.width, buffer);
      for (int64_t i = n; i < kLanes<A>; ++i) buffer[i] = buffer[0];
      p = buffer;
    }
    if constexpr (kMoments) {
      return flat_moments(p, n, table_, shift, sharp, so_far);
    } else {
      State<A> state = flat_sums(p, n, table_, sharp);
      state.sum_y += state.sum * shift;
      return state;
    }
  }

  // Not unfolded into its callers.
  S flat_chunk(const T* p, int64_t stride_y, int64_t rows, int64_t row, const Sharpness<A>& sharp,
               const S& so_far) const {
    return flat_span(p, stride_y, rows, row, sharp, so_far);
  }

  // Where reading goes on after a chunk.
  const T* after(const Part& part, int64_t i, int64_t j) const {
    const Cut &y = part.chunks.y, &x = part.chunks.x;
    if (j + 1 < x.count) return part.p + y.begin(i) * view_.stride_y + x.begin(j + 1);
    return i + 1 < y.count ? part.p + y.begin(i + 1) * view_.stride_y : part.next;
  }

  // A part of which not all pixels count.
  S of_counting(const Part& part) const {
    const Sharpness<A> sharp = sharpness(beta_of<A>(params_.beta, part.map));
    const Counting counting = counting_of(params_.pixels, view_, part.map);
    // Rows are counted by pieces of average width, and none is twice as wide.
    alignas(64) T buffer[2 * kBytes / sizeof(T)];
    uint8_t bytes[2 * kBytes / sizeof(T) + kMaskRoom];
    S state = nothing();
    for (int64_t i = 0; i < part.chunks.y.count; ++i) {
      for (int64_t j = 0; j < part.chunks.x.count; ++j) {
        const int64_t row = part.row + part.chunks.y.begin(i), col = part.col + part.chunks.x.begin(j);
        const int64_t rows = at_most(part.chunks.y.size(i), counting.rows - row);
        if (rows <= 0 || col >= counting.cols || rows_are(false, counting, row, rows)) continue;
        state = merge(state, counting_chunk(part, i, j, rows, counting, sharp, state, buffer, bytes), sharp.scale,
                      ScalarExp2{});
      }
    }
    return state;
  }

  // Its first `rows` rows, in place where what counts is a rectangle, otherwise from a buffer.
  KPFUSED_INLINE S counting_chunk(const Part& part, int64_t i, int64_t j, int64_t rows, Counting counting,
                                  const Sharpness<A>& sharp, const S& so_far, T* buffer, uint8_t* bytes) const {
    const int64_t y = part.chunks.y.begin(i), x = part.chunks.x.begin(j), row = part.row + y, col = part.col + x;
    int64_t cols = part.chunks.x.size(j);
    counting.begin_at(row, col);
    const int64_t valid = at_most(cols, counting.cols);
    const T* const p = part.p + y * view_.stride_y + x;
    const A x0 = centred<A>(col, view_.width), y0 = centred<A>(row, view_.height);
    RowsChunk<T> chunk = {p, view_.stride_y, rows, valid, x0, y0, after(part, i, j), view_.stride_y};
    const bool enough = !plan_.flat && valid >= kLanes<A>;
    if (counting.mask && counting.stride_x == 1) chunk.mask = counting.mask, chunk.mask_y = counting.stride_y;
    if (enough && (!counting.mask || all_set(counting, {0, rows, 0, valid}))) return rows_chunk(chunk, sharp, so_far);
#if KPFUSED_AVX512
    if constexpr (!kMoments) {
      if (enough && counting.stride_x <= 1 && counting.bit == 0 && by_bits(valid)) {
        if (counting.in_bits()) chunk.bits = counting.mask, chunk.bits_y = counting.stride_y;
        return sums_by_bits<kBytes>(chunk, counting.mask, counting.stride_y, sharp);
      }
    }
#endif
    if (counting.mask && counting.stride_x != 1 && !counting.by_rows()) {
      copy_mask(counting, rows, valid, bytes);
      counting.mask = bytes, counting.stride_y = valid, counting.stride_x = 1;
    }
    if (!plan_.flat) cols = at_least(valid, kLanes<A>);
    chunk.p = buffer, chunk.stride_y = chunk.cols = cols;
    const T otherwise = weightless<T>(sharp.sign);
    A peak;
    if constexpr (std::is_same_v<T, A>) {
      if (counting.mask && counting.stride_x == 1) {
        peak = copy_counting_with_peak(p, view_.stride_y, rows, cols, buffer, otherwise, counting, 0, 0);
        chunk.peak = &peak;
      }
    }
    if (!chunk.peak) copy_counting_rows(p, view_.stride_y, rows, cols, buffer, otherwise, counting, 0, 0);
    return plan_.flat ? flat_chunk(buffer, cols, rows, row, sharp, so_far) : rows_chunk(chunk, sharp, so_far);
  }

  const ForwardParams& params_;
  const MapView& view_;
  RowPlan<T> plan_;
  FlatTable<A> table_;
};

}  // namespace kpfused::cpu::KPFUSED_ISA
