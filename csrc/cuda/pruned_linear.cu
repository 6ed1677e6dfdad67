// y[m, j] = act(Σ_k x[m, k] · W[out_j, in_k] + b[out_j])   or   out = residual, with y added at columns out_j
//
// out_j and in_k are the kept rows and columns of the FULL weight, which is read where it lies: blocks of
// them are gathered by the 16-byte asynchronous copies that fill shared memory. float16 and bfloat16, on
// tensor cores.
//
//   row-major W:    a tile is [outputs][inputs]; a row of it is a kept row (any block of rows), its vectors
//                   run along the inputs (so kept inputs come in blocks of 8).
//   input-major W:  a tile is [inputs][outputs]; a row of it is a kept input (any block), its vectors run
//                   along the outputs, and ldmatrix transposes. The gradient of x needs this one, since a
//                   transposed row-major weight is input-major.
//
// Numbers of kept outputs are read once a block; those of kept inputs one stage ahead, so nobody waits for
// them.
//
// Tilings:  small   16 ×  32 outputs × 128 inputs  bound by reading W: many blocks, 8 KB of W a stage; the
//                                                  four warps share the inputs
//           medium  64 ×  64 × 64                  when there are too few large tiles for the GPU
//           large  128 × 128 × 32                  warps of 64 × 64: 16 multiply-adds for a byte of shared
//                                                  memory read, so that this is not the limit
//           Hopper 128 × 128 × 64                  by wgmma: pruned_linear_sm90.cu
// Where even so there are fewer tiles than multiprocessors and many inputs, blocks share the inputs: they
// leave sums in `partial` and a second kernel adds these up in order.
//
// Bytes: kept W once for each row of tiles (from L2 after the first), x once for each column of tiles, y
// once. Bias, GELU and residual are applied to the float32 sums, rounded once. Where a gradient will want
// what GELU was applied to, that is written, too, which saves the pass that would read it.
//
// With a residual and an out_index, tiles read and write the kept columns only. The removed columns are
// copied by blocks of their own in the same launch, first of all, so that they use the memory while the
// others compute. So each value of the residual is read once and of out written once, where a clone before
// and an addition after would read and write the kept ones twice. (Where kept and removed columns alternate,
// both write to the same sectors, but these are still in L2.)
#include "mvp/cuda_ops.h"
#include "pruned_linear.cuh"

namespace mvp::cuda {
namespace {

using linear::Divisor;

// Tiling<M, N, K, warps along M, N, K, stages, blocks a multiprocessor>
using Small = Tiling<16, 32, 128, 1, 1, 4, 4, 4>;
using Medium = Tiling<64, 64, 64, 2, 2, 1, 4, 3>;
using Large = Tiling<128, 128, 32, 2, 2, 1, 4, 2>;

template <typename T>
void run(const Problem& problem, bool input_major, int64_t tiling, DType dtype, const Queue& queue) {
  const auto with = [&](auto kind) {
    using Kind = decltype(kind);
    input_major ? run<T, Kind, true>(problem, dtype, queue) : run<T, Kind, false>(problem, dtype, queue);
  };
  if (tiling == 0) return with(Small{});
  if (tiling == 1) return with(Medium{});
  if (tiling == 2) return with(Large{});
#ifdef MVP_WITH_HOPPER
  multiply_on_hopper(problem, input_major, dtype, queue);
#else
  MVP_CHECK(false, kOp, "this build has no kernel for Hopper: MVP_CUDA_ARCHS lacks 90");
#endif
}

bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

Kept make_kept(const TensorView& index, int64_t block, int64_t size, bool outputs) {
  Kept kept{};
  kept.outputs = outputs;
  if (!index.defined()) return kept;
  kept.index = index.data;
  kept.wide = index.dtype == DType::i64;
  kept.block = static_cast<int>(block);
  kept.units = static_cast<int>(size / block);
  kept.by_block = Divisor(static_cast<uint32_t>(block));
  return kept;
}

}  // namespace
}  // namespace mvp::cuda

namespace mvp {

void pruned_linear_cuda(const TensorView& x, const TensorView& weight, const TensorView& bias,
                        const TensorView& out_index, const TensorView& in_index, int64_t out_block,
                        int64_t in_block, const TensorView& residual, bool gelu, const TensorView& out,
                        const TensorView& before, int64_t tiling, const TensorView& partial, int device,
                        uint64_t stream) {
  using namespace cuda;
  const Where where = where_of(device);
  check_pruned_linear(where, x, weight, bias, out_index, in_index, out_block, in_block, residual, out);
  Argument(kOp, where, "x", x).need_rank(2, 2);
  const auto need_dense = [&](const char* name, const TensorView& view) {
    Argument(kOp, where, name, view).need_dense(false);
  };
  need_dense("bias", bias);
  need_dense("out_index", out_index);
  need_dense("in_index", in_index);
  const Argument before_(kOp, where, "before", before), partial_(kOp, where, "partial", partial);
  if (before.defined()) {
    before_.need_dtype(x.dtype);
    before_.need_shape(out);
    before_.need_dense(false);
  }
  const bool input_major = weight.stride[1] != 1;
  const int64_t weight_stride = weight.stride[input_major ? 1 : 0];
  Problem problem{};
  problem.rows = x.shape[0];
  problem.scatter = residual.defined() && out_index.defined();
  const int64_t outputs = out_index.defined() ? out_index.shape[0] * out_block : weight.shape[0];
  const int64_t inputs = x.shape[1];
  if (partial.defined()) {
    partial_.need_rank(3, 3);
    partial_.need_dtype(DType::f32);
    partial_.need_dense(false);
    partial_.need(partial.shape[0] >= 1 && partial.shape[1] == problem.rows && partial.shape[2] == outputs,
                  "[splits, rows, outputs]");
  }
  if (problem.rows == 0 || outputs == 0) return;
  MVP_CHECK(std::max({outputs, inputs, weight.shape[0], weight.shape[1]}) < 0x7FFFFF00, kOp, "too large");
  MVP_CHECK(x.stride[1] == 1 && x.stride[0] % kHalves == 0 && inputs % kHalves == 0 && aligned(x.data, 16),
            kOp, "x: expected rows of 16-byte vectors");
  MVP_CHECK(weight_stride % kHalves == 0 && aligned(weight.data, 16), kOp,
            "weight: expected rows of 16-byte vectors");
  if (input_major)
    MVP_CHECK(
        weight.stride[0] == 1 && outputs % kHalves == 0 && (!out_index.defined() || out_block % kHalves == 0),
        kOp, "weight: expected outputs that are read in 16-byte vectors");
  else
    MVP_CHECK(!in_index.defined() || in_block % kHalves == 0, kOp,
              "weight: expected inputs that are read in 16-byte vectors");
  problem.x = x.data;
  problem.weight = weight.data;
  problem.bias = bias.data;
  problem.residual = residual.data;
  problem.out = out.data;
  problem.before = before.data;
  problem.partial = partial.ptr<float>();
  problem.splits = partial.defined() ? static_cast<int>(partial.shape[0]) : 1;
  problem.out_index = make_kept(out_index, out_block, weight.shape[0], true);
  problem.in_index = make_kept(in_index, in_block, weight.shape[1], false);
  problem.x_stride = x.stride[0];
  problem.weight_stride = weight_stride;
  problem.weight_rows = weight.shape[input_major ? 1 : 0];
  problem.weight_columns = weight.shape[input_major ? 0 : 1];
  problem.outputs = static_cast<int>(outputs);
  problem.inputs = static_cast<int>(inputs);
  problem.out_stride = static_cast<int>(residual.defined() ? weight.shape[0] : outputs);
  problem.gelu = gelu;
  problem.quads = problem.out_stride % 4 == 0 && aligned(out.data, 8) && aligned(residual.data, 8) &&
                  aligned(before.data, 8) && (!problem.scatter || out_block % 4 == 0);
  problem.aligned_columns =
      problem.out_stride % kHalves == 0 && aligned(out.data, 16) && aligned(residual.data, 16);
  const Queue queue(device, stream);
  switch (x.dtype) {
    case DType::f16:
      return cuda::run<F16>(problem, input_major, tiling, x.dtype, queue);
    case DType::bf16:
      return cuda::run<Bf16>(problem, input_major, tiling, x.dtype, queue);
    default:
      MVP_CHECK(false, kOp, "expected float16 or bfloat16");
  }
}

}  // namespace mvp
