// The CUDA kernels as functions of a Python module: of _C, and of the emulator's.
#pragma once

#include "mvp/cuda_ops.h"
#include "tensor_caster.h"

namespace mvp {

inline void def_cuda_ops(pybind11::module_& m) {
  const auto def = [&](const char* name, auto kernel) {
    m.def(name, kernel, pybind11::call_guard<pybind11::gil_scoped_release>());
  };
  def("importance_cuda", &importance_cuda);
  def("importance_workspace_cuda", &importance_workspace_cuda);
  def("merge_cuda", &merge_cuda);
  def("meta_vote_cuda", &meta_vote_cuda);
  def("pack_cuda", &pack_cuda);
  def("pruned_linear_cuda", &pruned_linear_cuda);
  def("residual_add_cuda", &residual_add_cuda);
  def("unpack_cuda", &unpack_cuda);
}

}  // namespace mvp
