// SPDX-License-Identifier: MIT
// Switching between stacks: a few instructions on x86-64, ucontext elsewhere (its system calls cost ten times as much).
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#define KPFUSED_SIMT_UCONTEXT 1
#endif

#if defined(KPFUSED_SIMT_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(KPFUSED_SIMT_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

#if defined(KPFUSED_SIMT_UCONTEXT)

struct Context {
  ucontext_t registers;
};

inline void swap_context(Context* from, Context* to) { swapcontext(&from->registers, &to->registers); }

inline void make_context(Context* context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context->registers);
  context->registers.uc_stack.ss_sp = stack;
  context->registers.uc_stack.ss_size = bytes;
  context->registers.uc_link = nullptr;
  makecontext(&context->registers, entry, 0);
}

#else

struct Context {
  void* stack_pointer;
};

extern "C" void kpfused_simt_swap(void** save, void* load);

// The registers a callee must preserve; the rest are dead across a call.
asm(R"(
  .text
  .p2align 4
  .type kpfused_simt_swap, @function
kpfused_simt_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size kpfused_simt_swap, .-kpfused_simt_swap
)");

inline void swap_context(Context* from, Context* to) { kpfused_simt_swap(&from->stack_pointer, to->stack_pointer); }

inline void make_context(Context* context, char* stack, size_t bytes, void (*entry)()) {
  // At entry the stack pointer is 8 below a multiple of 16, as after a call; zeros above it end every backtrace.
  auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
  auto* slots = reinterpret_cast<uint64_t*>(top) - 8;
  for (int i = 0; i < 8; ++i) slots[i] = 0;
  slots[6] = reinterpret_cast<uint64_t>(entry);
  context->stack_pointer = slots;
}

#endif

// A stack with what AddressSanitizer wants to know about it.
struct Fiber {
  Context context{};
  char* stack = nullptr;  // null: the stack the program started on, whose bounds are learnt at the first switch
  size_t bytes = 0;
  void* fake_stack = nullptr;
};

inline void switch_fiber(Fiber* from, Fiber* to) {
#if defined(KPFUSED_SIMT_ASAN)
  __sanitizer_start_switch_fiber(&from->fake_stack, to->stack, to->bytes);
#endif
  swap_context(&from->context, &to->context);
#if defined(KPFUSED_SIMT_ASAN)
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

// To be called first thing on a new fiber.
inline void enter_fiber(Fiber* creator) {
#if defined(KPFUSED_SIMT_ASAN)
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  creator->stack = static_cast<char*>(const_cast<void*>(bottom));
  creator->bytes = bytes;
#else
  (void)creator;
#endif
}

}  // namespace simt
