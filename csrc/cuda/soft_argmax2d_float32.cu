// SPDX-License-Identifier: MIT
#include "launch.h"

namespace kpfused::cuda {

template int forward<float>(const ForwardParams&, Stream);
template int backward<float>(const BackwardParams&, Stream);

}  // namespace kpfused::cuda
