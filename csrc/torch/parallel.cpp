// SPDX-License-Identifier: MIT
#include "../cpu/parallel.h"

#include "tensors.h"

namespace kpfused::cpu {

int64_t threads() {
  uint32_t count = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  return int64_t(count);
}

void parallel_ranges(int64_t count, int64_t grain, RangeBody body, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

}  // namespace kpfused::cpu
