// The only file that knows Python: tensors in as views (duck-typed, so no torch header), nothing out, GIL
// released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <string>

#include "mvp/ops.h"

namespace py = pybind11;

namespace {

// torch's dtype objects are singletons: compare by identity.
struct TorchTypes {
  PyObject* dtype[8];
  TorchTypes() {
    static const char* names[8] = {"float32", "float16", "bfloat16", "float64",
                                   "int32",   "int64",   "uint8",    "bool"};
    py::module_ torch = py::module_::import("torch");
    for (int i = 0; i < 8; ++i)
      dtype[i] = py::object(torch.attr(names[i])).release().ptr();  // kept for the process's life
  }
  static const TorchTypes& get() {
    static const TorchTypes types;
    return types;
  }
};

}  // namespace

namespace pybind11::detail {

template <>
struct type_caster<mvp::TensorView> {
  PYBIND11_TYPE_CASTER(mvp::TensorView, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    if (source.is_none()) {
      value = mvp::TensorView{};
      return true;
    }
    static PyObject* const data_ptr_name = PyUnicode_InternFromString("data_ptr");
    static PyObject* const shape_name = PyUnicode_InternFromString("shape");
    static PyObject* const stride_name = PyUnicode_InternFromString("stride");
    static PyObject* const dtype_name = PyUnicode_InternFromString("dtype");
    const auto call = [&](PyObject* name) {
      return reinterpret_steal<object>(PyObject_CallMethodNoArgs(source.ptr(), name));
    };
    object dtype = reinterpret_steal<object>(PyObject_GetAttr(source.ptr(), dtype_name));
    object shape = reinterpret_steal<object>(PyObject_GetAttr(source.ptr(), shape_name));
    object stride = dtype && shape ? call(stride_name) : object();
    object pointer = stride ? call(data_ptr_name) : object();
    if (!pointer) throw error_already_set();
    const Py_ssize_t ndim = PyTuple_GET_SIZE(shape.ptr());
    if (ndim > mvp::kMaxDims) throw value_error("mvp_ext: a kernel takes at most 6 dimensions");
    int code = 0;
    const auto& types = TorchTypes::get();
    while (code < 8 && types.dtype[code] != dtype.ptr()) ++code;
    if (code == 8) throw type_error("mvp_ext: unsupported dtype " + std::string(str(dtype)));
    value.dtype = static_cast<mvp::DType>(code);
    value.ndim = static_cast<int32_t>(ndim);
    for (Py_ssize_t d = 0; d < ndim; ++d) {
      value.shape[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), d));
      value.stride[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), d));
    }
    value.data = PyLong_AsVoidPtr(pointer.ptr());
    return true;
  }
};

}  // namespace pybind11::detail

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
  def("pruned_linear_cpu", MVP_SELECT(isa, pruned_linear_cpu));
  def("residual_add_cpu", MVP_SELECT(isa, residual_add_cpu));
  def("unpack_cpu", MVP_SELECT(isa, unpack_cpu));

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
