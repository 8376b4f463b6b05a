// SPDX-License-Identifier: MIT
// Expectations of values, the softmax map, coordinates of probability maps, and the mass of a window.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "calls.h"
#include "check.h"
#include "cpu/expectation2d.h"
#include "pixels.h"
#include "tests.h"

namespace native {
namespace {

enum class Lie { rows, like_maps, image, pixels, shared_by_sample, shared_by_all };
const char* const kLieNames[] = {"rows", "like maps", "pixels of all maps", "channels innermost", "shared by a sample", "shared by all"};

ValueView lie(Lie kind, const Case& c, int64_t channels) {
  const int64_t n = c.height * c.width, w = c.width;
  const MapView maps = c.view();
  switch (kind) {
    case Lie::rows: return {channels, c.inner * channels * n, channels * n, n, w, 1};
    case Lie::like_maps: return {1, maps.stride_outer, maps.stride_inner, 0, maps.stride_y, maps.stride_x};
    case Lie::image: {
      const int64_t of_pixel = c.inner * channels;
      return {channels, of_pixel * n, channels, 1, w * of_pixel, of_pixel};
    }
    case Lie::pixels: return {channels, c.inner * n * channels, n * channels, 1, w * channels, channels};
    case Lie::shared_by_sample: return {channels, channels * n, 0, n, w, 1};
    default: return {channels, 0, 0, 1, w * channels, channels};
  }
}

// Values in memory that ends with the last of them.
struct ValueBuffer {
  Dtype dtype;
  Case c;
  ValueView view;
  std::unique_ptr<char[]> bytes;

  ValueBuffer(const Case& k, const ValueView& v) : dtype(k.dtype), c(k), view(v), bytes(new char[size_t(size())]) {
    std::memset(bytes.get(), kUntouched, size_t(size()));
  }
  // Pixels are numbered in row order.
  int64_t offset(int64_t map, int64_t channel, int64_t i) const {
    return map / c.inner * view.stride_outer + map % c.inner * view.stride_inner + channel * view.stride_channel +
           i / c.width * view.stride_y + i % c.width * view.stride_x;
  }
  int64_t size() const {
    return (offset(c.maps() - 1, view.channels - 1, c.height * c.width - 1) + 1) * element_size(dtype);
  }
  char* at(int64_t map, int64_t channel, int64_t i) const {
    return bytes.get() + offset(map, channel, i) * element_size(dtype);
  }
  double value(int64_t map, int64_t channel, int64_t i) const { return get(dtype, at(map, channel, i)); }
};

// P of one map and the logits less that of the peak; zeros where no pixel counts.
struct Softmax {
  std::vector<double> p, distance;
  bool empty;

  Softmax(const Buffer& h, int64_t map, double beta, const Pixels& pixels) {
    const harness::Reference r = reference(h, map, beta, pixels, {});
    empty = r.empty;
    for (int64_t i = 0; i < h.view.height * h.view.width; ++i) {
      const bool counts = !empty && pixels.at(map, i / h.view.width, i % h.view.width);
      p.push_back(counts ? double(r.probability[size_t(i)]) : 0);
      distance.push_back(counts ? double(h.value(map, i / h.view.width, i % h.view.width) - r.top) : 0);
    }
  }
};

SoftmaxParams softmax_params(const Buffer& h, const BetaView& beta, const Pixels& pixels, const Accumulators* stats,
                             Holds holds = Holds::logits) {
  return {h.dtype, holds, h.bytes.get(), h.view, pixels.view, beta, stats ? stats->bytes.get() : nullptr, kStats};
}

double unit_of(Dtype dtype) { return dtype == Dtype::float64 ? 1e-14 : 1e-6; }

// ---- Expectations of values -------------------------------------------------------------------------------

struct Call {
  double beta;
  Buffer h;
  Pixels pixels;
  ValueBuffer values, grad_values;
  Accumulators stats, coordinates, expectation, grad, grad_beta, mean_of_result;
  Buffer grad_heatmap, softmax_map, grad_of_result, softmax_gradient;

  Call(const Case& c, double b, Counted counted, const ValueView& v, int64_t columns)
      : beta(b), h(heatmap_of(c, false)), pixels(c, counted, columns), values(c, v), grad_values(c, v),
        stats(c.dtype, kStats * c.maps()), coordinates(c.dtype, 2 * c.maps()),
        expectation(c.dtype, v.channels * c.maps()), grad(c.dtype, v.channels * c.maps()), grad_beta(c.dtype, c.maps()),
        mean_of_result(c.dtype, v.channels * c.maps()), grad_heatmap(c.dtype, h.view, kUntouched),
        softmax_map(c.dtype, h.view, kUntouched), grad_of_result(c.dtype, h.view, kUntouched),
        softmax_gradient(c.dtype, h.view, kUntouched) {
    spoil(h, pixels);
    draw_values();
    for (int64_t i = 0; i < v.channels * c.maps(); ++i) grad.set(i, uniform() - 0.5);
  }

  // NaN, but where they count for some map.
  void draw_values() {
    const int64_t maps = h.view.maps(), width = h.view.width, n = h.view.height * width, channels = values.view.channels;
    for (int64_t i = 0; i < maps * n * channels; ++i) {
      put(h.dtype, values.at(i / n / channels, i / n % channels, i % n), NAN);
    }
    for (int64_t i = 0; i < maps * n; ++i) {
      if (!pixels.at(i / n, i % n / width, i % width)) continue;
      for (int64_t k = 0; k < channels; ++k) put(h.dtype, values.at(i / n, k, i % n), 2 * uniform() - 1);
    }
  }

  void run() {
    const MapView& v = h.view;
    const BetaView number = {nullptr, beta, 1, 1};
    const SoftmaxParams softmax = softmax_params(h, number, pixels, &stats);
    const Values of = {ValueKind::tensor, values.bytes.get(), values.view, {}, 0, nullptr};
    const NotRead beyond(h, pixels);
    std::vector<char> workspace(size_t(cpu::soft_argmax2d_forward_workspace(v, h.dtype, false)));
    ForwardParams f = forward_params(h.dtype, h.bytes.get(), v, number, {1, 0, 1, 0}, coordinates.bytes.get(),
                                     stats.bytes.get(), workspace);
    f.pixels = pixels.view;
    ExpectationParams e = {softmax, of, expectation.bytes.get(), nullptr};
    std::vector<char> of_expectation(size_t(cpu::expectation_workspace(e)));
    e.workspace = of_expectation.data();
    cpu::expectation({&f, &e, nullptr, nullptr});
    ExpectationHeatmapParams of_heatmap = {softmax, of, expectation.bytes.get(), grad.bytes.get(),
                                           grad_heatmap.bytes.get(), v, grad_beta.bytes.get(), nullptr};
    std::vector<char> of_beta(size_t(cpu::expectation_heatmap_workspace(of_heatmap)));
    of_heatmap.workspace = of_beta.data();
    const ExpectationValuesParams of_values = {softmax, grad.bytes.get(), grad_values.bytes.get(), values.view};
    cpu::expectation({nullptr, nullptr, &of_heatmap, &of_values});
    const ExpectationValuesParams of_map = {softmax, nullptr, softmax_map.bytes.get(),
                                            {1, v.stride_outer, v.stride_inner, 0, v.stride_y, v.stride_x}};
    cpu::expectation({&f, nullptr, nullptr, &of_map});
    if (has_exact_result()) run_of_result(of);
  }

  // Whether the softmax map has all digits of P.
  bool has_exact_result() const { return h.dtype == Dtype::float32 || h.dtype == Dtype::float64; }

  // The expectation and the heatmap's gradient, of a map that holds its softmax; and of one channel in the same call without
  // upstream gradients, as backward of the softmax asks for them, of values that are finite also where they do not count.
  void run_of_result(const Values& of) {
    const SoftmaxParams held = softmax_params(softmax_map, {nullptr, beta, 1, 1}, pixels, &stats, Holds::softmax);
    ExpectationParams e = {held, of, mean_of_result.bytes.get(), nullptr};
    std::vector<char> workspace(size_t(cpu::expectation_workspace(e)));
    e.workspace = workspace.data();
    const ExpectationHeatmapParams g = {held, of, mean_of_result.bytes.get(), grad.bytes.get(), grad_of_result.bytes.get(),
                                        h.view, nullptr, nullptr};
    cpu::expectation({nullptr, &e, nullptr, nullptr});
    cpu::expectation({nullptr, nullptr, &g, nullptr});
    if (values.view.channels > 1) return;
    const int64_t n = h.view.height * h.view.width;
    for (int64_t i = 0; i < h.view.maps() * n; ++i) {
      if (std::isnan(values.value(i / n, 0, i % n))) put(h.dtype, values.at(i / n, 0, i % n), 3);
    }
    const ExpectationHeatmapParams alone = {held, of, mean_of_result.bytes.get(), nullptr, softmax_gradient.bytes.get(),
                                            h.view, nullptr, nullptr};
    cpu::expectation({nullptr, &e, &alone, nullptr});
  }
};

// One map; adds what it contributes to the gradient of the values.
void compare(const Case& c, const Call& call, int64_t map, std::vector<double>& wanted_values,
             const std::string& name) {
  const int64_t n = c.height * c.width, channels = call.values.view.channels;
  const double unit = unit_of(c.dtype), size = double(channels + 4), step = rounding(c.dtype);
  const double least = c.dtype == Dtype::float16 ? kSmallestHalf : 0;
  const Softmax s(call.h, map, call.beta, call.pixels);
  const auto counts = [&](int64_t i) { return call.pixels.at(map, i / c.width, i % c.width); };
  std::vector<double> q(size_t(n), 0);
  double mean = 0, mean_of_values = 0, dbeta = 0;
  for (int64_t k = 0; k < channels; ++k) {
    const double g = call.grad[map * channels + k];
    double want = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double p = s.p[size_t(i)], value = counts(i) ? call.values.value(map, k, i) : 0;
      want += p * value, q[size_t(i)] += g * value;
      if (!s.empty) wanted_values[size_t(call.values.offset(map, k, i))] += p * g;
    }
    mean += g * want, mean_of_values += want;
    const auto is_mean = [&](double got) { return near(got, s.empty ? kEmpty : want, 4 * unit); };
    check(is_mean(call.expectation[map * channels + k]), name + " expectation");
    check(!call.has_exact_result() || is_mean(call.mean_of_result[map * channels + k]), name + " expectation of the softmax");
  }
  bool same = true, zeros = true, mass = true;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t y = i / c.width, x = i % c.width;
    const double wq = s.p[size_t(i)] * (q[size_t(i)] - mean);
    dbeta += s.distance[size_t(i)] * wq;
    const auto see = [&](const Buffer& gradient) {
      const double got = gradient.value(map, y, x);
      same = same && near(got, call.beta * wq, step * std::fabs(call.beta * wq) + unit * size + least);
      zeros = zeros && ((counts(i) && !s.empty) || got == 0);
    };
    see(call.grad_heatmap);
    if (call.has_exact_result()) see(call.grad_of_result);
    if (call.has_exact_result() && channels == 1) {
      const double of_p = s.p[size_t(i)] * (counts(i) ? call.values.value(map, 0, i) - mean_of_values : 0);
      const double alone = call.softmax_gradient.value(map, y, x);
      same = same && near(alone, call.beta * of_p, step * std::fabs(call.beta * of_p) + unit * size + least);
      zeros = zeros && ((counts(i) && !s.empty) || alone == 0);
    }
    const double want = s.empty ? kEmpty : s.p[size_t(i)];
    mass = mass && near(call.softmax_map.value(map, y, x), want, step * std::fabs(want) + unit + least);
  }
  check(same, name + " gradient of the heatmap");
  check(zeros, name + " gradient of pixels that do not count");
  check(mass, name + " softmax");
  check(near(call.grad_beta[map], dbeta, 40 * unit * size), name + " gradient of beta");
}

void run_expectation(const Case& c, double beta, Counted counted, Lie kind, int64_t channels, int64_t columns = 0) {
  const std::string name = c.name() + " values in " + kLieNames[int(kind)] + " " + std::to_string(channels) +
                           " counted " + std::to_string(int(counted));
  Call call(c, beta, counted, lie(kind, c, channels), columns);
  call.run();
  std::vector<double> wanted(size_t(call.values.size() / element_size(c.dtype)), 0);
  for (int64_t map = 0; map < c.maps(); ++map) compare(c, call, map, wanted, name);
  const double error = unit_of(c.dtype) * double(c.maps()) + (c.dtype == Dtype::float16 ? kSmallestHalf : 0);
  const int64_t n = c.height * c.width;
  bool same = true;
  for (int64_t map = 0; map < c.maps(); ++map) {
    for (int64_t i = 0; i < n * call.values.view.channels; ++i) {
      const double want = wanted[size_t(call.values.offset(map, i / n, i % n))];
      same = same && near(call.grad_values.value(map, i / n, i % n), want, rounding(c.dtype) * std::fabs(want) + error);
    }
  }
  check(same, name + " gradient of the values");
  check(gaps_untouched(call.grad_heatmap) && gaps_untouched(call.softmax_map) && gaps_untouched(call.grad_of_result) &&
            gaps_untouched(call.softmax_gradient),
        name + " gaps");
}

// ---- Coordinates of probability maps, and the mass of a window --------------------------------------------

constexpr Units kUnits = {0.5, 3, 2, -1};

// Of maps that are probabilities already.
void run_coordinates(const Case& c, const Buffer& h, const Pixels& pixels, const Accumulators& grad,
                     Buffer& grad_heatmap, const std::string& name) {
  const double unit = unit_of(c.dtype), extent = double(c.height + c.width);
  const Values coordinates = {ValueKind::coordinates, nullptr, {2, 0, 0, 0, 0, 0}, kUnits, 0, nullptr};
  const SoftmaxParams itself = softmax_params(h, {nullptr, 1, 1, 1}, pixels, nullptr, Holds::probabilities);
  Accumulators mean(c.dtype, 2 * c.maps());
  ExpectationParams e = {itself, coordinates, mean.bytes.get(), nullptr};
  std::vector<char> workspace(size_t(cpu::expectation_workspace(e)));
  e.workspace = workspace.data();
  cpu::expectation({nullptr, &e, nullptr, nullptr});
  const ExpectationHeatmapParams g = {itself, coordinates, nullptr, grad.bytes.get(), grad_heatmap.bytes.get(), h.view,
                                      nullptr, nullptr};
  cpu::expectation({nullptr, nullptr, &g, nullptr});
  for (int64_t map = 0; map < c.maps(); ++map) {
    double x_mean = 0, y_mean = 0, sum = 0;
    bool same = true;
    for (int64_t i = 0; i < c.height * c.width; ++i) {
      const int64_t y = i / c.width, x = i % c.width;
      const double at_x = kUnits.scale_x * from_centre(x, c.width) + kUnits.offset_x;
      const double at_y = kUnits.scale_y * from_centre(y, c.height) + kUnits.offset_y;
      const bool counts = pixels.at(map, y, x);
      const double p = counts ? h.value(map, y, x) : 0;
      x_mean += p * at_x, y_mean += p * at_y, sum += std::fabs(p);
      const double want = counts ? grad[2 * map] * at_x + grad[2 * map + 1] * at_y : 0;
      const double error = rounding(c.dtype) * std::fabs(want) + 4 * unit * extent;
      same = same && near(grad_heatmap.value(map, y, x), want, error);
    }
    check(near(mean[2 * map], x_mean, unit * sum * extent), name + " x of probabilities");
    check(near(mean[2 * map + 1], y_mean, unit * sum * 2 * extent), name + " y of probabilities");
    check(same, name + " gradient of probabilities");
  }
}

void run_window(const Case& c, const Buffer& h, const Pixels& pixels, int64_t radius, const Accumulators& grad,
                Buffer& grad_heatmap, const std::string& name) {
  Accumulators mean(c.dtype, 2 * c.maps()), stats(c.dtype, kStats * c.maps()), mass(c.dtype, c.maps());
  std::unique_ptr<int64_t[]> centre(new int64_t[size_t(2 * c.maps())]);
  for (int64_t i = 0; i < c.maps(); ++i) {
    // Some beside the map.
    centre[size_t(2 * i)] = int64_t((1.5 * uniform() - 0.25) * double(c.width));
    centre[size_t(2 * i + 1)] = i % 5 == 4 ? -(int64_t(1) << 62) : int64_t(uniform() * double(c.height));
  }
  const BetaView number = {nullptr, 1, 1, 1};
  std::vector<char> workspace(size_t(cpu::soft_argmax2d_forward_workspace(h.view, c.dtype, false)));
  ForwardParams f = forward_params(c.dtype, h.bytes.get(), h.view, number, kUnits, mean.bytes.get(), stats.bytes.get(),
                                   workspace);
  f.pixels = pixels.view;
  const SoftmaxParams softmax = softmax_params(h, number, pixels, &stats);
  const Values window = {ValueKind::window, nullptr, {1, 0, 0, 0, 0, 0}, {}, radius, centre.get()};
  const ExpectationParams e = {softmax, window, mass.bytes.get(), nullptr};
  cpu::expectation({&f, &e, nullptr, nullptr});
  const ExpectationHeatmapParams g = {softmax, window, mass.bytes.get(), grad.bytes.get(), grad_heatmap.bytes.get(),
                                      h.view, nullptr, nullptr};
  cpu::expectation({nullptr, nullptr, &g, nullptr});
  const double unit = unit_of(c.dtype);
  for (int64_t map = 0; map < c.maps(); ++map) {
    const Softmax s(h, map, 1, pixels);
    const int64_t *at = &centre[size_t(2 * map)], n = c.height * c.width;
    const auto inside = [&](int64_t i) {
      return std::abs(i % c.width - at[0]) <= radius && std::abs(i / c.width - at[1]) <= radius;
    };
    double want = 0;
    bool same = true;
    for (int64_t i = 0; i < n; ++i) want += inside(i) ? s.p[size_t(i)] : 0;
    check(near(mass[map], s.empty ? kEmpty : want, 4 * unit), name + " mass");
    for (int64_t i = 0; i < n; ++i) {
      const double wq = s.p[size_t(i)] * grad[map] * ((inside(i) ? 1 : 0) - want);
      const double error = rounding(c.dtype) * std::fabs(wq) + 4 * unit;
      same = same && near(grad_heatmap.value(map, i / c.width, i % c.width), wq, error);
    }
    check(same, name + " gradient of the mass");
  }
}

void run_coordinates_and_window(const Case& c, Counted counted, int64_t radius) {
  const std::string name = c.name() + " counted " + std::to_string(int(counted)) + " radius " + std::to_string(radius);
  Buffer h = heatmap_of(c, false), grad_heatmap(c.dtype, h.view, kUntouched);
  const Pixels pixels(c, counted);
  spoil(h, pixels);
  Accumulators grad(c.dtype, 2 * c.maps());
  for (int64_t i = 0; i < 2 * c.maps(); ++i) grad.set(i, uniform() - 0.5);
  run_coordinates(c, h, pixels, grad, grad_heatmap, name);
  run_window(c, h, pixels, radius, grad, grad_heatmap, name);
  check(gaps_untouched(grad_heatmap), name + " gaps");
}

}  // namespace

void test_expectations() {
  const int64_t sizes[][4] = {{2, 3, 1, 1}, {1, 9, 3, 3}, {2, 17, 7, 9}, {1, 4, 16, 17}, {2, 8, 3, 71}};
  const Lie kinds[] = {Lie::rows, Lie::image, Lie::pixels, Lie::shared_by_sample, Lie::shared_by_all};
  const int64_t channels[] = {1, 2, 3, 16, 19, 41};
  int64_t turn = 0;  // what is not looped over takes turns
  for (Dtype dtype : kDtypes) {
    for (Layout layout : kLayouts) {
      for (const auto& s : sizes) {
        const Case c = {dtype, layout, s[0], s[1], s[2], s[3]};
        for (int i = 0; i < 2; ++i, turn += 7) {
          const Counted counted = kCounted[turn / 2 % kCountings];
          run_expectation(c, turn % 3 ? 1 : -1.5, counted, kinds[turn % 5], channels[turn % 6]);
          run_expectation(c, 1, kCounted[turn % kCountings], Lie::like_maps, 1);
          run_coordinates_and_window(c, counted, turn / 3 % 5);
        }
      }
    }
  }
  // Maps that share values: as many as are taken at once, of more channels than that, and twice as many.
  for (Dtype dtype : kDtypes) {
    for (Layout layout : kLayouts) {
      run_expectation({dtype, layout, 1, 24, 5, 7}, 1, Counted::all, Lie::shared_by_sample, 200);
      run_expectation({dtype, layout, 1, 48, 9, 31}, 1, kCounted[turn++ % kCountings], Lie::shared_by_all, 41);
    }
  }
  // Lanes that are channels, of one pixel or of several abreast, in one block or in two, in one part or in several.
  const int64_t of_lanes[][4] = {{2, 17, 6, 16}, {3, 5, 4, 32}, {2, 33, 9, 7}, {1, 260, 5, 3}, {1, 20, 130, 64}};
  for (Dtype dtype : kDtypes) {
    for (Layout layout : {Layout::channels_last, Layout::channels_sliced}) {
      for (const auto& s : of_lanes) {
        const Case c = {dtype, layout, s[0], s[1], s[2], s[3]};
        for (Lie kind : {Lie::like_maps, Lie::rows}) run_expectation(c, -1.5, Counted::all, kind, 1);
        for (int64_t n : {2, 3, 7}) run_expectation(c, -1.5, n == 3 ? Counted::all : Counted::mask, Lie::image, n);
        for (int i = 0; i < 3; ++i) run_expectation(c, 1, kCounted[1 + turn++ % (kLaneCountings - 1)], Lie::like_maps, 1);
        for (int i = 0; i < 2; ++i) run_coordinates_and_window(c, kCounted[turn++ % kLaneCountings], 2);
        ++turn;  // six for each case: all kinds have their turn
      }
    }
  }
  // Bits of which every row is whole bytes.
  for (Dtype dtype : kDtypes) {
    for (Counted counted : {Counted::bits_of_mask, Counted::bits_and_sizes}) {
      for (Layout layout : {Layout::contiguous, Layout::sliced}) {
        const Case c = {dtype, layout, 1, 5, 9, 16};
        for (Lie kind : {Lie::rows, Lie::image}) run_expectation(c, 1, counted, kind, 2);
        run_coordinates_and_window(c, counted, 2);
      }
    }
  }
  // Of narrower valid sizes, all rows of the map and of as many channels as are copied, to the end of the last buffer.
  for (Dtype dtype : kDtypes) {
    const Case c = {dtype, Layout::contiguous, 1, 3, 5, 17};
    for (int64_t columns : {1, 8, 16}) run_expectation(c, 1, Counted::sizes, Lie::rows, 3, columns);
  }
  // Rows under a mask in pieces as narrow as they get.
  run_expectation({Dtype::float64, Layout::contiguous, 1, 1, 210, 160}, 1, Counted::mask, Lie::like_maps, 1);
  for (Layout layout : {Layout::contiguous, Layout::channels_last}) {  // cut into parts
    for (Lie kind : kinds) run_expectation({Dtype::float32, layout, 1, 2, 260, 300}, 1, Counted::both, kind, 3);
    run_coordinates_and_window({Dtype::float32, layout, 1, 2, 260, 300}, Counted::all, 70);
    run_coordinates_and_window({Dtype::float32, layout, 1, 2, 3, 4500}, Counted::mask, 70);  // longer than a table
  }
  // Parts of a row of three channels begin anywhere.
  run_coordinates_and_window({Dtype::float32, Layout::channels_last, 1, 3, 2, 40011}, Counted::all, 70);
}

}  // namespace native
