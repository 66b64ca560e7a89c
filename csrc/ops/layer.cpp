#include "layer.h"

#include <ATen/Functions.h>

#include "memory.h"

namespace rnnfast::ops {
namespace {

// Uninitialised, for as many rows as all steps have.
Tensor empty_rows(at::IntArrayRef sizes, const Tensor& like) {
  Tensor rows = at::empty(sizes, like.options());
  if (rows.is_cpu()) prefer_large_pages(rows.data_ptr(), rows.nbytes());
  return rows;
}

}  // namespace

// Engines take any strides but that of the features.
Tensor contiguous_features(const Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

Tensor empty_steps(const Geometry& g, const Tensor& like, int64_t features, bool zero) {
  const int64_t padded[] = {g.steps, g.batch, features};
  const int64_t packed[] = {g.rows, features};
  const at::IntArrayRef sizes = g.packed ? at::IntArrayRef(packed) : at::IntArrayRef(padded);
  const Tensor steps = empty_rows(sizes, like);
  return zero ? steps.zero_() : steps;
}

void* block(const Tensor& tensor, int64_t d) {
  if (!tensor.defined()) return nullptr;
  return static_cast<char*>(tensor.data_ptr()) + d * tensor.stride(0) * tensor.element_size();
}

Rows rows_of(const Geometry& g, const Tensor& tensor, int64_t first) {
  Rows rows;
  if (!tensor.defined()) return rows;
  rows.data = static_cast<char*>(tensor.data_ptr()) + first * tensor.element_size();
  rows.stride_t = g.packed ? 0 : tensor.stride(0);
  rows.stride_b = tensor.stride(g.packed ? 0 : 1);
  return rows;
}

Tensor contiguous_or_undefined(const OptionalTensor& tensor) { return tensor ? tensor->contiguous() : Tensor(); }

namespace {

Tensor contiguous_features_or_undefined(const OptionalTensor& tensor) {
  return tensor ? contiguous_features(*tensor) : Tensor();
}

Tensor no_elements(const Tensor& like) { return at::empty({0}, like.options()); }

DirectionWeights direction_weights(const Geometry& g, const LayerTensors& layer, int64_t d) {
  const WeightView tensors(g, layer.weights.data(), d);
  const auto data = [](const Tensor* weight) { return weight ? weight->const_data_ptr() : nullptr; };
  DirectionWeights weights;
  weights.w_ih = data(tensors.w_ih);
  weights.w_hh = data(tensors.w_hh);
  weights.b_ih = data(tensors.b_ih);
  weights.b_hh = data(tensors.b_hh);
  weights.w_hr = data(tensors.w_hr);
  weights.norm_ih = data(tensors.norm_ih);
  weights.norm_hh = data(tensors.norm_hh);
  weights.norm_c = data(tensors.norm_c);
  weights.norm_bias_c = data(tensors.norm_bias_c);
  return weights;
}

template <class Layer>
Layer common_params(const Geometry& g, const LayerTensors& layer) {
  Layer params;
  params.cell = g.cell;
  params.dtype = g.dtype;
  params.input_size = g.input_size;
  params.hidden_size = g.hidden_size;
  params.output_size = g.output_size;
  params.directions = static_cast<int>(g.directions);
  params.layer_norm = g.layer_norm;
  params.input = rows_of(g, layer.input, 0);
  for (int64_t d = 0; d < g.directions; ++d) {
    params.direction[d].weights = direction_weights(g, layer, d);
    params.direction[d].h0 = block(layer.h0, d);
    params.direction[d].c0 = block(layer.c0, d);
    params.direction[d].reverse = d == 1;
  }
  return params;
}

}  // namespace

LayerTensors::LayerTensors(const LayerArguments& arguments)
    : input(contiguous_features(arguments.input)),
      h0(arguments.h0.contiguous()),
      c0(contiguous_or_undefined(arguments.c0)),
      reset(contiguous_or_undefined(arguments.reset)) {
  for (const Tensor& weight : arguments.weights) weights.push_back(weight.contiguous());
}

NoiseTensors::NoiseTensors(const Geometry& g, const Tensor& input, const OptionalTensor& given,
                           at::ArrayRef<double> noise)
    : seed(contiguous_or_undefined(given)), params(check_noise(g, input, given, noise)) {
  if (seed.defined()) params.seeds = seed.const_data_ptr<int64_t>();
}

void NoiseTensors::check_backward(const Geometry& g) const {
  TORCH_CHECK_NOT_IMPLEMENTED(!any() || params.seeds || g.batch == 0, "rnnfast.", g.info.name,
                              "_backward: seed is None, the expectation of zoneout has no kernel for its gradient");
}

ForwardTensors::ForwardTensors(const Geometry& g, const Tensor& like, Save save, bool gaps) {
  const bool two_states = g.info.states == 2;
  output = empty_steps(g, like, g.directions * g.output_size, gaps);
  h_n = at::empty({g.directions, g.batch, g.output_size}, like.options());
  c_n = two_states ? at::empty({g.directions, g.batch, g.hidden_size}, like.options()) : no_elements(like);
  c = two_states && save != Save::nothing ? empty_steps(g, like, g.directions * g.hidden_size, gaps)
                                          : no_elements(like);
  saved = save == Save::gates && g.saved_values() > 0
              ? empty_rows({g.directions, g.rows, g.saved_elements_a_row()}, like)
              : no_elements(like);
}

BackwardTensors::BackwardTensors(const Geometry& g, const LayerTensors& layer, const OptionalTensor& grad_output_,
                                 const OptionalTensor& grad_h_n_, const OptionalTensor& grad_c_n_,
                                 const OptionalTensor& grad_c_, const Tensor& output_, const Tensor& c_,
                                 const Tensor& saved_, const OutputMask& mask_, bool gaps)
    : grad_output(contiguous_features_or_undefined(grad_output_)),
      grad_h_n(contiguous_or_undefined(grad_h_n_)),
      output(contiguous_features(output_)),
      saved(saved_),
      mask(mask_) {
  const Tensor& like = layer.input;
  if (g.info.states == 2) {
    grad_c_n = contiguous_or_undefined(grad_c_n_);
    grad_c = contiguous_features_or_undefined(grad_c_);
    c = contiguous_features(c_);
  }
  grad_input = mask[0] ? empty_steps(g, like, g.input_size, gaps) : no_elements(like);
  grad_h0 = at::empty_like(layer.h0);
  grad_c0 = layer.c0.defined() ? at::empty_like(layer.c0) : no_elements(like);
  if (mask[3]) {
    for (const Tensor& weight : layer.weights) grad_weights.push_back(at::empty_like(weight));
  }
}

void BackwardTensors::allocate_gate_gradients(const Geometry& g) {
  grad_igates = empty_rows({g.directions, g.rows, g.info.gates * g.hidden_size}, grad_h0);
  grad_hgates = g.split_gates() ? empty_rows(grad_igates.sizes(), grad_h0) : grad_igates;
}

BackwardResult BackwardTensors::result() const {
  return {grad_input, mask[1] ? grad_h0 : no_elements(grad_h0), mask[2] ? grad_c0 : no_elements(grad_c0), grad_weights};
}

LayerForward forward_params(const Geometry& g, Save save, const LayerTensors& layer, const ForwardTensors& tensors) {
  auto params = common_params<LayerForward>(g, layer);
  params.save = save;
  const bool wants_c = tensors.c.numel() > 0;
  for (int64_t d = 0; d < g.directions; ++d) {
    DirectionForward& direction = params.direction[d];
    direction.output = rows_of(g, tensors.output, d * g.output_size);
    if (wants_c) direction.c = rows_of(g, tensors.c, d * g.hidden_size);
    direction.h_n = block(tensors.h_n, d);
    if (g.info.states == 2) direction.c_n = block(tensors.c_n, d);
    if (tensors.saved.numel() > 0) direction.saved = block(tensors.saved, d);
  }
  return params;
}

LayerBackward backward_params(const Geometry& g, const LayerTensors& layer, const BackwardTensors& tensors) {
  auto params = common_params<LayerBackward>(g, layer);
  for (int64_t d = 0; d < g.directions; ++d) {
    DirectionBackward& direction = params.direction[d];
    direction.output = rows_of(g, tensors.output, d * g.output_size);
    direction.c = rows_of(g, tensors.c, d * g.hidden_size);
    if (tensors.saved.numel() > 0) direction.saved = block(tensors.saved, d);
    direction.grad_output = rows_of(g, tensors.grad_output, d * g.output_size);
    direction.grad_c = rows_of(g, tensors.grad_c, d * g.hidden_size);
    direction.grad_h_n = block(tensors.grad_h_n, d);
    direction.grad_c_n = block(tensors.grad_c_n, d);
    direction.grad_h0 = block(tensors.grad_h0, d);
    if (g.info.states == 2) direction.grad_c0 = block(tensors.grad_c0, d);
    direction.grad_igates = block(tensors.grad_igates, d);
    direction.grad_hgates = block(tensors.grad_hgates, d);
  }
  return params;
}

void set_weight_gradients(const Geometry& g, BackwardTensors& tensors, LayerBackward& params) {
  const auto data = [](const Tensor* gradient) { return gradient ? gradient->data_ptr() : nullptr; };
  for (int64_t d = 0; d < g.directions; ++d) {
    const WeightView grads(g, tensors.grad_weights.data(), d);
    DirectionBackward& direction = params.direction[d];
    direction.grad_w_ih = data(grads.w_ih);
    direction.grad_w_hh = data(grads.w_hh);
    direction.grad_b_ih = data(grads.b_ih);
    direction.grad_b_hh = data(grads.b_hh);
    direction.grad_w_hr = data(grads.w_hr);
    direction.grad_norm_ih = data(grads.norm_ih);
    direction.grad_norm_hh = data(grads.norm_hh);
    direction.grad_norm_c = data(grads.norm_c);
    direction.grad_norm_bias_c = data(grads.norm_bias_c);
  }
}

void finish_empty_forward(const LayerTensors& layer, ForwardTensors& tensors) {
  tensors.output.zero_();
  tensors.c.zero_();
  tensors.h_n.copy_(layer.h0);
  if (layer.c0.defined()) tensors.c_n.copy_(layer.c0);
}

void finish_empty_backward(BackwardTensors& tensors) {
  const auto pass = [](Tensor& grad, const Tensor& from) { from.defined() ? grad.copy_(from) : grad.zero_(); };
  pass(tensors.grad_h0, tensors.grad_h_n);
  pass(tensors.grad_c0, tensors.grad_c_n);
  tensors.grad_input.zero_();
  for (Tensor& grad : tensors.grad_weights) grad.zero_();
}

}  // namespace rnnfast::ops
