// What warps of different jobs need to work hand in hand on Hopper (sm_90): barriers in shared memory,
// barriers for a part of a block, and copies of whole boxes of a matrix. Has a twin in the emulator, like
// intrinsics.cuh.
#pragma once

#include <cuda.h>  // types only: the driver's functions are looked up when they are needed

#include <stdexcept>
#include <string>

#include "mvp/cuda/intrinsics.cuh"

namespace mvp::cuda {

// ---------------------------------------------------------------- barriers
// A barrier in shared memory (mbarrier). Its phases are numbered from 0. A phase ends when as many arrivals
// have come as init_barrier said, and all bytes that were announced; then the next begins.
struct alignas(8) Barrier {
  uint64_t state;
};

__device__ __forceinline__ uint32_t address_of(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// By one thread, before a barrier of the block.
__device__ __forceinline__ void init_barrier(Barrier& barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address_of(&barrier)), "r"(arrivals)
               : "memory");
}

// By the thread that initialised barriers, after the last: shows them to copies of boxes.
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address_of(&barrier)) : "memory");
}

// Arrives, and announces bytes that copies will bring before the phase may end.
__device__ __forceinline__ void arrive_and_expect(Barrier& barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address_of(&barrier)),
               "r"(bytes)
               : "memory");
}

// An arrival when all 16-byte copies that this thread has started are there. They are not yet shown to matrix
// instructions: whoever waits must fence_for_wgmma().
__device__ __forceinline__ void arrive_after_copies(Barrier& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address_of(&barrier)) : "memory");
}

// Waits until a phase of this parity (its number % 2) has ended, which must be the present one or the one
// before it.
__device__ __forceinline__ void wait(const Barrier& barrier, unsigned parity) {
  uint32_t ended = 0;
  while (ended == 0)
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(ended)
        : "r"(address_of(&barrier)), "r"(parity)
        : "memory");
}

// A barrier of kThreads of the block's threads, whole warps. kId: 1 to 15; 0 is __syncthreads'.
template <int kId, int kThreads>
__device__ __forceinline__ void sync_some() {
  static_assert(kId > 0 && kId < 16 && kThreads % 32 == 0);
  asm volatile("bar.sync %0, %1;" ::"n"(kId), "n"(kThreads) : "memory");
}

// ---------------------------------------------------------------- boxes
// A matrix of 16-bit elements in global memory, to be read in boxes of 64 columns and some rows. A parameter
// of the kernel, __grid_constant__.
struct BoxedMatrix {
  CUtensorMap map;
};

// base and stride (in elements) at multiples of 16 bytes; columns <= stride.
inline BoxedMatrix make_boxed_matrix(const void* base, int64_t rows, int64_t columns, int64_t stride,
                                     unsigned box_rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<Encode>(result == cudaDriverEntryPointSuccess ? found : nullptr);
  }();
  if (encode == nullptr)
    throw std::runtime_error("this driver has no tensor maps, which CUDA 12 brought: update it");
  BoxedMatrix matrix;
  const cuuint64_t size[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[] = {64, box_rows}, every[] = {1, 1};
  const CUresult error =
      encode(&matrix.map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(base), size, row_bytes, box,
             every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS)
    throw std::runtime_error("a matrix could not be described for copies of boxes: CUDA error " +
                             std::to_string(static_cast<int>(error)));
  return matrix;
}

// Fetches what copies of boxes must know of the matrix, ahead of the first.
__device__ __forceinline__ void prefetch_matrix(const BoxedMatrix& matrix) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&matrix.map) : "memory");
}

// One thread: copies the box that begins at (row, column) to shared memory, in rows of 128 bytes that are
// swizzled as describe_tile() says; zeros outside the matrix. `shared` at a multiple of 1024 bytes. Its bytes
// arrive at the barrier, always those of a whole box.
__device__ __forceinline__ void copy_box(void* shared, const BoxedMatrix& matrix, int row, int column,
                                         Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];" ::"r"(address_of(shared)),
      "l"(&matrix.map), "r"(column), "r"(row), "r"(address_of(&barrier))
      : "memory");
}

}  // namespace mvp::cuda
