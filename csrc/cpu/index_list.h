// Index lists as the kernels use them: read once, 64-bit, their range checked, with what their order allows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <list>
#include <string>
#include <type_traits>
#include <vector>

#include "mvp/check.h"
#include "mvp/tensor_view.h"

namespace mvp::MVP_ISA {
namespace {

struct IndexList {
  std::vector<int64_t> at;
  int64_t smallest = 0, largest = -1;
  bool ascending = true;          // strictly, so there are no duplicates either
  std::vector<int64_t> run_ends;  // where maximal stretches of consecutive values end in `at`

  int64_t runs() const { return static_cast<int64_t>(run_ends.size()); }
  int64_t size() const { return static_cast<int64_t>(at.size()); }
};

inline IndexList read_index(const TensorView& view) {
  IndexList list;
  const int64_t n = view.shape[0], stride = view.stride[0];
  list.at.resize(n);
  if (view.dtype == DType::i32)
    for (int64_t i = 0; i < n; ++i) list.at[i] = view.ptr<const int32_t>()[i * stride];
  else
    for (int64_t i = 0; i < n; ++i) list.at[i] = view.ptr<const int64_t>()[i * stride];
  if (n == 0) return list;
  list.smallest = *std::min_element(list.at.begin(), list.at.end());
  list.largest = *std::max_element(list.at.begin(), list.at.end());
  for (int64_t i = 1; i < n; ++i) {
    list.ascending &= list.at[i] > list.at[i - 1];
    // Unsigned: any values may come, and their range is checked later.
    if (static_cast<uint64_t>(list.at[i]) - static_cast<uint64_t>(list.at[i - 1]) != 1)
      list.run_ends.push_back(i);
  }
  list.run_ends.push_back(n);
  return list;
}

// Range and uniqueness can only be checked where the values are read: here, before anything is written.
// `name`: a string, or a function that makes it, for callers with hundreds of lists.
template <typename Name>
void check_index(const IndexList& list, int64_t bound, bool unique, const char* op, const Name& name) {
  const auto named = [&]() -> std::string {
    if constexpr (std::is_invocable_v<Name>)
      return name();
    else
      return name;
  };
  if (list.size() == 0) return;
  MVP_CHECK(list.smallest >= 0 && list.largest < bound, op,
            named() + ": expected indices in [0, " + std::to_string(bound) + "), got " +
                std::to_string(list.smallest < 0 ? list.smallest : list.largest));
  if (!unique || list.ascending) return;
  // Marked in a table, unless that is much longer than the list: a tensor without elements may be of any
  // size.
  const auto refuse = [&](int64_t at) {
    MVP_CHECK(false, op, named() + ": expected no index twice, got " + std::to_string(at) + " again");
  };
  if (bound / 64 <= list.size()) {
    std::vector<char> seen(bound, 0);
    for (int64_t at : list.at) {
      if (seen[at]) refuse(at);
      seen[at] = 1;
    }
    return;
  }
  std::vector<int64_t> sorted = list.at;
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) refuse(*twice);
}

// The tensors of one model share few index tensors: each is read once a call. Pointers stay valid; None gives
// nullptr.
class IndexLists {
 public:
  template <typename Name>
  const IndexList* get(const TensorView& view, int64_t bound, bool unique, const char* op, const Name& name) {
    if (!view.defined()) return nullptr;
    const IndexList* list = nullptr;
    for (const Entry& entry : entries_)
      if (entry.data == view.data && entry.size == view.shape[0] && entry.stride == view.stride[0] &&
          entry.dtype == view.dtype)
        list = &entry.list;
    if (list == nullptr) {
      entries_.push_front({view.data, view.shape[0], view.stride[0], view.dtype, read_index(view)});
      list = &entries_.front().list;
    }
    check_index(*list, bound, unique, op, name);
    return list;
  }

 private:
  struct Entry {
    const void* data;
    int64_t size, stride;
    DType dtype;
    IndexList list;
  };
  std::list<Entry> entries_;
};

}  // namespace
}  // namespace mvp::MVP_ISA
