// Owns: the way from an operator's tensors to the structs of params.h and back: contiguous weights, allocated results,
// pointers and strides. Device-independent.
// Must not know: what an engine does with them, threads, streams.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include "checks.h"

namespace rnnfast::ops {

// Element 0 of direction d's block of a contiguous [D, ...] tensor; null for an undefined one.
void* block(const Tensor& tensor, int64_t d);
// Columns [first, ...) of a tensor [T, B, features], or [N, features] when packed; data null for an undefined one.
Rows rows_of(const Geometry& geometry, const Tensor& tensor, int64_t first);
// An uninitialised tensor of that shape, or a zero one.
Tensor empty_steps(const Geometry& geometry, const Tensor& like, int64_t features, bool zero);
Tensor contiguous_features(const Tensor& tensor);
Tensor contiguous_or_undefined(const OptionalTensor& tensor);

// The arguments in the form that engines read; keeps alive what had to be copied for it.
struct LayerTensors {
  explicit LayerTensors(const LayerArguments& arguments);

  Tensor input;                          // contiguous features
  Tensor h0, c0;                         // contiguous; c0 undefined for cells with one state
  c10::SmallVector<Tensor, 10> weights;  // contiguous, in the operator's order
  Tensor reset;                          // contiguous or undefined
};

// Recurrent dropout and zoneout of a call; `params` reads the seed.
struct NoiseTensors {
  NoiseTensors(const Geometry& geometry, const Tensor& input, const OptionalTensor& seed, at::ArrayRef<double> noise);
  bool any() const { return params.recurrent_dropout > 0 || params.zoneout_h > 0 || params.zoneout_c > 0; }
  // Throws NotImplementedError for zoneout without a seed, its expectation.
  void check_backward(const Geometry& geometry) const;

  Tensor seed;  // contiguous or undefined
  Noise params;
};

// What forward returns. Uninitialised, except that with gaps (rows shorter than T) output and c are zero.
struct ForwardTensors {
  ForwardTensors(const Geometry& geometry, const Tensor& like, Save save, bool gaps);
  ForwardResult result() const { return {output, h_n, c_n, c, saved}; }

  Tensor output, h_n, c_n, c, saved;
};

// What backward reads beside the arguments, with contiguous features, and what it returns. Without elements, or
// undefined, where it is not there.
struct BackwardTensors {
  BackwardTensors(const Geometry& geometry, const LayerTensors& layer, const OptionalTensor& grad_output,
                  const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n, const OptionalTensor& grad_c,
                  const Tensor& output, const Tensor& c, const Tensor& saved, const OutputMask& mask, bool gaps);
  // Scratch for engines that leave the products over all steps to the operator.
  void allocate_gate_gradients(const Geometry& geometry);
  // The gradients that the mask wants; the others without elements.
  BackwardResult result() const;

  Tensor grad_output, grad_h_n, grad_c_n, grad_c;  // in
  Tensor output, c, saved;                         // in
  Tensor grad_input, grad_h0, grad_c0;             // out; engines always write those of the states
  std::vector<Tensor> grad_weights;                // out, in the operator's order; none unless wanted
  Tensor grad_igates, grad_hgates;                 // [D, N, G*H]; the same tensor unless the gates are split
  OutputMask mask;
};

// All of LayerForward and LayerBackward that follows from the tensors. Left to the implementation: `sequence`, and the
// buffers of one engine alone (igates; the gradients of weights and input).
LayerForward forward_params(const Geometry& geometry, Save save, const LayerTensors& layer,
                            const ForwardTensors& tensors);
LayerBackward backward_params(const Geometry& geometry, const LayerTensors& layer, const BackwardTensors& tensors);
// Has the engine write the gradients of the weights, as far as it makes them, to those of the tensors, which are there.
void set_weight_gradients(const Geometry& geometry, BackwardTensors& tensors, LayerBackward& params);

// What remains of a call for which Geometry::empty() holds: the states pass through, every other gradient is zero.
void finish_empty_forward(const LayerTensors& layer, ForwardTensors& tensors);
void finish_empty_backward(BackwardTensors& tensors);

}  // namespace rnnfast::ops
