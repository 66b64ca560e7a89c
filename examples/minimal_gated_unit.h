// A minimal gated unit: the equations of one hidden unit of one row of the batch, forward and backward.
// docs/ADDING_A_CELL.md says what every name means.
#pragma once

#include "activations.h"

namespace rnnfast {

// f = sigmoid(i_f + h_f)   n = tanh(i_n + f h_n)   h' = (1 - f) h + f n      i = igates, h_* = hgates
// Zhou, Wu, Zhang and Zhou, "Minimal Gated Unit for Recurrent Neural Networks", IJAC 13 (2016), with the gate applied
// after the matrix product, as torch.nn.GRU applies its reset gate.
struct MinimalGatedUnit {
  static constexpr int kGates = 2;           // f n
  static constexpr int kStates = 1;          // h
  static constexpr int kSaved = 3;           // f n after their nonlinearities, and hgates[n]
  static constexpr bool kSplitGates = true;  // the candidate's hidden half is multiplied by f

  // igates [kGates], hgates [kGates], prev [kStates] -> state [kStates], saved [kSaved]
  template <class V>
  static RNNFAST_HOST_DEVICE void forward(const V* igates, const V* hgates, const V* prev, V* state, V* saved) {
    saved[0] = sigmoid(igates[0] + hgates[0]);
    saved[1] = tanh(igates[1] + saved[0] * hgates[1]);
    saved[2] = hgates[1];
    state[0] = prev[0] + saved[0] * (saved[1] - prev[0]);
  }

  // saved [kSaved], prev [kStates], state [kStates], grad_state [kStates]
  //   -> grad_igates [kGates], grad_hgates [kGates], grad_prev [kStates] (without the path through W_hh)
  template <class V>
  static RNNFAST_HOST_DEVICE void backward(const V* saved, const V* prev, const V*, const V* grad_state, V* grad_igates,
                                           V* grad_hgates, V* grad_prev) {
    const V f = saved[0], n = saved[1], hidden_n = saved[2];
    const V grad_n = grad_state[0] * f * Tanh::derivative(n);
    grad_igates[0] = (grad_state[0] * (n - prev[0]) + grad_n * hidden_n) * Sigmoid::derivative(f);
    grad_igates[1] = grad_n;
    grad_hgates[0] = grad_igates[0];
    grad_hgates[1] = grad_n * f;
    grad_prev[0] = grad_state[0] * (V(1) - f);
  }
};

}  // namespace rnnfast
