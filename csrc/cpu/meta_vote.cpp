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
#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include "mvp/arguments.h"
#include "mvp/ops.h"
#include "mvp/order_key.h"
#include "mvp/philox.h"

namespace mvp::MVP_ISA {
namespace {

// Mask bytes + 16 × units: about 0.3 ms of one core. Below it a second thread gains less than it risks: on a
// busy machine the threads wait for each other for as long as a time slice.
constexpr int64_t kParallelWork = 1 << 22;

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

#if defined(__AVX512BW__)

// 64·kRows units: their votes stay in registers while the voters pass; a byte mask becomes a predicate.
// `valid` predicates the last 64.
template <int kRows>
inline void sum_block(const bool* masks, int64_t voters, int64_t stride, const float* weights, uint64_t valid,
                      float* votes) {
  __m512 sum[4 * kRows];
  for (auto& lane : sum) lane = _mm512_setzero_ps();
  for (int64_t j = 0; j < voters; ++j) {
    const __m512 weight = _mm512_set1_ps(weights[j]);
    for (int r = 0; r < kRows; ++r) {
      const __m512i bytes =
          _mm512_maskz_loadu_epi8(r == kRows - 1 ? valid : ~uint64_t{0}, masks + j * stride + 64 * r);
      const uint64_t kept = _mm512_test_epi8_mask(bytes, bytes);
      for (int q = 0; q < 4; ++q) {
        auto& lane = sum[4 * r + q];
        lane = _mm512_mask_add_ps(lane, static_cast<__mmask16>(kept >> (16 * q)), lane, weight);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int q = 0; q < 4; ++q) {
      const uint64_t whole = r == kRows - 1 ? valid : ~uint64_t{0};
      _mm512_mask_storeu_ps(votes + 64 * r + 16 * q, static_cast<__mmask16>(whole >> (16 * q)),
                            sum[4 * r + q]);
    }
}

void sum_votes(const bool* masks, int64_t voters, int64_t stride, int64_t units, const float* weights,
               float* votes) {
  int64_t u = 0;
  for (; u + 256 <= units; u += 256)
    sum_block<4>(masks + u, voters, stride, weights, ~uint64_t{0}, votes + u);
  for (; u < units; u += 64) {
    const uint64_t valid = units - u >= 64 ? ~uint64_t{0} : (uint64_t{1} << (units - u)) - 1;
    sum_block<1>(masks + u, voters, stride, weights, valid, votes + u);
  }
}

#else

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

#endif

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
    int32_t least_above = kCertain, most_below = kExcluded, above = 0;
    for (int64_t u = 0; u < n; ++u) {  // with masks, not branches: GCC vectorises it only so
      const int32_t key = keys[u], is_above = -static_cast<int32_t>(key >= middle);
      above -= is_above;
      least_above = std::min(least_above, (key & is_above) | (kCertain & ~is_above));
      most_below = std::max(most_below, (key & ~is_above) | (kExcluded & is_above));
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

// Every unit above the border and the first `wanted` on it.
void write(const int32_t* keys, Border border, int64_t n, bool* mask, int32_t* index) {
  if (border.wanted == border.ties) border.wanted = n;  // all of them (find_border may not have counted them)
  int64_t u = 0;
#if defined(__AVX512BW__)
  const __m512i key_of_border = _mm512_set1_epi32(border.key);
  __m512i unit = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; u < n; u += 16) {
    const __mmask16 valid = n - u >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (n - u)) - 1);
    const __m512i key = _mm512_maskz_loadu_epi32(valid, keys + u);
    uint32_t ties = _mm512_mask_cmpeq_epi32_mask(valid, key, key_of_border);
    if (border.wanted < 16) ties = _pdep_u32((1u << border.wanted) - 1, ties);  // its lowest `wanted` bits
    border.wanted -= _mm_popcnt_u32(ties);
    const uint32_t kept = ties | _mm512_mask_cmpgt_epi32_mask(valid, key, key_of_border);
    _mm_mask_storeu_epi8(mask + u, valid, _mm_maskz_set1_epi8(static_cast<__mmask16>(kept), 1));
    const int count = _mm_popcnt_u32(kept);
    const __m512i packed = _mm512_maskz_compress_epi32(static_cast<__mmask16>(kept), unit);
    _mm512_mask_storeu_epi32(index, static_cast<__mmask16>((1u << count) - 1), packed);
    index += count;
    unit = _mm512_add_epi32(unit, _mm512_set1_epi32(16));
  }
#else
  for (; u < n; ++u) {
    const bool tie = keys[u] == border.key && border.wanted > 0, kept = tie || keys[u] > border.key;
    border.wanted -= tie;
    mask[u] = kept;
    if (kept) *index++ = static_cast<int32_t>(u);
  }
#endif
}

// Writes the k winners of one layer, in unit order.
void choose(int32_t* keys, const float* prior, int64_t n, int64_t k, bool* mask, int32_t* index) {
  Border border = find_border(keys, n, k);
  if (border.wanted < border.ties && prior != nullptr) {
    for (int64_t u = 0; u < n; ++u)
      keys[u] = keys[u] > border.key ? kCertain : keys[u] == border.key ? order_key(prior[u]) : kExcluded;
    border = find_border(keys, n, k);
  }
  write(keys, border, n, mask, index);
}

}  // namespace

void meta_vote_cpu(const TensorView& masks, const TensorView& weights, const TensorView& prior,
                   const std::vector<int64_t>& layers, const std::vector<int64_t>& kept,
                   std::optional<double> temperature, int64_t seed, const TensorView& mask,
                   const TensorView& index, const TensorView& votes, int threads) {
  check_meta_vote({}, masks, weights, prior, layers, kept, mask, index, votes);
  const int64_t voters = masks.shape[0], units = masks.shape[1], count = static_cast<int64_t>(layers.size());
  const int64_t targets = votes.ndim == 2 ? votes.shape[0] : 1;
  if (units == 0 || targets == 0) return;

  struct Layer {
    int64_t units, first_unit, kept, first_kept;
  };
  std::vector<Layer> plan;
  plan.reserve(layers.size());
  int64_t first_unit = 0, first_kept = 0, largest = 0;
  for (int64_t l = 0; l < count; ++l) {
    plan.push_back({layers[l], first_unit, kept[l], first_kept});
    first_unit += layers[l];
    first_kept += kept[l];
    largest = std::max(largest, layers[l]);
  }
  const int64_t tasks = targets * count;
  const bool parallel = threads > 1 && tasks > 1 && targets * units * (voters + 16) >= kParallelWork;
  const auto vote = [&](int64_t task, int32_t* keys) {
    // Layer-major: a thread that does several targets of a layer finds its masks in the cache.
    const Layer& layer = plan[static_cast<size_t>(task / targets)];
    const int64_t t = task % targets, n = layer.units;
    float* sum = votes.ptr<float>() + t * units + layer.first_unit;
    if (voters == 0)  // masks have no address, then
      std::fill_n(sum, n, 0.0f);
    else if (weights.defined())
      sum_votes(masks.ptr<bool>() + layer.first_unit, voters, masks.stride[0], n,
                weights.ptr<float>() + t * voters, sum);
    else
      count_votes(masks.ptr<bool>() + layer.first_unit, voters, masks.stride[0], n, sum);
    if (temperature)
      sample_keys(sum, n, layer.first_unit, static_cast<uint32_t>(t), static_cast<float>(*temperature),
                  static_cast<uint64_t>(seed), keys);
    else
      for (int64_t u = 0; u < n; ++u) keys[u] = order_key(sum[u]);
    const float* ranks = prior.defined() ? prior.ptr<float>() + layer.first_unit : nullptr;
    if (ranks != nullptr && prior.ndim == 2) ranks += t * units;
    choose(keys, ranks, n, layer.kept, mask.ptr<bool>() + t * units + layer.first_unit,
           index.ptr<int32_t>() + t * first_kept + layer.first_kept);
  };
  if (!parallel) {  // a small vote takes no longer than OpenMP needs to run it on one thread
    std::vector<int32_t> keys(static_cast<size_t>(largest));
    for (int64_t task = 0; task < tasks; ++task) vote(task, keys.data());
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    std::vector<int32_t> keys(static_cast<size_t>(largest));
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < tasks; ++task) vote(task, keys.data());
  }
}

}  // namespace mvp::MVP_ISA
