// Counter-based Gumbel noise, the same bits on every instruction set and device, and in
// mvp_ext/ops/philox.py.
//
//   words(block, stream) = Philox4x32-10, counter (block, stream, 0, 0), key = the 64 bits of the seed
//   unit u of target t takes word u % 4 of words(u / 4, t)
//   U = (word >> 9 + 1/2) · 2⁻²³, exact in float32 and inside (0, 1);   noise = −log(−log U)
//
// Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
// Everything is integer arithmetic or one float32 multiplication or addition at a time: compile without
// contraction
// (-ffp-contract=off, nvcc --fmad=false or the __fmul_rn/__fadd_rn below), or the bits differ.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MVP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MVP_HOST_DEVICE inline __attribute__((always_inline))
#endif

// Static: each instruction set must keep its own copy (see CMakeLists.txt).
namespace mvp {
namespace {

MVP_HOST_DEVICE float rounded_mul(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

MVP_HOST_DEVICE float rounded_add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

MVP_HOST_DEVICE float as_float(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

MVP_HOST_DEVICE int32_t as_bits(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

MVP_HOST_DEVICE void philox4x32(uint32_t block, uint32_t stream, uint64_t seed, uint32_t words[4]) {
  uint32_t c0 = block, c1 = stream, c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// Natural logarithm of a positive normal float, within 1.1 ulp: x = m·2ᵉ with m in [√½, √2), f = m − 1,
// log x = f − f²/2 + f³·P(f) + e·ln 2; P is a Chebyshev fit of our own, ln 2 is split so that e·kLn2High is
// exact.
MVP_HOST_DEVICE float portable_log(float x) {
  constexpr int32_t kSqrtHalf = 0x3F3504F3;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -0.00021219444170128554f;
  const int32_t bits = as_bits(x);
  const int32_t exponent = (bits - kSqrtHalf) >> 23;
  const float f = rounded_add(as_float(bits - exponent * (1 << 23)), -1.0f), e = static_cast<float>(exponent);
  float p = -0.08101558685302734f;
  p = rounded_add(rounded_mul(p, f), 0.12712307274341583f);
  p = rounded_add(rounded_mul(p, f), -0.12972238659858704f);
  p = rounded_add(rounded_mul(p, f), 0.14202174544334412f);
  p = rounded_add(rounded_mul(p, f), -0.16642247140407562f);
  p = rounded_add(rounded_mul(p, f), 0.20001468062400818f);
  p = rounded_add(rounded_mul(p, f), -0.25000298023223877f);
  p = rounded_add(rounded_mul(p, f), 0.333333283662796f);
  const float square = rounded_mul(f, f);
  float sum = rounded_mul(rounded_mul(f, square), p);
  sum = rounded_add(sum, rounded_mul(e, kLn2Low));
  sum = rounded_add(sum, rounded_mul(square, -0.5f));
  sum = rounded_add(sum, f);
  return rounded_add(sum, rounded_mul(e, kLn2High));
}

MVP_HOST_DEVICE float gumbel_from(uint32_t word) {
  const float uniform =
      rounded_mul(rounded_add(static_cast<float>(static_cast<int32_t>(word >> 9)), 0.5f), 0x1p-23f);
  return -portable_log(-portable_log(uniform));
}

}  // namespace
}  // namespace mvp
