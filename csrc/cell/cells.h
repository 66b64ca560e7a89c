// Owns: the list of cells. A new cell is one header beside this file and one line here; operators, engines, tests and
// benchmarks follow from the list.
// Must not know: engines, tensors.
#pragma once

#include "elman.h"
#include "gru.h"
#include "lstm.h"

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

// What an engine-independent layer needs to know of a cell.
struct CellInfo {
  const char* name;
  int gates;         // rows of W_ih are gates * H
  int states;        // 1: h; 2: h and c
  int saved;         // values per unit and step that backward wants, beside the states
  bool split_gates;  // grad_igates and grad_hgates differ
};

inline CellInfo cell_info(CellKind kind) {
  switch (kind) {
#define RNNFAST_CELL_INFO(name, Type) \
  case CellKind::name:                \
    return {#name, Type::kGates, Type::kStates, Type::kSaved, Type::kSplitGates};
    RNNFAST_FOR_EACH_CELL(RNNFAST_CELL_INFO)
#undef RNNFAST_CELL_INFO
  }
  return {"", 0, 0, 0, false};
}

}  // namespace rnnfast
