#include "bindings.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "cuda_engine.h"
#include "device_cuda.h"
#include "params.h"
#include "signatures.h"

namespace rnnfast::ops {
namespace {

template <CellKind kind>
ForwardResult forward(const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
                      const std::vector<Tensor>& weights, const OptionalTensor& batch_sizes,
                      const OptionalTensor& lengths, const OptionalTensor& reset, int64_t save,
                      const OptionalTensor& seed, const std::vector<double>& noise, bool layer_norm) {
  return forward_operator(kind).call(input, h0, c0, weights, batch_sizes, lengths, reset, save, seed, noise,
                                     layer_norm);
}

namespace py = pybind11;

CellKind find_cell(const std::string& name) {
#define RNNFAST_FIND_CELL(cell, Type) \
  if (name == #cell) return CellKind::cell;
  RNNFAST_FOR_EACH_CELL(RNNFAST_FIND_CELL)
#undef RNNFAST_FIND_CELL
  throw py::value_error("cell: expected the name of a cell, got '" + name + "'");
}

Dtype find_dtype(const std::string& name) {
  constexpr const char* kNames[] = {"float64", "float32", "bfloat16", "float16"};  // in the order of Dtype
  for (int i = 0; i < 4; ++i) {
    if (name == kNames[i]) return static_cast<Dtype>(i);
  }
  throw py::value_error("dtype: expected float64, float32, bfloat16 or float16, got '" + name + "'");
}

// Python's view of a plan: {"engine": ..., "tile": {...}, "against": {engine: reason}}. A device is a dictionary of
// plan::Device's fields.
py::dict make_plan(const std::string& cell, const std::string& dtype, int64_t steps, int64_t batch, int64_t hidden_size,
                   int directions, bool projection, bool tf32, bool backward, bool noise, bool layer_norm,
                   const py::dict& device) {
  const plan::Device on = {
      device["capability"].cast<int>(),       device["multiprocessors"].cast<int>(),
      device["shared_bytes"].cast<int64_t>(), device["registers"].cast<int64_t>(),
      device["cooperative"].cast<bool>(),     device["clusters"].cast<decltype(plan::Device::clusters)>()};
  const plan::Plan plan = choose_cuda_engine({find_cell(cell), find_dtype(dtype), tf32, steps, batch, hidden_size,
                                              projection, directions, backward, noise, layer_norm},
                                             on);
  py::dict tile, against, result;
  tile["blocks"] = plan.tile.blocks;
  tile["threads"] = plan.tile.threads;
  tile["units"] = plan.tile.units;
  tile["rows"] = plan.tile.rows;
  tile["shared_bytes"] = plan.tile.shared_bytes;
  for (int i = 0; i < plan::kEngines; ++i) {
    if (!plan.against[i].empty()) against[plan::kEngineNames[i]] = plan.against[i];
  }
  result["engine"] = plan::kEngineNames[static_cast<int>(plan.engine)];
  result["tile"] = tile;
  result["against"] = against;
  return result;
}

#ifdef RNNFAST_WITH_CUDA
py::dict describe_cuda_device(int index) {
  const plan::Device device = cuda_device(index);
  py::dict result;
  result["capability"] = device.capability;
  result["multiprocessors"] = device.multiprocessors;
  result["shared_bytes"] = device.shared_bytes;
  result["registers"] = device.registers;
  result["cooperative"] = device.cooperative;
  result["clusters"] = device.clusters;
  return result;
}
#endif

}  // namespace

void bind_plan(py::module_& module) {
  module.def("plan", torch::wrap_pybind_function(&make_plan), py::arg("cell"), py::arg("dtype"), py::arg("steps"),
             py::arg("batch"), py::arg("hidden_size"), py::arg("directions"), py::arg("projection"), py::arg("tf32"),
             py::arg("backward"), py::arg("noise"), py::arg("layer_norm"), py::arg("device"),
             "The CUDA engine for a layer on a device, its tile, and what speaks against the others.");
  module.def(
      "cpu_engine", [](const std::string& dtype) { return cpu::engine(find_dtype(dtype)).name; }, py::arg("dtype"),
      "The instruction set whose engine runs a dtype on the CPU.");
  module.def("force_cuda_engine", torch::wrap_pybind_function([](const std::optional<std::string>& name) {
               force_cuda_engine(name ? std::optional(find_cuda_engine(*name)) : std::nullopt);
             }),
             py::arg("name"), "Forces a CUDA engine for later calls; None leaves the choice to the plan.");
  py::list names;
  for (const char* name : plan::kEngineNames) names.append(name);
  module.attr("cuda_engines") = py::tuple(names);
#ifdef RNNFAST_WITH_CUDA
  module.def("cuda_device", torch::wrap_pybind_function(&describe_cuda_device), py::arg("index"),
             "A device as plan takes it.");
  module.def("tf32_allowed", &tf32_allowed, "Whether float32 products may round to TF32.");
#endif
}

void bind(pybind11::module_& module) {
  pybind11::dict saved_values;
#define RNNFAST_BIND(name, Type)                                                   \
  module.def(#name, torch::wrap_pybind_function_no_gil(&forward<CellKind::name>)); \
  saved_values[#name] = cell_info(CellKind::name).saved;
  RNNFAST_FOR_EACH_CELL(RNNFAST_BIND)
#undef RNNFAST_BIND
  module.attr("saved_values") = saved_values;
}

}  // namespace rnnfast::ops
