// SPDX-License-Identifier: MIT
// Masks that are copied in another order.
#include "cpu/masks.h"

#include <cstring>
#include <memory>
#include <string>

#include "calls.h"
#include "check.h"
#include "cpu/plan.h"
#include "maps.h"
#include "tests.h"

namespace native {
namespace {

// Two matrices, one behind the other in memory that ends with them, and copies whose columns lie apart. Rows overlap where the
// gap between them is less than none.
void run_transpose(int64_t rows, int64_t cols, int64_t gap) {
  const int64_t from_row = cols + gap, from_size = (rows - 1) * from_row + cols, to_col = rows + 5, to_size = cols * to_col;
  const std::unique_ptr<uint8_t[]> from(new uint8_t[size_t(2 * from_size)]), to(new uint8_t[size_t(2 * to_size)]);
  for (int64_t i = 0; i < 2 * from_size; ++i) from[size_t(i)] = uniform() < 0.5 ? 0 : uint8_t(1 + 255 * uniform());
  std::memset(to.get(), kUntouched, size_t(2 * to_size));
  cpu::ByteMatrices m{};
  m.from = from.get(), m.to = to.get(), m.rows = rows, m.cols = cols, m.from_row = from_row, m.to_col = to_col;
  m.dims = 1, m.size[0] = 2, m.from_step[0] = from_size, m.to_step[0] = to_size;
  cpu::transpose(m);
  bool same = true;
  for (int64_t i = 0; i < 2 * to_size; ++i) {
    const int64_t row = i % to_col, col = i % to_size / to_col;
    const uint8_t found = to[size_t(i)];
    if (row < rows) {
      same &= found == (from[size_t(i / to_size * from_size + row * from_row + col)] != 0);
    } else {
      same &= found == kUntouched;
    }
  }
  const std::string name = std::to_string(rows) + " rows of " + std::to_string(cols) + " bytes";
  check(same, "copy of " + name + ", " + std::to_string(gap) + " bytes apart");
}

}  // namespace

// Fewer rows and columns than squares have, as many, and more; more than a thread takes at once, and so many that the last of
// them has three rows.
void test_masks_in_another_order() {
  for (int64_t rows : {1, 7, 8, 9, 16, 17, 64, 72, 100, 127, 128, 129, 136, 4100}) {
    threads = rows > 128 ? 3 : 1;
    for (int64_t cols : {1, 2, 3, 15, 16, 17, 33, 48}) {
      for (int64_t gap : {0, 3, -1}) {
        if (cols + gap > 1) run_transpose(rows, cols, gap);
      }
    }
  }
  for (int64_t cols : {2, 3}) run_transpose(cpu::kGrainElements / cols / 128 * 128 + 3, cols, 0);
  threads = 1;
}

}  // namespace native
