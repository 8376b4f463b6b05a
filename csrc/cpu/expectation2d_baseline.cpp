// SPDX-License-Identifier: MIT
// The kernels of expectations with what every processor has.
#include "isa_baseline.h"

#include "expectation_kernels.h"
