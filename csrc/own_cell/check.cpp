// Owns: the compilation of a header of equations alone, with what a layer asks of its struct: where that fails, the
// compiler's messages are about the header. Must not know: layers.
#include "../cell/cells.h"
#include "../cell/dual.h"

namespace rnnfast {
namespace {

static_assert(OwnCell::kGates >= 1 && OwnCell::kGates <= kMaxGates, "kGates: a cell has 1 to 16 gates");
static_assert(OwnCell::kStates == 1 || OwnCell::kStates == 2, "kStates: a cell has one state, h, or two, h and c");
static_assert(OwnCell::kSaved >= 0, "kSaved: the number of values that forward keeps for backward");
static_assert(OwnCell::kSplitGates || !OwnCell::kSplitGates, "kSplitGates: true or false");
static_assert(is_diagonal<OwnCell> || !is_diagonal<OwnCell>, "kDiagonal: true or false, or not there");

template <class Cell, class V>
[[maybe_unused]] void use() {
  constexpr int kGates = Cell::kGates, kStates = Cell::kStates;
  V igates[kGates], hgates[kGates], prev[kStates], state[kStates], saved[Cell::kSaved + 1];
  Cell::forward(igates, hgates, prev, state, saved);
  V grad_state[kStates], grad_igates[kGates], grad_hgates[kGates], grad_prev[kStates];
  Cell::backward(saved, prev, state, grad_state, grad_igates, grad_hgates, grad_prev);
  if constexpr (kStates == 2) {
    Cell::hidden(saved, state);
    Cell::candidate(saved, prev);
  }
  if constexpr (has_tangent<Cell>) {
    V t_igates[kGates], t_hgates[kGates], t_prev[kStates], t_state[kStates], t_saved[Cell::kSaved + 1];
    Cell::tangent(saved, prev, state, t_igates, t_hgates, t_prev, t_state, t_saved);
  }
}

template void use<OwnCell, Dual<float>>();

}  // namespace
}  // namespace rnnfast
