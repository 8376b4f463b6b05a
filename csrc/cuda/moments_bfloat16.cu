// SPDX-License-Identifier: MIT
#include "bfloat16.h"
#include "launch_moments.h"

namespace kpfused::cuda {

template int moments<Bfloat16>(const ForwardParams&, Stream);
template int moments<Bfloat16>(const BackwardParams&, Stream);

}  // namespace kpfused::cuda
