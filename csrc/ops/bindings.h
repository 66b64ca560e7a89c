// Owns: the direct way from Python to the operators, and to the plan of CUDA engines.
// Must not know: what an operator does.
#pragma once

#include <pybind11/pybind11.h>

namespace rnnfast::ops {

// Adds one function a cell to the module, with the arguments of the operator, which it calls through the dispatcher's
// typed handle. torch.ops.rnnfast.<cell> finds the overload, boxes every argument and unboxes it again.
// Also adds saved_values, the cells' number of values kept per unit and step, from which fake kernels tell a shape.
void bind(pybind11::module_& module);

// Adds plan(...) and force_cuda_engine(name), which need no GPU, and in CUDA builds cuda_device(index), tf32_allowed().
void bind_plan(pybind11::module_& module);

}  // namespace rnnfast::ops
