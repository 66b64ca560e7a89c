// Owns: the list of cells. A new cell is one header beside this file, one line here and one include in cells.h;
// operators, engines, tests and benchmarks follow from the list.
// Must not know: the equations, engines, tensors.
#pragma once

// X(name of the operator and of the cell in Python, type)
#define RNNFAST_FOR_EACH_CELL(X)                           \
  X(rnn_tanh, ::rnnfast::ElmanCell<::rnnfast::Tanh>)       \
  X(rnn_relu, ::rnnfast::ElmanCell<::rnnfast::Relu>)       \
  X(rnn_sigmoid, ::rnnfast::ElmanCell<::rnnfast::Sigmoid>) \
  X(lstm, ::rnnfast::LstmCell)                             \
  X(gru, ::rnnfast::GruCell)

namespace rnnfast {

enum class CellKind : int {
#define RNNFAST_CELL_KIND(name, Type) name,
  RNNFAST_FOR_EACH_CELL(RNNFAST_CELL_KIND)
#undef RNNFAST_CELL_KIND
};

}  // namespace rnnfast
