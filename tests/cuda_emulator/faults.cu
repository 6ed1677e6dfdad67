// Kernels of 64 threads that are wrong in one way each, beside the right ones. in and out: float32 [64].
#include <string>

#include "cuda/common.cuh"
#include "faults.h"
#include "mvp/cuda/pipeline.cuh"
#include "mvp/cuda/wgmma.cuh"

namespace mvp::cuda {
namespace {

constexpr int kThreads = 64;

// out[i] = in[(i + 1) % 64] + in[(i + 63) % 64], through shared memory.
template <bool kBarrier>
__global__ void neighbours(const float* in, float* out) {
  float* shared = dynamic_shared<float>();
  const int i = threadIdx.x;
  shared[i] = in[i];
  if (kBarrier) __syncthreads();
  out[i] = shared[(i + 1) % kThreads] + shared[(i + kThreads - 1) % kThreads];
}

// Twice around: the second write must wait for the first read.
template <bool kBarrier>
__global__ void two_rounds(const float* in, float* out) {
  float* shared = dynamic_shared<float>();
  const int i = threadIdx.x;
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    shared[i] = in[i] + static_cast<float>(round);
    __syncthreads();
    sum += shared[(i + 7) % kThreads];
    if (kBarrier) __syncthreads();
  }
  out[i] = sum;
}

// Exchange within a warp through shared memory.
template <bool kBarrier>
__global__ void exchange_in_warp(const float* in, float* out) {
  float* shared = dynamic_shared<float>();
  const int i = threadIdx.x;
  shared[i] = in[i];
  if (kBarrier) __syncwarp();
  out[i] = shared[i ^ 5];
}

template <bool kWait>
__global__ void copy_through_shared(const float* in, float* out) {
  float* shared = dynamic_shared<float>();
  const int i = threadIdx.x;
  if (i % 4 == 0) cp_async16(shared + i, in + i);
  cp_async_commit();
  if (kWait) cp_async_wait<0>();
  __syncthreads();
  out[i] = shared[i];
  if (!kWait) cp_async_wait<0>();
}

// The wait leaves one group under way, and it is the one that is read.
__global__ void wait_for_the_wrong_group(const float* in, float* out) {
  float* shared = dynamic_shared<float>();
  const int i = threadIdx.x;
  if (i % 4 == 0) cp_async16(shared + i, in + i);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  out[i] = shared[i];
  cp_async_wait<0>();
}

__global__ void barrier_for_some(const float* in, float* out) {
  const int i = threadIdx.x;
  out[i] = in[i];
  if (i < 40) __syncthreads();
}

__global__ void barriers_in_two_places(const float* in, float* out) {
  const int i = threadIdx.x;
  if (i < 32) {
    out[i] = in[i];
    __syncthreads();
  } else {
    __syncthreads();
    out[i] = in[i];
  }
}

__global__ void shuffle_for_some(const float* in, float* out) {
  const int i = threadIdx.x;
  out[i] = in[i];
  if (i % 32 < 20) out[i] = __shfl_xor_sync(kAllLanes, in[i], 1);
}

__global__ void misaligned(const float* in, float* out) {
  if (threadIdx.x == 0) store16(out, load16(in + 1));
}

__global__ void beyond_shared(const float* in, float* out) {
  float* shared = dynamic_shared<float>();
  const int i = threadIdx.x;
  shared[i + 1] = in[i];
  __syncthreads();
  out[i] = shared[i + 1];
}

__global__ void beyond_global(const float* in, float* out) {
  const int i = threadIdx.x;
  out[i] = in[i + 1];
}

__global__ void unwaited_copies(const float* in, float*) {
  if (threadIdx.x == 0) cp_async16(dynamic_shared<float>(), in);
}

// d[16×8] = a[16×16] · b[16×8] from bf16 values in `in`: a then b, row-major; loaded by ldmatrix.
__global__ void matrix_product(const float* in, float* out) {
  auto* shared = dynamic_shared<Bf16>();
  for (int i = threadIdx.x; i < 16 * 16 + 16 * 8; i += 32) shared[i] = from_float<Bf16>(in[i]);
  __syncwarp();
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t a[4], pair[4];
  ldmatrix_x4(a, shared + (lane % 16) * 16 + lane / 16 * 8);
  // Two 8×8 halves of b; lanes 16 to 31 repeat them.
  ldmatrix_x4_trans(pair, shared + 256 + (lane % 16) * 8);
  const uint32_t b[2] = {pair[0], pair[1]};
  float d[4] = {};
  mma_m16n8k16<Bf16>(d, a, b);
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// d[64×128] = a[64×64] · b[64×128] by a warpgroup: `in` holds a, row-major, then b, as [n][k] or as [k][n];
// bfloat16.
template <bool kRowsAreK, bool kFence, bool kWait, bool kByBarrier = false>
__global__ void warpgroup_product(const float* in, float* out) {
  auto* a = dynamic_shared<Bf16>();
  auto* b = a + 64 * 64;
  const auto* values = reinterpret_cast<const Bf16*>(in);
  const int thread = static_cast<int>(threadIdx.x);
  auto* here = reinterpret_cast<Barrier*>(b + 64 * 128);
  if (kByBarrier) {
    if (thread == 0) init_barrier(*here, 128);
    __syncthreads();
  }
  const auto copy = [](Bf16* tile, int row, int vector, const Bf16* from) {
    cp_async16(tile + row * 64 + (vector ^ row % 8) * 8, from);
  };
  for (int i = thread; i < 64 * 8; i += 128) copy(a, i / 8, i % 8, values + i * 8);
  for (int i = thread; i < 128 * 8; i += 128) {
    const Bf16* from = values + 64 * 64 + i * 8;
    if (kRowsAreK)
      copy(b, i % 16 / 8 * 64 + i / 16, i % 8, from);  // 64 values of n beside each other, then the next 64
    else
      copy(b, i / 8, i % 8, from);
  }
  if (kByBarrier) {
    arrive_after_copies(*here);
    wait(*here, 0);
  } else {
    cp_async_commit();
    cp_async_wait<0>();
  }
  if (kFence) fence_for_wgmma();
  if (!kByBarrier) __syncthreads();
  float d[64];
  wgmma_begin();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const uint64_t tile_a = describe_tile(a + step * 16, 1024, 0);
    const uint64_t tile_b =
        kRowsAreK ? describe_tile(b + step * 16 * 64, 1024, 64 * 128) : describe_tile(b + step * 16, 1024, 0);
    wgmma_m64n128k16<Bf16, kRowsAreK>(d, tile_a, tile_b, step > 0);
  }
  wgmma_commit();
  if (kWait) wgmma_wait<0>();
  wgmma_hold(d);
  const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
#pragma unroll
  for (int i = 0; i < 64; ++i) out[(row + i / 2 % 2 * 8) * 128 + i / 4 * 8 + column + i % 2] = d[i];
}

enum class PipelineFault {
  none,
  no_wait_for_full,
  no_wait_for_empty,
  too_few_bytes,
  too_many_bytes,
  no_barriers,
  no_last_wait,
  half_a_barrier,
};

// Rows of `in`, 32 floats each, through a ring of two stages: the second warp's first thread copies them as
// boxes, the first warp adds them up.
template <PipelineFault kFault>
__global__ void pipeline(const __grid_constant__ BoxedMatrix in, float* out) {
  constexpr int kRows = 4, kStages = 2;
  struct Stage {
    alignas(1024) float row[32];
  };
  struct Memory {
    Stage stages[kStages];
    Barrier full[kStages], empty[kStages];
  };
  auto& memory = *dynamic_shared<Memory>();
  if (threadIdx.x == 0 && kFault != PipelineFault::no_barriers) {
    for (int s = 0; s < kStages; ++s) {
      init_barrier(memory.full[s], 1);
      init_barrier(memory.empty[s], 32);
    }
    fence_barriers();
  }
  __syncthreads();
  if (threadIdx.x >= 32) {
    if (threadIdx.x > 32) return;
    for (unsigned r = 0; r < kRows; ++r) {
      const unsigned slot = r % kStages, turn = r / kStages;
      if (kFault != PipelineFault::no_wait_for_empty) wait(memory.empty[slot], turn % 2 ^ 1);
      arrive_and_expect(memory.full[slot], kFault == PipelineFault::too_few_bytes    ? 64
                                           : kFault == PipelineFault::too_many_bytes ? 256
                                                                                     : 128);
      copy_box(&memory.stages[slot], in, static_cast<int>(r), 0, memory.full[slot]);
    }
    return;
  }
  float sum = 0.0f;
  constexpr unsigned kRead = kFault == PipelineFault::no_last_wait ? kRows - 1 : kRows;
  for (unsigned r = 0; r < kRead; ++r) {
    const unsigned slot = r % kStages, turn = r / kStages;
    if (kFault != PipelineFault::no_wait_for_full) wait(memory.full[slot], turn % 2);
    sum += memory.stages[slot].row[threadIdx.x];
    arrive(memory.empty[slot]);
  }
  if (kFault == PipelineFault::half_a_barrier && threadIdx.x < 7) return;
  sync_some<1, 32>();
  out[threadIdx.x] = sum;
}

template <PipelineFault kFault>
void run_pipeline(const float* in, float* out) {
  launch("a test kernel", DType::f32, Queue(0, 0), Shape{dim3(1), dim3(64), 2 * 1024 + 1024},
         &pipeline<kFault>, make_boxed_matrix(in, 4, 64, 64, 1), out);
}

}  // namespace
}  // namespace mvp::cuda

namespace mvp {

void run_faulty_kernel(const std::string& name, const TensorView& in, const TensorView& out) {
  using namespace cuda;
  const std::pair<const char*, void (*)(const float*, float*)> kernels[] = {
      {"neighbours", &neighbours<true>},
      {"neighbours without barrier", &neighbours<false>},
      {"two rounds", &two_rounds<true>},
      {"two rounds without barrier", &two_rounds<false>},
      {"exchange in warp", &exchange_in_warp<true>},
      {"exchange in warp without barrier", &exchange_in_warp<false>},
      {"copy", &copy_through_shared<true>},
      {"copy without wait", &copy_through_shared<false>},
      {"copy with too weak a wait", &wait_for_the_wrong_group},
      {"barrier for some", &barrier_for_some},
      {"barriers in two places", &barriers_in_two_places},
      {"shuffle for some", &shuffle_for_some},
      {"misaligned", &misaligned},
      {"beyond shared", &beyond_shared},
      {"beyond global", &beyond_global},
      {"unwaited copies", &unwaited_copies},
      {"matrix product", &matrix_product},
  };
  for (const auto& [known, kernel] : kernels)
    if (name == known) {
      const bool one_warp = name == "matrix product";
      const Shape shape{dim3(1), dim3(one_warp ? 32 : kThreads),
                        one_warp ? 384 * sizeof(Bf16) : kThreads * sizeof(float)};
      return launch("a test kernel", DType::f32, Queue(0, 0), shape, kernel, in.ptr<float>(),
                    out.ptr<float>());
    }
  const std::pair<const char*, void (*)(const float*, float*)> warpgroup_kernels[] = {
      {"warpgroup product", &warpgroup_product<false, true, true>},
      {"warpgroup product, rows are k", &warpgroup_product<true, true, true>},
      {"warpgroup product without fence", &warpgroup_product<false, false, true>},
      {"warpgroup product without wait", &warpgroup_product<false, true, false>},
      {"warpgroup product by barrier", &warpgroup_product<false, true, true, true>},
      {"warpgroup product by barrier without fence", &warpgroup_product<false, false, true, true>},
  };
  for (const auto& [known, kernel] : warpgroup_kernels)
    if (name == known) {
      const Shape shape{dim3(1), dim3(128), (64 + 128) * 64 * sizeof(Bf16) + sizeof(Barrier)};
      return launch("a test kernel", DType::f32, Queue(0, 0), shape, kernel, in.ptr<float>(),
                    out.ptr<float>());
    }
  const std::pair<const char*, void (*)(const float*, float*)> pipelines[] = {
      {"pipeline", &run_pipeline<PipelineFault::none>},
      {"pipeline without wait for full", &run_pipeline<PipelineFault::no_wait_for_full>},
      {"pipeline without wait for empty", &run_pipeline<PipelineFault::no_wait_for_empty>},
      {"pipeline with too few bytes", &run_pipeline<PipelineFault::too_few_bytes>},
      {"pipeline with too many bytes", &run_pipeline<PipelineFault::too_many_bytes>},
      {"pipeline without barriers", &run_pipeline<PipelineFault::no_barriers>},
      {"pipeline without the last wait", &run_pipeline<PipelineFault::no_last_wait>},
      {"pipeline with half a barrier", &run_pipeline<PipelineFault::half_a_barrier>},
  };
  for (const auto& [known, run] : pipelines)
    if (name == known) return run(in.ptr<float>(), out.ptr<float>());
  throw std::invalid_argument("no kernel is named " + name);
}

}  // namespace mvp
