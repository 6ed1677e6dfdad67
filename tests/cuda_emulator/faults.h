// Kernels with faults on purpose, and what they should have been: for the emulator's own tests.
#pragma once

#include "mvp/tensor_view.h"

namespace mvp {
// Runs the named kernel on `out` (float32 or int32).
void run_faulty_kernel(const std::string& name, const TensorView& in, const TensorView& out);
}  // namespace mvp
