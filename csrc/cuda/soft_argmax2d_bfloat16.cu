// SPDX-License-Identifier: MIT
#include "bfloat16.h"
#include "launch.h"

namespace kpfused::cuda {

template int forward<Bfloat16>(const ForwardParams&, Stream);
template int backward<Bfloat16>(const BackwardParams&, Stream);

}  // namespace kpfused::cuda
