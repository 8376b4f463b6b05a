// SPDX-License-Identifier: MIT
// One case through the real launchers: forward, backward with and without grad_beta, in several orders of threads.
#include "run.h"

#include <memory>

#include "access.h"
#include "buffers.h"
#include "cuda/soft_argmax2d.h"

namespace harness {

namespace {

using kpfused::BackwardParams;
using kpfused::BetaView;
using kpfused::ForwardParams;
using kpfused::MapView;
using simt::access::Use;

constexpr int kResults = 5;
constexpr const char* kNames[kResults] = {"coordinates", "stats", "grad_heatmap", "grad_beta",
                                          "grad_heatmap without grad_beta"};

// The results of one run. Those of a case are compared between orders, and with maps run alone.
struct Results {
  Bits bits[kResults];
};

// A heatmap, what comes with it, and room for the results; the case's own, or some of its maps by themselves.
struct Problem {
  Dtype dtype;
  MapView view;              // forward's
  kpfused::Layout backward;  // backward's: of heatmap and gradient
  BetaView beta;
  kpfused::Units units;
  const void* heatmap;
  const void* grad_coordinates;
  int64_t grad_stride_map, grad_stride_xy;
};

size_t size_of(Dtype dtype) { return static_cast<size_t>(kpfused::element_size(dtype)); }

void watch_heatmap(const Buffer* heatmap, const std::vector<uint8_t>& pixels) {
  if (heatmap) heatmap->watch("heatmap", Use::input, pixels.data());
}

class Run {
 public:
  // `heatmap` and `pixels` are for the checks of access.h; null where the caller has no use for them.
  Run(const Problem& problem, const Buffer* heatmap, const std::vector<uint8_t>& pixels, Outcome& out)
      : p_(problem),
        maps_(static_cast<size_t>(problem.view.maps())),
        wide_(size_of(accumulator(problem.dtype))),
        coordinates_(maps_ * 2, wide_),
        stats_(maps_ * kpfused::kStats, wide_),
        gradient_(extent(problem.backward.second), size_of(problem.dtype)),
        grad_beta_(maps_, wide_),
        heatmap_(heatmap),
        pixels_(pixels),
        out_(out) {}

  Results operator()() {
    Results results;
    forward();
    results.bits[0] = bits_of(coordinates_.data(), coordinates_.bytes());
    results.bits[1] = bits_of(stats_.data(), stats_.bytes());
    backward(true);
    results.bits[2] = gather(p_.backward.second, gradient_.data(), kpfused::element_size(p_.dtype));
    results.bits[3] = bits_of(grad_beta_.data(), grad_beta_.bytes());
    backward(false);
    results.bits[4] = gather(p_.backward.second, gradient_.data(), kpfused::element_size(p_.dtype));
    return results;
  }

 private:
  void forward() {
    ForwardParams params{p_.dtype, p_.heatmap, p_.view, p_.beta, p_.units, coordinates_.data(), stats_.data(), nullptr};
    const auto bytes = static_cast<size_t>(kpfused::cuda::soft_argmax2d_forward_workspace(params));
    Buffer workspace(bytes, 1);
    if (bytes > 0) params.workspace = workspace.data();
    coordinates_.poison();
    stats_.poison();
    simt::access::forget_all();
    watch_heatmap(heatmap_, pixels_);
    coordinates_.watch(kNames[0], Use::output);
    stats_.watch(kNames[1], Use::output);
    workspace.watch("workspace", Use::workspace);
    finish(kpfused::cuda::soft_argmax2d_forward(params, nullptr), "forward", {kNames[0], kNames[1]});
  }

  void backward(bool with_grad_beta) {
    BackwardParams params{p_.dtype,
                          p_.heatmap,
                          p_.backward.first,
                          p_.beta,
                          p_.units,
                          stats_.data(),
                          p_.grad_coordinates,
                          p_.grad_stride_map,
                          p_.grad_stride_xy,
                          gradient_.data(),
                          p_.backward.second,
                          with_grad_beta ? grad_beta_.data() : nullptr,
                          nullptr};
    const auto bytes = static_cast<size_t>(kpfused::cuda::soft_argmax2d_backward_workspace(params));
    Buffer workspace(bytes, 1);
    if (bytes > 0) params.workspace = workspace.data();
    gradient_.poison();
    if (with_grad_beta) grad_beta_.poison();
    simt::access::forget_all();
    watch_heatmap(heatmap_, pixels_);
    stats_.watch("saved stats", Use::input);
    gradient_.watch(kNames[2], Use::output);
    grad_beta_.watch(kNames[3], Use::output);
    workspace.watch("workspace", Use::workspace);
    const int status = kpfused::cuda::soft_argmax2d_backward(params, nullptr);
    if (with_grad_beta) {
      finish(status, "backward", {kNames[2], kNames[3]});
    } else {
      finish(status, "backward without grad_beta", {kNames[2]});
    }
  }

  void finish(int status, const char* what, std::vector<const char*> outputs) {
    if (status != 0) out_.fail("%s returns error %d", what, status);
    if (!simt::access::kEnabled || !heatmap_) return;
    for (const char* name : outputs)
      if (const size_t n = simt::access::unwritten_elements(name))
        out_.fail("%s leaves %zu of %s unwritten", what, n, name);
    const double reads = simt::access::reads_per_element("heatmap");
    if (reads != 1) out_.fail("%s reads the heatmap %.6f times, not once", what, reads);
  }

  Problem p_;
  size_t maps_, wide_;
  Buffer coordinates_, stats_, gradient_, grad_beta_;
  const Buffer* heatmap_;
  const std::vector<uint8_t>& pixels_;
  Outcome& out_;
};

// Everything a case hands to the kernels.
class Fixture {
 public:
  explicit Fixture(const Case& c)
      : c_(c),
        view_(c.view()),
        heatmap_(extent(view_), size_of(c.dtype), static_cast<size_t>(c.lead)),
        betas_(c.beta_count(), size_of(accumulator(c.dtype))),
        upstream_(static_cast<size_t>(c.upstream == Upstream::expanded ? 1 : 2 * view_.maps()),
                  size_of(accumulator(c.dtype))),
        pixels_(heatmap_.huge() ? 0 : extent(view_), 0) {
    heatmap_.fill(0xff);  // NaN between the maps
    each_pixel(view_, [&](int64_t n, int64_t y, int64_t x, int64_t offset) {
      store(c.dtype, heatmap_.data(), offset, logit(c.values, n, y, x, c.height, c.width));
      if (!pixels_.empty()) pixels_[static_cast<size_t>(offset)] = 1;
    });
    const Dtype wide = accumulator(c.dtype);
    const auto [divisor, modulus] = beta_folding();
    for (int64_t n = 0; n < view_.maps(); ++n) store(wide, betas_.data(), n / divisor % modulus, c.beta(n));
    for (int64_t n = 0; n < view_.maps(); ++n)
      for (int axis = 0; axis < 2; ++axis)
        store(wide, upstream_.data(), n * stride_map() + axis * stride_xy(), wanted_upstream(n, axis));
  }

  Problem problem() const {
    const auto [divisor, modulus] = beta_folding();
    const bool number = c_.betas == Betas::value;
    return {c_.dtype,
            view_,
            c_.backward_views(),
            {number ? nullptr : betas_.data(), number ? static_cast<double>(c_.beta(0)) : 0, divisor, modulus},
            kpfused::units_of(c_.units, c_.height, c_.width),
            heatmap_.data(),
            upstream_.data(),
            stride_map(),
            stride_xy()};
  }

  // As the kernels see it: after rounding to the accumulation dtype.
  Real upstream(int64_t map, int axis) const {
    return load(accumulator(c_.dtype), upstream_.data(), map * stride_map() + axis * stride_xy());
  }

  Reference expected(int64_t map) const {
    std::vector<Real> logits(static_cast<size_t>(c_.height * c_.width));
    const Strides strides = c_.strides();
    const int64_t base = map / c_.inner * strides[0] + map % c_.inner * strides[1];
    for (int64_t y = 0; y < c_.height; ++y)
      for (int64_t x = 0; x < c_.width; ++x)
        logits[static_cast<size_t>(y * c_.width + x)] =
            load(c_.dtype, heatmap_.data(), base + y * strides[2] + x * strides[3]);
    const kpfused::Units units = kpfused::units_of(c_.units, c_.height, c_.width);
    return reference(logits, c_.height, c_.width, c_.beta(map), upstream(map, 0) * units.scale_x,
                     upstream(map, 1) * units.scale_y);
  }

  const Buffer* watched() const { return heatmap_.huge() ? nullptr : &heatmap_; }
  const std::vector<uint8_t>& pixels() const { return pixels_; }

 private:
  int64_t stride_map() const {
    return c_.upstream == Upstream::expanded ? 0 : c_.upstream == Upstream::transposed ? 1 : 2;
  }
  int64_t stride_xy() const {
    return c_.upstream == Upstream::expanded ? 0 : c_.upstream == Upstream::transposed ? view_.maps() : 1;
  }
  Real wanted_upstream(int64_t map, int axis) const {
    if (c_.upstream == Upstream::expanded) return 1;
    return 3 * uniform(static_cast<uint64_t>(map) + 991, static_cast<uint64_t>(axis)) - 1;
  }
  std::pair<int64_t, int64_t> beta_folding() const {
    switch (c_.betas) {
      case Betas::per_keypoint: return {1, c_.inner};
      case Betas::per_sample: return {c_.inner, c_.outer};
      case Betas::per_map: return {1, view_.maps()};
      default: return {1, 1};
    }
  }

  const Case& c_;
  MapView view_;
  Buffer heatmap_, betas_, upstream_;
  std::vector<uint8_t> pixels_;
};

// Bits of the maps [first, first + count) among results of all maps, in the order of kNames.
Results part_of(const Results& all, const Case& c, int64_t first, int64_t count) {
  const auto wide = static_cast<int64_t>(size_of(accumulator(c.dtype)));
  const int64_t map_bytes = c.height * c.width * kpfused::element_size(c.dtype);
  const int64_t bytes[kResults] = {2 * wide, kpfused::kStats * wide, map_bytes, wide, map_bytes};
  Results part;
  for (int k = 0; k < kResults; ++k)
    part.bits[k].assign(all.bits[k].begin() + first * bytes[k], all.bits[k].begin() + (first + count) * bytes[k]);
  return part;
}

// The bits of a map must not depend on its company. `first` is a map, in channels_last a sample: of a single channel
// nobody can make a channels_last tensor.
void check_alone(const Case& c, const Fixture& fixture, const Results& all, int64_t first, Outcome& out) {
  const int64_t count = c.channels_last ? c.inner : 1;
  Problem problem = fixture.problem();
  const Strides strides = c.strides(), grad_strides = c.grad_strides();
  const int64_t offset = first / c.inner * strides[0] + first % c.inner * strides[1];
  const int64_t sizes[] = {1, count, c.height, c.width};
  problem.view = kpfused::fold_layout(sizes, 4, strides.data(), nullptr).first;
  problem.backward = kpfused::fold_layout(sizes, 4, strides.data(), grad_strides.data());
  const auto accumulator_bytes = kpfused::element_size(accumulator(c.dtype));
  problem.grad_coordinates =
      static_cast<const char*>(problem.grad_coordinates) + first * problem.grad_stride_map * accumulator_bytes;
  Buffer beta(1, static_cast<size_t>(accumulator_bytes));
  store(accumulator(c.dtype), beta.data(), 0, c.beta(first));
  problem.beta = {beta.data(), 0, 1, 1};
  const char* in_place = static_cast<const char*>(problem.heatmap) + offset * kpfused::element_size(c.dtype);
  Buffer copy(extent(problem.view), size_of(c.dtype), static_cast<size_t>(c.lead));
  std::memcpy(copy.data(), in_place, copy.bytes());
  const Results want = part_of(all, c, first, count);
  for (const bool copied : {false, true}) {
    problem.heatmap = copied ? copy.data() : in_place;
    std::snprintf(simt::context, sizeof simt::context, "%s, map %lld alone%s", c.name().c_str(),
                  static_cast<long long>(first), copied ? " in a copy" : "");
    const Results got = Run(problem, nullptr, fixture.pixels(), out)();
    for (int k = 0; k < kResults; ++k)
      check_same(got.bits[k], want.bits[k], kNames[k], copied ? "for a map alone, in a copy" : "for a map alone", out);
  }
}

void check_results(const Case& c, const Fixture& fixture, const Results& results, Outcome& out) {
  const kpfused::Units units = kpfused::units_of(c.units, c.height, c.width);
  for (int64_t n = 0; n < c.maps(); ++n) {
    const Reference r = fixture.expected(n);
    const Real gx = fixture.upstream(n, 0) * units.scale_x, gy = fixture.upstream(n, 1) * units.scale_y;
    check_coordinates(c, n, r, results.bits[0].data(), out);
    check_gradient(c, n, r, gx, gy, results.bits[2].data(), out);
    check_gradient(c, n, r, gx, gy, results.bits[4].data(), out);
    check_grad_beta(c, n, r, gx, gy, results.bits[3].data(), out);
  }
}

}  // namespace

Outcome run_case(const Case& c, const std::vector<simt::Order>& orders, uint64_t seed) {
  Outcome out;
  const Fixture fixture(c);
  Results first;
  for (size_t k = 0; k < orders.size(); ++k) {
    std::snprintf(simt::context, sizeof simt::context, "%s", c.name().c_str());
    simt::set_order(orders[k], seed);
    const Results results = Run(fixture.problem(), fixture.watched(), fixture.pixels(), out)();
    if (k == 0) {
      first = results;
      check_results(c, fixture, results, out);
    }
    for (int i = 0; i < kResults; ++i)
      check_same(results.bits[i], first.bits[i], kNames[i], "between orders of threads", out);
  }
  if (c.alone) {
    const int64_t last = c.channels_last ? (c.outer - 1) * c.inner : c.outer * c.inner - 1;
    check_alone(c, fixture, first, 0, out);
    if (last > 0) check_alone(c, fixture, first, last, out);
  }
  return out;
}

}  // namespace harness
