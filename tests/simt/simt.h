// SPDX-License-Identifier: MIT
// CUDA's language on the CPU: enough of it to compile the project's kernels with a C++ compiler and to run every CUDA
// thread as a fiber, one block after another, so that AddressSanitizer, UBSan and the checks of simt.cpp see a fault
// on machines without a GPU. What is not here does not compile: __activemask, say, has no defined answer.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <set>
#include <string>
#include <type_traits>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt {

// In which order ready threads and blocks run. Every order is a legal schedule of the same program.
enum class Order { ascending, descending, warps, random };
constexpr int kOrders = 4;
const char* order_name(Order order);
void set_order(Order order, uint64_t seed);

// Runs `thread` for every thread of the grid, and returns when all are done. `signature` names the closure's type, and
// with it the template arguments of the function that launches.
using ThreadFunction = void (*)(const void* closure);
void launch(const char* kernel, const char* signature, dim3 grid, dim3 block, size_t shared_bytes,
            ThreadFunction thread, const void* closure);

template <class Closure>
void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const Closure& closure) {
  launch(
      kernel, __PRETTY_FUNCTION__, grid, block, shared_bytes,
      [](const void* c) { (*static_cast<const Closure*>(c))(); }, &closure);
}

// Every kernel that has run, with the function that launched it: "rows_forward<T, V> by forward<float, 4>".
const std::set<std::string>& kernels_run();

// The running block's dynamic shared memory, at a multiple of 16 bytes and filled with NaN when the block starts.
void* shared_memory();

// Raises a kernel's limit of dynamic shared memory from 48 KB, as cudaFuncSetAttribute does.
void allow_shared_memory(size_t bytes);

// Reports what is wrong, with kernel, block and thread, and ends the program with kFaultStatus.
constexpr int kFaultStatus = 70;
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

// What the program is doing, for reports.
extern char context[512];

struct Site {
  const char* file;
  int line;
};

enum class Call { sync_warp, shuffle, shuffle_up, shuffle_down, shuffle_xor, any, all, ballot };

// One of the calls that all lanes named by `mask` make together. Returns what this lane receives.
uint64_t collective(Call call, unsigned mask, uint64_t value, int argument, int width, Site site);

enum class Vote { none, count, all, any };
int sync_threads(Vote vote, int predicate, Site site);

template <class T>
T shuffle(Call call, unsigned mask, T value, int argument, int width, Site site) {
  static_assert(std::is_arithmetic<T>::value, "CUDA shuffles numbers of 4 and 8 bytes");
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles numbers of 4 and 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = collective(call, mask, bits, argument, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

// __builtin_FILE and __builtin_LINE as default arguments name the place of the call.
#define KPFUSED_SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(KPFUSED_SIMT_SITE) { simt::sync_threads(simt::Vote::none, 0, {file, line}); }
inline int __syncthreads_count(int p, KPFUSED_SIMT_SITE) {
  return simt::sync_threads(simt::Vote::count, p, {file, line});
}
inline int __syncthreads_and(int p, KPFUSED_SIMT_SITE) { return simt::sync_threads(simt::Vote::all, p, {file, line}); }
inline int __syncthreads_or(int p, KPFUSED_SIMT_SITE) { return simt::sync_threads(simt::Vote::any, p, {file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, KPFUSED_SIMT_SITE) {
  simt::collective(simt::Call::sync_warp, mask, 0, 0, warpSize, {file, line});
}
inline bool __any_sync(unsigned mask, int p, KPFUSED_SIMT_SITE) {
  return simt::collective(simt::Call::any, mask, p != 0, 0, warpSize, {file, line}) != 0;
}
inline bool __all_sync(unsigned mask, int p, KPFUSED_SIMT_SITE) {
  return simt::collective(simt::Call::all, mask, p != 0, 0, warpSize, {file, line}) != 0;
}
inline unsigned __ballot_sync(unsigned mask, int p, KPFUSED_SIMT_SITE) {
  return static_cast<unsigned>(simt::collective(simt::Call::ballot, mask, p != 0, 0, warpSize, {file, line}));
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, KPFUSED_SIMT_SITE) {
  return simt::shuffle(simt::Call::shuffle, mask, value, lane, width, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, KPFUSED_SIMT_SITE) {
  return simt::shuffle(simt::Call::shuffle_up, mask, value, static_cast<int>(delta), width, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, KPFUSED_SIMT_SITE) {
  return simt::shuffle(simt::Call::shuffle_down, mask, value, static_cast<int>(delta), width, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, KPFUSED_SIMT_SITE) {
  return simt::shuffle(simt::Call::shuffle_xor, mask, value, lane_mask, width, {file, line});
}

// Cache hints change nothing but speed. A misaligned access is UBSan's to report.
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

// The runtime's names that launchers use.
struct CUstream_st;
using cudaStream_t = CUstream_st*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;

// Launches that CUDA would refuse end the program before it comes to this.
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "error"; }
