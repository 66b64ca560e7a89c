#include "bindings.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "signatures.h"

namespace rnnfast::ops {
namespace {

template <CellKind kind>
ForwardResult forward(const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
                      const std::vector<Tensor>& weights, const OptionalTensor& batch_sizes,
                      const OptionalTensor& lengths, const OptionalTensor& reset, int64_t save) {
  return forward_operator<kind>().call(input, h0, c0, weights, batch_sizes, lengths, reset, save);
}

}  // namespace

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
