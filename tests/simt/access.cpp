// SPDX-License-Identifier: MIT
// The run time of access.h. Compiled without instrumentation, and empty but in builds that ask for it.
#if defined(KPFUSED_SIMT_ACCESS)

#include "access.h"

#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include "simt.h"

namespace simt::access {

namespace {

constexpr int kLanes = 32, kWarps = 32, kNobody = -1;
constexpr size_t kGrain = 4;  // of shared memory: the smallest type the kernels keep there

// Who touched an element (in shared memory: four bytes), and when: the block, the block's count of barriers, and the
// thread's own clock.
struct Stamp {
  uint32_t launch = 0, block = 0, phase = 0, clock = 0;
  int32_t thread = kNobody;
};

struct Cell {
  Stamp write, read;
  uint32_t reads = 0;         // since the range was watched
  uint32_t full_syncs = 0;    // __syncwarp of the reader's whole warp before the last read
  bool many_readers = false;  // in this phase; then only a barrier or a __syncwarp of the whole warp orders them
  bool written = false;
};

struct Range {
  const char* name = "";
  uintptr_t begin = 0, end = 0;
  size_t element_bytes = 1;
  std::vector<uint8_t> valid;  // per element, as cells; empty: all
  Use use = Use::input;
  std::vector<Cell> cells;
};

struct Warp {
  uint32_t clock[kLanes] = {};
  uint32_t seen[kLanes][kLanes] = {};  // seen[a][b]: what b did up to this clock happened before what a does now
  uint32_t full_syncs = 0;
};

Range shared_range;
std::vector<Range> ranges;
std::vector<std::pair<uintptr_t, uintptr_t>> guarded;
Warp warps[kWarps];
uint32_t launch_count = 0, block_count = 0, phase = 0;
int current = kNobody;
uintptr_t stack_begin = 0, stack_size = 0;

// Whether what `before` records happened before anything the current thread does now.
bool ordered(const Stamp& before, const Cell& cell, bool is_read) {
  if (before.thread == kNobody || before.launch != launch_count) return true;
  if (before.block != block_count) return false;
  if (before.phase != phase || (before.thread == current && !(is_read && cell.many_readers))) return true;
  if (before.thread / kLanes != current / kLanes) return false;
  const Warp& warp = warps[current / kLanes];
  if (is_read && cell.many_readers) return warp.full_syncs > cell.full_syncs;
  return warp.seen[current % kLanes][before.thread % kLanes] >= before.clock;
}

const char* place(const Range& range, size_t element, char* text, size_t bytes) {
  std::snprintf(text, bytes, "%s, byte %zu (element %zu of %zu)", range.name, element * range.element_bytes, element,
                range.cells.size());
  return text;
}

[[noreturn]] void race(const Range& range, size_t element, const char* now, const char* before, const Stamp& stamp) {
  char text[256];
  const bool same_block = stamp.block == block_count;
  fault("race: %s %s, which thread %d of %s block %s before, with no barrier between", now,
        place(range, element, text, sizeof text), stamp.thread, same_block ? "this" : "another", before);
}

Stamp now() { return {launch_count, block_count, phase, warps[current / kLanes].clock[current % kLanes], current}; }

void on_read(Range& range, size_t element) {
  Cell& cell = range.cells[element];
  ++cell.reads;
  if (range.use == Use::input) return;
  char text[256];
  if (!cell.written) fault("read of uninitialised memory: %s", place(range, element, text, sizeof text));
  if (!ordered(cell.write, cell, false)) race(range, element, "reads", "wrote", cell.write);
  const bool this_phase =
      cell.read.launch == launch_count && cell.read.block == block_count && cell.read.phase == phase;
  if (this_phase && cell.read.thread != current) {
    // Readers of several warps: no thread's stamp stands for all; keep one that only a barrier orders.
    const bool same_warp = cell.read.thread / kLanes == current / kLanes;
    if (cell.many_readers && !same_warp) cell.full_syncs = UINT32_MAX;
    if (!cell.many_readers) cell.full_syncs = same_warp ? 0 : UINT32_MAX;
    cell.many_readers = true;
  } else if (!this_phase) {
    cell.many_readers = false, cell.full_syncs = 0;
  }
  if (cell.full_syncs != UINT32_MAX) cell.full_syncs = warps[current / kLanes].full_syncs;
  cell.read = now();
}

void on_write(Range& range, size_t element) {
  Cell& cell = range.cells[element];
  char text[256];
  if (range.use == Use::input) fault("write to an input: %s", place(range, element, text, sizeof text));
  if (range.use == Use::output && cell.written)
    fault("output written twice: %s", place(range, element, text, sizeof text));
  if (!ordered(cell.write, cell, false)) race(range, element, "writes", "wrote", cell.write);
  if (!ordered(cell.read, cell, true)) race(range, element, "writes", "read", cell.read);
  cell.write = now();
  cell.written = true;
}

void check(Range& range, uintptr_t address, size_t bytes, bool write) {
  const size_t offset = address - range.begin;
  char text[256];
  for (size_t i = offset / range.element_bytes; i * range.element_bytes < offset + bytes; ++i) {
    if (i >= range.cells.size() || (!range.valid.empty() && !range.valid[i]))
      fault("%s outside the maps: %s", write ? "write" : "read", place(range, i, text, sizeof text));
    write ? on_write(range, i) : on_read(range, i);
  }
}

// The compiler's promise of alignment is what makes a vector access of it; hardware faults where it is broken.
void on_access(const void* pointer, size_t bytes, size_t alignment, bool write) {
  if (current == kNobody) return;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address - stack_begin < stack_size) return;  // the thread's own
  if (address % alignment != 0) fault("misaligned %s of %zu bytes", write ? "write" : "read", bytes);
  if (address - shared_range.begin < shared_range.end - shared_range.begin)
    return check(shared_range, address, bytes, write);
  if (address - (shared_range.begin - kMargin) < shared_range.end - shared_range.begin + 2 * kMargin)
    fault("%s outside shared memory of %zu bytes, at byte %td", write ? "write" : "read",
          shared_range.end - shared_range.begin, static_cast<ptrdiff_t>(address - shared_range.begin));
  for (Range& range : ranges)
    if (address - range.begin < range.end - range.begin) return check(range, address, bytes, write);
  for (const auto& [begin, end] : guarded)
    if (address + bytes > begin && address < end)
      fault("%s outside the maps: at byte %td of an allocation, where kernels have no business",
            write ? "write" : "read", static_cast<ptrdiff_t>(address - begin));
}

Range* find(const char* name) {
  for (Range& range : ranges)
    if (std::strcmp(range.name, name) == 0) return &range;
  fault("nothing called %s is watched", name);
}

template <class Count>
size_t sum_valid(const Range& range, Count count) {
  size_t sum = 0;
  for (size_t i = 0; i < range.cells.size(); ++i)
    if (range.valid.empty() || range.valid[i]) sum += count(range.cells[i]);
  return sum;
}

}  // namespace

void watch(const char* name, const void* begin, size_t elements, size_t element_bytes, const uint8_t* valid, Use use) {
  Range range;
  range.name = name;
  range.begin = reinterpret_cast<uintptr_t>(begin);
  range.end = range.begin + elements * element_bytes;
  range.element_bytes = element_bytes;
  if (valid) range.valid.assign(valid, valid + elements);
  range.use = use;
  range.cells.resize(elements);
  ranges.push_back(std::move(range));
}

void guard(const void* begin, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  guarded.emplace_back(address, address + bytes);
}

void forget_all() {
  ranges.clear();
  guarded.clear();
}

double reads_per_element(const char* name) {
  const Range& range = *find(name);
  const size_t reads = sum_valid(range, [](const Cell& cell) { return size_t{cell.reads}; });
  const size_t elements = sum_valid(range, [](const Cell&) { return size_t{1}; });
  return static_cast<double>(reads) / static_cast<double>(elements);
}

size_t unwritten_elements(const char* name) {
  return sum_valid(*find(name), [](const Cell& cell) { return size_t{!cell.written}; });
}

void start_launch() { ++launch_count; }

void start_block(const char* shared, size_t bytes) {
  ++block_count;
  phase = 0;
  shared_range.name = "shared memory";
  shared_range.begin = reinterpret_cast<uintptr_t>(shared);
  shared_range.end = shared_range.begin + bytes;
  shared_range.use = Use::workspace;
  shared_range.element_bytes = kGrain;
  shared_range.cells.assign((bytes + kGrain - 1) / kGrain, Cell{});
  for (Warp& warp : warps) warp = Warp{};
  for (Warp& warp : warps)
    for (uint32_t& clock : warp.clock) clock = 1;
}

void start_thread(int thread, const char* stack, size_t stack_bytes) {
  current = thread;
  stack_begin = reinterpret_cast<uintptr_t>(stack);
  stack_size = stack_bytes;
}

void barrier() { ++phase; }

void sync_warp(int index, unsigned mask) {
  Warp& warp = warps[index];
  uint32_t joined[kLanes] = {};
  for (int a = 0; a < kLanes; ++a) {
    if (!(mask >> a & 1)) continue;
    for (int b = 0; b < kLanes; ++b) {
      const uint32_t clock = a == b ? warp.clock[a] : warp.seen[a][b];
      if (clock > joined[b]) joined[b] = clock;
    }
  }
  for (int a = 0; a < kLanes; ++a) {
    if (!(mask >> a & 1)) continue;
    std::memcpy(warp.seen[a], joined, sizeof joined);
    ++warp.clock[a];
  }
  if (mask == 0xffffffffu) ++warp.full_syncs;
}

}  // namespace simt::access

// What the compiler calls. Names and meaning are the compiler's interface to ThreadSanitizer.
using simt::access::on_access;

#define KPFUSED_SIMT_HOOKS(bytes)                                               \
  void __tsan_read##bytes(void* p) { on_access(p, bytes, bytes, false); }       \
  void __tsan_write##bytes(void* p) { on_access(p, bytes, bytes, true); }       \
  void __tsan_unaligned_read##bytes(void* p) { on_access(p, bytes, 1, false); } \
  void __tsan_unaligned_write##bytes(void* p) { on_access(p, bytes, 1, true); }

extern "C" {
KPFUSED_SIMT_HOOKS(1)
KPFUSED_SIMT_HOOKS(2)
KPFUSED_SIMT_HOOKS(4)
KPFUSED_SIMT_HOOKS(8)
KPFUSED_SIMT_HOOKS(16)
void __tsan_read_range(void* p, unsigned long bytes) { on_access(p, bytes, 1, false); }
void __tsan_write_range(void* p, unsigned long bytes) { on_access(p, bytes, 1, true); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}

#endif
