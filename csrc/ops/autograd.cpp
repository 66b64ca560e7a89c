// Owns: derivatives of the operators. First derivatives call <cell>_backward; derivatives of that, and forward-mode
// ones, go through the formula of rnnfast/reference.py.
// Must not know: how an operator runs, sizes (they may be symbolic here).
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "params.h"
#include "signatures.h"

namespace rnnfast::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

using ReferenceSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    c10::string_view cell, const Tensor& input, const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
    const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& reset);

using ReferenceBackwardSignature = BackwardResult(c10::string_view cell, const OptionalTensor& grad_output,
                                                  const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
                                                  const OptionalTensor& grad_c, const Tensor& input, const Tensor& h0,
                                                  const OptionalTensor& c0, at::TensorList weights,
                                                  const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                                                  const OptionalTensor& reset, OutputMask output_mask);

// Does the predicate hold for a tensor among these?
template <class Predicate>
bool any_of(Predicate holds, const Tensor& tensor) {
  return tensor.defined() && holds(tensor);
}
template <class Predicate>
bool any_of(Predicate holds, const OptionalTensor& tensor) {
  return tensor && any_of(holds, *tensor);
}
template <class Predicate>
bool any_of(Predicate holds, at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [&](const Tensor& tensor) { return any_of(holds, tensor); });
}
template <class... Tensors>
bool any_requires_grad(const Tensors&... tensors) {
  const auto requires_grad = [](const Tensor& tensor) { return tensor.requires_grad(); };
  return at::GradMode::is_enabled() && (any_of(requires_grad, tensors) || ...);
}
template <class... Tensors>
bool any_tangent(const Tensors&... tensors) {
  const auto has_tangent = [](const Tensor& tensor) { return torch::autograd::isFwGradDefined(tensor); };
  return (any_of(has_tangent, tensors) || ...);
}

OptionalTensor optional(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

template <CellKind kind>
struct Layer : torch::autograd::Function<Layer<kind>> {
  static variable_list forward(AutogradContext* context, const Tensor& input, const Tensor& h0,
                               const OptionalTensor& c0, at::TensorList weights, const OptionalTensor& batch_sizes,
                               const OptionalTensor& lengths, const OptionalTensor& reset, int64_t save) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, h_n, c_n, c, saved] =
        forward_operator<kind>().call(input, h0, c0, weights, batch_sizes, lengths, reset, save);
    variable_list kept = {input,
                          h0,
                          c0.value_or(Tensor()),
                          batch_sizes.value_or(Tensor()),
                          lengths.value_or(Tensor()),
                          reset.value_or(Tensor()),
                          output,
                          c,
                          saved};
    kept.insert(kept.end(), weights.begin(), weights.end());
    context->save_for_backward(std::move(kept));
    context->mark_non_differentiable(cell_info(kind).states == 2 ? variable_list{saved} : variable_list{c_n, c, saved});
    context->set_materialize_grads(false);
    return {output, h_n, c_n, c, saved};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const variable_list kept = context->get_saved_variables();
    const Tensor &input = kept[0], &h0 = kept[1], &output = kept[6], &c = kept[7], &saved = kept[8];
    const auto c0 = optional(kept[2]), batch_sizes = optional(kept[3]), lengths = optional(kept[4]),
               reset = optional(kept[5]);
    const at::TensorList weights = at::TensorList(kept).slice(9);

    // Tensors count here, arguments without one do not.
    const size_t first_weight = c0 ? 3 : 2;
    const OutputMask mask = {context->needs_input_grad(0), context->needs_input_grad(1),
                             c0 && context->needs_input_grad(2),
                             context->needs_input_grad({{first_weight, first_weight + weights.size()}})};
    auto [grad_input, grad_h0, grad_c0, grad_weights] =
        backward_operator<kind>().call(optional(grads[0]), optional(grads[1]), optional(grads[2]), optional(grads[3]),
                                       input, h0, c0, weights, batch_sizes, lengths, reset, output, c, saved, mask);

    const auto wanted = [](bool is_wanted, Tensor& grad) { return is_wanted ? grad : Tensor(); };
    variable_list result = {wanted(mask[0], grad_input), wanted(mask[1], grad_h0), wanted(mask[2], grad_c0)};
    grad_weights.resize(weights.size());
    result.insert(result.end(), grad_weights.begin(), grad_weights.end());
    result.resize(result.size() + 4);  // batch_sizes, lengths, reset, save
    return result;
  }
};

template <CellKind kind>
ForwardResult forward(c10::DispatchKeySet keys, const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
                      at::TensorList weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                      const OptionalTensor& reset, int64_t save) {
  if (any_tangent(input, h0, c0, weights)) {
    static const auto reference = find_operator<ReferenceSignature>("reference");
    auto [output, h_n, c_n, c] =
        reference.call(cell_info(kind).name, input, h0, c0, weights, batch_sizes, lengths, reset);
    return {output, h_n, c_n, c, at::empty({0}, input.options())};
  }
  if (any_requires_grad(input, h0, c0, weights)) {
    // Backward needs more than nothing.
    if (save == static_cast<int64_t>(Save::nothing)) save = static_cast<int64_t>(Save::gates);
    auto result = Layer<kind>::apply(input, h0, c0, weights, batch_sizes, lengths, reset, save);
    return {result[0], result[1], result[2], result[3], result[4]};
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return forward_operator<kind>().redispatch(keys & c10::after_ADInplaceOrView_keyset, input, h0, c0, weights,
                                             batch_sizes, lengths, reset, save);
}

template <CellKind kind>
BackwardResult backward(c10::DispatchKeySet keys, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                        const OptionalTensor& grad_c_n, const OptionalTensor& grad_c, const Tensor& input,
                        const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                        const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& reset,
                        const Tensor& output, const Tensor& c, const Tensor& saved, OutputMask output_mask) {
  if (any_requires_grad(grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0, weights) ||
      any_tangent(grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0, weights)) {
    static const auto reference = find_operator<ReferenceBackwardSignature>("reference_backward");
    return reference.call(cell_info(kind).name, grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0, weights,
                          batch_sizes, lengths, reset, output_mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return backward_operator<kind>().redispatch(keys & c10::after_ADInplaceOrView_keyset, grad_output, grad_h_n, grad_c_n,
                                              grad_c, input, h0, c0, weights, batch_sizes, lengths, reset, output, c,
                                              saved, output_mask);
}

}  // namespace

TORCH_LIBRARY_IMPL(rnnfast, Autograd, m) {
#define RNNFAST_AUTOGRAD(name, Type)                  \
  m.impl(#name, TORCH_FN((forward<CellKind::name>))); \
  m.impl(#name "_backward", TORCH_FN((backward<CellKind::name>)));
  RNNFAST_FOR_EACH_CELL(RNNFAST_AUTOGRAD)
#undef RNNFAST_AUTOGRAD
}

}  // namespace rnnfast::ops
