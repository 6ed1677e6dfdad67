// The native module: tensors in as views, no tensor out, kernels without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "mvp/amx.h"
#include "mvp/arguments.h"
#include "mvp/ops.h"
#include "tensor_caster.h"
#ifdef MVP_WITH_CUDA
#include "cuda_bindings.h"
#endif

namespace py = pybind11;

namespace {

enum class Isa { baseline, avx2, avx512 };

Isa detect_isa() {
#if defined(MVP_HAVE_AVX512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
#endif
#if defined(MVP_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

const char* name_of(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

// MVP_CPU_ISA may lower what was detected (to test the other builds), never raise it.
Isa choose_isa() {
  const Isa best = detect_isa();
  const char* wish = std::getenv("MVP_CPU_ISA");
  if (wish == nullptr || *wish == 0) return best;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
    if (std::string(wish) == name_of(isa)) return isa < best ? isa : best;
  throw py::value_error(std::string("MVP_CPU_ISA: expected baseline, avx2 or avx512, got ") + wish);
}

#if defined(MVP_HAVE_AVX512)
#define MVP_SELECT(isa, op) \
  ((isa) == Isa::avx512 ? &mvp::avx512::op : (isa) == Isa::avx2 ? &mvp::avx2::op : &mvp::baseline::op)
#else
#define MVP_SELECT(isa, op) (&mvp::baseline::op)
#endif

// Whether both are plain floating CPU tensors of one dtype and one shape.
bool same_kind(py::handle tensor, py::handle other) {
  mvp::TensorView a, b;
  return mvp::read_plain(tensor, a) && mvp::read_plain(other, b) && mvp::is_floating(a.dtype) &&
         a.dtype == b.dtype && a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

// Whether a plain tensor is what its memory says: memory that was not freed (null, and what is added to
// null), and no sign that only torch knows of.
bool is_there(py::handle source, const mvp::TensorView& view) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  if (reinterpret_cast<uintptr_t>(view.data) >> 40 == 0) return false;
  const py::object negative =
      py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(source.ptr(), is_neg));
  if (!negative) throw py::error_already_set();
  return negative.ptr() == Py_False;
}

bool is_dense(const mvp::TensorView& view, bool columns_innermost = false) {
  return mvp::Argument("", {}, "", view).is_dense(columns_innermost);
}

bool read_whole(py::handle source, mvp::TensorView& view) {
  if (!mvp::read_plain(source, view) || !is_there(source, view)) return false;
  mvp::check_memory(view);
  return view.fault == nullptr;
}

// Whether no tensor of an op's arguments, in lists or not, is anything but a plain CPU tensor with its
// memory.
bool are_plain(py::handle arguments) {
  mvp::TensorView view;
  return std::all_of(arguments.begin(), arguments.end(), [&](py::handle one) {
    PyObject* const it = one.ptr();
    if (one.is_none() || PyLong_Check(it) || PyFloat_Check(it) || PyUnicode_Check(it)) return true;
    return PyList_CheckExact(it) ? are_plain(one) : read_whole(one, view);
  });
}

// How many of `size` an index list of blocks keeps; −1 where it is not a plain one that fits.
int64_t count_kept(py::handle index, int64_t block, int64_t size, mvp::TensorView& list) {
  if (index.is_none()) return size;
  if (!read_whole(index, list) || list.ndim != 1 || block < 1 || size % block != 0) return -1;
  return list.dtype == mvp::DType::i64 || list.dtype == mvp::DType::i32 ? list.shape[0] * block : -1;
}

int64_t count_kept(py::handle index, int64_t block, int64_t size) {
  mvp::TensorView list;
  return count_kept(index, block, size, list);
}

// The number of outputs that pruned_linear (weights of 2 dimensions) or pruned_conv2d (of 4, here with at
// least one image, channel and filter) keeps; −1 where the arguments are not plain, dense CPU tensors that
// fit.
int64_t plain_outputs(py::handle x, py::handle weight, py::handle bias, py::handle out_index,
                      py::handle in_index, int64_t out_block, int64_t in_block, int dims) {
  mvp::TensorView x_, weight_, bias_;
  if (!read_whole(x, x_) || !read_whole(weight, weight_) || weight_.ndim != dims) return -1;
  if (!mvp::is_floating(x_.dtype) || x_.dtype != weight_.dtype) return -1;
  if (!bias.is_none() && !(read_whole(bias, bias_) && bias_.dtype == x_.dtype && bias_.ndim == 1 &&
                           bias_.shape[0] == weight_.shape[0]))
    return -1;
  int channels = 1;
  if (dims == 2) {
    if (x_.ndim == 0 || !is_dense(x_) || (weight_.stride[0] != 1 && weight_.stride[1] != 1)) return -1;
    channels = x_.ndim - 1;
  } else if (x_.ndim != 4 || x_.numel() == 0 || !is_dense(weight_)) {
    return -1;
  }
  if (x_.shape[channels] != count_kept(in_index, in_block, weight_.shape[1])) return -1;
  const int64_t outputs = count_kept(out_index, out_block, weight_.shape[0]);
  return dims == 4 && outputs == 0 ? -1 : outputs;
}

int64_t plain_linear(py::handle x, py::handle weight, py::handle bias, py::handle out_index,
                     py::handle in_index, int64_t out_block, int64_t in_block) {
  return plain_outputs(x, weight, bias, out_index, in_index, out_block, in_block, 2);
}

// Places of a convolution's result with which the CPU kernel may be faster than the library; with more,
// cutting the weight costs less than the library's convolution gains. And numbers in all that the weight
// covers at them, which the kernel writes side by side.
constexpr int64_t kMostPlaces = 128, kMostCovered = 1 << 24, kMost = int64_t{1} << 31;

// Whether the images are so small that there is a kernel for them.
bool is_small_conv2d(py::handle x, py::handle weight, int64_t stride, int64_t padding, int64_t dilation) {
  mvp::TensorView x_, weight_;
  if (!mvp::read_plain(x, x_) || !mvp::read_plain(weight, weight_)) return false;
  // Sizes that no product of overflows; and more frame than image is not worth it.
  if (x_.dtype != mvp::DType::f32 || x_.numel() > kMostCovered || weight_.numel() > kMost ||
      dilation > kMost || padding > std::max(x_.shape[2], x_.shape[3]))
    return false;
  int64_t places = x_.shape[0], covered = x_.shape[1];
  for (int d : {2, 3}) {
    const int64_t reach = x_.shape[d] + 2 * padding - dilation * (weight_.shape[d] - 1);
    if (reach < 1) return false;
    places *= (reach - 1) / stride + 1;
    covered *= weight_.shape[d];
  }
  return places <= kMostPlaces && covered <= kMostCovered / places && (is_dense(x_) || is_dense(x_, true));
}

// A new tensor of the kind of `source` and the sizes and strides of `view`, which becomes its view.
py::object make_like(py::handle source, mvp::TensorView& view) {
  // Of torch's ways to make a tensor the one that takes the least time.
  static PyObject* const make = PyUnicode_InternFromString("new_empty_strided");
  const auto tuple_of = [&](const int64_t* values) {
    py::tuple tuple(view.ndim);
    for (int d = 0; d < view.ndim; ++d) tuple[d] = values[d];
    return tuple;
  };
  const py::tuple shape = tuple_of(view.shape), stride = tuple_of(view.stride);
  auto made = py::reinterpret_steal<py::object>(
      PyObject_CallMethodObjArgs(source.ptr(), make, shape.ptr(), stride.ptr(), nullptr));
  if (!made) throw py::error_already_set();
  if (!mvp::read_plain(made, view)) throw py::type_error("expected a plain tensor from new_empty_strided");
  return made;
}

// Those of a tensor without gaps, in one of the two layouts.
void set_strides(mvp::TensorView& view, bool columns_innermost) {
  static constexpr int order[] = {0, 2, 3, 1};
  int64_t step = 1;
  for (int i = view.ndim - 1; i >= 0; --i) {
    const int d = columns_innermost ? order[i] : i;
    view.stride[d] = step;
    step *= std::max<int64_t>(view.shape[d], 1);
  }
}

// pack's results, None where the tensors and their lists are not plain, dense and alike, or do not fit. What
// the kernel itself checks (the lists' values) is left to it.
py::object pack_plain(decltype(&mvp::baseline::pack_cpu) kernel, const py::list& tensors,
                      const py::list& rows, const py::list& cols, int threads) {
  const size_t count = tensors.size();
  if (count == 0 || rows.size() != count || cols.size() != count) return py::none();
  std::vector<mvp::TensorView> wide(count), row_lists(count), col_lists(count), slices(count);
  for (size_t p = 0; p < count; ++p) {
    mvp::TensorView &tensor = wide[p], &slice = slices[p];
    if (!read_whole(tensors[p], tensor) || tensor.ndim == 0) return py::none();
    const bool columns_innermost = tensor.columns_innermost();
    if (!is_dense(tensor, columns_innermost) || (tensor.ndim == 1 && !cols[p].is_none())) return py::none();
    slice = tensor;
    slice.shape[0] = count_kept(rows[p], 1, tensor.shape[0], row_lists[p]);
    if (tensor.ndim > 1) slice.shape[1] = count_kept(cols[p], 1, tensor.shape[1], col_lists[p]);
    if (slice.shape[0] < 0 || (tensor.ndim > 1 && slice.shape[1] < 0)) return py::none();
    set_strides(slice, columns_innermost);
  }
  py::list packed(count);
  for (size_t p = 0; p < count; ++p) packed[p] = make_like(tensors[p], slices[p]);
  {
    const py::gil_scoped_release released;
    kernel(wide, row_lists, col_lists, slices, threads);
  }
  return std::move(packed);
}

bool requires_grad(py::handle tensor) {
  static PyObject* const name = PyUnicode_InternFromString("requires_grad");
  return py::getattr(tensor, name).ptr() == Py_True;
}

// Of a call of pruned_conv2d that is plain: the number of filters that it keeps, where there is a kernel for
// so small images; else the cut weight and bias. None of any other, and where `grad` is on and this would cut
// it off.
py::object plain_conv2d(decltype(&mvp::baseline::pack_cpu) pack, py::handle x, py::handle weight,
                        py::handle bias, py::handle out_index, py::handle in_index, int64_t stride,
                        int64_t padding, int64_t dilation, bool grad, int threads) {
  static PyObject* const select = PyUnicode_InternFromString("index_select");
  const int64_t outputs = plain_outputs(x, weight, bias, out_index, in_index, 1, 1, 4);
  if (outputs < 0 || std::min(stride, dilation) < 1 || padding < 0) return py::none();
  if (is_small_conv2d(x, weight, stride, padding, dilation)) return py::int_(outputs);
  // By torch's own op, whatever is derived.
  const auto rows_of = [&](py::handle tensor) {
    if (tensor.is_none() || out_index.is_none()) return py::reinterpret_borrow<py::object>(tensor);
    auto rows = py::reinterpret_steal<py::object>(
        PyObject_CallMethodObjArgs(tensor.ptr(), select, py::int_(0).ptr(), out_index.ptr(), nullptr));
    if (!rows) throw py::error_already_set();
    return rows;
  };
  if (in_index.is_none()) return py::make_tuple(rows_of(weight), rows_of(bias));
  if (grad && requires_grad(weight)) return py::none();
  py::list tensors(1), rows(1), cols(1);
  tensors[0] = weight;
  rows[0] = out_index;
  cols[0] = in_index;
  const py::object parts = pack_plain(pack, tensors, rows, cols, threads);
  if (parts.is_none()) return parts;
  return py::make_tuple(py::list(parts)[0], rows_of(bias));
}

// residual_add's result without scale and shift, None as of pack_plain, and where `grad` is on and wanted.
py::object residual_add_plain(decltype(&mvp::baseline::residual_add_cpu) kernel, py::handle residual,
                              py::handle y, py::handle index, bool relu, int64_t dim, bool grad,
                              int threads) {
  mvp::TensorView residual_, y_, index_;
  if (!read_whole(residual, residual_) || !read_whole(y, y_) || !mvp::is_floating(residual_.dtype) ||
      y_.dtype != residual_.dtype || y_.ndim != residual_.ndim)
    return py::none();
  if (grad && (requires_grad(residual) || requires_grad(y))) return py::none();
  const int rank = residual_.ndim;
  if (dim < 0) dim += rank;
  if (dim < 0 || dim >= rank) return py::none();
  const bool columns_innermost = dim == 1 && residual_.columns_innermost();
  if (!is_dense(residual_, columns_innermost) || !is_dense(y_, columns_innermost)) return py::none();
  mvp::TensorView out = residual_, part = residual_;
  part.shape[dim] = count_kept(index, 1, residual_.shape[dim], index_);
  if (!std::equal(part.shape, part.shape + rank, y_.shape)) return py::none();
  py::object made = make_like(residual, out);
  {
    const py::gil_scoped_release released;
    kernel(residual_, y_, index_, {}, {}, relu, dim, out, threads);
  }
  return made;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of mvp_ext. Use the functions of mvp_ext.ops, which check their arguments.";
  const Isa isa = choose_isa();
  const auto def = [&](const char* name, auto kernel) {
    m.def(name, kernel, py::call_guard<py::gil_scoped_release>());
  };

  def("importance_cpu", MVP_SELECT(isa, importance_cpu));
  def("merge_cpu", MVP_SELECT(isa, merge_cpu));
  def("meta_vote_cpu", MVP_SELECT(isa, meta_vote_cpu));
  def("pack_cpu", MVP_SELECT(isa, pack_cpu));
  def("pruned_conv2d_cpu", MVP_SELECT(isa, pruned_conv2d_cpu));
  def("pruned_linear_cpu", MVP_SELECT(isa, pruned_linear_cpu));
  def("residual_add_cpu", MVP_SELECT(isa, residual_add_cpu));
  def("unpack_cpu", MVP_SELECT(isa, unpack_cpu));
#ifdef MVP_WITH_CUDA
  mvp::def_cuda_ops(m);
#endif

  m.def("are_plain", &are_plain);
  m.def("plain_linear", &plain_linear);
  m.def("pack_plain", [kernel = MVP_SELECT(isa, pack_cpu)](const py::list& tensors, const py::list& rows,
                                                           const py::list& cols, int threads) {
    return pack_plain(kernel, tensors, rows, cols, threads);
  });
  m.def("plain_conv2d",
        [kernel = MVP_SELECT(isa, pack_cpu)](py::handle x, py::handle weight, py::handle bias,
                                             py::handle out_index, py::handle in_index, int64_t stride,
                                             int64_t padding, int64_t dilation, bool grad, int threads) {
          return plain_conv2d(kernel, x, weight, bias, out_index, in_index, stride, padding, dilation, grad,
                              threads);
        });
  m.def("residual_add_plain",
        [kernel = MVP_SELECT(isa, residual_add_cpu)](py::handle residual, py::handle y, py::handle index,
                                                     bool relu, int64_t dim, bool grad, int threads) {
          return residual_add_plain(kernel, residual, y, index, relu, dim, grad, threads);
        });
  m.def("same_kind", &same_kind);
  m.def("check_arguments", &mvp::check_arguments);
  m.def("build_info", [isa] {
    py::dict info;
    info["compiler"] = MVP_COMPILER;
    info["build_type"] = MVP_BUILD_TYPE;
    info["openmp"] = _OPENMP;
    info["cpu_isa"] = name_of(isa);
    info["cpu_isa_detected"] = name_of(detect_isa());
#if defined(MVP_HAVE_AVX512)
    info["cpu_bf16_pairs"] = isa == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
    info["cpu_bf16_pairs"] = false;
#endif
    info["cpu_amx"] = info["cpu_bf16_pairs"].cast<bool>() && mvp::have_amx();
#ifdef MVP_WITH_HOPPER
    info["hopper"] = true;
#else
    info["hopper"] = false;
#endif
#ifdef MVP_WITH_CUDA
    info["cuda"] = true;
    info["cuda_archs"] = MVP_CUDA_ARCHS;
#else
    info["cuda"] = false;
    info["cuda_archs"] = "";
#endif
    return info;
  });
}
