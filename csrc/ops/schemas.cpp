// Owns: the schemas of torch.ops.rnnfast.*; docs/ARCHITECTURE.md says what every argument means.
// Must not know: how an operator runs.
#include <torch/library.h>

#include "signatures.h"

#define RNNFAST_LAYER_ARGUMENTS \
  "Tensor input, Tensor h0, Tensor? c0, Tensor[] weights, Tensor? batch_sizes, Tensor? lengths, Tensor? reset"
#define RNNFAST_GRADIENT_ARGUMENTS "Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_c"
#define RNNFAST_TANGENT_ARGUMENTS "Tensor? t_input, Tensor? t_h0, Tensor? t_c0, Tensor[] t_weights"
#define RNNFAST_GRADIENT_TANGENT_ARGUMENTS \
  "Tensor? t_grad_output, Tensor? t_grad_h_n, Tensor? t_grad_c_n, Tensor? t_grad_c"
// Recurrent dropout and zoneout: noise is empty or has their probabilities, of h's zoneout second and of c's third, and
// perhaps, fourth, the number of the call's first unit in the layer that the seeds belong to.
// With layer_norm, the weights of a direction end with norm_ih, norm_hh and, with two states, norm_c, norm_bias_c.
#define RNNFAST_VARIANTS "Tensor? seed=None, float[] noise=[], bool layer_norm=False"
#define RNNFAST_KEPT "Tensor output, Tensor c, Tensor saved"
#define RNNFAST_STATES "(Tensor output, Tensor h_n, Tensor c_n, Tensor c"
#define RNNFAST_STATE_TANGENTS "(Tensor t_output, Tensor t_h_n, Tensor t_c_n, Tensor t_c"
#define RNNFAST_GRADIENT_TANGENTS "Tensor t_grad_input, Tensor t_grad_h0, Tensor t_grad_c0, Tensor[] t_grad_weights)"
#define RNNFAST_GRADIENTS "(Tensor grad_input, Tensor grad_h0, Tensor grad_c0, Tensor[] grad_weights"

#define RNNFAST_DEFINE_LIBRARY(name, m) TORCH_LIBRARY(name, m)  // where name is expanded
RNNFAST_DEFINE_LIBRARY(RNNFAST_LIBRARY, m) {
  // One layer over a whole sequence, its gradient, and the derivatives of both along a tangent.
#define RNNFAST_SCHEMAS(name, Type)                                                                                  \
  m.def(#name "(" RNNFAST_LAYER_ARGUMENTS ", int save, " RNNFAST_VARIANTS ") -> " RNNFAST_STATES ", Tensor saved)"); \
  m.def(#name "_backward(" RNNFAST_GRADIENT_ARGUMENTS ", " RNNFAST_LAYER_ARGUMENTS ", " RNNFAST_KEPT                 \
              ", bool[4] output_mask, " RNNFAST_VARIANTS ") -> " RNNFAST_GRADIENTS ")");                             \
  m.def(#name "_backward_with_states(" RNNFAST_GRADIENT_ARGUMENTS ", " RNNFAST_LAYER_ARGUMENTS ", " RNNFAST_KEPT     \
              ", bool[4] output_mask) -> " RNNFAST_GRADIENTS ", Tensor grad_states)");                               \
  m.def(#name "_grouped_backward(" RNNFAST_GRADIENT_ARGUMENTS ", " RNNFAST_LAYER_ARGUMENTS ", " RNNFAST_KEPT         \
              ", bool[4] output_mask, int groups) -> " RNNFAST_GRADIENTS ")");                                       \
  m.def(#name "_jvp(" RNNFAST_TANGENT_ARGUMENTS ", " RNNFAST_LAYER_ARGUMENTS ", " RNNFAST_KEPT                       \
              ") -> " RNNFAST_STATE_TANGENTS ")");                                                                   \
  m.def(#name "_backward_jvp(" RNNFAST_GRADIENT_TANGENT_ARGUMENTS ", " RNNFAST_TANGENT_ARGUMENTS                     \
              ", " RNNFAST_GRADIENT_ARGUMENTS ", " RNNFAST_LAYER_ARGUMENTS ", " RNNFAST_KEPT                         \
              ", bool[4] output_mask, Tensor? grad_states=None) -> " RNNFAST_STATE_TANGENTS                          \
              ", " RNNFAST_GRADIENT_TANGENTS);
  RNNFAST_FOR_EACH_CELL(RNNFAST_SCHEMAS)
#undef RNNFAST_SCHEMAS

  // Derivatives that have no kernel, differentiable any number of times; implemented in rnnfast/formula.py.
  m.def("reference(str cell, " RNNFAST_LAYER_ARGUMENTS ", " RNNFAST_VARIANTS ") -> " RNNFAST_STATES ")");
  m.def("reference_backward(str cell, " RNNFAST_GRADIENT_ARGUMENTS ", " RNNFAST_LAYER_ARGUMENTS
        ", bool[4] output_mask, " RNNFAST_VARIANTS ") -> " RNNFAST_GRADIENTS ")");
  m.def("reference_jvp(str cell, " RNNFAST_TANGENT_ARGUMENTS ", " RNNFAST_LAYER_ARGUMENTS ") -> " RNNFAST_STATE_TANGENTS
        ")");
  m.def("reference_backward_jvp(str cell, " RNNFAST_GRADIENT_TANGENT_ARGUMENTS ", " RNNFAST_TANGENT_ARGUMENTS
        ", " RNNFAST_GRADIENT_ARGUMENTS ", " RNNFAST_LAYER_ARGUMENTS ", bool[4] output_mask) -> " RNNFAST_STATE_TANGENTS
        ", " RNNFAST_GRADIENT_TANGENTS);
}
