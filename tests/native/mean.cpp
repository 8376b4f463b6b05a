// SPDX-License-Identifier: MIT
// The mean: coordinates, and the gradients of the heatmap and of beta.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "calls.h"
#include "check.h"
#include "pixels.h"
#include "tests.h"

namespace native {
namespace {

struct Call {
  const Buffer& h;
  const Pixels& pixels;
  BetaView beta;
  Accumulators coordinates, stats, upstream, grad_beta;
  Buffer grad;

  Call(const Buffer& heatmap, const Pixels& counted, const BetaView& b)
      : h(heatmap), pixels(counted), beta(b), coordinates(h.dtype, 2 * h.view.maps()), stats(h.dtype, kStats * h.view.maps()),
        upstream(h.dtype, 2 * h.view.maps()), grad_beta(h.dtype, h.view.maps()), grad(h.dtype, h.view, kUntouched) {}

  void run(const Units& units, bool want_beta) {
    const MapView& v = h.view;
    const NotRead beyond(h, pixels);
    std::vector<char> forward(size_t(cpu::soft_argmax2d_forward_workspace(v, h.dtype, false)));
    std::vector<char> backward(size_t(cpu::soft_argmax2d_backward_workspace(v, h.dtype, want_beta)));
    ForwardParams f = forward_params(h.dtype, h.bytes.get(), v, beta, units, coordinates.bytes.get(), stats.bytes.get(), forward);
    BackwardParams b = backward_params(h.dtype, h.bytes.get(), v, beta, units, stats.bytes.get(), upstream.bytes.get(),
                                       grad.bytes.get(), want_beta ? grad_beta.bytes.get() : nullptr, backward);
    f.pixels = b.pixels = pixels.view;
    cpu::soft_argmax2d_forward(f);
    cpu::soft_argmax2d_backward(b);
  }
};

void compare_gradient(const Case& c, const Call& call, int64_t map, double beta, const harness::Reference& r,
                      const std::string& name) {
  const double unit = c.dtype == Dtype::float64 ? 1e-15 : 6e-8, extent = double(c.height + c.width);
  const double smallest = c.dtype == Dtype::float16 ? kSmallestHalf : 1e-37;
  double largest = 0;
  for (const harness::Real value : r.gradient) largest = std::fmax(largest, std::fabs(double(value)));
  const double error = 100 * unit * (largest + 0.1 * std::fabs(beta) * extent);
  bool same = true, zeros = true;
  for (int64_t i = 0; i < c.height * c.width; ++i) {
    const double value = call.grad.value(map, i / c.width, i % c.width);
    const double expected = r.empty && call.pixels.view.fills_empty ? 0 : double(r.gradient[size_t(i)]);
    same = same && near(value, expected, rounding(c.dtype) * std::fabs(expected) + error + smallest);
    const double key = call.h.value(map, i / c.width, i % c.width) * (beta < 0 ? -1 : 1);
    zeros = zeros && (key != -kInfinity || std::isnan(expected) || value == 0);
    zeros = zeros && (call.pixels.at(map, i / c.width, i % c.width) || value == 0);
  }
  check(same, name + " gradient");
  check(zeros, name + " gradient of -inf and of pixels that do not count");
}

void compare(const Case& c, const Call& call, const Units& units, double beta, bool want_beta) {
  const double unit = c.dtype == Dtype::float64 ? 1e-15 : 6e-8;  // rounding of the accumulators
  const double extent = double(c.height + c.width), tolerance = 8 * unit * extent;
  for (int64_t map = 0; map < c.maps(); ++map) {
    const std::string name = c.name() + " beta " + std::to_string(beta) + " counted " +
                             std::to_string(int(call.pixels.kind)) + " map " + std::to_string(map);
    harness::FieldGradient g;
    g.x = call.upstream[2 * map] * units.scale_x, g.y = call.upstream[2 * map + 1] * units.scale_y;
    const harness::Reference r = reference(call.h, map, beta, call.pixels, g);
    const bool filled = r.empty && call.pixels.view.fills_empty;
    const double x = (call.coordinates[2 * map] - units.offset_x) / units.scale_x;
    const double y = (call.coordinates[2 * map + 1] - units.offset_y) / units.scale_y;
    check(filled ? call.coordinates[2 * map] == kEmpty && call.coordinates[2 * map + 1] == kEmpty
                 : near(x, from_centre(r.x, c.width), tolerance) && near(y, from_centre(r.y, c.height), tolerance),
          name + " coordinates");
    compare_gradient(c, call, map, beta, r, name);
    if (!want_beta) continue;
    if (filled) {
      check(call.grad_beta[map] == 0, name + " grad_beta");
      continue;
    }
    // What rounding of the logits' differences may cost, and of a logit.
    const double size = std::fmax(std::fabs(double(r.top)), 10.0);
    const double error = 50 * unit * (double(r.grad_beta_size) + 0.1 * extent * size);
    check(near(call.grad_beta[map], double(r.grad_beta), error), name + " grad_beta");
  }
  check(gaps_untouched(call.grad), c.name() + " gaps");
}

void run_case(const Case& c, double beta, bool want_beta, bool odd, Counted counted = Counted::all, int64_t columns = 0) {
  Buffer h = heatmap_of(c, odd);
  const Pixels pixels(c, counted, columns);
  spoil(h, pixels);
  Call call(h, pixels, {nullptr, beta, 1, 1});
  for (int64_t i = 0; i < 2 * c.maps(); ++i) call.upstream.set(i, uniform() - 0.5);
  const Units units = {1.0, 0.5 * double(c.width - 1), 2.0, 1.0};
  call.run(units, want_beta);
  compare(c, call, units, beta, want_beta);
}

// Widths around one, two and four vectors of every size, single rows and columns, more than one chunk, and channel
// counts below, at and above a vector, with and without several pixels abreast in the lanes.
void test_shapes() {
  const int64_t sizes[][4] = {{2, 3, 1, 1},    {1, 5, 2, 2},   {3, 4, 3, 3},   {2, 7, 5, 5},   {2, 8, 7, 9},
                              {1, 17, 10, 12}, {2, 2, 6, 16},  {1, 3, 9, 17},  {1, 2, 31, 32}, {1, 9, 16, 48},
                              {1, 2, 12, 33},  {1, 1, 40, 65}, {1, 3, 1, 71},  {1, 3, 70, 1},  {2, 1, 90, 3},
                              {1, 16, 8, 8},   {1, 33, 4, 5},  {1, 130, 3, 2}, {1, 2, 70, 72},
                              {1, 17, 9, 32},  {1, 14, 5, 24}, {1, 31, 3, 48}};
  for (Dtype dtype : kDtypes) {
    for (Layout layout : kLayouts) {
      for (const auto& s : sizes) {
        const Case c = {dtype, layout, s[0], s[1], s[2], s[3]};
        run_case(c, 1.0, false, false);
        run_case(c, -2.5, true, false);
      }
    }
  }
}

// NaN, infinities and huge logits, each in a map of its own among others, for every sign of beta.
void test_odd_values() {
  const int64_t sizes[][4] = {{1, 17, 5, 5}, {2, 8, 3, 19}, {1, 24, 9, 32}, {1, 8, 1, 3}};
  for (Dtype dtype : kDtypes) {
    for (Layout layout : kLayouts) {
      for (const auto& s : sizes) {
        for (double beta : {1.0, -1.0, 0.0}) run_case({dtype, layout, s[0], s[1], s[2], s[3]}, beta, true, true);
      }
    }
  }
}

// Maps cut into parts, along both axes, and the merge of their states.
void test_split_maps() {
  const int64_t sizes[][4] = {{1, 1, 300, 301}, {1, 2, 1, 70001}, {1, 1, 70001, 1}, {1, 1, 40000, 3},
                              {1, 9, 70, 40},   {1, 3, 200, 160}};
  for (const auto& s : sizes) {
    for (Layout layout : {Layout::contiguous, Layout::sliced, Layout::channels_last}) {
      run_case({Dtype::float32, layout, s[0], s[1], s[2], s[3]}, 1.0, true, false);
    }
    run_case({Dtype::bfloat16, Layout::contiguous, s[0], s[1], s[2], s[3]}, 1.0, false, false);
  }
}

// Masks and valid sizes, with and without several pixels abreast in the lanes, of which a size may leave a part.
void test_masks() {
  const int64_t sizes[][4] = {{2, 3, 1, 1},  {3, 4, 3, 3},   {2, 17, 10, 12}, {2, 2, 6, 16}, {2, 5, 12, 33}, {3, 17, 5, 64},
                              {2, 9, 3, 32}, {2, 13, 9, 16}, {1, 130, 3, 2},  {2, 24, 33, 8}, {1, 2, 70, 130}};
  for (Dtype dtype : kDtypes) {
    for (Layout layout : kLayouts) {
      for (const auto& s : sizes) {
        const Case c = {dtype, layout, s[0], s[1], s[2], s[3]};
        for (Counted counted : kCounted) run_case(c, counted == Counted::both ? -1.5 : 1, true, false, counted);
      }
      for (int64_t columns : {1, 15, 17, 40, 63}) {
        run_case({dtype, layout, 1, 17, 70, 64}, 1, true, false, Counted::sizes, columns);
        run_case({dtype, layout, 1, 3, 9, 64}, 1, true, false, Counted::both, columns);
      }
    }
  }
  // Bits of several chunks, with rows whole and cut, and of parts.
  const int64_t of_bits[][2] = {{140, 128}, {3, 8200}, {300, 264}};
  for (const auto& s : of_bits) {
    for (Counted counted : {Counted::bits_of_mask, Counted::bits_and_sizes}) {
      run_case({Dtype::float32, Layout::contiguous, 1, 1, s[0], s[1]}, 1, true, false, counted);
    }
  }
}

// Every misalignment an element may have: the maps are a part of a larger allocation, and end with it.
void test_misalignment() {
  for (Dtype dtype : kDtypes) {
    const MapView v = make_view(Layout::contiguous, 1, 2, 5, 37);
    Buffer aligned(dtype, v, 0);
    fill(aligned, false);
    const Case c = {dtype, Layout::contiguous, 1, 2, 5, 37};
    const Pixels all(c, Counted::all);
    Call expected(aligned, all, {nullptr, 1.5, 1, 1});
    for (int64_t i = 0; i < 4; ++i) expected.upstream.set(i, 1);
    const Units units = {1, 0, 1, 0};
    expected.run(units, false);
    const int64_t bytes = aligned.count * element_size(dtype);
    for (int64_t shift = 1; shift * element_size(dtype) < 64; ++shift) {
      std::vector<char> h(size_t(bytes + shift * element_size(dtype))), out(h.size());
      char* p = h.data() + shift * element_size(dtype);
      char* q = out.data() + shift * element_size(dtype);
      std::memcpy(p, aligned.bytes.get(), size_t(bytes));
      Accumulators coordinates(dtype, 4), stats(dtype, 2 * kStats);
      const BetaView beta = {nullptr, 1.5, 1, 1};
      std::vector<char> none;
      cpu::soft_argmax2d_forward(
          forward_params(dtype, p, v, beta, units, coordinates.bytes.get(), stats.bytes.get(), none));
      cpu::soft_argmax2d_backward(backward_params(dtype, p, v, beta, units, stats.bytes.get(),
                                                  expected.upstream.bytes.get(), q, nullptr, none));
      const size_t size = size_t(4 * accumulator_size(dtype));
      check(std::memcmp(coordinates.bytes.get(), expected.coordinates.bytes.get(), size) == 0 &&
                std::memcmp(q, expected.grad.bytes.get(), size_t(bytes)) == 0,
            "misaligned by " + std::to_string(shift));
    }
  }
}

// The same bits alone and in a batch, with one thread and with three, and for every map its own beta.
void test_same_bits() {
  const int64_t sizes[][2] = {{9, 7}, {64, 48}, {300, 301}};
  for (Layout layout : kLayouts) {
    for (const auto& s : sizes) {
      const Case c = {Dtype::float32, layout, 2, 11, s[0], s[1]};
      Buffer h(c.dtype, make_view(layout, c.outer, c.inner, c.height, c.width), 0);
      fill(h, false);
      std::vector<float> beta;
      for (int64_t i = 0; i < c.inner; ++i) beta.push_back(float(i) - 4.5f);
      const BetaView per_channel = {beta.data(), 0, 1, c.inner};
      const Units units = {1, 0, 1, 0};
      const Pixels all(c, Counted::all);
      Call one(h, all, per_channel), many(h, all, per_channel);
      for (int64_t i = 0; i < 2 * h.view.maps(); ++i) one.upstream.set(i, 1), many.upstream.set(i, 1);
      one.run(units, true);
      threads = 3;
      many.run(units, true);
      threads = 1;
      const size_t n = size_t(2 * h.view.maps() * 4), size = size_t(h.count * 4);
      check(std::memcmp(one.coordinates.bytes.get(), many.coordinates.bytes.get(), n) == 0, c.name() + " threads");
      check(std::memcmp(one.grad_beta.bytes.get(), many.grad_beta.bytes.get(), n / 2) == 0, c.name() + " threads beta");
      check(std::memcmp(one.grad.bytes.get(), many.grad.bytes.get(), size) == 0, c.name() + " threads, gradient");
      for (int64_t o = 0; o < c.outer; ++o) {  // one sample alone: the same layout, a batch of one
        MapView view = h.view;
        view.outer = 1;
        std::vector<char> workspace(size_t(cpu::soft_argmax2d_forward_workspace(view, c.dtype, false)));
        Accumulators coordinates(c.dtype, 2 * c.inner), stats(c.dtype, kStats * c.inner);
        cpu::soft_argmax2d_forward(forward_params(c.dtype, h.at(o * c.inner, 0, 0), view, per_channel, units,
                                                  coordinates.bytes.get(), stats.bytes.get(), workspace));
        const char* in_batch = one.coordinates.bytes.get() + o * c.inner * 8;
        check(std::memcmp(coordinates.bytes.get(), in_batch, size_t(c.inner * 8)) == 0, c.name() + " alone");
      }
    }
  }
}

// Payloads of NaN that arithmetic on bits could take for a number.
void test_nan_payloads() {
  for (uint32_t bits : {0x7fffffffu, 0xffffffffu, 0x7fc00001u, 0x7f800001u, 0xffc001ffu}) {
    for (int64_t width : {3, 40}) {
      std::vector<float> h(size_t(4 * width), 1.0f), out(h.size());
      std::memcpy(&h[size_t(width + 1)], &bits, 4);
      float coordinates[2], stats[4], upstream[2] = {1, 1};
      const MapView v = {1, 1, 4, width, 4 * width, 4 * width, width, 1};
      const BetaView beta = {nullptr, 1, 1, 1};
      const Units units = {1, 0, 1, 0};
      std::vector<char> none;
      cpu::soft_argmax2d_forward(forward_params(Dtype::float32, h.data(), v, beta, units, coordinates, stats, none));
      cpu::soft_argmax2d_backward(
          backward_params(Dtype::float32, h.data(), v, beta, units, stats, upstream, out.data(), nullptr, none));
      bool all = std::isnan(coordinates[0]) && std::isnan(coordinates[1]);
      for (float g : out) all = all && std::isnan(g);
      check(all, "NaN payload");
    }
  }
}

}  // namespace

void test_mean() {
  test_shapes();
  test_odd_values();
  test_split_maps();
  test_masks();
  test_misalignment();
  test_same_bits();
  test_nan_payloads();
}

}  // namespace native
