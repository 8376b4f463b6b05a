// SPDX-License-Identifier: MIT
// AVX-512 (F, BW, DQ, VL). See isa_avx2.h.
#pragma once

// GCC 12 warns of the operands that its own intrinsics leave undefined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define KPFUSED_ISA avx512
#define KPFUSED_SSE2 0
#define KPFUSED_AVX2 0
#define KPFUSED_AVX512 1
#define KPFUSED_VECTOR_BYTES 64
