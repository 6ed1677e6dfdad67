// The emulator's twin of csrc/include/mvp/cuda/intrinsics.cuh: the same names and meaning on a CPU, and
// stricter.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "mvp/cuda/element.h"

namespace mvp::cuda {

inline float to_float(float x) { return x; }
inline float to_float(double x) { return static_cast<float>(x); }
inline float to_float(Bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
inline float to_float(F16 x) {
  const int sign = x.bits >> 15, exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float magnitude =
      std::ldexp(static_cast<float>(exponent ? mantissa | 1024 : mantissa), std::max(exponent, 1) - 25);
  if (exponent == 31) magnitude = mantissa ? NAN : INFINITY;
  return sign ? -magnitude : magnitude;
}

template <typename T>
T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    const uint32_t bits = __float_as_uint(x);
    if (x != x) return T{0x7FFF};
    return T{static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
  }
}
template <>
inline double from_float<double>(float x) {
  return x;
}
template <>
inline F16 from_float<F16>(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (x != x) return {0x7FFF};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  if (magnitude == 0.0f) return {sign};
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int unit = std::max(exponent - 11, -24);  // of the last place
  // nearbyint rounds to even; a carry into the next exponent comes out right by itself.
  const int mantissa = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -unit)));
  return {static_cast<uint16_t>(sign | (mantissa + (unit + 24) * 1024))};
}

inline void require(bool condition, const char* what) {
  if (!condition) emulator::fault(std::string("finds an error: ") + what);
}

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(emulator::shared_memory());
}

template <typename T>
Vec16<T> load16(const T* p) {
  emulator::check_aligned(p, 16, "reads 16 bytes at");
  Vec16<T> v;
  std::memcpy(&v, p, 16);
  return v;
}

template <typename T>
Vec16<T> load16_once(const T* p) {
  return load16(p);
}

template <typename T>
void store16(T* p, const Vec16<T>& v) {
  emulator::check_aligned(p, 16, "writes 16 bytes at");
  std::memcpy(p, &v, 16);
}

inline void cp_async16(void* shared, const void* global, bool valid = true) {
  emulator::copy_async(shared, global, 16, valid);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kGroups>
void cp_async_wait() {
  emulator::wait_for_copies(kGroups);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  emulator::check_aligned(row, 16, "loads a matrix row from");
  const emulator::Slot* slots = emulator::meet_warp(0xFFFFFFFF, "ldmatrix", row);
  const int lane = emulator::lane();
  for (int m = 0; m < 4; ++m)
    std::memcpy(&r[m], static_cast<const char*>(slots[8 * m + lane / 4].as<const void*>()) + 4 * (lane % 4),
                4);
  emulator::meet_warp(0xFFFFFFFF, "the end of ldmatrix", 0);  // nobody may overwrite what another still reads
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  emulator::check_aligned(row, 16, "loads a matrix row from");
  const emulator::Slot* slots = emulator::meet_warp(0xFFFFFFFF, "ldmatrix.trans", row);
  const int lane = emulator::lane();
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i)
      std::memcpy(
          &pair[i],
          static_cast<const char*>(slots[8 * m + 2 * (lane % 4) + i].as<const void*>()) + 2 * (lane / 4), 2);
    std::memcpy(&r[m], pair, 4);
  }
  emulator::meet_warp(0xFFFFFFFF, "the end of ldmatrix.trans", 0);
}

template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    T a[4][2], b[2][2];
  } mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  const emulator::Slot* slots = emulator::meet_warp(0xFFFFFFFF, "mma", mine);
  const int g = emulator::lane() / 4, p = emulator::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row_half = i / 2, column = 2 * p + i % 2;
    float sum = 0;
    for (int k = 0; k < 16;
         ++k) {  // lane 4 · row + k % 8 / 2 holds a[row][k], lane 4 · column + … b[k][column]
      const auto left = slots[4 * g + k % 8 / 2].as<Operands>(),
                 right = slots[4 * column + k % 8 / 2].as<Operands>();
      sum += to_float(left.a[k / 8 * 2 + row_half][k % 2]) * to_float(right.b[k / 8][k % 2]);
    }
    d[i] += sum;
  }
}

}  // namespace mvp::cuda
