// What memory safety needs of the arguments of each op, on the CPU and on a GPU: every kernel begins with its
// line from here. Operators can be called by anybody (from exported programs, too), past the public functions
// that explain mistakes; so nothing is taken for granted here but that a tensor's fields are true.
//
// Not here: the values of index lists, which are checked where they are read, and what a kernel of one device
// alone needs (alignment, room for a grid).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "mvp/tensor_view.h"

namespace mvp {

// One argument of an op; `at`: its number, where it is one of a list.
class Argument {
 public:
  Argument(const char* op, Where where, const char* name, const TensorView& view, int64_t at = -1)
      : op_(op), name_(name), view_(view), at_(at) {
    if (!view.defined()) return;
    if (view.fault != nullptr) refuse(view.fault);
    if (view.where.type != where.type) refuse(where.type == 1 ? "a CPU tensor" : "a tensor on the GPU");
    if (view.where.index != where.index) refuse("a tensor on the same GPU as the others");
  }

  void need(bool holds, const char* expected) const {
    if (!holds) refuse(expected);
  }

  void need_tensor() const { need(view_.defined(), "a tensor"); }

  void need_rank(int least, int most) const {
    if (view_.ndim < least || view_.ndim > most)
      refuse(std::to_string(least) + (least < most ? " to " + std::to_string(most) : "") + " dimensions");
  }

  // The shape of `like`, but for `size` in dimension `dim`.
  void need_shape(const TensorView& like, int64_t dim, int64_t size) const {
    bool equal = view_.ndim == like.ndim;
    for (int d = 0; equal && d < like.ndim; ++d) equal = view_.shape[d] == (d == dim ? size : like.shape[d]);
    if (equal) return;
    TensorView wanted = like;
    if (dim >= 0) wanted.shape[dim] = size;
    refuse("shape " + shape_of(wanted));
  }
  void need_shape(const TensorView& like) const { need_shape(like, -1, 0); }

  // [size], or [targets, size] where there are any (≥ 0).
  void need_row(int64_t targets, int64_t size) const {
    TensorView wanted;
    wanted.ndim = targets < 0 ? 1 : 2;
    wanted.shape[0] = targets < 0 ? size : targets;
    wanted.shape[1] = size;
    need_shape(wanted);
  }

  void need_dtype(DType dtype) const {
    if (view_.dtype != dtype) refuse(name_of(dtype));
  }

  void need_floating() const { need(is_floating(view_.dtype), "a floating dtype"); }

  // Without gaps, rows first or (of four dimensions) with the columns innermost.
  void need_dense(bool columns_innermost) const {
    if (!is_dense(columns_innermost)) refuse(columns_innermost ? "channels_last" : "a contiguous tensor");
  }

  bool is_dense(bool columns_innermost) const {
    int64_t step = 1;
    for (int i = view_.ndim - 1; i >= 0; --i) {
      static constexpr int order[] = {0, 2, 3, 1};
      const int d = columns_innermost ? order[i] : i;
      if (view_.shape[d] == 0) return true;  // wherever the others lead, nothing is there
      if (view_.shape[d] != 1 && view_.stride[d] != step) return is_empty();
      step *= view_.shape[d];
    }
    return true;
  }

  // As a list of kept blocks among `bound` positions, or none, for all: how many positions it keeps.
  int64_t need_list(int64_t bound, int64_t block = 1) const {
    if (!view_.defined()) return bound;
    need(view_.ndim == 1 && (view_.dtype == DType::i32 || view_.dtype == DType::i64),
         "an int32 or int64 list of one dimension");
    if (block < 1 || bound % block != 0)
      refuse("blocks that divide " + std::to_string(bound) + ", and not of " + std::to_string(block));
    const int64_t size = view_.shape[0];
    need(size == 0 || bound > 0, "an empty list for a dimension of size 0");
    need(size < (int64_t{1} << 58) / block, "fewer entries");
    return size * block;
  }

  [[noreturn]] void refuse(const std::string& expected) const {
    throw std::invalid_argument(std::string(op_) + ": " + name_ +
                                (at_ < 0 ? "" : "[" + std::to_string(at_) + "]") + ": expected " + expected +
                                ", got " + description());
  }

 private:
  bool is_empty() const {
    for (int d = 0; d < view_.ndim; ++d)
      if (view_.shape[d] == 0) return true;
    return false;
  }

  static std::string listed(const int64_t* values, int count) {
    std::string text = "(";
    for (int i = 0; i < count; ++i) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
    return text + ")";
  }
  static std::string shape_of(const TensorView& view) { return listed(view.shape, view.ndim); }

  std::string description() const {
    if (!view_.defined()) return "None";
    if (view_.fault != nullptr) return "one without";
    return std::string(name_of(view_.dtype)) + " of shape " + shape_of(view_) + " and strides " +
           listed(view_.stride, view_.ndim) + " on device type " + std::to_string(view_.where.type) + ":" +
           std::to_string(view_.where.index);
  }

  const char* op_;
  const char* name_;
  const TensorView& view_;
  int64_t at_;
};

[[noreturn]] inline void refuse(const char* op, const std::string& what) {
  throw std::invalid_argument(std::string(op) + ": " + what);
}

inline void check_importance(Where where, const TensorView& a, const TensorView& grad,
                             const std::string& kind, int64_t dim, const TensorView& scores) {
  constexpr char op[] = "importance";
  const Argument a_(op, where, "a", a), grad_(op, where, "grad", grad), scores_(op, where, "scores", scores);
  if (kind != "taylor" && kind != "taylor2" && kind != "activation")
    refuse(op, "kind: expected taylor, taylor2 or activation, got " + kind);
  a_.need_tensor();
  a_.need_floating();
  if (dim < 1 || dim >= a.ndim) a_.refuse("dim " + std::to_string(dim) + " after the batch");
  if (kind != "activation") {
    grad_.need_tensor();
    grad_.need_dtype(a.dtype);
    grad_.need_shape(a);
  }
  scores_.need_rank(1, 1);
  scores_.need_dtype(a.dtype == DType::f64 ? DType::f64 : DType::f32);
  scores_.need_dense(false);
  const int64_t units = scores.shape[0];
  if (units > 0 && a.shape[dim] % units != 0)
    refuse(op,
           "units: expected a divisor of " + std::to_string(a.shape[dim]) + ", got " + std::to_string(units));
}

inline void check_meta_vote(Where where, const TensorView& masks, const TensorView& weights,
                            const TensorView& prior, const std::vector<int64_t>& layers,
                            const std::vector<int64_t>& kept, const TensorView& mask, const TensorView& index,
                            const TensorView& votes) {
  constexpr char op[] = "meta_vote";
  const Argument masks_(op, where, "masks", masks), weights_(op, where, "weights", weights),
      prior_(op, where, "prior", prior), mask_(op, where, "mask", mask), index_(op, where, "index", index),
      votes_(op, where, "votes", votes);
  masks_.need_rank(2, 2);
  masks_.need_dtype(DType::boolean);
  const int64_t voters = masks.shape[0], units = masks.shape[1];
  masks_.need(masks.stride[1] == 1 || units <= 1, "contiguous rows");
  const int64_t targets = weights.ndim == 2 ? weights.shape[0] : -1;
  if (weights.defined()) {
    weights_.need_dtype(DType::f32);
    weights_.need_row(targets, voters);
    weights_.need_dense(false);
  }
  if (prior.defined()) {
    prior_.need_dtype(DType::f32);
    prior_.need_row(prior.ndim == 2 ? targets : -1, units);
    prior_.need_dense(false);
  }
  if (kept.size() != layers.size())
    refuse(op, "kept: expected " + std::to_string(layers.size()) + " counts, one a layer, got " +
                   std::to_string(kept.size()));
  int64_t left = units, all_kept = 0;
  for (size_t l = 0; l < layers.size(); ++l) {
    if (kept[l] < 1 || kept[l] > layers[l])
      refuse(op, "kept: expected counts in [1, units of the layer], got " + std::to_string(kept[l]) + " of " +
                     std::to_string(layers[l]));
    if (layers[l] > left) left = -1;
    if (left < 0) break;
    left -= layers[l];
    all_kept += kept[l];
  }
  if (left != 0) refuse(op, "layers: expected a sum of " + std::to_string(units) + " (masks.shape[1])");
  mask_.need_dtype(DType::boolean);
  mask_.need_row(targets, units);
  mask_.need_dense(false);
  index_.need_dtype(DType::i32);
  index_.need_row(targets, all_kept);
  index_.need_dense(false);
  votes_.need_dtype(DType::f32);
  votes_.need_row(targets, units);
  votes_.need_dense(false);
}

// That `part` is `full` without what the lists leave out, or an output of that shape; both in one layout.
inline void check_slice(const Argument& full_, const TensorView& full, const Argument& part_,
                        const Argument& rows_, const Argument& cols_, bool has_cols) {
  full_.need_rank(has_cols ? 2 : 1, kMaxDims);
  TensorView wanted = full;
  wanted.shape[0] = rows_.need_list(full.shape[0]);
  if (full.ndim > 1) wanted.shape[1] = cols_.need_list(full.shape[1]);
  part_.need_tensor();
  part_.need_shape(wanted);
  part_.need_dense(full.columns_innermost());
}

inline bool overlap(const TensorView& a, const TensorView& b) {  // both dense
  const auto from = [](const TensorView& v) { return reinterpret_cast<uintptr_t>(v.data); };
  const auto end = [&](const TensorView& v) { return from(v) + v.numel() * size_of(v.dtype); };
  return from(a) < end(b) && from(b) < end(a);
}

inline void check_pack(const char* op, Where where, const std::vector<TensorView>& full,
                       const std::vector<TensorView>& packed, const std::vector<TensorView>& rows,
                       const std::vector<TensorView>& cols) {
  const bool packing = op[0] == 'p';
  if (packed.size() != full.size() || rows.size() != full.size() || cols.size() != full.size())
    refuse(op, "expected lists of equal length");
  for (size_t p = 0; p < full.size(); ++p) {
    const auto at = static_cast<int64_t>(p);
    const Argument full_(op, where, packing ? "tensors" : "out", full[p], at),
        part_(op, where, "packed", packed[p], at), rows_(op, where, "rows", rows[p], at),
        cols_(op, where, "cols", cols[p], at);
    check_slice(full_, full[p], part_, rows_, cols_, cols[p].defined());
    full_.need_dense(full[p].columns_innermost());
    part_.need_dtype(full[p].dtype);
    part_.need(!overlap(full[p], packed[p]), packing ? "memory of its own" : "memory apart from out's");
  }
}

// `weights`: how many there are.
inline void check_merge(Where where, const std::vector<TensorView>& base,
                        const std::vector<TensorView>& voters, const std::vector<TensorView>& voter_rows,
                        const std::vector<TensorView>& voter_cols, size_t weights,
                        const std::vector<TensorView>& rows, const std::vector<TensorView>& cols,
                        const std::vector<TensorView>& out) {
  constexpr char op[] = "merge";
  const size_t count = base.size();
  if (rows.size() != count || cols.size() != count || out.size() != count ||
      voters.size() != weights * count || voter_rows.size() != voters.size() ||
      voter_cols.size() != voters.size())
    refuse(op, "expected lists of equal length");
  for (size_t p = 0; p < count; ++p) {
    const auto at = static_cast<int64_t>(p);
    const Argument base_(op, where, "base", base[p], at), out_(op, where, "out", out[p], at),
        rows_(op, where, "rows", rows[p], at), cols_(op, where, "cols", cols[p], at);
    check_slice(base_, base[p], out_, rows_, cols_, cols[p].defined());
    base_.need_floating();
    base_.need_dense(base[p].columns_innermost());
    out_.need_dtype(base[p].dtype);
  }
  for (size_t v = 0; v < voters.size(); ++v) {
    const auto at = static_cast<int64_t>(v);
    const TensorView& full = base[v % count];
    const Argument base_(op, where, "base", full, static_cast<int64_t>(v % count)),
        voter_(op, where, "voters", voters[v], at), rows_(op, where, "voter_rows", voter_rows[v], at),
        cols_(op, where, "voter_cols", voter_cols[v], at);
    check_slice(base_, full, voter_, rows_, cols_, voter_cols[v].defined());
    voter_.need_floating();
  }
}

inline int64_t row_count(const TensorView& view) {
  int64_t rows = 1;
  for (int d = 0; d + 1 < view.ndim; ++d) rows *= view.shape[d];
  return rows;
}

// x may have its leading dimensions flattened.
inline void check_pruned_linear(Where where, const TensorView& x, const TensorView& weight,
                                const TensorView& bias, const TensorView& out_index,
                                const TensorView& in_index, int64_t out_block, int64_t in_block,
                                const TensorView& residual, const TensorView& out) {
  constexpr char op[] = "pruned_linear";
  const Argument x_(op, where, "x", x), weight_(op, where, "weight", weight), bias_(op, where, "bias", bias),
      out_index_(op, where, "out_index", out_index), in_index_(op, where, "in_index", in_index),
      residual_(op, where, "residual", residual), out_(op, where, "out", out);
  x_.need_rank(1, kMaxDims);
  x_.need_floating();
  weight_.need_rank(2, 2);
  weight_.need_dtype(x.dtype);
  const int64_t all_outputs = weight.shape[0], all_inputs = weight.shape[1];
  weight_.need(weight.stride[0] == 1 || weight.stride[1] == 1 || all_outputs == 0 || all_inputs == 0,
               "one dimension that is contiguous");
  const int64_t outputs = out_index_.need_list(all_outputs, out_block),
                inputs = in_index_.need_list(all_inputs, in_block);
  if (x.shape[x.ndim - 1] != inputs) x_.refuse("a last dimension of " + std::to_string(inputs));
  if (bias.defined()) {
    bias_.need_dtype(x.dtype);
    bias_.need_row(-1, all_outputs);
  }
  out_.need_rank(1, kMaxDims);
  out_.need_dtype(x.dtype);
  out_.need_dense(false);
  const int64_t width = residual.defined() ? all_outputs : outputs;
  if (out.shape[out.ndim - 1] != width || row_count(out) != row_count(x))
    out_.refuse(std::to_string(row_count(x)) + " rows of " + std::to_string(width));
  if (residual.defined()) {
    residual_.need_dtype(x.dtype);
    residual_.need_shape(out);
    residual_.need_dense(false);
  }
}

inline void check_residual_add(Where where, const TensorView& residual, const TensorView& y,
                               const TensorView& index, const TensorView& scale, const TensorView& shift,
                               int64_t dim, const TensorView& out) {
  constexpr char op[] = "residual_add";
  const Argument residual_(op, where, "residual", residual), y_(op, where, "y", y),
      index_(op, where, "index", index), scale_(op, where, "scale", scale), shift_(op, where, "shift", shift),
      out_(op, where, "out", out);
  residual_.need_tensor();
  residual_.need_floating();
  if (dim < 0 || dim >= residual.ndim)
    refuse(op, "dim: expected one of " + std::to_string(residual.ndim) + " dimensions, got " +
                   std::to_string(dim));
  const bool innermost = dim == 1 && residual.columns_innermost();
  const int64_t kept = index_.need_list(residual.shape[dim]);
  residual_.need_dense(innermost);
  y_.need_tensor();
  y_.need_dtype(residual.dtype);
  y_.need_shape(residual, dim, kept);
  y_.need_dense(innermost);
  out_.need_tensor();
  out_.need_dtype(residual.dtype);
  out_.need_shape(residual);
  out_.need_dense(innermost);
  const DType accumulator = residual.dtype == DType::f64 ? DType::f64 : DType::f32;
  if (scale.defined()) {
    scale_.need_dtype(accumulator);
    scale_.need_row(-1, kept);
  }
  if (shift.defined()) {
    shift_.need_dtype(accumulator);
    shift_.need_row(-1, kept);
  }
}

}  // namespace mvp
