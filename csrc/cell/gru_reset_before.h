// Owns: the equations of the GRU cell whose reset gate stands before the matrix product, forward and backward, for one
// unit of one row.
// Must not know: pointers into tensors, indices, batches, dtypes of storage.
#pragma once

#include "activations.h"

namespace rnnfast {

// r = sigmoid(i_r + W_hr h + b_hr)   z = sigmoid(i_z + W_hz h + b_hz)   n = tanh(i_n + W_hn (r h) + b_hn)
// h' = (1 - z) n + z h = n + z (h - n)                                                            i = igates
// Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP 2014. Gate order as torch.nn.GRU,
// which multiplies by r behind the product: gru.h.
//
// A step has two products, one behind the other: kFirstGates says of how many gates the first is, that of h. `gate`
// makes of its result the operand of the second, that of the other gates; `finish` makes the new state of both.
// Backwards, `backward` gives the gradients of all gates but the first; those of the second product give, by its
// matrix, the gradient of the gated operand; and `backward_gate` makes of it that of the first gate.
struct GruResetBeforeCell {
  static constexpr int kGates = 3;  // r z n
  static constexpr int kFirstGates = 2;
  static constexpr int kStates = 1;           // h
  static constexpr int kSaved = 3;            // r z n after their nonlinearities
  static constexpr bool kSplitGates = false;  // igates and hgates have the same gradient

  // The operand of the second product, of saved and that of the first, h as it met W_hh.
  template <class V>
  static RNNFAST_HOST_DEVICE V gated(const V* saved, const V& operand) {
    return saved[0] * operand;
  }

  // igates [kGates], hgates [kFirstGates], operand -> saved [kFirstGates]; returns the operand of the second product
  template <class V>
  static RNNFAST_HOST_DEVICE V gate(const V* igates, const V* hgates, const V& operand, V* saved) {
    saved[0] = sigmoid(igates[0] + hgates[0]);
    saved[1] = sigmoid(igates[1] + hgates[1]);
    return gated(saved, operand);
  }

  // igates [kGates], hgates [kGates - kFirstGates], prev [kStates], what gate saved -> state [kStates], the rest of
  // saved
  template <class V>
  static RNNFAST_HOST_DEVICE void finish(const V* igates, const V* hgates, const V* prev, V* state, V* saved) {
    saved[2] = tanh(igates[2] + hgates[0]);
    state[0] = saved[2] + saved[1] * (prev[0] - saved[2]);
  }

  // Both, where the results of both products are there.
  // igates [kGates], hgates [kGates], prev [kStates] -> state [kStates], saved [kSaved]
  template <class V>
  static RNNFAST_HOST_DEVICE void forward(const V* igates, const V* hgates, const V* prev, V* state, V* saved) {
    gate(igates, hgates, prev[0], saved);
    finish(igates, hgates + kFirstGates, prev, state, saved);
  }

  // saved [kSaved], prev [kStates], state [kStates], grad_state [kStates]
  //   -> grad_igates [kGates] but for the first, which is left zero, grad_hgates [kGates] likewise,
  //      grad_prev [kStates] (without the paths through W_hh)
  template <class V>
  static RNNFAST_HOST_DEVICE void backward(const V* saved, const V* prev, const V*, const V* grad_state, V* grad_igates,
                                           V* grad_hgates, V* grad_prev) {
    const V z = saved[1], n = saved[2];
    grad_igates[0] = V(0);
    grad_igates[1] = grad_state[0] * (prev[0] - n) * Sigmoid::derivative(z);
    grad_igates[2] = grad_state[0] * (V(1) - z) * Tanh::derivative(n);
    for (int k = 0; k < kGates; ++k) grad_hgates[k] = grad_igates[k];
    grad_prev[0] = grad_state[0] * z;
  }

  // saved [kSaved], operand, the gradient of the gated operand -> that of the first gate; returns that of the operand
  template <class V>
  static RNNFAST_HOST_DEVICE V backward_gate(const V* saved, const V& operand, const V& grad_gated, V& grad_gate) {
    const V r = saved[0];
    grad_gate = grad_gated * operand * Sigmoid::derivative(r);
    return grad_gated * r;
  }
};

}  // namespace rnnfast
