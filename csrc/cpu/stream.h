// Copies past the cache: for outputs larger than it, whose lines would otherwise be read before they are
// written and would push everything else out.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mvp::MVP_ISA {
namespace {

constexpr int64_t kLine = 64;

// What a call may write before streaming pays: half of the last level, the other half holds what is read.
inline int64_t streaming_bytes() {
#if defined(_SC_LEVEL3_CACHE_SIZE)
  static const int64_t size = std::max<int64_t>(sysconf(_SC_LEVEL3_CACHE_SIZE), 0);
#else
  static const int64_t size = 0;
#endif
  return size > 0 ? size / 2 : int64_t{16} << 20;
}

// memcpy whose whole lines bypass the cache. The writer must call stream_fence before others may read.
inline void stream_copy(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
  const int64_t head = -reinterpret_cast<intptr_t>(to) & (kLine - 1);
  if (bytes >= head + kLine) {
    std::memcpy(to, from, head);
    to += head;
    from += head;
    bytes -= head;
    for (; bytes >= kLine; bytes -= kLine, to += kLine, from += kLine) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
      for (int i = 0; i < kLine; i += 32)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#else
      for (int i = 0; i < kLine; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
    }
  }
#endif
  std::memcpy(to, from, bytes);
}

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace mvp::MVP_ISA
