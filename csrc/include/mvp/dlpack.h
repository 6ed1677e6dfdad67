// What is used of DLPack's C exchange API (https://dmlc.github.io/dlpack, version 1.3), by which a tensor's
// fields are read without a Python call. A fixed ABI, so neither torch's headers nor its version matter here.
#pragma once

#include <cstdint>

namespace mvp::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1, kCuda = 2;  // of Tensor::device_type
enum Code : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void (*managed_tensor_functions[3])();
  int (*read)(void* object, Tensor* out);  // borrows; 0, or −1 with a Python error set
  void (*current_work_stream)();
};

}  // namespace mvp::dlpack
