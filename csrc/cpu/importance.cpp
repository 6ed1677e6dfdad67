// One score a unit from an activation a and its gradient g, both [B, ..., C, ...]: a unit is D = C / units
// consecutive channels, everything else than batch and channels is a position.
//
//   s[b, u] = Σ over the positions and the unit's channels of a·g          (activation: of |a|)
//   taylor  Σ_b |s|      taylor2  Σ_b s²      activation  Σ_b s / number of elements of a unit
//
// Bytes: a and g once. A first pass sums positions into partial [B, chunks, C], a second, small one sums
// those in a fixed order. The first is cut into pieces that do not depend on the number of threads, so
// neither does a bit of the result. Accumulators are float32 vectors in two levels (a fold every kFold
// terms), from the partial sums on double; float64 input is summed in double throughout. Two layouts are
// fast: positions contiguous (NCHW: a row a channel) and channels contiguous (channels_last, [B, n, C]).
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "mvp/check.h"
#include "mvp/ops.h"
#include "mvp/simd.h"

namespace mvp::MVP_ISA {
namespace {

constexpr int64_t kParallelElements = 1 << 17;  // below, a fork costs more than it saves
constexpr int64_t kFold = 64;                   // terms in the lower level of a sum
constexpr int64_t kChunk = 1024;                // positions in one piece of work, channels contiguous

// What is summed: a·g, or |a|.
template <typename T>
struct Product {
  const T *a, *g;
  Product at(int64_t offset_a, int64_t offset_g) const { return {a + offset_a, g + offset_g}; }
  Vec first(int64_t i) const { return load(a + i) * load(g + i); }
  Vec add(int64_t i, Vec sum) const { return fma(load(a + i), load(g + i), sum); }
  Vec first_some(int64_t i, int64_t n) const { return load(a + i, n) * load(g + i, n); }
  template <typename Sum>
  Sum one(int64_t offset_a, int64_t offset_g) const {
    return static_cast<Sum>(to_float(a[offset_a])) * static_cast<Sum>(to_float(g[offset_g]));
  }
};

template <>
template <>
inline double Product<double>::one<double>(int64_t offset_a, int64_t offset_g) const {
  return a[offset_a] * g[offset_g];
}

inline Vec magnitude(Vec v) { return bit_cast<Vec>(bit_cast<Bits>(v) & 0x7fffffffu); }

template <typename T>
struct Magnitude {
  const T* a;
  Magnitude at(int64_t offset_a, int64_t) const { return {a + offset_a}; }
  Vec first(int64_t i) const { return magnitude(load(a + i)); }
  Vec add(int64_t i, Vec sum) const { return sum + magnitude(load(a + i)); }
  Vec first_some(int64_t i, int64_t n) const { return magnitude(load(a + i, n)); }
  template <typename Sum>
  Sum one(int64_t offset_a, int64_t) const {
    return std::abs(static_cast<Sum>(to_float(a[offset_a])));
  }
};

template <>
template <>
inline double Magnitude<double>::one<double>(int64_t offset_a, int64_t) const {
  return std::abs(a[offset_a]);
}

struct Dim {
  int64_t size, a, g;  // strides in elements
};

// All positions in some order, for a piece of work that starts at any of them.
class Cursor {
 public:
  Cursor(const Dim* dims, int rank, int64_t position) : dims_(dims), rank_(rank) {
    for (int d = rank - 1; d >= 0; --d) {
      index_[d] = position % dims[d].size;
      position /= dims[d].size;
      a += index_[d] * dims[d].a;
      g += index_[d] * dims[d].g;
    }
  }

  void next() {
    for (int d = rank_ - 1; d >= 0; --d) {
      a += dims_[d].a;
      g += dims_[d].g;
      if (++index_[d] < dims_[d].size) return;
      a -= dims_[d].size * dims_[d].a;
      g -= dims_[d].size * dims_[d].g;
      index_[d] = 0;
    }
  }

  int64_t a = 0, g = 0;  // offsets of the position

 private:
  const Dim* dims_;
  int rank_;
  int64_t index_[kMaxDims] = {};
};

struct Problem {
  Dim batch, channel, position[kMaxDims];
  int rank;  // of the positions: as few dimensions as the strides allow, the smallest stride last
  int64_t positions;

  Problem(const TensorView& a, const TensorView& g, int dim) : rank(0), positions(1) {
    const auto of = [&](int d) { return Dim{a.shape[d], a.stride[d], g.stride[d]}; };
    batch = of(0);
    channel = of(dim);
    for (int d = 1; d < a.ndim; ++d) {
      if (d == dim || a.shape[d] == 1) continue;
      int place = rank++;
      for (; place > 0 && position[place - 1].a < a.stride[d]; --place) position[place] = position[place - 1];
      position[place] = of(d);
      positions *= a.shape[d];
    }
    int merged = 0;
    for (int d = 1; d < rank; ++d) {
      Dim& outer = position[merged];
      const Dim& inner = position[d];
      if (outer.a == inner.a * inner.size && outer.g == inner.g * inner.size)
        outer = {outer.size * inner.size, inner.a, inner.g};
      else
        position[++merged] = inner;
    }
    if (rank > 0) rank = merged + 1;
  }
};

inline bool both_contiguous(const Dim& dim) { return dim.a == 1 && dim.g == 1; }

// Sum of a contiguous row, still spread over the lanes.
template <typename Terms>
inline Vec sum_row(Terms row, int64_t n) {
  Vec total{};
  int64_t i = 0;
  while (n - i >= 4 * kLanes) {
    const int64_t end = std::min(i + kFold * kLanes, n);
    Vec s0 = row.first(i), s1 = row.first(i + kLanes), s2 = row.first(i + 2 * kLanes),
        s3 = row.first(i + 3 * kLanes);
    for (i += 4 * kLanes; i + 4 * kLanes <= end; i += 4 * kLanes) {
      s0 = row.add(i, s0);
      s1 = row.add(i + kLanes, s1);
      s2 = row.add(i + 2 * kLanes, s2);
      s3 = row.add(i + 3 * kLanes, s3);
    }
    total += (s0 + s1) + (s2 + s3);
  }
  for (; i + kLanes <= n; i += kLanes) total = row.add(i, total);
  if (i == n) return total;
  if (n < kLanes) return row.first_some(0, n);
  // The last vector of the row again, without the lanes that are counted already.
  Bits lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = static_cast<uint32_t>(l);
  const Bits is_new = bit_cast<Bits>(lane >= static_cast<uint32_t>(kLanes - (n - i)));
  return total + bit_cast<Vec>(bit_cast<Bits>(row.first(n - kLanes)) & is_new);
}

// Positions contiguous: kLanes rows at a time, so that their lanes are summed together. partial [B, C].
template <typename Terms>
void sum_rows(Terms terms, const Problem& x, float* partial, int threads) {
  const int64_t channels = x.channel.size, groups = (channels + kLanes - 1) / kLanes;
  const int64_t length = x.position[x.rank - 1].size, rows = x.positions / length;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < x.batch.size * groups; ++item) {
    const int64_t b = item / groups, first = item % groups * kLanes,
                  count = std::min<int64_t>(kLanes, channels - first);
    Vec sums[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      const Terms channel =
          terms.at(b * x.batch.a + (first + i) * x.channel.a, b * x.batch.g + (first + i) * x.channel.g);
      if (rows == 1) {
        sums[i] = sum_row(channel, length);
        continue;
      }
      Cursor row(x.position, x.rank - 1, 0);
      for (int64_t r = 0; r < rows; ++r, row.next()) sums[i] += sum_row(channel.at(row.a, row.g), length);
    }
    store(partial + b * channels + first, sum_each(sums), count);
  }
}

// Channels contiguous: a piece is kChunk positions of one example, added row by row to running sums that stay
// in L1. Short rows go in pairs, or the next would wait for the sums that the last has just stored; long ones
// do not, since one stream of memory is read faster than two. partial [B, chunks, C].
template <typename Terms>
void sum_columns(Terms terms, const Problem& x, float* partial, int threads) {
  const int64_t channels = x.channel.size, chunks = (x.positions + kChunk - 1) / kChunk;
  const int64_t whole = channels / kLanes * kLanes, rest = channels - whole;
  const bool short_rows = channels < 16 * kLanes;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    std::vector<float> running(static_cast<size_t>(channels));
    float* const lower = running.data();
#pragma omp for schedule(static)
    for (int64_t item = 0; item < x.batch.size * chunks; ++item) {
      const int64_t b = item / chunks, begin = item % chunks * kChunk,
                    end = std::min(begin + kChunk, x.positions);
      const Terms example = terms.at(b * x.batch.a, b * x.batch.g);
      Cursor position(x.position, x.rank, begin);
      const auto take = [&] {
        const Terms here = example.at(position.a, position.g);
        position.next();
        return here;
      };
      float* const upper = partial + item * channels;
      std::fill_n(upper, channels, 0.0f);
      for (int64_t fold = begin; fold < end; fold += kFold) {
        const int64_t fold_end = std::min(fold + kFold, end);
        std::fill_n(lower, channels, 0.0f);
        int64_t p = fold;
        for (; short_rows && p + 2 <= fold_end; p += 2) {
          const Terms p0 = take(), p1 = take();
          for (int64_t c = 0; c < whole; c += kLanes)
            store(lower + c, load(lower + c) + p1.add(c, p0.first(c)));
          if (rest > 0) {
            const Vec two = p0.first_some(whole, rest) + p1.first_some(whole, rest);
            store(lower + whole, load(lower + whole, rest) + two, rest);
          }
        }
        for (; p < fold_end; ++p) {
          const Terms p0 = take();
          for (int64_t c = 0; c < whole; c += kLanes) store(lower + c, p0.add(c, load(lower + c)));
          if (rest > 0) store(lower + whole, load(lower + whole, rest) + p0.first_some(whole, rest), rest);
        }
        for (int64_t c = 0; c < channels; ++c) upper[c] += lower[c];
      }
    }
  }
}

// Any strides. partial [B, C].
template <typename Sum, typename Terms>
void sum_strided(Terms terms, const Problem& x, Sum* partial, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < x.batch.size * x.channel.size; ++item) {
    const int64_t b = item / x.channel.size, c = item % x.channel.size;
    const Terms channel = terms.at(b * x.batch.a + c * x.channel.a, b * x.batch.g + c * x.channel.g);
    const Dim inner = x.rank > 0 ? x.position[x.rank - 1] : Dim{1, 0, 0};
    Cursor row(x.position, std::max(x.rank - 1, 0), 0);
    Sum total = 0;
    for (int64_t r = 0; r < x.positions / inner.size; ++r, row.next()) {
      const Terms here = channel.at(row.a, row.g);
      for (int64_t begin = 0; begin < inner.size; begin += kFold) {
        const int64_t end = std::min(begin + kFold, inner.size);
        const auto one = [&](int64_t i) { return here.template one<Sum>(i * inner.a, i * inner.g); };
        Sum sums[4] = {};  // four chains of additions
        int64_t i = begin;
        for (; i + 4 <= end; i += 4)
          for (int k = 0; k < 4; ++k) sums[k] += one(i + k);
        for (; i < end; ++i) sums[0] += one(i);
        total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
      }
    }
    partial[item] = total;
  }
}

template <typename Sum>
inline double sum_some(const Sum* terms, int64_t n) {
  double sums[8] = {};  // chains of additions: a single one would wait for itself
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; ++k) sums[k] += static_cast<double>(terms[i + k]);
  for (; i < n; ++i) sums[0] += static_cast<double>(terms[i]);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

enum class Kind { taylor, taylor2, activation };

template <Kind kKind, typename Sum>
void sum_batch(const Sum* partial, const Problem& x, int64_t chunks, const TensorView& scores) {
  const int64_t channels = x.channel.size, units = scores.shape[0], width = channels / units;
  std::vector<double> score(static_cast<size_t>(units)), example(static_cast<size_t>(units));
  const auto add_example = [&](const auto* sums) {
    for (int64_t u = 0; u < units; ++u) {
      const double sum = static_cast<double>(sums[u]);
      score[static_cast<size_t>(u)] += kKind == Kind::taylor2 ? sum * sum : std::abs(sum);
    }
  };
  for (int64_t b = 0; b < x.batch.size; ++b, partial += chunks * channels) {
    if (chunks == 1 && width == 1) {
      add_example(partial);
      continue;
    }
    std::fill(example.begin(), example.end(), 0.0);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t u = 0; u < units; ++u)
        example[static_cast<size_t>(u)] += sum_some(partial + chunk * channels + u * width, width);
    add_example(example.data());
  }
  const double divisor =
      kKind == Kind::activation ? static_cast<double>(x.batch.size * x.positions * width) : 1.0;
  for (int64_t u = 0; u < units; ++u)
    scores.ptr<Sum>()[u] = static_cast<Sum>(score[static_cast<size_t>(u)] / divisor);
}

template <Kind kKind, typename T, typename Terms>
void run(Terms terms, const Problem& x, const TensorView& scores, int threads) {
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const auto allocate = [&](int64_t chunks) {
    return std::vector<Sum>(static_cast<size_t>(x.batch.size * chunks * x.channel.size));
  };
  if constexpr (!std::is_same_v<T, double>) {
    if (x.rank > 0 && both_contiguous(x.position[x.rank - 1])) {
      std::vector<float> partial = allocate(1);
      sum_rows(terms, x, partial.data(), threads);
      return sum_batch<kKind>(partial.data(), x, 1, scores);
    }
    if (both_contiguous(x.channel)) {
      const int64_t chunks = (x.positions + kChunk - 1) / kChunk;
      std::vector<float> partial = allocate(chunks);
      sum_columns(terms, x, partial.data(), threads);
      return sum_batch<kKind>(partial.data(), x, chunks, scores);
    }
  }
  std::vector<Sum> partial = allocate(1);
  sum_strided(terms, x, partial.data(), threads);
  sum_batch<kKind>(partial.data(), x, 1, scores);
}

template <typename T>
void run_kind(const TensorView& a, const TensorView& grad, const std::string& kind, int dim,
              const TensorView& scores, int threads) {
  if (kind == "activation")
    return run<Kind::activation, T>(Magnitude<T>{a.ptr<T>()}, Problem(a, a, dim), scores, threads);
  const Product<T> terms{a.ptr<T>(), grad.ptr<T>()};
  const Problem problem(a, grad, dim);
  if (kind == "taylor") return run<Kind::taylor, T>(terms, problem, scores, threads);
  run<Kind::taylor2, T>(terms, problem, scores, threads);
}

}  // namespace

void importance_cpu(const TensorView& a, const TensorView& grad, const std::string& kind, int64_t dim,
                    const TensorView& scores, int threads) {
  const int64_t units = scores.shape[0];
  MVP_CHECK(dim >= 1 && dim < a.ndim, "importance", "dim must be a dimension of a after the batch");
  MVP_CHECK(kind == "activation" || grad.ndim == a.ndim, "importance", "a and grad must have the same shape");
  if (units == 0) return;
  MVP_CHECK(a.shape[dim] % units == 0, "importance", "units must divide the channels");
  if (a.numel() == 0) {
    const double nothing = kind == "activation" ? std::nan("") : 0.0;  // a mean of nothing, a sum of nothing
    for (int64_t u = 0; u < units; ++u) {
      if (scores.dtype == DType::f64)
        scores.ptr<double>()[u] = nothing;
      else
        scores.ptr<float>()[u] = static_cast<float>(nothing);
    }
    return;
  }
  const int team = a.numel() >= kParallelElements ? threads : 1, d = static_cast<int>(dim);
  switch (a.dtype) {
    case DType::f32:
      return run_kind<float>(a, grad, kind, d, scores, team);
    case DType::f16:
      return run_kind<F16>(a, grad, kind, d, scores, team);
    case DType::bf16:
      return run_kind<Bf16>(a, grad, kind, d, scores, team);
    case DType::f64:
      return run_kind<double>(a, grad, kind, d, scores, team);
    default:
      MVP_CHECK(false, "importance", "expected a floating point tensor");
  }
}

}  // namespace mvp::MVP_ISA
