// All that a kernel needs and C++ with CUDA's plain intrinsics does not spell: conversions, 16-byte accesses,
// dynamic shared memory, asynchronous copies and tensor cores (sm_80 and newer). Nothing else may contain
// PTX: the emulator has a header of the same name and meaning (tests/cuda_emulator/include), which says the
// same on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "mvp/cuda/element.h"

namespace mvp::cuda {

// ---------------------------------------------------------------- conversions, rounded to nearest even
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(double x) { return static_cast<float>(x); }
__device__ __forceinline__ float to_float(Bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float to_float(F16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else
    return T{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ F16 from_float<F16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ double from_float<double>(float x) {
  return x;
}

// Ends the program with a CUDA error where a condition does not hold, like torch's own device-side
// assertions: values in device memory cannot be checked before the launch without waiting for them.
__device__ __forceinline__ void require(bool condition, const char*) {
  if (!condition) __trap();
}

// ---------------------------------------------------------------- memory
// The block's dynamic shared memory, at a multiple of 1024 bytes. One use a kernel; its size is an argument
// of launch().
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char mvp_dynamic_shared[];
  return reinterpret_cast<T*>(mvp_dynamic_shared);
}

// 16 bytes at a 16-byte-aligned address.
template <typename T>
__device__ __forceinline__ Vec16<T> load16(const T* p) {
  const uint4 raw = *reinterpret_cast<const uint4*>(p);
  return reinterpret_cast<const Vec16<T>&>(raw);
}

// The same for what is read once: past L1, through the read-only path.
template <typename T>
__device__ __forceinline__ Vec16<T> load16_once(const T* p) {
  uint4 raw;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "l"(p));
  return reinterpret_cast<const Vec16<T>&>(raw);
}

template <typename T>
__device__ __forceinline__ void store16(T* p, const Vec16<T>& v) {
  *reinterpret_cast<uint4*>(p) = reinterpret_cast<const uint4&>(v);
}

// ---------------------------------------------------------------- asynchronous copies
// 16 bytes from global to shared memory, both 16-byte aligned; zeros where not `valid` (then `global` is not
// read). There after cp_async_wait, for this thread; for others after a barrier.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid = true) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}

// Closes a group of this thread's copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kGroups of this thread's youngest groups are under way.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// ---------------------------------------------------------------- tensor cores; all lanes of the warp
// Four 8×8 matrices of 16-bit elements from shared memory: lane l names (16-byte-aligned) row l % 8 of matrix
// l / 8 and gets, of each matrix, elements [l / 4][2 · (l % 4) + {0, 1}]; transposed: elements [2 · (l % 4) +
// {0, 1}][l / 4].
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// d[16×8] += a[16×16] · b[16×8], T = Bf16 or F16, sums in float32. With g = lane / 4, p = 2 · (lane % 4):
//   a: [g][p, p+1], [g+8][p, p+1], [g][p+8, p+9], [g+8][p+8, p+9]   (ldmatrix_x4 of the quadrants,
//   column-major) b: [p, p+1][g], [p+8, p+9][g]        d: [g][p], [g][p+1], [g+8][p], [g+8][p+1]
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<Bf16>(float (&d)[4], const uint32_t (&a)[4],
                                                   const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<F16>(float (&d)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace mvp::cuda
