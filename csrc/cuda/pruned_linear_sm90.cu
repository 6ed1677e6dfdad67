// pruned_linear with Hopper's matrix instructions (wgmma), which read both operands from shared memory: tiles
// of 128 rows × 128 outputs × 64 inputs.
//
// Two warpgroups multiply, 64 rows each; two more warps fill the stages. Two barriers a stage say that it is
// full, and that it is empty again.
//
//   x   always comes in boxes (one thread names a corner, the copy engine does the rest)
//   W   in boxes of 64 × 64, too, where what is kept lies in blocks of multiples of 64, as heads do, or where
//       all is kept. Else the two warps gather it by 16-byte copies, which arrive at the stage's barrier when
//       they are there; who multiplies shows them to the matrix instructions.
//
// Two blocks share a multiprocessor, so that one multiplies while the other starts or stores: with the few
// hundred inputs of a ViT's layers a tile has six to sixteen stages, and its ends count. Hence three stages,
// 96 KB a block; and two warps that gather, not four, because wgmma with 64 sums a thread needs 90 registers,
// which 2 × 384 threads do not get.
//
// A stage's tiles have rows of 128 bytes in the swizzle that wgmma expects, which is SharedTile's own for
// eight vectors a row, and that of the boxes. Row-major W: a row is an output, along the inputs. Input-major
// W: a row is an input, along 64 outputs, and the next 64 outputs follow 64 rows further down.
//
// Proven in the emulator against its twins of wgmma, barriers and boxes, not yet run on a GPU: the op does
// not choose it by itself (mvp_ext/ops/pruned_linear_plan.py).
#include "mvp/cuda/pipeline.cuh"
#include "mvp/cuda/wgmma.cuh"
#include "pruned_linear.cuh"

namespace mvp::cuda {
namespace {

// 64 rows a warpgroup; for the shared epilogue its warps are eight rows of warps, a fragment high each.
struct Hopper : Tiling<128, 128, 64, 8, 1, 1, 3, 2> {
  static constexpr int kGatherers = 64, kBlockThreads = kThreads + kGatherers;
  __device__ static void sync() { sync_some<1, kThreads>(); }
};
constexpr int kRowBytes = 128, kGroupBytes = 8 * kRowBytes, kVectorsARow = kRowBytes / 16;
constexpr int kBox = 64;  // rows and columns of a box of W

struct HopperProblem {
  Problem linear;
  BoxedMatrix x, weight;
  bool weight_in_boxes;
};

struct HopperStage {
  SharedTile<Hopper::kM, kVectorsARow> x;
  SharedTile<Hopper::kN, kVectorsARow> weight;
};

struct HopperShared {
  union {
    HopperStage stages[Hopper::kStages];
    Slab<Hopper> slab;
    uint32_t is_kept[sizeof(HopperStage) * Hopper::kStages / 4];  // columns, in copy_removed
  };
  int columns[Hopper::kN];  // of the block's outputs in the weight
  Barrier full[Hopper::kStages], empty[Hopper::kStages];
};

// A stage's number in the ring, and the parity of its turn.
struct Turn {
  int slot = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void next() {
    if (++slot == Hopper::kStages) slot = 0, parity ^= 1;
  }
};

// ---------------------------------------------------------------- filling
// A warp's half of W, by 16-byte copies. Lane l knows where rows l, 32 + l, … of the half begin in the
// weight; the place along a row is the thread's own.
template <typename T, bool kInputMajor>
class Gatherer {
 public:
  __device__ Gatherer(const Problem& problem, const int* columns, int first_input)
      : problem_(problem), lane_(threadIdx.x % kWarp) {
    first_row_ = static_cast<int>(threadIdx.x - Hopper::kThreads) / kWarp * kRows;
    if constexpr (kInputMajor) {
      along_ = columns[lane_ % kVectors * kHalves];  // the vector's others follow it
      k_ = first_input + first_row_ + static_cast<int>(lane_);
    } else {
#pragma unroll
      for (int i = 0; i < kRows / kWarp; ++i) row_[i] = begin_of(columns[first_row_ + i * kWarp + lane_]);
      k_ = first_input + static_cast<int>(lane_ % kVectors) * kHalves;
    }
    fetch_unit();
  }

  // Starts the copies of the next stage.
  __device__ __forceinline__ void load(Vec16<uint16_t>* tile) {
    const bool valid = k_ < problem_.inputs;
    const int input = valid ? problem_.in_index.position(k_, unit_) : -1;
    if constexpr (kInputMajor)
      row_[0] = begin_of(input);
    else
      along_ = input;
    // The half begins at a multiple of eight rows, so that within it the swizzle is that of a tile's rows.
    const unsigned vector = lane_ % kVectors;
    Vec16<uint16_t>* half = tile + (vector / kVectorsARow * Hopper::kK + first_row_) * kVectorsARow;
#pragma unroll
    for (unsigned p = 0; p < kRows / kRowsAtOnce; ++p) {
      const unsigned row = p * kRowsAtOnce + lane_ / kVectors;
      const uint64_t begin = __shfl_sync(kAllLanes, row_[p * kRowsAtOnce / kWarp], row % kWarp);
      cp_async16(half + row * kVectorsARow + (vector % kVectorsARow ^ row % kVectorsARow),
                 reinterpret_cast<const void*>(begin + along_ * int64_t{sizeof(T)}),
                 begin != 0 && along_ >= 0);
    }
    k_ += Hopper::kK;
    fetch_unit();
  }

 private:
  static constexpr int kWarps = Hopper::kGatherers / kWarp;
  static constexpr int kVectors = (kInputMajor ? Hopper::kN : Hopper::kK) / kHalves;
  static constexpr int kRows = (kInputMajor ? Hopper::kK : Hopper::kN) / kWarps;
  static constexpr int kRowsAtOnce = kWarp / kVectors;
  static_assert(kRows % kWarp == 0 && (!kInputMajor || kRows == kWarp));

  // An address, or 0 where there is nothing to be read.
  __device__ __forceinline__ uint64_t begin_of(int row) const {
    const T* weight = static_cast<const T*>(problem_.weight);
    return row < 0 ? 0 : reinterpret_cast<uint64_t>(weight + row * problem_.weight_stride);
  }
  // The next stage's: on its way while the copies of this one are.
  __device__ __forceinline__ void fetch_unit() {
    unit_ = k_ < problem_.inputs ? problem_.in_index.unit(k_) : 0;
  }

  const Problem& problem_;
  const unsigned lane_;
  int first_row_, along_ = -1, k_;
  int64_t unit_;
  uint64_t row_[kRows / kWarp];
};

template <typename T, bool kInputMajor>
__device__ __forceinline__ void gather_stages(const HopperProblem& problem, const Place& place,
                                              HopperShared& shared) {
  int k = place.first_stage * Hopper::kK;
  Gatherer<T, kInputMajor> gatherer(problem.linear, shared.columns, k);
  Turn turn;
  for (int s = 0; s < place.stages; ++s) {
    auto& stage = shared.stages[turn.slot];
    Barrier& full = shared.full[turn.slot];
    wait(shared.empty[turn.slot], turn.parity ^ 1);  // at first: what was before phase 0 has ended
    if (threadIdx.x == Hopper::kThreads) {
      arrive_and_expect(full, sizeof stage.x);
      copy_box(&stage.x, problem.x, static_cast<int>(place.first_row), k, full);
    }
    gatherer.load(stage.weight.vectors);
    arrive_after_copies(full);
    k += Hopper::kK;
    turn.next();
  }
  cp_async_commit();
  cp_async_wait<0>();  // nobody leaves before its copies are there
}

template <bool kInputMajor>
__device__ __forceinline__ void copy_boxes(const HopperProblem& problem, const Place& place,
                                           HopperShared& shared) {
  constexpr int kCount = Hopper::kN / kBox;
  const Problem& linear = problem.linear;
  // Of the two boxes' outputs. Those past the last lie outside the weight: zeros.
  int outputs[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = shared.columns[i * kBox];
    outputs[i] =
        column < 0 ? static_cast<int>(kInputMajor ? linear.weight_columns : linear.weight_rows) : column;
  }
  int k = place.first_stage * Hopper::kK;
  const auto unit_at = [&](int i) { return i < linear.inputs ? linear.in_index.unit(i) : 0; };
  int64_t unit = unit_at(k);
  Turn turn;
  for (int s = 0; s < place.stages; ++s) {
    auto& stage = shared.stages[turn.slot];
    Barrier& full = shared.full[turn.slot];
    const int input = linear.in_index.position(k, unit);
    unit = unit_at(k + Hopper::kK);  // on its way while this thread waits
    wait(shared.empty[turn.slot], turn.parity ^ 1);
    arrive_and_expect(full, sizeof stage);
    copy_box(&stage.x, problem.x, static_cast<int>(place.first_row), k, full);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      copy_box(stage.weight.vectors + i * kBox * kVectorsARow, problem.weight,
               kInputMajor ? input : outputs[i], kInputMajor ? outputs[i] : input, full);
    k += Hopper::kK;
    turn.next();
  }
}

// ---------------------------------------------------------------- multiplying
template <typename T, bool kInputMajor>
struct WarpgroupProduct {
  float sum[64] = {};
  unsigned lane, first_m, first_n = 0;  // of the warp, in the block's tile

  __device__ WarpgroupProduct() : lane(threadIdx.x % kWarp), first_m(threadIdx.x / kWarp * 16) {}

  __device__ __forceinline__ float2 pair(int, int j, int half) const {
    return make_float2(sum[4 * j + 2 * half], sum[4 * j + 2 * half + 1]);
  }

  __device__ __forceinline__ void multiply(const HopperStage& stage) {
    const int warpgroup = static_cast<int>(threadIdx.x) / (4 * kWarp);
    const auto* x = reinterpret_cast<const char*>(&stage.x) + warpgroup * 64 * kRowBytes;
    const auto* weight = reinterpret_cast<const char*>(&stage.weight);
    wgmma_hold(sum);
    wgmma_begin();
#pragma unroll
    for (int step = 0; step < Hopper::kK / 16; ++step) {
      const uint64_t a = describe_tile(x + step * 32, kGroupBytes, 0);
      const uint64_t b =
          kInputMajor ? describe_tile(weight + step * 2 * kGroupBytes, kGroupBytes, Hopper::kK * kRowBytes)
                      : describe_tile(weight + step * 32, kGroupBytes, 0);
      wgmma_m64n128k16<T, kInputMajor>(sum, a, b, true);
    }
    wgmma_commit();
  }

  // Adds up the tile's stages. A stage is empty when the instructions that read it have ended, which is
  // waited for once those of the next one are under way.
  __device__ __forceinline__ void add_up(HopperShared& shared, int count, bool gathered) {
    Turn turn, last;
    for (int s = 0; s < count; ++s) {
      wait(shared.full[turn.slot], turn.parity);
      if (gathered) fence_for_wgmma();  // boxes need none
      multiply(shared.stages[turn.slot]);
      turn.next();
      wgmma_wait<1>();
      if (s == 0) continue;
      if (lane == 0) arrive(shared.empty[last.slot]);
      last.next();
    }
    wgmma_wait<0>();
    wgmma_hold(sum);
    Hopper::sync();  // the stages are free for other use
  }
};

template <typename T, bool kInputMajor>
__global__ void __launch_bounds__(Hopper::kBlockThreads, Hopper::kBlocks)
    multiply_on_hopper(const __grid_constant__ HopperProblem problem) {
  const Problem& linear = problem.linear;
  auto& shared = *dynamic_shared<HopperShared>();
  if (blockIdx.x < linear.copying_blocks) {
    if (blockIdx.y == 0) copy_removed<T>(linear, shared.is_kept);
    return;
  }
  const Place place = find_place<Hopper>(linear);
  find_columns<Hopper>(linear, place.first_output, shared.columns);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Hopper::kStages; ++i) {
      // A stage is full when the boxes are announced and here, and every gatherer's copies.
      init_barrier(shared.full[i], problem.weight_in_boxes ? 1 : 1 + Hopper::kGatherers);
      init_barrier(shared.empty[i], Hopper::kThreads / kWarp);  // a thread of each warp that multiplies
    }
    fence_barriers();
  }
  if (threadIdx.x == Hopper::kThreads) {
    prefetch_matrix(problem.x);
    if (problem.weight_in_boxes) prefetch_matrix(problem.weight);
  }
  __syncthreads();
  if (threadIdx.x >= Hopper::kThreads) {
    if (!problem.weight_in_boxes)
      gather_stages<T, kInputMajor>(problem, place, shared);
    else if (threadIdx.x == Hopper::kThreads)
      copy_boxes<kInputMajor>(problem, place, shared);
    return;
  }
  WarpgroupProduct<T, kInputMajor> product;
  product.add_up(shared, place.stages, !problem.weight_in_boxes);
  store_tile<T>(linear, place, shared.columns, shared.slab, product);
}

// ---------------------------------------------------------------- host
bool in_boxes(const Kept& kept) { return kept.index == nullptr || kept.block % kBox == 0; }

template <typename T, bool kInputMajor>
void run_on_hopper(HopperProblem problem, DType dtype, const Queue& queue) {
  const Shape shape = plan_grid<Hopper, HopperShared>(problem.linear, Hopper::kBlockThreads, queue);
  launch(kOp, dtype, queue, shape, &multiply_on_hopper<T, kInputMajor>, problem);
  add_splits<T>(problem.linear, dtype, queue);
}

template <typename T>
void run_on_hopper(const HopperProblem& problem, bool input_major, DType dtype, const Queue& queue) {
  input_major ? run_on_hopper<T, true>(problem, dtype, queue)
              : run_on_hopper<T, false>(problem, dtype, queue);
}

}  // namespace

void multiply_on_hopper(const Problem& linear, bool input_major, DType dtype, const Queue& queue) {
  MVP_CHECK(linear.rows < 0x7FFFFF00, kOp, "too many rows for the kernel for Hopper");
  MVP_CHECK(linear.inputs > 0, kOp, "no inputs: nothing for the kernel for Hopper");
  // A single row's stride may be anything.
  const int64_t x_stride = linear.rows == 1 ? linear.inputs : linear.x_stride;
  MVP_CHECK(x_stride >= linear.inputs, kOp, "x: expected rows that do not overlap");
  const DeviceGuard guard(queue.device);  // describing a matrix wants its context
  HopperProblem problem{};
  problem.linear = linear;
  problem.x = make_boxed_matrix(linear.x, linear.rows, linear.inputs, x_stride, Hopper::kM);
  problem.weight_in_boxes = in_boxes(linear.out_index) && in_boxes(linear.in_index) &&
                            linear.weight_stride >= linear.weight_columns;
  if (problem.weight_in_boxes)
    problem.weight = make_boxed_matrix(linear.weight, linear.weight_rows, linear.weight_columns,
                                       linear.weight_stride, kBox);
  if (dtype == DType::bf16) return run_on_hopper<Bf16>(problem, input_major, dtype, queue);
  run_on_hopper<F16>(problem, input_major, dtype, queue);
}

}  // namespace mvp::cuda
