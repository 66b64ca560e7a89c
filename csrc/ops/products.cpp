#include "products.h"

#include <ATen/Functions.h>

#include <algorithm>

namespace rnnfast::ops {
namespace {

// sum over a group's rows of a^T b, for each group: [groups, columns of a, columns of b] from [N, columns] each.
Tensor grouped_product(const Tensor& a, const Tensor& b, int64_t groups) {
  const auto by_group = [groups](const Tensor& rows) {
    return rows.view({rows.size(0) / groups, groups, rows.size(1)}).transpose(0, 1);
  };
  return at::bmm(by_group(a).transpose(1, 2), by_group(b));
}
Tensor grouped_sum(const Tensor& a, int64_t groups) { return a.view({a.size(0) / groups, groups, a.size(1)}).sum(0); }

}  // namespace

Tensor widen(const Tensor& tensor) {
  const bool narrow = tensor.scalar_type() == at::kBFloat16 || tensor.scalar_type() == at::kHalf;
  return narrow ? tensor.to(at::kFloat) : tensor;
}
OptionalTensor widen(const OptionalTensor& tensor) { return tensor ? OptionalTensor(widen(*tensor)) : std::nullopt; }
std::vector<Tensor> widen(at::TensorList tensors) {
  std::vector<Tensor> wide;
  for (const Tensor& tensor : tensors) wide.push_back(widen(tensor));
  return wide;
}

Tensor rows_within_lengths(const Geometry& g, const OptionalTensor& lengths, const Tensor& steps) {
  Tensor rows = steps;
  if (lengths) {
    const Tensor step = at::arange(g.steps, lengths->options()).unsqueeze(1);
    rows = rows.masked_fill(step.ge(*lengths).unsqueeze(-1), 0);
  }
  return rows.reshape({g.rows, steps.size(-1)});
}

Tensor diagonal_product(const Geometry& g, const Tensor& states, const Tensor& by) {
  return states.repeat({1, g.info.gates}).mul_(by);
}

Tensor sum_diagonal_product(const Geometry& g, const Tensor& states, const Tensor& by) {
  constexpr int64_t kElements = int64_t{16} << 20;  // at once
  const int64_t columns = by.size(1), most = std::max<int64_t>(1, kElements / std::max<int64_t>(1, columns));
  const at::ScalarType type = states.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  Tensor sum = at::zeros({columns}, states.options().dtype(type));
  for (int64_t first = 0; first < states.size(0); first += most) {
    const int64_t rows = std::min(most, states.size(0) - first);
    sum.add_(diagonal_product(g, widen(states.narrow(0, first, rows)), by.narrow(0, first, rows)).sum(0));
  }
  return sum;
}

void check_groups(const Geometry& g, const Sequence& sequence, int64_t groups) {
  TORCH_CHECK(!g.projection, "rnnfast.", g.info.name,
              ": a layer with a projection has no kernel for gradients of groups");
  TORCH_CHECK(!g.info.two_products, "rnnfast.", g.info.name,
              ": a cell with two products a step has no kernel for gradients of groups");
  TORCH_CHECK_VALUE(groups > 0 && g.batch % groups == 0, "rnnfast.", g.info.name, ": groups is ", groups,
                    ", it takes a divisor of the batch, ", g.batch);
  for (int64_t t = 0; g.packed && t < g.steps; ++t)
    TORCH_CHECK_VALUE(sequence.batch_size(t) % groups == 0, "rnnfast.", g.info.name, ": groups is ", groups,
                      ", it takes a divisor of every step's rows, batch_sizes[", t, "] is ", sequence.batch_size(t));
}

std::vector<Tensor> grouped_gradients(const Geometry& g, const Tensor& rows, const std::vector<Tensor>& previous,
                                      const Tensor& grad_igates, const Tensor& grad_hgates, int64_t groups) {
  std::vector<Tensor> gradients(g.directions * g.weights_per_direction());
  for (int64_t d = 0; d < g.directions; ++d) {
    const WeightView grads(g, gradients.data(), d);
    *grads.w_ih = grouped_product(grad_igates[d], rows, groups);
    if (g.info.diagonal) {  // whose products ATen would round in 16 bits
      const Tensor products = diagonal_product(g, widen(previous[d]), grad_hgates[d]);
      *grads.w_hh = grouped_sum(products, groups).to(rows.scalar_type());
    } else {
      *grads.w_hh = grouped_product(grad_hgates[d], previous[d], groups);
    }
    if (!g.biases) continue;
    *grads.b_ih = grouped_sum(grad_igates[d], groups);
    *grads.b_hh = grouped_sum(grad_hgates[d], groups);
  }
  return gradients;
}

std::vector<Tensor> empty_grouped_gradients(at::TensorList weights, int64_t groups) {
  std::vector<Tensor> gradients;
  for (const Tensor& weight : weights) {
    std::vector<int64_t> sizes = weight.sizes().vec();
    sizes.insert(sizes.begin(), groups);
    gradients.push_back(at::zeros(sizes, weight.options()));
  }
  return gradients;
}

}  // namespace rnnfast::ops
