// SPDX-License-Identifier: MIT
#include "float16.h"
#include "launch_moments.h"

namespace kpfused::cuda {

template int moments<Float16>(const ForwardParams&, Stream);
template int moments<Float16>(const BackwardParams&, Stream);

}  // namespace kpfused::cuda
