// Hopper's matrix instructions (sm_90a): what pruned_linear_sm90.cu needs of them. Has a twin in the
// emulator, like intrinsics.cuh; the twin follows the documented layouts, so it proves the indices, not the
// instructions themselves.
//
// A warpgroup is four warps whose first thread's number is a multiple of 128; all of its threads call these
// together.
#pragma once

#include "mvp/cuda/intrinsics.cuh"

namespace mvp::cuda {

// Describes a tile of 16-bit elements in shared memory whose rows are 128 bytes (64 elements) and swizzled:
// 16-byte chunk c of the row at address r (a multiple of 128) lies at r + 16 · (c XOR r / 128 % 8). Where
// elements of one row run along k, eight rows are a group and groups are `group_bytes` apart (`repeat_bytes`
// is not used); where they run along n, eight values of k are a group, and the next 64 values of n are
// `repeat_bytes` further. Groups start at multiples of 1024 bytes; `start` may be advanced within the first
// row.
__device__ __forceinline__ uint64_t describe_tile(const void* start, uint32_t group_bytes,
                                                  uint32_t repeat_bytes) {
  const uint64_t address = static_cast<uint64_t>(__cvta_generic_to_shared(start));
  return ((address & 0x3FFFF) >> 4) | (uint64_t{repeat_bytes} >> 4) << 16 |
         (uint64_t{group_bytes} >> 4) << 32 | uint64_t{1} << 62;
}

// Makes this thread's writes to shared memory (asynchronous copies that it waited for, too) visible to the
// matrix instructions; before the barrier that hands them over.
__device__ __forceinline__ void fence_for_wgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Before the first of a row of matrix instructions, and whenever registers they use were touched.
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of matrix instructions.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kGroups of the youngest groups are under way.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// Keeps the compiler from moving accumulators while instructions are under way.
__device__ __forceinline__ void wgmma_hold(float (&d)[64]) {
#pragma unroll
  for (float& x : d) asm volatile("" : "+f"(x)::"memory");
}

// The instruction for operands of a type: 64 sums, two tiles, accumulate or not, and whether b's rows run
// along n.
#define MVP_WGMMA(TYPE)                                                                                 \
  asm volatile(                                                                                         \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                                      \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                                      \
      " {"                                                                                              \
      "%0, %1, %2, %3, %4, %5, %6, %7, "                                                                \
      "%8, %9, %10, %11, %12, %13, %14, %15, "                                                          \
      "%16, %17, %18, %19, %20, %21, %22, %23, "                                                        \
      "%24, %25, %26, %27, %28, %29, %30, %31, "                                                        \
      "%32, %33, %34, %35, %36, %37, %38, %39, "                                                        \
      "%40, %41, %42, %43, %44, %45, %46, %47, "                                                        \
      "%48, %49, %50, %51, %52, %53, %54, %55, "                                                        \
      "%56, %57, %58, %59, %60, %61, %62, %63}, "                                                       \
      "%64, %65, p, 1, 1, 0, %67;\n}\n"                                                                 \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]),        \
        "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]),      \
        "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]),      \
        "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]),      \
        "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), "+f"(d[42]),      \
        "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]), "+f"(d[49]),      \
        "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),      \
        "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])       \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kRowsAreK)))

// d[64×128] = a[64×16] · b[16×128] (+ d), T = Bf16 or F16. a's rows run along k; b's run along k as b[n][k],
// or, with kRowsAreK, along n as b[k][n]. Thread t of the warpgroup holds d[16 · (t / 32) + t % 32 / 4 + {0,
// 8}] [8j + 2 · (t % 4) + {0, 1}] at d[4j + …], as mma_m16n8k16 does.
template <typename T, bool kRowsAreK>
__device__ __forceinline__ void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(sizeof(T) == 2);
  if constexpr (is_bf16<T>)
    MVP_WGMMA("bf16");
  else
    MVP_WGMMA("f16");
}
#undef MVP_WGMMA

}  // namespace mvp::cuda
