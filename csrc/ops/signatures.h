// Owns: the C++ types of the operators of schemas.cpp, and how to call them through the dispatcher.
// Must not know: what an operator does.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cell/cells.h"

// The namespace of the operators. A cell that is compiled by itself has one of its own.
#ifndef RNNFAST_LIBRARY
#define RNNFAST_LIBRARY rnnfast
#endif

namespace rnnfast::ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// output, h_n, c_n, c, saved
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
// grad_input, grad_h0, grad_c0, grad_weights
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;
// The same, then grad_states
using BackwardWithStatesResult = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>, Tensor>;
using OutputMask = std::array<bool, 4>;
// The tangents of output, h_n, c_n, c
using JvpResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;
// The same, then the tangents of BackwardResult
using BackwardJvpResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

using ForwardSignature = ForwardResult(const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
                                       at::TensorList weights, const OptionalTensor& batch_sizes,
                                       const OptionalTensor& lengths, const OptionalTensor& reset, int64_t save,
                                       const OptionalTensor& seed, at::ArrayRef<double> noise, bool layer_norm);

using BackwardSignature = BackwardResult(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                         const OptionalTensor& grad_c_n, const OptionalTensor& grad_c,
                                         const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
                                         at::TensorList weights, const OptionalTensor& batch_sizes,
                                         const OptionalTensor& lengths, const OptionalTensor& reset,
                                         const Tensor& output, const Tensor& c, const Tensor& saved,
                                         OutputMask output_mask, const OptionalTensor& seed, at::ArrayRef<double> noise,
                                         bool layer_norm);

using JvpSignature = JvpResult(const OptionalTensor& t_input, const OptionalTensor& t_h0, const OptionalTensor& t_c0,
                               at::TensorList t_weights, const Tensor& input, const Tensor& h0,
                               const OptionalTensor& c0, at::TensorList weights, const OptionalTensor& batch_sizes,
                               const OptionalTensor& lengths, const OptionalTensor& reset, const Tensor& output,
                               const Tensor& c, const Tensor& saved);

using BackwardJvpSignature = BackwardJvpResult(
    const OptionalTensor& t_grad_output, const OptionalTensor& t_grad_h_n, const OptionalTensor& t_grad_c_n,
    const OptionalTensor& t_grad_c, const OptionalTensor& t_input, const OptionalTensor& t_h0,
    const OptionalTensor& t_c0, at::TensorList t_weights, const OptionalTensor& grad_output,
    const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n, const OptionalTensor& grad_c, const Tensor& input,
    const Tensor& h0, const OptionalTensor& c0, at::TensorList weights, const OptionalTensor& batch_sizes,
    const OptionalTensor& lengths, const OptionalTensor& reset, const Tensor& output, const Tensor& c,
    const Tensor& saved, OutputMask output_mask, const OptionalTensor& grad_states);

using BackwardWithStatesSignature = BackwardWithStatesResult(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
    const OptionalTensor& grad_c, const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
    at::TensorList weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
    const OptionalTensor& reset, const Tensor& output, const Tensor& c, const Tensor& saved, OutputMask output_mask);

using GroupedBackwardSignature = BackwardResult(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                                const OptionalTensor& grad_c_n, const OptionalTensor& grad_c,
                                                const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
                                                at::TensorList weights, const OptionalTensor& batch_sizes,
                                                const OptionalTensor& lengths, const OptionalTensor& reset,
                                                const Tensor& output, const Tensor& c, const Tensor& saved,
                                                OutputMask output_mask, int64_t groups);

// The arguments that all operators of a cell share.
struct LayerArguments {
  const Tensor& input;
  const Tensor& h0;
  const OptionalTensor& c0;
  at::TensorList weights;
  const OptionalTensor& batch_sizes;
  const OptionalTensor& lengths;
  const OptionalTensor& reset;
  bool layer_norm = false;
};

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const std::string& name) {
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow((C10_STRINGIZE(RNNFAST_LIBRARY) "::" + name).c_str(), "")
      .typed<Signature>();
}

// Of every cell, in the order of CellKind.
template <class Signature>
std::vector<c10::TypedOperatorHandle<Signature>> find_operators(const std::string& suffix) {
  return {
#define RNNFAST_FIND(name, Type) find_operator<Signature>(#name + suffix),
      RNNFAST_FOR_EACH_CELL(RNNFAST_FIND)
#undef RNNFAST_FIND
  };
}

// Looked up once.
inline const c10::TypedOperatorHandle<ForwardSignature>& forward_operator(CellKind kind) {
  static const auto found = find_operators<ForwardSignature>("");
  return found[static_cast<size_t>(kind)];
}
inline const c10::TypedOperatorHandle<BackwardSignature>& backward_operator(CellKind kind) {
  static const auto found = find_operators<BackwardSignature>("_backward");
  return found[static_cast<size_t>(kind)];
}
inline const c10::TypedOperatorHandle<BackwardWithStatesSignature>& backward_with_states_operator(CellKind kind) {
  static const auto found = find_operators<BackwardWithStatesSignature>("_backward_with_states");
  return found[static_cast<size_t>(kind)];
}
inline const c10::TypedOperatorHandle<GroupedBackwardSignature>& grouped_backward_operator(CellKind kind) {
  static const auto found = find_operators<GroupedBackwardSignature>("_grouped_backward");
  return found[static_cast<size_t>(kind)];
}
inline const c10::TypedOperatorHandle<JvpSignature>& jvp_operator(CellKind kind) {
  static const auto found = find_operators<JvpSignature>("_jvp");
  return found[static_cast<size_t>(kind)];
}
inline const c10::TypedOperatorHandle<BackwardJvpSignature>& backward_jvp_operator(CellKind kind) {
  static const auto found = find_operators<BackwardJvpSignature>("_backward_jvp");
  return found[static_cast<size_t>(kind)];
}

// A function of a cell's kind and of an operator's arguments, as that operator of one cell.
template <auto function, CellKind kind>
struct OfCell;
template <class Result, class... Arguments, Result (*function)(CellKind, Arguments...), CellKind kind>
struct OfCell<function, kind> {
  static Result run(Arguments... arguments) { return function(kind, std::forward<Arguments>(arguments)...); }
};

}  // namespace rnnfast::ops
