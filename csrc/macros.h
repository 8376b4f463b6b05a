// SPDX-License-Identifier: MIT
#pragma once

// Functions that both host and device code calls. On the host they are inlined by force: the CPU kernels are compiled
// for several instruction sets, and a shared out-of-line copy would be of one of them.
#if defined(__CUDACC__)
#define KPFUSED_HD __host__ __device__ __forceinline__
#else
#define KPFUSED_HD inline __attribute__((always_inline))
#endif
