// The vote of N voters on the units of all layers, for T targets, and the choice of each layer's winners.
//
//   votes[t, u] = Σ_j mask[j, u] ? weight[t, j] : 0        float32, in voter order: the same bits everywhere
//   key[t, u]   = votes[t, u]                              or votes / temperature + Gumbel noise (philox.h)
//   layer l keeps its kept[l] largest (key, prior, −u); NaN ranks below every number, −0 equals +0
//
// No sort: keys become integers of the same order, the kept[l]-th largest is found by bisection, and one scan
// in unit order writes mask and index, which are then sorted by construction. Only where a tie straddles the
// border is the prior looked at, by the same bisection over the tied units. Work is split by (target, layer);
// a pair needs kept[l] and nothing from its neighbours. Bytes: N·U of masks once per target (a layer's masks
// stay in L1/L2 between targets), 5·U + 4·K written per target.
#include <algorithm>
#include <limits>

#include "mvp/check.h"
#include "mvp/ops.h"
#include "mvp/philox.h"

namespace mvp::MVP_ISA {
namespace {

constexpr int64_t kParallelWork =
    1 << 18;  // mask bytes + 16 × units: about 20 µs of one core, four times a fork's cost
constexpr int32_t kNaN = std::numeric_limits<int32_t>::min() + 1;  // below −inf
constexpr int32_t kExcluded = std::numeric_limits<int32_t>::min();
constexpr int32_t kCertain = std::numeric_limits<int32_t>::max();  // above +inf

// An integer that orders like the float.
inline int32_t order_key(float value) {
  const int32_t bits = as_bits(value + 0.0f);  // −0 becomes +0
  return value != value ? kNaN : bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

// Every voter counts one. Bytes are added as bytes: 255 voters fit before they are widened.
void count_votes(const bool* masks, int64_t voters, int64_t stride, int64_t units, float* votes) {
  constexpr int64_t kBlock = 1024;
  uint8_t count[kBlock];
  for (int64_t begin = 0; begin < units; begin += kBlock) {
    const int64_t n = std::min(kBlock, units - begin);
    std::fill_n(votes + begin, n, 0.0f);
    for (int64_t first = 0; first < voters; first += 255) {
      std::fill_n(count, n, uint8_t{0});
      for (int64_t j = first; j < std::min(first + 255, voters); ++j) {
        const uint8_t* row = reinterpret_cast<const uint8_t*>(masks + j * stride + begin);
        for (int64_t u = 0; u < n; ++u) count[u] = static_cast<uint8_t>(count[u] + (row[u] != 0));
      }
      for (int64_t u = 0; u < n; ++u)
        votes[begin + u] += static_cast<float>(count[u]);  // exact below 2²⁴ voters
    }
  }
}

void sum_votes(const bool* masks, int64_t voters, int64_t stride, int64_t units, const float* weights,
               float* votes) {
  constexpr int64_t kBlock = 1024;  // of votes: stays in L1 while the voters pass
  std::fill_n(votes, units, 0.0f);
  for (int64_t begin = 0; begin < units; begin += kBlock) {
    const int64_t n = std::min(kBlock, units - begin);
    float* sum = votes + begin;
    for (int64_t j = 0; j < voters; ++j) {
      const uint8_t* row = reinterpret_cast<const uint8_t*>(masks + j * stride + begin);
      const float weight = weights[j];
      for (int64_t u = 0; u < n; ++u) sum[u] += row[u] != 0 ? weight : 0.0f;
    }
  }
}

void sample_keys(const float* votes, int64_t units, int64_t first_unit, uint32_t target, float temperature,
                 uint64_t seed, int32_t* keys) {
  // Whole blocks of four from the one that holds the first unit; up to three noises at each end are not used.
  constexpr int64_t kBlocks = 64;
  float noise[4 * kBlocks];
  const int64_t first_block = first_unit / 4, end_block = (first_unit + units + 3) / 4;
  for (int64_t begin = first_block; begin < end_block; begin += kBlocks) {
    const int64_t blocks = std::min(kBlocks, end_block - begin);
    uint32_t words[4][kBlocks];
    for (int64_t b = 0; b < blocks; ++b) {
      uint32_t four[4];
      philox4x32(static_cast<uint32_t>(begin + b), target, seed, four);
      for (int i = 0; i < 4; ++i) words[i][b] = four[i];
    }
    for (int i = 0; i < 4; ++i)
      for (int64_t b = 0; b < blocks; ++b) noise[4 * b + i] = gumbel_from(words[i][b]);
    const int64_t from = std::max(4 * begin, first_unit),
                  to = std::min(4 * (begin + blocks), first_unit + units);
    for (int64_t u = from; u < to; ++u)
      keys[u - first_unit] = order_key(votes[u - first_unit] / temperature + noise[u - 4 * begin]);
  }
}

struct Border {
  int32_t key;     // the k-th largest
  int64_t ties;    // units with that key
  int64_t wanted;  // how many of those are among the k largest
};

// The k-th largest of n keys, 1 <= k <= n. Bisection over the keys that occur: a pass halves the interval and
// pulls both its ends to the nearest keys, so few distinct keys (plain counts) need few passes, and any keys
// at most 32.
Border find_border(const int32_t* keys, int64_t n, int64_t k) {
  int32_t low = kCertain, high = kExcluded;
  for (int64_t u = 0; u < n; ++u) {
    low = std::min(low, keys[u]);
    high = std::max(high, keys[u]);
  }
  int64_t from_low = n, above_high = 0;  // how many keys are >= low, > high
  while (low < high) {
    const int32_t middle = static_cast<int32_t>(low + (int64_t{high} - low + 1) / 2);
    int32_t least_above = kCertain, most_below = kExcluded;
    int32_t above = 0;
    for (int64_t u = 0; u < n; ++u) {
      const int32_t key = keys[u];
      const bool is_above = key >= middle;
      above += is_above;
      least_above = std::min(least_above, is_above ? key : kCertain);
      most_below = std::max(most_below, is_above ? kExcluded : key);
    }
    if (above >= k) {
      low = least_above;
      from_low = above;
      if (above == k)
        return {low, 1, 1};  // all that are >= low, no choice among ties: their number does not matter
    } else {
      high = most_below;
      above_high = above;
    }
  }
  return {low, from_low - above_high, k - above_high};
}

// Writes the k winners of one layer, in unit order.
void choose(int32_t* keys, const float* prior, int64_t n, int64_t k, bool* mask, int32_t* index) {
  Border border = find_border(keys, n, k);
  if (border.wanted < border.ties && prior != nullptr) {
    for (int64_t u = 0; u < n; ++u)
      keys[u] = keys[u] > border.key ? kCertain : keys[u] == border.key ? order_key(prior[u]) : kExcluded;
    border = find_border(keys, n, k);
  }
  if (border.wanted == border.ties) {
    for (int64_t u = 0; u < n; ++u) mask[u] = keys[u] >= border.key;
  } else {
    int64_t wanted = border.wanted;
    for (int64_t u = 0; u < n; ++u) {
      const bool tie = keys[u] == border.key && wanted > 0;
      wanted -= tie;
      mask[u] = tie || keys[u] > border.key;
    }
  }
  for (int64_t u = 0, kept = 0; kept < k; ++u) {
    index[kept] = static_cast<int32_t>(u);  // without a branch: overwritten by the next unit if u is not kept
    kept += mask[u];
  }
}

}  // namespace

void meta_vote_cpu(const TensorView& masks, const TensorView& weights, const TensorView& prior,
                   const std::vector<int64_t>& layers, const std::vector<int64_t>& kept,
                   std::optional<double> temperature, int64_t seed, const TensorView& mask,
                   const TensorView& index, const TensorView& votes, int threads) {
  const int64_t voters = masks.shape[0], units = masks.shape[1], count = static_cast<int64_t>(layers.size());
  const int64_t targets = votes.ndim == 2 ? votes.shape[0] : 1;
  MVP_CHECK(masks.stride[1] == 1 || units <= 1, "meta_vote", "the rows of masks must be contiguous");
  MVP_CHECK(kept.size() == layers.size(), "meta_vote", "one kept count a layer");
  if (units == 0 || targets == 0) return;

  struct Layer {
    int64_t units, first_unit, kept, first_kept;
  };
  std::vector<Layer> plan;
  plan.reserve(layers.size());
  int64_t first_unit = 0, first_kept = 0, largest = 0;
  for (int64_t l = 0; l < count; ++l) {
    MVP_CHECK(kept[l] >= 1 && kept[l] <= layers[l], "meta_vote",
              "kept counts must be in [1, units of the layer]");
    plan.push_back({layers[l], first_unit, kept[l], first_kept});
    first_unit += layers[l];
    first_kept += kept[l];
    largest = std::max(largest, layers[l]);
  }
  MVP_CHECK(first_unit == units, "meta_vote", "layers must add up to the units of masks");

  const int64_t tasks = targets * count;
  const bool parallel = threads > 1 && tasks > 1 && targets * units * (voters + 16) >= kParallelWork;
#pragma omp parallel num_threads(threads) if (parallel)
  {
    std::vector<int32_t> keys(static_cast<size_t>(largest));
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) {
      // Layer-major: a thread that does several targets of a layer finds its masks in the cache.
      const Layer& layer = plan[static_cast<size_t>(task / targets)];
      const int64_t t = task % targets, n = layer.units;
      const bool* rows = masks.ptr<bool>() + layer.first_unit;
      float* sum = votes.ptr<float>() + t * units + layer.first_unit;
      if (weights.defined())
        sum_votes(rows, voters, masks.stride[0], n, weights.ptr<float>() + t * voters, sum);
      else
        count_votes(rows, voters, masks.stride[0], n, sum);
      if (temperature)
        sample_keys(sum, n, layer.first_unit, static_cast<uint32_t>(t), static_cast<float>(*temperature),
                    static_cast<uint64_t>(seed), keys.data());
      else
        for (int64_t u = 0; u < n; ++u) keys[static_cast<size_t>(u)] = order_key(sum[u]);
      const float* ranks = prior.defined() ? prior.ptr<float>() + layer.first_unit : nullptr;
      if (ranks != nullptr && prior.ndim == 2) ranks += t * units;
      choose(keys.data(), ranks, n, layer.kept, mask.ptr<bool>() + t * units + layer.first_unit,
             index.ptr<int32_t>() + t * first_kept + layer.first_kept);
    }
  }
}

}  // namespace mvp::MVP_ISA
