// A block's part of a matrix product on tensor cores: tiles of both operands in shared memory, a pipeline of
// asynchronous copies into them, and the products of their fragments. float16 or bfloat16, sums in float32.
#pragma once

#include "common.cuh"

namespace mvp::cuda {

constexpr int kHalves = 8;  // elements of 16 bits in a 16-byte vector

// Rows of kVectors 16-byte vectors in shared memory. A vector's place in its 128-byte line depends on the
// row, so that eight rows' vectors of one column, as ldmatrix reads them, lie in different banks, and so do
// the consecutive vectors that the copies write.
template <int kRows, int kVectors>
struct SharedTile {
  static_assert(kVectors >= 4 && (kVectors & (kVectors - 1)) == 0);
  static constexpr unsigned kRowsALine = kVectors >= 8 ? 1 : 8 / kVectors;
  static constexpr unsigned kPlaces = kVectors >= 8 ? 8 : kVectors;
  Vec16<uint16_t> vectors[kRows * kVectors];

  __device__ __forceinline__ Vec16<uint16_t>* at(unsigned row, unsigned vector) {
    return vectors + row * kVectors + (vector ^ (row / kRowsALine % kPlaces));
  }
};

// A block's tile of y, kM × kN, made in steps of kK inputs, kStages of which are in shared memory or on their
// way. Its warps share kM and kN, and with kWarpsK > 1 each step's inputs.
template <int kM_, int kN_, int kK_, int kWarpsM_, int kWarpsN_, int kWarpsK_, int kStages_, int kBlocks_>
struct Tiling {
  static constexpr int kM = kM_, kN = kN_, kK = kK_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kWarpsK = kWarpsK_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;  // that are to fit on a multiprocessor
  static constexpr int kThreads = kWarpsM * kWarpsN * kWarpsK * kWarp;
  static constexpr int kFragmentsM = kM / kWarpsM / 16, kFragmentsN = kN / kWarpsN / 8;
  static constexpr int kSteps = kK / 16 / kWarpsK;
  static_assert(kFragmentsN % 2 == 0, "ldmatrix_x4 fetches two fragments of W");
  static_assert(kSteps % 2 == 0, "two sets of fragments take turns");

  // A barrier of the kThreads threads that multiply, who are the block's first.
  __device__ static void sync() { __syncthreads(); }
};

// x lies as [kM][kK]; W as [kN][kK], or input-major as [kK][kN].
template <typename Tiling, bool kInputMajor>
struct Stage {
  SharedTile<Tiling::kM, Tiling::kK / kHalves> x;
  SharedTile<kInputMajor ? Tiling::kK : Tiling::kN, (kInputMajor ? Tiling::kN : Tiling::kK) / kHalves> weight;
};

// A warp's sums, and the fragments that they are made of.
template <typename T, typename Tiling, bool kInputMajor>
struct WarpProduct {
  float sum[Tiling::kFragmentsM][Tiling::kFragmentsN][4] = {};
  uint32_t x[2][Tiling::kFragmentsM][4], weight[2][Tiling::kFragmentsN][2];
  unsigned lane, first_m, first_n, first_k;  // of the warp, in the block's tile; k counts vectors

  __device__ WarpProduct() {
    const unsigned warp = threadIdx.x / kWarp;
    lane = threadIdx.x % kWarp;
    first_m = warp % Tiling::kWarpsM * (Tiling::kM / Tiling::kWarpsM);
    first_n = warp / Tiling::kWarpsM % Tiling::kWarpsN * (Tiling::kN / Tiling::kWarpsN);
    first_k = warp / (Tiling::kWarpsM * Tiling::kWarpsN) * (Tiling::kSteps * 2);
  }

  // Two neighbouring sums of fragment (i, j), in its upper or lower eight rows.
  __device__ __forceinline__ float2 pair(int i, int j, int half) const {
    return make_float2(sum[i][j][2 * half], sum[i][j][2 * half + 1]);
  }

  // Fragments of 16 inputs, into set step % 2.
  __device__ __forceinline__ void fetch(Stage<Tiling, kInputMajor>& stage, unsigned step) {
    const unsigned set = step % 2, k = first_k + step * 2;
#pragma unroll
    for (unsigned i = 0; i < Tiling::kFragmentsM; ++i)
      ldmatrix_x4(x[set][i], stage.x.at(first_m + i * 16 + lane % 16, k + lane / 16));
#pragma unroll
    for (unsigned j = 0; j < Tiling::kFragmentsN; j += 2) {
      uint32_t pair[4];
      if constexpr (kInputMajor)
        ldmatrix_x4_trans(pair, stage.weight.at(k * kHalves + lane % 16, first_n / kHalves + j + lane / 16));
      else
        ldmatrix_x4(pair, stage.weight.at(first_n + j * 8 + lane / 16 * 8 + lane % 8, k + lane / 8 % 2));
      weight[set][j][0] = pair[0], weight[set][j][1] = pair[1];
      weight[set][j + 1][0] = pair[2], weight[set][j + 1][1] = pair[3];
    }
  }

  __device__ __forceinline__ void multiply(unsigned step) {
    const unsigned set = step % 2;
#pragma unroll
    for (int i = 0; i < Tiling::kFragmentsM; ++i)
#pragma unroll
      for (int j = 0; j < Tiling::kFragmentsN; ++j) mma_m16n8k16<T>(sum[i][j], x[set][i], weight[set][j]);
  }
};

// Adds up `count` stages. `load(stage)` starts this thread's copies of the next stage; it is called `count`
// times. While a set of fragments is multiplied, the next one is read and kStages - 1 stages are on their
// way; one barrier a stage: it says that the next one has come, and that the last one may be overwritten.
template <typename T, typename Tiling, bool kInputMajor, typename Load>
__device__ __forceinline__ void multiply_stages(WarpProduct<T, Tiling, kInputMajor>& product,
                                                Stage<Tiling, kInputMajor>* stages, int count, Load&& load) {
  constexpr int kStages = Tiling::kStages, kSteps = Tiling::kSteps;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < count) load(stages[s]);
    cp_async_commit();
  }
  cp_async_wait<kStages - 2>();
  __syncthreads();
  int current = 0, free = kStages - 1;
  product.fetch(stages[current], 0);
  for (int s = 0; s < count; ++s) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step == kSteps - 1) {
        cp_async_wait<kStages - 2>();
        __syncthreads();
        free = current;
        current = current + 1 == kStages ? 0 : current + 1;
      }
      product.fetch(stages[current], (step + 1) % kSteps);  // past the end: read, not multiplied
      if (step == 0) {
        if (s + kStages - 1 < count) load(stages[free]);
        cp_async_commit();
      }
      product.multiply(step);
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // the stages are free for other use
}

// The block's sums, row by row, through shared memory, padded so that the fragments' rows lie in different
// banks. Every thread gets four columns of the tile, always the same.
template <typename Tiling>
struct Slab {
  static constexpr int kQuads = Tiling::kN / 4, kRowsAtOnce = Tiling::kThreads / kQuads;
  static constexpr int kPasses = Tiling::kM / kRowsAtOnce, kBatch = kPasses < 4 ? kPasses : 4;
  static_assert(Tiling::kThreads % kQuads == 0 && Tiling::kM % (kRowsAtOnce * kBatch) == 0);
  float at[Tiling::kWarpsK][Tiling::kM][Tiling::kN + 8];

  __device__ static int column_of_thread() { return static_cast<int>(threadIdx.x) % kQuads * 4; }

  // Calls `use(row, sums, prepare(row))` for each row of the tile; what `prepare` loads is on its way while
  // the rows before are used. Not unrolled further: with a long `use` the code would outgrow its cache.
  template <typename Product, typename Prepare, typename Use>
  __device__ __forceinline__ void each_row(const Product& product, Prepare&& prepare, Use&& use) {
    const int my_row = static_cast<int>(threadIdx.x) / kQuads, column = column_of_thread();
    put(product);
    decltype(prepare(0)) next[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) next[b] = prepare(b * kRowsAtOnce + my_row);
    Tiling::sync();
#pragma unroll 1
    for (int first = my_row; first < Tiling::kM; first += kBatch * kRowsAtOnce) {
      decltype(prepare(0)) prepared[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        prepared[b] = next[b];
        const int ahead = first + (kBatch + b) * kRowsAtOnce;
        if (ahead < Tiling::kM) next[b] = prepare(ahead);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int row = first + b * kRowsAtOnce;
        float4 sum = *reinterpret_cast<const float4*>(&at[0][row][column]);
#pragma unroll
        for (int k = 1; k < Tiling::kWarpsK; ++k) {
          const float4 more = *reinterpret_cast<const float4*>(&at[k][row][column]);
          sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        use(row, sum, prepared[b]);
      }
    }
  }

 private:
  template <typename Product>
  __device__ __forceinline__ void put(const Product& product) {
    const unsigned part = threadIdx.x / kWarp / (Tiling::kWarpsM * Tiling::kWarpsN);
    const unsigned row = product.first_m + product.lane / 4, column = product.first_n + product.lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < Tiling::kFragmentsM; ++i)
#pragma unroll
      for (int j = 0; j < Tiling::kFragmentsN; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(&at[part][row + i * 16 + half * 8][column + j * 8]) =
              product.pair(i, j, half);
  }
};

}  // namespace mvp::cuda
