// SPDX-License-Identifier: MIT
// The textbook, in extended precision: a softmax in two passes over z = beta * h, expectations, and their gradients as
// sums over pixels. It shares no formula with moments.h.
#pragma once

#include <vector>

#include "values.h"

namespace harness {

// Gradients with respect to the moments, in pixels and nats; xy and yx are the two elements off the diagonal.
struct FieldGradient {
  Real x = 0, y = 0, xx = 0, xy = 0, yx = 0, yy = 0, entropy = 0, logsumexp = 0, peak_probability = 0;
};

struct Reference {
  std::vector<Real> probability;
  bool empty = false;                      // no pixel has weight
  Real x = 0, y = 0;                       // pixels from the top left corner
  Real xx = 0, xy = 0, yy = 0;             // covariance
  Real entropy = 0, logsumexp = 0, peak_probability = 0;
  int64_t peak = 0;                        // in row order
  Real top = 0;                            // the logit there
  std::vector<Real> gradient;              // d loss / d logit
  std::vector<Real> gradient_terms;        // what a gradient is the difference of, in magnitude
  Real grad_beta = 0, grad_beta_size = 0;  // d loss / d beta, and the sum of its terms' magnitudes
  Real grad_beta_terms = 0;                // likewise of the gradients' terms
};

struct Question {
  const std::vector<Real>& logits;
  const std::vector<uint8_t>& counts;
  int64_t height, width;
  Real beta;
  FieldGradient g;
};

// dz_i / P_i, and the magnitudes of its terms.
inline Real slope(const Question& q, const Reference& r, int64_t i, Real* terms) {
  const FieldGradient& g = q.g;
  const Real dx = static_cast<Real>(i % q.width) - r.x, dy = static_cast<Real>(i / q.width) - r.y;
  const Real p = r.probability[static_cast<size_t>(i)], log_p = p > 0 ? std::log(p) : 0;
  const auto w = static_cast<Real>(q.width), h = static_cast<Real>(q.height);
  *terms = std::fabs(g.x) * w + std::fabs(g.y) * h + 4 * std::fabs(g.xx) * w * (std::fabs(dx) + std::sqrt(r.xx) + w / 64) +
           4 * std::fabs(g.yy) * h * (std::fabs(dy) + std::sqrt(r.yy) + h / 64) +
           4 * std::fabs(g.xy + g.yx) * (w * (std::fabs(dy) + h / 64) + h * (std::fabs(dx) + w / 64)) +
           std::fabs(g.entropy) * 8 * (std::fabs(log_p) + r.entropy + 1) + 8 * std::fabs(g.logsumexp) +
           8 * std::fabs(g.peak_probability);
  return g.x * dx + g.y * dy + g.xx * (dx * dx - r.xx) + (g.xy + g.yx) * (dx * dy - r.xy) + g.yy * (dy * dy - r.yy) -
         g.entropy * (log_p + r.entropy) + g.logsumexp +
         g.peak_probability * ((i == r.peak) - r.peak_probability);
}

inline void differentiate(const Question& q, Reference& r) {
  // Counting logits from that of the peak keeps the products small; what is left of it is the logsumexp's.
  r.grad_beta = q.g.logsumexp * r.top;
  r.grad_beta_size = std::fabs(r.grad_beta);
  for (int64_t i = 0; i < q.height * q.width; ++i) {
    const auto k = static_cast<size_t>(i);
    Real terms;
    const Real p = r.probability[k], dz = p * slope(q, r, i, &terms);
    r.gradient[k] = q.beta * dz;
    r.gradient_terms[k] = std::fabs(q.beta) * p * terms;
    if (p == 0) continue;
    const Real distance = q.logits[k] - r.top;
    r.grad_beta += distance * dz;
    r.grad_beta_size += std::fabs(distance * dz);
    r.grad_beta_terms += std::fabs(distance) * p * terms;
  }
}

inline Reference reference(const Question& q) {
  const size_t n = q.logits.size();
  Reference r;
  std::vector<Real> z(n);
  Real largest = -kInfinity, highest = -kInfinity;
  bool nan = std::isnan(q.beta);
  for (size_t i = 0; i < n; ++i) {
    const Real logit = q.logits[i], key = q.beta < 0 ? -logit : logit;
    // Probability zero even at beta = 0.
    z[i] = !q.counts[i] || (logit == -kInfinity && q.beta >= 0) ? -kInfinity : q.beta * logit;
    nan |= std::isnan(z[i]);
    if (!q.counts[i]) continue;
    if (z[i] > largest) largest = z[i];
    // At beta = 0 too, the highest logit is the peak.
    if (key > highest) highest = key, r.peak = static_cast<int64_t>(i), r.top = logit;
  }
  r.probability.assign(n, kNan);
  r.gradient.assign(n, kNan);
  r.gradient_terms.assign(n, kNan);
  r.empty = !nan && largest == -kInfinity;
  if (nan || std::isinf(largest)) {
    r.x = r.y = r.xx = r.xy = r.yy = r.entropy = r.logsumexp = r.peak_probability = kNan;
    r.grad_beta = r.grad_beta_size = kNan;
    if (r.empty) r.logsumexp = -kInfinity;
    return r;
  }
  Real total = 0;
  for (const Real v : z) total += std::exp(v - largest);
  r.logsumexp = largest + std::log(total);
  for (int64_t i = 0; i < q.height * q.width; ++i) {
    const Real p = r.probability[static_cast<size_t>(i)] = std::exp(z[static_cast<size_t>(i)] - largest) / total;
    r.x += p * static_cast<Real>(i % q.width);
    r.y += p * static_cast<Real>(i / q.width);
    if (p > 0) r.entropy -= p * std::log(p);
  }
  for (int64_t i = 0; i < q.height * q.width; ++i) {
    const Real p = r.probability[static_cast<size_t>(i)];
    const Real dx = static_cast<Real>(i % q.width) - r.x, dy = static_cast<Real>(i / q.width) - r.y;
    r.xx += p * dx * dx;
    r.xy += p * dx * dy;
    r.yy += p * dy * dy;
  }
  r.peak_probability = r.probability[static_cast<size_t>(r.peak)];
  differentiate(q, r);
  return r;
}

}  // namespace harness
