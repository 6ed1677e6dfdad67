// The emulator's twin of csrc/include/mvp/cuda/pipeline.cuh. A box arrives at some time between its copy's
// issue and the end of the barrier's phase, as the schedule decides; until then its place holds NaN.
#pragma once

#include "mvp/cuda/intrinsics.cuh"

namespace mvp::cuda {

struct alignas(8) Barrier {
  uint64_t state;
};

inline void init_barrier(Barrier& barrier, unsigned arrivals) {
  emulator::init_barrier(&barrier.state, arrivals);
}
inline void fence_barriers() {}
inline void arrive(Barrier& barrier) { emulator::arrive(&barrier.state, 0); }
inline void arrive_and_expect(Barrier& barrier, unsigned bytes) { emulator::arrive(&barrier.state, bytes); }
inline void arrive_after_copies(Barrier& barrier) { emulator::arrive_after_copies(&barrier.state); }
inline void wait(const Barrier& barrier, unsigned parity) {
  emulator::wait_for_phase(&barrier.state, parity, "a barrier in shared memory");
}

template <int kId, int kThreads>
void sync_some() {
  emulator::sync_some(kId, kThreads);
}

struct alignas(64) BoxedMatrix {
  const uint16_t* base;
  int64_t rows, columns, stride;
  unsigned box_rows;
};

inline BoxedMatrix make_boxed_matrix(const void* base, int64_t rows, int64_t columns, int64_t stride,
                                     unsigned box_rows) {
  const bool right = reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride % 8 == 0 && columns <= stride &&
                     columns > 0 && rows > 0 && rows <= int64_t{1} << 32 && box_rows <= 256;
  if (!right) throw emulator::Fault("a matrix that cannot be read in boxes");
  return {static_cast<const uint16_t*>(base), rows, columns, stride, box_rows};
}

inline void prefetch_matrix(const BoxedMatrix&) {}

inline void copy_box(void* shared, const BoxedMatrix& matrix, int row, int column, Barrier& barrier) {
  emulator::check_aligned(shared, 1024, "copies a box to");
  const size_t bytes = size_t{matrix.box_rows} * 128;
  emulator::copy_bulk(&barrier.state, shared, bytes, [=] {
    for (int64_t r = 0; r < matrix.box_rows; ++r)
      for (int64_t c = 0; c < 64; ++c) {
        const int64_t at_row = row + r, at_column = column + c;
        const bool inside =
            at_row >= 0 && at_row < matrix.rows && at_column >= 0 && at_column < matrix.columns;
        const uint16_t value = inside ? matrix.base[at_row * matrix.stride + at_column] : uint16_t{0};
        std::memcpy(static_cast<char*>(shared) + r * 128 + ((c / 8) ^ (r % 8)) * 16 + c % 8 * 2, &value, 2);
      }
  });
}

}  // namespace mvp::cuda
