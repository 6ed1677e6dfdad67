// Makes the calls that record.py wrote down once more, with the kernels that it is linked with, and compares
// the memory afterwards, bit by bit (any NaN for a NaN). For machines that no CI has: no torch, no Python.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <stdexcept>
#include <tuple>

#include "mvp/ops.h"

namespace {

using mvp::DType;
using mvp::TensorView;

struct Memory {
  std::unique_ptr<char, decltype(&std::free)> now{nullptr, &std::free};
  std::vector<char> after;
  DType dtype = DType::u8;
};

class Call {
 public:
  Call(std::ifstream& file, std::string op) : file_(file), op_(std::move(op)), memory_(number()) {
    for (Memory& memory : memory_) {
      memory.after.resize(number());
      // As torch allocates.
      memory.now.reset(static_cast<char*>(std::aligned_alloc(64, memory.after.size() / 64 * 64 + 64)));
      bytes(memory.now.get(), memory.after.size());
      bytes(memory.after.data(), memory.after.size());
    }
  }

  void make() {
    using namespace mvp::baseline;
    if (op_ == "importance") return make(&importance_cpu);
    if (op_ == "merge") return make(&merge_cpu);
    if (op_ == "meta_vote") return make(&meta_vote_cpu);
    if (op_ == "pack") return make(&pack_cpu);
    if (op_ == "pruned_linear") return make(&pruned_linear_cpu);
    if (op_ == "residual_add") return make(&residual_add_cpu);
    if (op_ == "unpack") return make(&unpack_cpu);
    throw std::runtime_error("an unknown op: " + op_);
  }

  bool as_recorded() const {
    for (const Memory& memory : memory_) {
      const size_t item = mvp::size_of(memory.dtype);
      for (size_t at = 0; at + item <= memory.after.size(); at += item)
        if (std::memcmp(memory.now.get() + at, memory.after.data() + at, item) != 0 &&
            !(is_nan(memory.now.get() + at, memory.dtype) && is_nan(memory.after.data() + at, memory.dtype)))
          return false;
    }
    return true;
  }

 private:
  template <typename... A>
  void make(void (*kernel)(A...)) {
    std::tuple<std::decay_t<A>...> arguments{read(static_cast<std::decay_t<A>*>(nullptr))...};  // in order
    std::apply(kernel, arguments);
  }

  void bytes(void* to, size_t count) {
    file_.read(static_cast<char*>(to), static_cast<std::streamsize>(count));
    if (!file_) throw std::runtime_error("the record ends within a call");
  }
  int64_t number() {
    int64_t value;
    bytes(&value, sizeof value);
    return value;
  }

  int64_t read(int64_t*) { return number(); }
  int read(int*) { return static_cast<int>(number()); }
  bool read(bool*) { return number() != 0; }
  double read(double*) {
    double value;
    bytes(&value, sizeof value);
    return value;
  }
  std::string read(std::string*) {
    std::string text(number(), ' ');
    bytes(text.data(), text.size());
    return text;
  }
  // None, −1, is no temperature as a double either.
  std::optional<double> read(std::optional<double>*) {
    const int64_t value = number();
    double temperature;
    std::memcpy(&temperature, &value, sizeof value);
    return value == -1 ? std::nullopt : std::optional<double>(temperature);
  }
  template <typename T>
  std::vector<T> read(std::vector<T>*) {
    std::vector<T> values(number());
    for (T& value : values) value = read(&value);
    return values;
  }
  TensorView read(TensorView*) {
    TensorView view;
    view.ndim = static_cast<int32_t>(number());
    if (view.ndim < 0) return view;
    view.dtype = static_cast<DType>(number());
    for (int d = 0; d < view.ndim; ++d) view.shape[d] = number();
    for (int d = 0; d < view.ndim; ++d) view.stride[d] = number();
    const int64_t memory = number(), offset = number();
    if (memory < 0) return view;
    memory_[memory].dtype = view.dtype;
    view.data = memory_[memory].now.get() + offset;
    return view;
  }

  static bool is_nan(const char* at, DType dtype) {
    if (dtype == DType::f64) {
      double value;
      std::memcpy(&value, at, sizeof value);
      return std::isnan(value);
    }
    uint32_t bits = 0;
    std::memcpy(&bits, at, mvp::size_of(dtype));
    const uint32_t infinity = dtype == DType::f32 ? 0x7f800000 : dtype == DType::bf16 ? 0x7f80 : 0x7c00;
    const uint32_t magnitude = dtype == DType::f32 ? bits & 0x7fffffff : bits & 0x7fff;
    return mvp::is_floating(dtype) && magnitude > infinity;
  }

  std::ifstream& file_;
  std::string op_;
  std::vector<Memory> memory_;
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return 2;
  std::ifstream file(arguments[1], std::ios::binary);
  std::map<std::string, int> made, different;
  int64_t length;
  while (file.read(reinterpret_cast<char*>(&length), sizeof length)) {
    std::string op(length, ' ');
    file.read(op.data(), length);
    Call call(file, op);
    call.make();
    ++made[op];
    different[op] += !call.as_recorded();
  }
  int all = 0;
  for (const auto& [op, calls] : made) {
    std::cout << op << ": " << calls << " calls, " << different[op] << " with another result\n";
    all += different[op];
  }
  return made.size() != 7 || all != 0;
}
