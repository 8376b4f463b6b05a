// SPDX-License-Identifier: MIT
// Masks in another order than kernels go, as a comparison of a channels_last tensor is beside contiguous maps: each byte would
// cost a line of memory, so copies are read.
#pragma once

#include <cstdint>

namespace kpfused::cpu {

// Matrices of bytes: element (i, j) is at from[i * from_row + j], and that of the copy at to[j * to_col + i], zero where the
// other is and elsewhere one. Or the copy is bits, an eighth as large: then it is bit i % 8 of to[j * to_col + i / 8], and those
// beyond the last row may be anything.
struct ByteMatrices {
  static constexpr int kExtents = 6;

  const uint8_t* from;
  uint8_t* to;
  int64_t rows, cols;
  int64_t from_row, to_col;
  bool bits;
  // How many there are in each of some dimensions, and how far it is from one to the next.
  int dims;
  int64_t size[kExtents], from_step[kExtents], to_step[kExtents];
};

void transpose(const ByteMatrices& matrices);

}  // namespace kpfused::cpu
