// SPDX-License-Identifier: MIT
// Moments, masks and valid sizes.
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "calls.h"
#include "check.h"
#include "pixels.h"
#include "tests.h"

namespace native {
namespace {

constexpr int kFields = 9;  // mean x, y; covariance xx, xy, yx, yy; entropy, logsumexp, probability of the peak
using Numbers = std::array<double, kFields>;

// What a call gives, or gets as the gradients of it.
struct Fields {
  Accumulators mean, covariance, entropy, logsumexp, peak_probability;

  Fields(Dtype d, int64_t maps)
      : mean(d, 2 * maps), covariance(d, 4 * maps), entropy(d, maps), logsumexp(d, maps), peak_probability(d, maps) {}

  Numbers of(int64_t map) const {
    const int64_t i = 4 * map;
    return {mean[2 * map], mean[2 * map + 1], covariance[i], covariance[i + 1], covariance[i + 2], covariance[i + 3],
            entropy[map],  logsumexp[map],    peak_probability[map]};
  }
};

struct Call {
  Buffer h;
  Pixels pixels;
  Fields result, upstream;
  Accumulators stats, grad_beta;
  std::unique_ptr<int64_t[]> peak;
  Buffer grad;

  Call(const Case& c, Counted counted, int64_t columns)
      : h(heatmap_of(c, false)), pixels(c, counted, columns), result(c.dtype, c.maps()), upstream(c.dtype, c.maps()),
        stats(c.dtype, kMomentStats * c.maps()), grad_beta(c.dtype, c.maps()), peak(new int64_t[size_t(2 * c.maps())]),
        grad(c.dtype, h.view, kUntouched) {
    spoil(h, pixels);
    for (int64_t i = 0; i < 4 * c.maps(); ++i) {
      upstream.covariance.set(i, 0.1 * uniform() - 0.05);
      if (i < 2 * c.maps()) upstream.mean.set(i, uniform() - 0.5);
      if (i >= c.maps()) continue;
      upstream.entropy.set(i, uniform() - 0.5);
      upstream.logsumexp.set(i, uniform() - 0.5);
      upstream.peak_probability.set(i, uniform() - 0.5);
    }
  }

  void run(double beta) {
    const Units units = {1, 0, 1, 0};
    const BetaView number = {nullptr, beta, 1, 1};
    const NotRead beyond(h, pixels);
    std::vector<char> forward(size_t(cpu::soft_argmax2d_forward_workspace(h.view, h.dtype, true)));
    std::vector<char> backward(size_t(cpu::soft_argmax2d_backward_workspace(h.view, h.dtype, true)));
    ForwardParams f = forward_params(h.dtype, h.bytes.get(), h.view, number, units, result.mean.bytes.get(),
                                     stats.bytes.get(), forward);
    f.pixels = pixels.view, f.with_moments = true;
    f.moments = {result.covariance.bytes.get(), result.entropy.bytes.get(), result.logsumexp.bytes.get(),
                 result.peak_probability.bytes.get(), peak.get()};
    cpu::soft_argmax2d_forward(f);
    BackwardParams b = backward_params(h.dtype, h.bytes.get(), h.view, number, units, stats.bytes.get(),
                                       upstream.mean.bytes.get(), grad.bytes.get(), grad_beta.bytes.get(), backward);
    b.pixels = pixels.view, b.with_moments = true;
    b.moments = {upstream.covariance.bytes.get(), upstream.entropy.bytes.get(), upstream.logsumexp.bytes.get(),
                 upstream.peak_probability.bytes.get(), peak.get()};
    cpu::soft_argmax2d_backward(b);
  }
};

void compare(const Case& c, const Call& call, int64_t map, double beta, const std::string& name) {
  const double unit = c.dtype == Dtype::float64 ? 1e-14 : 6e-7, extent = double(c.height + c.width);
  const Numbers g = call.upstream.of(map), got = call.result.of(map);
  const harness::Reference r =
      reference(call.h, map, beta, call.pixels, {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8]});
  const harness::Real fields[kFields] = {from_centre(r.x, c.width), from_centre(r.y, c.height), r.xx, r.xy, r.xy, r.yy,
                                         r.entropy, r.logsumexp, r.peak_probability};
  for (size_t i = 0; i < kFields; ++i) {
    const double size = i < 2 ? extent : i < 6 ? extent * extent : 20;
    check(near(got[i], r.empty ? kEmpty : double(fields[i]), unit * size), name + " field " + std::to_string(i));
  }
  const int64_t* peak = &call.peak[size_t(2 * map)];
  check(peak[0] == r.peak % c.width && peak[1] == r.peak / c.width, name + " peak");
  bool same = true, zeros = true;
  double largest = 0;
  for (const harness::Real value : r.gradient) largest = std::fmax(largest, std::fabs(double(value)));
  const double error = 100 * unit * largest + unit * extent * extent * (c.dtype == Dtype::float16 ? 2 : 1);
  for (int64_t i = 0; i < c.height * c.width; ++i) {
    const double value = call.grad.value(map, i / c.width, i % c.width);
    const double want = r.empty ? 0 : double(r.gradient[size_t(i)]);
    same = same && near(value, want, rounding(c.dtype) * std::fabs(want) + error);
    zeros = zeros && (call.pixels.at(map, i / c.width, i % c.width) || value == 0);
  }
  check(same, name + " gradient");
  check(zeros, name + " gradient of pixels that do not count");
  const double size = double(r.grad_beta_size + r.grad_beta_terms);
  const bool near_beta = near(call.grad_beta[map], double(r.grad_beta), 10 * unit * size);
  check(r.empty ? call.grad_beta[map] == 0 : near_beta, name + " gradient of beta");
}

void run_moments(const Case& c, double beta, Counted counted, int64_t columns = 0) {
  Call call(c, counted, columns);
  call.run(beta);
  for (int64_t map = 0; map < c.maps(); ++map) {
    compare(c, call, map, beta,
            c.name() + " moments beta " + std::to_string(beta) + " counted " + std::to_string(int(counted)) + " map " +
                std::to_string(map));
  }
  check(gaps_untouched(call.grad), c.name() + " gaps");
}

void test_moments_and_masks() {
  const int64_t sizes[][4] = {{2, 3, 1, 1},   {3, 4, 3, 3},   {2, 8, 7, 9},  {1, 17, 10, 12}, {2, 2, 6, 16}, {2, 5, 12, 33},
                              {1, 17, 5, 64}, {2, 6, 7, 24}, {1, 9, 3, 528}, {2, 13, 9, 16},
                              {1, 3, 1, 71}, {1, 3, 70, 1}, {2, 1, 90, 3}, {1, 130, 3, 2},  {1, 2, 70, 130}};
  for (Dtype dtype : kDtypes) {
    for (Layout layout : kLayouts) {
      for (const auto& s : sizes) {
        const Case c = {dtype, layout, s[0], s[1], s[2], s[3]};
        for (Counted counted : kCounted) {
          run_moments(c, counted == Counted::mask ? -1.5 : 1, counted);
        }
      }
    }
  }
  for (Layout layout : {Layout::contiguous, Layout::channels_last}) {  // cut into parts
    for (Counted counted : {Counted::all, Counted::both}) {
      run_moments({Dtype::float32, layout, 1, 2, 300, 301}, 1, counted);
      run_moments({Dtype::float32, layout, 1, 1, 1, 70001}, 0.5, counted);
    }
  }
  for (Counted counted : {Counted::bits_of_mask, Counted::bits_and_sizes}) {
    run_moments({Dtype::float32, Layout::contiguous, 1, 1, 140, 128}, 1, counted);
  }
  // Several chunks of which the pixels stand abreast.
  run_moments({Dtype::float64, Layout::channels_last, 1, 3, 200, 160}, 1, Counted::all);
  for (Counted counted : {Counted::both, Counted::sizes_of_maps}) {
    run_moments({Dtype::float32, Layout::channels_last, 1, 9, 400, 16}, -1, counted);
  }
}

// Rows that are cut into pieces wider than their average, so many that a chunk has more than its size, and a few columns of
// a piece that count: with a mask a chunk is copied, with a size alone no more than these columns are.
void test_sizes_beside_cuts() {
  const struct {
    Dtype dtype;
    int64_t height, width, cut;
  } cases[] = {{Dtype::float32, 27, 600, 256}, {Dtype::float64, 27, 300, 128}, {Dtype::float16, 29, 1100, 512},
               {Dtype::bfloat16, 29, 1100, 512}};
  for (const auto& k : cases) {
    const Case c = {k.dtype, Layout::contiguous, 1, 2, k.height, k.width};
    for (int64_t columns : {k.cut - 1, k.cut + 2, k.cut + 40, k.width}) {
      for (Counted counted : {Counted::sizes, Counted::both}) run_moments(c, 1, counted, columns);
    }
  }
}

}  // namespace

void test_moments() {
  test_moments_and_masks();
  test_sizes_beside_cuts();
}

}  // namespace native
