// Owns: the schemas of torch.ops.rnnfast.*; docs/ARCHITECTURE.md says what every argument means.
// Must not know: how an operator runs.
#include <torch/library.h>

#include <string>

#include "cell/cells.h"

#define RNNFAST_LAYER_ARGUMENTS \
  "Tensor input, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, Tensor? reset"
#define RNNFAST_GRADIENT_ARGUMENTS "Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_c"
#define RNNFAST_STATES "(Tensor output, Tensor h_n, Tensor c_n, Tensor c"
#define RNNFAST_GRADIENTS "(Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor[] grad_weights)"

TORCH_LIBRARY(rnnfast, m) {
  // One layer over a whole sequence, and its gradient.
#define RNNFAST_SCHEMAS(name, Type)                                                            \
  m.def(#name "(" RNNFAST_LAYER_ARGUMENTS ", int save) -> " RNNFAST_STATES ", Tensor saved)"); \
  m.def(#name "_backward(" RNNFAST_GRADIENT_ARGUMENTS ", " RNNFAST_LAYER_ARGUMENTS             \
              ", Tensor output, Tensor c, Tensor saved, bool[4] output_mask) -> " RNNFAST_GRADIENTS);
  RNNFAST_FOR_EACH_CELL(RNNFAST_SCHEMAS)
#undef RNNFAST_SCHEMAS

  // The same two by the plain-PyTorch formula, differentiable any number of times; implemented in rnnfast/ops.py.
  m.def("reference(str cell, " RNNFAST_LAYER_ARGUMENTS ") -> " RNNFAST_STATES ")");
  m.def("reference_backward(str cell, " RNNFAST_GRADIENT_ARGUMENTS ", " RNNFAST_LAYER_ARGUMENTS
        ", bool[4] output_mask) -> " RNNFAST_GRADIENTS);
}
