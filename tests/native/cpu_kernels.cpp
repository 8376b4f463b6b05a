// SPDX-License-Identifier: MIT
// The CPU kernels on their own, against a plain float64 reference. No Python and no torch: sanitizers see nothing else.
//
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined tests/native/cpu_kernels.cpp csrc/cpu/*.cpp -pthread
//   KPFUSED_CPU_CAPABILITY=baseline ./a.out
//
// Built with -DKPFUSED_CPU_VECTOR_BYTES=64, the "avx2" capability runs vectors as wide as those of AVX-512.
// Maps end where their heap allocation ends and begin at every misalignment, so that whatever is read or written
// beyond a map is an error of the sanitizer, and the gaps of sliced maps are checked for what is written between.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/cpu/expectation2d.h"
#include "../../csrc/cpu/parallel.h"
#include "../../csrc/cpu/plan.h"
#include "../../csrc/cpu/soft_argmax2d.h"

using namespace kpfused;

namespace {

int threads = 1;
int passed = 0, failed = 0;
const double kInfinity = std::numeric_limits<double>::infinity();

void check(bool ok, const std::string& what) {
  ok ? ++passed : ++failed;
  if (!ok && failed <= 40) std::printf("FAILED %s\n", what.c_str());
}

uint64_t random_state = 1;
double uniform() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return double(random_state >> 11) * 0x1p-53;
}

// ---- Elements, converted one by one and independently of the kernels' own conversions ---------------------

double half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  double value = exponent == 31  ? (fraction ? NAN : kInfinity)
                 : exponent == 0 ? std::ldexp(fraction, -24)
                                 : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -value : value;
}

double bfloat_value(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// The nearest of the 65536 values, by bisection over the ordered non-negative ones; even where two are as near.
template <class Value>
uint16_t nearest(double value, uint16_t infinity, Value of) {
  if (std::isnan(value)) return uint16_t(infinity + 1);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  value = std::fabs(value);
  uint16_t low = 0, high = infinity;
  while (high - low > 1) {
    const uint16_t middle = uint16_t((low + high) / 2);
    (of(middle) <= value ? low : high) = middle;
  }
  const double top = high == infinity ? 2 * of(low) - of(uint16_t(low - 1)) : of(high);
  const double below = value - of(low), above = top - value;
  return uint16_t(sign | (below < above || (below == above && low % 2 == 0) ? low : high));
}

double get(Dtype dtype, const char* p) {
  float f;
  double d;
  uint16_t h;
  switch (dtype) {
    case Dtype::float32: std::memcpy(&f, p, 4); return f;
    case Dtype::float64: std::memcpy(&d, p, 8); return d;
    case Dtype::float16: std::memcpy(&h, p, 2); return half_value(h);
    default: std::memcpy(&h, p, 2); return bfloat_value(h);
  }
}

void put(Dtype dtype, char* p, double value) {
  const float f = float(value);
  uint16_t h;
  switch (dtype) {
    case Dtype::float32: std::memcpy(p, &f, 4); return;
    case Dtype::float64: std::memcpy(p, &value, 8); return;
    case Dtype::float16: h = nearest(value, 0x7c00, half_value); break;
    default: h = nearest(value, 0x7f80, bfloat_value); break;
  }
  std::memcpy(p, &h, 2);
}

// ---- Maps in memory ---------------------------------------------------------------------------------------

enum class Layout { contiguous, sliced, channels_last, channels_sliced };
const char* const kLayoutNames[] = {"contiguous", "sliced", "channels_last", "channels_sliced"};

MapView make_view(Layout layout, int64_t outer, int64_t inner, int64_t height, int64_t width) {
  switch (layout) {
    case Layout::contiguous: return {outer, inner, height, width, inner * height * width, height * width, width, 1};
    case Layout::sliced:
      return {outer, inner, height, width, (inner + 1) * (height + 1) * (width + 3), (height + 1) * (width + 3),
              width + 3, 1};
    case Layout::channels_last: return {outer, inner, height, width, inner * height * width, 1, width * inner, inner};
    default:
      return {outer, inner, height, width, (height + 1) * (width + 2) * (inner + 5), 1, (width + 2) * (inner + 5),
              inner + 5};
  }
}

int64_t element(const MapView& v, int64_t map, int64_t y, int64_t x) {
  return map / v.inner * v.stride_outer + map % v.inner * v.stride_inner + y * v.stride_y + x * v.stride_x;
}

// Memory that ends with the last element of the last map.
struct Buffer {
  Dtype dtype;
  MapView view;
  int64_t count;
  std::unique_ptr<char[]> bytes;

  Buffer(Dtype d, const MapView& v, unsigned char fill)
      : dtype(d), view(v), count(element(v, v.maps() - 1, v.height - 1, v.width - 1) + 1),
        bytes(new char[size_t(count * element_size(d))]) {
    std::memset(bytes.get(), fill, size_t(count * element_size(d)));
  }
  char* at(int64_t map, int64_t y, int64_t x) {
    return bytes.get() + element(view, map, y, x) * element_size(dtype);
  }
  double value(int64_t map, int64_t y, int64_t x) { return get(dtype, at(map, y, x)); }
};

// ---- The reference: the definition, in float64 ------------------------------------------------------------

struct Expected {
  double x, y, dbeta;
  double error;  // what rounding of the logits' differences may cost a coordinate
  std::vector<double> grad;
};

Expected reference(Buffer& h, int64_t map, double beta, const double (&g)[2]) {
  const MapView& v = h.view;
  const double sign = beta < 0 ? -1 : 1, cx = 0.5 * double(v.width - 1), cy = 0.5 * double(v.height - 1);
  double peak = -kInfinity, sum = 0, sum_x = 0, sum_y = 0;
  for (int64_t y = 0; y < v.height; ++y) {
    for (int64_t x = 0; x < v.width; ++x) peak = std::fmax(peak, h.value(map, y, x) * sign);
  }
  std::vector<double> w(size_t(v.height * v.width)), distance(w.size());
  for (size_t i = 0; i < w.size(); ++i) {
    const int64_t y = int64_t(i) / v.width, x = int64_t(i) % v.width;
    const double k = h.value(map, y, x) * sign;
    w[i] = k == -kInfinity ? 0 : std::exp((k - peak) * std::fabs(beta));
    if (peak == kInfinity || peak == -kInfinity) w[i] = NAN;
    distance[i] = k == -kInfinity ? 0 : k - peak;
    sum += w[i], sum_x += w[i] * (double(x) - cx), sum_y += w[i] * (double(y) - cy);
  }
  Expected e = {sum_x / sum, sum_y / sum, 0, 0, {}};
  for (size_t i = 0; i < w.size(); ++i) {
    const double x = double(int64_t(i) % v.width) - cx, y = double(int64_t(i) / v.width) - cy;
    const double wq = w[i] / sum * (g[0] * (x - e.x) + g[1] * (y - e.y));
    e.grad.push_back(w[i] == 0 ? 0 : beta * wq);
    e.dbeta += sign * distance[i] * wq;
    e.error += std::fabs(distance[i] * wq);
  }
  return e;
}

// ---- Calling the kernels ----------------------------------------------------------------------------------

struct Accumulators {
  Dtype dtype;
  std::unique_ptr<char[]> bytes;

  Accumulators(Dtype d, int64_t n) : dtype(d), bytes(new char[size_t(n * accumulator_size(d))]) {}
  Dtype kind() const { return dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32; }
  double operator[](int64_t i) const { return get(kind(), bytes.get() + i * accumulator_size(dtype)); }
  void set(int64_t i, double value) { put(kind(), bytes.get() + i * accumulator_size(dtype), value); }
};

// All pixels, no moments.
ForwardParams forward_params(Dtype dtype, const void* h, const MapView& view, const BetaView& beta, const Units& units,
                             void* coordinates, void* stats, std::vector<char>& workspace) {
  ForwardParams p{};
  p.dtype = dtype, p.heatmap = h, p.view = view, p.beta = beta, p.units = units;
  p.coordinates = coordinates, p.stats = stats, p.workspace = workspace.empty() ? nullptr : workspace.data();
  return p;
}

BackwardParams backward_params(Dtype dtype, const void* h, const MapView& view, const BetaView& beta,
                               const Units& units, const void* stats, const void* upstream, void* grad,
                               void* grad_beta, std::vector<char>& workspace) {
  BackwardParams p{};
  p.dtype = dtype, p.heatmap = h, p.view = p.grad_view = view, p.beta = beta, p.units = units, p.stats = stats;
  p.grad_coordinates = upstream, p.grad_stride_map = 2, p.grad_stride_xy = 1;
  p.grad_heatmap = grad, p.grad_beta = grad_beta, p.workspace = workspace.empty() ? nullptr : workspace.data();
  return p;
}

struct Call {
  Buffer& h;
  BetaView beta;
  Accumulators coordinates, stats, upstream, grad_beta;
  Buffer grad;

  Call(Buffer& heatmap, const BetaView& b)
      : h(heatmap), beta(b), coordinates(h.dtype, 2 * h.view.maps()), stats(h.dtype, kStats * h.view.maps()),
        upstream(h.dtype, 2 * h.view.maps()), grad_beta(h.dtype, h.view.maps()), grad(h.dtype, h.view, 0x5a) {}

  void run(const Units& units, bool want_beta) {
    const MapView& v = h.view;
    std::vector<char> forward(size_t(cpu::soft_argmax2d_forward_workspace(v, h.dtype, false)));
    std::vector<char> backward(size_t(cpu::soft_argmax2d_backward_workspace(v, h.dtype, want_beta)));
    cpu::soft_argmax2d_forward(forward_params(h.dtype, h.bytes.get(), v, beta, units, coordinates.bytes.get(),
                                              stats.bytes.get(), forward));
    cpu::soft_argmax2d_backward(backward_params(h.dtype, h.bytes.get(), v, beta, units, stats.bytes.get(),
                                                upstream.bytes.get(), grad.bytes.get(),
                                                want_beta ? grad_beta.bytes.get() : nullptr, backward));
  }
};

bool near(double a, double b, double tolerance) {
  return std::isnan(b) ? std::isnan(a) : std::fabs(a - b) <= tolerance;
}

struct Case {
  Dtype dtype;
  Layout layout;
  int64_t outer, inner, height, width;

  std::string name() const {
    const char* const dtypes[] = {"float32", "float64", "float16", "bfloat16"};
    std::string s = std::string(dtypes[int(dtype)]) + " " + kLayoutNames[int(layout)];
    for (int64_t n : {outer, inner, height, width}) s += " " + std::to_string(n);
    return s;
  }
};

// Logits of spread 3 about a peak, and by map number: plain, -inf in places, one pixel alone, a NaN, a +inf, no weight
// at all, huge.
void fill(Buffer& h, bool odd) {
  const MapView& v = h.view;
  for (int64_t map = 0; map < v.maps(); ++map) {
    const int64_t kind = odd ? map % 8 : 0;
    const int64_t special = (map * 7919 + 3) % (v.height * v.width);
    for (int64_t y = 0; y < v.height; ++y) {
      for (int64_t x = 0; x < v.width; ++x) {
        const bool here = y * v.width + x == special;
        double value = 6 * uniform() - 3 + (here ? 4 : 0);
        if (kind == 1 && uniform() < 0.5 && !here) value = -kInfinity;
        if (kind == 2 && !here) value = -kInfinity;
        if (kind == 3 && here) value = NAN;
        if (kind == 4 && here) value = kInfinity;
        if (kind == 5) value = -kInfinity;
        if (kind == 6) value *= 1e4;
        put(h.dtype, h.at(map, y, x), value);
      }
    }
  }
}

// Whether what lies between the maps is as it was.
bool gaps_untouched(Buffer& grad) {
  std::vector<bool> written(size_t(grad.count), false);
  const MapView& v = grad.view;
  for (int64_t i = 0; i < v.maps() * v.height * v.width; ++i) {
    written[size_t(element(v, i / v.width / v.height, i / v.width % v.height, i % v.width))] = true;
  }
  const int64_t size = element_size(grad.dtype);
  for (int64_t i = 0; i < grad.count * size; ++i) {
    if (!written[size_t(i / size)] && grad.bytes[size_t(i)] != 0x5a) return false;
  }
  return true;
}

void compare(const Case& c, Call& call, const Units& units, double beta, bool want_beta) {
  Buffer& h = call.h;
  const bool wide = c.dtype == Dtype::float64;
  const double unit = wide ? 1e-15 : 6e-8;                                          // rounding of the accumulators
  const double step = wide ? 0 : c.dtype == Dtype::float32 ? 0 : c.dtype == Dtype::float16 ? 1e-3 : 8e-3;
  const double extent = double(c.height + c.width), tolerance = 8 * unit * extent;
  for (int64_t map = 0; map < h.view.maps(); ++map) {
    const std::string name = c.name() + " beta " + std::to_string(beta) + " map " + std::to_string(map);
    const double g[2] = {call.upstream[2 * map] * units.scale_x, call.upstream[2 * map + 1] * units.scale_y};
    const Expected e = reference(h, map, beta, g);
    const double x = (call.coordinates[2 * map] - units.offset_x) / units.scale_x;
    const double y = (call.coordinates[2 * map + 1] - units.offset_y) / units.scale_y;
    check(near(x, e.x, tolerance) && near(y, e.y, tolerance), name + " coordinates");
    double largest = 0;
    for (double value : e.grad) largest = std::fmax(largest, std::fabs(value));
    bool same = true, zeros = true;
    for (int64_t i = 0; i < c.height * c.width; ++i) {
      const double value = call.grad.value(map, i / c.width, i % c.width), expected = e.grad[size_t(i)];
      const double smallest = c.dtype == Dtype::float16 ? 6e-8 : 1e-37;
      const double rounding = 100 * unit * (largest + 0.1 * std::fabs(beta) * extent);
      same = same && near(value, expected, step * std::fabs(expected) + rounding + smallest);
      const double key = h.value(map, i / c.width, i % c.width) * (beta < 0 ? -1 : 1);
      zeros = zeros && (key != -kInfinity || std::isnan(expected) || value == 0);
    }
    check(same, name + " gradient");
    check(zeros, name + " gradient of -inf");
    if (!want_beta) continue;
    const double size = std::fmax(std::fabs(h.value(map, 0, 0)), 10.0);
    check(std::isnan(e.dbeta) ? std::isnan(call.grad_beta[map])
                              : near(call.grad_beta[map], e.dbeta, 50 * unit * (e.error + 0.1 * extent * size)),
          name + " grad_beta");
  }
  check(gaps_untouched(call.grad), c.name() + " gaps");
}

void run_case(const Case& c, double beta, bool want_beta, bool odd) {
  Buffer h(c.dtype, make_view(c.layout, c.outer, c.inner, c.height, c.width), 0xff);
  fill(h, odd);
  Call call(h, {nullptr, beta, 1, 1});
  for (int64_t i = 0; i < 2 * h.view.maps(); ++i) call.upstream.set(i, uniform() - 0.5);
  const Units units = {1.0, 0.5 * double(c.width - 1), 2.0, 1.0};
  call.run(units, want_beta);
  compare(c, call, units, beta, want_beta);
}

// ---- The tests --------------------------------------------------------------------------------------------

const Dtype kDtypes[] = {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16};
const Layout kLayouts[] = {Layout::contiguous, Layout::sliced, Layout::channels_last, Layout::channels_sliced};

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

// Pieces of an extent: none too large, none empty, beginning at multiples, the larger ones first.
void test_cuts() {
  for (int64_t multiple : {1, 3, 64}) {
    for (int64_t extent = 1; extent <= 700; ++extent) {
      for (int64_t most = 2 * multiple; most <= 2 * multiple + 200; most += 7) {
        const cpu::Cut c = cpu::cut(extent, most, multiple);
        bool holds = c.begin(0) == 0 && c.begin(c.count) == extent;
        for (int64_t i = 0; i < c.count; ++i) {
          holds &= c.size(i) >= 1 && c.size(i) <= most && c.begin(i) % multiple == 0;
          if (i > 0 && i + 1 < c.count) holds &= c.size(i) <= c.size(i - 1) && c.size(i - 1) <= c.size(i) + multiple;
        }
        if (!holds) {
          check(false, "cut of " + std::to_string(extent) + " into pieces of at most " + std::to_string(most));
          return;
        }
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

// Every misalignment an element may have: the maps are a part of a larger allocation, and end with it.
void test_misalignment() {
  for (Dtype dtype : kDtypes) {
    const MapView v = make_view(Layout::contiguous, 1, 2, 5, 37);
    Buffer aligned(dtype, v, 0);
    fill(aligned, false);
    Call expected(aligned, {nullptr, 1.5, 1, 1});
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
      Call one(h, per_channel), many(h, per_channel);
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

// ---- Moments, masks and valid sizes -----------------------------------------------------------------------

// pixels_of_mask: a mask of which the channels of a pixel stand side by side; channels_of_mask: as the last of some more.
// sizes: of samples; sizes_of_maps: of each map, some of which have none.
enum class Counted { all, mask, shared_mask, pixels_of_mask, channels_of_mask, sizes, sizes_of_maps, both };
constexpr Counted kCounted[] = {Counted::all,
                               Counted::mask,
                               Counted::shared_mask,
                               Counted::pixels_of_mask,
                               Counted::channels_of_mask,
                               Counted::sizes,
                               Counted::sizes_of_maps,
                               Counted::both};
constexpr int64_t kCountings = sizeof(kCounted) / sizeof(kCounted[0]);

// Which pixels count, in memory that ends with what the kernels may read.
struct Pixels {
  const Case& c;
  Counted kind;
  std::unique_ptr<uint8_t[]> mask;
  std::unique_ptr<int64_t[]> sizes;
  PixelView view{};
  int64_t first = 0;  // byte of the mask

  // columns: how many of them count where sizes do, of all rows; 0: any, and any rows.
  Pixels(const Case& k, Counted counted, int64_t columns = 0) : c(k), kind(counted) {
    view.divisor = view.modulus = 1;
    view.fills_empty = kind != Counted::all;
    view.empty_value = -5;
    const int64_t pixels = c.height * c.width, shared = kind == Counted::shared_mask ? 0 : pixels;
    if (kind != Counted::all && kind != Counted::sizes && kind != Counted::sizes_of_maps) {
      const int64_t maps = shared ? c.outer * c.inner : 1;
      view.mask_view = {c.outer, c.inner, c.height, c.width, shared * c.inner, shared, c.width, 1};
      int64_t bytes = maps * pixels;
      if (kind == Counted::pixels_of_mask || kind == Counted::channels_of_mask) {
        // Some more: as many as a vector has lanes, on some instruction set. Padded pixels are as far apart.
        const int64_t more = c.inner <= 4 ? 4 : c.inner <= 8 ? 8 : c.inner <= 16 ? 16 : c.inner + 1;
        const int64_t channels = kind == Counted::pixels_of_mask ? c.inner : more;
        first = channels - c.inner;
        bytes = c.outer * pixels * channels;
        view.mask_view = {c.outer, c.inner, c.height, c.width, pixels * channels, 1, c.width * channels, channels};
      }
      mask.reset(new uint8_t[size_t(bytes)]);
      for (int64_t i = 0; i < bytes; ++i) mask[size_t(i)] = uniform() < 0.6 && i / pixels != 3;
      view.mask = mask.get() + first;
    }
    if (kind == Counted::sizes || kind == Counted::sizes_of_maps || kind == Counted::both) {
      view.divisor = c.inner, view.modulus = c.outer;
      if (kind == Counted::sizes_of_maps) view.divisor = 1, view.modulus = c.outer * c.inner;
      sizes.reset(new int64_t[size_t(2 * view.modulus)]);
      for (int64_t i = 0; i < view.modulus; ++i) {
        sizes[size_t(2 * i)] = columns ? c.height : 1 + int64_t(uniform() * double(c.height));
        sizes[size_t(2 * i + 1)] = columns ? columns : 1 + int64_t(uniform() * double(c.width));
        if (kind == Counted::sizes_of_maps && i % 5 == 3) sizes[size_t(2 * i)] = 0;
      }
      view.sizes = sizes.get();
    }
  }

  bool at(int64_t map, int64_t y, int64_t x) const {
    const size_t size = size_t(map / view.divisor % view.modulus * 2);
    if (view.sizes && (y >= sizes[size] || x >= sizes[size + 1])) return false;
    return !view.mask || mask[size_t(first + element(view.mask_view, map, y, x))];
  }
};

constexpr int kFields = 9;  // mean x, y; covariance xx, xy, yx, yy; entropy, logsumexp, probability of the peak

struct ExpectedMoments {
  double field[kFields], weight;
  int64_t peak_x, peak_y;
  std::vector<double> grad;  // of the sum of g times field
};

// The definitions of the table in the documentation, in units of pixels from the centre.
ExpectedMoments reference_moments(Buffer& h, int64_t map, double beta, const Pixels& pixels, const double (&g)[kFields]) {
  const MapView& v = h.view;
  const int64_t n = v.height * v.width;
  std::vector<double> z(size_t(n), -kInfinity), p(z.size());
  double top = -kInfinity, peak = -kInfinity, sum = 0, xs = 0, ys = 0, xx = 0, xy = 0, yy = 0, entropy = 0;
  ExpectedMoments e{};
  const auto x_of = [&](int64_t i) { return double(i % v.width) - 0.5 * double(v.width - 1); };
  const auto y_of = [&](int64_t i) { return double(i / v.width) - 0.5 * double(v.height - 1); };
  for (int64_t i = 0; i < n; ++i) {
    if (!pixels.at(map, i / v.width, i % v.width)) continue;
    const double value = h.value(map, i / v.width, i % v.width), key = beta < 0 ? -value : value;
    z[size_t(i)] = beta * value;
    top = std::fmax(top, z[size_t(i)]);
    if (key > peak) peak = key, e.peak_x = i % v.width, e.peak_y = i / v.width;
  }
  for (double value : z) sum += value == -kInfinity ? 0 : std::exp(value - top);
  for (int64_t i = 0; i < n; ++i) {
    p[size_t(i)] = z[size_t(i)] == -kInfinity ? 0 : std::exp(z[size_t(i)] - top) / sum;
    xs += p[size_t(i)] * x_of(i), ys += p[size_t(i)] * y_of(i);
  }
  for (int64_t i = 0; i < n; ++i) {
    const double w = p[size_t(i)], dx = x_of(i) - xs, dy = y_of(i) - ys;
    xx += w * dx * dx, xy += w * dx * dy, yy += w * dy * dy;
    if (w > 0) entropy -= w * (z[size_t(i)] - top - std::log(sum));
  }
  const double chance = 1 / sum, fields[kFields] = {xs, ys, xx, xy, xy, yy, entropy, top + std::log(sum), chance};
  std::memcpy(e.field, fields, sizeof(fields));
  e.weight = sum;
  for (int64_t i = 0; i < n; ++i) {
    const double w = p[size_t(i)], dx = x_of(i) - xs, dy = y_of(i) - ys, log_p = w > 0 ? z[size_t(i)] - e.field[7] : 0;
    const bool at_peak = i == e.peak_y * v.width + e.peak_x;
    const double q = g[0] * dx + g[1] * dy + g[2] * (dx * dx - xx) + (g[3] + g[4]) * (dx * dy - xy) +
                     g[5] * (dy * dy - yy) - g[6] * (log_p + entropy) + g[7] - g[8] * chance;
    e.grad.push_back(w == 0 ? 0 : beta * (w * q + (at_peak ? g[8] * chance : 0)));
  }
  return e;
}

void run_moments(const Case& c, double beta, Counted counted, int64_t columns = 0) {
  Buffer h(c.dtype, make_view(c.layout, c.outer, c.inner, c.height, c.width), 0xff);
  fill(h, false);
  const Pixels pixels(c, counted, columns);
  const MapView& v = h.view;
  const int64_t maps = v.maps();
  for (int64_t i = 0; i < maps * c.height * c.width; ++i) {  // what does not count may be anything
    const int64_t map = i / c.height / c.width, y = i / c.width % c.height, x = i % c.width;
    if (!pixels.at(map, y, x)) put(c.dtype, h.at(map, y, x), NAN);
  }
  Accumulators mean(c.dtype, 2 * maps), covariance(c.dtype, 4 * maps), entropy(c.dtype, maps), lse(c.dtype, maps);
  Accumulators chance(c.dtype, maps), stats(c.dtype, kMomentStats * maps), grad_beta(c.dtype, maps);
  Accumulators g_mean(c.dtype, 2 * maps), g_covariance(c.dtype, 4 * maps), g_entropy(c.dtype, maps), g_lse(c.dtype, maps);
  Accumulators g_chance(c.dtype, maps);
  std::unique_ptr<int64_t[]> peak(new int64_t[size_t(2 * maps)]);
  for (int64_t i = 0; i < 4 * maps; ++i) {
    g_covariance.set(i, 0.1 * uniform() - 0.05);
    if (i < 2 * maps) g_mean.set(i, uniform() - 0.5);
    if (i < maps) g_entropy.set(i, uniform() - 0.5), g_lse.set(i, uniform() - 0.5), g_chance.set(i, uniform() - 0.5);
  }
  const Units units = {1, 0, 1, 0};
  std::vector<char> forward(size_t(cpu::soft_argmax2d_forward_workspace(v, c.dtype, true)));
  std::vector<char> backward(size_t(cpu::soft_argmax2d_backward_workspace(v, c.dtype, true)));
  const BetaView number = {nullptr, beta, 1, 1};
  ForwardParams f = forward_params(c.dtype, h.bytes.get(), v, number, units, mean.bytes.get(), stats.bytes.get(), forward);
  f.pixels = pixels.view, f.with_moments = true;
  f.moments = {covariance.bytes.get(), entropy.bytes.get(), lse.bytes.get(), chance.bytes.get(), peak.get()};
  cpu::soft_argmax2d_forward(f);
  Buffer grad(c.dtype, v, 0x5a);
  BackwardParams b = backward_params(c.dtype, h.bytes.get(), v, number, units, stats.bytes.get(), g_mean.bytes.get(),
                                     grad.bytes.get(), grad_beta.bytes.get(), backward);
  b.pixels = pixels.view, b.with_moments = true;
  b.moments = {g_covariance.bytes.get(), g_entropy.bytes.get(), g_lse.bytes.get(), g_chance.bytes.get(), peak.get()};
  cpu::soft_argmax2d_backward(b);

  const double unit = c.dtype == Dtype::float64 ? 1e-14 : 6e-7, extent = double(c.height + c.width);
  const double step = c.dtype == Dtype::float16 ? 1e-3 : c.dtype == Dtype::bfloat16 ? 8e-3 : 0;
  for (int64_t map = 0; map < maps; ++map) {
    const std::string name = c.name() + " moments beta " + std::to_string(beta) + " counted " +
                             std::to_string(int(counted)) + " map " + std::to_string(map);
    const double g[kFields] = {g_mean[2 * map],         g_mean[2 * map + 1],     g_covariance[4 * map],
                               g_covariance[4 * map + 1], g_covariance[4 * map + 2], g_covariance[4 * map + 3],
                               g_entropy[map],          g_lse[map],              g_chance[map]};
    const ExpectedMoments e = reference_moments(h, map, beta, pixels, g);
    const double got[kFields] = {mean[2 * map],         mean[2 * map + 1],     covariance[4 * map],
                                 covariance[4 * map + 1], covariance[4 * map + 2], covariance[4 * map + 3],
                                 entropy[map],          lse[map],              chance[map]};
    const bool empty = e.weight == 0;
    for (int i = 0; i < kFields; ++i) {
      const double size = i < 2 ? extent : i < 6 ? extent * extent : 20;
      check(near(got[i], empty ? -5 : e.field[i], unit * size), name + " field " + std::to_string(i));
    }
    check(peak[size_t(2 * map)] == e.peak_x && peak[size_t(2 * map + 1)] == e.peak_y, name + " peak");
    bool same = true, zeros = true;
    double largest = 0;
    for (double value : e.grad) largest = std::fmax(largest, std::fabs(value));
    for (int64_t i = 0; i < c.height * c.width; ++i) {
      const double value = grad.value(map, i / c.width, i % c.width), want = empty ? 0 : e.grad[size_t(i)];
      const double rounding = 100 * unit * largest + unit * extent * extent * (c.dtype == Dtype::float16 ? 2 : 1);
      same = same && near(value, want, step * std::fabs(want) + rounding);
      zeros = zeros && (pixels.at(map, i / c.width, i % c.width) || value == 0);
    }
    check(same, name + " gradient");
    check(zeros, name + " gradient of pixels that do not count");
  }
  check(gaps_untouched(grad), c.name() + " gaps");
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

// ---- Expectations of values -------------------------------------------------------------------------------

enum class Lie { rows, like_maps, pixels, shared_by_sample, shared_by_all };
const char* const kLieNames[] = {"rows", "like maps", "channels innermost", "shared by a sample", "shared by all"};

ValueView lie(Lie kind, const Case& c, int64_t channels) {
  const int64_t n = c.height * c.width, w = c.width;
  const MapView maps = make_view(c.layout, c.outer, c.inner, c.height, w);
  switch (kind) {
    case Lie::rows: return {channels, c.inner * channels * n, channels * n, n, w, 1};
    case Lie::like_maps: return {1, maps.stride_outer, maps.stride_inner, 0, maps.stride_y, maps.stride_x};
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
    std::memset(bytes.get(), 0x5a, size_t(size()));
  }
  int64_t offset(int64_t map, int64_t channel, int64_t y, int64_t x) const {
    return map / c.inner * view.stride_outer + map % c.inner * view.stride_inner + channel * view.stride_channel +
           y * view.stride_y + x * view.stride_x;
  }
  int64_t size() const {
    return (offset(c.outer * c.inner - 1, view.channels - 1, c.height - 1, c.width - 1) + 1) * element_size(dtype);
  }
  char* at(int64_t map, int64_t channel, int64_t y, int64_t x) {
    return bytes.get() + offset(map, channel, y, x) * element_size(dtype);
  }
  double value(int64_t map, int64_t channel, int64_t y, int64_t x) { return get(dtype, at(map, channel, y, x)); }
};

// P of one map, zero where no pixel counts, and how far keys lie below the peak.
struct Softmax {
  std::vector<double> p, distance;
  double weight = 0;

  Softmax(Buffer& h, int64_t map, double beta, const Pixels& pixels) {
    const double sign = beta < 0 ? -1 : 1;
    double peak = -kInfinity;
    const auto counts = [&](int64_t i) { return pixels.at(map, i / h.view.width, i % h.view.width); };
    const auto key = [&](int64_t i) { return sign * h.value(map, i / h.view.width, i % h.view.width); };
    const int64_t n = h.view.height * h.view.width;
    for (int64_t i = 0; i < n; ++i) peak = counts(i) ? std::fmax(peak, key(i)) : peak;
    for (int64_t i = 0; i < n; ++i) {
      distance.push_back(counts(i) ? key(i) - peak : 0);
      p.push_back(counts(i) ? std::exp(distance.back() * std::fabs(beta)) : 0);
      weight += p.back();
    }
    for (double& w : p) w = weight > 0 ? w / weight : 0;
  }
};

SoftmaxParams softmax_params(Buffer& h, const BetaView& beta, const Pixels& pixels, const Accumulators* stats) {
  return {h.dtype, h.bytes.get(), h.view, pixels.view, beta, stats ? stats->bytes.get() : nullptr, kStats, stats == nullptr};
}

void run_expectation(const Case& c, double beta, Counted counted, Lie kind, int64_t channels) {
  const std::string name = c.name() + " values in " + kLieNames[int(kind)] + " " + std::to_string(channels) + " counted " +
                           std::to_string(int(counted));
  Buffer h(c.dtype, make_view(c.layout, c.outer, c.inner, c.height, c.width), 0xff);
  fill(h, false);
  const Pixels pixels(c, counted);
  const MapView& v = h.view;
  const int64_t maps = v.maps(), n = c.height * c.width;
  ValueBuffer values(c, lie(kind, c, channels)), grad_values(c, values.view);
  const auto pixel = [&](int64_t i) { return std::pair<int64_t, int64_t>(i / c.width, i % c.width); };
  for (int64_t i = 0; i < maps * n * channels; ++i) {
    const auto [y, x] = pixel(i % n);
    put(c.dtype, values.at(i / n / channels, i / n % channels, y, x), NAN);
  }
  for (int64_t i = 0; i < maps * n; ++i) {  // what does not count may be anything, values where it counts for none
    const auto [y, x] = pixel(i % n);
    const int64_t map = i / n;
    if (!pixels.at(map, y, x)) put(c.dtype, h.at(map, y, x), NAN);
    for (int64_t k = 0; pixels.at(map, y, x) && k < channels; ++k) put(c.dtype, values.at(map, k, y, x), 2 * uniform() - 1);
  }
  Accumulators stats(c.dtype, kStats * maps), coordinates(c.dtype, 2 * maps), expectation(c.dtype, channels * maps);
  Accumulators grad(c.dtype, channels * maps), grad_beta(c.dtype, maps);
  for (int64_t i = 0; i < channels * maps; ++i) grad.set(i, uniform() - 0.5);
  Buffer grad_heatmap(c.dtype, v, 0x5a), softmax_map(c.dtype, v, 0x5a);
  const BetaView number = {nullptr, beta, 1, 1};
  const SoftmaxParams softmax = softmax_params(h, number, pixels, &stats);
  const Values of = {ValueKind::tensor, values.bytes.get(), values.view, {}, 0, nullptr};

  std::vector<char> workspace(size_t(cpu::soft_argmax2d_forward_workspace(v, c.dtype, false)));
  ForwardParams f = forward_params(c.dtype, h.bytes.get(), v, number, {1, 0, 1, 0}, coordinates.bytes.get(),
                                   stats.bytes.get(), workspace);
  f.pixels = pixels.view;
  ExpectationParams e = {softmax, of, expectation.bytes.get(), nullptr};
  std::vector<char> of_expectation(size_t(cpu::expectation_workspace(e)));
  e.workspace = of_expectation.data();
  cpu::expectation({&f, &e, nullptr, nullptr});
  ExpectationHeatmapParams of_heatmap = {softmax, of, expectation.bytes.get(), grad.bytes.get(), grad_heatmap.bytes.get(),
                                         v, grad_beta.bytes.get(), nullptr};
  std::vector<char> of_beta(size_t(cpu::expectation_heatmap_workspace(of_heatmap)));
  of_heatmap.workspace = of_beta.data();
  const ExpectationValuesParams of_values = {softmax, grad.bytes.get(), grad_values.bytes.get(), values.view};
  cpu::expectation({nullptr, nullptr, &of_heatmap, &of_values});
  const ExpectationValuesParams of_map = {softmax, nullptr, softmax_map.bytes.get(),
                                          {1, v.stride_outer, v.stride_inner, 0, v.stride_y, v.stride_x}};
  cpu::expectation({&f, nullptr, nullptr, &of_map});

  const double unit = c.dtype == Dtype::float64 ? 1e-14 : 1e-6, size = double(channels + 4);
  const double step = c.dtype == Dtype::float16 ? 1e-3 : c.dtype == Dtype::bfloat16 ? 8e-3 : 0;
  const double least = c.dtype == Dtype::float16 ? 6e-8 : 0;  // its smallest number
  std::vector<double> wanted_values(size_t(values.size() / element_size(c.dtype)), 0);
  for (int64_t map = 0; map < maps; ++map) {
    const Softmax s(h, map, beta, pixels);
    const bool empty = s.weight == 0;
    std::vector<double> q(size_t(n), 0);
    double mean = 0, dbeta = 0;
    for (int64_t k = 0; k < channels; ++k) {
      const double g = grad[map * channels + k];
      double want = 0;
      for (int64_t i = 0; i < n; ++i) {
        const auto [y, x] = pixel(i);
        const double p = s.p[size_t(i)], value = pixels.at(map, y, x) ? values.value(map, k, y, x) : 0;
        want += p * value, q[size_t(i)] += g * value;
        if (!empty) wanted_values[size_t(values.offset(map, k, y, x))] += p * g;
      }
      mean += g * want;
      check(near(expectation[map * channels + k], empty ? -5 : want, 4 * unit), name + " expectation");
    }
    bool same = true, zeros = true, mass = true;
    for (int64_t i = 0; i < n; ++i) {
      const auto [y, x] = pixel(i);
      const double wq = s.p[size_t(i)] * (q[size_t(i)] - mean), got = grad_heatmap.value(map, y, x);
      dbeta += (beta < 0 ? -1 : 1) * s.distance[size_t(i)] * wq;
      same = same && near(got, beta * wq, step * std::fabs(beta * wq) + unit * size + least);
      zeros = zeros && ((pixels.at(map, y, x) && !empty) || got == 0);
      const double want = empty ? -5 : s.p[size_t(i)];
      mass = mass && near(softmax_map.value(map, y, x), want, step * std::fabs(want) + unit + least);
    }
    check(same, name + " gradient of the heatmap");
    check(zeros, name + " gradient of pixels that do not count");
    check(mass, name + " softmax");
    check(near(grad_beta[map], dbeta, 40 * unit * size), name + " gradient of beta");
  }
  bool same = true;
  for (int64_t map = 0; map < maps; ++map) {
    for (int64_t i = 0; i < n * channels; ++i) {
      const auto [y, x] = pixel(i % n);
      const double want = wanted_values[size_t(values.offset(map, i / n, y, x))];
      same = same && near(grad_values.value(map, i / n, y, x), want, step * std::fabs(want) + unit * double(maps) + least);
    }
  }
  check(same, name + " gradient of the values");
  check(gaps_untouched(grad_heatmap) && gaps_untouched(softmax_map), name + " gaps");
}

// Coordinates of maps that are probabilities already, and their gradient; the mass within a window, and its.
void run_coordinates_and_window(const Case& c, Counted counted, int64_t radius) {
  Buffer h(c.dtype, make_view(c.layout, c.outer, c.inner, c.height, c.width), 0xff), grad_heatmap(c.dtype, h.view, 0x5a);
  fill(h, false);
  const Pixels pixels(c, counted);
  const MapView& v = h.view;
  const int64_t maps = v.maps(), n = c.height * c.width;
  for (int64_t i = 0; i < maps * n; ++i) {
    const int64_t map = i / n, y = i / c.width % c.height, x = i % c.width;
    if (!pixels.at(map, y, x)) put(c.dtype, h.at(map, y, x), NAN);
  }
  const std::string name = c.name() + " counted " + std::to_string(int(counted)) + " radius " + std::to_string(radius);
  const Units units = {0.5, 3, 2, -1};
  const BetaView number = {nullptr, 1, 1, 1};
  const double unit = c.dtype == Dtype::float64 ? 1e-14 : 1e-6, extent = double(c.height + c.width);
  const double step = c.dtype == Dtype::float16 ? 1e-3 : c.dtype == Dtype::bfloat16 ? 8e-3 : 0;
  const Values of_coordinates = {ValueKind::coordinates, nullptr, {2, 0, 0, 0, 0, 0}, units, 0, nullptr};
  Accumulators mean(c.dtype, 2 * maps), grad(c.dtype, 2 * maps), stats(c.dtype, kStats * maps), mass(c.dtype, maps);
  for (int64_t i = 0; i < 2 * maps; ++i) grad.set(i, uniform() - 0.5);
  {
    const SoftmaxParams itself = softmax_params(h, number, pixels, nullptr);
    ExpectationParams e = {itself, of_coordinates, mean.bytes.get(), nullptr};
    std::vector<char> workspace(size_t(cpu::expectation_workspace(e)));
    e.workspace = workspace.data();
    cpu::expectation({nullptr, &e, nullptr, nullptr});
    const ExpectationHeatmapParams g = {itself, of_coordinates, nullptr, grad.bytes.get(), grad_heatmap.bytes.get(),
                                        v, nullptr, nullptr};
    cpu::expectation({nullptr, nullptr, &g, nullptr});
  }
  for (int64_t map = 0; map < maps; ++map) {
    double x_mean = 0, y_mean = 0, sum = 0;
    bool same = true;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t y = i / c.width, x = i % c.width;
      const double at_x = 0.5 * (double(x) - 0.5 * double(c.width - 1)) + 3, at_y = 2 * (double(y) - 0.5 * double(c.height - 1)) - 1;
      const bool counts = pixels.at(map, y, x);
      const double p = counts ? h.value(map, y, x) : 0;
      x_mean += p * at_x, y_mean += p * at_y, sum += std::fabs(p);
      const double want = counts ? grad[2 * map] * at_x + grad[2 * map + 1] * at_y : 0;
      same = same && near(grad_heatmap.value(map, y, x), want, step * std::fabs(want) + 4 * unit * extent);
    }
    check(near(mean[2 * map], x_mean, unit * sum * extent), name + " x of probabilities");
    check(near(mean[2 * map + 1], y_mean, unit * sum * 2 * extent), name + " y of probabilities");
    check(same, name + " gradient of probabilities");
  }
  std::unique_ptr<int64_t[]> centre(new int64_t[size_t(2 * maps)]);
  for (int64_t i = 0; i < maps; ++i) {
    // Some beside the map.
    centre[size_t(2 * i)] = int64_t((1.5 * uniform() - 0.25) * double(c.width));
    centre[size_t(2 * i + 1)] = i % 5 == 4 ? -(int64_t(1) << 62) : int64_t(uniform() * double(c.height));
  }
  std::vector<char> workspace(size_t(cpu::soft_argmax2d_forward_workspace(v, c.dtype, false)));
  ForwardParams f = forward_params(c.dtype, h.bytes.get(), v, number, units, mean.bytes.get(), stats.bytes.get(), workspace);
  f.pixels = pixels.view;
  const SoftmaxParams softmax = softmax_params(h, number, pixels, &stats);
  const Values of_window = {ValueKind::window, nullptr, {1, 0, 0, 0, 0, 0}, {}, radius, centre.get()};
  const ExpectationParams e = {softmax, of_window, mass.bytes.get(), nullptr};
  cpu::expectation({&f, &e, nullptr, nullptr});
  const ExpectationHeatmapParams g = {softmax, of_window, mass.bytes.get(), grad.bytes.get(), grad_heatmap.bytes.get(), v,
                                      nullptr, nullptr};
  cpu::expectation({nullptr, nullptr, &g, nullptr});
  for (int64_t map = 0; map < maps; ++map) {
    const Softmax s(h, map, 1, pixels);
    const bool empty = s.weight == 0;
    const auto inside = [&](int64_t i) {
      return std::abs(i % c.width - centre[size_t(2 * map)]) <= radius && std::abs(i / c.width - centre[size_t(2 * map + 1)]) <= radius;
    };
    double want = 0;
    bool same = true;
    for (int64_t i = 0; i < n; ++i) want += inside(i) ? s.p[size_t(i)] : 0;
    check(near(mass[map], empty ? -5 : want, 4 * unit), name + " mass");
    for (int64_t i = 0; i < n; ++i) {
      const double wq = empty ? 0 : s.p[size_t(i)] * grad[map] * ((inside(i) ? 1 : 0) - want);
      same = same && near(grad_heatmap.value(map, i / c.width, i % c.width), wq, step * std::fabs(wq) + 4 * unit);
    }
    check(same, name + " gradient of the mass");
  }
  check(gaps_untouched(grad_heatmap), name + " gaps");
}

void test_expectations() {
  const int64_t sizes[][4] = {{2, 3, 1, 1}, {1, 9, 3, 3}, {2, 17, 7, 9}, {1, 4, 16, 17}, {2, 8, 3, 71}};
  const Lie kinds[] = {Lie::rows, Lie::pixels, Lie::shared_by_sample, Lie::shared_by_all};
  const int64_t channels[] = {1, 2, 3, 16, 19, 41};
  int64_t turn = 0;  // what is not looped over takes turns
  for (Dtype dtype : kDtypes) {
    for (Layout layout : kLayouts) {
      for (const auto& s : sizes) {
        const Case c = {dtype, layout, s[0], s[1], s[2], s[3]};
        for (int i = 0; i < 2; ++i, turn += 7) {
          const Counted counted = kCounted[turn / 2 % kCountings];
          run_expectation(c, turn % 3 ? 1 : -1.5, counted, kinds[turn % 4], channels[turn % 6]);
          run_expectation(c, 1, kCounted[turn % kCountings], Lie::like_maps, 1);
          run_coordinates_and_window(c, counted, turn / 3 % 5);
        }
      }
    }
  }
  // Rows under a mask in pieces as narrow as they get.
  run_expectation({Dtype::float64, Layout::contiguous, 1, 1, 160, 160}, 1, Counted::mask, Lie::like_maps, 1);
  for (Layout layout : {Layout::contiguous, Layout::channels_last}) {  // cut into parts
    for (Lie kind : kinds) run_expectation({Dtype::float32, layout, 1, 2, 260, 300}, 1, Counted::both, kind, 3);
    run_coordinates_and_window({Dtype::float32, layout, 1, 2, 260, 300}, Counted::all, 70);
  }
}

}  // namespace

// As many threads as `threads` says, whatever the grain: tests want the seams.
void kpfused::cpu::parallel_ranges(int64_t count, int64_t, RangeBody body, void* context) {
  std::vector<std::thread> pool;
  for (int64_t t = 1; t < threads; ++t) {
    const int64_t begin = count * t / threads, end = count * (t + 1) / threads;
    if (begin < end) pool.emplace_back(body, begin, end, context);
  }
  if (count / threads > 0) body(0, count / threads, context);
  for (std::thread& thread : pool) thread.join();
}

int main() {
  test_shapes();
  test_odd_values();
  test_split_maps();
  test_misalignment();
  test_same_bits();
  test_nan_payloads();
  test_cuts();
  test_moments_and_masks();
  test_sizes_beside_cuts();
  test_expectations();
  std::printf("%s: %d passed, %d failed\n", cpu::capability(), passed, failed);
  return failed != 0;
}
