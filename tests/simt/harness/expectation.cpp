// SPDX-License-Identifier: MIT
// One case through the expectation's launchers: E, the gradients of heatmap and beta, and that of the values.
#include "expectation.h"

#include <memory>

#include "access.h"
#include "cuda/expectation2d.h"
#include "fixture.h"

namespace harness {

namespace {

using kpfused::Holds;
using kpfused::MapView;
using kpfused::SoftmaxParams;
using kpfused::ValueView;
using simt::access::Use;

constexpr int kResults = 7;
constexpr const char* kNames[kResults] = {"expectation", "grad_heatmap", "grad_beta", "grad_heatmap without grad_beta",
                                          "grad_values", "expectation of the softmax", "grad_heatmap of the softmax"};
using Results = std::array<Bits, kResults>;

// The extents of values as views: one for each channel, with as many maps as have values of their own.
MapView channel_view(const ExpectationCase& c, const ValueView& v) {
  return {v.stride_outer ? c.maps.outer : 1, v.stride_inner ? c.maps.inner : 1, c.maps.height, c.maps.width,
          v.stride_outer,                    v.stride_inner,                    v.stride_y,    v.stride_x};
}

size_t value_extent(const ExpectationCase& c) {
  const ValueView v = c.value_view();
  return c.kind == ValueKind::tensor ? extent(channel_view(c, v)) + static_cast<size_t>((v.channels - 1) * v.stride_channel)
                                     : 0;
}

// Sums and what their rounding errors grow with.
struct Sum {
  Real value = 0, size = 0;
  void add(Real term, Real magnitude) { value += term, size += magnitude; }
};

class ExpectationRun {
 public:
  ExpectationRun(const ExpectationCase& c, Outcome& out)
      : c_(c),
        dtype_(c.maps.dtype),
        wide_(accumulator(c.maps.dtype)),
        maps_(static_cast<size_t>(c.maps.maps())),
        out_(out),
        fixture_(c.maps),
        problem_(fixture_.problem()),
        stats_size_(c.maps.moments ? kpfused::kMomentStats : kpfused::kStats),
        stats_(maps_ * static_cast<size_t>(stats_size_), size_of(wide_)),
        values_(value_extent(c), size_of(dtype_)),
        value_gradient_(c.far ? 0 : value_extent(c), size_of(dtype_)),
        grad_(maps_ * static_cast<size_t>(c.channels), size_of(wide_)),
        expectation_(maps_ * static_cast<size_t>(c.channels), size_of(wide_)),
        gradient_(extent(c.grad_view()), size_of(dtype_)),
        grad_beta_(maps_, size_of(wide_)),
        centres_(maps_ * 2, 8),
        softmax_(has_softmax() ? extent(c.view()) : 0, size_of(dtype_), c.maps.lead) {
    fill();
    run_forward();
    if (has_softmax()) fill_softmax();
  }

  Results operator()() {
    Results results;
    expectation();
    results[0] = bits_of(expectation_.data(), expectation_.bytes());
    heatmap_gradient(true);
    results[1] = gather(c_.grad_view(), gradient_.data(), kpfused::element_size(dtype_));
    results[2] = bits_of(grad_beta_.data(), grad_beta_.bytes());
    heatmap_gradient(false);
    results[3] = gather(c_.grad_view(), gradient_.data(), kpfused::element_size(dtype_));
    if (value_gradient_.bytes() > 0) {
      values_gradient();
      results[4] = bits_of(value_gradient_.data(), value_gradient_.bytes());
    }
    if (has_softmax()) {
      holds_ = Holds::softmax;
      expectation();
      results[5] = bits_of(expectation_.data(), expectation_.bytes());
      heatmap_gradient(false);
      results[6] = gather(c_.grad_view(), gradient_.data(), kpfused::element_size(dtype_));
      holds_ = Holds::logits;
    }
    return results;
  }

  void check(const Results& results) {
    std::vector<Sum> of_values(value_gradient_.bytes() / size_of(dtype_));
    for (int64_t n = 0; n < c_.maps.maps(); ++n) check_map(n, results, of_values);
    if (value_gradient_.bytes() > 0) check_values(results, of_values);
  }

 private:
  // Whether P itself may take the place of logits: where it is not rounded to fewer digits.
  bool has_softmax() const { return !c_.is_probability && dtype_ == wide_ && fixture_.watched(); }
  int64_t pixels() const { return c_.maps.height * c_.maps.width; }
  Real unit() const { return epsilon(wide_); }
  bool counted(int64_t n, int64_t i) const { return c_.maps.counted(n, i / c_.maps.width, i % c_.maps.width); }
  int64_t value_offset(int64_t n, int64_t channel, int64_t i) const {
    const ValueView v = c_.value_view();
    return n / c_.maps.inner * v.stride_outer + n % c_.maps.inner * v.stride_inner + channel * v.stride_channel +
           i / c_.maps.width * v.stride_y + i % c_.maps.width * v.stride_x;
  }
  Real upstream(int64_t n, int64_t channel) const {
    return c_.upstream ? load(wide_, grad_.data(), n * c_.channels + channel) : 1;
  }

  void fill() {
    values_.fill(0xff);  // NaN between the values, and where no map that has them counts the pixel
    for (int64_t n = 0; n < c_.maps.maps(); ++n) {
      for (int64_t k = 0; k < c_.channels; ++k) {
        for (int64_t i = 0; i < pixels() && c_.kind == ValueKind::tensor; ++i) {
          const int64_t at = value_offset(n, k, i);
          if (counted(n, i)) store(dtype_, values_.data(), at, 3 * uniform(77, static_cast<uint64_t>(at)) - 1);
        }
        store(wide_, grad_.data(), n * c_.channels + k,
              2 * uniform(static_cast<uint64_t>(n) + 17, static_cast<uint64_t>(k)) - 0.5L);
      }
      const int64_t sizes[] = {c_.maps.width, c_.maps.height};
      for (int axis = 0; axis < 2; ++axis)
        // Also on a border, and beside the map: as far as the window reaches in, and out of its reach.
        static_cast<int64_t*>(centres_.data())[2 * n + axis] =
            n % 4 == 3   ? (axis ? 0 : sizes[axis] - 1)
            : n % 8 == 2 ? (axis ? -c_.radius : sizes[axis])
            : n % 8 == 6 ? (axis ? int64_t{1} << 62 : 0)
                         : static_cast<int64_t>(uniform(static_cast<uint64_t>(n) + 5, static_cast<uint64_t>(axis)) *
                                                static_cast<Real>(sizes[axis]));
    }
  }

  // Stats as the soft-argmax leaves them.
  void run_forward() {
    if (c_.is_probability) return;
    kpfused::ForwardParams p{};
    p.dtype = dtype_;
    p.heatmap = problem_.heatmap;
    p.view = c_.view();
    p.pixels = problem_.pixels;
    p.beta = problem_.beta;
    p.units = problem_.units;
    Buffer coordinates(maps_ * 2, size_of(wide_)), peak(maps_ * 2, 8);
    const size_t wide = size_of(wide_);
    Buffer fields[] = {{maps_ * 4, wide}, {maps_, wide}, {maps_, wide}, {maps_, wide}};
    p.coordinates = coordinates.data();
    p.stats = stats_.data();
    p.with_moments = c_.maps.moments;
    p.moments = {fields[0].data(), fields[1].data(), fields[2].data(), fields[3].data(),
                 static_cast<int64_t*>(peak.data())};
    Buffer workspace(static_cast<size_t>(kpfused::cuda::soft_argmax2d_forward_workspace(p)), 1);
    p.workspace = workspace.data();
    simt::access::forget_all();
    simt::set_order(simt::Order::ascending, 0);
    watch_heatmap({});
    stats_.watch("stats", Use::output);
    coordinates.watch("coordinates", Use::output);
    peak.watch("peak", Use::output);
    for (const Buffer& field : fields) field.watch("field", Use::output);
    workspace.watch("workspace", Use::workspace);
    if (kpfused::cuda::soft_argmax2d_forward(p, nullptr) != 0) out_.fail("soft_argmax2d_forward returns an error");
  }

  // P as its kernel leaves it, and NaN around it.
  void fill_softmax() {
    softmax_.fill(0xff);
    std::vector<Reference> expected;
    for (int64_t n = 0; n < c_.maps.maps(); ++n) expected.push_back(fixture_.expected(n));
    each_pixel(c_.view(), [&](int64_t n, int64_t y, int64_t x, int64_t offset) {
      const Reference& r = expected[static_cast<size_t>(n)];
      const int64_t i = y * c_.maps.width + x;
      const Real p = counted(n, i) ? r.probability[static_cast<size_t>(i)] : 0;
      store(dtype_, softmax_.data(), offset, r.empty && c_.maps.fills_empty() ? kEmpty : p);
    });
  }

  SoftmaxParams softmax() const {
    SoftmaxParams p{};
    p.dtype = dtype_;
    p.holds = c_.is_probability ? Holds::probabilities : holds_;
    p.heatmap = holds_ == Holds::softmax ? softmax_.data() : problem_.heatmap;
    p.view = c_.view();
    p.pixels = problem_.pixels;
    p.beta = problem_.beta;
    p.stats = c_.is_probability ? nullptr : stats_.data();
    p.stats_stride = stats_size_;
    return p;
  }

  kpfused::Values values() const {
    const bool tensor = c_.kind == ValueKind::tensor;
    return {c_.kind,   tensor ? values_.data() : nullptr, c_.value_view(), problem_.units,
            c_.radius, c_.centred ? static_cast<const int64_t*>(centres_.data()) : nullptr};
  }

  // Pixels that kernels may read: all of the maps' where `only` is empty.
  void watch_heatmap(const std::vector<uint8_t>& only) const {
    const Buffer* const heatmap = holds_ == Holds::softmax ? &softmax_ : fixture_.watched();
    if (heatmap) heatmap->watch("heatmap", Use::input, only.empty() ? fixture_.pixels().data() : only.data());
  }

  void watch_inputs() const {
    stats_.watch("saved stats", Use::input);
    centres_.watch("centres", Use::input);
    if (c_.upstream) grad_.watch("grad", Use::input);
    if (values_.bytes() > 0 && !values_.huge()) values_.watch("values", Use::input, value_pixels().data());
  }

  std::vector<uint8_t> value_pixels() const {
    std::vector<uint8_t> valid(value_extent(c_));
    for (int64_t n = 0; n < c_.maps.maps(); ++n)
      for (int64_t k = 0; k < c_.channels; ++k)
        for (int64_t i = 0; i < pixels(); ++i) valid[static_cast<size_t>(value_offset(n, k, i))] = 1;
    return valid;
  }

  void expectation() {
    kpfused::ExpectationParams p{softmax(), values(), expectation_.data(), nullptr};
    Buffer workspace(static_cast<size_t>(kpfused::cuda::expectation_workspace(p)), 1);
    p.workspace = workspace.data();
    expectation_.poison();
    simt::access::forget_all();
    // Nothing beyond the valid size or the window.
    std::vector<uint8_t> needed(fixture_.pixels().size());
    each_pixel(c_.view(), [&](int64_t n, int64_t y, int64_t x, int64_t offset) {
      const bool valid = !c_.maps.has_sizes() || (y < c_.maps.valid_height(n) && x < c_.maps.valid_width(n));
      if (!needed.empty() && valid && value(n, 0, y * c_.maps.width + x, true) != 0) needed[static_cast<size_t>(offset)] = 1;
    });
    watch_heatmap(needed);
    watch_inputs();
    expectation_.watch(kNames[0], Use::output);
    workspace.watch("workspace", Use::workspace);
    finish(kpfused::cuda::expectation(p, nullptr), {kNames[0]}, static_cast<double>((c_.channels + 3) / 4));
  }

  void heatmap_gradient(bool with_grad_beta) {
    const void* const mean = c_.is_probability ? nullptr : expectation_.data();
    kpfused::ExpectationHeatmapParams p{softmax(),
                                        values(),
                                        mean,
                                        c_.upstream ? grad_.data() : nullptr,
                                        gradient_.data(),
                                        c_.grad_view(),
                                        with_grad_beta ? grad_beta_.data() : nullptr,
                                        nullptr};
    Buffer workspace(static_cast<size_t>(kpfused::cuda::expectation_heatmap_workspace(p)), 1);
    p.workspace = workspace.data();
    gradient_.poison();
    if (with_grad_beta) grad_beta_.poison();
    simt::access::forget_all();
    watch_heatmap({});
    watch_inputs();
    expectation_.watch("saved expectation", Use::input);
    gradient_.watch(kNames[1], Use::output);
    if (with_grad_beta) grad_beta_.watch(kNames[2], Use::output);
    workspace.watch("workspace", Use::workspace);
    std::vector<const char*> outputs{kNames[1]};
    if (with_grad_beta) outputs.push_back(kNames[2]);
    finish(kpfused::cuda::expectation_heatmap(p, nullptr), outputs, c_.is_probability ? 0 : 1);
  }

  void values_gradient() {
    const kpfused::ExpectationValuesParams p{softmax(), c_.upstream ? grad_.data() : nullptr, value_gradient_.data(),
                                             c_.value_view()};
    value_gradient_.poison();
    simt::access::forget_all();
    watch_heatmap({});
    watch_inputs();
    const std::vector<uint8_t> valid = value_pixels();
    value_gradient_.watch(kNames[4], Use::output, valid.data());
    finish(kpfused::cuda::expectation_values(p, nullptr), {kNames[4]}, static_cast<double>((c_.channels + 3) / 4));
  }

  void finish(int status, const std::vector<const char*>& outputs, double most_reads) {
    if (status != 0) out_.fail("%s returns error %d", outputs[0], status);
    if (!simt::access::kEnabled || !fixture_.watched()) return;
    for (const char* name : outputs)
      if (const size_t n = simt::access::unwritten_elements(name)) out_.fail("%zu of %s left unwritten", n, name);
    const double reads = simt::access::reads_per_element("heatmap");
    if (reads > most_reads + 1e-9) out_.fail("%s reads the heatmap %.6f times, not %.6f", outputs[0], reads, most_reads);
  }

  // V of channel k at pixel i. `anywhere`: of a tensor, whatever it is, 1.
  Real value(int64_t n, int64_t k, int64_t i, bool anywhere = false) const {
    const int64_t y = i / c_.maps.width, x = i % c_.maps.width;
    if (c_.kind == ValueKind::window) {
      int64_t centre[2];
      for (int axis = 0; axis < 2; ++axis) {
        const int64_t size = axis ? c_.maps.height : c_.maps.width;
        const Real mean = c_.is_probability ? 0 : load(wide_, stats_.data(), n * stats_size_ + 2 + axis);
        const Real pixel = std::isnan(mean) ? 0 : std::nearbyint(mean + static_cast<Real>(size - 1) / 2);
        centre[axis] = std::min(std::max(static_cast<int64_t>(pixel), int64_t{0}), size - 1);
        if (c_.centred) centre[axis] = static_cast<const int64_t*>(centres_.data())[2 * n + axis];
      }
      return std::abs(x - centre[0]) <= c_.radius && std::abs(y - centre[1]) <= c_.radius ? 1 : 0;
    }
    if (anywhere) return 1;
    if (c_.kind == ValueKind::tensor) return load(dtype_, values_.data(), value_offset(n, k, i));
    const kpfused::Units& u = problem_.units;
    return k == 0 ? u.scale_x * (static_cast<Real>(x) - static_cast<Real>(c_.maps.width - 1) / 2) + u.offset_x
                  : u.scale_y * (static_cast<Real>(y) - static_cast<Real>(c_.maps.height - 1) / 2) + u.offset_y;
  }

  void check_map(int64_t n, const Results& results, std::vector<Sum>& of_values) {
    const Reference r = fixture_.expected(n);
    const bool empty = !c_.is_probability && r.empty && c_.maps.fills_empty();
    const auto probability = [&](int64_t i) -> Real {
      if (!counted(n, i)) return 0;
      return c_.is_probability ? fixture_.logit(n, i) : r.probability[static_cast<size_t>(i)];
    };
    std::vector<Sum> mean(static_cast<size_t>(c_.channels));
    for (int64_t k = 0; k < c_.channels; ++k) {
      Sum& e = mean[static_cast<size_t>(k)];
      for (int64_t i = 0; i < pixels(); ++i) {
        if (!counted(n, i)) continue;
        const Real v = value(n, k, i), p = probability(i);
        e.add(p * v, std::fabs(p) * coarse(v));
      }
      const Real want = empty ? kEmpty : e.value;
      for (const size_t result : {0, 5}) {
        if (results[result].empty()) continue;
        const Real got = load(wide_, results[result].data(), n * c_.channels + k);
        if (!out_.close(got, want, empty ? kReferenceRounding : unit() * 64 * e.size + Tolerance::smallest))
          out_.fail("%s of channel %lld of map %lld: %.9Lg instead of %.9Lg", kNames[result], static_cast<long long>(k),
                    static_cast<long long>(n), got, want);
      }
    }
    check_gradient(n, r, empty, mean, probability, results);
    for (int64_t k = 0; k < c_.channels && !of_values.empty(); ++k) {
      for (int64_t i = 0; i < pixels(); ++i) {
        Real term = counted(n, i) ? probability(i) * upstream(n, k) : 0;
        if (empty) term = c_.upstream ? 0 : kEmpty;
        of_values[static_cast<size_t>(value_offset(n, k, i))].add(term, std::fabs(term));
      }
    }
  }

  // Coordinates are differences of the size of the map.
  Real coarse(Real v) const {
    const kpfused::Units& u = problem_.units;
    const Real terms = std::fabs(u.offset_x) + std::fabs(u.offset_y) + 1e-3L;
    return std::fabs(v) + (c_.kind == ValueKind::coordinates ? terms : 0);
  }

  template <class Probability>
  void check_gradient(int64_t n, const Reference& r, bool empty, const std::vector<Sum>& mean,
                      const Probability& probability, const Results& results) {
    Sum beta;
    const Real of_beta = c_.is_probability ? 1 : c_.maps.beta(n);
    for (int64_t i = 0; i < pixels(); ++i) {
      Real want = 0, size = 0;
      if (counted(n, i) && !empty) {
        for (int64_t k = 0; k < c_.channels; ++k) {
          const Sum& e = mean[static_cast<size_t>(k)];
          const Real g = upstream(n, k), v = value(n, k, i);
          want += g * (c_.is_probability ? v : v - e.value);
          size += std::fabs(g) * (coarse(v) + (c_.is_probability ? 0 : e.size));
        }
        const Real p = c_.is_probability ? 1 : probability(i);
        want *= p, size *= std::fabs(p);
        if (!c_.is_probability && p != 0) {
          const Real distance = fixture_.logit(n, i) - r.top;
          beta.add(distance * want, std::fabs(distance) * size);
        }
        want *= of_beta, size *= std::fabs(of_beta);
      }
      const Real rounding = epsilon(dtype_) / 2 * std::fabs(want) + (dtype_ == Dtype::float16 && size != 0 ? 0x1p-25L : 0);
      const Real bound = size == 0 ? 1e-300L : unit() * 64 * size + Tolerance::smallest;
      for (const int k : {1, 3, 6}) {
        if (results[static_cast<size_t>(k)].empty()) continue;
        const Real got = load(dtype_, results[static_cast<size_t>(k)].data(), n * pixels() + i);
        if (!out_.close(got, want, bound, rounding))
          out_.fail("%s of map %lld at (x, y) = (%lld, %lld): %.9Lg instead of %.9Lg", kNames[k], static_cast<long long>(n),
                    static_cast<long long>(i % c_.maps.width), static_cast<long long>(i / c_.maps.width), got, want);
      }
    }
    const Real got = load(wide_, results[2].data(), n);
    if (!out_.close(got, beta.value, unit() * 64 * beta.size + Tolerance::smallest))
      out_.fail("grad_beta of map %lld: %.9Lg instead of %.9Lg", static_cast<long long>(n), got, beta.value);
  }

  void check_values(const Results& results, const std::vector<Sum>& want) {
    const std::vector<uint8_t> valid = value_pixels();
    for (size_t i = 0; i < want.size(); ++i) {
      if (!valid[i]) continue;
      const Real got = load(dtype_, results[4].data(), static_cast<int64_t>(i)), value = want[i].value;
      const Real rounding = epsilon(dtype_) / 2 * std::fabs(value) + (dtype_ == Dtype::float16 && value != 0 ? 0x1p-25L : 0);
      const Real bound = want[i].size == 0 ? 1e-300L : unit() * 64 * want[i].size + Tolerance::smallest;
      if (!out_.close(got, value, bound, rounding))
        out_.fail("grad_values element %zu: %.9Lg instead of %.9Lg", i, got, value);
    }
  }

  const ExpectationCase& c_;
  Dtype dtype_, wide_;
  size_t maps_;
  Outcome& out_;
  Fixture fixture_;
  Problem problem_;
  int64_t stats_size_;
  Buffer stats_, values_, value_gradient_, grad_, expectation_, gradient_, grad_beta_, centres_, softmax_;
  Holds holds_ = Holds::logits;  // what kernels are given
};

}  // namespace

Outcome run_expectation(const ExpectationCase& c, const std::vector<simt::Order>& orders, uint64_t seed) {
  Outcome out;
  std::snprintf(simt::context, sizeof simt::context, "%s", c.name().c_str());
  ExpectationRun run(c, out);
  Results first;
  for (size_t k = 0; k < orders.size(); ++k) {
    simt::set_order(orders[k], seed);
    const Results results = run();
    if (k == 0) {
      first = results;
      run.check(results);
    }
    for (size_t i = 0; i < kResults; ++i) check_same(results[i], first[i], kNames[i], "between orders of threads", out);
  }
  return out;
}

}  // namespace harness
