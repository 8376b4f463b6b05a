// SPDX-License-Identifier: MIT
// Memory that begins with a cache line: a vector as wide as one would otherwise touch two.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace kpfused::cpu::KPFUSED_ISA {

constexpr std::align_val_t kLine{64};

struct FreeLines {
  void operator()(void* p) const { ::operator delete(p, kLine); }
};
template <class T>
using Lines = std::unique_ptr<T[], FreeLines>;

// Uninitialised.
template <class T>
Lines<T> make_lines(int64_t count) {
  return Lines<T>(static_cast<T*>(::operator new(size_t(count) * sizeof(T), kLine)));
}
// Zeros.
template <class T>
Lines<T> make_zero_lines(int64_t count) {
  Lines<T> lines = make_lines<T>(count);
  __builtin_memset(lines.get(), 0, size_t(count) * sizeof(T));
  return lines;
}

}  // namespace kpfused::cpu::KPFUSED_ISA
