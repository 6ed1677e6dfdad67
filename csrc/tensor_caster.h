// Tensors in as views: duck-typed, so no torch header. For files that define a pybind11 module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>

#include "mvp/dlpack.h"
#include "mvp/tensor_view.h"

namespace mvp {

// What a tensor lacks that no kernel can take: TensorView's fault.
constexpr char kKnownDtype[] = "a real dtype of at most 8 bytes";
constexpr char kFewDims[] = "at most 6 dimensions";
constexpr char kCountable[] = "fewer than 2^58 elements";
constexpr char kMemory[] = "memory for all its elements (not freed, not fake)";
constexpr char kAligned[] = "memory that starts at a multiple of an element's size";

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

// The view; its fault is set where no kernel can take the tensor.
inline TensorView view_of(const dlpack::Tensor& tensor) {
  TensorView view;
  const int code = dtype_of(tensor);
  view.ndim = std::min(tensor.ndim, kMaxDims);
  view.where = {tensor.device_type, tensor.device_id};
  if (code < 0) view.fault = kKnownDtype;
  if (tensor.ndim > kMaxDims) view.fault = kFewDims;
  if (view.fault != nullptr) return view;
  view.dtype = static_cast<DType>(code);
  std::copy_n(tensor.shape, tensor.ndim, view.shape);
  std::copy_n(tensor.strides, tensor.ndim, view.stride);
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  return view;
}

// How many elements lie from the first to the last, 0 for none; −1 where sizes do not allow to count.
inline int64_t extent_of(int ndim, const int64_t* shape, const int64_t* strides) {
  constexpr int64_t kMost = int64_t{1} << 58;
  int64_t product = 1, last = 0;
  bool empty = false, far = false;
  for (int d = 0; d < ndim; ++d) {
    const int64_t size = shape[d];
    if (size < 0 || __builtin_mul_overflow(product, std::max<int64_t>(size, 1), &product) || product > kMost)
      return -1;
    empty = empty || size == 0;
    int64_t step;
    far = far || __builtin_mul_overflow(std::max<int64_t>(size - 1, 0), strides[d], &step) || step < 0 ||
          __builtin_add_overflow(last, step, &last) || last > kMost;
  }
  return empty ? 0 : far ? -1 : last + 1;
}

// Whether the storage of `source` reaches as far as its elements, which lie from `data` on. Others may have
// shrunk it since the tensor was made, or freed it.
inline bool has_memory(pybind11::handle source, const void* data, int64_t elements, int64_t item) {
  static PyObject* const storage_name = PyUnicode_InternFromString("untyped_storage");
  static PyObject* const size_name = PyUnicode_InternFromString("nbytes");
  static PyObject* const pointer_name = PyUnicode_InternFromString("data_ptr");
  if (elements == 0) return true;
  if (data == nullptr) return false;
  const auto call = [](pybind11::handle object, PyObject* name) {
    auto result =
        pybind11::reinterpret_steal<pybind11::object>(PyObject_CallMethodNoArgs(object.ptr(), name));
    if (!result) throw pybind11::error_already_set();
    return result;
  };
  const pybind11::object storage = call(source, storage_name);
  const int64_t size = PyLong_AsLongLong(call(storage, size_name).ptr());
  const void* const begin = PyLong_AsVoidPtr(call(storage, pointer_name).ptr());
  const int64_t offset = static_cast<const char*>(data) - static_cast<const char*>(begin);
  return elements <= (size - offset) / item;
}

// Sets the fault of a view whose memory is not there. That it is all there would cost as much as a small
// kernel to ask: see check_arguments, for calls that come from anywhere.
inline void check_memory(TensorView& view) {
  if (view.fault != nullptr) return;
  const int64_t elements = extent_of(view.ndim, view.shape, view.stride), item = size_of(view.dtype);
  if (elements < 0)
    view.fault = kCountable;
  else if (elements > 0 && view.data == nullptr)
    view.fault = kMemory;
  else if (reinterpret_cast<uintptr_t>(view.data) % item != 0)
    view.fault = kAligned;
}

// For the entry of an op, whose arguments torch sees before a kernel does: torch, too, reads past the end of
// memory that was freed.
inline void check_arguments(const std::string& op, const pybind11::tuple& arguments) {
  static const pybind11::handle type =
      pybind11::object(pybind11::module_::import("torch").attr("Tensor")).release();
  const dlpack::ExchangeApi* const api = exchange_api();
  if (api == nullptr) return;
  const auto check = [&](pybind11::handle source, size_t at) {
    dlpack::Tensor tensor;
    if (!pybind11::isinstance(source, type)) return;
    if (api->read(source.ptr(), &tensor) != 0) throw pybind11::error_already_set();
    const int64_t elements = extent_of(tensor.ndim, tensor.shape, tensor.strides);
    if (elements < 0 || !has_memory(source, static_cast<char*>(tensor.data) + tensor.byte_offset, elements,
                                    std::max(1, tensor.bits * tensor.lanes / 8)))
      throw pybind11::value_error(op + ": argument " + std::to_string(at) + ": expected " +
                                  (elements < 0 ? kCountable : kMemory));
  };
  for (size_t at = 0; at < arguments.size(); ++at) {
    const pybind11::handle argument = arguments[at];
    if (pybind11::isinstance<pybind11::list>(argument))
      for (pybind11::handle one : argument) check(one, at);
    else
      check(argument, at);
  }
}

// Whether `source` is a torch.Tensor or a Parameter (no other subclass), strided, on the CPU and of a known
// dtype; then `view` is what it is. False also where torch has no exchange API.
inline bool read_plain(pybind11::handle source, TensorView& view) {
  static const auto type = [](const char* module, const char* name) {
    return pybind11::object(pybind11::module_::import(module).attr(name)).release().ptr();
  };
  static const PyObject* const tensor_type = type("torch", "Tensor");
  static const PyObject* const parameter_type = type("torch.nn", "Parameter");
  const dlpack::ExchangeApi* const api = exchange_api();
  const PyObject* const found = pybind11::type::handle_of(source).ptr();
  if (api == nullptr || (found != tensor_type && found != parameter_type)) return false;
  dlpack::Tensor tensor;
  if (api->read(source.ptr(), &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  view = view_of(tensor);
  return tensor.device_type == dlpack::kCpu && view.fault == nullptr;
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
    if (api == nullptr) {
      read_attributes(source);
    } else {
      mvp::dlpack::Tensor tensor;
      if (api->read(source.ptr(), &tensor) != 0) throw error_already_set();
      value = mvp::view_of(tensor);
    }
    mvp::check_memory(value);
    return true;
  }

 private:
  void read_attributes(handle source) {
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
    int code = 0;
    const auto& types = mvp::TorchTypes::get();
    while (code < 8 && types.dtype[code] != dtype.ptr()) ++code;
    value = mvp::TensorView{};
    value.ndim = static_cast<int32_t>(std::min<Py_ssize_t>(ndim, mvp::kMaxDims));
    const object device = source.attr("device");
    const std::string type = str(device.attr("type"));
    value.where.type = type == "cpu" ? mvp::dlpack::kCpu : type == "cuda" ? mvp::dlpack::kCuda : 0;
    value.where.index = device.attr("index").is_none() ? 0 : device.attr("index").cast<int32_t>();
    if (code == 8) value.fault = mvp::kKnownDtype;
    if (ndim > mvp::kMaxDims) value.fault = mvp::kFewDims;
    if (value.fault != nullptr) return;
    value.dtype = static_cast<mvp::DType>(code);
    for (Py_ssize_t d = 0; d < ndim; ++d) {
      value.shape[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), d));
      value.stride[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), d));
    }
    value.data = PyLong_AsVoidPtr(pointer.ptr());
  }
};

}  // namespace pybind11::detail
