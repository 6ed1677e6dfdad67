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
// packed: the rest. The panel of W for 32 outputs is packed to f32 [K][32], kept rows transposed in
// registers, and multiplied with up to kBlockRows rows of x before the next one is packed: 1–5 % of the time
// from M = 200 on. Where the machine multiplies pairs of bf16, pairs stay as they are.
//
// Threads: contiguous ranges of (block of x rows, group of outputs). Accumulator: f32, in an order that does
// not depend on the number of threads. Bytes: the kept rows of W once for every block of x rows; x once for
// every 32 outputs (from L2); out once.
#include <algorithm>
#include <memory>
#include <utility>

#include "linear_tiles.h"
#include "mvp/arguments.h"
#include "mvp/ops.h"
#include "mvp/simd.h"

namespace mvp::MVP_ISA {
namespace {

constexpr char kOp[] = "pruned_linear";
// With more rows of x, packing a panel costs less than it saves (measured at 384 to 1536 inputs, kept 0.5 to
// 1, on both AVX2 and AVX-512).
constexpr int64_t kDotRows = 4;
// 512 rows of x make packing a panel about 1/50 of the work on it; they need not stay in L2.
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

// Rows [first, first + count) of x as f32 [K][count]. Writes kLanes - count floats past its end. `Unit`: what
// x and the weight are made of; T, or float where pairs of T are moved as 32 bits.
template <typename Unit, typename T>
void pack_x(const Problem<T>& p, int64_t first, int64_t count, float* to) {
  const Unit* all = reinterpret_cast<const Unit*>(p.x);
  for (int64_t k = 0; k < p.inputs; k += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, p.inputs - k);
    Vec rows[kLanes] = {};
    for (int64_t r = 0; r < count; ++r) rows[r] = load(all + (first + r) * p.inputs + k, n);
    transpose(rows);
    for (int64_t i = 0; i < n; ++i) store(to + (k + i) * count, rows[i]);
  }
}

// The kept inputs of outputs [first, first + kWidth) as f32 [K][kWidth]; past the last output: the last one
// again.
template <typename Unit, typename T>
void pack_panel(const Problem<T>& p, int64_t first, float* panel) {
  const Unit* weight = reinterpret_cast<const Unit*>(p.weight);
  int64_t output[kWidth];
  for (int i = 0; i < kWidth; ++i) output[i] = p.output[std::min(first + i, p.outputs - 1)];
  for (int v = 0; v < kVecs; ++v) {
    const int64_t* outputs = output + v * kLanes;
    float* to = panel + v * kLanes;
    if (p.input_stride == 1) {
      for (const Chunk& chunk : p.chunks) {
        Vec rows[kLanes];
        for (int i = 0; i < kLanes; ++i)
          rows[i] = load(weight + outputs[i] * p.output_stride + chunk.base, p.columns - chunk.base);
        transpose(rows);
        if (chunk.count == kLanes) {
          for (int i = 0; i < kLanes; ++i) store(to + (chunk.first + i) * kWidth, rows[i]);
        } else {
          for (int64_t i = 0; i < chunk.count; ++i)
            store(to + (chunk.first + i) * kWidth, rows[p.input[chunk.first + i] - chunk.base]);
        }
      }
    } else {
      const bool run = is_run(outputs, kLanes);
      for (int64_t k = 0; k < p.inputs; ++k) {
        const Unit* row = weight + p.input[k] * p.input_stride;
        Unit part[kLanes];
        if (!run)
          for (int i = 0; i < kLanes; ++i) part[i] = row[outputs[i]];
        store(to + k * kWidth, load(run ? row + outputs[0] : part));
      }
    }
  }
}

template <typename Unit, typename T, typename ChooseTile>
void run_packed(const Problem<T>& p, ChooseTile choose, int threads) {
  const int64_t panels = (p.outputs + kWidth - 1) / kWidth;
  const int64_t blocks = (p.rows + kBlockRows - 1) / kBlockRows;
  const int64_t block_rows = (p.rows + blocks - 1) / blocks;
#pragma omp parallel num_threads(threads)
  {
    const std::unique_ptr<float[]> x(new float[block_rows * p.inputs + kLanes]);
    const std::unique_ptr<float[]> panel(new float[p.inputs * kWidth]);
    int64_t current = -1;
#pragma omp for schedule(static)
    for (int64_t item = 0; item < blocks * panels; ++item) {
      const int64_t block = item / panels, first = item % panels * kWidth;
      const int64_t start = block * block_rows, rows = std::min(block_rows, p.rows - start);
      // Tiles of nearly equal height: a rest of one row would cost almost as much as a full tile.
      const int64_t tiles = (rows + kRows - 1) / kRows;
      const auto begin = [&](int64_t t) { return t * rows / tiles; };
      if (block != current)
        for (int64_t t = 0; t < tiles; ++t)
          pack_x<Unit>(p, start + begin(t), begin(t + 1) - begin(t), x.get() + begin(t) * p.inputs);
      current = block;
      pack_panel<Unit>(p, first, panel.get());
      const int64_t count = std::min<int64_t>(kWidth, p.outputs - first);
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t height = begin(t + 1) - begin(t);
        float sums[kRows * kWidth];
        choose(height)(x.get() + begin(t) * p.inputs, panel.get(), nullptr, p.inputs, sums);
        for (int64_t r = 0; r < height; ++r) finish(p, sums + r * kWidth, start + begin(t) + r, first, count);
      }
    }
  }
}

template <typename T>
void run_packed(const Problem<T>& p, int threads) {
  const auto choose = [](int64_t rows) {
    return choose_tile<float, kVecs>(rows, std::make_index_sequence<kRows>());
  };
  run_packed<T>(p, choose, threads);
}

#if defined(MVP_HAVE_PAIRS)
// Inputs 2i and 2i + 1 as one: true if the kept inputs and the weight's layout let them.
bool pair_inputs(Problem<Bf16>& p) {
  bool fits = p.input_stride == 1 && p.inputs % 2 == 0 && p.columns % 2 == 0 && p.output_stride % 2 == 0;
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
  const auto choose = [](int64_t rows) {
    return choose_pair_tile<kVecs>(rows, std::make_index_sequence<kRows>());
  };
  run_packed<float>(p, choose, threads);
}
#endif

template <typename T>
void run_direct(const Problem<T>& p, int threads) {
  const bool wide = p.rows <= kWideRows && p.outputs >= kWideVecs * kLanes;
  const int64_t width = (wide ? kWideVecs : kVecs) * kLanes;
  const OuterTile<T> tile = wide ? choose_tile<T, kWideVecs>(p.rows, std::make_index_sequence<kWideRows>())
                                 : choose_tile<T, kVecs>(p.rows, std::make_index_sequence<kRows>());
  std::vector<float> x(p.rows * p.inputs + kLanes);
  pack_x<T>(p, 0, p.rows, x.data());
  std::vector<int64_t> offset(p.inputs);
  for (int64_t k = 0; k < p.inputs; ++k) offset[k] = p.input[k] * p.input_stride;
  const int64_t panels = (p.outputs + width - 1) / width;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < panels; ++i) {
    // The last panel starts early enough to be a full one; what it repeats is not written.
    const int64_t first = i * width, start = std::min(first, p.outputs - width);
    float sums[kRows * kWidth > kWideRows * kWideVecs * kLanes ? kRows * kWidth
                                                               : kWideRows * kWideVecs * kLanes];
    tile(x.data(), p.weight + p.output[start], offset.data(), p.inputs, sums);
    for (int64_t r = 0; r < p.rows; ++r)
      finish(p, sums + r * width + (first - start), r, first, std::min(width, p.outputs - first));
  }
}

enum class Path { dot, direct, packed };

template <typename T>
Path choose_path(const Problem<T>& p) {
  if (p.inputs == 0) return Path::packed;  // which looks at no weight: it may have no address
  if (p.input_stride == 1) return p.rows <= kDotRows && p.columns >= kLanes ? Path::dot : Path::packed;
  return is_run(p.output.data(), p.outputs) && p.rows <= kRows && p.outputs >= kWidth ? Path::direct
                                                                                      : Path::packed;
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
