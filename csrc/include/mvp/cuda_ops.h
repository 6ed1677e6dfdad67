// Declarations of the CUDA kernels, the twins of those in cpu_ops.inc. They enqueue on `stream` of `device`
// and return; nothing is allocated, synchronised or copied to the host: workspaces are arguments.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "mvp/tensor_view.h"

namespace mvp {

// residual, y and out dense in one layout (contiguous or channels_last); scale and shift float32, or float64
// beside float64.
void residual_add_cuda(const TensorView& residual, const TensorView& y, const TensorView& index,
                       const TensorView& scale, const TensorView& shift, bool relu, int64_t dim,
                       const TensorView& out, int device, uint64_t stream);

}  // namespace mvp
