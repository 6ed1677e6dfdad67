// What `pack` would ask of hundreds of tensors one attribute at a time, in one call.
#pragma once

#include "tensor_caster.h"

namespace mvp {

inline bool is_plain_tensor(PyObject* object) {
  static PyObject* const tensor =
      pybind11::object(pybind11::module_::import("torch").attr("Tensor")).release().ptr();
  static PyObject* const parameter =
      pybind11::object(pybind11::module_::import("torch.nn").attr("Parameter")).release().ptr();
  PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == tensor || type == parameter;
}

// Strides in elements of a dense tensor, contiguous or channels_last.
inline void dense_strides(const int64_t* shape, int ndim, bool channels_last, int64_t* stride) {
  int64_t step = 1;
  const auto set = [&](int d) {
    stride[d] = step;
    step *= std::max<int64_t>(shape[d], 1);
  };
  if (channels_last) {
    for (int d : {1, 3, 2, 0}) set(d);
  } else {
    for (int d = ndim - 1; d >= 0; --d) set(d);
  }
}

inline pybind11::object to_tuple(const int64_t* values, int size) {
  auto tuple = pybind11::reinterpret_steal<pybind11::object>(PyTuple_New(size));
  if (!tuple) throw pybind11::error_already_set();
  for (int d = 0; d < size; ++d) {
    PyObject* const value = PyLong_FromLongLong(values[d]);
    if (value == nullptr) throw pybind11::error_already_set();
    PyTuple_SET_ITEM(tuple.ptr(), d, value);
  }
  return tuple;
}

// (shape, stride) of what `pack` makes of each tensor. None unless all is as it almost always is: plain CPU
// tensors of 1 to 6 dimensions and a dtype that kernels know, contiguous or channels_last; plain index
// vectors. The caller then finds out what is wrong, or what has to be copied.
inline pybind11::object packed_layouts(const pybind11::list& tensors, const pybind11::list& rows,
                                       const pybind11::list& cols) {
  const dlpack::ExchangeApi* const api = exchange_api();
  const size_t count = tensors.size();
  if (api == nullptr || rows.size() != count || cols.size() != count) return pybind11::none();
  const auto read = [&](PyObject* object, dlpack::Tensor& tensor) {
    if (!is_plain_tensor(object)) return false;
    if (api->read(object, &tensor) != 0) {
      PyErr_Clear();
      return false;
    }
    return tensor.device_type == dlpack::kCpu && dtype_of(tensor) >= 0;
  };
  pybind11::list layouts(count);
  for (size_t p = 0; p < count; ++p) {
    dlpack::Tensor tensor;
    if (!read(PyList_GET_ITEM(tensors.ptr(), p), tensor)) return pybind11::none();
    const int ndim = tensor.ndim;
    if (ndim < 1 || ndim > kMaxDims) return pybind11::none();
    int64_t shape[kMaxDims], stride[kMaxDims];
    std::copy_n(tensor.shape, ndim, shape);
    bool channels_last = false;
    dense_strides(shape, ndim, channels_last, stride);
    if (!std::equal(stride, stride + ndim, tensor.strides)) {
      channels_last = ndim == 4;
      if (channels_last) dense_strides(shape, ndim, channels_last, stride);
      if (!channels_last || !std::equal(stride, stride + ndim, tensor.strides)) return pybind11::none();
    }
    for (int d = 0; d < 2; ++d) {
      PyObject* const index = PyList_GET_ITEM((d == 0 ? rows : cols).ptr(), p);
      if (index == Py_None) continue;
      dlpack::Tensor kept;
      if (d >= ndim || !read(index, kept) || kept.ndim != 1 || kept.code != dlpack::kInt ||
          (kept.bits != 32 && kept.bits != 64))
        return pybind11::none();
      shape[d] = kept.shape[0];
    }
    dense_strides(shape, ndim, channels_last, stride);
    layouts[p] = pybind11::make_tuple(to_tuple(shape, ndim), to_tuple(stride, ndim));
  }
  return layouts;
}

}  // namespace mvp
