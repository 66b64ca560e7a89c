// Owns: what the operators on the CPU need that leave products over all steps, all or some of them, to ATen: one row
// for each step of each row of the batch, in the tensors' own order. Must not know: engines, equations.
#pragma once

#include "host_cpu.h"
#include "layer.h"

namespace rnnfast::ops {

// The 16-bit types as float32, the others as they are.
Tensor widen(const Tensor& tensor);
OptionalTensor widen(const OptionalTensor& tensor);
std::vector<Tensor> widen(at::TensorList tensors);

// [N, features] of a tensor [T, B, features], or itself when packed. What lies past a length may be anything, NaN too,
// and would spoil a product over all rows; it is zero here.
Tensor rows_within_lengths(const Geometry& geometry, const OptionalTensor& lengths, const Tensor& steps);

// [N, P]: the state that each step of direction d reads, from those of every step and the initial one (undefined:
// zero). float32 or float64.
Tensor previous_states(const Geometry& geometry, const Sequence& sequence, const Tensor& output, const Tensor& h0,
                       int64_t d);

// [N, G*H], for a diagonal cell: what every gate takes of its unit's state [N, H], times `by`: w_hh [G*H], or gradients
// of gates [N, G*H], whose sum over rows is then that of w_hh.
Tensor diagonal_product(const Geometry& geometry, const Tensor& states, const Tensor& by);

}  // namespace rnnfast::ops
