// Owns: the operator <cell>_grouped_backward on the CPU: backward with weight gradients of each group of rows apart,
// the derivative of each sample where many share a batch. Must not know: equations, loops over time.
#include <ATen/Functions.h>
#include <torch/library.h>

#include "products_cpu.h"

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

// sum over a group's rows of a^T b, for each group: [groups, columns of a, columns of b] from [N, columns] each.
Tensor grouped_product(const Tensor& a, const Tensor& b, int64_t groups) {
  const auto by_group = [groups](const Tensor& rows) {
    return rows.view({rows.size(0) / groups, groups, rows.size(1)}).transpose(0, 1);
  };
  return at::bmm(by_group(a).transpose(1, 2), by_group(b));
}
Tensor grouped_sum(const Tensor& a, int64_t groups) { return a.view({a.size(0) / groups, groups, a.size(1)}).sum(0); }

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
  TORCH_CHECK(!of_given.projection, "rnnfast.", of_given.info.name,
              ": a layer with a projection has no kernel for gradients of groups");
  TORCH_CHECK(!of_given.info.two_products, "rnnfast.", of_given.info.name,
              ": a cell with two products a step has no kernel for gradients of groups");
  TORCH_CHECK_VALUE(groups > 0 && of_given.batch % groups == 0, "rnnfast.", of_given.info.name, ": groups is ", groups,
                    ", it takes a divisor of the batch, ", of_given.batch);

  // ATen's products of 16-bit numbers would round the gates' gradients; the engine's do not.
  const Tensor wide_input = widen(input), wide_h0 = widen(h0);
  const OptionalTensor wide_c0 = widen(c0);
  const std::vector<Tensor> wide_weights = widen(weights);
  const LayerArguments arguments{wide_input, wide_h0, wide_c0, wide_weights, batch_sizes, lengths, reset};
  const Geometry g = check_layer(kind, arguments);
  const LayerTensors layer(arguments);
  const HostSequence host(g, arguments, layer);
  for (int64_t t = 0; g.packed && t < g.steps; ++t)
    TORCH_CHECK_VALUE(host.sequence().batch_size(t) % groups == 0, "rnnfast.", g.info.name, ": groups is ", groups,
                      ", it takes a divisor of every step's rows, batch_sizes[", t, "] is ",
                      host.sequence().batch_size(t));
  OutputMask mask = output_mask;
  mask[3] = false;
  BackwardTensors tensors(g, layer, widen(grad_output), widen(grad_h_n), widen(grad_c_n), widen(grad_c), widen(output),
                          widen(c), widen(saved), mask, /*gaps=*/lengths.has_value());
  std::vector<Tensor> grad_weights;
  const bool empty = g.empty() || host.sequence().rows == 0;
  if (empty) {
    finish_empty_backward(tensors);
    for (const Tensor& weight : weights) {
      std::vector<int64_t> sizes = weight.sizes().vec();
      sizes.insert(sizes.begin(), groups);
      if (output_mask[3]) grad_weights.push_back(at::zeros(sizes, weight.options()));
    }
  } else {
    tensors.allocate_gate_gradients(g);
    LayerBackward params = backward_params(g, layer, tensors);
    params.sequence = host.sequence();
    if (mask[0]) params.grad_input = rows_of(g, tensors.grad_input, 0);
    const int threads = max_threads();
    const cpu::EngineTable& engine = cpu::engine(params.dtype);
    Workspace workspace(engine.backward_workspace_bytes(params, threads));
    engine.backward(params, workspace.data(), threads);
    if (output_mask[3]) {
      const Tensor igates = in_order(host.sequence(), tensors.grad_igates);
      const Tensor hgates = g.info.split_gates ? in_order(host.sequence(), tensors.grad_hgates) : igates;
      const Tensor x = rows_within_lengths(g, lengths, layer.input);
      grad_weights.resize(weights.size());
      for (int64_t d = 0; d < g.directions; ++d) {
        const WeightView grads(g, grad_weights.data(), d);
        const Tensor h_prev = previous_states(g, host.sequence(), tensors.output, layer.h0, d);
        *grads.w_ih = grouped_product(igates[d], x, groups);
        *grads.w_hh = g.info.diagonal ? grouped_sum(diagonal_product(g, h_prev, hgates[d]), groups)
                                      : grouped_product(hgates[d], h_prev, groups);
        if (!g.biases) continue;
        *grads.b_ih = grouped_sum(igates[d], groups);
        *grads.b_hh = grouped_sum(hgates[d], groups);
      }
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
