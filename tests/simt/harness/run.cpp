// SPDX-License-Identifier: MIT
// One case through the real launchers: forward, backward with and without grad_beta, in several orders of threads.
#include "run.h"

#include <memory>

#include "access.h"
#include "cuda/soft_argmax2d.h"
#include "fixture.h"

namespace harness {

namespace {

using kpfused::BackwardParams;
using kpfused::ForwardParams;
using simt::access::Use;

// The last five are there with moments only.
constexpr int kResults = 10;
constexpr const char* kNames[kResults] = {"coordinates", "stats",   "grad_heatmap", "grad_beta",        "grad_heatmap without grad_beta",
                                          "covariance",  "entropy", "logsumexp",    "peak_probability", "peak"};

// The results of one run. Those of a case are compared between orders, and with maps run alone.
struct Results {
  Bits bits[kResults];
};

void watch_heatmap(const Buffer* heatmap, const std::vector<uint8_t>& pixels) {
  if (heatmap) heatmap->watch("heatmap", Use::input, pixels.data());
}

class Run {
 public:
  // `heatmap` and `pixels` are for the checks of access.h; null where the caller has no use for them.
  // `most_reads`: of the average element.
  Run(const Problem& problem, const Buffer* heatmap, const std::vector<uint8_t>& pixels, double most_reads, Outcome& out)
      : p_(problem),
        maps_(static_cast<size_t>(problem.view.maps())),
        wide_(size_of(accumulator(problem.dtype))),
        coordinates_(maps_ * 2, wide_),
        stats_(maps_ * (problem.with_moments ? kpfused::kMomentStats : kpfused::kStats), wide_),
        gradient_(extent(problem.backward.second), size_of(problem.dtype)),
        grad_beta_(maps_, wide_),
        fields_{Buffer(fields() * 4, wide_), Buffer(fields(), wide_), Buffer(fields(), wide_), Buffer(fields(), wide_),
                Buffer(fields() * 2, 8)},
        heatmap_(heatmap),
        pixels_(pixels),
        most_reads_(most_reads),
        out_(out) {}

  Results operator()() {
    Results results;
    forward();
    results.bits[0] = bits_of(coordinates_.data(), coordinates_.bytes());
    results.bits[1] = bits_of(stats_.data(), stats_.bytes());
    for (int k = 5; k < kResults; ++k) results.bits[k] = bits_of(fields_[k - 5].data(), fields_[k - 5].bytes());
    backward(true);
    results.bits[2] = gather(p_.backward.second, gradient_.data(), kpfused::element_size(p_.dtype));
    results.bits[3] = bits_of(grad_beta_.data(), grad_beta_.bytes());
    backward(false);
    results.bits[4] = gather(p_.backward.second, gradient_.data(), kpfused::element_size(p_.dtype));
    return results;
  }

 private:
  void forward() {
    ForwardParams params{};
    params.dtype = p_.dtype;
    params.heatmap = p_.heatmap;
    params.view = p_.view;
    params.pixels = p_.pixels;
    params.beta = p_.beta;
    params.units = p_.units;
    params.coordinates = coordinates_.data();
    params.stats = stats_.data();
    params.with_moments = p_.with_moments;
    params.moments = {fields_[0].data(), fields_[1].data(), fields_[2].data(), fields_[3].data(),
                      static_cast<int64_t*>(fields_[4].data())};
    const auto bytes = static_cast<size_t>(kpfused::cuda::soft_argmax2d_forward_workspace(params));
    Buffer workspace(bytes, 1);
    if (bytes > 0) params.workspace = workspace.data();
    coordinates_.poison();
    stats_.poison();
    simt::access::forget_all();
    watch_heatmap(heatmap_, pixels_);
    coordinates_.watch(kNames[0], Use::output);
    stats_.watch(kNames[1], Use::output);
    std::vector<const char*> outputs{kNames[0], kNames[1]};
    for (int k = 5; p_.with_moments && k < kResults; ++k) {
      fields_[k - 5].poison();
      fields_[k - 5].watch(kNames[k], Use::output);
      outputs.push_back(kNames[k]);
    }
    workspace.watch("workspace", Use::workspace);
    finish(kpfused::cuda::soft_argmax2d_forward(params, nullptr), "forward", outputs);
  }

  void backward(bool with_grad_beta) {
    BackwardParams params{};
    params.dtype = p_.dtype;
    params.heatmap = p_.heatmap;
    params.view = p_.backward.first;
    params.pixels = p_.pixels;
    params.beta = p_.beta;
    params.units = p_.units;
    params.stats = stats_.data();
    params.grad_coordinates = p_.grad_coordinates;
    params.grad_stride_map = p_.grad_stride_map;
    params.grad_stride_xy = p_.grad_stride_xy;
    params.with_moments = p_.with_moments;
    params.moments = {p_.grad_fields[0], p_.grad_fields[1], p_.grad_fields[2], p_.grad_fields[3],
                      static_cast<const int64_t*>(fields_[4].data())};
    params.grad_heatmap = gradient_.data();
    params.grad_view = p_.backward.second;
    params.grad_beta = with_grad_beta ? grad_beta_.data() : nullptr;
    const auto bytes = static_cast<size_t>(kpfused::cuda::soft_argmax2d_backward_workspace(params));
    Buffer workspace(bytes, 1);
    if (bytes > 0) params.workspace = workspace.data();
    gradient_.poison();
    if (with_grad_beta) grad_beta_.poison();
    simt::access::forget_all();
    watch_heatmap(heatmap_, pixels_);
    stats_.watch("saved stats", Use::input);
    if (p_.with_moments) fields_[4].watch("saved peak", Use::input);
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
    if (most_reads_ == 1 ? reads != 1 : reads > most_reads_)
      out_.fail("%s reads the heatmap %.6f times, not %.6f", what, reads, most_reads_);
  }

  size_t fields() const { return p_.with_moments ? maps_ : 0; }

  Problem p_;
  size_t maps_, wide_;
  Buffer coordinates_, stats_, gradient_, grad_beta_, fields_[5];
  const Buffer* heatmap_;
  const std::vector<uint8_t>& pixels_;
  double most_reads_;
  Outcome& out_;
};

// Bits of the maps [first, first + count) among results of all maps, in the order of kNames.
Results part_of(const Results& all, const Case& c, int64_t first, int64_t count) {
  const auto wide = static_cast<int64_t>(size_of(accumulator(c.dtype)));
  const int64_t map_bytes = c.height * c.width * kpfused::element_size(c.dtype);
  const int64_t stats = c.moments ? kpfused::kMomentStats : kpfused::kStats;
  const int64_t bytes[kResults] = {2 * wide, stats * wide, map_bytes, wide, map_bytes, 4 * wide, wide, wide, wide, 16};
  Results part;
  for (int k = 0; k < (c.moments ? kResults : 5); ++k)
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
  problem.view = views(c, 1, count, strides, strides).first;
  problem.backward = views(c, 1, count, strides, grad_strides);
  const auto accumulator_bytes = kpfused::element_size(accumulator(c.dtype));
  const auto on = [&](const void* p, int64_t values) {
    return p ? static_cast<const char*>(p) + values * accumulator_bytes : nullptr;
  };
  problem.grad_coordinates = on(problem.grad_coordinates, first * problem.grad_stride_map);
  for (int k = 0; k < 4; ++k) problem.grad_fields[k] = on(problem.grad_fields[k], first * kFieldValues[k]);
  if (c.has_mask()) {
    kpfused::MaskView& mask = problem.pixels.mask_view;
    problem.pixels.mask += mask.offset(first);
    count == 1 ? void(mask = {1, {1}, {0}, mask.stride_y, mask.stride_x}) : void(--mask.runs);  // no other images
  }
  if (c.has_sizes()) problem.pixels.sizes += first / c.inner * 2, problem.pixels.divisor = problem.pixels.modulus = 1;
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
    const Results got = Run(problem, nullptr, fixture.pixels(), 1, out)();
    for (int k = 0; k < kResults; ++k)
      check_same(got.bits[k], want.bits[k], kNames[k], copied ? "for a map alone, in a copy" : "for a map alone", out);
  }
}

void check_results(const Case& c, const Fixture& fixture, const Results& results, Outcome& out) {
  for (int64_t n = 0; n < c.maps(); ++n) {
    const Reference r = fixture.expected(n);
    const auto bits = [&](int k) -> const void* { return results.bits[k].data(); };
    check_coordinates(c, n, r, bits(0), out);
    if (c.moments) check_fields(c, n, r, {bits(5), bits(6), bits(7), bits(8)}, bits(9), out);
    check_gradient(c, n, r, bits(2), out);
    check_gradient(c, n, r, bits(4), out);
    check_grad_beta(c, n, r, bits(3), out);
  }
}

// How often the average element may be read: what lies beyond the valid size only as part of a vector.
double most_reads(const Case& c) {
  if (!c.has_sizes()) return 1;
  double pixels = 0;
  for (int64_t n = 0; n < c.maps(); ++n) {
    const int64_t height = std::min(c.valid_height(n), c.height), width = c.valid_width(n) + (c.channels_last ? 0 : 7);
    pixels += static_cast<double>(height * std::min(width, c.width));
  }
  return pixels / static_cast<double>(c.maps() * c.height * c.width) + 1e-9;
}

}  // namespace

Outcome run_case(const Case& c, const std::vector<simt::Order>& orders, uint64_t seed) {
  Outcome out;
  const Fixture fixture(c);
  Results first;
  for (size_t k = 0; k < orders.size(); ++k) {
    std::snprintf(simt::context, sizeof simt::context, "%s", c.name().c_str());
    simt::set_order(orders[k], seed);
    const Results results = Run(fixture.problem(), fixture.watched(), fixture.pixels(), most_reads(c), out)();
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
