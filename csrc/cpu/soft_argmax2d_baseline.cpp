// SPDX-License-Identifier: MIT
// The kernels of means and moments with what every processor has.
#include "isa_baseline.h"

#include "kernels.h"
