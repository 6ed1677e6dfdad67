// What pack and merge share: the tensors of a model, each cut along its rows and columns, as tables in kernel
// parameters.
//
// A tensor is seen as rows of columns of inner words (contiguous), or as rows of lines of columns of one word
// (channels_last; a line is a pixel). A word has 1 to 16 bytes. Without a list of columns a row is one
// column.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common.cuh"

namespace mvp::cuda {

constexpr int kSliceThreads = 256;
constexpr uint32_t kNowhere = 0xFFFFFFFF;
constexpr int64_t kMostWordsOfRow = int64_t{1} << 31;  // fewer

// A list of kept rows or columns.
struct Indices {
  const void* data;  // null: all
  uint32_t size;
  uint32_t wide : 1, stride : 31;  // int64; in elements

  // The k-th, or kNowhere if that is not below the bound. Two loads of which one is carried out, not
  // branches: only so are the loads of several k under way at once.
  __device__ __forceinline__ uint32_t at(uint32_t k, uint32_t bound) const {
    const uint64_t at = uint64_t{k} * stride;
    int64_t value = k;
    if (data != nullptr && wide) value = static_cast<const int64_t*>(data)[at];
    if (data != nullptr && !wide) value = static_cast<const int32_t*>(data)[at];
    return static_cast<uint64_t>(value) < bound ? static_cast<uint32_t>(value) : kNowhere;
  }
};

// Which part of a full tensor a compact one is.
struct Slicing {
  uint32_t rows, columns;          // of the full tensor
  uint32_t other;                  // words of a column, or, where columns are innermost, lines of a row
  uint16_t row_list, column_list;  // numbers of Indices
  uint8_t log2_word;               // bytes
  bool columns_innermost;

  __host__ __device__ uint32_t inner() const { return columns_innermost ? 1 : other; }
  __host__ __device__ uint32_t lines_a_row() const { return columns_innermost ? other : 1; }
};

// The entry that a tile belongs to: the last that does not start behind it. Tiles are counted over all
// tensors of a launch.
template <typename Entry>
__device__ __forceinline__ uint32_t find_entry(const Entry* entries, uint32_t count, uint32_t tile) {
  uint32_t low = 0, high = count;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (entries[middle].first_tile <= tile)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// ---------------------------------------------------------------- host
// What is kept of `bound` rows or columns.
struct Kept {
  Indices list;
  uint32_t bound;
};

constexpr Kept kOnlyOne{{nullptr, 1, 0, 0}, 1};

inline Kept make_kept(const TensorView& view, int64_t bound, const char* op) {
  MVP_CHECK(bound < int64_t{kNowhere}, op, "at most 2^32 - 2 rows or columns");
  const uint32_t all = static_cast<uint32_t>(bound);
  if (!view.defined()) return {{nullptr, all, 0, 0}, all};
  MVP_CHECK(view.shape[0] < int64_t{kNowhere} && view.stride[0] < int64_t{1} << 31, op,
            "at most 2^32 - 2 indices, fewer than 2^31 elements apart");
  // A list that keeps nothing may have no address; nobody reads it.
  static const int64_t nothing = 0;
  const void* const data = view.data == nullptr ? &nothing : view.data;
  return {{data, static_cast<uint32_t>(view.shape[0]), view.dtype == DType::i64,
           static_cast<uint32_t>(view.stride[0])},
          all};
}

inline Slicing make_slicing(const Kept& rows, const Kept& columns, int64_t inner, int64_t lines_a_row,
                            const char* op) {
  const int64_t other = inner * lines_a_row;  // one of them is 1
  MVP_CHECK(other * columns.bound < kMostWordsOfRow && other * columns.list.size < kMostWordsOfRow, op,
            "a row of a tensor is too long");
  MVP_CHECK(rows.list.size * lines_a_row < int64_t{kNowhere}, op, "a tensor has too many rows");
  Slicing slicing{};
  slicing.rows = rows.bound;
  slicing.columns = columns.bound;
  slicing.columns_innermost = lines_a_row > 1;
  slicing.other = static_cast<uint32_t>(other);
  return slicing;
}

inline bool operator==(const Indices& a, const Indices& b) {
  return a.data == b.data && a.size == b.size && a.wide == b.wide && a.stride == b.stride;
}

inline bool operator==(const Slicing& a, const Slicing& b) {
  return a.rows == b.rows && a.columns == b.columns && a.other == b.other && a.row_list == b.row_list &&
         a.column_list == b.column_list && a.log2_word == b.log2_word &&
         a.columns_innermost == b.columns_innermost;
}

// The number of a list or slicing among those of a launch, which the tensors of a model share. The newest
// first: a weight and its bias follow each other.
template <typename T>
uint16_t number_of(std::vector<T>& all, const T& one) {
  for (size_t i = all.size(); i-- > 0;)
    if (all[i] == one) return static_cast<uint16_t>(i);
  all.push_back(one);
  return static_cast<uint16_t>(all.size() - 1);
}

}  // namespace mvp::cuda
