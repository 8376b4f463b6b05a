// SPDX-License-Identifier: MIT
// How a map is stored: element types, and vectors of them that one instruction loads or stores.
#pragma once

#include "../params.h"
#include "device.h"

namespace kpfused::cuda {

struct Float16 {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

template <class T>
struct AccumulatorOf {
  using Type = float;
};
template <>
struct AccumulatorOf<double> {
  using Type = double;
};
template <class T>
using Acc = typename AccumulatorOf<T>::Type;

constexpr int kVectorBytes = 16;
template <class T>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T));

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

// widen() and narrow_pair() of half precision are in float16.h and bfloat16.h.
KPFUSED_DEVICE float widen(float x) { return x; }
KPFUSED_DEVICE double widen(double x) { return x; }

template <int V>
KPFUSED_DEVICE Pack<float, V> narrow(const float (&x)[V], float) {
  Pack<float, V> pack;
#pragma unroll
  for (int j = 0; j < V; ++j) pack.value[j] = x[j];
  return pack;
}
template <int V>
KPFUSED_DEVICE Pack<double, V> narrow(const double (&x)[V], double) {
  Pack<double, V> pack;
#pragma unroll
  for (int j = 0; j < V; ++j) pack.value[j] = x[j];
  return pack;
}
template <class T, int V>
KPFUSED_DEVICE Pack<T, V> narrow(const float (&x)[V], T tag) {
  Pack<T, V> pack;
#pragma unroll
  for (int j = 0; j < V; j += 2) {
    const uint32_t pair = narrow_pair(tag, x[j], x[j + 1 < V ? j + 1 : j]);
    pack.value[j].bits = static_cast<uint16_t>(pair);
    if (j + 1 < V) pack.value[j + 1].bits = static_cast<uint16_t>(pair >> 16);
  }
  return pack;
}

// Maps are read once, so a load does not ask to be kept. `p` is aligned to the pack.
template <class T, int V>
KPFUSED_DEVICE Pack<T, V> load(const T* p) {
  return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <class T, int V>
KPFUSED_DEVICE void store(T* p, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// Where map n starts, in elements.
KPFUSED_DEVICE int64_t map_offset(const MapView& view, int64_t n) {
  if (view.outer == 1) return n * view.stride_inner;
  return n / view.inner * view.stride_outer + n % view.inner * view.stride_inner;
}

// Pixel i of an axis of `size`, counted from the centre.
template <class A>
KPFUSED_DEVICE A centred(int64_t i, int64_t size) {
  return static_cast<A>(i) - static_cast<A>(size - 1) / 2;
}

}  // namespace kpfused::cuda
