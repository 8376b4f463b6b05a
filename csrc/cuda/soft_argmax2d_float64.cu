// SPDX-License-Identifier: MIT
#include "launch.h"

namespace kpfused::cuda {

template int forward<double>(const ForwardParams&, Stream);
template int backward<double>(const BackwardParams&, Stream);

}  // namespace kpfused::cuda
