// SPDX-License-Identifier: MIT
#include "float16.h"
#include "launch.h"

namespace kpfused::cuda {

template int forward<Float16>(const ForwardParams&, Stream);
template int backward<Float16>(const BackwardParams&, Stream);

}  // namespace kpfused::cuda
