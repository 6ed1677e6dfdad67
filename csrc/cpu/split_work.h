// Splits a list of items, each of so many rows at so much cost a row, evenly over threads: a cut may fall
// inside an item.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace mvp::MVP_ISA {
namespace {

// Below this many bytes a second thread costs more (about 5 µs to start) than it saves.
constexpr int64_t kParallelBytes = 256 << 10;

class Worklist {
 public:
  void add(int64_t rows, int64_t bytes_per_row) {
    start_.push_back(start_.back() + rows * std::max<int64_t>(bytes_per_row, 1));
    row_cost_.push_back(std::max<int64_t>(bytes_per_row, 1));
  }

  // work(item, first row, end row), every row exactly once. The cuts depend on the thread count alone.
  template <typename Work>
  void run(int threads, const Work& work) const {
    const int64_t total = start_.back();
    if (total == 0) return;
    threads = total < kParallelBytes ? 1 : std::max(1, threads);
    if (threads == 1) return range(0, total, work);
#pragma omp parallel num_threads(threads)
    {
      const int64_t t = omp_get_thread_num(), n = omp_get_num_threads();
      range(total / n * t, t + 1 == n ? total : total / n * (t + 1), work);
    }
  }

 private:
  // The rows whose cost starts in [begin, end).
  template <typename Work>
  void range(int64_t begin, int64_t end, const Work& work) const {
    const int64_t items = static_cast<int64_t>(row_cost_.size());
    int64_t item = std::upper_bound(start_.begin(), start_.end(), begin) - start_.begin() - 1;
    for (; item < items && start_[item] < end; ++item) {
      const int64_t cost = row_cost_[item], rows = (start_[item + 1] - start_[item]) / cost;
      const auto row_at = [&](int64_t position) {
        return std::clamp<int64_t>((position - start_[item] + cost - 1) / cost, 0, rows);
      };
      const int64_t first = begin <= start_[item] ? 0 : row_at(begin), last = row_at(end);
      if (first < last) work(item, first, last);
    }
  }

  std::vector<int64_t> start_{0}, row_cost_;
};

}  // namespace
}  // namespace mvp::MVP_ISA
