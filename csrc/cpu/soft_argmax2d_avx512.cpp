// SPDX-License-Identifier: MIT
// The kernels of means and moments with AVX-512.
#if defined(__x86_64__)
#include "isa_avx512.h"

#include "kernels.h"

#include "isa_end.h"
#endif
