// SPDX-License-Identifier: MIT
// The reference works on the fields of slices, not on their stats; the gradients are differences of its loss.
#include "volumes.h"

#include <array>
#include <memory>

#include "access.h"
#include "buffers.h"
#include "cuda/volumes.h"

namespace harness {

namespace {

using simt::access::Use;

constexpr double kScale[] = {0.5, 0.25, 2}, kOffset[] = {-1, 3, 0.5};  // units along x, y and z
constexpr int kGradients[] = {2, 4, 1, 1, 1};                           // numbers a slice
constexpr int kUpstream[] = {3, 9, 1, 1, 1};                            // and a volume
constexpr const char* kNames[] = {"mean", "covariance", "entropy", "logsumexp", "peak_probability"};

// A slice, or a volume, as users see it; offsets of its numbers: mean 0, covariance 3, entropy 12, logsumexp 13, chance 14.
using Fields = std::array<Real, 15>;
constexpr int kFirst[] = {0, 3, 12, 13, 14};

struct SliceStats {
  Real peak, sum, x, y, xx, xy, yy, distance;
};

class VolumeRun {
 public:
  VolumeRun(const VolumeCase& c, Outcome& out)
      : c_(c),
        wide_(accumulator(c.dtype)),
        view_{c.outer * c.inner, c.depth, c.inner},
        out_(out),
        slice_stats_(count(view_.slices() * kpfused::kMomentStats), size_of()),
        slice_peaks_(count(view_.slices() * 2), 8),
        betas_(count(view_.slices()), size_of()),
        stats_(count(view_.volumes * kpfused::kVolumeStats), size_of()),
        peak_(count(view_.volumes * 3), 8) {
    for (int f = 0; f < 5; ++f) {
      fields_.emplace_back(new Buffer(count(view_.volumes * kUpstream[f]), size_of()));
      upstream_.emplace_back(new Buffer(count(view_.volumes * kUpstream[f]), size_of()));
      gradients_.emplace_back(new Buffer(given(f) ? count(view_.slices() * kGradients[f]) : 0, size_of()));
    }
    for (int64_t v = 0; v < view_.volumes; ++v) fill(v);
  }

  std::vector<Bits> operator()() {
    forward();
    backward();
    std::vector<Bits> bits{bits_of(stats_.data(), stats_.bytes()), bits_of(peak_.data(), peak_.bytes())};
    for (const auto& field : fields_) bits.push_back(bits_of(field->data(), field->bytes()));
    for (const auto& gradient : gradients_) bits.push_back(bits_of(gradient->data(), gradient->bytes()));
    return bits;
  }

  void check() {
    for (int64_t v = 0; v < view_.volumes; ++v) check_volume(v);
  }

 private:
  static size_t count(int64_t n) { return static_cast<size_t>(n); }
  size_t size_of() const { return static_cast<size_t>(kpfused::element_size(wide_)); }
  bool given(int f) const { return f == 0 || f == 3 || (c_.given >> f & 1); }
  Real beta(int64_t v) const { return c_.betas ? load(wide_, betas_.data(), view_.slice(v, 0)) : Real(c_.beta); }

  void fill(int64_t v) {
    for (int64_t d = 0; d < view_.depth; ++d) {
      const int64_t n = view_.slice(v, d);
      const auto random = [&](int i) { return uniform(static_cast<uint64_t>(v) + 3, static_cast<uint64_t>(d * 16 + i)); };
      // Peaks in steps, so that the largest logits' differences are exact.
      SliceStats s{std::floor(16 * random(0)) / 4, 1 + 40 * random(1), 9 * random(2) - 4, 7 * random(3) - 3,
                   1 + random(4),                  random(5) - 0.5L,   1 + random(6),     -2 * random(7)};
      if (c_.slices == Slices::ties && d % 3 == 1) s.peak = 4;
      if (c_.slices == Slices::offset_1e30) s.peak = (v % 2 ? -1 : 1) * 1e30L * (1 + std::floor(4 * random(0)) / 4);
      const bool odd = c_.slices == Slices::degenerate && d == view_.depth / 2;
      if (odd && v % 3 == 1) s.sum = kNan;
      if (odd && v % 3 == 2) s.peak = kInfinity, s.sum = kNan, s.x = s.y = s.distance = kNan;
      if (c_.slices == Slices::empty && (d % 4 == 0 || v % 3 == 1))
        s = {-3.40282347e38L, 0, kNan, kNan, kNan, kNan, kNan, kNan};
      const Real values[] = {s.peak, s.sum, s.x, s.y, s.xx, s.xy, s.yy, s.distance};
      for (int i = 0; i < kpfused::kMomentStats; ++i) store(wide_, slice_stats_.data(), n * kpfused::kMomentStats + i, values[i]);
      for (int axis = 0; axis < 2; ++axis) static_cast<int64_t*>(slice_peaks_.data())[2 * n + axis] = 10 * n + axis;
      store(wide_, betas_.data(), n, 0.5L + static_cast<Real>(v % 4));
    }
    for (int f = 0; f < 5; ++f)
      for (int64_t i = 0; i < kUpstream[f]; ++i)
        store(wide_, upstream_[f]->data(), v * kUpstream[f] + i, 2 * uniform(static_cast<uint64_t>(v) + 71, static_cast<uint64_t>(16 * f + i)) - 1);
  }

  kpfused::VolumeParams volume() const {
    const kpfused::BetaView betas{c_.betas ? betas_.data() : nullptr, c_.beta, 1, view_.slices()};
    return {c_.dtype, view_, betas, {kScale[0], kOffset[0], kScale[1], kOffset[1]}, kScale[2], kOffset[2], slice_stats_.data()};
  }

  void forward() {
    simt::access::forget_all();
    watch_inputs();
    stats_.poison(), stats_.watch("stats", Use::output);
    peak_.poison(), peak_.watch("peak", Use::output);
    for (int f = 0; f < 5; ++f) fields_[f]->poison(), fields_[f]->watch(kNames[f], Use::output);
    const kpfused::VolumeForwardParams p{volume(),
                                         static_cast<const int64_t*>(slice_peaks_.data()),
                                         c_.fills,
                                         kEmpty,
                                         fields_[0]->data(),
                                         {fields_[1]->data(), fields_[2]->data(), fields_[3]->data(), fields_[4]->data(),
                                          static_cast<int64_t*>(peak_.data())},
                                         stats_.data()};
    if (kpfused::cuda::merge_slices(p, nullptr) != 0) out_.fail("merge_slices returns an error");
    written("stats"), written("peak");
    for (const char* name : kNames) written(name);
  }

  void backward() {
    simt::access::forget_all();
    watch_inputs();
    stats_.watch("saved stats", Use::input);
    const void* from[5];
    void* to[5];
    for (int f = 0; f < 5; ++f) {
      from[f] = c_.given >> f & 1 ? upstream_[f]->data() : nullptr;
      to[f] = given(f) ? gradients_[f]->data() : nullptr;
      if (from[f]) upstream_[f]->watch("upstream", Use::input);
      if (to[f]) gradients_[f]->poison(), gradients_[f]->watch(kNames[f], Use::output);
    }
    const kpfused::VolumeBackwardParams p{volume(), stats_.data(), from[0], from[1], from[2], from[3],
                                          from[4],  to[0],         to[1],   to[2],   to[3],   to[4]};
    if (kpfused::cuda::spread_gradients(p, nullptr) != 0) out_.fail("spread_gradients returns an error");
    for (int f = 0; f < 5; ++f)
      if (to[f]) written(kNames[f]);
  }

  void watch_inputs() const {
    slice_stats_.watch("slice stats", Use::input);
    slice_peaks_.watch("slice peaks", Use::input);
    betas_.watch("betas", Use::input);
  }

  void written(const char* name) {
    if (!simt::access::kEnabled) return;
    if (const size_t n = simt::access::unwritten_elements(name)) out_.fail("%zu of %s left unwritten", n, name);
  }

  // Of slice d, z in the units of the volume. Its logsumexp is counted from `top`.
  Fields fields_of(int64_t v, int64_t d, Real top) const {
    const int64_t at = view_.slice(v, d) * kpfused::kMomentStats;
    const auto s = [&](int i) { return load(wide_, slice_stats_.data(), at + i); };
    const Real magnitude = std::fabs(beta(v)), log_sum = std::log(s(1));
    Fields f{};
    f[0] = kScale[0] * s(2) + kOffset[0], f[1] = kScale[1] * s(3) + kOffset[1];
    f[2] = kScale[2] * (static_cast<Real>(d) - static_cast<Real>(view_.depth - 1) / 2) + kOffset[2];
    f[3] = kScale[0] * kScale[0] * s(4), f[4] = f[6] = kScale[0] * kScale[1] * s(5), f[7] = kScale[1] * kScale[1] * s(6);
    f[12] = log_sum - magnitude * s(7), f[13] = magnitude * (s(0) - top) + log_sum, f[14] = 1 / s(1);
    return f;
  }

  // Of the volume, as the head of csrc/volumes.h has it. `at`: the slice that has the peak.
  static Fields merged(const std::vector<Fields>& slices, size_t at) {
    Real all = 0;
    for (const Fields& s : slices) all += std::exp(s[13]);
    Fields f{};
    const auto share = [&](const Fields& s) { return std::exp(s[13]) / all; };
    for (const Fields& s : slices)
      for (int i = 0; i < 3; ++i) f[i] += share(s) * s[i];
    for (const Fields& s : slices) {
      for (int i = 0; i < 9; ++i) f[3 + i] += share(s) * (s[3 + i] + (s[i / 3] - f[i / 3]) * (s[i % 3] - f[i % 3]));
      f[12] += share(s) * (s[12] - s[13] + std::log(all));
    }
    f[13] = std::log(all);
    f[14] = share(slices[at]) * slices[at][14];
    return f;
  }

  Real loss(int64_t v, const Fields& f) const {
    Real sum = 0;
    for (int g = 0; g < 5; ++g)
      for (int i = 0; i < kUpstream[g]; ++i)
        if (c_.given >> g & 1) sum += load(wide_, upstream_[g]->data(), v * kUpstream[g] + i) * f[kFirst[g] + i];
    return sum;
  }

  void check_volume(int64_t v) {
    std::vector<Fields> slices;  // those in which something weighs
    std::vector<int64_t> depths;
    Real top = -kInfinity;
    int64_t at = 0;
    bool number = true;
    for (int64_t d = 0; d < view_.depth; ++d) {
      const Real peak = load(wide_, slice_stats_.data(), view_.slice(v, d) * kpfused::kMomentStats);
      if (peak > top) top = peak, at = d;
    }
    size_t of_peak = 0;
    for (int64_t d = 0; d < view_.depth; ++d) {
      const Real sum = load(wide_, slice_stats_.data(), view_.slice(v, d) * kpfused::kMomentStats + 1);
      number = number && !std::isnan(sum);
      if (sum == 0) continue;
      if (d == at) of_peak = slices.size();
      slices.push_back(fields_of(v, d, top));
      depths.push_back(d);
    }
    const bool empty = slices.empty();
    Fields want{};
    if (!empty && number) want = merged(slices, of_peak);
    for (int f = 0; f < 5; ++f)
      for (int i = 0; i < kUpstream[f]; ++i) {
        Real value = empty && c_.fills ? Real(kEmpty) : !number || empty ? kNan : want[kFirst[f] + i];
        if (f == 3 && number && !(empty && c_.fills)) value = empty ? -kInfinity : value + std::fabs(beta(v)) * top;
        const Real bound = epsilon(wide_) * 64 * (8 + std::fabs(value)) + kReferenceRounding;
        const Real got = load(wide_, fields_[f]->data(), v * kUpstream[f] + i);
        if (!out_.close(got, value, bound))
          out_.fail("%s[%d] of volume %lld: %.9Lg instead of %.9Lg", kNames[f], i, static_cast<long long>(v), got, value);
      }
    const int64_t* const peak = static_cast<const int64_t*>(peak_.data()) + 3 * v;
    const int64_t slice = view_.slice(v, at);
    if (number && (peak[0] != 10 * slice || peak[1] != 10 * slice + 1 || peak[2] != at))
      out_.fail("peak of volume %lld in slice %lld instead of %lld", static_cast<long long>(v),
                static_cast<long long>(peak[2]), static_cast<long long>(at));
    for (int64_t d = 0, k = 0; d < view_.depth; ++d) {
      const bool weighs = k < static_cast<int64_t>(depths.size()) && depths[count(k)] == d;
      check_gradients(v, d, weighs ? &slices : nullptr, count(k), of_peak, number);
      k += weighs;
    }
  }

  // slices: null where nothing weighs in this one.
  void check_gradients(int64_t v, int64_t d, std::vector<Fields>* slices, size_t k, size_t of_peak, bool number) {
    for (int f = 0; f < 5; ++f)
      for (int i = 0; i < kGradients[f] && given(f); ++i) {
        const Real got = load(wide_, gradients_[f]->data(), view_.slice(v, d) * kGradients[f] + i);
        Real want = 0, scale = 0;
        if (slices && !number) want = kNan;
        if (slices && number) {
          // The covariance of a slice is a block of that of the volume.
          const int at = f == 1 ? kFirst[f] + i / 2 * 3 + i % 2 : kFirst[f] + i;
          const Real step = 1e-5L, before = (*slices)[k][at];
          (*slices)[k][at] = before + step;
          const Real above = loss(v, merged(*slices, of_peak));
          (*slices)[k][at] = before - step;
          want = (above - loss(v, merged(*slices, of_peak))) / (2 * step);
          (*slices)[k][at] = before;
          scale = 64 + static_cast<Real>(view_.depth * view_.depth);
        }
        const Real bound = slices ? epsilon(wide_) * 64 * scale + 1e-8L : kReferenceRounding;
        if (!out_.close(got, want, bound))
          out_.fail("gradient of %s[%d] of slice %lld of volume %lld: %.9Lg instead of %.9Lg", kNames[f], i,
                    static_cast<long long>(d), static_cast<long long>(v), got, want);
      }
  }

  const VolumeCase& c_;
  Dtype wide_;
  kpfused::SliceView view_;
  Outcome& out_;
  Buffer slice_stats_, slice_peaks_, betas_, stats_, peak_;
  std::vector<std::unique_ptr<Buffer>> fields_, upstream_, gradients_;
};

}  // namespace

std::string VolumeCase::name() const {
  constexpr const char* odd[] = {"", " ties", " empty slices", " degenerate", " 1e30"};
  return std::string("volumes ") + dtype_name(dtype) + " " + std::to_string(outer) + "," + std::to_string(inner) + "," +
         std::to_string(depth) + odd[static_cast<int>(slices)] + " beta " + (betas ? "of volumes" : std::to_string(beta)) +
         (fills ? " fills" : "") + " gradients " + std::to_string(given);
}

std::vector<VolumeCase> volume_cases() {
  std::vector<VolumeCase> cases;
  for (const Dtype dtype : {Dtype::float32, Dtype::float64}) {
    // Fewer slices than a warp has lanes, as many, and more; fewer volumes than a block has warps, and more.
    for (const int64_t depth : {1, 5, 32, 33, 70}) cases.push_back({dtype, 3, 1, depth});
    cases.push_back({dtype, 2, 3, 9, Slices::plain, -0.75});
    cases.push_back({dtype, 2, 5, 40, Slices::plain, 1, true});
    cases.push_back({dtype, 2, 3, 12, Slices::ties});
    for (const bool fills : {false, true}) cases.push_back({dtype, 2, 3, 12, Slices::empty, 1, false, fills});
    cases.push_back({dtype, 3, 2, 6, Slices::degenerate});
    cases.push_back({dtype, 2, 1, 6, Slices::offset_1e30});
    cases.push_back({dtype, 2, 1, 6, Slices::plain, 0});
    for (unsigned given = 1; given < 32; given *= 2) cases.push_back({dtype, 2, 2, 7, Slices::plain, 2, false, false, given});
  }
  for (const Dtype dtype : {Dtype::float16, Dtype::bfloat16}) cases.push_back({dtype, 2, 1, 8});
  return cases;
}

Outcome run_volume(const VolumeCase& c, const std::vector<simt::Order>& orders) {
  Outcome out;
  std::snprintf(simt::context, sizeof simt::context, "%s", c.name().c_str());
  VolumeRun run(c, out);
  std::vector<Bits> first;
  for (const simt::Order order : orders) {
    simt::set_order(order, 1);
    const std::vector<Bits> bits = run();
    if (first.empty()) {
      first = bits;
      run.check();
    }
    for (size_t i = 0; i < bits.size(); ++i) check_same(bits[i], first[i], "a result", "between orders of threads", out);
  }
  return out;
}

}  // namespace harness
