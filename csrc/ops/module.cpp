// Owns: the Python module rnnfast._C: what was built, and the choice of the CPU engine's instruction set. Importing it
// registers the operators, which the other files of this directory define; bindings.cpp calls them without torch.ops.
// Must not know: tensors.
#include <pybind11/pybind11.h>

#include <string>

#include "../params.h"
#include "bindings.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = __VERSION__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

constexpr const char* kInstructionSets[] = {"generic", "avx2", "avx512", "avx512_bf16"};

py::dict build_info() {
  py::dict info;
  info["version"] = RNNFAST_VERSION;
  info["torch"] = RNNFAST_TORCH_VERSION;
  info["compiler"] = kCompiler;
  info["cuda_archs"] = RNNFAST_CUDA_ARCHS;
  info["no_cuda_reason"] = RNNFAST_NO_CUDA_REASON;
  return info;
}

py::list instruction_sets() {
  py::list available;
  for (const char* name : kInstructionSets) {
    if (rnnfast::cpu::has_instruction_set(name)) available.append(name);
  }
  return available;
}

void set_instruction_set(const std::string& name) {
  if (rnnfast::cpu::set_instruction_set(name.c_str())) return;
  const std::string available = py::str(instruction_sets());
  throw py::value_error("name must be one of this CPU's instruction sets, " + available + ", got '" + name + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of rnnfast.";
  m.def("build_info", &build_info, "What the extension was built with.");
  m.def("instruction_set", [] { return rnnfast::cpu::instruction_set(); }, "The CPU engine's instruction set in use.");
  m.def("instruction_sets", &instruction_sets, "The instruction sets that this CPU has.");
  m.def("set_instruction_set", &set_instruction_set, py::arg("name"), "Forces an instruction set.");
  rnnfast::ops::bind(m);
  rnnfast::ops::bind_plan(m);
}
