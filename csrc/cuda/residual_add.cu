// out = act(residual + scatter(y · scale + shift → channels index)),   act: none or ReLU; NaN stays NaN
//
// Two layouts of residual and out, both dense, as on the CPU:
//   planar       [outer, C, inner]: y is [outer, K, inner]. A thread writes 16 bytes of out; where a plane is
//   not a
//                whole number of such vectors, they run over the borders of planes and y is read element by
//                element.
//   interleaved  [rows, C]: y is [rows, K]. A thread keeps its few channels (where they lie in y, scale,
//   shift) in
//                registers and walks down the rows.
// Each block first turns the index around in shared memory (channel → position in y). Bytes moved: residual
// and y are read once, out is written once. Arithmetic in float32, rounded once.
#include "common.cuh"
#include "mvp/cuda_ops.h"

namespace mvp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxPlanarChannels = 50000;  // their positions fill the shared memory of a block

struct Problem {
  const void *residual, *y;
  void* out;
  const void* index;  // null: all channels
  const float *scale, *shift;
  int64_t outer, channels, kept, inner;
  bool wide_index, relu;
};

__device__ __forceinline__ int64_t index_at(const Problem& problem, int64_t k) {
  if (problem.wide_index) return static_cast<const int64_t*>(problem.index)[k];
  return static_cast<const int32_t*>(problem.index)[k];
}

// Where channels [first, first + count) lie in y; −1: removed.
__device__ void find_positions(const Problem& problem, int64_t first, int count, int* position) {
  for (int c = threadIdx.x; c < count; c += kThreads)
    position[c] = problem.index == nullptr ? static_cast<int>(first) + c : -1;
  __syncthreads();
  if (problem.index == nullptr) return;
  for (int64_t k = threadIdx.x; k < problem.kept; k += kThreads) {
    const int64_t c = index_at(problem, k);
    require(c >= 0 && c < problem.channels, "residual_add: index: a value out of range");
    if (c >= first && c < first + count) position[c - first] = static_cast<int>(k);
  }
  __syncthreads();
  for (int64_t k = threadIdx.x; k < problem.kept; k += kThreads) {
    const int64_t c = index_at(problem, k);
    if (c >= first && c < first + count)
      require(position[c - first] == k, "residual_add: index: a value that comes twice");
  }
}

struct Affine {
  float scale = 1.0f, shift = 0.0f;
  __device__ Affine(const Problem& problem, int position) {
    if (position >= 0 && problem.scale != nullptr) scale = problem.scale[position];
    if (position >= 0 && problem.shift != nullptr) shift = problem.shift[position];
  }
  Affine() = default;
  // Product and sum round one by one, as on the CPU.
  template <typename T>
  __device__ __forceinline__ float apply(T y) const {
    return __fadd_rn(__fmul_rn(to_float(y), scale), shift);
  }
};

__device__ __forceinline__ float activate(float x, bool relu) {
  return relu && x < 0.0f ? 0.0f : x;  // NaN is not below zero
}

// Index: uint32_t where all elements can be counted with it: 64-bit divisions would take longer than the
// memory.
template <typename T, typename Index, bool kWholeVectors>
__global__ void __launch_bounds__(kThreads) add_planes(const __grid_constant__ Problem problem) {
  constexpr int kVector = Vec16<T>::kSize;
  int* position = dynamic_shared<int>();
  find_positions(problem, 0, static_cast<int>(problem.channels), position);
  const T* residual = static_cast<const T*>(problem.residual);
  const T* y = static_cast<const T*>(problem.y);
  T* out = static_cast<T*>(problem.out);
  const Index inner = static_cast<Index>(problem.inner), channels = static_cast<Index>(problem.channels);
  const Index total = static_cast<Index>(problem.outer) * channels * inner;
  const Index step = static_cast<Index>(gridDim.x) * kThreads;
  for (Index vector = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
       vector < ceil_div(total, kVector); vector += step) {
    const Index first = vector * kVector;
    Index plane = first / inner, at = first - plane * inner;
    Index example = plane / channels, channel = plane - example * channels;
    int from = position[channel];
    Affine affine(problem, from);
    const auto y_offset = [&] {
      return (static_cast<int64_t>(example) * problem.kept + from) * problem.inner + static_cast<int64_t>(at);
    };
    if constexpr (kWholeVectors) {
      Vec16<T> stream = load16_once(residual + first), term{};
      if (from >= 0) term = load16_once(y + y_offset());
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        float sum = to_float(stream.at[i]);
        if (from >= 0) sum += affine.apply(term.at[i]);
        stream.at[i] = from_float<T>(activate(sum, problem.relu));
      }
      store16(out + first, stream);
    } else {
      const bool whole = first + kVector <= total;
      Vec16<T> stream{};
      if (whole) {
        stream = load16_once(residual + first);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          if (first + i < total) stream.at[i] = residual[first + i];
      }
      // All loads of y first, so that they are under way together. −0 is what changes nothing when it is
      // added.
      float term[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const bool here = first + i < total;
        term[i] = -0.0f;
        if (here && from >= 0) term[i] = affine.apply(y[y_offset()]);
        if (++at == inner) {
          at = 0;
          if (++channel == channels) channel = 0, ++example;
          if (here) {
            from = position[channel];
            affine = Affine(problem, from);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        stream.at[i] = from_float<T>(activate(to_float(stream.at[i]) + term[i], problem.relu));
      if (whole) {
        store16(out + first, stream);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i)
          if (first + i < total) out[first + i] = stream.at[i];
      }
    }
  }
}

// kVector channels a thread: 16 bytes where rows are whole vectors, else one.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    add_rows(const __grid_constant__ Problem problem, int threads_a_row) {
  int* position = dynamic_shared<int>();
  const int64_t first_channel = int64_t{blockIdx.y} * threads_a_row * kVector;
  const int64_t left = problem.channels - first_channel;
  const int count = static_cast<int>(min(left, int64_t{threads_a_row} * kVector));
  find_positions(problem, first_channel, count, position);
  const int column = static_cast<int>(threadIdx.x) % threads_a_row * kVector;
  const int rows_a_step = kThreads / threads_a_row,
            row_in_step = static_cast<int>(threadIdx.x) / threads_a_row;
  if (column >= count || row_in_step >= rows_a_step) return;
  int from[kVector];
  Affine affine[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    from[i] = position[column + i];
    affine[i] = Affine(problem, from[i]);
  }
  const int64_t step = int64_t{gridDim.x} * rows_a_step;
  for (int64_t row = int64_t{blockIdx.x} * rows_a_step + row_in_step; row < problem.outer; row += step) {
    const T* y = static_cast<const T*>(problem.y) + row * problem.kept;
    const int64_t at = row * problem.channels + first_channel + column;
    Vec16<T> stream;
    if constexpr (kVector > 1)
      stream = load16_once(static_cast<const T*>(problem.residual) + at);
    else
      stream.at[0] = static_cast<const T*>(problem.residual)[at];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      float sum = to_float(stream.at[i]);
      if (from[i] >= 0) sum += affine[i].apply(y[from[i]]);
      stream.at[i] = from_float<T>(activate(sum, problem.relu));
    }
    if constexpr (kVector > 1)
      store16(static_cast<T*>(problem.out) + at, stream);
    else
      static_cast<T*>(problem.out)[at] = stream.at[0];
  }
}

bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <typename T, typename Index>
void launch_planes(const Problem& problem, DType dtype, const Queue& queue) {
  const int64_t inner = problem.inner, total = problem.outer * problem.channels * inner;
  const int64_t blocks = ceil_div(ceil_div(total, Vec16<T>::kSize), kThreads);
  // A few waves of blocks, so that turning the index around is paid by more than one vector a thread.
  const int64_t most = int64_t{multiprocessors(queue.device)} * 16;
  const Shape shape{dim3(static_cast<unsigned>(std::min(blocks, most))), dim3(kThreads),
                    static_cast<size_t>(problem.channels) * sizeof(int)};
  if (inner % Vec16<T>::kSize == 0 && aligned16(problem.y))
    launch("residual_add", dtype, queue, shape, &add_planes<T, Index, true>, problem);
  else
    launch("residual_add", dtype, queue, shape, &add_planes<T, Index, false>, problem);
}

template <typename T>
void launch_rows(const Problem& problem, DType dtype, const Queue& queue) {
  const bool vectors = problem.channels % Vec16<T>::kSize == 0;
  const int vector = vectors ? Vec16<T>::kSize : 1;
  const int threads_a_row = static_cast<int>(std::min<int64_t>(problem.channels / vector, kThreads));
  const int64_t steps = ceil_div(problem.outer, int64_t{kThreads / threads_a_row});
  const int64_t chunks = ceil_div(problem.channels / vector, int64_t{threads_a_row});
  MVP_CHECK(chunks <= 65535, "residual_add", "more channels than a grid has room for");
  const int64_t most = std::max<int64_t>(int64_t{multiprocessors(queue.device)} * 16 / chunks, 1);
  const Shape shape{dim3(static_cast<unsigned>(std::min(steps, most)), static_cast<unsigned>(chunks)),
                    dim3(kThreads), static_cast<size_t>(threads_a_row * vector) * sizeof(int)};
  if (vectors)
    launch("residual_add", dtype, queue, shape, &add_rows<T, Vec16<T>::kSize>, problem, threads_a_row);
  else
    launch("residual_add", dtype, queue, shape, &add_rows<T, 1>, problem, threads_a_row);
}

}  // namespace
}  // namespace mvp::cuda

namespace mvp {

void residual_add_cuda(const TensorView& residual, const TensorView& y, const TensorView& index,
                       const TensorView& scale, const TensorView& shift, bool relu, int64_t dim,
                       const TensorView& out, int device, uint64_t stream) {
  using namespace cuda;
  const Where where = where_of(device);
  check_residual_add(where, residual, y, index, scale, shift, dim, out);
  Argument("residual_add", where, "index", index).need_dense(false);
  Argument("residual_add", where, "scale", scale).need_dense(false);
  Argument("residual_add", where, "shift", shift).need_dense(false);
  MVP_CHECK(aligned16(residual.data) && aligned16(out.data), "residual_add",
            "residual and out must start at a multiple of 16 bytes");
  const int64_t channels = residual.shape[dim], kept = y.shape[dim];
  if (residual.numel() == 0) return;
  Problem problem{};
  problem.residual = residual.data;
  problem.y = y.data;
  problem.out = out.data;
  problem.index = index.data;
  problem.wide_index = index.defined() && index.dtype == DType::i64;
  problem.scale = scale.ptr<float>();
  problem.shift = shift.ptr<float>();
  problem.relu = relu;
  problem.channels = channels;
  problem.kept = kept;
  // An index that keeps nothing has no address, and without an address all would be kept.
  if (index.defined() && kept == 0) problem.index = residual.data;
  const bool interleaved = residual.stride[dim] == 1 || channels == 1;
  problem.inner = 1;
  if (!interleaved)
    for (int d = static_cast<int>(dim) + 1; d < residual.ndim; ++d) problem.inner *= residual.shape[d];
  problem.outer = residual.numel() / channels / problem.inner;
  const Queue queue(device, stream);
  const bool known = with_float_type(residual.dtype, [&](auto type) {
    using T = decltype(type);
    if (problem.inner == 1) return launch_rows<T>(problem, residual.dtype, queue);
    MVP_CHECK(channels <= kMaxPlanarChannels, "residual_add", "at most 50000 channels of planes");
    if (residual.numel() < int64_t{1} << 31)
      launch_planes<T, uint32_t>(problem, residual.dtype, queue);
    else
      launch_planes<T, uint64_t>(problem, residual.dtype, queue);
  });
  MVP_CHECK(known, "residual_add", "expected float32, float16 or bfloat16");
}

}  // namespace mvp
