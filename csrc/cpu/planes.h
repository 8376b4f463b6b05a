// SPDX-License-Identifier: MIT
// Planes of pixels in any layout, maps or channels of their values, as runs of pixels in row order and back. Planes that
// stand side by side in memory, pixel after pixel, are transposed in squares of vectors.
#pragma once

#include <utility>

#include "counting.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Pixels of a run.
template <class A>
constexpr int64_t kTile = 1024 / int64_t(sizeof(A));

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

// Where planes lie, `stride` from each to the next.
template <class T>
struct Planes {
  T* p;
  int64_t stride, stride_y, stride_x;
  int64_t width;

  KPFUSED_INLINE bool dense() const { return stride_x == 1 && stride_y == width; }
  // Columns up to the end of memory's next gap, for pixels below `end`.
  KPFUSED_INLINE int64_t row_length(int64_t end) const { return stride_y == width * stride_x ? end : width; }
  KPFUSED_INLINE bool side_by_side(int count) const { return count > 1 && stride == 1 && stride_x != 1; }
  KPFUSED_INLINE T* at(int64_t plane, int64_t row, int64_t col) const {
    return p + plane * stride + row * stride_y + col * stride_x;
  }
};

// ---- Squares of vectors ---------------------------------------------------------------------------------------------

template <class T>
constexpr int kSquare = sizeof(T) == 8 ? 4 : 8;

template <class T>
struct SquareRow {
  typedef Bits<T> type __attribute__((vector_size(kSquare<T> * sizeof(T))));
};

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define KPFUSED_SQUARES 1

// One step: squares of `side` elements off the diagonal change places, within all squares of twice that.
template <int side, class V, size_t... i>
KPFUSED_INLINE void swap_squares(V& upper, V& lower, std::index_sequence<i...>) {
  constexpr int n = sizeof...(i);
  const V a = upper, b = lower;
  upper = __builtin_shufflevector(a, b, ((int(i) & side) == 0 ? int(i) : n + int(i) - side)...);
  lower = __builtin_shufflevector(a, b, ((int(i) & side) == 0 ? int(i) + side : n + int(i))...);
}

template <int side, class V, int N>
KPFUSED_INLINE void transpose_rows(V (&rows)[N]) {
  for (int i = 0; i < N; ++i) {
    if ((i & side) == 0) swap_squares<side>(rows[i], rows[i + side], std::make_index_sequence<N>{});
  }
  if constexpr (side > 1) transpose_rows<side / 2>(rows);
}
#endif
#endif

// to(j)[i] = from(i)[j] for i < rows and j < cols, where from(i) and to(j) point to the elements of a row in turn. The last
// squares overlap those before them.
template <class T, class From, class To>
KPFUSED_INLINE void transpose(int64_t rows, int64_t cols, const From& from, const To& to) {
#ifdef KPFUSED_SQUARES
  constexpr int N = kSquare<T>;
  if (rows >= N && cols >= N) {
    for (int64_t y = 0; y < rows; y += N) {
      for (int64_t x = 0; x < cols; x += N) {
        const int64_t row = at_most(y, rows - N), col = at_most(x, cols - N);
        typename SquareRow<T>::type square[N];
        for (int i = 0; i < N; ++i) __builtin_memcpy(&square[i], from(row + i) + col, sizeof(square[i]));
        transpose_rows<N / 2>(square);
        for (int i = 0; i < N; ++i) __builtin_memcpy(to(col + i) + row, &square[i], sizeof(square[i]));
      }
    }
    return;
  }
#endif
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) to(j)[i] = from(i)[j];
  }
}

// ---- In and out -----------------------------------------------------------------------------------------------------

// Points run[i], for each of `count` planes, to pixels [first, first + pixels) as whole vectors: in place, or copied to
// buffer + i * kTile. counting[i], null where all pixels of all planes count, tells which of a plane do: the others are
// otherwise[i] there, and those beyond a valid size are not read.
template <class T>
__attribute__((noinline)) void read_planes(const Planes<const T>& from, int count, int64_t first, int64_t pixels,
                                           const Counting* const* counting, const T* otherwise, T* buffer,
                                           const T** run) {
  constexpr int64_t kRun = kTile<Acc<T>>;
  const bool in_place = from.dense() && pixels % kLanes<Acc<T>> == 0;
  const auto valid = [&](int i, int64_t row, int64_t col, int64_t n) {
    const Counting* const c = counting[i];
    return !c ? n : row < c->rows ? at_most(at_least(c->cols - col, 0), n) : 0;
  };
  const bool together = from.side_by_side(count);
  for (int i = 0; i < count; ++i) run[i] = in_place && !counting[i] ? from.at(i, 0, 0) + first : buffer + i * kRun;
  if (in_place && !counting[0]) return;
  const int64_t width = counting[0] ? from.width : from.row_length(first + pixels);
  for_pieces(first, pixels, width, [&](int64_t at, int64_t row, int64_t col, int64_t n) {
    if (together) {
      int64_t most = 0;
      for (int i = 0; i < count; ++i) most = at_least(most, valid(i, row, col, n));
      const T* const pixel = from.at(0, row, col);
      const auto of_pixel = [&](int64_t k) {
        prefetch(pixel + k * from.stride_x, kReadAhead);
        return pixel + k * from.stride_x;
      };
      transpose<T>(most, count, of_pixel, [&](int64_t i) { return buffer + i * kRun + at; });
    }
    for (int i = 0; i < count; ++i) {
      const T* source = from.at(i, row, col);
      T* const to = buffer + i * kRun + at;
      if (from.stride_x != 1) {
        for (int64_t k = 0, some = together ? 0 : valid(i, row, col, n); k < some; ++k) to[k] = source[k * from.stride_x];
        source = to;
      }
      if (counting[i]) {
        copy_counting(source, to, n, otherwise[i], *counting[i], row, col);
      } else if (source != to) {
        __builtin_memcpy(to, source, size_t(n) * sizeof(T));
      }
    }
  });
  for (int i = 0; i < count; ++i) {
    for (int64_t k = pixels; k < whole_vectors<Acc<T>>(pixels); ++k) buffer[i * kRun + k] = T{};
  }
}

// And back: tile[i] holds pixels [first, first + pixels) of plane i, whole vectors of them.
template <class T>
__attribute__((noinline)) void write_planes(const Acc<T>* const* tile, const Planes<T>& to, int count, int64_t first, int64_t pixels) {
  using A = Acc<T>;
  constexpr int L = kLanes<A>, kMost = 16;
  const bool in_place = to.dense() && pixels % L == 0;
  for (int begin = 0; begin < count; begin += kMost) {
    const int some = int(at_most(count - begin, kMost));
    alignas(64) T buffer[kMost][kTile<A>];
    const T* run[kMost];
    for (int i = 0; i < some; ++i) {
      T* const into = in_place ? to.at(begin + i, 0, 0) + first : buffer[i];
      run[i] = into;
      if constexpr (std::is_same_v<T, A>) {
        if (!in_place) {
          run[i] = tile[begin + i];
          continue;
        }
      }
      for (int64_t k = 0; k < pixels; k += L) {
        store(into + k, load_vector(tile[begin + i] + k));
        if (in_place) prefetch_for_write(into + k, kWriteAhead);
      }
    }
    if (in_place) continue;
    for_pieces(first, pixels, to.row_length(first + pixels), [&](int64_t at, int64_t row, int64_t col, int64_t n) {
      if (to.side_by_side(some)) {
        T* const pixel = to.at(begin, row, col);
        transpose<T>(some, n, [&](int64_t i) { return run[i] + at; }, [&](int64_t k) { return pixel + k * to.stride_x; });
        return;
      }
      for (int i = 0; i < some; ++i) {
        T* const into = to.at(begin + i, row, col);
        if (to.stride_x == 1) {
          __builtin_memcpy(into, run[i] + at, size_t(n) * sizeof(T));
        } else {
          for (int64_t k = 0; k < n; ++k) into[k * to.stride_x] = run[i][at + k];
        }
      }
    });
  }
}

// Zero in place of what does not count.
template <class A>
__attribute__((noinline)) void clear_uncounted(A* tile, const Counting& counting, int64_t width, int64_t first, int64_t count) {
  for_pieces(first, count, width, [&](int64_t i, int64_t row, int64_t col, int64_t n) {
    copy_counting(tile + i, tile + i, n, A(0), counting, row, col);
  });
}

}  // namespace kpfused::cpu::KPFUSED_ISA
