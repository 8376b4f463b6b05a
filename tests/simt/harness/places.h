// SPDX-License-Identifier: MIT
// Where threads lie over maps that no test could fill.
#pragma once

#include "check.h"

namespace harness {

Outcome run_places();

}  // namespace harness
