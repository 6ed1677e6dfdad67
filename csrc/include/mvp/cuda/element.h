// Half types as the CUDA kernels see them in memory; arithmetic is in float32. No CUDA header, so that the
// emulator shares them.
#pragma once

#include <cstdint>

namespace mvp::cuda {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <typename T>
constexpr bool is_bf16 = false;
template <>
inline constexpr bool is_bf16<Bf16> = true;

// 16 bytes: what a thread moves at once.
template <typename T>
struct alignas(16) Vec16 {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

}  // namespace mvp::cuda
