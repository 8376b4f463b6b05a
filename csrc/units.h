// SPDX-License-Identifier: MIT
// Coordinate presets as affine maps of pixels counted from the centre of the map.
#pragma once

#include "params.h"

namespace kpfused {

// In the order of kpfused.reference.COORDINATES; the op's schema carries the index.
enum class Coordinates : int { pixel, corners, centers, unit, unit_centered };
constexpr int kCoordinates = 5;

struct AxisUnits {
  double scale, offset;
};

constexpr AxisUnits axis_units(Coordinates preset, int64_t size) {
  const double n = static_cast<double>(size);
  switch (preset) {
    case Coordinates::pixel:  // i
      return {1, (n - 1) / 2};
    case Coordinates::corners:  // 2 i / (n - 1) - 1, and 0 on an axis of one pixel
      return {size > 1 ? 2 / (n - 1) : 0, 0};
    case Coordinates::centers:  // (2 i + 1) / n - 1
      return {2 / n, 0};
    case Coordinates::unit:  // i / n
      return {1 / n, (n - 1) / (2 * n)};
    case Coordinates::unit_centered:  // i / n - 1 / 2
      return {1 / n, -1 / (2 * n)};
  }
  return {0, 0};
}

constexpr Units units_of(Coordinates preset, int64_t height, int64_t width) {
  const AxisUnits x = axis_units(preset, width), y = axis_units(preset, height);
  return {x.scale, x.offset, y.scale, y.offset};
}

}  // namespace kpfused
