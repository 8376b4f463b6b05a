// SPDX-License-Identifier: MIT
// Masks that are copied in another order.
#include "cpu/masks.h"

#include <memory>
#include <string>

#include "check.h"
#include "maps.h"
#include "tests.h"

namespace native {
namespace {

// Two matrices, of rows `gap` bytes apart, in memory that ends with them.
void run_transpose(int64_t rows, int64_t cols, int64_t gap) {
  const int64_t from_row = cols + gap, from_size = rows * from_row, size = rows * cols;
  const int64_t bytes = 2 * from_size - gap;
  const std::unique_ptr<uint8_t[]> from(new uint8_t[size_t(bytes)]), to(new uint8_t[size_t(2 * size)]);
  for (int64_t i = 0; i < bytes; ++i) from[size_t(i)] = uniform() < 0.5 ? 0 : uint8_t(1 + 255 * uniform());
  cpu::ByteMatrices m{};
  m.from = from.get(), m.to = to.get(), m.rows = rows, m.cols = cols, m.from_row = from_row, m.to_col = rows;
  m.dims = 1, m.size[0] = 2, m.from_step[0] = from_size, m.to_step[0] = size;
  cpu::transpose(m);
  bool same = true;
  for (int64_t i = 0; i < 2 * size; ++i) {
    const uint8_t set = from[size_t(i / size * from_size + i % size % rows * from_row + i % size / rows)];
    same &= (to[size_t(i)] != 0) == (set != 0);
  }
  check(same, "copy of " + std::to_string(rows) + " rows of " + std::to_string(cols) + " bytes");
}

}  // namespace

// Fewer rows and columns than squares have, as many, and more; more than a thread takes at once.
void test_masks_in_another_order() {
  for (int64_t rows : {1, 2, 15, 16, 17, 63, 64, 65, 130, 4100}) {
    for (int64_t cols : {1, 2, 3, 15, 16, 17, 33, 48}) {
      for (int64_t gap : {0, 3}) run_transpose(rows, cols, gap);
    }
  }
}

}  // namespace native
