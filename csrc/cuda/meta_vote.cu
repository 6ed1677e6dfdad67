// The vote of N voters on the units of all layers, for T targets, and the choice of each layer's winners; the
// formula and the rules for ties are in csrc/cpu/meta_vote.cpp, and the bits are the same.
//
// One launch, one block a (layer, target). What counts is latency, a few dozen blocks are all there is:
//   votes   a thread has four units whose number in the model is a multiple of four: four mask bytes are one
//           load, and their noise is one Philox block. 32 voters' loads are under way before the first is
//           added, in voter order; their weights wait in shared memory. Keys stay in registers.
//   border  the k-th largest key by radix selection: 8 bits a pass, integer histograms in shared memory, one
//           barrier a pass (each pass has a histogram of its own, and each warp reads it for itself); it ends
//           as soon as a bin is wanted as a whole. A tie across the border: the same over the prior of the
//           tied.
//   write   one scan over the block of (above, tied) gives each kept unit its place in the index.
// A layer of more units than a block has room for is walked through in chunks; its keys are made again from
// the votes wherever they are needed. Bytes: N·U of masks per target (from L2 after the first), 5·U + 4·K
// written.
#include <algorithm>
#include <climits>

#include "common.cuh"
#include "mvp/cuda_ops.h"
#include "mvp/order_key.h"
#include "mvp/philox.h"

namespace mvp::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kUnits = 4;     // of a thread, at a time
constexpr int kStaged = 512;  // voters whose weights are in shared memory at a time
constexpr int kBins = 256, kPasses = 4;
constexpr int kMaxLayers = 240;  // of a launch: its parameters stay below 4 KB, which every launch must copy

struct Layer {
  uint32_t first_unit, first_kept;  // counted from the launch's first
  int32_t units, kept;
};

struct Problem {
  const uint8_t* masks;  // [N, U], rows `stride` apart
  const float *weights, *prior;
  bool* mask;
  int32_t* index;
  float* votes;
  int64_t voters, stride, units, kept;  // units and kept: of all layers of the model
  int64_t first_unit, first_kept;       // of this launch
  int64_t prior_stride;                 // from one target's prior to the next's; 0: one for all
  uint64_t seed;
  float temperature;
  bool sampled, wide;  // wide: four units from a multiple of four are one access
  Layer layers[kMaxLayers];
};
static_assert(sizeof(Problem) <= 4096);

struct Shared {
  uint32_t histograms[2][kPasses][kBins];  // of the votes, of the prior
  float weights[kStaged];
  uint32_t warp_totals[kWarp];
};

// Keys order like unsigned integers. 0: not a unit, or out of the question.
__device__ __forceinline__ uint32_t unsigned_key(float value) {
  return static_cast<uint32_t>(order_key(value)) ^ 0x80000000u;
}
constexpr uint32_t kHighestKey = 0xFFFFFFFF;

// Four units of the block's layer, of which some may belong to its neighbours.
struct Group {
  int64_t column;  // of its first unit in the model
  int from, to;    // those in the layer
  __device__ bool has(int q) const { return from <= q && q < to; }
  __device__ bool whole() const { return from == 0 && to == kUnits; }
};

// Four mask bytes of a voter; other layers' may be among them.
template <bool kWide>
__device__ __forceinline__ uint32_t load_four(const uint8_t* p, const Group& group) {
  if constexpr (kWide) {
    return __ldg(reinterpret_cast<const uint32_t*>(p));
  } else {
    uint32_t word = 0;
#pragma unroll
    for (int q = 0; q < kUnits; ++q)
      if (group.has(q)) word |= uint32_t{__ldg(p + q)} << (8 * q);
    return word;
  }
}

// sum[q] = Σ_j of the weights of those who kept unit q, in the order of j. The whole block comes here;
// `here`: the thread has a group. `fresh`: nobody has read the staged weights yet.
template <bool kWide>
__device__ __forceinline__ void add_votes(const Problem& problem, Shared* shared, int64_t target,
                                          const Group& group, bool here, bool fresh, float (&sum)[kUnits]) {
  constexpr int kBatch = kWide ? 32 : 8;              // loads under way: words, or four times as many bytes
  constexpr int kStep = 8;                            // voters whose weights are read at once
  const uint8_t* row = problem.masks + group.column;  // goes down the voters: no product an address
  const float* weights = problem.weights == nullptr ? nullptr : problem.weights + target * problem.voters;
  for (int64_t first = 0; first < problem.voters; first += kBatch) {
    const int left = static_cast<int>(min(problem.voters - first, int64_t{kBatch}));
    const int loads = here ? left : 0;
    uint32_t word[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i, row += problem.stride)
      word[i] = i < loads ? load_four<kWide>(row, group) : 0;
    if (first % kStaged == 0) {
      if (!fresh || first > 0) __syncthreads();
      // Beyond the last voter: zeros, so that whole steps can be read.
      for (int i = threadIdx.x; i < kStaged; i += blockDim.x) {
        float weight = 0.0f;
        if (first + i < problem.voters) weight = weights == nullptr ? 1.0f : __ldg(weights + first + i);
        shared->weights[i] = weight;
      }
      __syncthreads();
    }
    const float* staged = shared->weights + first % kStaged;
#pragma unroll
    for (int i = 0; i < kBatch; i += kStep) {
      if (i >= left) break;
#pragma unroll
      for (int j = i; j < i + kStep; j += 4) {
        const Vec16<float> weight = load16(staged + j);
#pragma unroll
        for (int v = 0; v < 4; ++v)
#pragma unroll
          for (int q = 0; q < kUnits; ++q)
            if (word[j + v] & (0xFFu << (8 * q))) sum[q] = __fadd_rn(sum[q], weight.at[v]);
      }
    }
  }
}

__device__ __forceinline__ void write_votes(const Problem& problem, int64_t target, const Group& group,
                                            const float (&sum)[kUnits]) {
  float* votes = problem.votes + target * problem.units + group.column;
  if (problem.wide && group.whole()) {
    store16(votes, Vec16<float>{{sum[0], sum[1], sum[2], sum[3]}});
  } else {
#pragma unroll
    for (int q = 0; q < kUnits; ++q)
      if (group.has(q)) votes[q] = sum[q];
  }
}

__device__ __forceinline__ void make_keys(const Problem& problem, int64_t target, const Group& group,
                                          const float (&votes)[kUnits], uint32_t (&key)[kUnits]) {
  uint32_t words[kUnits] = {};
  if (problem.sampled)
    philox4x32(static_cast<uint32_t>(group.column / kUnits), static_cast<uint32_t>(target), problem.seed,
               words);
#pragma unroll
  for (int q = 0; q < kUnits; ++q) {
    float value = votes[q];
    if (problem.sampled) value = rounded_add(__fdiv_rn(value, problem.temperature), gumbel_from(words[q]));
    key[q] = group.has(q) ? unsigned_key(value) : 0;
  }
}

// Kept are the keys above `key` and the first `wanted` that equal it.
struct Border {
  uint32_t key;
  int wanted;
};
constexpr int kAll = INT_MAX;

// The border of the k largest keys. `each_key(f)` calls f with each key of this thread; the histograms are
// zero.
template <typename EachKey>
__device__ __forceinline__ Border find_border(uint32_t (*histograms)[kBins], int k, EachKey each_key) {
  constexpr int kLaneBins = kBins / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  uint32_t prefix = 0;  // of the border: the digits found so far
  int wanted = k;       // of the keys that begin with it
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int shift = 24 - 8 * pass;
    uint32_t* histogram = histograms[pass];
    each_key([&](uint32_t key) {
      if (pass == 0 || (key >> (shift + 8 & 31)) == prefix)
        atomicAdd(&histogram[key >> shift & (kBins - 1)], 1u);
    });
    __syncthreads();
    int count[kLaneBins], mine = 0;
#pragma unroll
    for (int i = 0; i < kLaneBins; i += 4) {
      const Vec16<uint32_t> four = load16(histogram + kLaneBins * lane + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) mine += count[i + j] = static_cast<int>(four.at[j]);
    }
    int upwards = mine;  // in this lane's bins and all above
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_down_sync(kAllLanes, upwards, step);
      if (lane + step < kWarp) upwards += other;
    }
    int above = upwards - mine;
    const bool here = above < wanted && wanted <= upwards;
    int bin = 0, ties = 0;
#pragma unroll
    for (int i = kLaneBins - 1; i >= 0; --i) {
      if (ties > 0) continue;  // found
      if (here && wanted <= above + count[i])
        bin = kLaneBins * lane + i, ties = count[i];
      else
        above += count[i];
    }
    const int from = __ffs(static_cast<int>(__ballot_sync(kAllLanes, here))) - 1;
    prefix = prefix << 8 | static_cast<uint32_t>(__shfl_sync(kAllLanes, bin, from));
    wanted -= __shfl_sync(kAllLanes, above, from);
    if (wanted == __shfl_sync(kAllLanes, ties, from)) return {prefix << shift, kAll};
  }
  return {prefix, wanted};
}

// kResident: the block has a thread for every group of every layer.
template <bool kWide, bool kResident>
__global__ void __launch_bounds__(kMaxThreads, 1) meta_vote_kernel(const __grid_constant__ Problem problem) {
  Shared* shared = dynamic_shared<Shared>();
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t target = blockIdx.x;
  const Layer& layer = problem.layers[blockIdx.y];
  const int64_t first_unit = problem.first_unit + layer.first_unit;
  const int slack = static_cast<int>(first_unit % kUnits);  // units before the layer in its first group
  const int groups = ceil_div(slack + layer.units, kUnits);
  const auto group_at = [&](int g) {
    const int unit = kUnits * g - slack;
    return Group{first_unit + unit, max(-unit, 0), min(layer.units - unit, kUnits)};
  };
  for (int i = thread; i < 2 * kPasses * kBins / 4; i += threads)
    store16(shared->histograms[0][0] + 4 * i, Vec16<uint32_t>{});

  uint32_t key[kUnits] = {};  // kResident: of the thread's group
  for (int first = 0; first < groups; first += threads) {
    const bool here = first + thread < groups;
    const Group group = group_at(here ? first + thread : 0);
    float sum[kUnits] = {};
    add_votes<kWide>(problem, shared, target, group, here, first == 0, sum);
    if (here) {
      write_votes(problem, target, group, sum);
      if constexpr (kResident) make_keys(problem, target, group, sum, key);
    }
  }
  __syncthreads();  // the histograms are zero

  const auto load_keys = [&](const Group& group, uint32_t (&keys)[kUnits]) {
    float votes[kUnits] = {};  // this thread has written them
#pragma unroll
    for (int q = 0; q < kUnits; ++q)
      if (group.has(q)) votes[q] = problem.votes[target * problem.units + group.column + q];
    make_keys(problem, target, group, votes, keys);
  };
  const auto each_key = [&](auto change, auto f) {
    for (int g = thread; g < groups; g += threads) {
      const Group group = group_at(g);
      if constexpr (!kResident) load_keys(group, key);
      change(group);
#pragma unroll
      for (int q = 0; q < kUnits; ++q) f(key[q]);
      if constexpr (kResident) break;
    }
  };
  Border border =
      find_border(shared->histograms[0], layer.kept, [&](auto f) { each_key([](const Group&) {}, f); });
  const Border vote_border = border;
  const bool by_prior = border.wanted != kAll && problem.prior != nullptr;
  // Among the units on the border, the prior takes the place of the vote.
  const auto rank_ties = [&](const Group& group) {
    const float* prior = problem.prior + target * problem.prior_stride + group.column;
#pragma unroll
    for (int q = 0; q < kUnits; ++q)
      key[q] = key[q] > vote_border.key    ? kHighestKey
               : key[q] == vote_border.key ? unsigned_key(__ldg(prior + q))
                                           : 0;
  };
  if (by_prior) {
    if constexpr (kResident) {
      if (thread < groups) rank_ties(group_at(thread));
    }
    border = find_border(shared->histograms[1], layer.kept, [&](auto f) {
      each_key(
          [&](const Group& group) {
            if constexpr (!kResident) rank_ties(group);
          },
          f);
    });
  }

  int32_t* index = problem.index + target * problem.kept + problem.first_kept + layer.first_kept;
  uint32_t above_before = 0, ties_before = 0;  // in earlier chunks
  for (int first = 0; first < groups; first += threads) {
    const bool here = first + thread < groups;
    const Group group = group_at(here ? first + thread : 0);
    if constexpr (!kResident) {
      if (here) load_keys(group, key);
      if (here && by_prior) rank_ties(group);
    }
    uint32_t mine = 0;  // above the border, and 2¹⁶ · on it
#pragma unroll
    for (int q = 0; q < kUnits; ++q)
      if (here) mine += key[q] > border.key ? 1u : key[q] == border.key ? 0x10000u : 0u;
    const int lane = thread % kWarp, warp = thread / kWarp;
    uint32_t upto = mine;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const uint32_t other = __shfl_up_sync(kAllLanes, upto, step);
      if (lane >= step) upto += other;
    }
    if (lane == kWarp - 1) shared->warp_totals[warp] = upto;
    __syncthreads();
    const uint32_t total = lane < threads / kWarp ? shared->warp_totals[lane] : 0;
    const uint32_t before = warp_sum(lane < warp ? total : 0) + upto - mine;
    if (here) {
      uint32_t above = above_before + (before & 0xFFFF), ties = ties_before + (before >> 16);
      uint32_t bytes = 0;
#pragma unroll
      for (int q = 0; q < kUnits; ++q) {
        const bool is_above = key[q] > border.key, is_tie = key[q] == border.key;
        const uint32_t wanted = static_cast<uint32_t>(border.wanted);
        if (group.has(q) && (is_above || (is_tie && ties < wanted))) {
          index[above + min(ties, wanted)] = kUnits * (first + thread) - slack + q;
          bytes |= 1u << (8 * q);
        }
        above += is_above;
        ties += is_tie;
      }
      bool* mask = problem.mask + target * problem.units + group.column;
      if (problem.wide && group.whole()) {
        *reinterpret_cast<uint32_t*>(mask) = bytes;
      } else {
#pragma unroll
        for (int q = 0; q < kUnits; ++q)
          if (group.has(q)) mask[q] = (bytes >> (8 * q) & 1) != 0;
      }
    }
    if constexpr (!kResident) {
      const uint32_t all = warp_sum(total);
      above_before += all & 0xFFFF;
      ties_before += all >> 16;
      __syncthreads();  // the totals are written again
    }
  }
}

template <bool kWide>
void launch_layers(const Problem& problem, const Queue& queue, dim3 grid, int64_t groups) {
  const int threads = static_cast<int>(std::min<int64_t>(ceil_div(groups, kWarp) * kWarp, kMaxThreads));
  const Shape shape{grid, dim3(static_cast<unsigned>(threads)), sizeof(Shared)};
  if (groups <= threads)
    launch("meta_vote", DType::boolean, queue, shape, &meta_vote_kernel<kWide, true>, problem);
  else
    launch("meta_vote", DType::boolean, queue, shape, &meta_vote_kernel<kWide, false>, problem);
}

}  // namespace
}  // namespace mvp::cuda

namespace mvp {

void meta_vote_cuda(const TensorView& masks, const TensorView& weights, const TensorView& prior,
                    const std::vector<int64_t>& layers, const std::vector<int64_t>& kept,
                    std::optional<double> temperature, int64_t seed, const TensorView& mask,
                    const TensorView& index, const TensorView& votes, int device, uint64_t stream) {
  using namespace cuda;
  constexpr int64_t kMaxCount = int64_t{1} << 30;  // 32-bit counters, with room for the last chunk
  check_meta_vote(where_of(device), masks, weights, prior, layers, kept, mask, index, votes);
  const int64_t units = masks.shape[1], targets = votes.ndim == 2 ? votes.shape[0] : 1;
  MVP_CHECK(targets <= INT32_MAX, "meta_vote", "more targets than a grid has room for");
  if (units == 0 || targets == 0) return;
  Problem problem{};
  problem.masks = masks.ptr<uint8_t>();
  problem.weights = weights.ptr<float>();
  problem.prior = prior.ptr<float>();
  problem.prior_stride = prior.ndim == 2 ? units : 0;
  problem.mask = mask.ptr<bool>();
  problem.index = index.ptr<int32_t>();
  problem.votes = votes.ptr<float>();
  problem.voters = masks.shape[0];
  problem.stride = masks.stride[0];
  problem.units = units;
  for (const int64_t k : kept) problem.kept += k;
  problem.seed = static_cast<uint64_t>(seed);
  problem.sampled = temperature.has_value();
  problem.temperature = static_cast<float>(temperature.value_or(1.0));
  const auto multiple_of = [](const void* p, uintptr_t n) { return reinterpret_cast<uintptr_t>(p) % n == 0; };
  problem.wide = units % kUnits == 0 && (problem.stride % kUnits == 0 || problem.voters <= 1) &&
                 multiple_of(masks.data, kUnits) && multiple_of(mask.data, kUnits) &&
                 multiple_of(votes.data, 16);
  const Queue queue(device, stream);

  int64_t unit = 0, place = 0;  // where the layer begins
  for (size_t begin = 0; begin < layers.size();) {
    problem.first_unit = unit;
    problem.first_kept = place;
    int64_t most_groups = 0;
    size_t l = begin;
    for (; l < layers.size() && l < begin + kMaxLayers; ++l) {
      MVP_CHECK(layers[l] <= kMaxCount, "meta_vote", "a layer of more than 2^30 units");
      if (unit - problem.first_unit > kMaxCount) break;
      problem.layers[l - begin] = {static_cast<uint32_t>(unit - problem.first_unit),
                                   static_cast<uint32_t>(place - problem.first_kept),
                                   static_cast<int32_t>(layers[l]), static_cast<int32_t>(kept[l])};
      most_groups = std::max(most_groups, ceil_div(unit % kUnits + layers[l], int64_t{kUnits}));
      unit += layers[l];
      place += kept[l];
    }
    const dim3 grid(static_cast<unsigned>(targets), static_cast<unsigned>(l - begin));
    if (problem.wide)
      launch_layers<true>(problem, queue, grid, most_groups);
    else
      launch_layers<false>(problem, queue, grid, most_groups);
    begin = l;
  }
}

}  // namespace mvp
