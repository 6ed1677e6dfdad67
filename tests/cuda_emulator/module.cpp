// The module _emulator: the CUDA kernels on CPU tensors, and the emulator's own switches.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <utility>

#include "cuda_bindings.h"
#include "engine.h"
#include "faults.h"

PYBIND11_MODULE(_emulator, m) {
  mvp::def_cuda_ops(m);
  pybind11::register_exception<emulator::Fault>(m, "Fault", PyExc_RuntimeError);
  m.def("set_schedule", &emulator::set_schedule,
        "0: in order, 1: in reverse, others: at random by this seed.");
  m.def("fail_next_launch", [](int error) { emulator::next_error = static_cast<cudaError_t>(error); });
  m.def(
      "boxes_copied", [] { return std::exchange(emulator::boxes_copied, 0); }, "Since this was last asked.");
  m.def("run_faulty_kernel", &mvp::run_faulty_kernel);
}
