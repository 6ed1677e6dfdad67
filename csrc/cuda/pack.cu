// pack:    packed[i, m, j, :] = full[rows[i], m, cols[j], :]     for a whole list of tensors in one launch
// unpack:  full[rows[i], m, cols[j], :] = packed[i, m, j, :]
//
// How a tensor is seen is said in slices.cuh. The words of a compact tensor are cut into tiles, a block works
// on one: whole lines, or a part of one (a row of a contiguous tensor is one line). Elements are only moved,
// so they travel in the longest words (up to 16 bytes) that addresses and kept columns are multiples of:
// where rows alone are cut, 16 bytes; columns of a linear layer, element by element. A block first looks up
// where its tile's lines and columns lie, in shared memory; then consecutive threads move consecutive words
// of the compact tensor, and those of the full tensor lie in as few sectors as the lists allow; a thread
// steps to its next word by adding to the digits of its position, so that divisions are made once a tile.
// Bytes moved: the compact bytes once; of the full tensor each touched sector (32 bytes) once.
#include <algorithm>

#include "mvp/cuda_ops.h"
#include "slices.cuh"

namespace mvp::cuda {
namespace {

constexpr int kLog2Longest = 4;  // a word of 16 bytes

struct Entry {
  char* full;
  char* packed;
  uint32_t first_tile;
  uint16_t slicing;  // its number
};

template <int kEntries, int kLists, int kSlicings>
struct Table {
  static constexpr size_t kMostEntries = kEntries, kMostLists = kLists, kMostSlicings = kSlicings;
  uint32_t count;
  Indices lists[kLists];
  Slicing slicings[kSlicings];
  Entry entries[kEntries];
};
// A model with its optimizer's state fits into the large one (ViT-L has 888 tensors with AdamW's, whose
// moments are cut as their parameters are); a tensor or two should not carry its 32 KB.
using SmallTable = Table<16, 16, 16>;
using LargeTable = Table<912, 300, 300>;
static_assert(sizeof(LargeTable) <= kMaxParameterBytes);

// 32 KB, or what a block's shared memory has room for the lines and columns of: a tile must pay for finding
// its tensor, and small tensors should still occupy several multiprocessors.
constexpr uint32_t kMostTileWords = 4096;
__host__ __device__ constexpr uint32_t tile_words(int log2_word) {
  return log2_word < 3 ? kMostTileWords : 32768u >> log2_word;
}
// Lines × columns are at most the tile's words; a part of a line may cut a column at both ends.
constexpr size_t kSharedBytes = (kMostTileWords + 4) * sizeof(uint32_t);

// A position in a compact tensor.
struct Digits {
  uint32_t inner, column, line;
};

struct CompactShape {
  uint32_t inner, columns, width, lines;  // words, columns, words of a line

  __host__ __device__ CompactShape(const Slicing& slicing, const Indices& rows, const Indices& columns)
      : inner(slicing.inner()),
        columns(columns.size),
        width(inner * columns.size),
        lines(rows.size * slicing.lines_a_row()) {}

  __device__ __forceinline__ Digits split(uint32_t word) const {
    const uint32_t line = word / width, in_line = word - line * width, column = in_line / inner;
    return {in_line - column * inner, column, line};
  }

  // Adds two positions.
  __device__ __forceinline__ void advance(Digits& digits, const Digits& by) const {
    digits.inner += by.inner;
    digits.column += by.column;
    digits.line += by.line;
    if (digits.inner >= inner) digits.inner -= inner, ++digits.column;
    if (digits.column >= columns) digits.column -= columns, ++digits.line;
  }

  // A tile has at most so many words.
  __host__ __device__ uint32_t lines_a_tile(uint32_t words) const {
    return width < words ? words / width : 1;
  }
  __host__ __device__ uint32_t tiles_a_line(uint32_t words) const { return ceil_div(width, words); }
  uint64_t tiles(uint32_t words) const {
    return width <= words ? ceil_div(lines, lines_a_tile(words)) : uint64_t{lines} * tiles_a_line(words);
  }
};

struct Tile {
  uint32_t line, start, lines,
      count;  // the first line, where the tile starts in it; how many lines and words

  __device__ __forceinline__ Tile(const CompactShape& shape, uint32_t number, uint32_t words) {
    if (shape.width <= words) {
      const uint32_t height = shape.lines_a_tile(words);
      line = number * height;
      start = 0;
      lines = min(height, shape.lines - line);
      count = lines * shape.width;
    } else {
      const uint32_t across = shape.tiles_a_line(words);
      line = number / across;
      start = (number - line * across) * words;
      lines = 1;
      count = min(words, shape.width - start);
    }
  }
};

template <int kLog2Bytes>
struct Word;
template <>
struct Word<0> {
  using Type = uint8_t;
};
template <>
struct Word<1> {
  using Type = uint16_t;
};
template <>
struct Word<2> {
  using Type = uint32_t;
};
template <>
struct Word<3> {
  using Type = uint2;
};
template <>
struct Word<kLog2Longest> {
  using Type = Vec16<uint32_t>;
};

template <typename T>
__device__ __forceinline__ T load_word(const T* from) {
  return *from;
}
__device__ __forceinline__ Vec16<uint32_t> load_word(const Vec16<uint32_t>* from) {
  return load16_once(from->at);
}
template <typename T>
__device__ __forceinline__ void store_word(T* to, const T& word) {
  *to = word;
}
__device__ __forceinline__ void store_word(Vec16<uint32_t>* to, const Vec16<uint32_t>& word) {
  store16(to->at, word);
}

// Where a tile's lines and columns lie in the full tensor, in shared memory: the number of the line, and
// words in a line.
struct Places {
  uint32_t *line, *column;
  uint32_t first_column;

  __device__ __forceinline__ Places(const Slicing& slicing, const Indices& rows, const Indices& columns,
                                    const CompactShape& shape, const Tile& tile, const char* wrong) {
    line = dynamic_shared<uint32_t>();
    column = line + tile.lines;
    first_column = tile.start / shape.inner;
    const uint32_t lines_a_row = slicing.lines_a_row();
    bool right = true;
    for (uint32_t i = threadIdx.x; i < tile.lines; i += kSliceThreads) {
      const uint32_t at = tile.line + i, row = at / lines_a_row, place = rows.at(row, slicing.rows);
      line[i] = place * lines_a_row + (at - row * lines_a_row);
      right = right && place != kNowhere;
    }
    const uint32_t count = min(columns.size - first_column, tile.count / shape.inner + 2);
    for (uint32_t i = threadIdx.x; i < count; i += kSliceThreads) {
      const uint32_t place = columns.at(first_column + i, slicing.columns);
      column[i] = place * shape.inner;
      right = right && place != kNowhere;
    }
    require(right, wrong);
    __syncthreads();
  }
};

template <bool kPack, int kLog2Word>
__device__ __forceinline__ void move_tile(const Entry& entry, uint32_t columns, const CompactShape& shape,
                                          const Tile& tile, const Places& places) {
  using T = typename Word<kLog2Word>::Type;
  constexpr int kBatch = 4;
  T* const full = reinterpret_cast<T*>(entry.full);
  T* const packed = reinterpret_cast<T*>(entry.packed) + uint64_t{tile.line} * shape.width + tile.start;
  const uint32_t line_stride = columns * shape.inner;
  Digits digits = shape.split(tile.start + threadIdx.x);
  digits.column -= places.first_column;
  const Digits step = shape.split(kSliceThreads);
  const auto in_full = [&] {
    const uint32_t in_line = places.column[digits.column] + digits.inner;
    return full + (uint64_t{places.line[digits.line]} * line_stride + in_line);
  };
  for (uint32_t batch = threadIdx.x; batch < tile.count; batch += kBatch * kSliceThreads) {
    T words[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (const uint32_t word = batch + k * kSliceThreads; word < tile.count)
        words[k] = load_word(kPack ? in_full() : packed + word);
      if constexpr (kPack) shape.advance(digits, step);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      if (const uint32_t word = batch + k * kSliceThreads; word < tile.count)
        store_word(kPack ? packed + word : in_full(), words[k]);
      if constexpr (!kPack) shape.advance(digits, step);
    }
  }
}

template <bool kPack, typename Table>
__global__ void __launch_bounds__(kSliceThreads, 5) move_slices(const __grid_constant__ Table table) {
  const Entry& entry = table.entries[find_entry(table.entries, table.count, blockIdx.x)];
  const Slicing& slicing = table.slicings[entry.slicing];
  const Indices rows = table.lists[slicing.row_list], columns = table.lists[slicing.column_list];
  const CompactShape shape(slicing, rows, columns);
  const Tile tile(shape, blockIdx.x - entry.first_tile, tile_words(slicing.log2_word));
  const Places places(
      slicing, rows, columns, shape, tile,
      kPack ? "pack: rows or cols: a value out of range" : "unpack: rows or cols: a value out of range");
  switch (slicing.log2_word) {
    case 0:
      return move_tile<kPack, 0>(entry, slicing.columns, shape, tile, places);
    case 1:
      return move_tile<kPack, 1>(entry, slicing.columns, shape, tile, places);
    case 2:
      return move_tile<kPack, 2>(entry, slicing.columns, shape, tile, places);
    case 3:
      return move_tile<kPack, 3>(entry, slicing.columns, shape, tile, places);
    default:
      return move_tile<kPack, kLog2Longest>(entry, slicing.columns, shape, tile, places);
  }
}

// Collects entries, and launches when a table is full.
template <bool kPack>
class Launcher {
 public:
  explicit Launcher(const Queue& queue) : queue_(queue) {}

  void add(const TensorView& full, const TensorView& packed, const TensorView& row_list,
           const TensorView& column_list) {
    if (packed.numel() == 0) return;
    const int64_t item = size_of(full.dtype), rows = full.shape[0];
    const int64_t columns = full.ndim > 1 ? full.shape[1] : 1, other = full.numel() / rows / columns;
    const Kept kept_rows = make_kept(row_list, rows, name());
    if (column_list.defined()) {
      const Kept kept_columns = make_kept(column_list, columns, name());
      if (full.columns_innermost())
        add_entry(full, packed, kept_rows, kept_columns, item, other);
      else
        add_entry(full, packed, kept_rows, kept_columns, item * other, 1);
    } else if (row_list.defined()) {
      add_entry(full, packed, kept_rows, kOnlyOne, item * other * columns, 1);
    } else {
      add_copy(full, packed, item * full.numel());
    }
  }

  void launch_table() {
    if (entries_.size() <= SmallTable::kMostEntries && lists_.size() <= SmallTable::kMostLists &&
        slicings_.size() <= SmallTable::kMostSlicings)
      launch_table<SmallTable>();
    else
      launch_table<LargeTable>();
    entries_.clear();
    lists_.clear();
    slicings_.clear();
    tiles_ = 0;
  }

 private:
  static const char* name() { return kPack ? "pack" : "unpack"; }

  // A tensor of which all is kept is one row, or several if it has more words than 32 bits count.
  void add_copy(TensorView full, TensorView packed, int64_t bytes) {
    constexpr int64_t kMost = int64_t{1} << 30;
    for (; bytes > 0; bytes -= kMost) {
      add_entry(full, packed, kOnlyOne, kOnlyOne, std::min(bytes, kMost), 1);
      full.data = full.ptr<char>() + kMost;
      packed.data = packed.ptr<char>() + kMost;
    }
  }

  // column: its bytes.
  void add_entry(const TensorView& full, const TensorView& packed, const Kept& rows, const Kept& columns,
                 int64_t column, int64_t lines_a_row) {
    const uint64_t multiple =
        reinterpret_cast<uintptr_t>(full.data) | reinterpret_cast<uintptr_t>(packed.data) | column;
    int log2_word = kLog2Longest;
    while (multiple % (uint64_t{1} << log2_word) != 0) --log2_word;
    Slicing slicing = make_slicing(rows, columns, column >> log2_word, lines_a_row, name());
    slicing.log2_word = static_cast<uint8_t>(log2_word);
    const uint64_t tiles = CompactShape(slicing, rows.list, columns.list).tiles(tile_words(log2_word));
    constexpr uint64_t kMostTiles = 0x7FFFFFFF;
    MVP_CHECK(tiles <= kMostTiles, name(), "a tensor is too large");
    if (entries_.size() == LargeTable::kMostEntries || lists_.size() + 2 > LargeTable::kMostLists ||
        slicings_.size() == LargeTable::kMostSlicings || tiles_ + tiles > kMostTiles)
      launch_table();
    slicing.row_list = number_of(lists_, rows.list);
    slicing.column_list = number_of(lists_, columns.list);
    entries_.push_back(
        {full.ptr<char>(), packed.ptr<char>(), static_cast<uint32_t>(tiles_), number_of(slicings_, slicing)});
    tiles_ += tiles;
  }

  template <typename Table>
  void launch_table() {
    Table table;
    table.count = static_cast<uint32_t>(entries_.size());
    std::copy(lists_.begin(), lists_.end(), table.lists);
    std::copy(slicings_.begin(), slicings_.end(), table.slicings);
    std::copy(entries_.begin(), entries_.end(), table.entries);
    launch(name(), DType::u8, queue_,
           {dim3(static_cast<unsigned>(tiles_)), dim3(kSliceThreads), kSharedBytes},
           &move_slices<kPack, Table>, table);
  }

  const Queue queue_;
  std::vector<Entry> entries_;
  std::vector<Indices> lists_;
  std::vector<Slicing> slicings_;
  uint64_t tiles_ = 0;
};

template <bool kPack>
void move_all(const std::vector<TensorView>& full, const std::vector<TensorView>& packed,
              const std::vector<TensorView>& rows, const std::vector<TensorView>& cols, const Queue& queue) {
  check_pack(kPack ? "pack" : "unpack", where_of(queue.device), full, packed, rows, cols);
  const size_t count = full.size();
  Launcher<kPack> launcher(queue);
  for (size_t p = 0; p < count; ++p) launcher.add(full[p], packed[p], rows[p], cols[p]);
  launcher.launch_table();
}

}  // namespace
}  // namespace mvp::cuda

namespace mvp {

void pack_cuda(const std::vector<TensorView>& tensors, const std::vector<TensorView>& rows,
               const std::vector<TensorView>& cols, const std::vector<TensorView>& packed, int device,
               uint64_t stream) {
  cuda::move_all<true>(tensors, packed, rows, cols, cuda::Queue(device, stream));
}

void unpack_cuda(const std::vector<TensorView>& packed, const std::vector<TensorView>& rows,
                 const std::vector<TensorView>& cols, const std::vector<TensorView>& out, int device,
                 uint64_t stream) {
  cuda::move_all<false>(out, packed, rows, cols, cuda::Queue(device, stream));
}

}  // namespace mvp
