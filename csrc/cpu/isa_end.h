// SPDX-License-Identifier: MIT
// Behind all that is compiled for an instruction set.
#if defined(__clang__)
#pragma clang attribute pop
#endif
