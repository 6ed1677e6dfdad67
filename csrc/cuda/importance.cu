// One score a unit from an activation a and its gradient g, both [B, ..., C, ...]; the formula is in
// csrc/cpu/importance.cpp. Two launches:
//
//   sum positions   partial [B, splits, C] float32 ← a, g, read once in 16-byte vectors, several of them
//                   under way in each thread. Three kernels, by layout:
//     rows          positions contiguous (NCHW): 8, 16 or 32 lanes a row, or a warp a piece of a row.
//                   Vectors start at multiples of 16 bytes, wherever the rows do: at a row's ends they hold
//                   elements of its neighbours, which are left out. Short rows go four to a lane.
//     columns       channels contiguous (channels_last, [B, n, C]): a thread keeps a vector of channels and
//                   walks down the positions; a block's threads that share channels meet in shared memory,
//                   and so do the channels of a head, where a block has all of them.
//     strided       anything else: a warp a channel, element by element.
//   add examples    scores [units] ← partial: here the sum s of an example's unit is complete, so |s| or s²
//                   is taken and added up over the batch. From here on float64, as on the CPU.
//
// Long sums are cut so that no chain of float32 additions is longer than 16 or so, and so that a single
// example keeps the whole GPU busy; the cuts depend on the shape alone: the same bits come out every time.
#include <algorithm>
#include <type_traits>

#include "common.cuh"
#include "mvp/cuda_ops.h"

namespace mvp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSlots = 4;  // vectors of a, and as many of g, under way in a thread
constexpr int64_t kMaxCount = int64_t{1} << 30;
// Enough warps, or blocks, for the largest GPU to hide its memory's latency. No property of the device is
// asked for: the sums would depend on it.
constexpr int64_t kEnoughWarps = 4096, kEnoughBlocks = 1024;
constexpr int64_t kMaxSteps = 16;  // of a thread, each kSlots vectors, until its sum is written

enum class Layout { rows, short_rows, columns, strided };

struct Dim {
  uint32_t size;
  int64_t stride;  // in elements
};

struct Problem {
  const void *a, *g;  // of the same strides, and equally far from a multiple of 16 bytes
  float* partial;     // [batch, splits, channels / fold]
  Dim batch, channel, position[kMaxDims - 2];
  int64_t extent;  // elements from the first to the last, of which not all need be the tensor's
  bool even_rows;  // one stride from channel to channel, also into the next example
  uint32_t positions, splits;
  uint32_t fold;   // columns: so many channels are summed up at once, a whole unit's, or 1
  uint32_t piece;  // of a split: vectors (rows), positions (columns, strided)
  int rank;        // of the positions
  int lanes;       // short rows: log₂ of those to a row; columns: vectors of channels to a block
  int chunks;      // columns: blocks beside each other
};

// 16 bytes as they came: elements of two bytes would take a register each.
using Raw = Vec16<uint32_t>;

template <typename T>
__device__ __forceinline__ float element(const Raw& raw, int j) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(raw.at[j]);
  } else {
    const uint32_t word = raw.at[j / 2];
    return to_float(T{static_cast<uint16_t>(j % 2 == 0 ? word : word >> 16)});
  }
}
template <>
__device__ __forceinline__ float element<Bf16>(const Raw& raw, int j) {
  const uint32_t word = raw.at[j / 2];
  return __uint_as_float(j % 2 == 0 ? word << 16 : word & 0xFFFF0000u);
}

template <typename T>
__device__ __forceinline__ Raw load_raw(const T* p) {  // what neighbours read, too: through L1
  return load16(reinterpret_cast<const uint32_t*>(p));
}
template <typename T>
__device__ __forceinline__ Raw load_raw_once(const T* p) {
  return load16_once(reinterpret_cast<const uint32_t*>(p));
}

// Sums of a·g, or of |a|.
template <bool kProduct>
__device__ __forceinline__ float add(float sum, float a, float g) {
  return kProduct ? fmaf(a, g, sum) : sum + fabsf(a);
}

// Of the lanes of a group, 8, 16 or 32, in a fixed order.
__device__ __forceinline__ float group_sum(float value, int lanes) {
  value += __shfl_xor_sync(kAllLanes, value, 4);
  value += __shfl_xor_sync(kAllLanes, value, 2);
  value += __shfl_xor_sync(kAllLanes, value, 1);
  if (lanes > 8) value += __shfl_xor_sync(kAllLanes, value, 8);
  if (lanes > 16) value += __shfl_xor_sync(kAllLanes, value, 16);
  return value;
}

// The terms of a row of `size` elements at positions [from, to), every lanes-th from `lane`.
template <bool kProduct, typename T>
__device__ float sum_elements(const T* a, const T* g, int from, int to, int lane, int lanes) {
  float sums[kSlots] = {};
  for (int p = from + lane; p < to; p += kSlots * lanes) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if (p + i * lanes < to)
        sums[i] = add<kProduct>(sums[i], to_float(a[p + i * lanes]), to_float(g[p + i * lanes]));
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Which elements of a vector that starts at position p are the row's [0, end): a bit each.
template <int kVector>
__device__ __forceinline__ uint32_t valid_bits(int p, int end) {
  const int from = max(-p, 0), to = max(min(end - p, kVector), 0);
  return ((1u << to) - 1) & ~((1u << from) - 1);
}

// Positions contiguous. kShort: `lanes` lanes have a row's vectors, one each, of kSlots rows. Else a warp has
// `piece` vectors of one row.
template <typename T, bool kProduct, bool kShort>
__global__ void __launch_bounds__(kThreads, 3) sum_rows(const __grid_constant__ Problem problem) {
  constexpr int kVector = Vec16<T>::kSize;
  const T* a = static_cast<const T*>(problem.a);
  const T* g = static_cast<const T*>(problem.g);
  const int phase = static_cast<int>(reinterpret_cast<uintptr_t>(a) % 16 / sizeof(T));
  const int size = static_cast<int>(problem.positions);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const uint32_t warp = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  const uint32_t rows = problem.batch.size * problem.channel.size;
  const auto row_start = [&](uint32_t row) {
    if (problem.even_rows) return row * problem.channel.stride;  // a division takes as long as a short row
    const uint32_t b = row / problem.channel.size, c = row - b * problem.channel.size;
    return b * problem.batch.stride + c * problem.channel.stride;
  };
  // The first vector that a row has a part in starts so many elements before it.
  const auto lead = [&](int64_t start) { return (static_cast<int>(start) + phase) & (kVector - 1); };

  if constexpr (kShort) {
    const int lanes = 1 << problem.lanes, rows_at_once = kWarp >> problem.lanes, place = lane & (lanes - 1);
    const uint32_t first_row = warp * kSlots * rows_at_once + (lane >> problem.lanes);
    const uint64_t last_vector = static_cast<uint64_t>(problem.extent - kVector);
    Raw va[kSlots], vg[kSlots];
    uint32_t valid[kSlots];
    bool beyond = false;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const uint32_t row = first_row + i * rows_at_once;
      const int64_t start = row_start(row < rows ? row : 0);
      const int p = place * kVector - lead(start);
      valid[i] = row < rows ? valid_bits<kVector>(p, size) : 0;
      va[i] = vg[i] = Raw{};
      if (valid[i] != 0) {
        const uint64_t at = static_cast<uint64_t>(start + p);
        if (at <= last_vector) {  // what is before the first element is beyond, too
          va[i] = load_raw(a + at);
          if (kProduct) vg[i] = load_raw(g + at);
        } else {
          beyond = true;
        }
      }
    }
    if (__any_sync(kAllLanes, beyond)) {  // one of the two ends of the tensor
#pragma unroll 1
      for (int i = 0; i < kSlots; ++i) {
        const uint32_t row = first_row + i * rows_at_once;
        const int64_t start = row_start(row < rows ? row : 0);
        const float sum = group_sum(
            sum_elements<kProduct>(a + start, g + start, 0, row < rows ? size : 0, place, lanes), lanes);
        if (place == 0 && row < rows) problem.partial[row] = sum;
      }
      return;
    }
    float sum[kSlots] = {};
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
#pragma unroll
      for (int j = 0; j < kVector; ++j)
        if (valid[i] & (1u << j)) sum[i] = add<kProduct>(sum[i], element<T>(va[i], j), element<T>(vg[i], j));
#pragma unroll
    for (int i = 0; i < kSlots; ++i) sum[i] = group_sum(sum[i], lanes);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const uint32_t row = first_row + i * rows_at_once;
      if (place == 0 && row < rows) problem.partial[row] = sum[i];
    }
  } else {
    const uint32_t row = warp / problem.splits, split = warp - row * problem.splits;
    if (row >= rows) return;
    const int64_t start = row_start(row);
    a += start, g += start;
    const int length = static_cast<int>(problem.piece) * kVector,
              begin = static_cast<int>(split) * length - lead(start), end = min(begin + length, size);
    float sum = 0.0f;
    if (start + begin >= 0 && start + begin + ceil_div(end - begin, kVector) * kVector <= problem.extent) {
      for (int p = begin + lane * kVector; p < end; p += kSlots * kWarp * kVector) {
        Raw va[kSlots], vg[kSlots];
        uint32_t valid[kSlots];
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
          const int q = p + i * kWarp * kVector;
          valid[i] = valid_bits<kVector>(q, end);
          va[i] = vg[i] = Raw{};
          if (valid[i] != 0) {
            va[i] = load_raw_once(a + q);
            if (kProduct) vg[i] = load_raw_once(g + q);
          }
        }
        float part[kVector] = {};
#pragma unroll
        for (int i = 0; i < kSlots; ++i)
#pragma unroll
          for (int j = 0; j < kVector; ++j)
            if (valid[i] & (1u << j))
              part[j] = add<kProduct>(part[j], element<T>(va[i], j), element<T>(vg[i], j));
#pragma unroll
        for (int width = kVector / 2; width > 0; width /= 2)
#pragma unroll
          for (int j = 0; j < width; ++j) part[j] += part[j + width];
        sum += part[0];
      }
    } else {
      sum = sum_elements<kProduct>(a, g, max(begin, 0), end, lane, kWarp);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      const uint32_t b = row / problem.channel.size, c = row - b * problem.channel.size;
      problem.partial[(int64_t{b} * problem.splits + split) * problem.channel.size + c] = sum;
    }
  }
}

// Channels contiguous, kVector of them a thread: 16 bytes, or one where rows are not whole vectors.
template <typename T, bool kProduct, int kVector>
__global__ void __launch_bounds__(kThreads, 3) sum_columns(const __grid_constant__ Problem problem) {
  using Loaded = std::conditional_t<(kVector > 1), T, float>;  // single elements are converted at once
  float* sums = dynamic_shared<float>();                       // [rows at once, lanes · kVector]
  const int lanes = problem.lanes, rows_at_once = kThreads / lanes, width = lanes * kVector;
  const int lane = static_cast<int>(threadIdx.x) % lanes, row = static_cast<int>(threadIdx.x) / lanes;
  const uint32_t piece = blockIdx.x / problem.chunks, chunk = blockIdx.x - piece * problem.chunks;
  const uint32_t b = piece / problem.splits, split = piece - b * problem.splits;
  const int64_t first_channel = int64_t{chunk} * width, channel = first_channel + lane * kVector;
  const int64_t stride = problem.position[0].stride;
  if (row < rows_at_once && channel < problem.channel.size) {
    const int64_t origin = b * problem.batch.stride + channel;
    const T* a = static_cast<const T*>(problem.a) + origin;
    const T* g = static_cast<const T*>(problem.g) + origin;
    const int64_t begin = int64_t{split} * problem.piece,
                  end = min(begin + problem.piece, int64_t{problem.positions});
    float total[kVector] = {};
    for (int64_t p = begin + row; p < end; p += kSlots * rows_at_once) {
      Raw va[kSlots], vg[kSlots];
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const int64_t q = p + i * rows_at_once;
        va[i] = vg[i] = Raw{};
        if (q < end) {
          if constexpr (kVector > 1) {
            va[i] = load_raw_once(a + q * stride);
            if (kProduct) vg[i] = load_raw_once(g + q * stride);
          } else {
            va[i].at[0] = __float_as_uint(to_float(a[q * stride]));
            if (kProduct) vg[i].at[0] = __float_as_uint(to_float(g[q * stride]));
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        float part = 0.0f;
#pragma unroll
        for (int i = 0; i < kSlots; ++i)
          part = add<kProduct>(part, element<Loaded>(va[i], j), element<Loaded>(vg[i], j));
        total[j] += part;
      }
    }
#pragma unroll
    for (int j = 0; j < kVector; ++j) sums[row * width + lane * kVector + j] = total[j];
  }
  __syncthreads();
  const int fold = static_cast<int>(problem.fold);
  float* partial = problem.partial + (int64_t{piece} * problem.channel.size + first_channel) / fold;
  const int count = static_cast<int>(min(problem.channel.size - first_channel, int64_t{width}));
  for (int c = static_cast<int>(threadIdx.x); c < count; c += kThreads) {
    float sum = 0.0f;
    for (int r = 0; r < rows_at_once; ++r) sum += sums[r * width + c];
    (fold == 1 ? partial : sums)[c] = sum;
  }
  if (fold == 1) return;
  __syncthreads();
  for (int u = static_cast<int>(threadIdx.x) / kWarp; u < count / fold; u += kThreads / kWarp) {
    float sum = 0.0f;
    for (int c = static_cast<int>(threadIdx.x) % kWarp; c < fold; c += kWarp) sum += sums[u * fold + c];
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) partial[u] = sum;
  }
}

// Any strides: a warp has `piece` positions of one channel of one example.
template <typename T, bool kProduct>
__global__ void __launch_bounds__(kThreads, 3) sum_strided(const __grid_constant__ Problem problem) {
  const T* a = static_cast<const T*>(problem.a);
  const T* g = static_cast<const T*>(problem.g);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const uint32_t warp = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  const uint32_t item = warp / problem.channel.size, c = warp - item * problem.channel.size;
  const uint32_t b = item / problem.splits, split = item - b * problem.splits;
  if (b >= problem.batch.size) return;
  const int64_t origin = b * problem.batch.stride + c * problem.channel.stride;
  const uint32_t begin = split * problem.piece, end = min(begin + problem.piece, problem.positions);
  const auto offset = [&](uint32_t p) {
    int64_t at = origin;
    for (int d = problem.rank - 1; d > 0; --d) {
      const uint32_t outer = p / problem.position[d].size;
      at += (p - outer * problem.position[d].size) * problem.position[d].stride;
      p = outer;
    }
    return at + p * problem.position[0].stride;
  };
  float sum = 0.0f;
  for (uint32_t p = begin + lane; p < end; p += kSlots * kWarp) {
    float part = 0.0f;
#pragma unroll
    for (int i = 0; i < kSlots; ++i)
      if (p + i * kWarp < end) {
        const int64_t at = offset(p + i * kWarp);
        part = add<kProduct>(part, to_float(a[at]), kProduct ? to_float(g[at]) : 0.0f);
      }
    sum += part;
  }
  sum = warp_sum(sum);
  if (lane == 0) problem.partial[int64_t{item} * problem.channel.size + c] = sum;
}

// ---------------------------------------------------------------- over the batch
enum class Kind { taylor, taylor2, activation };

struct Examples {
  const float* partial;  // [batch, splits, units · width]
  float* scores;
  int64_t batch, splits, units, width;
  double divisor;
  Kind kind;
};

__device__ __forceinline__ double of_example(double sum, Kind kind) {
  return kind == Kind::taylor2 ? sum * sum : kind == Kind::taylor ? fabs(sum) : sum;
}

constexpr int kLoads = 8;
constexpr int kExampleWarps = 32;  // at most: with fewer examples, as many as those

// Units of one channel: a lane a unit; each warp has its share of the examples, one after the other in
// memory.
__global__ void __launch_bounds__(kExampleWarps* kWarp) add_examples(const __grid_constant__ Examples x) {
  double* scores = dynamic_shared<double>();  // [warps, lanes]
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const int64_t unit = int64_t{blockIdx.x} * kWarp + lane, share = ceil_div(x.batch, warps);
  const int64_t begin = min(warp * share, x.batch) * x.splits,
                end = min((warp + 1) * share, x.batch) * x.splits;
  double score = 0.0, sum = 0.0;
  if (unit < x.units) {
    const float* partial = x.partial + unit;
    int64_t split = 0;
    for (int64_t row = begin; row < end; row += kLoads) {
      float terms[kLoads];  // all on their way before the first is added
#pragma unroll
      for (int i = 0; i < kLoads; ++i) terms[i] = row + i < end ? partial[(row + i) * x.units] : 0.0f;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (row + i >= end) break;
        sum += static_cast<double>(terms[i]);
        if (++split == x.splits) {
          score += of_example(sum, x.kind);
          sum = 0.0;
          split = 0;
        }
      }
    }
  }
  scores[threadIdx.x] = score;
  __syncthreads();
  if (warp > 0 || unit >= x.units) return;
  for (int w = 1; w < warps; ++w) score += scores[w * kWarp + lane];
  x.scores[unit] = static_cast<float>(score / x.divisor);
}

// Any width, or few examples of many splits: a block a unit, a warp an example at a time.
__global__ void __launch_bounds__(kExampleWarps* kWarp)
    add_wide_examples(const __grid_constant__ Examples x) {
  double* scores = dynamic_shared<double>();  // [warps]
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  const float* unit = x.partial + blockIdx.x * x.width;
  const uint32_t width = static_cast<uint32_t>(x.width), terms = static_cast<uint32_t>(x.splits) * width;
  const int64_t channels = x.units * x.width;
  double score = 0.0;
  for (int64_t b = warp; b < x.batch; b += warps) {
    const float* example = unit + b * x.splits * channels;
    double sum = 0.0;
    for (uint32_t first = lane; first < terms; first += kLoads * kWarp) {
      float some[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const uint32_t term = first + i * kWarp, split = term / width;
        some[i] = term < terms ? example[split * channels + (term - split * width)] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) sum += static_cast<double>(some[i]);
    }
    score += of_example(warp_sum(sum), x.kind);
  }
  if (lane == 0) scores[warp] = score;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < warps; ++w) score += scores[w];
  x.scores[blockIdx.x] = static_cast<float>(score / x.divisor);
}

// ---------------------------------------------------------------- host
struct Plan {
  Problem problem{};
  Layout layout = Layout::strided;
  bool vectors = false;  // columns: 16 bytes of channels a thread
  int64_t blocks = 0;
  int64_t partial_sums() const {
    return int64_t{problem.batch.size} * problem.splits * (problem.channel.size / problem.fold);
  }
};

// As few dimensions of positions as the strides allow, the smallest stride last.
void set_positions(Problem& problem, const TensorView& a, int dim) {
  problem.positions = 1;
  for (int d = 1; d < a.ndim; ++d) {
    if (d == dim || a.shape[d] == 1) continue;
    int place = problem.rank++;
    for (; place > 0 && problem.position[place - 1].stride < a.stride[d]; --place)
      problem.position[place] = problem.position[place - 1];
    problem.position[place] = {static_cast<uint32_t>(a.shape[d]), a.stride[d]};
    problem.positions *= static_cast<uint32_t>(a.shape[d]);
  }
  int merged = 0;
  for (int d = 1; d < problem.rank; ++d) {
    Dim& outer = problem.position[merged];
    const Dim inner = problem.position[d];
    if (outer.stride == inner.stride * inner.size)
      outer = {outer.size * inner.size, inner.stride};
    else
      problem.position[++merged] = inner;
  }
  if (problem.rank > 0) problem.rank = merged + 1;
}

// How many of the `steps` of each of `count` sums go into one piece of work: few enough to make enough
// pieces.
int64_t steps_a_piece(int64_t count, int64_t steps, int64_t enough) {
  int64_t some = kMaxSteps;
  while (some > 1 && count * ceil_div(steps, some) < enough) some /= 2;
  return some;
}

Plan plan_for(const TensorView& a, int64_t wide_dim, int64_t units) {
  MVP_CHECK(wide_dim >= 1 && wide_dim < a.ndim, "importance", "dim must be a dimension of a after the batch");
  const int dim = static_cast<int>(wide_dim);
  MVP_CHECK(a.numel() > 0, "importance", "a must not be empty");
  MVP_CHECK(units > 0 && a.shape[dim] % units == 0, "importance", "units must divide the channels");
  Plan plan;
  Problem& x = plan.problem;
  const int64_t batch = a.shape[0], channels = a.shape[dim], positions = a.numel() / (batch * channels);
  MVP_CHECK(positions <= kMaxCount && batch * channels <= kMaxCount, "importance",
            "at most 2^30 positions and 2^30 channels of all examples");
  x.a = a.data;
  x.batch = {static_cast<uint32_t>(batch), a.stride[0]};
  x.channel = {static_cast<uint32_t>(channels), a.stride[dim]};
  set_positions(x, a, dim);
  x.fold = 1;
  x.extent = 1;
  for (int d = 0; d < a.ndim; ++d) x.extent += (a.shape[d] - 1) * a.stride[d];

  const int64_t vector = 16 / size_of(a.dtype);
  if (x.rank == 1 && x.position[0].stride == 1 && x.extent >= vector) {
    x.even_rows = batch == 1 || x.batch.stride == channels * x.channel.stride;
    const int64_t vectors = ceil_div(positions + vector - 1, vector);  // at most, wherever a row starts
    if (vectors <= kWarp) {
      plan.layout = Layout::short_rows;
      x.lanes = vectors <= 8 ? 3 : vectors <= 16 ? 4 : 5;
      x.splits = 1;
      plan.blocks = ceil_div(ceil_div(batch * channels, kSlots * (kWarp >> x.lanes)), kThreads / kWarp);
      return plan;
    }
    plan.layout = Layout::rows;
    const int64_t steps = ceil_div(vectors, kWarp * kSlots);
    const int64_t taken = steps_a_piece(batch * channels, steps, kEnoughWarps);
    x.splits = static_cast<uint32_t>(ceil_div(steps, taken));
    x.piece = static_cast<uint32_t>(taken * kWarp * kSlots);
  } else if (x.rank <= 1 && (x.channel.stride == 1 || channels == 1)) {
    plan.layout = Layout::columns;
    plan.vectors = channels % vector == 0 && x.position[0].stride % vector == 0 &&
                   (x.batch.stride % vector == 0 || batch == 1) &&
                   reinterpret_cast<uintptr_t>(a.data) % 16 == 0;
    constexpr int64_t kLanes = 64;  // a KB beside each other; and little is left over of the block's threads
    const int64_t columns = plan.vectors ? channels / vector : channels;
    x.chunks = static_cast<int>(ceil_div(columns, kLanes));
    x.lanes = static_cast<int>(ceil_div(columns, int64_t{x.chunks}));
    const int64_t step = kThreads / x.lanes * kSlots, steps = ceil_div(positions, step);
    const int64_t taken = steps_a_piece(batch * x.chunks, steps, kEnoughBlocks);
    x.splits = static_cast<uint32_t>(ceil_div(steps, taken));
    x.piece = static_cast<uint32_t>(taken * step);
    const int64_t width = channels / units, beside = x.lanes * (plan.vectors ? vector : 1);
    if (beside % width == 0) x.fold = static_cast<uint32_t>(width);
    plan.blocks = batch * x.splits * x.chunks;
    MVP_CHECK(plan.blocks <= INT32_MAX, "importance", "more elements than a grid has room for");
    return plan;
  } else {
    const int64_t steps = ceil_div(positions, kWarp * kSlots);
    const int64_t taken = steps_a_piece(batch * channels, steps, kEnoughWarps);
    x.splits = static_cast<uint32_t>(ceil_div(steps, taken));
    x.piece = static_cast<uint32_t>(taken * kWarp * kSlots);
  }
  MVP_CHECK(batch * channels * x.splits <= INT32_MAX, "importance", "more elements than a grid has room for");
  plan.blocks = ceil_div(batch * channels * x.splits, kThreads / kWarp);
  return plan;
}

template <typename T, bool kProduct>
void sum_positions(const Plan& plan, DType dtype, const Queue& queue) {
  constexpr int kVector = Vec16<T>::kSize;
  const Problem& x = plan.problem;
  Shape shape{dim3(static_cast<unsigned>(plan.blocks)), dim3(kThreads)};
  const auto go = [&](auto kernel) { launch("importance", dtype, queue, shape, kernel, x); };
  switch (plan.layout) {
    case Layout::short_rows:
      return go(&sum_rows<T, kProduct, true>);
    case Layout::rows:
      return go(&sum_rows<T, kProduct, false>);
    case Layout::strided:
      return go(&sum_strided<T, kProduct>);
    case Layout::columns:
      shape.shared_bytes = sizeof(float) * kThreads * (plan.vectors ? kVector : 1);
      return plan.vectors ? go(&sum_columns<T, kProduct, kVector>) : go(&sum_columns<T, kProduct, 1>);
  }
}

}  // namespace
}  // namespace mvp::cuda

namespace mvp {

int64_t importance_workspace_cuda(const TensorView& a, int64_t dim, int64_t units) {
  return cuda::plan_for(a, dim, units).partial_sums();
}

void importance_cuda(const TensorView& a, const TensorView& grad, const std::string& kind, int64_t dim,
                     const TensorView& workspace, const TensorView& scores, int device, uint64_t stream) {
  using namespace cuda;
  const Where where = where_of(device);
  check_importance(where, a, grad, kind, dim, scores);
  const int64_t units = scores.shape[0];
  Plan plan = plan_for(a, dim, units);
  Problem& x = plan.problem;
  const bool product = kind != "activation";
  if (product) {
    for (int d = 0; d < a.ndim; ++d)
      MVP_CHECK(grad.stride[d] == a.stride[d] || a.shape[d] == 1, "importance",
                "a and grad must have the same strides");
    MVP_CHECK((reinterpret_cast<uintptr_t>(a.data) - reinterpret_cast<uintptr_t>(grad.data)) % 16 == 0,
              "importance", "a and grad must be aligned alike");
  }
  const Argument workspace_("importance", where, "workspace", workspace);
  workspace_.need_tensor();
  workspace_.need_dtype(DType::f32);
  workspace_.need_dense(false);
  MVP_CHECK(workspace.numel() >= plan.partial_sums(), "importance", "the workspace is too small");
  x.g = product ? grad.data : a.data;
  x.partial = workspace.ptr<float>();
  const Queue queue(device, stream);
  const bool known = with_float_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (product)
      sum_positions<T, true>(plan, a.dtype, queue);
    else
      sum_positions<T, false>(plan, a.dtype, queue);
  });
  MVP_CHECK(known, "importance", "expected float32, float16 or bfloat16");

  Examples examples{};
  examples.partial = x.partial;
  examples.scores = scores.ptr<float>();
  examples.batch = x.batch.size;
  examples.splits = x.splits;
  examples.units = units;
  examples.width = x.channel.size / x.fold / units;
  examples.divisor = product ? 1.0 : static_cast<double>(a.numel() / units);
  examples.kind = kind == "taylor" ? Kind::taylor : kind == "taylor2" ? Kind::taylor2 : Kind::activation;
  const bool lane_a_unit = examples.width == 1 && (examples.batch >= kExampleWarps || examples.splits < 8);
  const int64_t blocks = lane_a_unit ? ceil_div(units, kWarp) : units;
  const unsigned threads = static_cast<unsigned>(std::min<int64_t>(examples.batch, kExampleWarps)) * kWarp;
  const Shape shape{dim3(static_cast<unsigned>(blocks)), dim3(threads), sizeof(double) * threads};
  launch("importance", a.dtype, queue, shape, lane_a_unit ? &add_examples : &add_wide_examples, examples);
}

}  // namespace mvp
