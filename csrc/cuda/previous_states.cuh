// Owns: the states before every step, over all steps at once: what W_hh multiplied.
// Must not know: equations, loops over time.
#pragma once

#include "device_sequence.cuh"
#include "pointwise.cuh"

namespace rnnfast::cuda {

// The state before a step, of one feature: the neighbouring step's, the initial one where the row starts (null: zero),
// zero behind a reset. The row lives at the step.
template <class scalar_t>
__device__ __forceinline__ scalar_t previous_state(const DeviceSequence& sequence, bool reverse, int step, int slot,
                                                   const DeviceRows<scalar_t>& rows, const scalar_t* initial,
                                                   int64_t feature) {
  const int neighbour = reverse ? step + 1 : step - 1, border = reverse ? step + 1 : step;
  scalar_t zero;
  from_acc(acc_type<scalar_t>(0), zero);
  if (sequence.reset != nullptr && sequence.lives(border, slot) && sequence.reset[sequence.row(border, slot)]) {
    return zero;
  }
  if (sequence.lives(neighbour, slot)) return rows.at(sequence, neighbour, slot)[feature];
  return initial != nullptr ? initial[feature] : zero;
}

// Enqueues the work of previous_states (params.h), and with noise recurrent dropout of it.
int enqueue_previous_states(const PreviousStates& states, const Noise& noise, const DeviceSequence& sequence,
                            cudaStream_t stream);

}  // namespace rnnfast::cuda
