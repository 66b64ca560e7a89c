// Owns: the equations of every cell in the list, and what can be said of a cell without them.
// Must not know: engines, tensors.
#pragma once

#include "cell_list.h"
#include "elman.h"
#include "gru.h"
#include "lstm.h"

namespace rnnfast {

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
