// SPDX-License-Identifier: MIT
// Memory for kernels, one allocation per tensor that ends where the tensor ends: one element too far is seen.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "access.h"
#include "params.h"
#include "simt.h"

namespace harness {

// A number of every dtype that no case produces: -2.7e7 in float32 and bfloat16, -15.6 in float16, -7.6e56 in float64.
constexpr unsigned char kPoison = 0xcb;

class Buffer {
 public:
  // `lead` elements come before the first one, to misalign it.
  Buffer(size_t elements, size_t element_bytes, size_t lead = 0)
      : elements_(elements), element_bytes_(element_bytes), lead_(lead) {
    // AddressSanitizer surrounds an allocation with red zones; access.h is told of the ones kept here.
    margin_ = simt::access::kEnabled ? 256 : 0;
    bytes_ = (elements + lead) * element_bytes;
    if (huge()) {
      constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      memory_ = mmap(nullptr, margin_ + bytes_ + margin_, PROT_READ | PROT_WRITE, kFlags, -1, 0);
      if (memory_ == MAP_FAILED) simt::fault("no address space for %zu bytes", bytes_);
    } else if (posix_memalign(&memory_, 16, margin_ + bytes_ + margin_) != 0) {
      std::abort();
    }
    poison();
  }
  ~Buffer() { huge() ? static_cast<void>(munmap(memory_, margin_ + bytes_ + margin_)) : std::free(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return static_cast<char*>(memory_) + margin_ + lead_ * element_bytes_; }
  size_t bytes() const { return elements_ * element_bytes_; }
  // Address space of which only the pages around the maps are ever touched; it starts as zeros.
  bool huge() const { return bytes_ > size_t{1} << 30; }
  void fill(unsigned char byte) {
    if (!huge()) std::memset(memory_, byte, margin_ + bytes_ + margin_);
  }
  void poison() { fill(kPoison); }

  void watch(const char* name, simt::access::Use use, const uint8_t* valid = nullptr) const {
    if (huge()) return;
    simt::access::guard(memory_, margin_ + bytes_ + margin_);
    if (elements_ > 0) simt::access::watch(name, data(), elements_, element_bytes_, valid, use);
  }

 private:
  size_t elements_, element_bytes_, lead_, margin_, bytes_;
  void* memory_ = nullptr;
};

// Elements from the first to the last pixel of a view, and which of them are pixels.
inline size_t extent(const kpfused::MapView& v) {
  return static_cast<size_t>((v.outer - 1) * v.stride_outer + (v.inner - 1) * v.stride_inner +
                             (v.height - 1) * v.stride_y + (v.width - 1) * v.stride_x + 1);
}

template <class Visit>  // visit(map, y, x, offset)
void each_pixel(const kpfused::MapView& v, Visit visit) {
  for (int64_t o = 0; o < v.outer; ++o)
    for (int64_t i = 0; i < v.inner; ++i)
      for (int64_t y = 0; y < v.height; ++y)
        for (int64_t x = 0; x < v.width; ++x)
          visit(o * v.inner + i, y, x, o * v.stride_outer + i * v.stride_inner + y * v.stride_y + x * v.stride_x);
}

// The pixels of all maps, one map after another, whatever their layout.
inline std::vector<char> gather(const kpfused::MapView& v, const void* base, int element_bytes) {
  std::vector<char> pixels(static_cast<size_t>(v.maps() * v.height * v.width * element_bytes));
  char* to = pixels.data();
  each_pixel(v, [&](int64_t, int64_t, int64_t, int64_t offset) {
    std::memcpy(to, static_cast<const char*>(base) + offset * element_bytes, static_cast<size_t>(element_bytes));
    to += element_bytes;
  });
  return pixels;
}

}  // namespace harness
