// pruned_linear with Hopper's matrix instructions (wgmma), which read both operands from shared memory: a
// tile of 128 rows × 128 outputs × 64 inputs, two warpgroups of 64 rows each. All eight warps gather; four
// stages.
//
// A stage's tiles have rows of 128 bytes in the swizzle that wgmma expects, which is SharedTile's own for
// eight vectors a row. Row-major W: a row is an output, along the inputs. Input-major W: a row is an input,
// along 64 outputs, and the next 64 outputs follow 64 rows further down.
//
// Step s: wait for this thread's copies of stage s, fence them for wgmma, barrier. Behind the barrier
// everybody has waited for the instructions of step s − 2, so its stage may be filled again, while those of s
// − 1 and s run.
//
// Proven in the emulator against its twin of wgmma, not yet run on a GPU: the op does not choose it by itself
// (mvp_ext/ops/cuda_linear.py).
#include "mvp/cuda/wgmma.cuh"
#include "pruned_linear.cuh"

namespace mvp::cuda {
namespace {

// 64 rows a warpgroup; for the shared epilogue its warps are eight rows of warps, a fragment high each.
struct Hopper : Tiling<128, 128, 64, 8, 1, 1, 4, 1> {};
constexpr int kRowBytes = 128, kGroupBytes = 8 * kRowBytes, kVectorsARow = kRowBytes / 16;

template <bool kInputMajor>
struct HopperStage {
  SharedTile<Hopper::kM, kVectorsARow> x;
  struct Weight : SharedTile<Hopper::kN, kVectorsARow> {
    __device__ __forceinline__ Vec16<uint16_t>* at(unsigned row, unsigned vector) {
      using Tile = SharedTile<Hopper::kN, kVectorsARow>;
      if constexpr (kInputMajor)
        return Tile::at(vector / kVectorsARow * Hopper::kK + row, vector % kVectorsARow);
      else
        return Tile::at(row, vector);
    }
  } weight;
};

template <typename T, bool kInputMajor>
struct WarpgroupProduct {
  float sum[64] = {};
  unsigned lane, first_m, first_n = 0;  // of the warp, in the block's tile

  __device__ WarpgroupProduct() : lane(threadIdx.x % kWarp), first_m(threadIdx.x / kWarp * 16) {}

  __device__ __forceinline__ float2 pair(int, int j, int half) const {
    return make_float2(sum[4 * j + 2 * half], sum[4 * j + 2 * half + 1]);
  }

  __device__ __forceinline__ void multiply(const HopperStage<kInputMajor>& stage) {
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
};

template <typename T, bool kInputMajor>
struct Machine<T, Hopper, kInputMajor> {
  using Stage = HopperStage<kInputMajor>;
  using Product = WarpgroupProduct<T, kInputMajor>;
};

template <typename T, bool kInputMajor, typename Load>
__device__ __forceinline__ void multiply_stages(WarpgroupProduct<T, kInputMajor>& product,
                                                HopperStage<kInputMajor>* stages, int count, Load&& load) {
  constexpr int kAhead = Hopper::kStages - 2;
#pragma unroll
  for (int s = 0; s < kAhead; ++s) {
    if (s < count) load(stages[s]);
    cp_async_commit();
  }
  for (int s = 0; s < count; ++s) {
    cp_async_wait<kAhead - 1>();
    fence_for_wgmma();
    __syncthreads();
    if (s + kAhead < count) load(stages[(s + kAhead) % Hopper::kStages]);
    cp_async_commit();
    product.multiply(stages[s % Hopper::kStages]);
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  wgmma_hold(product.sum);
  cp_async_wait<0>();
  __syncthreads();  // the stages are free for other use
}

template <typename T>
void multiply_by_wgmma(const Problem& problem, bool input_major, DType dtype, const Queue& queue) {
  input_major ? run<T, Hopper, true>(problem, dtype, queue) : run<T, Hopper, false>(problem, dtype, queue);
}

}  // namespace

void multiply_on_hopper(const linear::Problem& problem, bool input_major, DType dtype, const Queue& queue) {
  MVP_CHECK(problem.partial == nullptr, kOp, "on Hopper a tile's inputs are not divided");
  if (dtype == DType::bf16) return multiply_by_wgmma<Bf16>(problem, input_major, dtype, queue);
  multiply_by_wgmma<F16>(problem, input_major, dtype, queue);
}

}  // namespace mvp::cuda
