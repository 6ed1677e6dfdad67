// Runs CUDA kernels on the CPU, one block at a time, and is stricter than a GPU.
//
// Each thread of a block is a fiber. It runs until it meets the others (a barrier, a shuffle, a vote, a
// matrix instruction) and goes on when all that must come have come; so whatever two threads do to shared
// memory between two meetings happens in an order that a seed decides, and a missing barrier changes a
// result. Reported as a Fault: a meeting that only part of a warp or block can reach, or that its threads
// reach at different places; asynchronous copies that nobody waits for; misaligned vectors; too much shared
// memory. Shared memory starts as NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The running thread's; the engine sets them whenever it switches.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kPayload = 64;  // bytes a lane brings to a meeting, at most

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct alignas(16) Slot {
  unsigned char bytes[kPayload];
  template <typename T>
  T as() const {
    static_assert(sizeof(T) <= kPayload);
    T value;
    __builtin_memcpy(&value, bytes, sizeof value);
    return value;
  }
};

// 0: threads and blocks in order; 1: in reverse; any other: at random, the same for the same seed.
void set_schedule(uint64_t seed);

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// What kernels call, through the stand-in headers.
void* shared_memory();
void sync_block(const char* where);
int count_block(bool condition, const char* where);  // a barrier, too
const Slot* meet_warp(uint32_t mask, const char* where, const void* payload, size_t bytes);
int lane();
void yield();  // let others go first, if the schedule wants
void copy_async(void* shared, const void* global, size_t bytes, bool valid);
void commit_copies();
void wait_for_copies(int groups_left);
// Copies that were waited for must be fenced before a matrix instruction reads them (fence.proxy.async).
void fence_copies();
void check_fenced();
// Work that happens at some time between now and the wait for its group: matrix instructions of Hopper.
void defer(std::function<void()> work);
void commit_deferred();
void wait_for_deferred(int groups_left);
// Barriers in shared memory (mbarrier), which the engine keeps in their 8 bytes.
void init_barrier(uint64_t* barrier, unsigned arrivals);
void arrive(uint64_t* barrier, unsigned bytes_to_come);
void arrive_after_copies(uint64_t* barrier);  // some time after the thread's asynchronous copies are there
void wait_for_phase(const uint64_t* barrier, unsigned parity, const char* where);
// A copy of `bytes` by nobody's hand: `work` happens at some time, and then they arrive at the barrier.
void copy_bulk(uint64_t* barrier, void* shared, size_t bytes, std::function<void()> work);
extern int64_t boxes_copied;          // by copy_bulk; for tests
void sync_some(int id, int threads);  // a barrier of as many threads
int linear_thread();
[[noreturn]] void fault(const std::string& what);
void check_aligned(const void* pointer, size_t bytes, const char* what);

template <typename T>
const Slot* meet_warp(uint32_t mask, const char* where, const T& payload) {
  static_assert(sizeof(T) <= kPayload);
  return meet_warp(mask, where, &payload, sizeof payload);
}

}  // namespace emulator
