// The kernels: one declaration per op and device.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "mvp/tensor_view.h"

namespace mvp {

// Every CPU kernel exists once per instruction set, in a namespace of its name (see CMakeLists.txt).
namespace baseline {
#include "mvp/cpu_ops.inc"
}
namespace avx2 {
#include "mvp/cpu_ops.inc"
}
namespace avx512 {
#include "mvp/cpu_ops.inc"
}

}  // namespace mvp
