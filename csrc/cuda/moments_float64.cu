// SPDX-License-Identifier: MIT
#include "launch_moments.h"

namespace kpfused::cuda {

template int moments<double>(const ForwardParams&, Stream);
template int moments<double>(const BackwardParams&, Stream);

}  // namespace kpfused::cuda
