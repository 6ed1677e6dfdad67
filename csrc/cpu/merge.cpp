// merged[r, c, :] = Σ_j w_j · voter_j[r, c, :] / Σ_j w_j   over the voters j that kept row r AND column c
// (w_j > 0),
//                   base[r, c, :] where there is none,
// for the rows and columns that are wanted, for all tensors of a model in one call. Each voter is compact:
// its tensors hold only what it kept, and its index lists say where that lies in the base.
//
// A tensor is seen as [row, middle, column, inner], as in pack.cpp. Threads: the wanted rows of all tensors,
// in parts of equal bytes. For a row, each voter in turn is added to a row of sums that stays in cache, so
// every voter's bytes are read once and the result is written once. Sums are in float32 (float64 where the
// base is), in the order of the voters.
#include <cmath>
#include <cstring>
#include <map>
#include <tuple>
#include <type_traits>

#include "index_list.h"
#include "mvp/arguments.h"
#include "mvp/ops.h"
#include "mvp/simd.h"
#include "split_work.h"

namespace mvp::MVP_ISA {
namespace {

// Rows shorter than this many elements (biases, statistics) are seen as the columns of one row.
constexpr int64_t kShortRow = 16;

struct Run {
  int64_t to, from, size;  // elements of a row of the result, of the voter
};

// For each wanted index, its position in what a voter kept; −1 where it did not.
using Positions = std::vector<int64_t>;

struct Voter {
  const char* data;
  DType dtype;
  float weight;
  int64_t width;          // elements of one [column, inner] row
  const Positions* row;   // by row of the result: the voter's row
  std::vector<Run> runs;  // where the voter's columns go
  bool single = false;    // most runs are of one element
};

struct Item {
  const char* base;
  char* out;
  DType dtype;
  int64_t item_size, row_count, middle, col_count, inner, base_cols;
  const IndexList* rows;
  const IndexList* cols;
  bool whole_rows;  // nobody's columns are cut
  std::vector<Voter> voters;

  int64_t width() const { return col_count * inner; }
  int64_t base_row(int64_t i) const { return rows == nullptr ? i : rows->at[i]; }
  int64_t base_col(int64_t c) const { return cols == nullptr ? c : cols->at[c]; }
};

// Null lists mean all of `bound`.
Positions find_positions(const IndexList* wanted, const IndexList* kept, int64_t bound) {
  Positions position(bound);
  for (int64_t i = 0; i < bound; ++i) position[i] = kept == nullptr ? i : -1;
  if (kept != nullptr)
    for (int64_t i = 0; i < kept->size(); ++i) position[kept->at[i]] = i;
  if (wanted == nullptr) return position;
  Positions result(wanted->size());
  for (int64_t i = 0; i < wanted->size(); ++i) result[i] = position[wanted->at[i]];
  return result;
}

// The tensors of a model share few index lists: each pair is compared once a call.
class PositionCache {
 public:
  const Positions& get(const IndexList* wanted, const IndexList* kept, int64_t bound) {
    const auto [entry, is_new] = known_.try_emplace({wanted, kept, bound});
    if (is_new) entry->second = find_positions(wanted, kept, bound);
    return entry->second;
  }

 private:
  std::map<std::tuple<const IndexList*, const IndexList*, int64_t>, Positions> known_;
};

void append(std::vector<Run>& runs, Run next) {
  if (!runs.empty() && runs.back().to + runs.back().size == next.to &&
      runs.back().from + runs.back().size == next.from)
    runs.back().size += next.size;
  else
    runs.push_back(next);
}

void set_columns(Voter& voter, const Positions& column, int64_t inner) {
  for (int64_t c = 0; c < static_cast<int64_t>(column.size()); ++c) {
    if (column[c] < 0) continue;
    append(voter.runs, {c * inner, column[c] * inner, inner});
  }
  int64_t elements = 0;
  for (const Run& run : voter.runs) elements += run.size;
  voter.single = inner == 1 && elements < 3 * static_cast<int64_t>(voter.runs.size());
}

template <typename T, typename Sum>
const Sum* widen_as(const T* from, int64_t n, Sum* buffer) {
  if constexpr (std::is_same_v<T, Sum>) return from;
  if constexpr (std::is_same_v<T, double> || std::is_same_v<Sum, double>) {
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (std::is_arithmetic_v<T>)
        buffer[i] = static_cast<Sum>(from[i]);
      else
        buffer[i] = to_float(from[i]);
    }
  } else {
    for (int64_t i = 0; i < n; i += kLanes) store(buffer + i, load(from + i, n - i), n - i);
  }
  return buffer;
}

// n elements of a voter as sums see them: in place, or widened into the buffer.
template <typename Sum>
const Sum* widen(const Voter& voter, int64_t offset, int64_t n, Sum* buffer) {
  const char* const at = voter.data + offset * size_of(voter.dtype);
  switch (voter.dtype) {
    case DType::f64:
      return widen_as(reinterpret_cast<const double*>(at), n, buffer);
    case DType::f16:
      return widen_as(reinterpret_cast<const F16*>(at), n, buffer);
    case DType::bf16:
      return widen_as(reinterpret_cast<const Bf16*>(at), n, buffer);
    default:
      return widen_as(reinterpret_cast<const float*>(at), n, buffer);
  }
}

template <typename Sum>
void narrow(const Item& item, int64_t offset, const Sum* from, int64_t n) {
  char* const at = item.out + offset * item.item_size;
  if constexpr (std::is_same_v<Sum, double>) {
    std::memcpy(at, from, n * sizeof(double));
  } else if (item.dtype == DType::f32) {
    std::memcpy(at, from, n * sizeof(float));
  } else {
    const auto round_to = [&](auto* to) {
      for (int64_t i = 0; i < n; i += kLanes) store(to + i, load(from + i, n - i), n - i);
    };
    item.dtype == DType::f16 ? round_to(reinterpret_cast<F16*>(at)) : round_to(reinterpret_cast<Bf16*>(at));
  }
}

// A row's sums, and what they are divided by. That depends only on which voters have the row: kept from row
// to row.
template <typename Sum>
class RowMerger {
 public:
  explicit RowMerger(const Item& item)
      : item_(item), sums_(item.width()), totals_(item.width()), present_(item.voters.size()) {
    int64_t widest = 0;
    for (const Voter& voter : item.voters) widest = std::max(widest, voter.width);
    buffer_.resize(widest);
  }

  void merge(int64_t i) {
    find_totals(i);
    for (int64_t m = 0; m < item_.middle; ++m) {
      std::fill(sums_.begin(), sums_.end(), Sum{0});
      for (const Voter& voter : item_.voters)
        if ((*voter.row)[i] >= 0) add(voter, ((*voter.row)[i] * item_.middle + m) * voter.width);
      divide();
      const int64_t offset = (i * item_.middle + m) * item_.width();
      narrow(item_, offset, sums_.data(), item_.width());
      const char* const base = item_.base + (item_.base_row(i) * item_.middle + m) * item_.base_cols *
                                                item_.inner * item_.item_size;
      char* const out = item_.out + offset * item_.item_size;
      for (const Run& run : missing_) {
        if (run.size == sizeof(float))  // the usual run where columns are single elements: not worth a call
          std::memcpy(out + run.to, base + run.from, sizeof(float));
        else
          std::memcpy(out + run.to, base + run.from, run.size);
      }
    }
  }

 private:
  void find_totals(int64_t i) {
    bool known = started_;
    started_ = true;
    for (size_t v = 0; v < present_.size(); ++v) {
      const char now = (*item_.voters[v].row)[i] >= 0;
      known &= now == present_[v];
      present_[v] = now;
    }
    if (known) return;
    missing_.clear();
    if (item_.whole_rows) {
      Sum total = 0;
      for (size_t v = 0; v < present_.size(); ++v)
        if (present_[v]) total += item_.voters[v].weight;
      std::fill(totals_.begin(), totals_.end(), total);
      if (total == 0) missing_.push_back({0, 0, item_.width() * item_.item_size});
      return;
    }
    std::fill(totals_.begin(), totals_.end(), Sum{0});
    for (size_t v = 0; v < present_.size(); ++v)
      if (present_[v])
        for (const Run& run : item_.voters[v].runs)
          for (int64_t k = 0; k < run.size; ++k) totals_[run.to + k] += item_.voters[v].weight;
    const int64_t piece = item_.inner * item_.item_size;
    for (int64_t c = 0; c < item_.col_count; ++c)
      if (totals_[c * item_.inner] == 0) append(missing_, {c * piece, item_.base_col(c) * piece, piece});
  }

  void add(const Voter& voter, int64_t offset) {
    const Sum* const from = widen(voter, offset, voter.width, buffer_.data());
    const Sum weight = voter.weight;
    Sum* const sums = sums_.data();
    if (voter.single) {
      for (const Run& run : voter.runs) {
        sums[run.to] += weight * from[run.from];
        for (int64_t k = 1; k < run.size; ++k) sums[run.to + k] += weight * from[run.from + k];
      }
      return;
    }
    for (const Run& run : voter.runs) {
      Sum* const to = sums + run.to;
      const Sum* const values = from + run.from;
      for (int64_t k = 0; k < run.size; ++k) to[k] += weight * values[k];
    }
  }

  void divide() {
    const Sum* const totals = totals_.data();
    Sum* const sums = sums_.data();
    const int64_t n = item_.width();
    for (int64_t k = 0; k < n; ++k) sums[k] /= totals[k];  // 0/0 where no voter is: overwritten by the base
  }

  const Item& item_;
  std::vector<Sum> sums_, totals_, buffer_;
  std::vector<char> present_;
  bool started_ = false;
  std::vector<Run> missing_;  // in bytes: what comes from the base
};

Item make_item(const TensorView& base, const TensorView& out, const IndexList* rows, const IndexList* cols) {
  Item item{};
  item.base = base.ptr<const char>();
  item.out = out.ptr<char>();
  item.dtype = base.dtype;
  item.item_size = size_of(base.dtype);
  item.rows = rows;
  item.cols = cols;
  item.base_cols = base.ndim > 1 ? base.shape[1] : 1;
  item.row_count = out.shape[0];
  item.col_count = out.ndim > 1 ? out.shape[1] : 1;
  item.middle = item.inner = 1;
  const bool columns_last = base.columns_innermost();
  for (int d = 2; d < base.ndim; ++d) (columns_last ? item.middle : item.inner) *= base.shape[d];
  return item;
}

}  // namespace

void merge_cpu(const std::vector<TensorView>& base, const std::vector<TensorView>& voters,
               const std::vector<TensorView>& voter_rows, const std::vector<TensorView>& voter_cols,
               const std::vector<double>& weights, const std::vector<TensorView>& rows,
               const std::vector<TensorView>& cols, const std::vector<TensorView>& out, int threads) {
  const size_t tensors = base.size(), count = weights.size();
  check_merge({}, base, voters, voter_rows, voter_cols, count, rows, cols, out);
  for (double weight : weights)
    MVP_CHECK(std::isfinite(weight) && weight >= 0, "merge",
              "weights: expected finite numbers >= 0, got " + std::to_string(weight));
  IndexLists lists;
  PositionCache positions;
  const Positions only_row{0};
  std::vector<Item> items(tensors);
  Worklist work;
  for (size_t p = 0; p < tensors; ++p) {
    const int64_t row_bound = base[p].shape[0], col_bound = base[p].ndim > 1 ? base[p].shape[1] : 1;
    const auto find = [&](const TensorView& view, int64_t bound, const char* name, int64_t voter = -1) {
      const auto place = [&] {
        const std::string of = voter < 0 ? "" : "[" + std::to_string(voter) + "]";
        return name + of + "[" + std::to_string(p) + "]";
      };
      return view.defined() ? lists.get(view, bound, true, "merge", place) : nullptr;
    };
    Item& item = items[p];
    item = make_item(base[p], out[p], find(rows[p], row_bound, "rows"), find(cols[p], col_bound, "cols"));
    bool all_columns = item.cols == nullptr;
    for (size_t v = 0; v < count; ++v) all_columns &= !voter_cols[v * tensors + p].defined();
    item.whole_rows = all_columns;
    const bool as_columns = all_columns && item.middle == 1 && item.base_cols * item.inner < kShortRow;
    int64_t bytes = item.width() * item.item_size;
    for (size_t v = 0; v < count; ++v) {
      const size_t at = v * tensors + p;
      const IndexList* const kept_rows = find(voter_rows[at], row_bound, "voter_rows", v);
      const IndexList* const kept_cols = find(voter_cols[at], col_bound, "voter_cols", v);
      if (weights[v] == 0 || out[p].numel() == 0) continue;
      Voter voter{};
      voter.data = voters[at].ptr<const char>();
      voter.dtype = voters[at].dtype;
      voter.weight = static_cast<float>(weights[v]);
      const Positions& row = positions.get(item.rows, kept_rows, row_bound);
      if (as_columns) {
        const int64_t size = item.base_cols * item.inner;
        voter.width = voters[at].shape[0] * size;
        voter.row = &only_row;
        set_columns(voter, row, size);
      } else {
        voter.width = (kept_cols == nullptr ? col_bound : kept_cols->size()) * item.inner;
        voter.row = &row;
        set_columns(voter, positions.get(item.cols, kept_cols, col_bound), item.inner);
      }
      bytes += voter.width * size_of(voter.dtype);
      item.voters.push_back(std::move(voter));
    }
    if (as_columns) {
      item.whole_rows = false;
      item.inner *= item.base_cols;
      item.base_cols = row_bound;
      item.col_count = item.row_count;
      item.cols = item.rows;
      item.rows = nullptr;
      item.row_count = 1;
    }
    work.add(item.width() == 0 ? 0 : item.row_count, item.middle * bytes);
  }
  work.run(threads, [&](int64_t p, int64_t first, int64_t last) {
    const auto merge_rows = [&](auto merger) {
      for (int64_t i = first; i < last; ++i) merger.merge(i);
    };
    if (items[p].dtype == DType::f64)
      merge_rows(RowMerger<double>(items[p]));
    else
      merge_rows(RowMerger<float>(items[p]));
  });
}

}  // namespace mvp::MVP_ISA
