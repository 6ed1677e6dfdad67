// The native module: tensors in as views, no tensor out, kernels without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>

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

// See same_kind in mvp_ext/ops/checks.py.
bool same_kind(py::handle tensor, py::handle other, py::handle index, int64_t dim) {
  mvp::TensorView a, b, list;
  if (!mvp::read_plain(tensor, a) || !mvp::read_plain(other, b)) return false;
  if (!mvp::is_floating(a.dtype) || a.dtype != b.dtype || a.ndim != b.ndim || dim < -a.ndim || dim >= a.ndim)
    return false;
  if (!index.is_none()) {
    if (!mvp::read_plain(index, list) || list.ndim != 1) return false;
    if (list.dtype != mvp::DType::i64 && list.dtype != mvp::DType::i32) return false;
    a.shape[dim < 0 ? dim + a.ndim : dim] = list.shape[0];
  }
  return std::equal(a.shape, a.shape + a.ndim, b.shape);
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

bool is_dense(const mvp::TensorView& view) {
  int64_t step = 1;
  for (int d = view.ndim - 1; d >= 0; step *= view.shape[d--])
    if (view.shape[d] != 1 && view.stride[d] != step) return false;
  return true;
}

bool read_whole(py::handle source, mvp::TensorView& view) {
  return mvp::read_plain(source, view) && is_there(source, view);
}

// How many of `size` an index list of blocks keeps; −1 where it is not a plain one that fits.
int64_t count_kept(py::handle index, int64_t block, int64_t size) {
  mvp::TensorView list;
  if (index.is_none()) return size;
  if (!read_whole(index, list) || list.ndim != 1 || block < 1 || size % block != 0) return -1;
  return list.dtype == mvp::DType::i64 || list.dtype == mvp::DType::i32 ? list.shape[0] * block : -1;
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

// Also whether the images are so small that there is a kernel for them.
std::pair<int64_t, bool> plain_conv2d(py::handle x, py::handle weight, py::handle bias, py::handle out_index,
                                      py::handle in_index, int64_t stride, int64_t padding,
                                      int64_t dilation) {
  const int64_t outputs = plain_outputs(x, weight, bias, out_index, in_index, 1, 1, 4);
  mvp::TensorView x_, weight_;
  if (outputs < 0 || std::min(stride, dilation) < 1 || padding < 0) return {-1, false};
  mvp::read_plain(x, x_);
  mvp::read_plain(weight, weight_);
  // Sizes that no product of overflows; and more frame than image is not worth it.
  if (x_.dtype != mvp::DType::f32 || x_.numel() > kMostCovered || weight_.numel() > kMost ||
      dilation > kMost || padding > std::max(x_.shape[2], x_.shape[3]))
    return {outputs, false};
  int64_t places = x_.shape[0], covered = x_.shape[1];
  for (int d : {2, 3}) {
    const int64_t reach = x_.shape[d] + 2 * padding - dilation * (weight_.shape[d] - 1);
    if (reach < 1) return {outputs, false};
    places *= (reach - 1) / stride + 1;
    covered *= weight_.shape[d];
  }
  const mvp::Argument image("", {}, "", x_);
  return {outputs, places <= kMostPlaces && covered <= kMostCovered / places &&
                       (image.is_dense(false) || image.is_dense(true))};
}

// The shapes of pack's results, None where the tensors and their lists are not plain, contiguous and alike,
// or do not fit. What the kernel itself checks (the lists' values) is left to it.
py::object plain_slices(const py::list& tensors, const py::list& rows, const py::list& cols) {
  const size_t count = tensors.size();
  if (count == 0 || rows.size() != count || cols.size() != count) return py::none();
  py::list shapes(count);
  for (size_t p = 0; p < count; ++p) {
    mvp::TensorView tensor;
    const py::handle r = rows[p], c = cols[p];
    if (!read_whole(tensors[p], tensor) || tensor.ndim == 0 || !is_dense(tensor)) return py::none();
    if (tensor.ndim == 1 && !c.is_none()) return py::none();
    const int64_t kept[2] = {count_kept(r, 1, tensor.shape[0]),
                             tensor.ndim > 1 ? count_kept(c, 1, tensor.shape[1]) : 0};
    if (kept[0] < 0 || kept[1] < 0) return py::none();
    py::tuple shape(tensor.ndim);
    for (int d = 0; d < tensor.ndim; ++d) shape[d] = d < 2 ? kept[d] : tensor.shape[d];
    shapes[p] = shape;
  }
  return shapes;
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

  m.def("plain_conv2d", &plain_conv2d);
  m.def("plain_linear", &plain_linear);
  m.def("plain_slices", &plain_slices);
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
