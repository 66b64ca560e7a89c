// Owns: the list of cells. A new cell is one header beside this file, one line here and one include in cells.h;
// operators, engines, tests and benchmarks follow from the list.
// Must not know: the equations, engines, tensors.
#pragma once

// X(name of the operator and of the cell in Python, type)

#ifdef RNNFAST_OWN_CELL
// A single cell from outside the package; rnnfast/own_cell.py writes this file.
#include <rnnfast_own_cell.h>
#else

// Cells with kernels of the persistent CUDA engines, which take long to compile.
#define RNNFAST_FOR_EACH_PERSISTENT_CELL(X)                \
  X(rnn_tanh, ::rnnfast::ElmanCell<::rnnfast::Tanh>)       \
  X(rnn_relu, ::rnnfast::ElmanCell<::rnnfast::Relu>)       \
  X(rnn_sigmoid, ::rnnfast::ElmanCell<::rnnfast::Sigmoid>) \
  X(lstm, ::rnnfast::LstmCell)                             \
  X(gru, ::rnnfast::GruCell)
// Cells that run step by step on CUDA.
#define RNNFAST_FOR_EACH_STEPWISE_CELL(X)                       \
  X(rnn_identity, ::rnnfast::ElmanCell<::rnnfast::Identity>)    \
  X(rnn_leaky_relu, ::rnnfast::ElmanCell<::rnnfast::LeakyRelu>) \
  X(gru_reset_before, ::rnnfast::GruResetBeforeCell)            \
  X(indrnn_relu, ::rnnfast::IndRnnCell<::rnnfast::Relu>)        \
  X(indrnn_tanh, ::rnnfast::IndRnnCell<::rnnfast::Tanh>)

#endif

#define RNNFAST_FOR_EACH_CELL(X)      \
  RNNFAST_FOR_EACH_PERSISTENT_CELL(X) \
  RNNFAST_FOR_EACH_STEPWISE_CELL(X)

namespace rnnfast {

enum class CellKind : int {
#define RNNFAST_CELL_KIND(name, Type) name,
  RNNFAST_FOR_EACH_CELL(RNNFAST_CELL_KIND)
#undef RNNFAST_CELL_KIND
};

}  // namespace rnnfast
