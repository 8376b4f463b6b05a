// SPDX-License-Identifier: MIT
// The thread pool that CPU kernels run on, given by whoever links them: torch's own in the extension (csrc/torch), a
// plain loop in stand-alone tests.
#pragma once

#include <cstdint>

namespace kpfused::cpu {

using RangeBody = void (*)(int64_t begin, int64_t end, void* context);

// How many threads of the pool may run at once.
int64_t threads();

// Calls body on disjoint ranges that cover [0, count), each at least `grain` long where count allows it.
void parallel_ranges(int64_t count, int64_t grain, RangeBody body, void* context);

template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f) {
  parallel_ranges(
      count, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<F*>(&f));
}

}  // namespace kpfused::cpu
