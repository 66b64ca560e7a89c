// Owns: the equations of the LSTM cell, forward, backward and along a tangent, for one unit of one row.
// Must not know: pointers into tensors, indices, batches, dtypes of storage.
#pragma once

#include "activations.h"

namespace rnnfast {

// i = sigmoid(a_i)   f = sigmoid(a_f)   g = tanh(a_g)   o = sigmoid(a_o)      a = igates + hgates
// c' = f c + i g     h' = o tanh(c')
// Hochreiter and Schmidhuber, "Long Short-Term Memory", Neural Computation 9 (1997), with the forget gate of
// Gers, Schmidhuber and Cummins, "Learning to Forget", Neural Computation 12 (2000). Gate order as torch.nn.LSTM.
struct LstmCell {
  static constexpr int kGates = 4;            // i f g o
  static constexpr int kStates = 2;           // h c
  static constexpr int kSaved = 4;            // i f g o, after their nonlinearities
  static constexpr bool kSplitGates = false;  // igates and hgates have the same gradient

  // igates [kGates], hgates [kGates], prev [kStates] -> state [kStates], saved [kSaved]
  template <class V>
  static RNNFAST_HOST_DEVICE void forward(const V* igates, const V* hgates, const V* prev, V* state, V* saved) {
    saved[0] = sigmoid(igates[0] + hgates[0]);
    saved[1] = sigmoid(igates[1] + hgates[1]);
    saved[2] = tanh(igates[2] + hgates[2]);
    saved[3] = sigmoid(igates[3] + hgates[3]);
    state[1] = saved[1] * prev[1] + saved[0] * saved[2];
    state[0] = saved[3] * tanh(state[1]);
  }

  // c' from what forward kept and c; zoneout, which may keep c in place of it, wants it in backward.
  template <class V>
  static RNNFAST_HOST_DEVICE V candidate(const V* saved, const V* prev) {
    return saved[1] * prev[1] + saved[0] * saved[2];
  }

  // h' from what forward kept; a layer with a projection wants it in backward.
  template <class V>
  static RNNFAST_HOST_DEVICE V hidden(const V* saved, const V* state) {
    return saved[3] * tanh(state[1]);
  }

  // saved [kSaved], prev [kStates], state [kStates], grad_state [kStates]
  //   -> grad_igates [kGates], grad_hgates [kGates], grad_prev [kStates] (without the path through W_hh)
  // Reads prev[1] and state[1] (the cell state) only.
  template <class V>
  static RNNFAST_HOST_DEVICE void backward(const V* saved, const V* prev, const V* state, const V* grad_state,
                                           V* grad_igates, V* grad_hgates, V* grad_prev) {
    V grad_o;
    const V grad_c = grad_state[1] + hidden_backward(saved, state, grad_state[0], grad_o);
    candidate_backward(saved, prev, grad_c, grad_o, grad_igates, grad_hgates, grad_prev);
  }

  // Its two parts, of h' = o tanh(c') and of c' = f c + i g. A layer that normalises c between them wants them apart.
  // The first returns the gradient of c', and leaves in grad_o that of a_o for the second.
  template <class V>
  static RNNFAST_HOST_DEVICE V hidden_backward(const V* saved, const V* state, const V& grad_h, V& grad_o) {
    const V o = saved[3], tanh_c = tanh(state[1]);
    grad_o = grad_h * tanh_c * Sigmoid::derivative(o);
    return grad_h * o * Tanh::derivative(tanh_c);
  }
  template <class V>
  static RNNFAST_HOST_DEVICE void candidate_backward(const V* saved, const V* prev, const V& grad_c, const V& grad_o,
                                                     V* grad_igates, V* grad_hgates, V* grad_prev) {
    const V i = saved[0], f = saved[1], g = saved[2];
    grad_igates[0] = grad_c * g * Sigmoid::derivative(i);
    grad_igates[1] = grad_c * prev[1] * Sigmoid::derivative(f);
    grad_igates[2] = grad_c * i * Tanh::derivative(g);
    grad_igates[3] = grad_o;
    for (int k = 0; k < kGates; ++k) grad_hgates[k] = grad_igates[k];
    grad_prev[0] = V(0);
    grad_prev[1] = grad_c * f;
  }

  // The derivative of forward along (t_igates [kGates], t_hgates [kGates], t_prev [kStates]), from what forward kept:
  //   saved [kSaved], prev [kStates], state [kStates] -> t_state [kStates], t_saved [kSaved]
  // Reads prev[1], state[1] and t_prev[1] (the cell state) only.
  template <class V>
  static RNNFAST_HOST_DEVICE void tangent(const V* saved, const V* prev, const V* state, const V* t_igates,
                                          const V* t_hgates, const V* t_prev, V* t_state, V* t_saved) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = tanh(state[1]);
    t_saved[0] = (t_igates[0] + t_hgates[0]) * Sigmoid::derivative(i);
    t_saved[1] = (t_igates[1] + t_hgates[1]) * Sigmoid::derivative(f);
    t_saved[2] = (t_igates[2] + t_hgates[2]) * Tanh::derivative(g);
    t_saved[3] = (t_igates[3] + t_hgates[3]) * Sigmoid::derivative(o);
    t_state[1] = t_saved[1] * prev[1] + f * t_prev[1] + t_saved[0] * g + i * t_saved[2];
    t_state[0] = t_saved[3] * tanh_c + o * Tanh::derivative(tanh_c) * t_state[1];
  }
};

}  // namespace rnnfast
