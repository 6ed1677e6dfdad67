// What the kernels of pruned_linear share: the problem, the gathering copies, and what becomes of the sums.
#pragma once

#include <algorithm>

#include "common.cuh"
#include "gemm_tile.cuh"

namespace mvp::cuda {

namespace linear {

// n / divisor for 0 <= n < 2^31, without a division.
struct Divisor {
  uint32_t factor = uint32_t{1} << 31, shift = 31;
  Divisor() = default;
  explicit Divisor(uint32_t d) {
    while ((uint64_t{1} << (shift - 31)) < d) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + d - 1) / d);
  }
  __device__ __forceinline__ int quotient(int n) const {
    return static_cast<int>(uint64_t{static_cast<uint32_t>(n)} * factor >> shift);
  }
};

// Which of `units` blocks of positions are kept.
struct Kept {
  const void* index;   // null: all
  bool wide, outputs;  // outputs: for the error message
  int block, units;
  Divisor by_block;

  // The block that kept position i lies in; to be given to position(). Nothing is done with it here, so that
  // nobody waits for it before it is used.
  __device__ __forceinline__ int64_t unit(int i) const {
    if (index == nullptr) return 0;
    if (!wide) return static_cast<const int32_t*>(index)[by_block.quotient(i)];
    return static_cast<const int64_t*>(index)[by_block.quotient(i)];
  }
  // Without meaning where it is not `valid`.
  __device__ __forceinline__ int position(int i, int64_t unit, bool valid = true) const {
    if (index == nullptr) return i;
    require(!valid || (unit >= 0 && unit < units), outputs ? "pruned_linear: out_index: a value out of range"
                                                           : "pruned_linear: in_index: a value out of range");
    return static_cast<int>(unit) * block + (i - by_block.quotient(i) * block);
  }
};

struct Problem {
  const void *x, *weight, *bias, *residual;
  void *out, *before;  // before: like out, what GELU is applied to; or null
  float* partial;      // [splits, rows, outputs], or null
  Kept out_index, in_index;
  int64_t rows, x_stride, weight_stride;
  int64_t weight_rows, weight_columns;  // as they lie in memory: rows are inputs where W is input-major
  int outputs, inputs;                  // kept
  int out_stride;                       // the width of out
  int stages_a_split, splits, copying_blocks, tiles_m;
  bool gelu, scatter;    // scatter: output j goes to column out_j of out, not j
  bool quads;            // four outputs of a thread lie side by side in out, 8-byte aligned
  bool aligned_columns;  // rows of out and residual are whole 16-byte vectors
};

}  // namespace linear

// By wgmma, for compute capability 9.0: in a file of its own, which is built for that alone.
void multiply_on_hopper(const linear::Problem& problem, bool input_major, DType dtype, const Queue& queue);

namespace {

using linear::Kept;
using linear::Problem;
constexpr char kOp[] = "pruned_linear";

template <typename T>
struct alignas(8) Quad {
  T at[4];
};

// ---------------------------------------------------------------- from memory to shared memory
// Rows of x: [kM][kK].
template <typename T, typename Tiling>
class XLoader {
 public:
  __device__ XLoader(const Problem& problem, int64_t first_row, int first_input)
      : problem_(problem), k_(first_input + static_cast<int>(threadIdx.x) % kVectors * kHalves) {
    rows_left_ = static_cast<int>(min(problem.rows - first_row, int64_t{Tiling::kM}));
    x_ = static_cast<const T*>(problem.x) + (first_row + row(0)) * problem.x_stride;
  }

  // Starts this thread's copies of the next stage.
  template <typename Tile>
  __device__ __forceinline__ void load(Tile& tile) {
    const bool valid = k_ < problem_.inputs;
#pragma unroll
    for (int p = 0; p < Tiling::kM / kRows; ++p)
      cp_async16(tile.at(row(p), threadIdx.x % kVectors), x_ + p * kRows * problem_.x_stride + k_,
                 valid && row(p) < rows_left_);
    k_ += Tiling::kK;
  }

 private:
  static constexpr int kVectors = Tiling::kK / kHalves, kRows = Tiling::kThreads / kVectors;
  __device__ static int row(int pass) { return static_cast<int>(threadIdx.x) / kVectors + pass * kRows; }

  const Problem& problem_;
  const T* x_;
  int k_, rows_left_;
};

template <typename T, typename Tiling, bool kInputMajor>
class WeightLoader;

// Row-major: [kN][kK]. A thread's vectors of a stage begin at one input, in several outputs.
template <typename T, typename Tiling>
class WeightLoader<T, Tiling, false> {
 public:
  struct Shared {};
  __device__ static void prepare(const Problem&, int, Shared&) {}

  // columns: of this block's outputs in the weight, −1 past the last.
  __device__ WeightLoader(const Problem& problem, int first_output, int first_input, const int* columns,
                          Shared&)
      : problem_(problem), k_(first_input + static_cast<int>(threadIdx.x) % kVectors * kHalves) {
    outputs_left_ = problem.outputs - first_output;
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const int column = columns[row(p)];
      weight_[p] = static_cast<const T*>(problem.weight) + max(column, 0) * problem.weight_stride;
    }
    fetch_unit();
  }

  template <typename Tile>
  __device__ __forceinline__ void load(Tile& tile) {
    const bool valid = k_ < problem_.inputs;
    const int input = problem_.in_index.position(k_, unit_, valid);
#pragma unroll
    for (int p = 0; p < kPasses; ++p)
      cp_async16(tile.at(row(p), threadIdx.x % kVectors), weight_[p] + input,
                 valid && row(p) < outputs_left_);
    k_ += Tiling::kK;
    fetch_unit();
  }

 private:
  static constexpr int kVectors = Tiling::kK / kHalves, kRows = Tiling::kThreads / kVectors;
  static constexpr int kPasses = Tiling::kN / kRows;
  __device__ static int row(int pass) { return static_cast<int>(threadIdx.x) / kVectors + pass * kRows; }
  // The next stage's: on its way while this one's products are made.
  __device__ __forceinline__ void fetch_unit() {
    unit_ = k_ < problem_.inputs ? problem_.in_index.unit(k_) : 0;
  }

  const Problem& problem_;
  const T* weight_[kPasses];  // the outputs' rows
  int k_, outputs_left_;
  int64_t unit_;
};

// Input-major: [kK][kN]. A thread's vectors of a stage lie in several inputs, which others of the block need,
// too: one thread finds out where an input is, and shares it, a barrier before it is needed.
template <typename T, typename Tiling>
class WeightLoader<T, Tiling, true> {
 public:
  struct Shared {
    int inputs[Tiling::kStages][Tiling::kK];  // of a stage, in the weight; −1 past the last
  };
  // For the stages that are loaded before the first barrier, and the one after them.
  __device__ static void prepare(const Problem& problem, int first_input, Shared& shared) {
    for (int i = static_cast<int>(threadIdx.x); i < Tiling::kStages * Tiling::kK; i += Tiling::kThreads) {
      const int k = first_input + i;
      shared.inputs[i / Tiling::kK][i % Tiling::kK] = place(problem, k, fetch_unit(problem, k));
    }
  }

  __device__ WeightLoader(const Problem& problem, int, int first_input, const int* columns, Shared& shared)
      : problem_(problem), shared_(shared) {
    const int column = columns[threadIdx.x % kVectors * kHalves];  // the vector's others follow it
    valid_ = column >= 0;
    weight_ = static_cast<const T*>(problem.weight) + max(column, 0);
    next_ = first_input + Tiling::kStages * Tiling::kK + static_cast<int>(threadIdx.x);
    unit_ = fetch_unit(problem, next_);
  }

  template <typename Tile>
  __device__ __forceinline__ void load(Tile& tile) {
    const int slot = loaded_ % Tiling::kStages;
#pragma unroll
    for (int p = 0; p < Tiling::kK / kRows; ++p) {
      const int row = static_cast<int>(threadIdx.x) / kVectors + p * kRows, input = shared_.inputs[slot][row];
      cp_async16(tile.at(row, threadIdx.x % kVectors), weight_ + input * problem_.weight_stride,
                 valid_ && input >= 0);
    }
    if (++loaded_ < Tiling::kStages) return;
    if (threadIdx.x < Tiling::kK) {
      shared_.inputs[loaded_ % Tiling::kStages][threadIdx.x] = place(problem_, next_, unit_);
      next_ += Tiling::kK;
      unit_ = fetch_unit(problem_, next_);
    }
  }

 private:
  static constexpr int kVectors = Tiling::kN / kHalves, kRows = Tiling::kThreads / kVectors;
  static_assert(Tiling::kK <= Tiling::kThreads && (Tiling::kStages & (Tiling::kStages - 1)) == 0);
  __device__ static int64_t fetch_unit(const Problem& problem, int k) {
    return k < problem.inputs ? problem.in_index.unit(k) : 0;
  }
  __device__ static int place(const Problem& problem, int k, int64_t unit) {
    return k < problem.inputs ? problem.in_index.position(k, unit) : -1;
  }

  const Problem& problem_;
  Shared& shared_;
  const T* weight_;
  bool valid_;
  int next_;  // this thread's share of the stage after the next
  int64_t unit_;
  unsigned loaded_ = 0;
};

// ---------------------------------------------------------------- from sums to out
// Four neighbouring outputs: where they go, and their bias.
struct Target {
  int first, count;  // outputs [first, first + count) of four
  bool whole;        // in one piece of 8 bytes
  int column[4];
  float bias[4];
};

template <typename T, typename Columns>
__device__ __forceinline__ Target make_target(const Problem& problem, int first, Columns&& column_of) {
  Target target;
  target.first = first;
  target.count = min(problem.outputs - first, 4);
  target.whole = problem.quads && target.count == 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = i < target.count ? column_of(first + i) : 0;
    target.bias[i] = problem.bias == nullptr ? 0.0f : to_float(static_cast<const T*>(problem.bias)[column]);
    target.column[i] = problem.scatter ? column : first + i;
  }
  return target;
}

__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

// What is to be added to a target; zeros without a residual.
template <typename T>
__device__ __forceinline__ Quad<T> load_residual(const Problem& problem, const Target& target, int64_t row) {
  Quad<T> quad{};
  if (problem.residual == nullptr || row >= problem.rows) return quad;
  const T* residual = static_cast<const T*>(problem.residual) + row * problem.out_stride;
  if (target.whole) return *reinterpret_cast<const Quad<T>*>(residual + target.column[0]);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < target.count) quad.at[i] = residual[target.column[i]];
  return quad;
}

template <typename T>
__device__ __forceinline__ void store_quad(const Problem& problem, void* to, const Target& target,
                                           int64_t row, const Quad<T>& quad) {
  T* out = static_cast<T*>(to) + row * problem.out_stride;
  if (target.whole) {
    *reinterpret_cast<Quad<T>*>(out + target.column[0]) = quad;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < target.count) out[target.column[i]] = quad.at[i];
}

template <typename T>
__device__ __forceinline__ void store_target(const Problem& problem, const Target& target, int64_t row,
                                             float4 sums, const Quad<T>& residual) {
  if (row >= problem.rows) return;
  const float sum[4] = {sums.x, sums.y, sums.z, sums.w};
  Quad<T> quad, before;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float y = sum[i] + target.bias[i];
    before.at[i] = from_float<T>(y);
    if (problem.gelu) y = gelu(y);
    if (problem.residual != nullptr) y += to_float(residual.at[i]);
    quad.at[i] = from_float<T>(y);
  }
  store_quad(problem, problem.out, target, row, quad);
  if (problem.before != nullptr) store_quad(problem, problem.before, target, row, before);
}

__device__ __forceinline__ float* partial_at(const Problem& problem, int split, int64_t row, int output) {
  return problem.partial + (split * problem.rows + row) * problem.outputs + output;
}

// The columns of the residual that no output goes to. A warp takes four rows at a time.
template <typename T>
__device__ void copy_removed(const Problem& problem, uint32_t* is_kept) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int columns = problem.out_stride;
  for (int i = thread; i < ceil_div(columns, 32); i += threads) is_kept[i] = 0;
  __syncthreads();
  for (int i = thread; i < problem.outputs; i += threads) {
    const int column = problem.out_index.position(i, problem.out_index.unit(i));
    const uint32_t bit = uint32_t{1} << column % 32;
    const uint32_t before = atomicOr(is_kept + column / 32, bit);
    require((before & bit) == 0, "pruned_linear: out_index: a value that comes twice, and a residual");
  }
  __syncthreads();
  constexpr int kRows = 4;
  const int lane = thread % kWarp;
  const T* residual = static_cast<const T*>(problem.residual);
  T* out = static_cast<T*>(problem.out);
  const int64_t step = int64_t{problem.copying_blocks} * (threads / kWarp) * kRows;
  for (int64_t row = (int64_t{blockIdx.x} * (threads / kWarp) + thread / kWarp) * kRows; row < problem.rows;
       row += step) {
    const int rows = static_cast<int>(min(problem.rows - row, int64_t{kRows}));
    const int64_t offset = row * columns;
    if (!problem.aligned_columns) {
      for (int c = lane; c < columns; c += kWarp)
        if ((is_kept[c / 32] >> c % 32 & 1) == 0)
          for (int r = 0; r < rows; ++r)
            out[offset + int64_t{r} * columns + c] = residual[offset + int64_t{r} * columns + c];
      continue;
    }
    for (int c = lane * kHalves; c < columns; c += kWarp * kHalves) {
      const uint32_t kept = is_kept[c / 32] >> c % 32 & 0xFF;
      if (kept == 0xFF) continue;
      Vec16<T> vector[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (r < rows) vector[r] = load16_once(residual + offset + int64_t{r} * columns + c);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) continue;
        T* to = out + offset + int64_t{r} * columns + c;
        if (kept == 0) {
          store16(to, vector[r]);
        } else {
#pragma unroll
          for (int i = 0; i < kHalves; ++i)
            if ((kept >> i & 1) == 0) to[i] = vector[r].at[i];
        }
      }
    }
  }
}

// ---------------------------------------------------------------- kernels
// Rows of tiles whose blocks run side by side, so that a tile of W is read by all of them at about the same
// time, and their x stays in L2 while they walk along the outputs.
constexpr int kGroup = 8;

// A block's tile of y, and its part of the inputs.
struct Place {
  int64_t first_row;
  int first_output, split, first_stage, stages;
};

// Grid: copying blocks, then tiles, group by group; y: parts of the inputs.
template <typename Tiling>
__device__ __forceinline__ Place find_place(const Problem& problem) {
  const int tile = static_cast<int>(blockIdx.x) - problem.copying_blocks;
  const int tiles_n = ceil_div(problem.outputs, Tiling::kN), group = tile / (kGroup * tiles_n);
  const int in_group = tile - group * (kGroup * tiles_n),
            height = min(problem.tiles_m - group * kGroup, kGroup);
  const int tile_n = in_group / height, tile_m = group * kGroup + in_group - tile_n * height;
  const int split = static_cast<int>(blockIdx.y), first_stage = split * problem.stages_a_split;
  return {int64_t{tile_m} * Tiling::kM, tile_n * Tiling::kN, split, first_stage,
          min(ceil_div(problem.inputs, Tiling::kK) - first_stage, problem.stages_a_split)};
}

// Where the tile's outputs are in the weight; −1 past the last. All threads of the block; there after a
// barrier.
template <typename Tiling>
__device__ __forceinline__ void find_columns(const Problem& problem, int first_output,
                                             int (&columns)[Tiling::kN]) {
  for (int i = static_cast<int>(threadIdx.x); i < Tiling::kN; i += static_cast<int>(blockDim.x)) {
    const int output = first_output + i;
    columns[i] =
        output < problem.outputs ? problem.out_index.position(output, problem.out_index.unit(output)) : -1;
  }
}

// The tile's sums to `partial`, or finished to `out`.
template <typename T, typename Tiling, typename Product>
__device__ __forceinline__ void store_tile(const Problem& problem, const Place& place, const int* columns,
                                           Slab<Tiling>& slab, const Product& product) {
  const int64_t first_row = place.first_row;
  const int output = place.first_output + Slab<Tiling>::column_of_thread();
  if (problem.partial != nullptr) {
    const int count = min(problem.outputs - output, 4);
    const bool whole = problem.outputs % 4 == 0;
    const auto nothing = [](int) { return 0; };
    slab.each_row(product, nothing, [&](int row, float4 sum, int) {
      if (first_row + row >= problem.rows || count <= 0) return;
      float* to = partial_at(problem, place.split, first_row + row, output);
      if (whole) {
        *reinterpret_cast<float4*>(to) = sum;
      } else {
        to[0] = sum.x;
        if (count > 1) to[1] = sum.y;
        if (count > 2) to[2] = sum.z;
        if (count > 3) to[3] = sum.w;
      }
    });
    return;
  }
  const Target target =
      make_target<T>(problem, output, [&](int j) { return columns[j - place.first_output]; });
  const auto residual = [&](int row) { return load_residual<T>(problem, target, first_row + row); };
  slab.each_row(product, residual, [&](int row, float4 sum, const Quad<T>& add) {
    store_target(problem, target, first_row + row, sum, add);
  });
}

template <typename T, typename Tiling, bool kInputMajor>
struct Shared {
  using Stage = cuda::Stage<Tiling, kInputMajor>;
  union {
    Stage stages[Tiling::kStages];
    Slab<Tiling> slab;
    uint32_t is_kept[sizeof(Stage) * Tiling::kStages / 4];  // columns, in copy_removed
  };
  int columns[Tiling::kN];  // of the block's outputs in the weight
  typename WeightLoader<T, Tiling, kInputMajor>::Shared weight;
};

template <typename T, typename Tiling, bool kInputMajor>
__global__ void __launch_bounds__(Tiling::kThreads, Tiling::kBlocks)
    multiply(const __grid_constant__ Problem problem) {
  auto& shared = *dynamic_shared<Shared<T, Tiling, kInputMajor>>();
  if (blockIdx.x < problem.copying_blocks) {
    if (blockIdx.y == 0) copy_removed<T>(problem, shared.is_kept);
    return;
  }
  const Place place = find_place<Tiling>(problem);
  const int first_input = place.first_stage * Tiling::kK;
  using Weight = WeightLoader<T, Tiling, kInputMajor>;
  find_columns<Tiling>(problem, place.first_output, shared.columns);
  Weight::prepare(problem, first_input, shared.weight);
  __syncthreads();

  WarpProduct<T, Tiling, kInputMajor> product;
  XLoader<T, Tiling> x(problem, place.first_row, first_input);
  Weight weight(problem, place.first_output, first_input, shared.columns, shared.weight);
  multiply_stages(product, shared.stages, place.stages, [&](auto& stage) {
    x.load(stage.x);
    weight.load(stage.weight);
  });
  store_tile<T>(problem, place, shared.columns, shared.slab, product);
}

constexpr int kAddThreads = 128;

// Adds up the blocks' shares of the inputs, in order. A thread a four of outputs.
template <typename T>
__global__ void __launch_bounds__(kAddThreads) add_partial(const __grid_constant__ Problem problem) {
  const int quads = ceil_div(problem.outputs, 4);
  const int64_t at = int64_t{blockIdx.x} * kAddThreads + threadIdx.x, row = at / quads;
  if (row >= problem.rows) return;
  const int output = static_cast<int>(at - row * quads) * 4;
  const Target target = make_target<T>(
      problem, output, [&](int j) { return problem.out_index.position(j, problem.out_index.unit(j)); });
  const Quad<T> residual = load_residual<T>(problem, target, row);
  float4 sum = make_float4(0, 0, 0, 0);
  if (problem.outputs % 4 == 0) {
#pragma unroll 4
    for (int s = 0; s < problem.splits; ++s) {
      const float4 part = *reinterpret_cast<const float4*>(partial_at(problem, s, row, output));
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
  } else {
    for (int s = 0; s < problem.splits; ++s) {
      const float* part = partial_at(problem, s, row, output);
      sum.x += part[0];
      if (target.count > 1) sum.y += part[1];
      if (target.count > 2) sum.z += part[2];
      if (target.count > 3) sum.w += part[3];
    }
  }
  store_target(problem, target, row, sum, residual);
}

// ---------------------------------------------------------------- host
// The grid for a tiling, and what the kernel must know of it.
template <typename Tiling, typename Memory>
Shape plan_grid(Problem& problem, int threads, const Queue& queue) {
  const int64_t outputs = problem.outputs, stages = ceil_div(problem.inputs, Tiling::kK);
  problem.stages_a_split = static_cast<int>(ceil_div(stages, int64_t{problem.splits}));
  if (problem.scatter) {
    MVP_CHECK(problem.out_stride <= static_cast<int64_t>(sizeof(Memory::is_kept)) * 8, kOp,
              "too many columns");
    const int64_t blocks = ceil_div(problem.rows, int64_t{threads / kWarp * 4});
    problem.copying_blocks =
        static_cast<int>(std::min<int64_t>(blocks, int64_t{multiprocessors(queue.device)} * 2));
  }
  const int64_t tiles_m = ceil_div(problem.rows, int64_t{Tiling::kM});
  // A whole group more must still be an int: the kernel computes with them.
  const int64_t tiles = (tiles_m + kGroup) * ceil_div(outputs, int64_t{Tiling::kN});
  MVP_CHECK(problem.copying_blocks + tiles <= 0x7FFFFFFF, kOp, "more tiles than a grid has room for");
  problem.tiles_m = static_cast<int>(tiles_m);
  const int64_t blocks = problem.copying_blocks + tiles_m * ceil_div(outputs, int64_t{Tiling::kN});
  return {dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(problem.splits)),
          dim3(static_cast<unsigned>(threads)), sizeof(Memory)};
}

// What follows the kernel: the sums of blocks that shared a tile's inputs.
template <typename T>
void add_splits(const Problem& problem, DType dtype, const Queue& queue) {
  if (problem.partial == nullptr) return;
  const int64_t blocks =
      ceil_div(problem.rows * ceil_div(int64_t{problem.outputs}, int64_t{4}), int64_t{kAddThreads});
  MVP_CHECK(blocks <= 0x7FFFFFFF, kOp, "more tiles than a grid has room for");
  launch(kOp, dtype, queue, Shape{dim3(static_cast<unsigned>(blocks)), dim3(kAddThreads)}, &add_partial<T>,
         problem);
}

template <typename T, typename Tiling, bool kInputMajor>
void run(Problem problem, DType dtype, const Queue& queue) {
  const Shape shape = plan_grid<Tiling, Shared<T, Tiling, kInputMajor>>(problem, Tiling::kThreads, queue);
  launch(kOp, dtype, queue, shape, &multiply<T, Tiling, kInputMajor>, problem);
  add_splits<T>(problem, dtype, queue);
}

}  // namespace
}  // namespace mvp::cuda
