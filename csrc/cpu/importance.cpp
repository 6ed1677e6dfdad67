// One score a unit from an activation a and its gradient g, both [B, ..., C, ...]: a unit is D = C / units
// consecutive channels, everything else than batch and channels is a position.
//
//   s[b, u] = Σ over the positions and the unit's channels of a·g          (activation: of |a|)
//   taylor  Σ_b |s|      taylor2  Σ_b s²      activation  Σ_b s / number of elements of a unit
//
// Bytes: a and g once. A first pass sums positions into partial [B, chunks, C], a second, small one the
// batch, slab by slab, in a fixed order. Both are cut into pieces that do not depend on the number of
// threads, so neither does a bit of the result. Accumulators are float32 vectors in two levels (a fold every
// kFold terms), from the partial sums on double; float64 input is summed in double throughout. Two layouts
// are fast: positions contiguous (NCHW: a row a channel) and channels contiguous (channels_last, [B, n, C]).
#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>

#include "mvp/arguments.h"
#include "mvp/check.h"
#include "mvp/ops.h"
#include "mvp/simd.h"

namespace mvp::MVP_ISA {
namespace {

constexpr int64_t kParallelElements = 1 << 17;  // below, a fork costs more than it saves
constexpr int64_t kFold = 64;                   // terms in the lower level of a sum
constexpr int64_t kChunk = 1024;                // positions in one piece of work, channels contiguous
constexpr int64_t kSlab = 8;                    // examples whose scores are added up by one thread
constexpr int kTile = kLanes;  // running sums that stay in registers: half of those there are

// What one load brings, as vectors of floats. A load fills a register: of bfloat16 it holds two vectors'
// worth, the even and the odd elements, which a shift and a mask take apart. Sums do not care which is which.
template <typename T>
constexpr int kParts = std::is_same_v<T, Bf16> ? 2 : 1;
struct Pairs {};  // bfloat16 whose products are added up two by two, see PairProduct
template <typename T>
constexpr int64_t kStep = (std::is_same_v<T, Pairs> ? 2 : kParts<T>)*kLanes;  // elements of a block

template <typename T>
struct Block {
  Vec part[kParts<T>];
};

template <typename T>
inline Block<T> load_block(const T* p) {
  return {{load(p)}};
}
inline Block<Bf16> load_block(const Bf16* p) {
  Bits pairs;
  std::memcpy(&pairs, p, sizeof pairs);
#if defined(__AVX512F__)
  asm("" : "+v"(pairs));  // or the compiler loads it twice
#endif
  return {{bit_cast<Vec>(pairs << 16), bit_cast<Vec>(pairs & 0xffff0000u)}};
}

template <typename T>
inline Block<T> load_block(const T* p, int64_t n) {
  return {{load(p, n)}};
}
inline Block<Bf16> load_block(const Bf16* p, int64_t n) {
  Bf16 all[kStep<Bf16>] = {};
  std::memcpy(all, p, static_cast<size_t>(n) * sizeof(Bf16));
  return load_block(all);
}

template <typename T>
inline Block<T> operator+(Block<T> x, const Block<T>& y) {
  for (int k = 0; k < kParts<T>; ++k) x.part[k] += y.part[k];
  return x;
}

// Elements of `first` before the n-th, of `others` from it on: selected, not weighted.
template <typename T>
inline Block<T> join(int64_t n, const Block<T>& first, const Block<T>& others) {
  Block<T> joined;
  for (int k = 0; k < kParts<T>; ++k)
    joined.part[k] = join((n + kParts<T> - 1 - k) / kParts<T>, first.part[k], others.part[k]);
  return joined;
}

template <typename T>
inline void store_block(float* p, const Block<T>& block, int64_t n) {
  if constexpr (kParts<T> == 1) {
    store(p, block.part[0], n);
  } else {
    const int64_t first = std::min<int64_t>(n, kLanes);
    store(p, pick<Zip<0>>(block.part[0], block.part[1]), first);
    store(p + first, pick<Zip<1>>(block.part[0], block.part[1]), n - first);
  }
}

template <typename T>
inline Vec combine(const Block<T>& block) {
  Vec sum = block.part[0];
  for (int k = 1; k < kParts<T>; ++k) sum += block.part[k];
  return sum;
}

// The elements [begin, end) of a block, the others being 0; only a whole one may be read in full.
template <typename T>
inline Block<T> load_part(const T* p, int64_t begin, int64_t end, bool whole) {
  return join(begin, {}, join(end, whole ? load_block(p) : load_block(p, end), {}));
}
#if defined(__AVX512F__)
inline Block<float> load_part(const float* p, int64_t begin, int64_t end, bool) {
  return {{_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << end) - (1u << begin)), p)}};
}
#endif

// What is summed: a·g, or |a|. Of a part of a block, what lies outside of it is not looked at: NaN stays in
// its row.
template <typename T>
struct Product {
  using Element = T;
  const T *a, *g;
  Product at(int64_t offset_a, int64_t offset_g) const { return {a + offset_a, g + offset_g}; }
  Block<T> add(int64_t i, Block<T> sum) const { return add(load_block(a + i), load_block(g + i), sum); }
  Block<T> part(int64_t i, int64_t begin, int64_t end, bool whole) const {
    return add(load_part(a + i, begin, end, whole), load_part(g + i, begin, end, whole), {});
  }
  template <typename Sum>
  Sum one(int64_t offset_a, int64_t offset_g) const {
    return static_cast<Sum>(to_float(a[offset_a])) * static_cast<Sum>(to_float(g[offset_g]));
  }

 private:
  static Block<T> add(const Block<T>& x, const Block<T>& y, Block<T> sum) {
    for (int k = 0; k < kParts<T>; ++k) sum.part[k] = fma(x.part[k], y.part[k], sum.part[k]);
    return sum;
  }
};

template <>
template <>
inline double Product<double>::one<double>(int64_t offset_a, int64_t offset_g) const {
  return a[offset_a] * g[offset_g];
}

template <typename T>
struct Magnitude {
  using Element = T;
  const T* a;
  Magnitude at(int64_t offset_a, int64_t) const { return {a + offset_a}; }
  Block<T> add(int64_t i, Block<T> sum) const { return sum + magnitude(load_block(a + i)); }
  Block<T> part(int64_t i, int64_t begin, int64_t end, bool whole) const {
    return magnitude(load_part(a + i, begin, end, whole));
  }
  template <typename Sum>
  Sum one(int64_t offset_a, int64_t) const {
    return std::abs(static_cast<Sum>(to_float(a[offset_a])));
  }

 private:
  static Block<T> magnitude(Block<T> x) {
    for (Vec& part : x.part) part = bit_cast<Vec>(bit_cast<Bits>(part) & 0x7fffffffu);
    return x;
  }
};

template <>
template <>
inline double Magnitude<double>::one<double>(int64_t offset_a, int64_t) const {
  return std::abs(a[offset_a]);
}

#if defined(__AVX512F__)
// a·g of bfloat16, neighbours added up at once: where they belong to the same sum, that takes a third of the
// instructions. Less than float32's smallest normal number counts as 0.
struct PairProduct {
  using Element = Pairs;
  const Bf16 *a, *g;
  PairProduct at(int64_t offset_a, int64_t offset_g) const { return {a + offset_a, g + offset_g}; }
  Block<Pairs> add(int64_t i, Block<Pairs> sum) const {
    return {{add_pairs(_mm512_loadu_si512(a + i), _mm512_loadu_si512(g + i), sum.part[0])}};
  }
  Block<Pairs> part(int64_t i, int64_t begin, int64_t end, bool) const {
    const auto elements = static_cast<__mmask32>((uint64_t{1} << end) - (uint64_t{1} << begin));
    return {{add_pairs(_mm512_maskz_loadu_epi16(elements, a + i), _mm512_maskz_loadu_epi16(elements, g + i),
                       Vec{})}};
  }
};
#endif

// sum(terms), or with pairs where the machine has them.
template <typename Terms, typename Sum>
inline void choose_pairs(const Terms& terms, const Sum& sum) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Terms, Product<Bf16>>)
    if (have_pairs()) return sum(PairProduct{terms.a, terms.g});
#endif
  sum(terms);
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

inline int64_t count_slabs(const Problem& x) { return (x.batch.size + kSlab - 1) / kSlab; }
inline int64_t count_chunks(const Problem& x) { return (x.positions + kChunk - 1) / kChunk; }

inline bool both_contiguous(const Dim& dim) { return dim.a == 1 && dim.g == 1; }

// sums[r], still spread over the lanes: row r of `count` rows of n elements that follow each other. They are
// read as one stream of whole blocks, whose loads stay as aligned as the first is; a block in which one row
// ends and the next begins is read for both.
template <typename Terms>
inline void sum_adjacent(Terms terms, int64_t n, int64_t count, Vec* sums) {
  using T = typename Terms::Element;
  constexpr int64_t step = kStep<T>;
#if defined(__AVX512F__)
  // Less than four blocks of pairs are read faster row by row, unaligned: nothing is read twice, and every
  // row goes the same way.
  if constexpr (std::is_same_v<T, Pairs>) {
    if (n < 4 * step) {
      const int64_t blocks = n / step * step;
      for (int64_t r = 0; r < count; ++r) {
        Block<T> total{};
        for (int64_t at = 0; at < blocks; at += step) total = terms.add(r * n + at, total);
        if (blocks < n) total = total + terms.part(r * n + blocks, 0, n - blocks, false);
        sums[r] = combine(total);
      }
      return;
    }
  }
#endif
  const int64_t whole = count * n - step;  // blocks up to here are
  for (int64_t r = 0; r < count; ++r) {
    const int64_t begin = r * n, end = begin + n;
    int64_t at = begin - begin % step;
    Block<T> total{};
    if (at < begin) {
      total = terms.part(at, begin - at, std::min(end - at, step), at <= whole);
      at += step;
    }
    while (end - at >= 4 * step) {
      const int64_t fold = std::min(at + kFold * step, end);
      Block<T> s0{}, s1{}, s2{}, s3{};
      for (; at + 4 * step <= fold; at += 4 * step) {
        s0 = terms.add(at, s0);
        s1 = terms.add(at + step, s1);
        s2 = terms.add(at + 2 * step, s2);
        s3 = terms.add(at + 3 * step, s3);
      }
      total = total + ((s0 + s1) + (s2 + s3));
    }
    for (; at + step <= end; at += step) total = terms.add(at, total);
    if (at < end) total = total + terms.part(at, 0, end - at, at <= whole);
    sums[r] = combine(total);
  }
}

// Positions contiguous: a block of rows at a time, so that the lanes of kLanes sums are added up together,
// and so that rows without gaps end with a whole block. partial [B, C].
template <typename Terms>
void sum_rows(Terms terms, const Problem& x, float* partial) {
  constexpr int64_t step = kStep<typename Terms::Element>;
  const int64_t channels = x.channel.size, groups = (channels + step - 1) / step;
  const int64_t length = x.position[x.rank - 1].size, rows = x.positions / length;
  const bool adjacent = rows == 1 && x.channel.a == length && x.channel.g == length;
#pragma omp for schedule(static)
  for (int64_t item = 0; item < x.batch.size * groups; ++item) {
    const int64_t b = item / groups, first = item % groups * step, count = std::min(step, channels - first);
    const Terms group = terms.at(b * x.batch.a + first * x.channel.a, b * x.batch.g + first * x.channel.g);
    Vec sums[step];
    std::fill(sums + count, sums + step, Vec{});
    if (adjacent) {
      sum_adjacent(group, length, count, sums);
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const Terms channel = group.at(i * x.channel.a, i * x.channel.g);
        Cursor row(x.position, x.rank - 1, 0);
        sums[i] = Vec{};
        for (int64_t r = 0; r < rows; ++r, row.next()) {
          Vec sum;
          sum_adjacent(channel.at(row.a, row.g), length, 1, &sum);
          sums[i] += sum;
        }
      }
    }
    for (int64_t i = 0; i < count; i += kLanes)
      store(partial + b * channels + first + i, sum_each(sums + i), std::min<int64_t>(kLanes, count - i));
  }
}

// Adds the blocks [i, i + width) of n positions to their running sums, which stay in registers meanwhile.
template <int width, typename Terms>
inline void add_positions(Terms terms, const int64_t* at_a, const int64_t* at_g, int64_t n, int64_t i,
                          Block<typename Terms::Element>* running) {
  Block<typename Terms::Element> sums[width];
  for (int w = 0; w < width; ++w) sums[w] = running[i + w];
  for (int64_t p = 0; p < n; ++p) {
    const Terms here = terms.at(at_a[p], at_g[p]);
#pragma GCC unroll 16  // all of it, or the compiler swaps the loops and the sums go through memory
    for (int w = 0; w < width; ++w) sums[w] = here.add((i + w) * kStep<typename Terms::Element>, sums[w]);
  }
  for (int w = 0; w < width; ++w) running[i + w] = sums[w];
}

// Channels contiguous: a piece is kChunk positions of one example, added to running sums. Where a row's sums
// fit into registers, they stay there for a whole fold; else rows go four by four, their sums in L1: a stream
// of memory is read faster than many pieces. partial [B, chunks, C].
template <typename Terms>
void sum_columns(Terms terms, const Problem& x, float* partial) {
  using T = typename Terms::Element;
  constexpr int64_t step = kStep<T>;
  const int64_t channels = x.channel.size, chunks = count_chunks(x);
  const int64_t blocks = channels / step, rest = channels % step;
  const int64_t together = blocks * kParts<T> <= kTile ? kFold : 4;
  std::vector<Block<T>> lower(static_cast<size_t>(blocks + 1)), upper(static_cast<size_t>(blocks + 1));
  int64_t at_a[kFold], at_g[kFold];
#pragma omp for schedule(static)
  for (int64_t item = 0; item < x.batch.size * chunks; ++item) {
    const int64_t b = item / chunks, begin = item % chunks * kChunk,
                  end = std::min(begin + kChunk, x.positions);
    const Terms example = terms.at(b * x.batch.a, b * x.batch.g);
    Cursor position(x.position, x.rank, begin);
    std::fill(upper.begin(), upper.end(), Block<T>{});
    for (int64_t fold = begin; fold < end; fold += kFold) {
      const int64_t n = std::min(kFold, end - fold);
      for (int64_t p = 0; p < n; ++p, position.next()) at_a[p] = position.a, at_g[p] = position.g;
      std::fill(lower.begin(), lower.end(), Block<T>{});
      for (int64_t p = 0; p < n; p += together) {
        int64_t i = 0;
        const auto add = [&](auto width) {
          for (; i + width <= blocks; i += width)
            add_positions<width>(example, at_a + p, at_g + p, std::min(together, n - p), i, lower.data());
        };
        // At least 1: a width of 0 would never come to the end.
        add(std::integral_constant<int, std::max(1, kTile / kParts<T>)>());
        add(std::integral_constant<int, std::max(1, kTile / 2 / kParts<T>)>());
        add(std::integral_constant<int, std::max(1, kTile / 4 / kParts<T>)>());
        add(std::integral_constant<int, 1>());
      }
      for (int64_t p = 0; rest > 0 && p < n; ++p)
        lower[blocks] = lower[blocks] + example.at(at_a[p], at_g[p]).part(blocks * step, 0, rest, false);
      for (size_t i = 0; i < lower.size(); ++i) upper[i] = upper[i] + lower[i];
    }
    float* const sums = partial + item * channels;
    for (int64_t i = 0; i < blocks; ++i) store_block(sums + i * step, upper[i], step);
    if (rest > 0) store_block(sums + blocks * step, upper[blocks], rest);
  }
}

// Channels contiguous, units of whole blocks (heads): a running sum a unit, so that a position is a stream.
// partial [B, chunks, units, kLanes].
template <typename Terms>
void sum_units(Terms terms, const Problem& x, int64_t units, float* partial) {
  using T = typename Terms::Element;
  constexpr int64_t step = kStep<T>;
  const int64_t chunks = count_chunks(x), blocks = x.channel.size / units / step;
  const int64_t fold = std::max<int64_t>(kFold / blocks, 1);
  std::vector<Block<T>> lower(static_cast<size_t>(units)), upper(static_cast<size_t>(units));
#pragma omp for schedule(static)
  for (int64_t item = 0; item < x.batch.size * chunks; ++item) {
    const int64_t b = item / chunks, begin = item % chunks * kChunk,
                  end = std::min(begin + kChunk, x.positions);
    const Terms example = terms.at(b * x.batch.a, b * x.batch.g);
    Cursor position(x.position, x.rank, begin);
    std::fill(upper.begin(), upper.end(), Block<T>{});
    for (int64_t p = begin; p < end;) {
      std::fill(lower.begin(), lower.end(), Block<T>{});
      for (const int64_t stop = std::min(p + fold, end); p < stop; ++p, position.next()) {
        Terms here = example.at(position.a, position.g);
        for (Block<T>& running : lower) {
          Block<T> sum = running;
          for (int64_t i = 0; i < blocks; ++i) sum = here.add(i * step, sum);
          running = sum;
          here = here.at(blocks * step, blocks * step);
        }
      }
      for (size_t u = 0; u < lower.size(); ++u) upper[u] = upper[u] + lower[u];
    }
    float* const sums = partial + item * units * kLanes;
    for (int64_t u = 0; u < units; ++u) store(sums + u * kLanes, combine(upper[static_cast<size_t>(u)]));
  }
}

// Any strides. partial [B, C].
template <typename Sum, typename Terms>
void sum_strided(Terms terms, const Problem& x, Sum* partial) {
#pragma omp for schedule(static)
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

// by_slab [slabs, units], a slab being kSlab examples: so the threads that have made the partial sums also
// read them (about), and what goes from core to core is small. partial [B, chunks, units, width].
template <Kind kKind, typename Sum>
void sum_slabs(const Sum* partial, const Problem& x, int64_t chunks, int64_t units, int64_t width,
               double* by_slab) {
  std::vector<double> example(static_cast<size_t>(units));
#pragma omp for schedule(static)
  for (int64_t slab = 0; slab < count_slabs(x); ++slab) {
    double* const score = by_slab + slab * units;
    std::fill_n(score, units, 0.0);
    const auto add_example = [&](const auto* sums) {
      for (int64_t u = 0; u < units; ++u) {
        const double sum = static_cast<double>(sums[u]);
        score[u] += kKind == Kind::taylor2 ? sum * sum : std::abs(sum);
      }
    };
    for (int64_t b = slab * kSlab; b < std::min((slab + 1) * kSlab, x.batch.size); ++b) {
      const Sum* const sums = partial + b * chunks * units * width;
      if (chunks == 1 && width == 1) {
        add_example(sums);
        continue;
      }
      std::fill(example.begin(), example.end(), 0.0);
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t u = 0; u < units; ++u)
          example[static_cast<size_t>(u)] += sum_some(sums + (chunk * units + u) * width, width);
      add_example(example.data());
    }
  }
}

// Memory for a thread to write first.
template <typename T>
std::unique_ptr<T[]> allocate(int64_t n) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(n)]);
}

template <Kind kKind, typename T, typename Terms>
void run(Terms terms, const Problem& x, const TensorView& scores, int threads) {
  using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
  constexpr bool vectors = !std::is_same_v<T, double>;
  const int64_t channels = x.channel.size, units = scores.shape[0], slabs = count_slabs(x);
  const bool in_rows = vectors && x.rank > 0 && both_contiguous(x.position[x.rank - 1]);
  const bool in_columns = vectors && !in_rows && both_contiguous(x.channel);
  // Of three units on, the next one's additions fill the time that a sum waits for itself.
  const bool in_units = in_columns && units > 2 && units < channels && channels / units % kStep<T> == 0;
  const int64_t chunks = in_columns ? count_chunks(x) : 1, width = in_units ? kLanes : channels / units;
  const auto partial = allocate<Sum>(x.batch.size * chunks * units * width);
  const auto by_slab = allocate<double>(slabs * units);
  const auto work = [&] {
    if constexpr (vectors) {
      if (in_rows) choose_pairs(terms, [&](auto some) { sum_rows(some, x, partial.get()); });
      if (in_units) choose_pairs(terms, [&](auto some) { sum_units(some, x, units, partial.get()); });
      if (in_columns && !in_units) sum_columns(terms, x, partial.get());
    }
    if (!in_rows && !in_columns) sum_strided(terms, x, partial.get());
    sum_slabs<kKind>(partial.get(), x, chunks, units, width, by_slab.get());
  };
  if (threads == 1) {
    work();  // a parallel region costs half a microsecond, also one of one thread
  } else {
#pragma omp parallel num_threads(threads)
    work();
  }
  const double divisor =
      kKind == Kind::activation ? static_cast<double>(x.batch.size * x.positions * (channels / units)) : 1.0;
  for (int64_t u = 0; u < units; ++u) {
    double score = 0;
    for (int64_t slab = 0; slab < slabs; ++slab) score += by_slab[slab * units + u];
    scores.ptr<Sum>()[u] = static_cast<Sum>(score / divisor);
  }
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
  check_importance({}, a, grad, kind, dim, scores);
  const int64_t units = scores.shape[0];
  if (units == 0) return;
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
