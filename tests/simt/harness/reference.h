// SPDX-License-Identifier: MIT
// The textbook, in extended precision: a softmax in two passes over z = beta * h, expectations, and their gradients as
// sums over pixels. It shares no formula with moments.h.
#pragma once

#include <vector>

#include "values.h"

namespace harness {

struct Reference {
  std::vector<Real> probability;
  Real x = 0, y = 0;                       // pixels from the top left corner
  std::vector<Real> gradient;              // d loss / d logit
  Real grad_beta = 0, grad_beta_size = 0;  // d loss / d beta, and the sum of its terms' magnitudes
  Real distance = 0;                       // the expected distance of a logit from that of the peak
};

// grad_x, grad_y: gradient with respect to x and y in pixels.
inline Reference reference(const std::vector<Real>& logits, int64_t height, int64_t width, Real beta, Real grad_x,
                           Real grad_y) {
  const size_t n = logits.size();
  Reference r;
  std::vector<Real> z(n);
  Real largest = -kInfinity, origin = 0;
  bool nan = false;
  for (size_t i = 0; i < n; ++i) {
    // Probability zero even at beta = 0.
    z[i] = logits[i] == -kInfinity && beta >= 0 ? -kInfinity : beta * logits[i];
    nan |= std::isnan(z[i]);
    if (z[i] > largest || (z[i] == largest && logits[i] > origin)) largest = z[i], origin = logits[i];
  }
  r.probability.assign(n, kNan);
  r.gradient.assign(n, kNan);
  r.x = r.y = r.grad_beta = r.grad_beta_size = kNan;
  if (nan || std::isinf(largest)) return r;
  Real total = 0;
  for (const Real v : z) total += std::exp(v - largest);
  r.x = r.y = r.grad_beta = r.grad_beta_size = 0;
  for (int64_t i = 0; i < height * width; ++i) {
    const Real p = r.probability[static_cast<size_t>(i)] = std::exp(z[static_cast<size_t>(i)] - largest) / total;
    r.x += p * static_cast<Real>(i % width);
    r.y += p * static_cast<Real>(i / width);
  }
  // The gradients of all logits add up to zero; counting logits from that of the peak keeps the products small.
  for (int64_t i = 0; i < height * width; ++i) {
    const auto k = static_cast<size_t>(i);
    const Real inner = grad_x * (static_cast<Real>(i % width) - r.x) + grad_y * (static_cast<Real>(i / width) - r.y);
    const Real dz = r.probability[k] * inner;
    r.gradient[k] = beta * dz;
    if (r.probability[k] == 0) continue;
    r.grad_beta += (logits[k] - origin) * dz;
    r.grad_beta_size += std::fabs((logits[k] - origin) * dz);
    r.distance += std::fabs(logits[k] - origin) * r.probability[k];
  }
  return r;
}

}  // namespace harness
