// SPDX-License-Identifier: MIT
// AVX2, FMA and F16C. Everything with a body that follows the pragma is compiled for them, so what other files compile as
// well (the standard headers, params.h) is included before it. isa_end.h ends what this begins.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>

#include "../params.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define KPFUSED_ISA avx2
#define KPFUSED_SSE2 0
#define KPFUSED_AVX512 0
// Wider vectors than the registers are slow but right: tests compile the width of AVX-512 that way.
#if defined(KPFUSED_CPU_VECTOR_BYTES)
#define KPFUSED_AVX2 0
#define KPFUSED_VECTOR_BYTES KPFUSED_CPU_VECTOR_BYTES
#else
#define KPFUSED_AVX2 1
#define KPFUSED_VECTOR_BYTES 32
#endif
