// The emulator's twin of csrc/include/mvp/cuda/wgmma.cuh. A matrix instruction reads shared memory at some
// time between its issue and its wait: here at either end, as the schedule decides, so that whoever
// overwrites too early, or hands over too late, changes a result.
#pragma once

#include <memory>
#include <vector>

#include "mvp/cuda/intrinsics.cuh"

namespace mvp::cuda {

inline uint64_t describe_tile(const void* start, uint32_t group_bytes, uint32_t repeat_bytes) {
  const auto offset = static_cast<const char*>(start) - static_cast<const char*>(emulator::shared_memory());
  emulator::check_aligned(start, 16, "describes a tile at");
  return (uint64_t(offset) & 0x3FFFF) >> 4 | (uint64_t{repeat_bytes} >> 4) << 16 |
         (uint64_t{group_bytes} >> 4) << 32 | uint64_t{1} << 62;
}

inline void fence_for_wgmma() { emulator::fence_copies(); }
inline void wgmma_begin() {}
inline void wgmma_hold(float (&)[64]) {}
inline void wgmma_commit() { emulator::commit_deferred(); }
template <int kGroups>
void wgmma_wait() {
  emulator::wait_for_deferred(kGroups);
  emulator::meet_warp(0xFFFFFFFF, "the wait for matrix instructions", 0);  // .sync.aligned
}

template <typename T, bool kRowsAreK>
void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  emulator::check_fenced();
  const auto field = [](uint64_t descriptor, int shift) { return (descriptor >> shift & 0x3FFF) << 4; };
  const auto element = [](uint64_t address) {
    T value;
    address ^= (address >> 7 & 7) << 4;
    std::memcpy(&value, static_cast<const char*>(emulator::shared_memory()) + address, sizeof value);
    return to_float(value);
  };
  const auto along_k = [=](uint64_t tile, int row, int k) {
    return element(field(tile, 0) + uint64_t(row / 8) * field(tile, 32) + uint64_t(row % 8 * 128 + k * 2));
  };
  const auto along_n = [=](uint64_t tile, int n, int k) {
    return element(field(tile, 0) + uint64_t(n / 64) * field(tile, 16) + uint64_t(k / 8) * field(tile, 32) +
                   uint64_t(k % 8 * 128 + n % 64 * 2));
  };
  const int thread = emulator::linear_thread() % 128;
  float* out = d;
  emulator::defer([=] {
    for (int i = 0; i < 64; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8,
                column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k)
        sum += along_k(a, row, k) * (kRowsAreK ? along_n(b, column, k) : along_k(b, column, k));
      out[i] = accumulate ? out[i] + sum : sum;
    }
  });
}

}  // namespace mvp::cuda
