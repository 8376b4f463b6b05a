// SPDX-License-Identifier: MIT
// The kernels of means and moments with AVX2.
#if defined(__x86_64__)
#include "isa_avx2.h"

#include "kernels.h"

#include "isa_end.h"
#endif
