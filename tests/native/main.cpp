// SPDX-License-Identifier: MIT
// The CPU kernels on their own, against a plain reference in extended precision. No Python and no torch: sanitizers see
// nothing else.
//
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined -Icsrc -Itests tests/native/*.cpp csrc/cpu/*.cpp -pthread
//   KPFUSED_CPU_CAPABILITY=baseline ./a.out
//
// Built with -DKPFUSED_CPU_VECTOR_BYTES=64, the "avx2" capability runs vectors as wide as those of AVX-512.
#include <cstdint>
#include <cstdio>
#include <thread>
#include <vector>

#include "calls.h"
#include "check.h"
#include "cpu/parallel.h"
#include "cpu/soft_argmax2d.h"
#include "tests.h"

int64_t kpfused::cpu::threads() { return native::threads; }

// As many threads as `threads` says, whatever the grain: tests want the seams.
void kpfused::cpu::parallel_ranges(int64_t count, int64_t, RangeBody body, void* context) {
  const int threads = native::threads;
  std::vector<std::thread> pool;
  for (int64_t t = 1; t < threads; ++t) {
    const int64_t begin = count * t / threads, end = count * (t + 1) / threads;
    if (begin < end) pool.emplace_back(body, begin, end, context);
  }
  if (count / threads > 0) body(0, count / threads, context);
  for (std::thread& thread : pool) thread.join();
}

int main() {
  native::test_mean();
  native::test_cuts();
  native::test_moments();
  native::test_expectations();
  native::test_masks_in_another_order();
  std::printf("%s: %d passed, %d failed\n", kpfused::cpu::capability(), native::passed, native::failed);
  return native::failed != 0;
}
