// SPDX-License-Identifier: MIT
#include "launch_moments.h"

namespace kpfused::cuda {

template int moments<float>(const ForwardParams&, Stream);
template int moments<float>(const BackwardParams&, Stream);

}  // namespace kpfused::cuda
