// Owns: the independently recurrent cell.
// Must not know: pointers into tensors, indices, batches, dtypes of storage.
#pragma once

#include "elman.h"

namespace rnnfast {

// h' = f(W_ih x + b_ih + w_hh * h + b_hh): Elman's equations, of units that do not see each other's states. w_hh is a
// vector, which the engine multiplies with h unit by unit.
// Li, Li, Cook, Zhu and Gao, "Independently Recurrent Neural Network (IndRNN): Building A Longer and Deeper RNN", CVPR
// 2018.
template <class Nonlinearity>
struct IndRnnCell : ElmanCell<Nonlinearity> {
  static constexpr bool kDiagonal = true;
};

}  // namespace rnnfast
