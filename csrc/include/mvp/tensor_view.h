// A tensor as the kernels see it: a pointer, a type, sizes and strides. No torch, no ownership.
#pragma once

#include <cstdint>

namespace mvp {

enum class DType : int32_t { f32, f16, bf16, f64, i32, i64, u8, boolean };

inline int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::f64:
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::f16:
    case DType::bf16:
      return 2;
    default:
      return 1;
  }
}

constexpr int kMaxDims = 6;

struct TensorView {
  void* data = nullptr;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements
  int32_t ndim = -1;              // -1: no tensor (Python's None)
  DType dtype = DType::f32;

  bool defined() const { return ndim >= 0; }

  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }

  template <typename T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

}  // namespace mvp
