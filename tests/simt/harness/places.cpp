// SPDX-License-Identifier: MIT
// Axes of more pixels than 32 bits count, which no test could fill: where the threads of such maps lie, and what counts
// there, as the kernels' own functions say.
#include "places.h"

#include "cuda/launch_moments.h"

namespace harness {

namespace {

using kpfused::Plan;

constexpr int64_t kLong = (int64_t{1} << 31) + (1 << 20);

// The part of one thread, in either layout.
struct Part {
  int64_t top, left, rows, columns;
  int64_t counted_rows, counted_columns;  // where only the map's first pixel counts
};

Part part_of(const Plan& plan, const MapView& view) {
  const int64_t size[] = {1, 1};
  kpfused::PixelView pixels{};
  pixels.sizes = size, pixels.divisor = pixels.modulus = 1;
  if (view.stride_x == 1) {
    const kpfused::cuda::RowsPart part = kpfused::cuda::rows_part(plan, view);
    const auto valid = kpfused::cuda::clipped(part, kpfused::cuda::counted_pixels(pixels, view, 0));
    return {part.top, part.left, part.rows, part.columns, valid.rows, valid.columns};
  }
  const kpfused::cuda::ChannelsPart part = kpfused::cuda::channels_part(plan, view);
  const auto column = kpfused::cuda::counted_column<1>(pixels, view, part, 0, part.left);
  return {part.top, part.left, part.rows, part.columns, column.most, part.left == 0};
}

void check_parts(const MapView& view, Outcome& out) {
  const bool channels = view.stride_x != 1;
  const Plan plan =
      kpfused::choose_plan({Dtype::bfloat16, view.height, view.width, channels ? view.inner : 0, true, true});
  threadIdx = {0, 0, 0};
  int64_t pixels = 0;
  for (int64_t block = 0; block < plan.parts(); ++block) {
    blockIdx = {static_cast<unsigned>(block), 0, 0};
    const Part part = part_of(plan, view);
    pixels += part.rows * part.columns;
    const bool first = block == 0;
    if (part.top < 0 || part.rows < 1 || part.top + part.rows > view.height || part.left < 0 || part.columns < 1 ||
        part.left + part.columns > view.width)
      out.fail("part %lld of %lld x %lld lies outside it", static_cast<long long>(block),
               static_cast<long long>(view.height), static_cast<long long>(view.width));
    if ((part.counted_rows > 0 && part.counted_columns > 0) != first)
      out.fail("%lld x %lld pixels of part %lld of %lld x %lld count", static_cast<long long>(part.counted_rows),
               static_cast<long long>(part.counted_columns), static_cast<long long>(block),
               static_cast<long long>(view.height), static_cast<long long>(view.width));
  }
  if (pixels != view.height * view.width)
    out.fail("%lld pixels of %lld x %lld in parts", static_cast<long long>(pixels), static_cast<long long>(view.height),
             static_cast<long long>(view.width));
}

}  // namespace

Outcome run_places() {
  Outcome out;
  std::snprintf(simt::context, sizeof simt::context, "places");
  check_parts({1, 1, kLong, 1, kLong, kLong, 1, 1}, out);
  check_parts({1, 1, 1, kLong, kLong, kLong, kLong, 1}, out);
  check_parts({1, 2, kLong, 2, 4 * kLong, 1, 4, 2}, out);
  check_parts({1, 2, 1, kLong, 2 * kLong, 1, 2 * kLong, 2}, out);
  check_parts({1, 2, 2, kLong, 4 * kLong, 1, 2 * kLong, 2}, out);
  return out;
}

}  // namespace harness
