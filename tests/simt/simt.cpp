// SPDX-License-Identifier: MIT
// The scheduler behind simt.h: a fiber per thread of the running block, and the checks that hardware leaves out.
#include "simt.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <utility>
#include <vector>

#include "access.h"
#include "fiber.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

char context[512] = "";

namespace {

constexpr int kMaxThreads = 1024, kLanes = 32, kMaxWarps = kMaxThreads / kLanes;
constexpr size_t kStackBytes = 64 << 10, kPage = 4096;
constexpr size_t kStaticLimit = 48 << 10, kOptInLimit = 227 << 10;

enum class State { absent, ready, in_collective, at_barrier, exited };

struct Thread {
  Fiber fiber;
  State state = State::absent;
  Site site{};
  Call call{};
  Vote vote{};
  unsigned mask = 0;
  uint64_t value = 0, result = 0;
  int argument = 0, width = 0;
};

struct Scheduler {
  Fiber host;
  Thread threads[kMaxThreads];
  int count = 0, current = -1;
  unsigned ready_warps = 0, ready_lanes[kMaxWarps] = {};
  int waiting = 0, exited = 0;  // at the barrier; for good

  std::string kernel;
  std::set<std::string> kernels_run;
  ThreadFunction thread_function = nullptr;
  const void* closure = nullptr;
  char* shared = nullptr;
  size_t allowed_shared = kStaticLimit;

  Order order = Order::ascending;
  uint64_t random_state = 1;
  int warp_order[kMaxWarps] = {};
};

Scheduler scheduler;

uint32_t random_below(uint32_t n) {
  uint64_t& s = scheduler.random_state;
  s ^= s >> 12, s ^= s << 25, s ^= s >> 27;
  return static_cast<uint32_t>(((s * 0x2545f4914f6cdd1dull >> 32) * n) >> 32);
}

template <class T>
void shuffle_items(T* items, int n) {
  for (int i = n - 1; i > 0; --i) std::swap(items[i], items[random_below(static_cast<uint32_t>(i) + 1)]);
}

int lowest(unsigned bits) { return __builtin_ctz(bits); }
int highest(unsigned bits) { return 31 - __builtin_clz(bits); }
int any_of(unsigned bits) {
  for (uint32_t n = random_below(static_cast<uint32_t>(__builtin_popcount(bits))); n > 0; --n) bits &= bits - 1;
  return lowest(bits);
}

void make_ready(int thread) {
  scheduler.threads[thread].state = State::ready;
  scheduler.ready_lanes[thread / kLanes] |= 1u << thread % kLanes;
  scheduler.ready_warps |= 1u << thread / kLanes;
}

int take_ready() {
  Scheduler& s = scheduler;
  int warp = 0, lane = 0;
  switch (s.order) {
    case Order::ascending: warp = lowest(s.ready_warps), lane = lowest(s.ready_lanes[warp]); break;
    case Order::descending: warp = highest(s.ready_warps), lane = highest(s.ready_lanes[warp]); break;
    case Order::warps:  // each warp runs as far as it can, warps in the block's own order
      for (int i = 0; !(s.ready_warps >> (warp = s.warp_order[i]) & 1); ++i) {
      }
      lane = any_of(s.ready_lanes[warp]);
      break;
    case Order::random: warp = any_of(s.ready_warps), lane = any_of(s.ready_lanes[warp]); break;
  }
  if ((s.ready_lanes[warp] &= ~(1u << lane)) == 0) s.ready_warps &= ~(1u << warp);
  return warp * kLanes + lane;
}

const char* call_name(Call call) {
  constexpr const char* names[] = {"__syncwarp",      "__shfl_sync", "__shfl_up_sync", "__shfl_down_sync",
                                   "__shfl_xor_sync", "__any_sync",  "__all_sync",     "__ballot_sync"};
  return names[static_cast<int>(call)];
}

// The thread's own stack switch back to the scheduler; returns when the thread is picked again.
void wait_for_turn() { switch_fiber(&scheduler.threads[scheduler.current].fiber, &scheduler.host); }

void fiber_main() {
  enter_fiber(&scheduler.host);
  for (;;) {
    scheduler.thread_function(scheduler.closure);
    scheduler.threads[scheduler.current].state = State::exited;
    ++scheduler.exited;
    wait_for_turn();
  }
}

void resume(int thread) {
  Scheduler& s = scheduler;
  s.current = thread;
  const auto t = static_cast<unsigned>(thread);
  threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
  access::start_thread(thread, s.threads[thread].fiber.stack, kStackBytes);
  switch_fiber(&s.host, &s.threads[thread].fiber);
  access::start_thread(-1, nullptr, 0);
  s.current = -1;
}

const char* describe(int thread, char* text, size_t bytes) {
  const Thread& t = scheduler.threads[thread];
  if (t.state == State::absent) {
    std::snprintf(text, bytes, "thread %d does not exist", thread);
  } else if (t.state == State::exited) {
    std::snprintf(text, bytes, "thread %d has exited", thread);
  } else if (t.state == State::at_barrier) {
    std::snprintf(text, bytes, "thread %d waits in __syncthreads at %s:%d", thread, t.site.file, t.site.line);
  } else {
    std::snprintf(text, bytes, "thread %d waits in %s(mask %08x) at %s:%d", thread, call_name(t.call), t.mask,
                  t.site.file, t.site.line);
  }
  return text;
}

// Nothing is ready and the block is not done: some threads wait for others that will never come.
[[noreturn]] void report_deadlock() {
  Scheduler& s = scheduler;
  char mine[600], other[600];
  for (int i = 0; i < s.count; ++i) {
    const Thread& t = s.threads[i];
    if (t.state != State::in_collective) continue;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int peer = i / kLanes * kLanes + lane;
      const Thread& p = s.threads[peer];
      const bool together =
          p.state == State::in_collective && p.call == t.call && p.mask == t.mask && p.site.line == t.site.line;
      if (!(t.mask >> lane & 1) || together) continue;
      s.current = i;
      fault("lanes named by the mask do not arrive: %s; %s", describe(i, mine, sizeof mine),
            describe(peer, other, sizeof other));
    }
  }
  for (int i = 0; i < s.count; ++i) {
    if (s.threads[i].state != State::at_barrier) continue;
    for (int j = 0; j < s.count; ++j) {
      if (s.threads[j].state == State::at_barrier) continue;
      s.current = i;
      fault("divergent __syncthreads: %s; %s", describe(i, mine, sizeof mine), describe(j, other, sizeof other));
    }
  }
  fault("deadlock");
}

void release_barrier() {
  Scheduler& s = scheduler;
  char mine[600], other[600];
  int count = 0;
  for (int i = 0; i < s.count; ++i) {
    const Thread &t = s.threads[i], &first = s.threads[0];
    if (t.site.line != first.site.line || std::strcmp(t.site.file, first.site.file) != 0) {
      s.current = i;
      fault("divergent __syncthreads: %s; %s", describe(i, mine, sizeof mine), describe(0, other, sizeof other));
    }
    count += t.value != 0;
  }
  for (int i = 0; i < s.count; ++i) {
    Thread& t = s.threads[i];
    t.result = static_cast<uint64_t>(t.vote == Vote::count ? count
                                     : t.vote == Vote::all ? count == s.count
                                                           : count > 0);
    make_ready(i);
  }
  s.waiting = 0;
  access::barrier();
}

void run_block(size_t shared_bytes) {
  Scheduler& s = scheduler;
  std::memset(s.shared, 0xff, shared_bytes);  // NaN in every floating type, -1 in every integer
  access::start_block(s.shared, shared_bytes);
  s.waiting = s.exited = 0;
  std::iota(s.warp_order, s.warp_order + kMaxWarps, 0);
  if (s.order == Order::warps) shuffle_items(s.warp_order, kMaxWarps);
  for (int i = 0; i < kMaxThreads; ++i) s.threads[i].state = State::absent;
  for (int i = 0; i < s.count; ++i) make_ready(i);
  while (s.exited < s.count) {
    if (s.ready_warps != 0) {
      resume(take_ready());
    } else if (s.waiting == s.count) {
      release_barrier();
    } else {
      report_deadlock();
    }
  }
}

void prepare_fibers(int count) {
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = scheduler.threads[i].fiber;
    if (fiber.stack) continue;
    void* memory = mmap(nullptr, kStackBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    // The page below stops a stack that overflows.
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) fault("no memory for the threads' stacks");
    fiber.stack = static_cast<char*>(memory) + kPage;
    fiber.bytes = kStackBytes;
    make_context(&fiber.context, fiber.stack, fiber.bytes, fiber_main);
  }
}

// From the kernel as a launch writes it and the compiler's name of the closure's type, "... Closure =
// a::b<float>(...)".
std::string full_name(const std::string& kernel, const std::string& signature) {
  std::string name = kernel.front() == '(' ? kernel.substr(1, kernel.size() - 2) : kernel;
  const size_t type = signature.find("Closure = ");
  if (type == std::string::npos) return name;
  std::string caller = signature.substr(type + 10, signature.find('(', type + 10) - type - 10);
  for (size_t scope; (scope = caller.find("::")) != std::string::npos;) {
    const size_t word = caller.find_last_of("<, ", scope);
    caller.erase(word == std::string::npos ? 0 : word + 1, scope + 2 - (word == std::string::npos ? 0 : word + 1));
  }
  return name + " by " + caller;
}

void check_launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64)
    fault("%s: %llu threads in a block", kernel, static_cast<unsigned long long>(threads));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    fault("%s: grid of %u x %u x %u blocks", kernel, grid.x, grid.y, grid.z);
  if (shared_bytes > scheduler.allowed_shared)
    fault("%s: %zu bytes of shared memory, of %zu allowed", kernel, shared_bytes, scheduler.allowed_shared);
}

// While it lives, numbers below the smallest normal one count as zero and are written as zero: what -ftz=true makes of
// single precision on the device. Double precision is never flushed there; on the CPU one switch is for both.
struct FlushToZero {
#if defined(__SSE__)
  unsigned saved = _mm_getcsr();
  explicit FlushToZero(bool flush) { _mm_setcsr(flush ? saved | 0x8040 : saved); }
  ~FlushToZero() { _mm_setcsr(saved); }
#else
  explicit FlushToZero(bool) {}
#endif
  FlushToZero(const FlushToZero&) = delete;
  FlushToZero& operator=(const FlushToZero&) = delete;
};

// The collective's result for one lane, all lanes of its mask having arrived. `first` is lane 0 of the warp.
uint64_t collective_result(const Thread* first, int lane) {
  const Thread& t = first[lane];
  unsigned votes = 0;
  for (int i = 0; i < kLanes; ++i) votes |= (t.mask >> i & 1 && first[i].value != 0 ? 1u : 0u) << i;
  const int segment = lane & ~(t.width - 1), last = segment + t.width - 1;
  int source = lane;
  switch (t.call) {
    case Call::sync_warp: return 0;
    case Call::any: return votes != 0;
    case Call::all: return votes == t.mask;
    case Call::ballot: return votes;
    case Call::shuffle: source = segment + (t.argument & (t.width - 1)); break;
    case Call::shuffle_up: source = lane - t.argument >= segment ? lane - t.argument : lane; break;
    case Call::shuffle_down: source = lane + t.argument <= last ? lane + t.argument : lane; break;
    case Call::shuffle_xor: source = (lane ^ t.argument) <= last ? lane ^ t.argument : lane; break;
  }
  if (!(t.mask >> source & 1))
    fault("%s: lane %d reads lane %d, which is not in the mask %08x, at %s:%d", call_name(t.call), lane, source, t.mask,
          t.site.file, t.site.line);
  return first[source].value;
}

}  // namespace

const char* order_name(Order order) {
  constexpr const char* names[kOrders] = {"ascending", "descending", "warps", "random"};
  return names[static_cast<int>(order)];
}

void set_order(Order order, uint64_t seed) {
  scheduler.order = order;
  scheduler.random_state = seed * 2 + 0x9e3779b97f4a7c15ull;
}

void fault(const char* format, ...) {
  const Scheduler& s = scheduler;
  std::fflush(stdout);
  std::fputs("simt fault: ", stderr);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (s.current >= 0)
    std::fprintf(stderr, "\n  in %s, block (%u, %u, %u), thread %d of %d, order %s", s.kernel.c_str(), blockIdx.x,
                 blockIdx.y, blockIdx.z, s.current, s.count, order_name(s.order));
  std::fprintf(stderr, "\n  case: %s\n", context);
  std::fflush(stderr);
  _exit(kFaultStatus);
}

void* shared_memory() { return scheduler.shared; }

void allow_shared_memory(size_t bytes) {
  if (bytes > kOptInLimit) fault("%zu bytes of shared memory asked for, of %zu there are", bytes, kOptInLimit);
  scheduler.allowed_shared = bytes > kStaticLimit ? bytes : kStaticLimit;
}

int sync_threads(Vote vote, int predicate, Site site) {
  Scheduler& s = scheduler;
  Thread& t = s.threads[s.current];
  t.state = State::at_barrier;
  t.site = site;
  t.vote = vote;
  t.value = predicate != 0;
  ++s.waiting;
  wait_for_turn();
  return static_cast<int>(t.result);
}

uint64_t collective(Call call, unsigned mask, uint64_t value, int argument, int width, Site site) {
  Scheduler& s = scheduler;
  Thread& t = s.threads[s.current];
  const int lane = s.current % kLanes;
  Thread* first = &s.threads[s.current - lane];
  if (!(mask >> lane & 1))
    fault("%s: mask %08x does not name the calling lane %d, at %s:%d", call_name(call), mask, lane, site.file,
          site.line);
  if (width < 1 || width > kLanes || (width & (width - 1)) != 0)
    fault("%s: width %d is no power of two up to 32, at %s:%d", call_name(call), width, site.file, site.line);
  t.state = State::in_collective;
  t.call = call, t.mask = mask, t.value = value, t.argument = argument, t.width = width, t.site = site;
  bool complete = true;
  for (int i = 0; i < kLanes; ++i) {
    const Thread& p = first[i];
    if (mask >> i & 1)
      complete &= p.state == State::in_collective && p.call == call && p.mask == mask && p.site.line == site.line;
  }
  if (complete) {
    for (int i = 0; i < kLanes; ++i)
      if (mask >> i & 1) first[i].result = collective_result(first, i);
    for (int i = 0; i < kLanes; ++i)
      if (mask >> i & 1) make_ready(s.current - lane + i);
    if (call == Call::sync_warp) access::sync_warp(s.current / kLanes, mask);
  }
  wait_for_turn();
  return t.result;
}

const std::set<std::string>& kernels_run() { return scheduler.kernels_run; }

void launch(const char* kernel, const char* signature, dim3 grid, dim3 block, size_t shared_bytes,
            ThreadFunction thread, const void* closure) {
  Scheduler& s = scheduler;
  s.kernel = full_name(kernel, signature);
  s.kernels_run.insert(s.kernel);
  check_launch(s.kernel.c_str(), grid, block, shared_bytes);
  s.thread_function = thread, s.closure = closure;
  s.allowed_shared = kStaticLimit;
  s.count = static_cast<int>(block.x * block.y * block.z);
  gridDim = grid, blockDim = block;
  prepare_fibers(s.count);
  // An allocation of its own for each launch: AddressSanitizer sees an access behind it.
  void* shared = nullptr;
  if (posix_memalign(&shared, 16, shared_bytes + 2 * access::kMargin) != 0) fault("no memory for shared memory");
  s.shared = static_cast<char*>(shared) + access::kMargin;
  access::start_launch();
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  if (s.order == Order::descending) std::vector<uint64_t>(blocks.rbegin(), blocks.rend()).swap(blocks);
  if (s.order == Order::warps || s.order == Order::random)
    shuffle_items(blocks.data(), static_cast<int>(blocks.size()));
  const FlushToZero guard(s.kernel.find("double") == std::string::npos);
  for (const uint64_t b : blocks) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(shared_bytes);
  }
  std::free(shared);
}

}  // namespace simt
