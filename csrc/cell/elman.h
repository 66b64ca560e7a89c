// Owns: the equations of the Elman cell, forward, backward and along a tangent, for one unit of one row.
// Must not know: pointers into tensors, indices, batches, dtypes of storage.
#pragma once

#include "activations.h"

namespace rnnfast {

// h' = f(igate + hgate), with igate = W_ih x + b_ih and hgate = W_hh h + b_hh.
// Elman, "Finding Structure in Time", Cognitive Science 14 (1990).
template <class Nonlinearity>
struct ElmanCell {
  static constexpr int kGates = 1;
  static constexpr int kStates = 1;           // h
  static constexpr int kSaved = 0;            // the derivative follows from h' itself
  static constexpr bool kSplitGates = false;  // igates and hgates have the same gradient

  // igates [kGates], hgates [kGates], prev [kStates] -> state [kStates], saved [kSaved]
  template <class V>
  static RNNFAST_HOST_DEVICE void forward(const V* igates, const V* hgates, const V*, V* state, V*) {
    state[0] = Nonlinearity::value(igates[0] + hgates[0]);
  }

  // saved [kSaved], prev [kStates], state [kStates], grad_state [kStates]
  //   -> grad_igates [kGates], grad_hgates [kGates], grad_prev [kStates] (without the path through W_hh)
  template <class V>
  static RNNFAST_HOST_DEVICE void backward(const V*, const V*, const V* state, const V* grad_state, V* grad_igates,
                                           V* grad_hgates, V* grad_prev) {
    grad_igates[0] = grad_state[0] * Nonlinearity::derivative(state[0]);
    grad_hgates[0] = grad_igates[0];
    grad_prev[0] = V(0);
  }

  // The derivative of forward along (t_igates [kGates], t_hgates [kGates], t_prev [kStates]), from what forward kept:
  //   saved [kSaved], prev [kStates], state [kStates] -> t_state [kStates], t_saved [kSaved]
  template <class V>
  static RNNFAST_HOST_DEVICE void tangent(const V*, const V*, const V* state, const V* t_igates, const V* t_hgates,
                                          const V*, V* t_state, V*) {
    t_state[0] = (t_igates[0] + t_hgates[0]) * Nonlinearity::derivative(state[0]);
  }
};

}  // namespace rnnfast
