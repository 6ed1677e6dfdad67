// pack:    packed[i, m, j, :] = full[rows[i], m, cols[j], :]     for a whole list of tensors in one call
// unpack:  full[rows[i], m, cols[j], :] = packed[i, m, j, :]
//
// A tensor is seen as [row, middle, column, inner bytes]: middle is 1 for a contiguous tensor, the kernel's
// area for a channels_last weight. A missing index list means all. Elements are only moved, so their type
// does not matter. Threads: the packed rows of all tensors, cut into parts of equal bytes. Bytes moved: the
// packed bytes are read once and written once (plus the rest of each cache line that is touched).
#include <cstring>

#include "index_list.h"
#include "mvp/arguments.h"
#include "mvp/ops.h"
#include "split_work.h"
#include "stream.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace mvp::MVP_ISA {
namespace {

// Runs at least this long go through memcpy; for shorter ones its call and its branches cost more than the
// bytes.
constexpr int64_t kLongRun = 256;
// Bytes: the hardware stops at the end of a page, and starts late in the next.
constexpr int64_t kAhead = 2048;
constexpr int64_t kChunk = 64;  // bytes: one cache line, one AVX-512 register
// A tensor with no rows to cut between threads is given to them in parts of this many columns.
constexpr int64_t kColumnsPerPart = 1 << 14;

enum class Columns { all, runs, elements, chunks };

// Which of 16 consecutive columns are kept, and how lanes travel.
struct LaneGroup {
  int32_t to_packed[16] = {}, to_wide[16] = {};  // by lane of the result: the lane it comes from
  uint16_t kept = 0;
  uint16_t count = 0;
  bool whole =
      false;  // 16 elements can be read here, and written: what is too much is overwritten by the next
};

struct Part {
  char* full;
  char* packed;
  const IndexList* rows;
  const IndexList* cols;
  int64_t row_count, middle, col_begin, col_count;  // of the packed tensor
  int64_t full_row, full_middle, inner;             // bytes
  Columns how;
  const std::vector<LaneGroup>* lanes = nullptr;  // for ascending columns of 4 bytes, with AVX-512

  int64_t packed_middle() const { return col_count * inner; }
  int64_t packed_row() const { return middle * packed_middle(); }
};

bool is_element(int64_t bytes) { return bytes == 1 || bytes == 2 || bytes == 4 || bytes == 8; }

Columns choose(const IndexList* cols, int64_t inner, int64_t count) {
  if (cols == nullptr) return Columns::all;
  if (count * inner >= kLongRun * cols->runs()) return Columns::runs;
  if (is_element(inner)) return Columns::elements;
  return inner <= kChunk && cols->ascending ? Columns::chunks : Columns::runs;
}

// Strides in units of bytes of `view`, seen as [row, middle, column, inner]. The caller has made it
// contiguous or channels_last (4 dimensions, the second one innermost).
Part shape_of(const TensorView& view) {
  Part part{};
  const int64_t item = size_of(view.dtype);
  const bool columns_last = view.columns_innermost();
  part.row_count = view.shape[0];
  part.middle = columns_last ? view.shape[2] * view.shape[3] : 1;
  part.col_count = view.ndim > 1 ? view.shape[1] : 1;
  part.inner = item;
  if (!columns_last)
    for (int d = 2; d < view.ndim; ++d) part.inner *= view.shape[d];
  return part;
}

void add_parts(std::vector<Part>& parts, const TensorView& full, const TensorView& packed,
               const IndexList* rows, const IndexList* cols) {
  if (packed.numel() == 0) return;
  const Part wide = shape_of(full);
  Part part = wide;
  part.full = full.ptr<char>();
  part.packed = packed.ptr<char>();
  part.rows = rows;
  part.cols = cols;
  part.full_middle = wide.col_count * wide.inner;
  part.full_row = wide.middle * part.full_middle;
  if (rows != nullptr) part.row_count = rows->size();
  if (cols != nullptr) part.col_count = cols->size();
  if (cols == nullptr) {  // a row is one piece
    part.inner = part.full_row;
    part.middle = part.col_count = 1;
    if (part.inner < kChunk && rows != nullptr) {  // pieces so short that rows are better seen as columns
      std::swap(part.rows, part.cols);
      std::swap(part.row_count, part.col_count);
    }
  }
  part.how = choose(part.cols, part.inner, part.col_count);
  const int64_t columns = part.col_count,
                step = part.row_count * part.middle == 1 ? kColumnsPerPart : columns;
  for (; part.col_begin < columns; part.col_begin += step) {
    part.col_count = std::min(step, columns - part.col_begin);
    parts.push_back(part);
    part.packed += part.col_count * part.inner;
  }
}

struct Packing {
  static void move(char* full, char* packed, int64_t bytes) { std::memcpy(packed, full, bytes); }
};
struct Unpacking {
  static void move(char* full, char* packed, int64_t bytes) { std::memcpy(full, packed, bytes); }
};
// Past the cache: only for whole runs of rows.
struct StreamingPacking {
  static void move(char* full, char* packed, int64_t bytes) { stream_copy(packed, full, bytes); }
};
struct StreamingUnpacking {
  static void move(char* full, char* packed, int64_t bytes) { stream_copy(full, packed, bytes); }
};

// Entries [first, last) of the list.
template <typename Way>
void move_runs(char* full, char* packed, const IndexList& list, int64_t first, int64_t last, int64_t bytes) {
  auto run = std::upper_bound(list.run_ends.begin(), list.run_ends.end(), first);
  for (int64_t i = first; i < last; ++run) {
    const int64_t end = std::min(*run, last);
    Way::move(full + list.at[i] * bytes, packed, (end - i) * bytes);
    packed += (end - i) * bytes;
    i = end;
  }
}

template <typename Way, typename T>
void move_elements(char* full, char* packed, const int64_t* at, int64_t count) {
  // A column may be several elements of the tensor, so it is aligned like one of those only.
  typedef T Piece __attribute__((aligned(1), may_alias));
  Piece* const wide = reinterpret_cast<Piece*>(full);
  Piece* const narrow = reinterpret_cast<Piece*>(packed);
  if constexpr (std::is_same_v<Way, Packing>)
    for (int64_t i = 0; i < count; ++i) narrow[i] = wide[at[i]];
  else
    for (int64_t i = 0; i < count; ++i) wide[at[i]] = narrow[i];
}

// Pieces of at most one chunk, in ascending order: copy a whole chunk each time and let the next piece
// overwrite what was too much. As long as a chunk is left in the packed row, it is left in the full row too
// (ascending: at least as many columns follow there).
void pack_chunks(const char* full, char* packed, const int64_t* at, int64_t count, int64_t bytes) {
  const int64_t safe = std::max<int64_t>(0, count - (kChunk + bytes - 1) / bytes + 1);
  int64_t i = 0;
  for (; i < safe; ++i) std::memcpy(packed + i * bytes, full + at[i] * bytes, kChunk);
  for (; i < count; ++i) std::memcpy(packed + i * bytes, full + at[i] * bytes, bytes);
}

#if defined(__AVX512F__)
std::vector<LaneGroup> lane_groups(const IndexList& cols) {
  std::vector<LaneGroup> groups(cols.largest / 16 + 1);
  for (int64_t at : cols.at) groups[at / 16].kept |= static_cast<uint16_t>(1u << (at % 16));
  for (LaneGroup& group : groups)
    for (int lane = 0; lane < 16; ++lane)
      if (group.kept >> lane & 1) {
        group.to_wide[lane] = group.count;
        group.to_packed[group.count++] = lane;
      }
  int64_t offset = 0;
  for (LaneGroup& group : groups) {
    group.whole = &group != &groups.back() && offset + 16 <= cols.size();
    offset += group.count;
  }
  return groups;
}

__mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }

// By vpermd: vpcompressd and vpexpandd do just that, but take twice as long on AMD's cores; and a store with
// a mask takes several times as long as one without.
void pack_lanes(const char* full, char* packed, const std::vector<LaneGroup>& groups) {
  const int32_t* from = reinterpret_cast<const int32_t*>(full);
  int32_t* to = reinterpret_cast<int32_t*>(packed);
  for (const LaneGroup& group : groups) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
    const __m512i lanes = _mm512_loadu_si512(group.to_packed);
    if (group.whole) {
      _mm512_storeu_si512(to, _mm512_maskz_permutexvar_epi32(0xffff, lanes, _mm512_loadu_si512(from)));
    } else {
      const __m512i wide = _mm512_maskz_loadu_epi32(group.kept, from);
      _mm512_mask_storeu_epi32(to, first_lanes(group.count),
                               _mm512_maskz_permutexvar_epi32(0xffff, lanes, wide));
    }
    from += 16;
    to += group.count;
  }
}

void unpack_lanes(char* full, const char* packed, const std::vector<LaneGroup>& groups) {
  int32_t* to = reinterpret_cast<int32_t*>(full);
  const int32_t* from = reinterpret_cast<const int32_t*>(packed);
  for (const LaneGroup& group : groups) {
    const __m512i value = _mm512_maskz_loadu_epi32(first_lanes(group.count), from);
    const __m512i wide = _mm512_maskz_permutexvar_epi32(group.kept, _mm512_loadu_si512(group.to_wide), value);
    _mm512_mask_storeu_epi32(to, group.kept, wide);
    to += 16;
    from += group.count;
  }
}
#endif

template <typename Way>
void move_columns(const Part& part, char* full, char* packed) {
  if (part.how == Columns::runs)
    return move_runs<Way>(full, packed, *part.cols, part.col_begin, part.col_begin + part.col_count,
                          part.inner);
  const int64_t* const at = part.cols->at.data() + part.col_begin;
  if (part.how == Columns::chunks) {
    if constexpr (std::is_same_v<Way, Packing>)
      return pack_chunks(full, packed, at, part.col_count, part.inner);
    for (int64_t i = 0; i < part.col_count; ++i)
      Way::move(full + at[i] * part.inner, packed + i * part.inner, part.inner);
    return;
  }
#if defined(__AVX512F__)
  if (part.lanes != nullptr) {
    if constexpr (std::is_same_v<Way, Packing>)
      return pack_lanes(full, packed, *part.lanes);
    else
      return unpack_lanes(full, packed, *part.lanes);
  }
#endif
  switch (part.inner) {
    case 1:
      return move_elements<Way, uint8_t>(full, packed, at, part.col_count);
    case 2:
      return move_elements<Way, uint16_t>(full, packed, at, part.col_count);
    case 4:
      return move_elements<Way, uint32_t>(full, packed, at, part.col_count);
    default:
      return move_elements<Way, uint64_t>(full, packed, at, part.col_count);
  }
}

template <typename Way>
void move_rows(const Part& part, int64_t first, int64_t last) {
  if (part.how == Columns::all) {
    char* const packed = part.packed + first * part.inner;
    if (part.rows == nullptr)
      return Way::move(part.full + first * part.inner, packed, (last - first) * part.inner);
    return move_runs<Way>(part.full, packed, *part.rows, first, last, part.inner);
  }
  for (int64_t i = first; i < last; ++i) {
    char* const row = part.full + (part.rows == nullptr ? i : part.rows->at[i]) * part.full_row;
    for (int64_t m = 0; m < part.middle; ++m)
      move_columns<Way>(part, row + m * part.full_middle,
                        part.packed + i * part.packed_row() + m * part.packed_middle());
  }
}

// As move_rows, past the cache where whole lines are written. Columns to be packed are gathered in a buffer,
// several rows at a time where they are short, so that few lines are written in two halves.
template <typename Way>
void stream_rows(const Part& part, int64_t first, int64_t last) {
  constexpr bool packing = std::is_same_v<Way, Packing>;
  if (part.how == Columns::all)
    return move_rows<std::conditional_t<packing, StreamingPacking, StreamingUnpacking>>(part, first, last);
  if (!packing) return move_rows<Way>(part, first, last);
  constexpr int64_t kBuffer = 16 << 10;  // bytes: half of the smallest L1 data cache
  const int64_t piece = part.packed_middle(), pieces = std::max<int64_t>(1, kBuffer / piece);
  std::vector<char> buffer(pieces * piece);
  char* const packed = part.packed + first * part.packed_row();
  const int64_t count = (last - first) * part.middle;
  for (int64_t begin = 0; begin < count; begin += pieces) {
    const int64_t end = std::min(begin + pieces, count);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t i = first + at / part.middle, m = at % part.middle;
      char* const row = part.full + (part.rows == nullptr ? i : part.rows->at[i]) * part.full_row;
      move_columns<Packing>(part, row + m * part.full_middle, buffer.data() + (at - begin) * piece);
    }
    stream_copy(packed + begin * piece, buffer.data(), (end - begin) * piece);
  }
}

template <typename Way>
void move_all(const char* op, const std::vector<TensorView>& full, const std::vector<TensorView>& packed,
              const std::vector<TensorView>& rows, const std::vector<TensorView>& cols, bool unique,
              int threads) {
  check_pack(op, {}, full, packed, rows, cols);
  const size_t count = full.size();
  IndexLists lists;
  std::vector<Part> parts;
  parts.reserve(count);
  for (size_t p = 0; p < count; ++p) {
    const auto index = [&](const TensorView& view, int dim, const char* name) {
      const auto place = [&] { return name + ("[" + std::to_string(p) + "]"); };
      return view.defined() ? lists.get(view, full[p].shape[dim], unique, op, place) : nullptr;
    };
    const IndexList* const row_list = index(rows[p], 0, "rows");
    const IndexList* const col_list = index(cols[p], 1, "cols");
    add_parts(parts, full[p], packed[p], row_list, col_list);
  }
#if defined(__AVX512F__)
  std::list<std::pair<const IndexList*, std::vector<LaneGroup>>> lanes;
  for (Part& part : parts) {
    if (part.how != Columns::elements || part.inner != 4 || !part.cols->ascending || part.col_begin != 0 ||
        part.col_count != part.cols->size())
      continue;
    auto found =
        std::find_if(lanes.begin(), lanes.end(), [&](const auto& known) { return known.first == part.cols; });
    if (found == lanes.end()) found = lanes.insert(lanes.end(), {part.cols, lane_groups(*part.cols)});
    part.lanes = &found->second;
  }
#endif
  Worklist work;
  int64_t bytes = 0;
  for (const Part& part : parts) {
    // What is read (of cut rows nearly every line) and written.
    work.add(part.row_count,
             part.packed_row() + (part.how == Columns::all ? part.packed_row() : part.full_row));
    bytes += part.row_count * part.packed_row();
  }
  if (bytes > streaming_bytes()) {
    work.run(threads, [&](int64_t p, int64_t first, int64_t last) {
      stream_rows<Way>(parts[p], first, last);
      stream_fence();
    });
    return;
  }
  work.run(threads, [&](int64_t p, int64_t first, int64_t last) { move_rows<Way>(parts[p], first, last); });
}

}  // namespace

void pack_cpu(const std::vector<TensorView>& tensors, const std::vector<TensorView>& rows,
              const std::vector<TensorView>& cols, const std::vector<TensorView>& packed, int threads) {
  move_all<Packing>("pack", tensors, packed, rows, cols, false, threads);
}

void unpack_cpu(const std::vector<TensorView>& packed, const std::vector<TensorView>& rows,
                const std::vector<TensorView>& cols, const std::vector<TensorView>& out, int threads) {
  move_all<Unpacking>("unpack", out, packed, rows, cols, true, threads);
}

}  // namespace mvp::MVP_ISA
