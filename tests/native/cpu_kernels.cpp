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
#include <vector>

#include "../../csrc/cpu/parallel.h"
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
    cpu::soft_argmax2d_forward({h.dtype, h.bytes.get(), v, beta, units, coordinates.bytes.get(), stats.bytes.get(),
                                forward.empty() ? nullptr : forward.data()});
    cpu::soft_argmax2d_backward({h.dtype, h.bytes.get(), v, beta, units, stats.bytes.get(), upstream.bytes.get(), 2, 1,
                                 grad.bytes.get(), v, want_beta ? grad_beta.bytes.get() : nullptr,
                                 backward.empty() ? nullptr : backward.data()});
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
// counts below, at and above a vector.
void test_shapes() {
  const int64_t sizes[][4] = {{2, 3, 1, 1},    {1, 5, 2, 2},   {3, 4, 3, 3},   {2, 7, 5, 5},   {2, 8, 7, 9},
                              {1, 17, 10, 12}, {2, 2, 6, 16},  {1, 3, 9, 17},  {1, 2, 31, 32}, {1, 9, 16, 48},
                              {1, 2, 12, 33},  {1, 1, 40, 65}, {1, 3, 1, 71},  {1, 3, 70, 1},  {2, 1, 90, 3},
                              {1, 16, 8, 8},   {1, 33, 4, 5},  {1, 130, 3, 2}, {1, 2, 70, 72}};
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
  const int64_t sizes[][4] = {{1, 1, 300, 301}, {1, 2, 1, 70001}, {1, 1, 70001, 1}, {1, 1, 40000, 3}, {1, 9, 70, 40}};
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
      cpu::soft_argmax2d_forward({dtype, p, v, beta, units, coordinates.bytes.get(), stats.bytes.get(), nullptr});
      cpu::soft_argmax2d_backward({dtype, p, v, beta, units, stats.bytes.get(), expected.upstream.bytes.get(), 2, 1, q,
                                   v, nullptr, nullptr});
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
        cpu::soft_argmax2d_forward({c.dtype, h.at(o * c.inner, 0, 0), view, per_channel, units, coordinates.bytes.get(),
                                    stats.bytes.get(), workspace.empty() ? nullptr : workspace.data()});
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
      cpu::soft_argmax2d_forward({Dtype::float32, h.data(), v, beta, units, coordinates, stats, nullptr});
      cpu::soft_argmax2d_backward({Dtype::float32, h.data(), v, beta, units, stats, upstream, 2, 1, out.data(), v,
                                   nullptr, nullptr});
      bool all = std::isnan(coordinates[0]) && std::isnan(coordinates[1]);
      for (float g : out) all = all && std::isnan(g);
      check(all, "NaN payload");
    }
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
  std::printf("%s: %d passed, %d failed\n", cpu::capability(), passed, failed);
  return failed != 0;
}
