// What `pack` and `merge` would ask of hundreds of tensors one attribute at a time, in one call.
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

struct Layout {
  int ndim = 0;
  int64_t shape[kMaxDims], stride[kMaxDims];
  bool floating = false;
};

// A plain CPU or CUDA tensor of a dtype that kernels know.
inline bool read_plain(PyObject* object, dlpack::Tensor& tensor) {
  if (!is_plain_tensor(object)) return false;
  if (exchange_api()->read(object, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  return (tensor.device_type == dlpack::kCpu || tensor.device_type == dlpack::kCuda) && dtype_of(tensor) >= 0;
}

inline bool on_same_device(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  return a.device_type == b.device_type && a.device_id == b.device_id;
}

// The layout of what `pack` makes of a tensor. False unless all is as it almost always is: a plain tensor of
// 1 to 6 dimensions, contiguous or channels_last; plain index vectors; all on the device of `first`.
inline bool packed_layout(PyObject* object, PyObject* rows, PyObject* cols, const dlpack::Tensor& first,
                          Layout& layout) {
  dlpack::Tensor tensor;
  if (!read_plain(object, tensor) || !on_same_device(tensor, first) || tensor.ndim < 1 ||
      tensor.ndim > kMaxDims)
    return false;
  const int ndim = layout.ndim = tensor.ndim;
  layout.floating = tensor.code == dlpack::kFloat || tensor.code == dlpack::kBfloat;
  std::copy_n(tensor.shape, ndim, layout.shape);
  const auto has_strides = [&](bool channels_last) {
    dense_strides(layout.shape, ndim, channels_last, layout.stride);
    return std::equal(layout.stride, layout.stride + ndim, tensor.strides);
  };
  const bool channels_last = !has_strides(false);
  if (channels_last && !(ndim == 4 && has_strides(true))) return false;
  for (int d = 0; d < 2; ++d) {
    PyObject* const index = d == 0 ? rows : cols;
    if (index == Py_None) continue;
    dlpack::Tensor kept;
    if (d >= ndim || !read_plain(index, kept) || !on_same_device(kept, first) || kept.ndim != 1 ||
        kept.code != dlpack::kInt)
      return false;
    layout.shape[d] = kept.shape[0];
  }
  dense_strides(layout.shape, ndim, channels_last, layout.stride);
  return true;
}

// (shape, stride) of what `pack` makes of each tensor; None where `packed_layout` is false. The caller then
// finds out what is wrong, or what has to be copied.
inline pybind11::object packed_layouts(const pybind11::list& tensors, const pybind11::list& rows,
                                       const pybind11::list& cols) {
  const size_t count = tensors.size();
  dlpack::Tensor first;
  if (exchange_api() == nullptr || rows.size() != count || cols.size() != count ||
      (count > 0 && !read_plain(PyList_GET_ITEM(tensors.ptr(), 0), first)))
    return pybind11::none();
  pybind11::list layouts(count);
  for (size_t p = 0; p < count; ++p) {
    Layout layout;
    if (!packed_layout(PyList_GET_ITEM(tensors.ptr(), p), PyList_GET_ITEM(rows.ptr(), p),
                       PyList_GET_ITEM(cols.ptr(), p), first, layout))
      return pybind11::none();
    layouts[p] =
        pybind11::make_tuple(to_tuple(layout.shape, layout.ndim), to_tuple(layout.stride, layout.ndim));
  }
  return layouts;
}

// Whether `parts` could be what `pack` made of floating tensors, whatever their floating dtypes.
inline bool are_packed(const pybind11::list& tensors, const pybind11::list& rows, const pybind11::list& cols,
                       const pybind11::list& parts) {
  const size_t count = tensors.size();
  if (exchange_api() == nullptr || rows.size() != count || cols.size() != count || parts.size() != count)
    return false;
  dlpack::Tensor first;
  if (count > 0 && !read_plain(PyList_GET_ITEM(tensors.ptr(), 0), first)) return false;
  for (size_t p = 0; p < count; ++p) {
    Layout layout;
    dlpack::Tensor part;
    if (!packed_layout(PyList_GET_ITEM(tensors.ptr(), p), PyList_GET_ITEM(rows.ptr(), p),
                       PyList_GET_ITEM(cols.ptr(), p), first, layout) ||
        !layout.floating || !read_plain(PyList_GET_ITEM(parts.ptr(), p), part) ||
        !on_same_device(part, first) || (part.code != dlpack::kFloat && part.code != dlpack::kBfloat) ||
        part.ndim != layout.ndim || !std::equal(part.shape, part.shape + part.ndim, layout.shape) ||
        !std::equal(part.strides, part.strides + part.ndim, layout.stride))
      return false;
  }
  return true;
}

}  // namespace mvp
