// Declarations of the CUDA kernels, the twins of those in cpu_ops.inc. They enqueue on `stream` of `device`
// and return; nothing is allocated, synchronised or copied to the host: workspaces are arguments.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "mvp/tensor_view.h"

namespace mvp {

// a and grad: not empty, of the same strides (any) and equally far from a multiple of 16 bytes; the workspace
// is float32, of as many elements as importance_workspace_cuda says.
int64_t importance_workspace_cuda(const TensorView& a, int64_t dim, int64_t units);
void importance_cuda(const TensorView& a, const TensorView& grad, const std::string& kind, int64_t dim,
                     const TensorView& workspace, const TensorView& scores, int device, uint64_t stream);

// Weighted mean of compact models, as merge_cpu: all tensors dense in one layout (contiguous or
// channels_last), voters in the dtypes of the base. weights: contiguous float32. workspace: int32 [Σ R + K]
// over the different pairs of a voter's (or no) list and a wanted (or no) list, of R rows or columns of which
// K are wanted.
void merge_cuda(const std::vector<TensorView>& base, const std::vector<TensorView>& voters,
                const std::vector<TensorView>& voter_rows, const std::vector<TensorView>& voter_cols,
                const TensorView& weights, const std::vector<TensorView>& rows,
                const std::vector<TensorView>& cols, const TensorView& workspace,
                const std::vector<TensorView>& out, int device, uint64_t stream);

// Weighted vote, optional Gumbel noise, exact top-k with ties, sorted indices: one launch for all layers (of
// up to 240) and all targets. Weights and prior contiguous float32, outputs contiguous.
void meta_vote_cuda(const TensorView& masks, const TensorView& weights, const TensorView& prior,
                    const std::vector<int64_t>& layers, const std::vector<int64_t>& kept,
                    std::optional<double> temperature, int64_t seed, const TensorView& mask,
                    const TensorView& index, const TensorView& votes, int device, uint64_t stream);

// tensors and packed dense in one layout (contiguous or channels_last).
void pack_cuda(const std::vector<TensorView>& tensors, const std::vector<TensorView>& rows,
               const std::vector<TensorView>& cols, const std::vector<TensorView>& packed, int device,
               uint64_t stream);
void unpack_cuda(const std::vector<TensorView>& packed, const std::vector<TensorView>& rows,
                 const std::vector<TensorView>& cols, const std::vector<TensorView>& out, int device,
                 uint64_t stream);

// residual, y and out dense in one layout (contiguous or channels_last); scale and shift float32, or float64
// beside float64.
void residual_add_cuda(const TensorView& residual, const TensorView& y, const TensorView& index,
                       const TensorView& scale, const TensorView& shift, bool relu, int64_t dim,
                       const TensorView& out, int device, uint64_t stream);

// float16 or bfloat16, all readable in 16-byte vectors (see the .cu). x [M, K], rows may be strided; index
// lists dense; out [M, N], or [M, O] with a residual, both dense. tiling: 0 small, 1 medium, 2 large.
// partial: float32 [splits, M, N], the workspace where blocks share the inputs.
void pruned_linear_cuda(const TensorView& x, const TensorView& weight, const TensorView& bias,
                        const TensorView& out_index, const TensorView& in_index, int64_t out_block,
                        int64_t in_block, const TensorView& residual, bool gelu, const TensorView& out,
                        const TensorView& before, int64_t tiling, const TensorView& partial, int device,
                        uint64_t stream);

}  // namespace mvp
