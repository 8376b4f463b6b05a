// SPDX-License-Identifier: MIT
// What every processor of the architecture has: SSE2 on x86-64, NEON on aarch64.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#if defined(__SSE2__)
#include <emmintrin.h>
#define KPFUSED_SSE2 1
#else
#define KPFUSED_SSE2 0
#endif

#define KPFUSED_ISA baseline
#define KPFUSED_AVX2 0
#define KPFUSED_AVX512 0
#define KPFUSED_VECTOR_BYTES 16
