// Owns: the equations of the GRU cell, forward, backward and along a tangent, for one unit of one row.
// Must not know: pointers into tensors, indices, batches, dtypes of storage.
#pragma once

#include "activations.h"

namespace rnnfast {

// r = sigmoid(i_r + h_r)   z = sigmoid(i_z + h_z)   n = tanh(i_n + r h_n)      i = igates, h_* = hgates
// h' = (1 - z) n + z h = n + z (h - n)
// Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP 2014, with the reset gate applied
// after the matrix product, as torch.nn.GRU and cuDNN do. Gate order as torch.nn.GRU.
struct GruCell {
  static constexpr int kGates = 3;           // r z n
  static constexpr int kStates = 1;          // h
  static constexpr int kSaved = 4;           // r z n after their nonlinearities, and hgates[n]
  static constexpr bool kSplitGates = true;  // the candidate's hidden half is multiplied by r

  // igates [kGates], hgates [kGates], prev [kStates] -> state [kStates], saved [kSaved]
  template <class V>
  static RNNFAST_HOST_DEVICE void forward(const V* igates, const V* hgates, const V* prev, V* state, V* saved) {
    saved[0] = sigmoid(igates[0] + hgates[0]);
    saved[1] = sigmoid(igates[1] + hgates[1]);
    saved[2] = tanh(igates[2] + saved[0] * hgates[2]);
    saved[3] = hgates[2];
    state[0] = saved[2] + saved[1] * (prev[0] - saved[2]);
  }

  // saved [kSaved], prev [kStates], state [kStates], grad_state [kStates]
  //   -> grad_igates [kGates], grad_hgates [kGates], grad_prev [kStates] (without the path through W_hh)
  template <class V>
  static RNNFAST_HOST_DEVICE void backward(const V* saved, const V* prev, const V*, const V* grad_state, V* grad_igates,
                                           V* grad_hgates, V* grad_prev) {
    const V r = saved[0], z = saved[1], n = saved[2], hidden_n = saved[3];
    const V grad_n = grad_state[0] * (V(1) - z) * Tanh::derivative(n);
    grad_igates[0] = grad_n * hidden_n * Sigmoid::derivative(r);
    grad_igates[1] = grad_state[0] * (prev[0] - n) * Sigmoid::derivative(z);
    grad_igates[2] = grad_n;
    grad_hgates[0] = grad_igates[0];
    grad_hgates[1] = grad_igates[1];
    grad_hgates[2] = grad_n * r;
    grad_prev[0] = grad_state[0] * z;
  }

  // The derivative of forward along (t_igates [kGates], t_hgates [kGates], t_prev [kStates]), from what forward kept:
  //   saved [kSaved], prev [kStates], state [kStates] -> t_state [kStates], t_saved [kSaved]
  template <class V>
  static RNNFAST_HOST_DEVICE void tangent(const V* saved, const V* prev, const V*, const V* t_igates, const V* t_hgates,
                                          const V* t_prev, V* t_state, V* t_saved) {
    const V r = saved[0], z = saved[1], n = saved[2], hidden_n = saved[3];
    t_saved[0] = (t_igates[0] + t_hgates[0]) * Sigmoid::derivative(r);
    t_saved[1] = (t_igates[1] + t_hgates[1]) * Sigmoid::derivative(z);
    t_saved[2] = (t_igates[2] + t_saved[0] * hidden_n + r * t_hgates[2]) * Tanh::derivative(n);
    t_saved[3] = t_hgates[2];
    t_state[0] = t_saved[2] + t_saved[1] * (prev[0] - n) + z * (t_prev[0] - t_saved[2]);
  }
};

}  // namespace rnnfast
