// SPDX-License-Identifier: MIT
// The mass of a window around the mean or the peak of each map.
#pragma once

#include "expectation.h"

namespace kpfused::cpu::KPFUSED_ISA {

// Nothing but the window is read.
template <class T>
void window_mass(const ExpectationParams& params) {
  using A = Acc<T>;
  const SoftmaxParams& softmax = params.softmax;
  const A most = most_of<A>(params.values, softmax.pixels);
  parallel_for(softmax.view.maps(), 64, [&](int64_t begin, int64_t end) {
    SoftmaxTiles<T> tiles(softmax);
    for (int64_t n = begin; n < end; ++n) {
      const Box box = window_of<A>(params.values, softmax.view, stats_of<A>(softmax, n), n);
      const int64_t pixels = (box.right - box.left) * (box.bottom - box.top);
      tiles.start(n, 1);
      tiles.narrow(box);
      A mass = A(0);
      for (int64_t first = 0; first < pixels; first += kTile<A>) {
        const int64_t count = at_most(pixels - first, kTile<A>);
        tiles.load(first, count);
        mass += sum_of(tiles.p(0), whole_vectors<A>(count));
      }
      // A map of NaN has no mass, even where nothing of it counts within the window.
      static_cast<A*>(params.expectation)[n] = is_finite(tiles.map(0).inverse) ? mass > most ? most : mass : A(NAN);
      fill_empty<A>(params, n);
    }
  });
}

}  // namespace kpfused::cpu::KPFUSED_ISA
