// Stand-in for CUDA's header: what the kernels of csrc/cuda use of it, for g++. See ../engine.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#include "../engine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---------------------------------------------------------------- host
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
};
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
};

namespace emulator {
inline cudaError_t next_error = cudaSuccess;  // what the next launch answers: for tests of the error messages
inline size_t allowed_shared = 0;             // set for the next launch by cudaFuncSetAttribute
constexpr size_t kSharedByDefault = 48 << 10, kSharedAtMost = 227 << 10, kParameters = 32764;
}  // namespace emulator

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorName(cudaError_t) { return "an error name"; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error text"; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // Few multiprocessors, so that loops over more work than blocks are run, too.
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? 8
           : attribute == cudaDevAttrComputeCapabilityMinor ? 0
                                                            : 4;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  emulator::allowed_shared = static_cast<size_t>(bytes);
  return emulator::allowed_shared <= emulator::kSharedAtMost ? cudaSuccess : cudaErrorInvalidValue;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  static_assert((sizeof(std::decay_t<Params>) + ... + 0) <= emulator::kParameters);
  static_assert((std::is_trivially_copyable_v<std::decay_t<Params>> && ... && true));
  if (const cudaError_t error = std::exchange(emulator::next_error, cudaSuccess)) return error;
  const dim3 grid = config->gridDim, block = config->blockDim;
  const size_t allowed = std::max(emulator::kSharedByDefault, std::exchange(emulator::allowed_shared, 0));
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (config->dynamicSmemBytes > allowed) return cudaErrorInvalidValue;
  emulator::run_grid(grid, block, config->dynamicSmemBytes,
                     [&] { kernel(static_cast<std::decay_t<Params>>(args)...); });
  return cudaSuccess;
}

// ---------------------------------------------------------------- device
#define MVP_EMULATOR_TEXT_(x) #x
#define MVP_EMULATOR_TEXT(x) MVP_EMULATOR_TEXT_(x)
#define MVP_HERE(what) (what " (" __FILE__ ":" MVP_EMULATOR_TEXT(__LINE__) ")")

constexpr int warpSize = 32;

#define __syncthreads() ::emulator::sync_block(MVP_HERE("__syncthreads"))
#define __syncthreads_count(p) ::emulator::count_block((p), MVP_HERE("__syncthreads_count"))
#define __syncthreads_or(p) (::emulator::count_block((p), MVP_HERE("__syncthreads_or")) != 0)
#define __syncwarp(...) \
  ((void)::emulator::meet_warp(::emulator::mask_or_all(__VA_ARGS__), MVP_HERE("__syncwarp"), 0))
#define __shfl_sync(mask, value, from) ::emulator::shuffle((mask), (value), (from), MVP_HERE("__shfl_sync"))
#define __shfl_xor_sync(mask, value, flip) \
  ::emulator::shuffle((mask), (value), ::emulator::lane() ^ (flip), MVP_HERE("__shfl_xor_sync"))
#define __shfl_down_sync(mask, value, by) \
  ::emulator::shuffle_by((mask), (value), static_cast<int>(by), MVP_HERE("__shfl_down_sync"))
#define __shfl_up_sync(mask, value, by) \
  ::emulator::shuffle_by((mask), (value), -static_cast<int>(by), MVP_HERE("__shfl_up_sync"))
#define __ballot_sync(mask, p) ::emulator::ballot((mask), (p), MVP_HERE("__ballot_sync"))
#define __any_sync(mask, p) (::emulator::ballot((mask), (p), MVP_HERE("__any_sync")) != 0)
#define __all_sync(mask, p) (::emulator::ballot((mask), !(p), MVP_HERE("__all_sync")) == 0)
#define __match_any_sync(mask, value) ::emulator::match_any((mask), (value), MVP_HERE("__match_any_sync"))

namespace emulator {

inline uint32_t mask_or_all(uint32_t mask = 0xFFFFFFFF) { return mask; }

template <typename T>
T shuffle(uint32_t mask, T value, int from, const char* where) {
  const Slot* slots = meet_warp(mask, where, value);
  const int lane = from & 31;
  if ((mask >> lane & 1) == 0) fault("reads a lane that is not in the mask at " + std::string(where));
  return slots[lane].as<T>();
}

template <typename T>
T shuffle_by(uint32_t mask, T value, int by, const char* where) {
  const Slot* slots = meet_warp(mask, where, value);
  const int from = lane() + by;
  if (from < 0 || from > 31) return value;
  if ((mask >> from & 1) == 0) fault("reads a lane that is not in the mask at " + std::string(where));
  return slots[from].as<T>();
}

inline uint32_t ballot(uint32_t mask, bool condition, const char* where) {
  const Slot* slots = meet_warp(mask, where, condition);
  uint32_t result = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) result |= uint32_t{slots[lane].as<bool>()} << lane;
  return result;
}

template <typename T>
uint32_t match_any(uint32_t mask, T value, const char* where) {
  const Slot* slots = meet_warp(mask, where, value);
  uint32_t result = 0;
  for (int lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1) result |= uint32_t{slots[lane].as<T>() == value} << lane;
  return result;
}

}  // namespace emulator

template <typename T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_integral_v<T>, "floats added atomically come in any order: not deterministic");
  emulator::yield();
  return std::exchange(*address, static_cast<T>(*address + value));
}
template <typename T>
T atomicMax(T* address, T value) {
  emulator::yield();
  return std::exchange(*address, std::max(*address, value));
}
template <typename T>
T atomicMin(T* address, T value) {
  emulator::yield();
  return std::exchange(*address, std::min(*address, value));
}
template <typename T>
T atomicOr(T* address, T value) {
  emulator::yield();
  return std::exchange(*address, *address | value);
}
inline void __threadfence() {}

template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __fmul_rn(float a, float b) { return a * b; }  // compiled without contraction
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __uint_as_float(unsigned x) {
  float f;
  std::memcpy(&f, &x, sizeof f);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned x;
  std::memcpy(&x, &f, sizeof x);
  return x;
}
inline float __int_as_float(int x) { return __uint_as_float(static_cast<unsigned>(x)); }
inline int __float_as_int(float f) { return static_cast<int>(__float_as_uint(f)); }
using std::max;
using std::min;
