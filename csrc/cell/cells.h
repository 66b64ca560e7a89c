// Owns: the equations of every cell in the list, and what can be said of a cell without them.
// Must not know: engines, tensors.
#pragma once

#include "cell_list.h"

#ifdef RNNFAST_OWN_CELL
#include RNNFAST_OWN_HEADER
namespace rnnfast {
using OwnCell = RNNFAST_OWN_TYPE;
}
#else
#include "elman.h"
#include "gru.h"
#include "gru_reset_before.h"
#include "indrnn.h"
#include "lstm.h"
#endif

namespace rnnfast {

// Whether a cell says what its tangent is. Of one that does not, forward is evaluated on dual numbers.
template <class Cell>
constexpr bool find_tangent(decltype(&Cell::template tangent<float>)*) {
  return true;
}
template <class Cell>
constexpr bool find_tangent(...) {
  return false;
}
template <class Cell>
inline constexpr bool has_tangent = find_tangent<Cell>(nullptr);

// How many gates take W_hh h. Those of a cell that says kFirstGates are followed by others, which take a product of
// what these make of h.
template <class Cell>
constexpr int find_first_gates(decltype(&Cell::kFirstGates)) {
  return Cell::kFirstGates;
}
template <class Cell>
constexpr int find_first_gates(...) {
  return Cell::kGates;
}
template <class Cell>
inline constexpr int first_gates = find_first_gates<Cell>(nullptr);
template <class Cell>
inline constexpr bool has_two_products = first_gates<Cell> < Cell::kGates;

// Whether a unit's gates see its own state alone, which a cell says by kDiagonal = true: w_hh is a vector then.
template <class Cell>
constexpr bool find_diagonal(decltype(&Cell::kDiagonal)) {
  return Cell::kDiagonal;
}
template <class Cell>
constexpr bool find_diagonal(...) {
  return false;
}
template <class Cell>
inline constexpr bool is_diagonal = find_diagonal<Cell>(nullptr);

// Whether a layer of the cell can normalise its gates; with two states, whether backward is in two parts, between which
// stands the normalised c. Cells from outside the package have it not: they compile while somebody waits.
template <class Cell>
constexpr bool find_hidden_gradient(decltype(&Cell::template hidden_backward<float>)*) {
  return true;
}
template <class Cell>
constexpr bool find_hidden_gradient(...) {
  return false;
}
template <class Cell>
inline constexpr bool takes_layer_norm =
#ifdef RNNFAST_OWN_CELL
    false;
#else
    !has_two_products<Cell> && !is_diagonal<Cell> && (Cell::kStates == 1 || find_hidden_gradient<Cell>(nullptr));
#endif

// As many gates as the engines have room for.
constexpr int kMaxGates = 16;

// What can be said of a cell in numbers.
struct CellTraits {
  int gates;         // rows of W_ih are gates * H
  int first_gates;   // those that take W_hh h: all, unless the cell has two products
  int states;        // 1: h; 2: h and c
  int saved;         // values per unit and step that backward wants, beside the states
  bool split_gates;  // grad_igates and grad_hgates differ
  bool two_products;
  bool diagonal;    // w_hh is [G*H]
  bool tangent;     // has a tangent of its own
  bool layer_norm;  // its gates can be normalised

  // S of params.h: what a layer keeps of a unit's step for backward. A normalised one keeps both products of every
  // gate.
  constexpr int saved_values(bool normalised) const { return normalised ? 2 * gates : saved; }
};
template <class Cell>
inline constexpr CellTraits traits_of = {
    Cell::kGates,           first_gates<Cell>, Cell::kStates,     Cell::kSaved,           Cell::kSplitGates,
    has_two_products<Cell>, is_diagonal<Cell>, has_tangent<Cell>, takes_layer_norm<Cell>,
};

// What an engine-independent layer needs to know of a cell.
struct CellInfo : CellTraits {
  const char* name;
  bool persistent;  // has kernels of the persistent CUDA engines
};

// Persistent kernels have matrix products only.
#define RNNFAST_CHECK_PERSISTENT(name, Type) \
  static_assert(!is_diagonal<Type>, #name " is diagonal: it belongs to the list of stepwise cells");
RNNFAST_FOR_EACH_PERSISTENT_CELL(RNNFAST_CHECK_PERSISTENT)
#undef RNNFAST_CHECK_PERSISTENT

#define RNNFAST_CHECK_CELL(name, Type) \
  static_assert(!is_diagonal<Type> || !has_two_products<Type>, #name " has kDiagonal and kFirstGates");
RNNFAST_FOR_EACH_CELL(RNNFAST_CHECK_CELL)
#undef RNNFAST_CHECK_CELL

inline CellInfo cell_info(CellKind kind) {
  switch (kind) {
#define RNNFAST_CELL_INFO(name, Type, persistent) \
  case CellKind::name:                            \
    return {traits_of<Type>, #name, persistent};
#define RNNFAST_PERSISTENT_INFO(name, Type) RNNFAST_CELL_INFO(name, Type, true)
#define RNNFAST_STEPWISE_INFO(name, Type) RNNFAST_CELL_INFO(name, Type, false)
    RNNFAST_FOR_EACH_PERSISTENT_CELL(RNNFAST_PERSISTENT_INFO)
    RNNFAST_FOR_EACH_STEPWISE_CELL(RNNFAST_STEPWISE_INFO)
#undef RNNFAST_STEPWISE_INFO
#undef RNNFAST_PERSISTENT_INFO
#undef RNNFAST_CELL_INFO
  }
  return {{}, "", false};
}

}  // namespace rnnfast
