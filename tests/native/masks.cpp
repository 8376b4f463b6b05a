// SPDX-License-Identifier: MIT
// Masks that are copied in another order.
#include "cpu/masks.h"

#include <algorithm>
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

// Two matrices, one behind the other in memory that ends with them, and copies whose columns lie apart, as bytes or as bits.
// Rows overlap where the gap between them is less than none.
void run_transpose(int64_t rows, int64_t cols, int64_t gap, bool bits = false) {
  const int64_t in_byte = bits ? 8 : 1, to_col = (rows + in_byte - 1) / in_byte + 5, to_size = cols * to_col;
  const int64_t from_row = cols + gap, from_size = (rows - 1) * from_row + cols;
  const std::unique_ptr<uint8_t[]> from(new uint8_t[size_t(2 * from_size)]), to(new uint8_t[size_t(2 * to_size)]);
  for (int64_t i = 0; i < 2 * from_size; ++i) from[size_t(i)] = uniform() < 0.5 ? 0 : uint8_t(1 + 255 * uniform());
  std::memset(to.get(), kUntouched, size_t(2 * to_size));
  cpu::ByteMatrices m{};
  m.from = from.get(), m.to = to.get(), m.rows = rows, m.cols = cols, m.from_row = from_row, m.to_col = to_col;
  m.bits = bits;
  m.dims = 1, m.size[0] = 2, m.from_step[0] = from_size, m.to_step[0] = to_size;
  cpu::transpose(m);
  bool same = true;
  for (int64_t i = 0; i < 2 * to_size; ++i) {
    const int64_t row = i % to_col * in_byte, col = i % to_size / to_col;
    const int64_t some = std::min(in_byte, std::max(rows - row, int64_t{0}));
    uint8_t wanted = some ? 0 : kUntouched;
    for (int64_t k = 0; k < some; ++k) {
      wanted |= uint8_t((from[size_t(i / to_size * from_size + (row + k) * from_row + col)] != 0) << k);
    }
    const uint8_t found = to[size_t(i)];
    same &= (some && bits ? found & ((1 << some) - 1) : found) == wanted;
  }
  const std::string name = std::to_string(rows) + " rows of " + std::to_string(cols) + (bits ? " bytes as bits" : " bytes");
  check(same, "copy of " + name + ", " + std::to_string(gap) + " bytes apart");
}

}  // namespace

// Fewer rows and columns than squares have, as many, and more; more than a thread takes at once, and so many that the last of
// them has three rows. Of one column every second, third and fourth byte.
void test_masks_in_another_order() {
  for (int64_t rows : {1, 7, 8, 9, 16, 17, 64, 72, 100, 127, 128, 129, 136, 4100, 4104}) {
    threads = rows > 128 ? 3 : 1;
    for (int64_t cols : {1, 2, 3, 15, 16, 17, 33, 48}) {
      for (int64_t gap : {0, 1, 2, 3, -1, 70}) {
        if (cols + gap <= 1) continue;
        run_transpose(rows, cols, gap);
        run_transpose(rows, cols, gap, true);
      }
    }
  }
  for (int64_t cols : {2, 3}) run_transpose(cpu::kGrainElements / cols / 128 * 128 + 3, cols, 0);
  threads = 1;
}

}  // namespace native
