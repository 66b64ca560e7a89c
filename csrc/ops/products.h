// Owns: what operators need that leave products over all steps, all or some of them, to ATen: one row for each step of
// each row of the batch, in the tensors' own order. Device-independent. Must not know: engines, equations.
#pragma once

#include "layer.h"

namespace rnnfast::ops {

// The 16-bit types as float32, the others as they are.
Tensor widen(const Tensor& tensor);
OptionalTensor widen(const OptionalTensor& tensor);
std::vector<Tensor> widen(at::TensorList tensors);

// [N, features] of a tensor [T, B, features], or itself when packed. What lies past a length, of lengths on the
// tensor's device, may be anything, NaN too, and would spoil a product over all rows; it is zero here.
Tensor rows_within_lengths(const Geometry& geometry, const OptionalTensor& lengths, const Tensor& steps);

// [N, G*H], for a diagonal cell: what every gate takes of its unit's state [N, H], times `by`: w_hh [G*H], or gradients
// of gates [N, G*H], whose sum over rows is then that of w_hh.
Tensor diagonal_product(const Geometry& geometry, const Tensor& states, const Tensor& by);
// Its sum over rows, [G*H], in float32 for the 16-bit types, without ever having all the products.
Tensor sum_diagonal_product(const Geometry& geometry, const Tensor& states, const Tensor& by);

// Weight gradients of groups of rows apart: row b of the batch is in group b % groups. Throws ValueError where groups
// does not divide the rows of every step, RuntimeError for a layer whose weights are not all covered.
void check_groups(const Geometry& geometry, const Sequence& sequence, int64_t groups);
// [groups, ...] for each weight, in the operator's order, of rows [N, I], of the state that each step of each direction
// read, [N, P], and of the gradients of the gates, [D, N, G*H].
std::vector<Tensor> grouped_gradients(const Geometry& geometry, const Tensor& rows, const std::vector<Tensor>& previous,
                                      const Tensor& grad_igates, const Tensor& grad_hgates, int64_t groups);
// The same where no row has a step.
std::vector<Tensor> empty_grouped_gradients(at::TensorList weights, int64_t groups);

}  // namespace rnnfast::ops
