// Owns: the operator <cell>_grouped_backward on the CPU: backward with weight gradients of each group of rows apart,
// the derivative of each sample where many share a batch. Must not know: equations, loops over time.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "products.h"
#include "states_cpu.h"

namespace rnnfast::ops::grouped_cpu {
namespace {

// [D, N, G*H] in the tensors' order, from the engine's: with lengths that has the living rows alone, sorted.
Tensor in_order(const Sequence& s, const Tensor& gates) {
  if (!s.batch_index) return gates;
  std::vector<int64_t> rows;
  for (int64_t t = 0; t < s.steps; ++t)
    for (int64_t slot = 0; slot < s.batch_size(t); ++slot) rows.push_back(s.tensor_row(t, slot));
  return at::zeros_like(gates).index_copy_(1, at::tensor(rows), gates.slice(1, 0, s.rows));
}

template <CellKind kind>
BackwardResult grouped_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                const OptionalTensor& grad_c_n, const OptionalTensor& grad_c, const Tensor& input,
                                const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                                const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                                const OptionalTensor& reset, const Tensor& output, const Tensor& c, const Tensor& saved,
                                OutputMask output_mask, int64_t groups) {
  const LayerArguments given{input, h0, c0, weights, batch_sizes, lengths, reset};
  const Geometry of_given = check_layer(kind, given);
  check_gradients(of_given, given, grad_output, grad_h_n, grad_c_n, grad_c, output, c, saved);

  // ATen's products of 16-bit numbers would round the gates' gradients; the engine's do not.
  const Tensor wide_input = widen(input), wide_h0 = widen(h0);
  const OptionalTensor wide_c0 = widen(c0);
  const std::vector<Tensor> wide_weights = widen(weights);
  const LayerArguments arguments{wide_input, wide_h0, wide_c0, wide_weights, batch_sizes, lengths, reset};
  const Geometry g = check_layer(kind, arguments);
  const LayerTensors layer(arguments);
  const HostSequence host(g, arguments, layer);
  check_groups(g, host.sequence(), groups);
  OutputMask mask = output_mask;
  mask[3] = false;
  BackwardTensors tensors(g, layer, widen(grad_output), widen(grad_h_n), widen(grad_c_n), widen(grad_c), widen(output),
                          widen(c), widen(saved), mask, /*gaps=*/lengths.has_value());
  std::vector<Tensor> grad_weights;
  const bool empty = g.empty() || host.sequence().rows == 0;
  if (empty) {
    finish_empty_backward(tensors);
    if (output_mask[3]) grad_weights = empty_grouped_gradients(weights, groups);
  } else {
    tensors.allocate_gate_gradients(g);
    LayerBackward params = backward_params(g, layer, tensors);
    params.sequence = host.sequence();
    if (mask[0]) params.grad_input = rows_of(g, tensors.grad_input, 0);
    run_engine(params);
    if (output_mask[3]) {
      const Tensor igates = in_order(host.sequence(), tensors.grad_igates);
      const Tensor hgates = g.info.split_gates ? in_order(host.sequence(), tensors.grad_hgates) : igates;
      std::vector<Tensor> previous;
      for (int64_t d = 0; d < g.directions; ++d)
        previous.push_back(previous_states(g, host.sequence(), tensors.output, layer.h0, d));
      grad_weights =
          grouped_gradients(g, rows_within_lengths(g, lengths, layer.input), previous, igates, hgates, groups);
    }
  }
  auto [grad_input, grad_h0, grad_c0, none] = tensors.result();
  const auto narrow = [&](const Tensor& tensor) { return tensor.to(input.scalar_type()); };
  for (Tensor& gradient : grad_weights) gradient = narrow(gradient);
  return {narrow(grad_input), narrow(grad_h0), narrow(grad_c0), grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(RNNFAST_LIBRARY, CPU, m) {
#define RNNFAST_CPU(name, Type) m.impl(#name "_grouped_backward", &grouped_backward<CellKind::name>);
  RNNFAST_FOR_EACH_CELL(RNNFAST_CPU)
#undef RNNFAST_CPU
}

}  // namespace rnnfast::ops::grouped_cpu
