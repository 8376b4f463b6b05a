// SPDX-License-Identifier: MIT
// Large outputs come from the allocator as fresh pages, and to fault them in 4 KB at a time costs several times what it
// takes to write them. Where the system hands out huge pages on request, ask.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kpfused::cpu {

// Advice only: the memory's contents and the program's meaning stay as they are, whatever the system makes of it.
inline void prefer_huge_pages(void* begin, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + bytes) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace kpfused::cpu
