// SPDX-License-Identifier: MIT
// What every thread reads and writes, element by element. The kernels are compiled with -fsanitize=thread, which makes
// the compiler call a function at each access; access.cpp supplies these functions in place of ThreadSanitizer's
// runtime and finds, whatever the order the threads ran in:
//   - races: two threads touch an element, one writes, and no barrier lies between. As in CUDA, __syncthreads and
//     __syncwarp order memory; shuffles and votes do not;
//   - reads of shared memory and of outputs that nobody has written;
//   - accesses outside the pixels of the maps, even where the allocation goes on: row padding, sliced-off columns;
//   - outputs written twice or never, and how often the maps were read.
// Builds under AddressSanitizer cannot be instrumented so, and leave these calls empty.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt::access {

enum class Use { input, output, workspace };

#if defined(KPFUSED_SIMT_ACCESS)
constexpr bool kEnabled = true;
// Bytes that belong to nobody on both sides of shared memory.
constexpr size_t kMargin = 1024;

// Memory that kernels may touch. `valid` has one entry per element: non-zero where kernels may go. Null: everywhere.
void watch(const char* name, const void* begin, size_t elements, size_t element_bytes, const uint8_t* valid, Use use);
// Every allocation a kernel could stray into; an access there but outside the watched ranges is a fault.
void guard(const void* begin, size_t bytes);
void forget_all();

// Over the valid elements of a watched range: how often the average one was read since it was watched, and how many
// were never written.
double reads_per_element(const char* name);
size_t unwritten_elements(const char* name);

// For the scheduler.
void start_launch();
void start_block(const char* shared, size_t bytes);
void start_thread(int thread, const char* stack, size_t stack_bytes);  // thread -1: the host
void barrier();
void sync_warp(int warp, unsigned mask);
#else
constexpr bool kEnabled = false;
constexpr size_t kMargin = 0;
inline void watch(const char*, const void*, size_t, size_t, const uint8_t*, Use) {}
inline void guard(const void*, size_t) {}
inline void forget_all() {}
inline double reads_per_element(const char*) { return 0; }
inline size_t unwritten_elements(const char*) { return 0; }
inline void start_launch() {}
inline void start_block(const char*, size_t) {}
inline void start_thread(int, const char*, size_t) {}
inline void barrier() {}
inline void sync_warp(int, unsigned) {}
#endif

}  // namespace simt::access
