// One float vector per instruction set, and the few operations on it that C++ does not spell.
//
// Include it from a kernel only: everything lives in an unnamed namespace inside the instruction set's own,
// so that the copies of a kernel never share a function. Arithmetic (+, *) works on Vec directly; half types
// are widened on load and rounded to nearest even on store.
#pragma once

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include <cstdint>
#include <cstring>
#include <utility>

namespace mvp::MVP_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// Minus, not plus: x − 0 is x for every x, so the compiler drops it; −0 + 0 is not.
inline Vec broadcast(float value) { return value - Vec{}; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Bits load_widened(const uint16_t* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, Bits);
}

inline Vec load(const Bf16* p) { return bit_cast<Vec>(load_widened(&p->bits) << 16); }

inline Vec load(const F16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // Exponent and mantissa moved to float's place and scaled by 2^112: right for subnormals too. Inf and NaN
  // keep an all-ones exponent.
  const Bits h = load_widened(&p->bits);
  const Bits magnitude = (h & 0x7fff) << 13;
  const Bits scaled = bit_cast<Bits>(bit_cast<Vec>(magnitude) * 0x1p112f);
  const Bits special = bit_cast<Bits>(magnitude >= 0x0f800000u);
  return bit_cast<Vec>(((h & 0x8000) << 16) | scaled | (special & 0x7f800000u));
#endif
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline void store(Bf16* p, Vec v) {
  const Bits bits = bit_cast<Bits>(v);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits is_nan = bit_cast<Bits>(v != v);
  const Halves h = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), Halves);
  std::memcpy(p, &h, sizeof h);
}

#if !defined(__F16C__) && !defined(__AVX512F__)
inline uint16_t float_to_half(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), sign = (bits >> 16) & 0x8000,
                 magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000)  // subnormal in half: adding 0.5 leaves the rounded mantissa in the low bits
    return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000));
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}
#endif

inline void store(F16* p, Vec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

// The first n lanes only: for the ends of rows. Other lanes are read as 0.
template <typename T>
inline Vec load(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T part[kLanes] = {};
  std::memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  return load(part);
}

#if defined(__AVX512F__)
inline Vec load(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(n >= kLanes ? 0xffff : (1u << n) - 1), p);
}
#endif

template <typename T>
inline void store(T* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T part[kLanes];
  store(part, v);
  std::memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
}

template <typename T>
inline float to_float(T value) {
  T part[kLanes] = {value};
  return load(part)[0];
}
inline float to_float(float value) { return value; }

// Lanes of `first` before lane n, of `others` from it on.
inline Vec join(int64_t n, Vec first, Vec others) {
#if defined(__AVX512F__)
  return _mm512_mask_mov_ps(others, static_cast<__mmask16>((1u << n) - 1), first);
#else
  Bits lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = static_cast<uint32_t>(l);
  const Bits is_first = bit_cast<Bits>(lane < static_cast<uint32_t>(n));
  return bit_cast<Vec>((bit_cast<Bits>(first) & is_first) | (bit_cast<Bits>(others) & ~is_first));
#endif
}

// a · b + c, fused where the machine can (the build has contraction off).
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

#if defined(__AVX512F__)
// Whether the machine has add_pairs(), which is not part of this build's instruction set.
inline bool have_pairs() {
  static const bool have = __builtin_cpu_supports("avx512bf16");
  return have;
}

// sum + the products of a's and b's bfloat16, of two neighbours in each lane. Numbers below the smallest
// normal one count as 0. Written out: the intrinsic would take the functions around it out of this build's
// instruction set, and so out of line.
inline Vec add_pairs(__m512i a, __m512i b, Vec sum) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
#endif

// Lanes of a and b, numbered through, in the order that a rule of the result's lane gives.
template <typename Rule, size_t... I>
inline Vec pick(Vec a, Vec b, std::index_sequence<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Rule::from(int(I))...);
#else
  typedef int32_t Index __attribute__((vector_size(4 * kLanes)));
  return __builtin_shuffle(a, b, Index{Rule::from(int(I))...});
#endif
}
template <typename Rule>
inline Vec pick(Vec a, Vec b) {
  return pick<Rule>(a, b, std::make_index_sequence<kLanes>());
}

// The lanes of a and b in turn, of their lower (Half = 0) or upper halves.
template <int Half>
struct Zip {
  static constexpr int from(int i) { return i % 2 * kLanes + i / 2 + Half * kLanes / 2; }
};
// The same within each 128 bits, for units of Unit lanes.
template <int Half, int Unit>
struct ZipQuads {
  static constexpr int from(int i) {
    const int unit = i % 4 / Unit;
    return i / 4 * 4 + i % Unit + (unit % 2 * kLanes) + (unit / 2 + Half * (2 / Unit)) * Unit;
  }
};
// The even (Odd = 0) or odd 128 bits of a, then those of b.
template <int Odd>
struct Quads {
  static constexpr int from(int i) { return i / 4 * 8 + Odd * 4 + i % 4; }
};

// kLanes × kLanes transpose: of the 4 × 4 blocks within 128 bits (one instruction a step on every x86), then
// of the blocks. After the first two steps, vector 4g + c holds in quad q column 4q + c of the rows 4g to 4g
// + 3.
inline void transpose(Vec (&rows)[kLanes]) {
  Vec blocks[kLanes];
  for (int g = 0; g < kLanes; g += 4) {
    const Vec low[2] = {pick<ZipQuads<0, 1>>(rows[g], rows[g + 1]),
                        pick<ZipQuads<0, 1>>(rows[g + 2], rows[g + 3])};
    const Vec high[2] = {pick<ZipQuads<1, 1>>(rows[g], rows[g + 1]),
                         pick<ZipQuads<1, 1>>(rows[g + 2], rows[g + 3])};
    blocks[g] = pick<ZipQuads<0, 2>>(low[0], low[1]);
    blocks[g + 1] = pick<ZipQuads<1, 2>>(low[0], low[1]);
    blocks[g + 2] = pick<ZipQuads<0, 2>>(high[0], high[1]);
    blocks[g + 3] = pick<ZipQuads<1, 2>>(high[0], high[1]);
  }
  for (int c = 0; c < 4; ++c) {
#if defined(__AVX512F__)
    const Vec even[2] = {pick<Quads<0>>(blocks[c], blocks[4 + c]),
                         pick<Quads<0>>(blocks[8 + c], blocks[12 + c])};
    const Vec odd[2] = {pick<Quads<1>>(blocks[c], blocks[4 + c]),
                        pick<Quads<1>>(blocks[8 + c], blocks[12 + c])};
    rows[c] = pick<Quads<0>>(even[0], even[1]);
    rows[4 + c] = pick<Quads<0>>(odd[0], odd[1]);
    rows[8 + c] = pick<Quads<1>>(even[0], even[1]);
    rows[12 + c] = pick<Quads<1>>(odd[0], odd[1]);
#elif defined(__AVX2__)
    rows[c] = pick<Quads<0>>(blocks[c], blocks[4 + c]);
    rows[4 + c] = pick<Quads<1>>(blocks[c], blocks[4 + c]);
#else
    rows[c] = blocks[c];
#endif
  }
}

// Lane i of the result is the sum of the lanes of v[i], in a fixed order: of n vectors, those n / 2 apart are
// brought into one. By recursion, not a loop, so that all of it happens in registers.
template <int n = kLanes, int step = 1>
inline Vec sum_each(const Vec* v) {
  if constexpr (n == 1) {
    return *v;
  } else {
    const Vec a = sum_each<n / 2, 2 * step>(v), b = sum_each<n / 2, 2 * step>(v + step);
    return pick<Zip<0>>(a, b) + pick<Zip<1>>(a, b);
  }
}

}  // namespace
}  // namespace mvp::MVP_ISA
