// Owns: the operators on the CPU: the call of the engine.
// Must not know: equations, loops over time.
#include <torch/library.h>

#include "host_cpu.h"
#include "layer.h"

namespace rnnfast::ops::layer_cpu {
namespace {

template <CellKind kind>
ForwardResult forward(const Tensor& input, const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                      const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& reset,
                      int64_t save_, const OptionalTensor& seed, at::ArrayRef<double> noise_, bool layer_norm) {
  const LayerArguments arguments{input, h0, c0, weights, batch_sizes, lengths, reset, layer_norm};
  const Geometry geometry = check_layer(kind, arguments);
  const Save save = check_save(kind, save_);
  const NoiseTensors noise(geometry, input, seed, noise_);
  const LayerTensors layer(arguments);
  const HostSequence host(geometry, arguments, layer);
  ForwardTensors tensors(geometry, input, save, /*gaps=*/lengths.has_value());
  if (geometry.empty() || host.sequence().rows == 0) {
    finish_empty_forward(layer, tensors);
    return tensors.result();
  }

  LayerForward params = forward_params(geometry, save, layer, tensors);
  params.noise = noise.params;
  params.sequence = host.sequence();
  run_engine(params);
  return tensors.result();
}

// grad_states: where the gradients of all states go; null: not wanted.
BackwardResult run_backward(const Geometry& geometry, const LayerArguments& arguments, const NoiseTensors& noise,
                            const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                            const OptionalTensor& grad_c_n, const OptionalTensor& grad_c, const Tensor& output,
                            const Tensor& c, const Tensor& saved, const OutputMask& output_mask, Tensor* grad_states) {
  const bool gaps = arguments.lengths.has_value();
  const LayerTensors layer(arguments);
  const HostSequence host(geometry, arguments, layer);
  BackwardTensors tensors(geometry, layer, grad_output, grad_h_n, grad_c_n, grad_c, output, c, saved, output_mask,
                          gaps);
  if (grad_states) *grad_states = empty_steps(geometry, layer.input, geometry.directions * geometry.output_size, gaps);
  if (geometry.empty() || host.sequence().rows == 0) {
    finish_empty_backward(tensors);
    return tensors.result();
  }

  LayerBackward params = backward_params(geometry, layer, tensors);
  for (int64_t d = 0; grad_states && d < geometry.directions; ++d)
    params.direction[d].grad_states = rows_of(geometry, *grad_states, d * geometry.output_size);
  params.noise = noise.params;
  params.sequence = host.sequence();
  if (output_mask[0]) params.grad_input = rows_of(geometry, tensors.grad_input, 0);
  if (output_mask[3]) set_weight_gradients(geometry, tensors, params);
  run_engine(params);
  return tensors.result();
}

template <CellKind kind>
BackwardResult backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                        const OptionalTensor& grad_c_n, const OptionalTensor& grad_c, const Tensor& input,
                        const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                        const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& reset,
                        const Tensor& output, const Tensor& c, const Tensor& saved, OutputMask output_mask,
                        const OptionalTensor& seed, at::ArrayRef<double> noise_, bool layer_norm) {
  const LayerArguments arguments{input, h0, c0, weights, batch_sizes, lengths, reset, layer_norm};
  const Geometry geometry = check_layer(kind, arguments);
  check_gradients(geometry, arguments, grad_output, grad_h_n, grad_c_n, grad_c, output, c, saved);
  const NoiseTensors noise(geometry, input, seed, noise_);
  noise.check_backward(geometry);
  return run_backward(geometry, arguments, noise, grad_output, grad_h_n, grad_c_n, grad_c, output, c, saved,
                      output_mask, nullptr);
}

template <CellKind kind>
BackwardWithStatesResult backward_with_states(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                              const OptionalTensor& grad_c_n, const OptionalTensor& grad_c,
                                              const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
                                              at::TensorList weights, const OptionalTensor& batch_sizes,
                                              const OptionalTensor& lengths, const OptionalTensor& reset,
                                              const Tensor& output, const Tensor& c, const Tensor& saved,
                                              OutputMask output_mask) {
  const LayerArguments arguments{input, h0, c0, weights, batch_sizes, lengths, reset};
  const Geometry geometry = check_layer(kind, arguments);
  check_gradients(geometry, arguments, grad_output, grad_h_n, grad_c_n, grad_c, output, c, saved);
  TORCH_CHECK(!geometry.projection, "rnnfast.", geometry.info.name,
              ": a layer with a projection has no kernel for the gradients of all states");
  Tensor grad_states;
  auto [grad_input, grad_h0, grad_c0, grad_weights] =
      run_backward(geometry, arguments, NoiseTensors(geometry, input, {}, {}), grad_output, grad_h_n, grad_c_n, grad_c,
                   output, c, saved, output_mask, &grad_states);
  return {grad_input, grad_h0, grad_c0, grad_weights, grad_states};
}

}  // namespace

TORCH_LIBRARY_IMPL(RNNFAST_LIBRARY, CPU, m) {
#define RNNFAST_CPU(name, Type)                         \
  m.impl(#name, &forward<CellKind::name>);              \
  m.impl(#name "_backward", &backward<CellKind::name>); \
  m.impl(#name "_backward_with_states", &backward_with_states<CellKind::name>);
  RNNFAST_FOR_EACH_CELL(RNNFAST_CPU)
#undef RNNFAST_CPU
}

}  // namespace rnnfast::ops::layer_cpu
