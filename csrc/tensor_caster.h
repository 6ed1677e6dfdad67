// Tensors in as views: duck-typed, so no torch header. For files that define a pybind11 module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>

#include "mvp/dlpack.h"
#include "mvp/tensor_view.h"

namespace mvp {

// torch's dtype objects are singletons: compare by identity.
struct TorchTypes {
  PyObject* dtype[8];
  TorchTypes() {
    static const char* names[8] = {"float32", "float16", "bfloat16", "float64",
                                   "int32",   "int64",   "uint8",    "bool"};
    pybind11::module_ torch = pybind11::module_::import("torch");
    for (int i = 0; i < 8; ++i)
      dtype[i] = pybind11::object(torch.attr(names[i])).release().ptr();  // kept for the process's life
  }
  static const TorchTypes& get() {
    static const TorchTypes types;
    return types;
  }
};

// torch.Tensor's, where this version of torch has one (2.10 or newer); else null. Ten times as fast as
// attributes.
inline const dlpack::ExchangeApi* exchange_api() {
  static const dlpack::ExchangeApi* const api = [] {
    const dlpack::ExchangeApi* found = nullptr;
    const pybind11::object tensor = pybind11::module_::import("torch").attr("Tensor");
    const pybind11::object capsule = pybind11::getattr(tensor, "__dlpack_c_exchange_api__", pybind11::none());
    if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api"))
      found =
          static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    return found != nullptr && found->major == dlpack::kMajorVersion ? found : nullptr;
  }();
  return api;
}

// The DType of what a kernel can take, else −1.
inline int dtype_of(const dlpack::Tensor& tensor) {
  using namespace dlpack;
  const auto is = [&](Code code, int bits) {
    return tensor.code == code && tensor.bits == bits && tensor.lanes == 1;
  };
  const bool known[8] = {is(kFloat, 32), is(kFloat, 16), is(kBfloat, 16), is(kFloat, 64),
                         is(kInt, 32),   is(kInt, 64),   is(kUInt, 8),    is(kBool, 8)};  // as in DType
  for (int code = 0; code < 8; ++code)
    if (known[code]) return code;
  return -1;
}

// False where a kernel cannot take the tensor: its dtype, or too many dimensions.
inline bool view_of(const dlpack::Tensor& tensor, TensorView& view) {
  const int code = dtype_of(tensor);
  if (code < 0 || tensor.ndim > kMaxDims) return false;
  view.dtype = static_cast<DType>(code);
  view.ndim = tensor.ndim;
  std::copy_n(tensor.shape, tensor.ndim, view.shape);
  std::copy_n(tensor.strides, tensor.ndim, view.stride);
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return true;
}

// Whether `source` is a torch.Tensor itself (no subclass), strided, on the CPU and of a known dtype; then
// `view` is what it is. False also where torch has no exchange API.
inline bool read_plain(pybind11::handle source, TensorView& view) {
  static const pybind11::handle type =
      pybind11::object(pybind11::module_::import("torch").attr("Tensor")).release();
  const dlpack::ExchangeApi* const api = exchange_api();
  if (api == nullptr || pybind11::type::handle_of(source).ptr() != type.ptr()) return false;
  dlpack::Tensor tensor;
  if (api->read(source.ptr(), &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  return tensor.device_type == dlpack::kCpu && view_of(tensor, view);
}

}  // namespace mvp

namespace pybind11::detail {

template <>
struct type_caster<mvp::TensorView> {
  PYBIND11_TYPE_CASTER(mvp::TensorView, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    if (source.is_none()) {
      value = mvp::TensorView{};
      return true;
    }
    const mvp::dlpack::ExchangeApi* const api = mvp::exchange_api();
    return api != nullptr ? read_fields(*api, source) : read_attributes(source);
  }

 private:
  bool read_fields(const mvp::dlpack::ExchangeApi& api, handle source) {
    mvp::dlpack::Tensor tensor;
    if (api.read(source.ptr(), &tensor) != 0) throw error_already_set();
    return mvp::view_of(tensor, value) || read_attributes(source);  // which knows what to say
  }

  bool read_attributes(handle source) {
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
    const auto& types = mvp::TorchTypes::get();
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
