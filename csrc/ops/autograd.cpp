// Owns: derivatives of the operators. First derivatives call <cell>_backward, forward-mode ones <cell>_jvp, second ones
// <cell>_backward_jvp; what has no kernel goes through the formula of rnnfast/formula.py.
// Must not know: how an operator runs, sizes (they may be symbolic here).
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>

#include "params.h"
#include "signatures.h"

namespace rnnfast::ops::autograd {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

using ReferenceSignature = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    c10::string_view cell, const Tensor& input, const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
    const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& reset,
    const OptionalTensor& seed, at::ArrayRef<double> noise, bool layer_norm);

using ReferenceBackwardSignature = BackwardResult(c10::string_view cell, const OptionalTensor& grad_output,
                                                  const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
                                                  const OptionalTensor& grad_c, const Tensor& input, const Tensor& h0,
                                                  const OptionalTensor& c0, at::TensorList weights,
                                                  const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                                                  const OptionalTensor& reset, OutputMask output_mask,
                                                  const OptionalTensor& seed, at::ArrayRef<double> noise,
                                                  bool layer_norm);

using ReferenceJvpSignature = JvpResult(c10::string_view cell, const OptionalTensor& t_input,
                                        const OptionalTensor& t_h0, const OptionalTensor& t_c0,
                                        at::TensorList t_weights, const Tensor& input, const Tensor& h0,
                                        const OptionalTensor& c0, at::TensorList weights,
                                        const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                                        const OptionalTensor& reset);

using ReferenceBackwardJvpSignature = BackwardJvpResult(
    c10::string_view cell, const OptionalTensor& t_grad_output, const OptionalTensor& t_grad_h_n,
    const OptionalTensor& t_grad_c_n, const OptionalTensor& t_grad_c, const OptionalTensor& t_input,
    const OptionalTensor& t_h0, const OptionalTensor& t_c0, at::TensorList t_weights, const OptionalTensor& grad_output,
    const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n, const OptionalTensor& grad_c, const Tensor& input,
    const Tensor& h0, const OptionalTensor& c0, at::TensorList weights, const OptionalTensor& batch_sizes,
    const OptionalTensor& lengths, const OptionalTensor& reset, OutputMask output_mask);

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
Tensor undefined_unless(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }

// Whether the kernels of tangents take this layer; an even number of weights a direction is one without a projection.
// What is no layer at all goes to the kernels too, whose checks say what is wrong with it.
bool has_tangent_kernel(CellKind kind, const Tensor& h0, at::TensorList weights) {
  if (!h0.defined() || h0.dim() == 0) return true;
  const int64_t directions = h0.sym_size(0).guard_int(__FILE__, __LINE__);
  if (directions < 1 || directions > 2) return true;
  return !cell_info(kind).two_products && (weights.size() / directions) % 2 == 0;
}

// Whether there is recurrent dropout or zoneout. Tangents have no kernel for them, nor for layer normalisation.
bool any_noise(at::ArrayRef<double> noise) {
  noise = noise.slice(0, std::min<size_t>(3, noise.size()));  // behind the probabilities stands the first unit
  return std::any_of(noise.begin(), noise.end(), [](double p) { return p > 0; });
}

const c10::TypedOperatorHandle<ReferenceBackwardSignature>& reference_backward() {
  static const auto handle = find_operator<ReferenceBackwardSignature>("reference_backward");
  return handle;
}

// Of tangents of the weights, all or none: an undefined one among them is zero.
std::vector<Tensor> all_or_none(std::vector<Tensor> tangents, at::TensorList of) {
  if (std::none_of(tangents.begin(), tangents.end(), [](const Tensor& tangent) { return tangent.defined(); }))
    return {};
  for (size_t i = 0; i < tangents.size(); ++i)
    if (!tangents[i].defined()) tangents[i] = at::zeros_like(of[i]);
  return tangents;
}

// The two parts of a forward-mode dual. There is one level of duals.
Tensor primal(const Tensor& tensor) { return torch::autograd::isFwGradDefined(tensor) ? tensor._fw_primal(0) : tensor; }
OptionalTensor primal(const OptionalTensor& tensor) {
  return tensor && tensor->defined() ? OptionalTensor(primal(*tensor)) : std::nullopt;
}
std::vector<Tensor> primal(at::TensorList tensors) {
  std::vector<Tensor> result;
  for (const Tensor& tensor : tensors) result.push_back(primal(tensor));
  return result;
}
OptionalTensor tangent(const Tensor& tensor) {
  return torch::autograd::isFwGradDefined(tensor) ? OptionalTensor(tensor._fw_grad(0)) : std::nullopt;
}
OptionalTensor tangent(const OptionalTensor& tensor) { return tensor ? tangent(*tensor) : std::nullopt; }
std::vector<Tensor> tangent(at::TensorList tensors) {
  std::vector<Tensor> result;
  for (const Tensor& tensor : tensors) result.push_back(undefined_unless(tangent(tensor)));
  return all_or_none(std::move(result), tensors);
}
Tensor dual(const Tensor& value, const Tensor& tangent) {
  return value.numel() ? at::_make_dual(value, tangent, 0) : value;
}

// Forward-mode duals among a node's arguments, in place of which it got their primal parts: what the node saves are the
// duals, so that its backward has tangents too. Null where there are none.
struct Duals {
  Tensor grads[4];  // of LayerBackwardFunction
  Tensor input, h0, c0;
  at::TensorList weights;
};

// The tensors that every node keeps of its layer, behind those that are its own.
void keep_layer(variable_list& kept, const Tensor& input, const Tensor& h0, const Tensor& c0, at::TensorList weights,
                const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& reset,
                const Tensor& output, const Tensor& c, const Tensor& saved) {
  kept.insert(kept.end(), {input, h0, c0, undefined_unless(batch_sizes), undefined_unless(lengths),
                           undefined_unless(reset), output, c, saved});
  kept.insert(kept.end(), weights.begin(), weights.end());
}
// The same, found again.
struct KeptLayer {
  // own: how many tensors stand before these; others: how many behind them.
  KeptLayer(const variable_list& kept, size_t own, size_t others = 0)
      : input(kept[own]),
        h0(kept[own + 1]),
        c0(optional(kept[own + 2])),
        batch_sizes(optional(kept[own + 3])),
        lengths(optional(kept[own + 4])),
        reset(optional(kept[own + 5])),
        output(kept[own + 6]),
        c(kept[own + 7]),
        saved(kept[own + 8]),
        weights(at::TensorList(kept).slice(own + 9, kept.size() - own - 9 - others)) {}

  const Tensor &input, &h0;
  const OptionalTensor c0, batch_sizes, lengths, reset;
  const Tensor &output, &c, &saved;
  const at::TensorList weights;
};

constexpr const char* kKind = "kind";
void keep_kind(AutogradContext& context, CellKind kind) { context.saved_data[kKind] = static_cast<int64_t>(kind); }
CellKind kept_kind(const AutogradContext& context) {
  return static_cast<CellKind>(context.saved_data.at(kKind).toInt());
}

// What of an operator's results has no derivative goes past the node: compiled autograd takes none with results marked
// as not differentiable.
struct LayerFunction : torch::autograd::Function<LayerFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, const Tensor& input, const Tensor& h0,
                               const OptionalTensor& c0, at::TensorList weights, const OptionalTensor& batch_sizes,
                               const OptionalTensor& lengths, const OptionalTensor& reset, int64_t save,
                               const OptionalTensor& seed, at::ArrayRef<double> noise, bool layer_norm, CellKind kind,
                               const Duals* duals, ForwardResult* result) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    *result =
        forward_operator(kind).call(input, h0, c0, weights, batch_sizes, lengths, reset, save, seed, noise, layer_norm);
    const auto& [output, h_n, c_n, c, saved] = *result;
    variable_list kept = {undefined_unless(seed)};
    keep_layer(kept, duals ? duals->input : input, duals ? duals->h0 : h0, duals ? duals->c0 : undefined_unless(c0),
               duals ? duals->weights : weights, batch_sizes, lengths, reset, output, c, saved);
    context->save_for_backward(std::move(kept));
    context->set_materialize_grads(false);
    keep_kind(*context, kind);
    if (any_noise(noise)) context->saved_data[kNoise] = noise.vec();
    if (layer_norm) context->saved_data[kLayerNorm] = true;
    return cell_info(kind).states == 2 ? variable_list{output, h_n, c_n, c} : variable_list{output, h_n};
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    grads.resize(4);
    const CellKind kind = kept_kind(*context);
    const variable_list kept = context->get_saved_variables();
    const auto seed = optional(kept[0]);
    const KeptLayer layer(kept, 1);
    const auto found = context->saved_data.find(kNoise);
    const auto noise = found == context->saved_data.end() ? std::vector<double>() : found->second.toDoubleVector();
    const bool layer_norm = context->saved_data.count(kLayerNorm) > 0;

    // Tensors count here, arguments without one do not.
    const size_t first_weight = layer.c0 ? 3 : 2;
    const OutputMask mask = {context->needs_input_grad(0), context->needs_input_grad(1),
                             layer.c0 && context->needs_input_grad(2),
                             context->needs_input_grad({{first_weight, first_weight + layer.weights.size()}})};
    auto [grad_input, grad_h0, grad_c0, grad_weights] =
        backward_operator(kind).call(optional(grads[0]), optional(grads[1]), optional(grads[2]), optional(grads[3]),
                                     layer.input, layer.h0, layer.c0, layer.weights, layer.batch_sizes, layer.lengths,
                                     layer.reset, layer.output, layer.c, layer.saved, mask, seed, noise, layer_norm);

    const auto wanted = [](bool is_wanted, Tensor& grad) { return is_wanted ? grad : Tensor(); };
    variable_list result = {wanted(mask[0], grad_input), wanted(mask[1], grad_h0), wanted(mask[2], grad_c0)};
    grad_weights.resize(layer.weights.size());
    result.insert(result.end(), grad_weights.begin(), grad_weights.end());
    // batch_sizes, lengths, reset, save, seed, noise, layer_norm, kind, duals, result
    result.resize(result.size() + 10);
    return result;
  }

 private:
  static constexpr const char *kNoise = "noise", *kLayerNorm = "layer_norm";
};

// Forward, with a node for its backward if a gradient is wanted.
ForwardResult recorded(CellKind kind, const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
                       at::TensorList weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                       const OptionalTensor& reset, int64_t save, const OptionalTensor& seed,
                       at::ArrayRef<double> noise, bool layer_norm, const Duals* duals) {
  if (any_requires_grad(input, h0, c0, weights)) {
    // Backward needs more than nothing.
    if (save == static_cast<int64_t>(Save::nothing)) save = static_cast<int64_t>(Save::gates);
    ForwardResult result;
    const variable_list recorded = LayerFunction::apply(input, h0, c0, weights, batch_sizes, lengths, reset, save, seed,
                                                        noise, layer_norm, kind, duals, &result);
    auto& [output, h_n, c_n, c, saved] = result;
    output = recorded[0];
    h_n = recorded[1];
    if (recorded.size() == 4) c_n = recorded[2], c = recorded[3];
    return result;
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return forward_operator(kind).call(input, h0, c0, weights, batch_sizes, lengths, reset, save, seed, noise,
                                     layer_norm);
}

ForwardResult forward(CellKind kind, const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
                      at::TensorList weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                      const OptionalTensor& reset, int64_t save, const OptionalTensor& seed, at::ArrayRef<double> noise,
                      bool layer_norm) {
  if (any_tangent(input, h0, c0, weights)) {
    if (!has_tangent_kernel(kind, h0, weights) || any_noise(noise) || layer_norm) {
      static const auto reference = find_operator<ReferenceSignature>("reference");
      auto [output, h_n, c_n, c] = reference.call(cell_info(kind).name, input, h0, c0, weights, batch_sizes, lengths,
                                                  reset, seed, noise, layer_norm);
      return {output, h_n, c_n, c, at::empty({0}, input.options())};
    }
    const Tensor x = primal(input), h = primal(h0);
    const OptionalTensor cell_state = primal(c0);
    const std::vector<Tensor> w = primal(weights);
    const Duals duals{{}, input, h0, undefined_unless(c0), weights};
    auto [output, h_n, c_n, c, saved] = recorded(kind, x, h, cell_state, w, batch_sizes, lengths, reset,
                                                 static_cast<int64_t>(Save::gates), std::nullopt, {}, false, &duals);
    auto [t_output, t_h_n, t_c_n, t_c] =
        jvp_operator(kind).call(tangent(input), tangent(h0), tangent(c0), tangent(weights), x, h, cell_state, w,
                                batch_sizes, lengths, reset, output.detach(), c.detach(), saved);
    return {dual(output, t_output), dual(h_n, t_h_n), dual(c_n, t_c_n), dual(c, t_c), saved};
  }
  return recorded(kind, input, h0, c0, weights, batch_sizes, lengths, reset, save, seed, noise, layer_norm, nullptr);
}

// Backward as a function of the gradients and of the layer's arguments: what forward left follows from these, and has
// no derivative of its own.
struct LayerBackwardFunction : torch::autograd::Function<LayerBackwardFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, const OptionalTensor& grad_output,
                               const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
                               const OptionalTensor& grad_c, const Tensor& input, const Tensor& h0,
                               const OptionalTensor& c0, at::TensorList weights, const OptionalTensor& batch_sizes,
                               const OptionalTensor& lengths, const OptionalTensor& reset, const Tensor& output,
                               const Tensor& c, const Tensor& saved, OutputMask output_mask, CellKind kind,
                               const Duals* duals, Tensor* every_grad_state) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    // The gradients of all states spare the second backward one of its products a step. In 16 bits they are rounded,
    // and those that it makes itself are not. Engines of CUDA have no place for them.
    const bool keeps_states = input.device().is_cpu() && !at::isReducedFloatingType(input.scalar_type());
    auto [grad_input, grad_h0, grad_c0, grad_weights, grad_states] =
        every_grad_state || keeps_states
            ? backward_with_states_operator(kind).call(grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0, weights,
                                                       batch_sizes, lengths, reset, output, c, saved, output_mask)
            : std::tuple_cat(backward_operator(kind).call(grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0,
                                                          weights, batch_sizes, lengths, reset, output, c, saved,
                                                          output_mask, std::nullopt, {}, false),
                             std::tuple(Tensor()));
    variable_list kept = {undefined_unless(grad_output), undefined_unless(grad_h_n), undefined_unless(grad_c_n),
                          undefined_unless(grad_c), keeps_states ? grad_states : Tensor()};
    if (duals) std::copy(std::begin(duals->grads), std::end(duals->grads), kept.begin());
    keep_layer(kept, duals ? duals->input : input, duals ? duals->h0 : h0, duals ? duals->c0 : undefined_unless(c0),
               duals ? duals->weights : weights, batch_sizes, lengths, reset, output, c, saved);
    context->save_for_backward(std::move(kept));
    context->set_materialize_grads(false);
    keep_kind(*context, kind);
    variable_list result = {grad_input, grad_h0, grad_c0};
    result.insert(result.end(), grad_weights.begin(), grad_weights.end());
    // They follow from the arguments; what reads them has its derivative by these.
    if (every_grad_state) *every_grad_state = grad_states;
    return result;
  }

  // <tangents, backward> is <J tangents, gradients>, J the layer's derivative: with respect to the gradients its
  // derivative is J tangents, and with respect to the arguments that of backward along the tangents.
  static variable_list backward(AutogradContext* context, variable_list tangents) {
    const CellKind kind = kept_kind(*context);
    const variable_list kept = context->get_saved_variables();
    const OptionalTensor grads[] = {optional(kept[0]), optional(kept[1]), optional(kept[2]), optional(kept[3])};
    const auto grad_states = optional(kept[4]);
    const KeptLayer layer(kept, 5);
    OptionalTensor t_states[3];
    for (size_t i = 0; i < 3; ++i) t_states[i] = optional(tangents[i]);
    const size_t given = tangents.size() - 3;
    const std::vector<Tensor> t_weights =
        all_or_none({tangents.begin() + 3, tangents.begin() + 3 + given}, given ? layer.weights : at::TensorList());

    // Tensors count here, arguments without one do not.
    size_t index = 0;
    const auto is_wanted = [&](bool given) { return given && context->needs_input_grad(index++); };
    bool wanted[7];
    for (size_t i = 0; i < 4; ++i) wanted[i] = is_wanted(grads[i].has_value());
    for (size_t i = 4; i < 7; ++i) wanted[i] = is_wanted(i < 6 || layer.c0);
    const OutputMask mask = {wanted[4], wanted[5], wanted[6],
                             context->needs_input_grad({{index, index + layer.weights.size()}})};
    auto [t_output, t_h_n, t_c_n, t_c, grad_input, grad_h0, grad_c0, grad_weights] = backward_jvp_operator(kind).call(
        {}, {}, {}, {}, t_states[0], t_states[1], t_states[2], t_weights, grads[0], grads[1], grads[2], grads[3],
        layer.input, layer.h0, layer.c0, layer.weights, layer.batch_sizes, layer.lengths, layer.reset, layer.output,
        layer.c, layer.saved, mask, grad_states);

    variable_list result = {t_output, t_h_n, t_c_n, t_c, grad_input, grad_h0, grad_c0};
    for (size_t i = 0; i < 7; ++i)
      if (!wanted[i]) result[i] = Tensor();
    grad_weights.resize(layer.weights.size());
    result.insert(result.end(), grad_weights.begin(), grad_weights.end());
    // batch_sizes, lengths, reset, output, c, saved, output_mask, kind, duals, every_grad_state
    result.resize(result.size() + 10);
    return result;
  }
};

// Backward, with a node for its own backward if a gradient is wanted.
BackwardResult recorded_backward(CellKind kind, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                 const OptionalTensor& grad_c_n, const OptionalTensor& grad_c, const Tensor& input,
                                 const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                                 const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                                 const OptionalTensor& reset, const Tensor& output, const Tensor& c,
                                 const Tensor& saved, OutputMask output_mask, const Duals* duals) {
  if (any_requires_grad(grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0, weights)) {
    auto result = LayerBackwardFunction::apply(grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0, weights,
                                               batch_sizes, lengths, reset, output.detach(), c.detach(), saved,
                                               output_mask, kind, duals, static_cast<Tensor*>(nullptr));
    return {result[0], result[1], result[2], {result.begin() + 3, result.end()}};
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return backward_operator(kind).call(grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0, weights, batch_sizes,
                                      lengths, reset, output, c, saved, output_mask, std::nullopt, {}, false);
}

BackwardResult backward(CellKind kind, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                        const OptionalTensor& grad_c_n, const OptionalTensor& grad_c, const Tensor& input,
                        const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                        const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& reset,
                        const Tensor& output, const Tensor& c, const Tensor& saved, OutputMask output_mask,
                        const OptionalTensor& seed, at::ArrayRef<double> noise, bool layer_norm) {
  const bool has_tangent = any_tangent(grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0, weights);
  const bool requires_grad = any_requires_grad(grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0, weights);
  const bool noisy = any_noise(noise), varied = noisy || layer_norm;
  // Zoneout without a seed is its expectation, whose gradient has no kernel.
  if (((has_tangent || requires_grad) && (!has_tangent_kernel(kind, h0, weights) || varied)) || (noisy && !seed)) {
    return reference_backward().call(cell_info(kind).name, grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0,
                                     weights, batch_sizes, lengths, reset, output_mask, seed, noise, layer_norm);
  }
  if (varied) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return backward_operator(kind).call(grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0, weights, batch_sizes,
                                        lengths, reset, output, c, saved, output_mask, seed, noise, layer_norm);
  }
  if (!has_tangent)
    return recorded_backward(kind, grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0, weights, batch_sizes,
                             lengths, reset, output, c, saved, output_mask, nullptr);

  const Tensor x = primal(input), h = primal(h0), every_h = primal(output), every_c = primal(c);
  const OptionalTensor cell_state = primal(c0);
  const OptionalTensor grads[] = {primal(grad_output), primal(grad_h_n), primal(grad_c_n), primal(grad_c)};
  const std::vector<Tensor> w = primal(weights);
  const Duals duals{
      {undefined_unless(grad_output), undefined_unless(grad_h_n), undefined_unless(grad_c_n), undefined_unless(grad_c)},
      input,
      h0,
      undefined_unless(c0),
      weights};
  auto [grad_input, grad_h0, grad_c0, grad_weights] =
      recorded_backward(kind, grads[0], grads[1], grads[2], grads[3], x, h, cell_state, w, batch_sizes, lengths, reset,
                        every_h, every_c, saved, output_mask, &duals);
  auto [t_output, t_h_n, t_c_n, t_c, t_input, t_h0, t_c0, t_weights] = backward_jvp_operator(kind).call(
      tangent(grad_output), tangent(grad_h_n), tangent(grad_c_n), tangent(grad_c), tangent(input), tangent(h0),
      tangent(c0), tangent(weights), grads[0], grads[1], grads[2], grads[3], x, h, cell_state, w, batch_sizes, lengths,
      reset, every_h, every_c, saved, output_mask, {});
  for (size_t i = 0; i < grad_weights.size(); ++i) grad_weights[i] = dual(grad_weights[i], t_weights[i]);
  return {dual(grad_input, t_input), dual(grad_h0, t_h0), dual(grad_c0, t_c0), grad_weights};
}

// What a recorded backward calls, which a tracer may have made part of a graph that is trained.
BackwardWithStatesResult backward_with_states(
    CellKind kind, c10::DispatchKeySet keys, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
    const OptionalTensor& grad_c_n, const OptionalTensor& grad_c, const Tensor& input, const Tensor& h0,
    const OptionalTensor& c0, at::TensorList weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
    const OptionalTensor& reset, const Tensor& output, const Tensor& c, const Tensor& saved, OutputMask output_mask) {
  TORCH_CHECK_NOT_IMPLEMENTED(!any_tangent(grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0, weights), "rnnfast.",
                              cell_info(kind).name, "_backward_with_states has no forward-mode derivative");
  if (any_requires_grad(grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0, weights)) {
    Tensor grad_states;
    auto result = LayerBackwardFunction::apply(grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0, weights,
                                               batch_sizes, lengths, reset, output.detach(), c.detach(), saved,
                                               output_mask, kind, static_cast<const Duals*>(nullptr), &grad_states);
    return {result[0], result[1], result[2], {result.begin() + 3, result.end()}, grad_states};
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return backward_with_states_operator(kind).redispatch(keys & c10::after_ADInplaceOrView_keyset, grad_output, grad_h_n,
                                                        grad_c_n, grad_c, input, h0, c0, weights, batch_sizes, lengths,
                                                        reset, output, c, saved, output_mask);
}

// Nothing else keeps a gradient from getting lost here.
BackwardResult grouped_backward(CellKind kind, c10::DispatchKeySet keys, const OptionalTensor& grad_output,
                                const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
                                const OptionalTensor& grad_c, const Tensor& input, const Tensor& h0,
                                const OptionalTensor& c0, at::TensorList weights, const OptionalTensor& batch_sizes,
                                const OptionalTensor& lengths, const OptionalTensor& reset, const Tensor& output,
                                const Tensor& c, const Tensor& saved, OutputMask output_mask, int64_t groups) {
  TORCH_CHECK_NOT_IMPLEMENTED(!any_requires_grad(grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0, weights) &&
                                  !any_tangent(grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0, weights),
                              "rnnfast.", cell_info(kind).name, "_grouped_backward has no derivative");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return grouped_backward_operator(kind).redispatch(keys & c10::after_ADInplaceOrView_keyset, grad_output, grad_h_n,
                                                    grad_c_n, grad_c, input, h0, c0, weights, batch_sizes, lengths,
                                                    reset, output, c, saved, output_mask, groups);
}

// The derivative along a tangent, as a function of the tangent and of the layer's arguments.
struct LayerJvpFunction : torch::autograd::Function<LayerJvpFunction> {
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* context, const OptionalTensor& t_input, const OptionalTensor& t_h0,
                               const OptionalTensor& t_c0, at::TensorList t_weights, const Tensor& input,
                               const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                               const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                               const OptionalTensor& reset, const Tensor& output, const Tensor& c, const Tensor& saved,
                               CellKind kind, JvpResult* result) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    *result = jvp_operator(kind).call(t_input, t_h0, t_c0, t_weights, input, h0, c0, weights, batch_sizes, lengths,
                                      reset, output, c, saved);
    const auto& [t_output, t_h_n, t_c_n, t_c] = *result;
    variable_list kept = {undefined_unless(t_input), undefined_unless(t_h0), undefined_unless(t_c0)};
    keep_layer(kept, input, h0, undefined_unless(c0), weights, batch_sizes, lengths, reset, output, c, saved);
    kept.insert(kept.end(), t_weights.begin(), t_weights.end());
    context->save_for_backward(std::move(kept));
    context->set_materialize_grads(false);
    keep_kind(*context, kind);
    context->saved_data[kTangents] = static_cast<int64_t>(t_weights.size());
    return cell_info(kind).states == 2 ? variable_list{t_output, t_h_n, t_c_n, t_c} : variable_list{t_output, t_h_n};
  }

  // <grads, J tangent>, J the layer's derivative: with respect to the tangent its derivative is that of backward, and
  // with respect to the arguments backward's along the tangent.
  static variable_list backward(AutogradContext* context, variable_list grads) {
    grads.resize(4);
    const CellKind kind = kept_kind(*context);
    const size_t tangents = context->saved_data.at(kTangents).toInt();
    const variable_list kept = context->get_saved_variables();
    const OptionalTensor t_input = optional(kept[0]), t_h0 = optional(kept[1]), t_c0 = optional(kept[2]);
    const KeptLayer layer(kept, 3, tangents);
    const at::TensorList t_weights = at::TensorList(kept).slice(kept.size() - tangents);
    const OptionalTensor of_results[] = {optional(grads[0]), optional(grads[1]), optional(grads[2]),
                                         optional(grads[3])};

    // Tensors count here, arguments without one do not.
    size_t index = 0;
    const auto needed = [&](const std::array<bool, 3>& given, size_t lists) {
      OutputMask mask{};
      for (size_t i = 0; i < 3; ++i) mask[i] = given[i] && context->needs_input_grad(index++);
      mask[3] = lists > 0 && context->needs_input_grad({{index, index + lists}});
      index += lists;
      return mask;
    };
    const OutputMask of_tangent = needed({t_input.has_value(), t_h0.has_value(), t_c0.has_value()}, tangents);
    const OutputMask of_layer = needed({true, true, layer.c0.has_value()}, layer.weights.size());
    const auto any = [](const OutputMask& mask) {
      return std::any_of(mask.begin(), mask.end(), [](bool b) { return b; });
    };

    variable_list result;
    const auto append = [&](const OutputMask& mask, const Tensor& input, const Tensor& h0, const Tensor& c0,
                            std::vector<Tensor> of_weights, size_t lists) {
      const Tensor states[] = {input, h0, c0};
      for (size_t i = 0; i < 3; ++i) result.push_back(mask[i] ? states[i] : Tensor());
      of_weights.resize(mask[3] ? lists : 0);
      of_weights.resize(lists);
      result.insert(result.end(), of_weights.begin(), of_weights.end());
    };
    if (any(of_tangent)) {
      auto [input, h0, c0, of_weights] =
          backward_operator(kind).call(of_results[0], of_results[1], of_results[2], of_results[3], layer.input,
                                       layer.h0, layer.c0, layer.weights, layer.batch_sizes, layer.lengths, layer.reset,
                                       layer.output, layer.c, layer.saved, of_tangent, std::nullopt, {}, false);
      append(of_tangent, input, h0, c0, of_weights, tangents);
    } else {
      append(of_tangent, {}, {}, {}, {}, tangents);
    }
    if (any(of_layer)) {
      auto [t_output, t_h_n, t_c_n, t_c, input, h0, c0, of_weights] = backward_jvp_operator(kind).call(
          {}, {}, {}, {}, t_input, t_h0, t_c0, t_weights, of_results[0], of_results[1], of_results[2], of_results[3],
          layer.input, layer.h0, layer.c0, layer.weights, layer.batch_sizes, layer.lengths, layer.reset, layer.output,
          layer.c, layer.saved, of_layer, {});
      append(of_layer, input, h0, c0, of_weights, layer.weights.size());
    } else {
      append(of_layer, {}, {}, {}, {}, layer.weights.size());
    }
    result.resize(result.size() + 8);  // batch_sizes, lengths, reset, output, c, saved, kind, result
    return result;
  }

 private:
  static constexpr const char* kTangents = "tangents of weights";
};

JvpResult jvp(CellKind kind, c10::DispatchKeySet keys, const OptionalTensor& t_input, const OptionalTensor& t_h0,
              const OptionalTensor& t_c0, at::TensorList t_weights, const Tensor& input, const Tensor& h0,
              const OptionalTensor& c0, at::TensorList weights, const OptionalTensor& batch_sizes,
              const OptionalTensor& lengths, const OptionalTensor& reset, const Tensor& output, const Tensor& c,
              const Tensor& saved) {
  if (!has_tangent_kernel(kind, h0, weights) || any_tangent(t_input, t_h0, t_c0, t_weights, input, h0, c0, weights)) {
    static const auto reference = find_operator<ReferenceJvpSignature>("reference_jvp");
    return reference.call(cell_info(kind).name, t_input, t_h0, t_c0, t_weights, input, h0, c0, weights, batch_sizes,
                          lengths, reset);
  }
  if (any_requires_grad(t_input, t_h0, t_c0, t_weights, input, h0, c0, weights)) {
    JvpResult result;
    const variable_list recorded =
        LayerJvpFunction::apply(t_input, t_h0, t_c0, t_weights, input, h0, c0, weights, batch_sizes, lengths, reset,
                                output.detach(), c.detach(), saved, kind, &result);
    auto& [t_output, t_h_n, t_c_n, t_c] = result;
    t_output = recorded[0];
    t_h_n = recorded[1];
    if (recorded.size() == 4) t_c_n = recorded[2], t_c = recorded[3];
    return result;
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return jvp_operator(kind).redispatch(keys & c10::after_ADInplaceOrView_keyset, t_input, t_h0, t_c0, t_weights, input,
                                       h0, c0, weights, batch_sizes, lengths, reset, output, c, saved);
}

BackwardJvpResult backward_jvp(CellKind kind, c10::DispatchKeySet keys, const OptionalTensor& t_grad_output,
                               const OptionalTensor& t_grad_h_n, const OptionalTensor& t_grad_c_n,
                               const OptionalTensor& t_grad_c, const OptionalTensor& t_input,
                               const OptionalTensor& t_h0, const OptionalTensor& t_c0, at::TensorList t_weights,
                               const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                               const OptionalTensor& grad_c_n, const OptionalTensor& grad_c, const Tensor& input,
                               const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                               const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                               const OptionalTensor& reset, const Tensor& output, const Tensor& c, const Tensor& saved,
                               OutputMask output_mask, const OptionalTensor& grad_states) {
  const auto holds = [&](const auto& any) {
    return any(t_grad_output, t_grad_h_n, t_grad_c_n, t_grad_c, t_input, t_h0, t_c0, t_weights, grad_output, grad_h_n,
               grad_c_n, grad_c, input, h0, c0, weights);
  };
  if (!has_tangent_kernel(kind, h0, weights) ||
      holds([](const auto&... tensors) { return any_requires_grad(tensors...) || any_tangent(tensors...); })) {
    static const auto reference = find_operator<ReferenceBackwardJvpSignature>("reference_backward_jvp");
    return reference.call(cell_info(kind).name, t_grad_output, t_grad_h_n, t_grad_c_n, t_grad_c, t_input, t_h0, t_c0,
                          t_weights, grad_output, grad_h_n, grad_c_n, grad_c, input, h0, c0, weights, batch_sizes,
                          lengths, reset, output_mask);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return backward_jvp_operator(kind).redispatch(keys & c10::after_ADInplaceOrView_keyset, t_grad_output, t_grad_h_n,
                                                t_grad_c_n, t_grad_c, t_input, t_h0, t_c0, t_weights, grad_output,
                                                grad_h_n, grad_c_n, grad_c, input, h0, c0, weights, batch_sizes,
                                                lengths, reset, output, c, saved, output_mask, grad_states);
}

}  // namespace

TORCH_LIBRARY_IMPL(RNNFAST_LIBRARY, Autograd, m) {
#define RNNFAST_AUTOGRAD(name, Type)                                                                    \
  m.impl(#name, TORCH_FN((OfCell<forward, CellKind::name>::run)));                                      \
  m.impl(#name "_backward", TORCH_FN((OfCell<backward, CellKind::name>::run)));                         \
  m.impl(#name "_backward_with_states", TORCH_FN((OfCell<backward_with_states, CellKind::name>::run))); \
  m.impl(#name "_grouped_backward", TORCH_FN((OfCell<grouped_backward, CellKind::name>::run)));         \
  m.impl(#name "_jvp", TORCH_FN((OfCell<jvp, CellKind::name>::run)));                                   \
  m.impl(#name "_backward_jvp", TORCH_FN((OfCell<backward_jvp, CellKind::name>::run)));
  RNNFAST_FOR_EACH_CELL(RNNFAST_AUTOGRAD)
#undef RNNFAST_AUTOGRAD
}

}  // namespace rnnfast::ops::autograd
