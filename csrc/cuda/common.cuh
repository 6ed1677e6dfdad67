// What the CUDA kernels share: launching with errors that say what to do, and reductions.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "mvp/arguments.h"
#include "mvp/check.h"
#include "mvp/cuda/intrinsics.cuh"
#include "mvp/tensor_view.h"

#ifndef MVP_CUDA_ARCHS
#define MVP_CUDA_ARCHS "unknown"
#endif

namespace mvp::cuda {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFF;
constexpr size_t kMaxParameterBytes = 32764;  // of a kernel: sm_70 and newer, CUDA 12.1 and newer

template <typename A, typename B>
__host__ __device__ constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

// ---------------------------------------------------------------- host
// Where the tensors of a call must lie.
inline Where where_of(int device) {
#ifdef MVP_EMULATED
  return {1, device};
#else
  return {2, device};
#endif
}

// Makes a device current for the life of this object. (Each thread has a current device; torch's is not ours
// to change.) Sets it even where it is current already: a thread that has used CUDA for nothing else yet,
// such as autograd's, has a current device but no context, and the driver's own functions want one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (cudaGetDevice(&before_) != cudaSuccess) return;
    changed_ = cudaSetDevice(device) == cudaSuccess && before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

[[noreturn]] inline void throw_launch_error(cudaError_t error, const char* op, DType dtype, dim3 grid,
                                            dim3 block, size_t shared_bytes, int device) {
  cudaGetLastError();  // clears it, so that the next call does not report this one's
  const auto triple = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  std::string text = std::string(op) + ": the CUDA kernel for " + name_of(dtype) +
                     " could not be launched with grid " + triple(grid) + ", block " + triple(block) +
                     " and " + std::to_string(shared_bytes) + " bytes of shared memory on device " +
                     std::to_string(device) + ": " + cudaGetErrorName(error) + " (" +
                     cudaGetErrorString(error) + "). ";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    text += "This GPU has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
            " and mvp_ext was built for " MVP_CUDA_ARCHS;
    text += major < 8 ? "; its kernels need 8.0 or newer."
                      : ": install it again with MVP_CUDA_ARCHS=" + std::to_string(major) +
                            std::to_string(minor) + "-real.";
  } else if (error == cudaErrorInsufficientDriver || error == cudaErrorUnsupportedPtxVersion) {
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    text += "The driver serves CUDA " + std::to_string(driver / 1000) + "." +
            std::to_string(driver % 1000 / 10) + " and mvp_ext was built with " +
            std::to_string(runtime / 1000) + "." + std::to_string(runtime % 1000 / 10) +
            ": update the driver, or install mvp_ext with an older nvcc.";
  } else {
    text +=
        "If an earlier kernel failed, this is its echo: run again with CUDA_LAUNCH_BLOCKING=1 to see which.";
  }
  throw std::runtime_error(text);
}

// Where a kernel runs: the device's index and torch's current stream there.
struct Queue {
  int device;
  cudaStream_t stream;
  Queue(int device, uint64_t stream) : device(device), stream(reinterpret_cast<cudaStream_t>(stream)) {}
};

struct Shape {
  dim3 grid, block;
  size_t shared_bytes = 0;
};

// Enqueues a kernel; a grid without blocks is nothing to do. `op` and `dtype` are for the error message.
template <typename... Params, typename... Args>
void launch(const char* op, DType dtype, const Queue& queue, const Shape& shape, void (*kernel)(Params...),
            Args&&... args) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  const DeviceGuard guard(queue.device);
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > size_t{48} << 10)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shape.shared_bytes));
  if (error == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = queue.stream;
    error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  }
  if (error != cudaSuccess)
    throw_launch_error(error, op, dtype, shape.grid, shape.block, shape.shared_bytes, queue.device);
}

inline int multiprocessors(int device) {
  int count = 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess && count > 0
             ? count
             : 1;
}

// Calls f with a value of the type that stands for the dtype; false for others than float32, float16 and
// bfloat16.
template <typename F>
bool with_float_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{}), true;
    case DType::f16:
      return f(F16{}), true;
    case DType::bf16:
      return f(Bf16{}), true;
    default:
      return false;
  }
}

// ---------------------------------------------------------------- device
// Sums over the warp, in a fixed order; every lane gets the result.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

}  // namespace mvp::cuda
