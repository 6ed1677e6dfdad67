// y[m, j] = Σ_k x[m, k] · W[out_j, in_k] + b[out_j]      out = residual, with y added at the columns out_j
//
// out_j and in_k are the kept rows and columns of the FULL weight; no compact copy of it is made. There are
// three ways, chosen by choose_path() from the number of rows M and the weight's layout.
//
// dot: M small, W row-major. A tile of x rows × W rows keeps one vector accumulator a pair, walks along the
// kept columns and sums the lanes at the end. Columns are read as whole vectors that cover the kept ones; the
// others are masked to zero.
//
// direct: M small, W input-major (a transposed view). Outer products; each kept input is one contiguous row.
//
// packed: the rest. A panel of W, of as many outputs as a tile is wide, is packed slice by slice of the kept
// inputs to f32 [k][outputs], kept rows transposed in registers, and each slice is multiplied with up to
// kBlockRows rows of x, which are read where they lie, before the next one is packed. Where the machine
// multiplies pairs of bf16, pairs stay as they are; where it has AMX, in tiles of 16 × 16 results.
//
// Threads: contiguous ranges of (block of x rows, panel). Accumulator: f32, in an order that does not depend
// on the number of threads. Bytes: the kept rows of W once for every block of x rows; x once for every panel
// (from L2); out once.
#include <algorithm>
#include <memory>
#include <utility>

#include "linear_tiles.h"
#include "mvp/amx.h"
#include "mvp/arguments.h"
#include "mvp/ops.h"
#include "mvp/simd.h"

namespace mvp::MVP_ISA {
namespace {

constexpr char kOp[] = "pruned_linear";
// With more rows of x, packing a panel costs less than it saves (measured at 384 to 1536 inputs, kept 0.5 to
// 1, on both AVX2 and AVX-512).
constexpr int64_t kDotRows = 4;
// Each tile of rows reads the weight again: two at most.
constexpr int64_t kDirectRows = 2 * kRows;
// 512 rows of x make packing a panel about 1/50 of the work on it.
constexpr int64_t kBlockRows = 512;
// Below this many multiply-adds the work is done before a second thread has started (~3 µs).
constexpr int64_t kThreadWork = 1 << 16;

template <typename T>
struct Problem {
  int64_t rows, outputs, inputs;  // M, and the kept N and K
  const T* x;                     // [M, K]
  const T* weight;
  int64_t output_stride, input_stride, columns;  // of the full weight; `columns` is its number of inputs
  std::vector<int64_t> output, input;            // kept rows and columns of the weight
  std::vector<Chunk> chunks;                     // `input`, for row-major weights
  std::vector<float> bias;                       // [N], zeros if there is none
  const T* base;                                 // added to y: the residual, or null
  T* out;
  int64_t out_stride;
  bool scatter;  // y goes to column output[j] of out, not j
};

// The positions that an index keeps. None are listed where there is no work, but the index is checked.
std::vector<int64_t> expand(const TensorView& index, int64_t block, int64_t size, const char* name,
                            bool is_work) {
  std::vector<int64_t> positions;
  if (!is_work && !index.defined()) return positions;
  if (!index.defined()) {
    positions.resize(size);
    for (int64_t i = 0; i < size; ++i) positions[i] = i;
    return positions;
  }
  const int64_t n = index.numel(), stride = index.stride[0], limit = size / block;
  if (is_work) positions.reserve(n * block);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t unit =
        index.dtype == DType::i32 ? index.ptr<int32_t>()[i * stride] : index.ptr<int64_t>()[i * stride];
    if (unit < 0 || unit >= limit)
      throw std::invalid_argument(std::string(kOp) + ": " + name + ": expected values in [0, " +
                                  std::to_string(limit) + "), got " + std::to_string(unit));
    for (int64_t j = 0; is_work && j < block; ++j) positions.push_back(unit * block + j);
  }
  return positions;
}

std::vector<Chunk> find_chunks(const std::vector<int64_t>& input, int64_t columns) {
  std::vector<Chunk> chunks;
  const int64_t n = static_cast<int64_t>(input.size());
  for (int64_t k = 0; k < n;) {
    const int64_t base = std::max<int64_t>(0, std::min(input[k], columns - kLanes));
    int64_t end = k + 1;
    while (end < n && input[end] > input[end - 1] && input[end] - base < kLanes) ++end;
    chunks.push_back({base, k, end - k});
    k = end;
  }
  return chunks;
}

bool is_run(const int64_t* at, int64_t n) {
  for (int64_t i = 1; i < n; ++i)
    if (at[i] != at[0] + i) return false;
  return true;
}

// Row m of the result, outputs [first, first + count), from their sums.
template <typename T>
void finish(const Problem<T>& p, const float* sums, int64_t m, int64_t first, int64_t count) {
  T* out = p.out + m * p.out_stride;
  const T* base = p.base ? p.base + m * p.out_stride : nullptr;
  for (int64_t j = 0; j < count; j += kLanes) {
    const int64_t at = first + j, n = std::min<int64_t>(kLanes, count - j);
    Vec y = load(sums + j, n) + load(p.bias.data() + at, n);
    if (!p.scatter) {
      if (base) y = y + load(base + at, n);
      store(out + at, y, n);
      continue;
    }
    for (int64_t i = 0; i < n; ++i) {  // one by one: an output may come twice
      T* to = out + p.output[at + i];
      store(to, load(to, 1) + y[i], 1);
    }
  }
}

template <typename T, int R, bool Masked>
void dot_rows(const Problem<T>& p, const float* x, const Bits* mask, int threads) {
  constexpr int C = kLanes / R;
  const int64_t width = static_cast<int64_t>(p.chunks.size()) * kLanes;
  const int64_t groups = (p.outputs + C - 1) / C;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * C, count = std::min<int64_t>(C, p.outputs - first);
    const T* w[C];  // past the last output: the last one again, ignored
    for (int j = 0; j < C; ++j)
      w[j] = p.weight + p.output[std::min(first + j, p.outputs - 1)] * p.output_stride;
    for (int64_t m = 0; m < p.rows; m += R) {
      const float* xs[R];
      float sums[kLanes];
      for (int r = 0; r < R; ++r) xs[r] = x + std::min(m + r, p.rows - 1) * width;
      dot_tile<T, R, C, Masked>(xs, w, p.chunks, mask, sums);
      for (int r = 0; r < R && m + r < p.rows; ++r) finish(p, sums + r * C, m + r, first, count);
    }
  }
}

template <typename T>
void run_dot(const Problem<T>& p, int threads) {
  const int64_t chunks = static_cast<int64_t>(p.chunks.size()), width = chunks * kLanes;
  bool whole = true;  // then the chunks of x are x itself
  for (const Chunk& c : p.chunks) whole = whole && c.count == kLanes;
  std::vector<float> spread;
  std::vector<Bits> mask;
  const float* x = nullptr;
  if constexpr (std::is_same_v<T, float>) x = whole ? p.x : nullptr;
  if (!x) {
    spread.assign(p.rows * width, 0.0f);
    x = spread.data();
    if (!whole) mask.assign(chunks, Bits{});
    for (int64_t c = 0; c < chunks; ++c) {
      const Chunk& chunk = p.chunks[c];
      for (int64_t m = 0; m < p.rows; ++m) {
        float* to = spread.data() + m * width + c * kLanes;
        const T* from = p.x + m * p.inputs + chunk.first;
        if (chunk.count == kLanes) {
          store(to, load(from));
        } else {
          for (int64_t i = 0; i < chunk.count; ++i)
            to[p.input[chunk.first + i] - chunk.base] = to_float(from[i]);
        }
      }
      if (!whole)
        for (int64_t i = 0; i < chunk.count; ++i)
          mask[c][p.input[chunk.first + i] - chunk.base] = ~uint32_t{0};
    }
  }
  constexpr int kMany = kLanes == 4 ? 2 : 4;
  const auto run = [&](auto masked) {
    constexpr bool kMasked = decltype(masked)::value;
    if (p.rows == 1) return dot_rows<T, 1, kMasked>(p, x, mask.data(), threads);
    if (p.rows == 2) return dot_rows<T, 2, kMasked>(p, x, mask.data(), threads);
    return dot_rows<T, kMany, kMasked>(p, x, mask.data(), threads);
  };
  whole ? run(std::false_type{}) : run(std::true_type{});
}

// Rows of x in 32-bit units, as the outer-product tiles read them: x itself, or rows copied into a buffer
// where x is of another type, or where rows are so far apart that they fall on the same few sets of a cache.
template <typename Unit, typename T>
class TileRows {
 public:
  TileRows(const Problem<T>& p, int64_t most) : p_(p) {
    if constexpr (std::is_same_v<Unit, float>) {
      if (p.inputs * sizeof(Unit) % kSameSets) return;
    }
    stride_ = (p.inputs / kLanes + 2) * kLanes;
    buffer_.reset(new float[most * stride_]);
  }

  int64_t stride() const { return stride_; }

  // Rows [first, first + count); what was given before is no longer there.
  const float* get(int64_t first, int64_t count) {
    const Unit* from = reinterpret_cast<const Unit*>(p_.x) + first * p_.inputs;
    if (!buffer_) {
      if constexpr (std::is_same_v<Unit, float>) return from;
    }
    for (int64_t m = 0; m < count; ++m)
      for (int64_t k = 0; k < p_.inputs; k += kLanes)
        store(buffer_.get() + m * stride_ + k, load(from + m * p_.inputs + k, p_.inputs - k));
    return buffer_.get();
  }

 private:
  static constexpr int64_t kSameSets = 2048;
  const Problem<T>& p_;
  int64_t stride_ = p_.inputs;
  std::unique_ptr<float[]> buffer_;
};

// Kept inputs that are packed and multiplied together: those of chunks [chunk, …) from `input` on; the last
// one of a list only says where they end.
struct Slice {
  int64_t chunk, input;
};

template <typename T>
std::vector<Slice> find_slices(const Problem<T>& p, int64_t most) {
  const int64_t chunks = static_cast<int64_t>(p.chunks.size());
  std::vector<Slice> slices{{0, 0}};
  if (p.input_stride == 1) {
    for (int64_t c = 0; c < chunks; ++c)
      if (p.chunks[c].first + p.chunks[c].count - slices.back().input > most)
        slices.push_back({c, p.chunks[c].first});
  } else {
    for (int64_t k = most; k < p.inputs; k += most) slices.push_back({0, k});
  }
  slices.push_back({chunks, p.inputs});
  return slices;
}

// Some columns of kLanes rows, transposed, to [chunk.count][width].
template <typename Unit>
inline void pack_chunk(const Unit* const (&rows)[kLanes], const Chunk& chunk, float* to, int64_t width) {
  Vec block[kLanes];
  for (int i = 0; i < kLanes; ++i) block[i] = load(rows[i] + chunk.base);
  transpose(block);
  for (int i = 0; i < kLanes; ++i) store(to + i * width, block[i]);
}

// The same where not all columns of the chunk are kept, or the weight has no more of them.
template <typename Unit, typename T>
__attribute__((noinline)) void pack_part(const Problem<T>& p, const Unit* const (&rows)[kLanes],
                                         const Chunk& chunk, float* to, int64_t width) {
  Vec block[kLanes];
  for (int i = 0; i < kLanes; ++i) block[i] = load(rows[i] + chunk.base, p.columns - chunk.base);
  transpose(block);
  for (int64_t i = 0; i < chunk.count; ++i)
    store(to + i * width, block[p.input[chunk.first + i] - chunk.base]);
}

// Some outputs of an input's row; `run`: whether they follow each other.
template <typename T>
inline Vec load_outputs(const T* row, const int64_t (&outputs)[kLanes], bool run) {
  if (run) return load(row + outputs[0]);
  T part[kLanes];
  for (int i = 0; i < kLanes; ++i) part[i] = row[outputs[i]];
  return load(part);
}

// A slice of the kept inputs of outputs [first, first + vecs · kLanes) as f32 [k][vecs · kLanes]; past the
// last output: the last one again.
template <typename Unit, typename T>
void pack_panel(const Problem<T>& p, int64_t first, int64_t vecs, Slice begin, Slice end, float* panel) {
  const Unit* weight = reinterpret_cast<const Unit*>(p.weight);
  const int64_t width = vecs * kLanes;
  for (int64_t v = 0; v < vecs; ++v) {
    int64_t outputs[kLanes];
    for (int i = 0; i < kLanes; ++i) outputs[i] = p.output[std::min(first + v * kLanes + i, p.outputs - 1)];
    float* to = panel + v * kLanes;
    if (p.input_stride == 1) {
      const Unit* rows[kLanes];
      for (int i = 0; i < kLanes; ++i) rows[i] = weight + outputs[i] * p.output_stride;
      for (int64_t c = begin.chunk; c < end.chunk; ++c) {
        const Chunk& chunk = p.chunks[c];
        float* at = to + (chunk.first - begin.input) * width;
        chunk.count == kLanes ? pack_chunk(rows, chunk, at, width) : pack_part(p, rows, chunk, at, width);
      }
    } else {
      const bool run = is_run(outputs, kLanes);
      for (int64_t k = begin.input; k < end.input; ++k, to += width) {
        if constexpr (std::is_same_v<Unit, T>) {
          store(to, load_outputs(weight + p.input[k] * p.input_stride, outputs, run));
        } else {
          const auto half = [&](int64_t i) {
            return bit_cast<Bits>(load_outputs(p.weight + p.input[i] * p.input_stride, outputs, run));
          };
          // A bfloat16 is the upper half of its float.
          store(to, bit_cast<Vec>((half(2 * k) >> 16) | half(2 * k + 1)));
        }
      }
    }
  }
}

template <typename Unit, typename Tiles, typename T>
void multiply_packed(const Problem<T>& p, int threads) {
  constexpr int64_t kPanel = Tiles::kTileVecs * kLanes;
  const int64_t panels = (p.outputs + kPanel - 1) / kPanel;
  const int64_t blocks = (p.rows + kBlockRows - 1) / kBlockRows;
  const int64_t block_rows = (p.rows + blocks - 1) / blocks;
  const std::vector<Slice> slices = find_slices(p, Tiles::inputs(p.rows));
#pragma omp parallel num_threads(threads)
  {
    Tiles filler;
    TileRows<Unit, T> tile_rows(p, block_rows);
    const std::unique_ptr<float[]> panel(new float[Tiles::kMostInputs * kPanel]);
    const std::unique_ptr<float[]> sums(new float[block_rows * kPanel]);
    const float* x = nullptr;
    int64_t current = -1;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < blocks * panels; ++item) {
      const int64_t block = item / panels, first = item % panels * kPanel;
      const int64_t start = block * block_rows, rows = std::min(block_rows, p.rows - start);
      if (block != current) x = tile_rows.get(start, rows);
      current = block;
      const int64_t count = std::min<int64_t>(kPanel, p.outputs - first);
      const int64_t vecs = (count + kLanes - 1) / kLanes, width = vecs * kLanes;
      // Tiles of nearly equal height: a rest of one row would cost almost as much as a full tile.
      const int64_t tiles = (rows + Tiles::kTileRows - 1) / Tiles::kTileRows;
      for (size_t s = 0; s + 1 < slices.size(); ++s) {
        const int64_t input = slices[s].input, inputs = slices[s + 1].input - input;
        pack_panel<Unit>(p, first, vecs, slices[s], slices[s + 1], panel.get());
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t m = t * rows / tiles, height = (t + 1) * rows / tiles - m;
          filler.fill(height, vecs, x + m * tile_rows.stride() + input, tile_rows.stride(), panel.get(),
                      inputs, s > 0, sums.get() + m * width);
          if (s + 2 < slices.size()) continue;
          for (int64_t r = m; r < m + height; ++r) finish(p, sums.get() + r * width, start + r, first, count);
        }
      }
    }
  }
}

template <typename T>
void run_packed(const Problem<T>& p, int threads) {
  multiply_packed<T, FloatTiles>(p, threads);
}

#if defined(MVP_HAVE_PAIRS)
// Kept inputs 2i and 2i + 1 as one: true if the weight's layout lets them. Where inputs are rows of it, they
// are brought together when they are packed, and `input` lists both.
bool pair_inputs(Problem<Bf16>& p) {
  if (p.inputs % 2 != 0) return false;
  if (p.input_stride != 1) {
    p.inputs /= 2;
    return true;
  }
  bool fits = p.columns % 2 == 0 && p.output_stride % 2 == 0;
  for (int64_t k = 0; fits && k < p.inputs; k += 2)
    fits = p.input[k] % 2 == 0 && p.input[k + 1] == p.input[k] + 1;
  if (!fits) return false;
  for (int64_t k = 0; k < p.inputs / 2; ++k) p.input[k] = p.input[2 * k] / 2;
  p.inputs /= 2;
  p.columns /= 2;
  p.output_stride /= 2;
  p.input.resize(p.inputs);
  p.chunks = find_chunks(p.input, p.columns);
  return true;
}

void run_packed(Problem<Bf16>& p, int threads) {
  if (!have_pairs() || !pair_inputs(p)) return run_packed<Bf16>(std::as_const(p), threads);
  have_amx() ? multiply_packed<float, AmxTiles>(p, threads) : multiply_packed<float, PairTiles>(p, threads);
}
#endif

template <typename T>
void run_direct(const Problem<T>& p, int threads) {
  constexpr auto kEach = std::make_index_sequence<kRows>();
  const bool wide = p.rows <= kWideRows && p.outputs >= kWideVecs * kLanes;
  const int64_t width = (wide ? kWideVecs : kVecs) * kLanes;
  TileRows<T, T> tile_rows(p, p.rows);
  const float* x = tile_rows.get(0, p.rows);
  std::vector<int64_t> offset(p.inputs);
  for (int64_t k = 0; k < p.inputs; ++k) offset[k] = p.input[k] * p.input_stride;
  const int64_t panels = (p.outputs + width - 1) / width, tiles = (p.rows + kRows - 1) / kRows;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < panels; ++i) {
    // The last panel starts early enough to be a full one; what it repeats is not written.
    const int64_t first = i * width, start = std::min(first, p.outputs - width);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = t * p.rows / tiles, height = (t + 1) * p.rows / tiles - begin;
      const OuterTile<T> tile = wide
                                    ? choose_tile<T, kWideVecs>(height, std::make_index_sequence<kWideRows>())
                                    : choose_tile<T, kVecs>(height, kEach);
      float sums[std::max(kRows * kWidth, kWideRows * kWideVecs * kLanes)];
      for (int64_t k = 0; k < p.inputs; k += kSumBlock)
        tile(x + begin * tile_rows.stride() + k, tile_rows.stride(), p.weight + p.output[start],
             offset.data() + k, std::min(kSumBlock, p.inputs - k), k > 0, sums);
      for (int64_t r = 0; r < height; ++r)
        finish(p, sums + r * width + (first - start), begin + r, first, std::min(width, p.outputs - first));
    }
  }
}

enum class Path { dot, direct, packed };

template <typename T>
Path choose_path(const Problem<T>& p) {
  if (p.inputs == 0) return Path::packed;  // which looks at no weight: it may have no address
  if (p.input_stride == 1) return p.rows <= kDotRows && p.columns >= kLanes ? Path::dot : Path::packed;
  // AMX makes more of packed panels.
  const int64_t most = std::is_same_v<T, Bf16> && kLanes == 16 && have_amx() ? kDotRows : kDirectRows;
  const bool direct = p.rows <= most && p.outputs >= kWidth && is_run(p.output.data(), p.outputs);
  return direct ? Path::direct : Path::packed;
}

template <typename T>
void run(const TensorView& x, const TensorView& weight, const TensorView& bias, const TensorView& out_index,
         const TensorView& in_index, int64_t out_block, int64_t in_block, const TensorView& residual,
         const TensorView& out, int threads) {
  Problem<T> p;
  const bool is_work = out.numel() > 0;
  p.output = expand(out_index, out_block, weight.shape[0], "out_index", is_work);
  p.input = expand(in_index, in_block, weight.shape[1], "in_index", is_work);
  p.outputs = static_cast<int64_t>(p.output.size());
  p.inputs = static_cast<int64_t>(p.input.size());
  p.out_stride = out.shape[out.ndim - 1];
  if (!is_work || p.outputs == 0) return;
  p.rows = out.numel() / p.out_stride;
  p.scatter = residual.defined() && out_index.defined();
  p.x = x.ptr<T>();
  p.weight = weight.ptr<T>();
  p.output_stride = weight.stride[0];
  p.input_stride = weight.stride[1];
  p.columns = weight.shape[1];
  p.base = residual.defined() ? residual.ptr<T>() : nullptr;
  p.out = out.ptr<T>();
  p.bias.assign(p.outputs, 0.0f);
  if (bias.defined())
    for (int64_t j = 0; j < p.outputs; ++j) p.bias[j] = to_float(bias.ptr<T>()[p.output[j] * bias.stride[0]]);
  if (p.input_stride == 1) p.chunks = find_chunks(p.input, p.columns);
  if (p.rows * p.outputs * p.inputs < kThreadWork) threads = 1;
  switch (choose_path(p)) {
    case Path::dot:
      return run_dot(p, threads);
    case Path::direct:
      return run_direct(p, threads);
    case Path::packed:
      return run_packed(p, threads);
  }
}

}  // namespace

void pruned_linear_cpu(const TensorView& x, const TensorView& weight, const TensorView& bias,
                       const TensorView& out_index, const TensorView& in_index, int64_t out_block,
                       int64_t in_block, const TensorView& residual, const TensorView& out, int threads) {
  check_pruned_linear({}, x, weight, bias, out_index, in_index, out_block, in_block, residual, out);
  Argument(kOp, {}, "x", x).need_dense(false);
  const auto with = [&](auto type) {
    run<decltype(type)>(x, weight, bias, out_index, in_index, out_block, in_block, residual, out, threads);
  };
  switch (x.dtype) {
    case DType::f32:
      return with(float{});
    case DType::bf16:
      return with(Bf16{});
    case DType::f16:
      return with(F16{});
    default:
      throw std::invalid_argument("pruned_linear: x: expected float32, bfloat16 or float16");
  }
}

}  // namespace mvp::MVP_ISA
