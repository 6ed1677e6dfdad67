// merged[r, c, :] = Σ_j w_j · voter_j[r, c, :] / Σ_j w_j   over the voters j that kept row r AND column c
// (w_j > 0),
//                   base[r, c, :] where there is none,
// for the rows and columns that are wanted, for all tensors of a model.
//
// How a tensor is seen is said in slices.cuh; a word is one element, or 16 bytes where whole columns are
// multiples of that. First find_positions: for each pair of a voter's list and a list of what is wanted (the
// tensors of a layer share them), where each wanted row or column lies in the voter. Then merge_slices: a
// thread has one column of a few rows of the result, with their sums in registers, and goes through the
// voters; so the column is looked up once a voter, and a voter's words of all its rows are under way
// together. The rows of a thread are `band` rows apart, and blocks take 256 consecutive words of the `band`
// rows after each other: no thread is idle, whatever the length of a row. Sums are in float32 in the order of
// the voters, products and sums rounded one by one, as on the CPU. Bytes moved: the voters' words that are
// wanted (in whole sectors), the base's where no voter is, the result.
#include <algorithm>
#include <cmath>

#include "mvp/cuda_ops.h"
#include "slices.cuh"

namespace mvp::cuda {
namespace {

// ---------------------------------------------------------------- positions
struct Pair {
  Indices kept, wanted;
  uint32_t bound;  // of the values of both
  uint32_t start;  // in the workspace: first the inverse of `kept` [bound], then the positions [wanted]
};

struct PairTable {
  static constexpr size_t kMost = 800;
  int32_t* workspace;
  Pair pairs[kMost];
};
static_assert(sizeof(PairTable) <= kMaxParameterBytes);

constexpr uint32_t kPairThreads = 512;

// One block a pair. The position of a wanted value that is not kept is −1.
__global__ void __launch_bounds__(kPairThreads) find_positions(const __grid_constant__ PairTable table) {
  const Pair& pair = table.pairs[blockIdx.x];
  const Indices kept = pair.kept, wanted = pair.wanted;
  const uint32_t bound = pair.bound;
  int32_t* const inverse = table.workspace + pair.start;
  int32_t* const position = inverse + bound;
  for (uint32_t i = threadIdx.x; i < bound; i += kPairThreads) inverse[i] = -1;
  __syncthreads();
  for (uint32_t k = threadIdx.x; k < kept.size; k += kPairThreads) {
    const uint32_t at = kept.at(k, bound);
    require(at != kNowhere, "merge: voter_rows or voter_cols: a value out of range");
    inverse[at] = static_cast<int32_t>(k);
  }
  __syncthreads();
  for (uint32_t k = threadIdx.x; k < kept.size; k += kPairThreads)
    require(inverse[kept.at(k, bound)] == static_cast<int32_t>(k),
            "merge: voter_rows or voter_cols: a value that comes twice");
  for (uint32_t i = threadIdx.x; i < wanted.size; i += kPairThreads) {
    const uint32_t at = wanted.at(i, bound);
    require(at != kNowhere, "merge: rows or cols: a value out of range");
    position[i] = inverse[at];
  }
}

// ---------------------------------------------------------------- merging
struct Entry {
  void* out;
  uint32_t first_tile;
  uint32_t rows, columns, other;  // of the result; other: see Slicing
  uint32_t band;                  // rows
  bool columns_innermost, vectors;
};

// A tensor of a voter, or the base. Positions: where in the workspace it says where the rows (columns) of the
// result are in it.
struct Source {
  const void* data;
  uint32_t row_positions, column_positions;
  uint32_t columns;
};

struct Table {
  static constexpr size_t kMostEntries = 160, kMostSources = 1150;
  const float* weights;      // [voters]
  const int32_t* positions;  // the workspace
  uint32_t count, voters;
  Entry entries[kMostEntries];
  Source sources[kMostSources];  // for each entry its voters, then its base
};
static_assert(sizeof(Table) <= kMaxParameterBytes);

// Rows of a thread: by how many sums it has registers for.
__host__ __device__ constexpr int rows_a_thread(int elements_a_word) {
  return elements_a_word == 1 ? 8 : 16 / elements_a_word;
}

template <typename T, int kSize>
struct alignas(kSize * sizeof(T)) Word {
  T at[kSize];
};

template <typename T, int kSize>
__device__ __forceinline__ Word<T, kSize> load_word(const Word<T, kSize>* from) {
  Word<T, kSize> word;
  if constexpr (kSize > 1) {
    const Vec16<T> vector = load16_once(from->at);
#pragma unroll
    for (int i = 0; i < kSize; ++i) word.at[i] = vector.at[i];
  } else {
    word = *from;
  }
  return word;
}

template <typename T, int kSize>
__device__ __forceinline__ void store_word(Word<T, kSize>* to, const Word<T, kSize>& word) {
  if constexpr (kSize > 1) {
    Vec16<T> vector;
#pragma unroll
    for (int i = 0; i < kSize; ++i) vector.at[i] = word.at[i];
    store16(to->at, vector);
  } else {
    *to = word;
  }
}

template <typename T, int kSize>
__device__ __forceinline__ void merge_tile(const Table& table, uint32_t number, uint32_t tile) {
  using Words = Word<T, kSize>;
  constexpr int kRows = rows_a_thread(kSize);
  const Entry& entry = table.entries[number];
  const uint32_t rows = entry.rows, columns = entry.columns, other_size = entry.other, band = entry.band;
  const uint32_t width = columns * other_size;
  const bool innermost = entry.columns_innermost;

  const uint32_t across = ceil_div(band * width, uint32_t{kSliceThreads});
  const uint32_t word = tile % across * kSliceThreads + threadIdx.x;  // of a band
  if (word >= band * width) return;
  const uint32_t row_in_band = word / width, in_row = word - row_in_band * width;
  const uint32_t column = innermost ? in_row % columns : in_row / other_size;
  const uint32_t other = innermost ? in_row / columns : in_row % other_size;
  const uint32_t first_row = tile / across * (band * kRows) + row_in_band;
  // Reads the words from a source that has the column, where `wanted` and the source has the row.
  Words words[kRows];
  int32_t at_row[kRows];
  const auto read = [&](const Source& source, int32_t at_column, const auto& wanted) {
    const uint32_t columns = source.columns;
    const uint32_t in_row = innermost ? other * columns + at_column : at_column * other_size + other;
    const char* const data = static_cast<const char*>(source.data) + uint64_t{in_row} * sizeof(Words);
    const uint32_t row_bytes = columns * other_size * sizeof(Words);
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      words[k] = Words{};
      if (at_row[k] >= 0 && wanted(k))
        words[k] = load_word(
            reinterpret_cast<const Words*>(data + uint64_t{row_bytes} * static_cast<uint32_t>(at_row[k])));
    }
  };
  const auto find_rows = [&](const Source& source) {
    const int32_t* const positions = table.positions + source.row_positions;
#pragma unroll
    for (int k = 0; k < kRows; ++k)
      at_row[k] = positions[min(first_row + k * band, rows - 1)];  // or for nobody
  };
  const auto find_column = [&](const Source& source) {
    return table.positions[uint64_t{source.column_positions} + column];
  };

  float sums[kRows][kSize] = {}, totals[kRows] = {};
  const Source* source = table.sources + number * (table.voters + 1);
  for (uint32_t v = 0; v < table.voters; ++v, ++source) {
    const float weight = table.weights[v];
    require(weight >= 0.0f && weight < INFINITY, "merge: weights: a value that is negative or not finite");
    if (weight == 0.0f) continue;
    const int32_t at_column = find_column(*source);
    find_rows(*source);
    // Not a branch, which would have the rows wait for the column.
#pragma unroll
    for (int k = 0; k < kRows; ++k) at_row[k] |= at_column >> 31;
    read(*source, at_column, [](int) { return true; });
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      // Where the voter is not, zeros are added: that changes no bit, since no sum is −0.
      const float part = at_row[k] >= 0 ? weight : 0.0f;
      totals[k] = __fadd_rn(totals[k], part);
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        sums[k][i] = __fadd_rn(sums[k][i], __fmul_rn(part, to_float(words[k].at[i])));
    }
  }

  bool missing = false;
#pragma unroll
  for (int k = 0; k < kRows; ++k) missing = missing || totals[k] == 0.0f;
  if (missing) {
    find_rows(*source);
    read(*source, find_column(*source), [&](int k) { return totals[k] == 0.0f; });
  }
  Words* const out = static_cast<Words*>(entry.out) + in_row;
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    const uint32_t at = first_row + k * band;
    if (at >= rows) break;
    if (totals[k] != 0.0f) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) words[k].at[i] = from_float<T>(__fdiv_rn(sums[k][i], totals[k]));
    }
    store_word(out + uint64_t{at} * width, words[k]);
  }
}

template <typename T>
__global__ void __launch_bounds__(kSliceThreads, 4) merge_slices(const __grid_constant__ Table table) {
  const uint32_t number = find_entry(table.entries, table.count, blockIdx.x);
  const Entry& entry = table.entries[number];
  if (entry.vectors)
    merge_tile<T, Vec16<T>::kSize>(table, number, blockIdx.x - entry.first_tile);
  else
    merge_tile<T, 1>(table, number, blockIdx.x - entry.first_tile);
}

// ---------------------------------------------------------------- host
constexpr char kOp[] = "merge";

void check_size(const TensorView& tensor, int64_t row) {
  MVP_CHECK(row * size_of(tensor.dtype) < int64_t{1} << 32 && tensor.shape[0] < int64_t{1} << 31, kOp,
            "a tensor has too long rows, or too many");
}

// The pairs of a whole call, each once.
class Pairs {
 public:
  Pairs(const TensorView& workspace, const Queue& queue) : workspace_(workspace), queue_(queue) {}

  // Where in the workspace the positions will be.
  uint32_t add(const Indices& kept, const Kept& wanted) {
    for (size_t i = pairs_.size(); i-- > 0;)
      if (pairs_[i].kept == kept && pairs_[i].wanted == wanted.list && pairs_[i].bound == wanted.bound)
        return pairs_[i].start + pairs_[i].bound;
    MVP_CHECK(wanted.bound < int64_t{1} << 31, kOp, "at most 2^31 - 1 rows or columns");
    const uint64_t end = size_ + wanted.bound + wanted.list.size;
    MVP_CHECK(end <= static_cast<uint64_t>(workspace_.numel()) && end < kNowhere, kOp,
              "the workspace is too small");
    pairs_.push_back({kept, wanted.list, wanted.bound, static_cast<uint32_t>(size_)});
    size_ = end;
    return pairs_.back().start + wanted.bound;
  }

  void find() const {
    for (size_t first = 0; first < pairs_.size(); first += PairTable::kMost) {
      const size_t count = std::min(PairTable::kMost, pairs_.size() - first);
      PairTable table;
      table.workspace = workspace_.ptr<int32_t>();
      std::copy_n(pairs_.begin() + first, count, table.pairs);
      launch(kOp, DType::i32, queue_, {dim3(static_cast<unsigned>(count)), dim3(kPairThreads)},
             &find_positions, table);
    }
  }

 private:
  const TensorView& workspace_;
  const Queue& queue_;
  std::vector<Pair> pairs_;
  uint64_t size_ = 0;
};

// What merge_slices is to do for tensors of one dtype, launched in as few tables as it fits in.
class Work {
 public:
  void add(Entry entry, int elements_a_word, const std::vector<Source>& sources) {
    const uint32_t width = entry.columns * entry.other, height = rows_a_thread(elements_a_word);
    // As many rows that the end of a band leaves few threads idle, if there are so many.
    constexpr uint32_t kBandWords = 2048;
    entry.band = std::max(std::min(ceil_div(kBandWords, width), entry.rows / height), uint32_t{1});
    const uint64_t tiles = uint64_t{ceil_div(entry.rows, entry.band * height)} *
                           ceil_div(entry.band * width, uint32_t{kSliceThreads});
    constexpr uint64_t kMostTiles = 0x7FFFFFFF;
    MVP_CHECK(tiles <= kMostTiles, kOp, "a tensor is too large");
    if (parts_.empty() || parts_.back().entries.size() == Table::kMostEntries ||
        parts_.back().sources.size() + sources.size() > Table::kMostSources ||
        parts_.back().tiles + tiles > kMostTiles)
      parts_.emplace_back();
    Part& part = parts_.back();
    entry.first_tile = static_cast<uint32_t>(part.tiles);
    part.tiles += tiles;
    part.entries.push_back(entry);
    part.sources.insert(part.sources.end(), sources.begin(), sources.end());
  }

  template <typename T>
  void run(DType dtype, const TensorView& weights, const TensorView& workspace, const Queue& queue) const {
    for (const Part& part : parts_) {
      Table table;
      table.weights = weights.ptr<const float>();
      table.positions = workspace.ptr<const int32_t>();
      table.count = static_cast<uint32_t>(part.entries.size());
      table.voters = static_cast<uint32_t>(weights.shape[0]);
      std::copy(part.entries.begin(), part.entries.end(), table.entries);
      std::copy(part.sources.begin(), part.sources.end(), table.sources);
      launch(kOp, dtype, queue, {dim3(static_cast<unsigned>(part.tiles)), dim3(kSliceThreads)},
             &merge_slices<T>, table);
    }
  }

 private:
  struct Part {
    std::vector<Entry> entries;
    std::vector<Source> sources;
    uint64_t tiles = 0;
  };
  std::vector<Part> parts_;
};

}  // namespace
}  // namespace mvp::cuda

namespace mvp {

void merge_cuda(const std::vector<TensorView>& base, const std::vector<TensorView>& voters,
                const std::vector<TensorView>& voter_rows, const std::vector<TensorView>& voter_cols,
                const TensorView& weights, const std::vector<TensorView>& rows,
                const std::vector<TensorView>& cols, const TensorView& workspace,
                const std::vector<TensorView>& out, int device, uint64_t stream) {
  using namespace cuda;
  const Where where = where_of(device);
  const Argument weights_(kOp, where, "weights", weights), workspace_(kOp, where, "workspace", workspace);
  weights_.need_rank(1, 1);
  weights_.need_dtype(DType::f32);
  weights_.need_dense(false);
  workspace_.need_rank(1, 1);
  workspace_.need_dtype(DType::i32);
  workspace_.need_dense(false);
  const size_t tensors = base.size(), count = static_cast<size_t>(weights.shape[0]);
  check_merge(where, base, voters, voter_rows, voter_cols, count, rows, cols, out);
  MVP_CHECK(count < Table::kMostSources, kOp, "too many voters for a GPU");
  const Queue queue(device, stream);
  Pairs pairs(workspace, queue);
  Work work[3];  // float32, float16, bfloat16
  std::vector<Source> sources(count + 1);
  for (size_t p = 0; p < tensors; ++p) {
    if (out[p].numel() == 0) continue;
    const DType dtype = base[p].dtype;
    MVP_CHECK(dtype == DType::f32 || dtype == DType::f16 || dtype == DType::bf16, kOp,
              "expected float32, float16 or bfloat16");
    const int64_t item = size_of(dtype), row_count = base[p].shape[0];
    const int64_t column_count = base[p].ndim > 1 ? base[p].shape[1] : 1;
    bool cut = cols[p].defined();
    for (size_t v = 0; v < count; ++v) cut = cut || voter_cols[v * tensors + p].defined();
    const bool innermost = cut && base[p].columns_innermost();
    const int64_t other = base[p].numel() / row_count / (cut ? column_count : 1);
    const Kept rows_kept = make_kept(rows[p], row_count, kOp);
    const Kept columns_kept = cut ? make_kept(cols[p], column_count, kOp) : kOnlyOne;
    uint64_t multiple =
        reinterpret_cast<uintptr_t>(out[p].data) | static_cast<uint64_t>(innermost ? item : item * other);
    const auto source = [&](const TensorView& tensor, const TensorView& row_list,
                            const TensorView& column_list) {
      MVP_CHECK(tensor.dtype == dtype, kOp, "voters of another dtype than the base");
      multiple |= reinterpret_cast<uintptr_t>(tensor.data);
      const Indices columns = (cut ? make_kept(column_list, column_count, kOp) : kOnlyOne).list;
      check_size(tensor, columns.size * other);
      return Source{tensor.data, pairs.add(make_kept(row_list, row_count, kOp).list, rows_kept),
                    pairs.add(columns, columns_kept), columns.size};
    };
    for (size_t v = 0; v < count; ++v)
      sources[v] = source(voters[v * tensors + p], voter_rows[v * tensors + p], voter_cols[v * tensors + p]);
    sources[count] = source(base[p], {}, {});
    check_size(out[p], columns_kept.list.size * other);
    const bool vectors = multiple % 16 == 0;
    const int elements = vectors ? static_cast<int>(16 / item) : 1;
    Entry entry{};
    entry.out = out[p].data;
    entry.rows = rows_kept.list.size;
    entry.columns = columns_kept.list.size;
    entry.other = static_cast<uint32_t>(innermost ? other : other / elements);
    entry.columns_innermost = innermost;
    entry.vectors = vectors;
    work[static_cast<int>(dtype)].add(entry, elements, sources);
  }
  pairs.find();
  work[static_cast<int>(DType::f32)].run<float>(DType::f32, weights, workspace, queue);
  work[static_cast<int>(DType::f16)].run<F16>(DType::f16, weights, workspace, queue);
  work[static_cast<int>(DType::bf16)].run<Bf16>(DType::bf16, weights, workspace, queue);
}

}  // namespace mvp
