// SPDX-License-Identifier: MIT
// Memory for kernels, one allocation per tensor that ends where the tensor ends: one element too far is seen.
#pragma once

#include <cstdlib>
#include <cstring>

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
    if (posix_memalign(&memory_, 16, margin_ + bytes_ + margin_) != 0) std::abort();
    poison();
  }
  ~Buffer() { std::free(memory_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return static_cast<char*>(memory_) + margin_ + lead_ * element_bytes_; }
  size_t bytes() const { return elements_ * element_bytes_; }
  void poison() { std::memset(memory_, kPoison, margin_ + bytes_ + margin_); }

  void watch(const char* name, simt::access::Use use, const uint8_t* valid = nullptr) const {
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
          visit(o * v.inner + i, y, x,
                o * v.stride_outer + i * v.stride_inner + y * v.stride_y + x * v.stride_x);
}

}  // namespace harness
