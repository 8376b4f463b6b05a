// SPDX-License-Identifier: MIT
// A block reduction with one fault per name: what the emulator itself must catch, whatever the project's kernels do.
//
//   toy FAULT     "none" succeeds; every other one must end with a report
#include <cstdio>
#include <cstdlib>
#include <string>

#include "access.h"
#include "simt.h"

#if defined(KPFUSED_SIMT_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

namespace {

constexpr int kThreads = 96, kWarps = kThreads / 32, kLength = 1000;

struct alignas(16) Four {
  float v[4];
};

enum class Fault {
  none,
  read_past_end,
  read_before_start,
  write_past_end,
  shared_past_end,
  misaligned,
  missing_barrier,
  overwritten_early,
  missing_warp_barrier,
  shuffle_without_self,
  shuffle_from_outside_mask,
  shuffle_after_exit,
  shuffle_kinds_differ,
  shuffle_width,
  barrier_in_branch,
  barriers_differ,
  exit_before_barrier,
  uninitialised_shared,
  written_twice,
  never_written,
  wrong_warp_count,
  count
};

constexpr const char* kNames[] = {"none",
                                  "read_past_end",
                                  "read_before_start",
                                  "write_past_end",
                                  "shared_past_end",
                                  "misaligned",
                                  "missing_barrier",
                                  "overwritten_early",
                                  "missing_warp_barrier",
                                  "shuffle_without_self",
                                  "shuffle_from_outside_mask",
                                  "shuffle_after_exit",
                                  "shuffle_kinds_differ",
                                  "shuffle_width",
                                  "barrier_in_branch",
                                  "barriers_differ",
                                  "exit_before_barrier",
                                  "uninitialised_shared",
                                  "written_twice",
                                  "never_written",
                                  "wrong_warp_count"};
static_assert(sizeof kNames / sizeof kNames[0] == static_cast<size_t>(Fault::count), "a name for every fault");

__device__ float load_four(const float* x, int i, bool shifted) {
  const Four four = *reinterpret_cast<const Four*>(x + i + (shifted ? 1 : 0));
  return four.v[0] + four.v[1] + four.v[2] + four.v[3];
}

__device__ float warp_sum(float v, Fault fault) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  unsigned mask = 0xffffffffu;
  if (fault == Fault::shuffle_without_self && lane == 3) mask &= ~8u;
  if (fault == Fault::shuffle_from_outside_mask) mask = 0xffffu << (lane & 16);
  if (fault == Fault::shuffle_after_exit && threadIdx.x == 40) return 0;
  for (int d = 16; d > 0; d /= 2) {
    if (fault == Fault::shuffle_kinds_differ && lane >= 16) {
      v += __shfl_down_sync(mask, v, static_cast<unsigned>(d));
    } else {
      v += __shfl_xor_sync(mask, v, d, fault == Fault::shuffle_width ? 24 : 32);
    }
  }
  return v;
}

// y[b] = sum of x[b, :] and, from a neighbour through shared memory, y[grid + b] = x[b, 1].
__global__ void reduce(const float* x, float* y, int length, Fault fault) {
  auto* shared = static_cast<float*>(simt::shared_memory());
  const int t = static_cast<int>(threadIdx.x), b = static_cast<int>(blockIdx.x);
  if (fault == Fault::exit_before_barrier && t == 7) return;
  const float* row = x + b * length;
  const int first = fault == Fault::read_before_start ? -1 : 0, last = length + (fault == Fault::read_past_end);
  float sum = 0;
  for (int i = (first + t) * 4; i + 3 < last - last % 4; i += kThreads * 4)
    sum += load_four(row, i, fault == Fault::misaligned);
  for (int i = last - last % 4 + t; i < last; i += kThreads) sum += row[i];
  sum = warp_sum(sum, fault);
  if (t % 32 == 0 && fault != Fault::uninitialised_shared) shared[t / 32] = sum;
  if (t < 32) shared[kWarps + t] = row[t];
  if (fault != Fault::missing_warp_barrier && t < 32) __syncwarp();
  if (t == 0) y[gridDim.x + blockIdx.x] = shared[kWarps + 1];
  if (fault == Fault::shared_past_end && t == 5) shared[kWarps + 32] = sum;
  if (fault == Fault::barrier_in_branch) {
    if (t < 64) __syncthreads();
  } else if (fault == Fault::barriers_differ) {
    if (t < 64) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (fault != Fault::missing_barrier) {
    __syncthreads();
  }
  if (fault == Fault::overwritten_early && t == 70) shared[0] = sum;
  if (t > (fault == Fault::written_twice)) return;
  float total = 0;
  for (int w = 0; w < kWarps - (fault == Fault::wrong_warp_count); ++w) total += shared[w];
  if (fault == Fault::never_written && blockIdx.x == 1) return;
  y[blockIdx.x + (fault == Fault::write_past_end ? gridDim.x + 1 : 0)] = total;
}

bool run(Fault fault, simt::Order order) {
  constexpr int kRows = 2;
  float *x = nullptr, *y = nullptr;
  if (posix_memalign(reinterpret_cast<void**>(&x), 16, sizeof(float) * kRows * kLength) != 0) return false;
  if (posix_memalign(reinterpret_cast<void**>(&y), 16, sizeof(float) * kRows * 2) != 0) return false;
  for (int i = 0; i < kRows * kLength; ++i) x[i] = static_cast<float>(i % 11);
  for (int i = 0; i < kRows * 2; ++i) y[i] = -1;
  simt::set_order(order, 1);
  std::snprintf(simt::context, sizeof simt::context, "toy %s", kNames[static_cast<int>(fault)]);
  simt::access::forget_all();
  simt::access::watch("x", x, kRows * kLength, sizeof(float), nullptr, simt::access::Use::input);
  simt::access::watch("y", y, kRows * 2, sizeof(float), nullptr, simt::access::Use::output);
  simt::access::guard(x - 4, sizeof(float) * (kRows * kLength + 8));
  simt::access::guard(y, sizeof(float) * 16);
  simt::launch("reduce", {kRows}, {kThreads}, sizeof(float) * (kWarps + 32), [&] { reduce(x, y, kLength, fault); });
  bool right = true;
  for (int r = 0; r < kRows; ++r) {
    float want = 0;
    for (int i = 0; i < kLength; ++i) want += x[r * kLength + i];
    right &= y[r] == want && y[kRows + r] == x[r * kLength + 1];
  }
  std::free(x);
  std::free(y);
  return right;
}

}  // namespace

int main(int argc, char** argv) {
  for (int f = 0; argc > 1 && f < static_cast<int>(Fault::count); ++f) {
    if (std::string(argv[1]) != kNames[f]) continue;
    for (int order = 0; order < simt::kOrders; ++order) {
      if (run(static_cast<Fault>(f), static_cast<simt::Order>(order))) continue;
      std::printf("wrong result in order %s\n", simt::order_name(static_cast<simt::Order>(order)));
      return 1;
    }
    return 0;
  }
  for (const char* name : kNames) std::printf("%s\n", name);
  return 2;
}
