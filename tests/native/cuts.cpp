// SPDX-License-Identifier: MIT
// How the launch plan cuts an extent.
#include <string>

#include "check.h"
#include "cpu/plan.h"
#include "tests.h"

namespace native {

// Pieces of an extent: none too large, none empty, beginning at multiples, the larger ones first.
void test_cuts() {
  for (int64_t multiple : {1, 3, 64}) {
    for (int64_t extent = 1; extent <= 700; ++extent) {
      for (int64_t most = 2 * multiple; most <= 2 * multiple + 200; most += 7) {
        const cpu::Cut c = cpu::cut(extent, most, multiple);
        bool holds = c.begin(0) == 0 && c.begin(c.count) == extent;
        for (int64_t i = 0; i < c.count; ++i) {
          holds &= c.size(i) >= 1 && c.size(i) <= most && c.begin(i) % multiple == 0;
          if (i > 0 && i + 1 < c.count) holds &= c.size(i) <= c.size(i - 1) && c.size(i - 1) <= c.size(i) + multiple;
        }
        check(holds, "cut of " + std::to_string(extent) + " into pieces of at most " + std::to_string(most));
      }
    }
  }
}

}  // namespace native
