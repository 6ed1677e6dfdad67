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

inline const char* name_of(DType dtype) {
  static const char* const names[] = {"float32", "float16", "bfloat16", "float64",
                                      "int32",   "int64",   "uint8",    "bool"};
  return names[static_cast<int>(dtype)];
}

inline bool is_floating(DType dtype) {
  return dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16 || dtype == DType::f64;
}

constexpr int kMaxDims = 6;

// Where tensors lie: DLPack's kind of device (1: CPU, 2: CUDA), and which of them.
struct Where {
  int32_t type = 1;
  int32_t index = 0;
};

struct TensorView {
  void* data = nullptr;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements
  int32_t ndim = -1;              // -1: no tensor (Python's None)
  DType dtype = DType::f32;
  Where where;
  // Not null: no kernel may touch this tensor, and this is what was expected instead. See mvp/arguments.h.
  const char* fault = nullptr;

  bool defined() const { return ndim >= 0; }

  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < ndim; ++d) n *= shape[d];
    return n;
  }

  // Of a dense tensor: channels_last, and so that it makes a difference.
  bool columns_innermost() const {
    return ndim == 4 && stride[1] == 1 && shape[1] > 1 && shape[2] * shape[3] > 1;
  }

  template <typename T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
};

}  // namespace mvp
