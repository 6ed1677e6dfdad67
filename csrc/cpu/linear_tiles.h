// The inner loops of pruned_linear: each fills one tile of the result from operands that lie as it wants
// them.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "mvp/simd.h"

namespace mvp::MVP_ISA {
namespace {

// Accumulators of the outer-product tile: kRows × kVecs of 32 (AVX-512) or 16 registers, the rest holds
// operands: one register for x, kVecs for the weight. 8 × 3 loads less for each product than 14 × 2, and was
// a tenth faster on Sapphire Rapids.
constexpr int kRows = kLanes == 16 ? 8 : kLanes == 8 ? 6 : 4;
constexpr int kVecs = kLanes == 16 ? 3 : 2;
constexpr int kWidth = kVecs * kLanes;
// With few rows of x a wider tile keeps the fused multiply-adds in flight.
constexpr int kWideRows = kLanes == 16 ? 4 : 2;
constexpr int kWideVecs = 6;
// Sums of this many inputs are added up in memory: one running sum over all inputs would lose more digits
// than a BLAS does. So much of a panel (24 KB) stays in the first cache while all rows pass by; where few do,
// what is packed while they wait must fit beside it.
constexpr int64_t kSumBlock = 128;
constexpr int64_t kFewRows = 64, kFewRowsSumBlock = 64;

// Kept inputs [first, first + count) lie in the kLanes columns of the weight that start at `base`.
struct Chunk {
  int64_t base, first, count;
};

// sums[r, c] = Σ over the chunks of x[r] · w[c], with R × C accumulators, the lanes added up at the end. x[r]
// holds the chunks one after the other; `mask` clears the columns of a chunk that are not kept.
template <typename T, int R, int C, bool Masked>
inline void dot_tile(const float* const* x, const T* const* w, const std::vector<Chunk>& chunks,
                     const Bits* mask, float* sums) {
  static_assert(R * C == kLanes, "one accumulator a lane of the result");
  Vec sum[kLanes] = {};
  const int64_t n = static_cast<int64_t>(chunks.size());
  for (int64_t c = 0; c < n; ++c) {
    const int64_t base = chunks[c].base;
    Vec xs[R];
    for (int r = 0; r < R; ++r) xs[r] = load(x[r] + c * kLanes);
    for (int j = 0; j < C; ++j) {
      Vec ws = load(w[j] + base);
      if (Masked) ws = bit_cast<Vec>(bit_cast<Bits>(ws) & mask[c]);
      for (int r = 0; r < R; ++r) sum[r * C + j] = fma(xs[r], ws, sum[r * C + j]);
    }
  }
  store(sums, sum_each(sum));
}

// sums[R][V vectors] (+)= Σ_k x[R][k] ⊗ w[k][V vectors], rows of x `stride` apart. `offset`: where row k of w
// starts; null where rows follow each other. `add`: to what is there.
template <typename T>
using OuterTile = void (*)(const float* x, int64_t stride, const T* w, const int64_t* offset, int64_t inputs,
                           bool add, float* sums);

// Unrolled by force: a loop that is left would put all sums into memory, from their beginning as zeros on.
template <int R, int V>
__attribute__((always_inline)) inline void put(const Vec (&sum)[R][V], bool add, float* sums) {
  if (add) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        float* to = sums + (r * V + v) * kLanes;
        store(to, load(to) + sum[r][v]);
      }
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(sums + (r * V + v) * kLanes, sum[r][v]);
  }
}

template <typename T, int R, int V>
void outer_tile(const float* x, int64_t stride, const T* w, const int64_t* offset, int64_t inputs, bool add,
                float* sums) {
  Vec sum[R][V] = {};
  const auto step = [&](int64_t k, const T* row) {
    Vec ws[V];
    for (int v = 0; v < V; ++v) ws[v] = load(row + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const Vec xs = broadcast(x[r * stride + k]);
      for (int v = 0; v < V; ++v) sum[r][v] = fma(xs, ws[v], sum[r][v]);
    }
  };
  if (offset) {
    for (int64_t k = 0; k < inputs; ++k) step(k, w + offset[k]);
  } else {
#pragma GCC unroll 2
    for (int64_t k = 0; k < inputs; ++k) step(k, w + k * V * kLanes);
  }
  put(sum, add, sums);
}

template <typename T, int V, size_t... R>
OuterTile<T> choose_tile(int64_t rows, std::index_sequence<R...>) {
  static constexpr OuterTile<T> tiles[] = {&outer_tile<T, R + 1, V>...};
  return tiles[rows - 1];
}

// What fills the tiles of packed panels, by a thread: how many rows of x and vectors of outputs they have at
// most, and how many inputs of a panel pass at once.
struct FloatTiles {
  static constexpr int64_t kTileRows = kRows, kTileVecs = kVecs, kMostInputs = kSumBlock;
  static int64_t inputs(int64_t rows) { return rows <= kFewRows ? kFewRowsSumBlock : kSumBlock; }

  void fill(int64_t rows, int64_t vecs, const float* x, int64_t stride, const float* panel, int64_t inputs,
            bool add, float* sums) const {
    constexpr auto kEach = std::make_index_sequence<kRows>();
    const auto tile = vecs == 1   ? choose_tile<float, 1>(rows, kEach)
                      : vecs == 2 ? choose_tile<float, 2>(rows, kEach)
                                  : choose_tile<float, kVecs>(rows, kEach);
    tile(x, stride, panel, nullptr, inputs, add, sums);
  }
};

#if defined(__AVX512F__)
#define MVP_HAVE_PAIRS 1
// The same for inputs that come as pairs of bf16 in 32 bits, with the machine's dot product of pairs: twice
// the speed, and half the bytes. Not part of this build's instruction set: ask have_pairs() first.
template <int R, int V>
__attribute__((target("avx512bf16"))) void pair_tile(const float* x, int64_t stride, const float* w,
                                                     const int64_t*, int64_t inputs, bool add, float* sums) {
  Vec sum[R][V] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < inputs; ++k) {
    __m512bh ws[V];
    for (int v = 0; v < V; ++v) ws[v] = bit_cast<__m512bh>(load(w + (k * V + v) * kLanes));
    for (int r = 0; r < R; ++r) {
      const auto xs = bit_cast<__m512bh>(_mm512_set1_ps(x[r * stride + k]));
      for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], xs, ws[v]);
    }
  }
  put(sum, add, sums);
}

template <int V, size_t... R>
OuterTile<float> choose_pair_tile(int64_t rows, std::index_sequence<R...>) {
  static constexpr OuterTile<float> tiles[] = {&pair_tile<R + 1, V>...};
  return tiles[rows - 1];
}

struct PairTiles : FloatTiles {
  void fill(int64_t rows, int64_t vecs, const float* x, int64_t stride, const float* panel, int64_t inputs,
            bool add, float* sums) const {
    constexpr auto kEach = std::make_index_sequence<kRows>();
    const auto tile = vecs == 1   ? choose_pair_tile<1>(rows, kEach)
                      : vecs == 2 ? choose_pair_tile<2>(rows, kEach)
                                  : choose_pair_tile<kVecs>(rows, kEach);
    tile(x, stride, panel, nullptr, inputs, add, sums);
  }
};

// 16 × 16 results from 16 rows of x, 16 pairs each, and 16 pairs of 16 outputs in an instruction; two by two
// of them at once. Ask have_amx() first. Inputs that are left over are PairTiles'.
class AmxTiles {
 public:
  static constexpr int64_t kTileRows = 32, kTileVecs = 2, kMostInputs = 256;
  static int64_t inputs(int64_t rows) { return rows <= kFewRows ? kFewRowsSumBlock : kMostInputs; }

  AmxTiles() = default;
  AmxTiles(const AmxTiles&) = delete;
  ~AmxTiles() {
    if (rows_ > 0) release();
  }

  void fill(int64_t rows, int64_t vecs, const float* x, int64_t stride, const float* panel, int64_t inputs,
            bool add, float* sums) {
    const int64_t whole = inputs / 16 * 16, width = vecs * kLanes;
    if (whole > 0) {
      if (rows != rows_) configure(rows);
      if (rows <= 16)
        vecs == 1 ? multiply<1, 1>(x, stride, panel, whole, add, sums)
                  : multiply<1, 2>(x, stride, panel, whole, add, sums);
      else
        vecs == 1 ? multiply<2, 1>(x, stride, panel, whole, add, sums)
                  : multiply<2, 2>(x, stride, panel, whole, add, sums);
    }
    if (whole == inputs && inputs > 0) return;
    for (int64_t r = 0; r < rows; r += kRows)
      rest_.fill(std::min<int64_t>(kRows, rows - r), vecs, x + r * stride + whole, stride,
                 panel + whole * width, inputs - whole, add || whole > 0, sums + r * width);
  }

 private:
  __attribute__((target("amx-tile"))) static void release() { _tile_release(); }

  // Tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 the panel; the second of rows has what the first
  // leaves.
  __attribute__((target("amx-tile"))) void configure(int64_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    const auto set = [&](int tile, int64_t tile_rows) {
      config.rows[tile] = static_cast<uint8_t>(tile_rows);
      config.bytes[tile] = tile_rows > 0 ? 64 : 0;
    };
    const int64_t first = std::min<int64_t>(16, rows), second = rows - first;
    for (int tile : {0, 1, 4}) set(tile, first);
    for (int tile : {2, 3, 5}) set(tile, second);
    for (int tile : {6, 7}) set(tile, 16);
    // Of the configuration the intrinsic names 8 bytes only: the others would never be written.
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
    rows_ = rows;
  }

  template <int A, int B>
  __attribute__((target("amx-tile,amx-bf16"))) static void multiply(const float* x, int64_t stride,
                                                                    const float* w, int64_t inputs, bool add,
                                                                    float* sums) {
    constexpr int64_t width = B * 16;
    constexpr int row = width * sizeof(float);
    const int64_t x_row = stride * static_cast<int64_t>(sizeof(float));
    float* const lower = sums + 16 * width;
    if (add) {
      _tile_loadd(0, sums, row);
      if constexpr (B == 2) _tile_loadd(1, sums + 16, row);
      if constexpr (A == 2) _tile_loadd(2, lower, row);
      if constexpr (A == 2 && B == 2) _tile_loadd(3, lower + 16, row);
    } else {
      _tile_zero(0);
      if constexpr (B == 2) _tile_zero(1);
      if constexpr (A == 2) _tile_zero(2);
      if constexpr (A == 2 && B == 2) _tile_zero(3);
    }
    for (int64_t k = 0; k < inputs; k += 16) {
      _tile_loadd(4, x + k, x_row);
      _tile_loadd(6, w + k * width, row);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (B == 2) {
        _tile_loadd(7, w + k * width + 16, row);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (A == 2) {
        _tile_loadd(5, x + 16 * stride + k, x_row);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (A == 2 && B == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, row);
    if constexpr (B == 2) _tile_stored(1, sums + 16, row);
    if constexpr (A == 2) _tile_stored(2, lower, row);
    if constexpr (A == 2 && B == 2) _tile_stored(3, lower + 16, row);
  }

  PairTiles rest_;
  int64_t rows_ = 0;
};
#endif

}  // namespace
}  // namespace mvp::MVP_ISA
