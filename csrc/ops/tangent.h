// Owns: the operators <cell>_jvp and <cell>_backward_jvp of every device, up to the engine: checks, results, and by
// ATen over all steps what the tangents of weights and biases give to those of the gates, and the gates themselves
// where the cell has no tangent of its own. Must not know: equations, loops over time, which device it is.
//
// A device is a class that is made of (geometry, arguments, tensors) for each call, and has
//     kProducts                             whether its engine makes the products with the input's tangent, and those
//                                           that give the gradients of the weights
//     sequence(), lengths()                 time, and the lengths where the rows are, if there are any
//     previous_states(states, initial, d)   [N, P]: the state that each step of direction d reads
//     run(params, tensors)                  the engine, and the products that it leaves
#pragma once

#include <ATen/Functions.h>

#include "layer.h"
#include "products.h"

namespace rnnfast::ops {

using Gradients = std::array<OptionalTensor, 4>;  // of output, h_n, c_n, c

// sum + a b, either of which may be undefined: zero.
inline void add_product(Tensor& sum, const Tensor& a, const Tensor& b) {
  if (!a.defined() || !b.defined()) return;
  sum.defined() ? sum.addmm_(a, b) : sum = at::mm(a, b);
}

inline void add_term(Tensor& sum, const Tensor& term) { sum.defined() ? sum.add_(term) : sum = term; }

// A value with its tangent, which is undefined where it is zero.
struct DualTensor {
  Tensor value, tangent;

  DualRows rows(const Geometry& g, int64_t first = 0) const {
    return {rows_of(g, value, first), rows_of(g, tangent, first)};
  }
  DualPointer pointer(int64_t d) const { return {block(value, d), block(tangent, d)}; }
  DualPointer pointer() const { return {data(value), data(tangent)}; }

 private:
  static const void* data(const Tensor& tensor) { return tensor.defined() ? tensor.const_data_ptr() : nullptr; }
};

inline DualTensor contiguous_pair(const OptionalTensor& value, const OptionalTensor& tangent) {
  return {contiguous_or_undefined(value), contiguous_or_undefined(tangent)};
}
inline DualTensor steps_pair(const OptionalTensor& value, const OptionalTensor& tangent) {
  return {value ? contiguous_features(*value) : Tensor(), tangent ? contiguous_features(*tangent) : Tensor()};
}

// A layer's tensors with their tangents, and what is wanted of it.
struct TangentTensors {
  DualTensor input;  // contiguous features
  DualTensor h0, c0, output, c;
  std::vector<DualTensor> weights;  // in the operator's order
  // What products outside the engine read, undefined where there are none.
  Tensor rows;                         // [N, I] the input, zero past a row's length
  Tensor previous[2];                  // [N, P] the state that each step of a direction reads
  Tensor t_grad_input;                 // undefined: not wanted
  std::vector<Tensor> t_grad_weights;  // none: not wanted
};

// One layer with the tangents of its arguments. An undefined tangent is zero.
template <class Device>
class TangentLayer {
 public:
  TangentLayer(const Geometry& geometry, const LayerArguments& arguments, const OptionalTensor& t_input,
               const OptionalTensor& t_h0, const OptionalTensor& t_c0, at::TensorList t_weights, const Tensor& output,
               const Tensor& c, const Tensor& saved)
      : g_(geometry), layer_(arguments), device_(geometry, arguments, layer_), saved_(saved) {
    const Tensor& like = layer_.input;
    const bool two_states = g_.info.states == 2, gaps = device_.lengths().has_value();
    t_.h0 = {layer_.h0, contiguous_or_undefined(t_h0)};
    t_.c0 = {layer_.c0, contiguous_or_undefined(t_c0)};
    t_.output = {contiguous_features(output), empty_steps(g_, like, g_.directions * g_.output_size, gaps)};
    if (two_states) t_.c = {contiguous_features(c), empty_steps(g_, like, g_.directions * g_.hidden_size, gaps)};
    t_h_n_ = at::empty_like(layer_.h0);
    t_c_n_ = two_states ? at::empty_like(layer_.c0) : Tensor();
    t_.input = {layer_.input, t_input ? contiguous_features(*t_input) : Tensor()};
    for (size_t i = 0; i < layer_.weights.size(); ++i)
      t_.weights.push_back({layer_.weights[i], t_weights.empty() ? Tensor() : t_weights[i].contiguous()});
    params_.cell = g_.cell;
    params_.dtype = g_.dtype;
    params_.input_size = g_.input_size;
    params_.hidden_size = g_.hidden_size;
    params_.directions = static_cast<int>(g_.directions);
    params_.sequence = device_.sequence();
    params_.input = t_.input.rows(g_);
    for (int64_t d = 0; d < g_.directions; ++d) {
      DirectionTangent& direction = params_.direction[d];
      direction.reverse = d == 1;
      direction.w_ih = weights(d).w_ih->pointer();
      direction.w_hh = weights(d).w_hh->pointer();
      direction.h0 = t_.h0.pointer(d);
      direction.output = t_.output.rows(g_, d * g_.output_size);
      direction.t_h_n = block(t_h_n_, d);
      if (saved_.numel() > 0) direction.saved = block(saved_, d);
      if (!two_states) continue;
      direction.c0 = t_.c0.pointer(d);
      direction.c = t_.c.rows(g_, d * g_.hidden_size);
      direction.t_c_n = block(t_c_n_, d);
    }
  }

  // The tangents of the results.
  JvpResult forward() {
    if (empty()) {
      pass_states();
    } else {
      run();
    }
    return result();
  }

  // These, and the tangents of the gradients that the mask wants.
  BackwardJvpResult backward(const Gradients& grads, const Gradients& t_grads, const OptionalTensor& grad_states,
                             const OutputMask& mask) {
    const Tensor& like = layer_.input;
    const DualTensor grad_output = steps_pair(grads[0], t_grads[0]), grad_h_n = contiguous_pair(grads[1], t_grads[1]);
    const DualTensor grad_c_n = contiguous_pair(grads[2], t_grads[2]), grad_c = steps_pair(grads[3], t_grads[3]);
    const Tensor every_grad = grad_states ? contiguous_features(*grad_states) : Tensor();
    const bool two_states = g_.info.states == 2;
    if (mask[0]) t_.t_grad_input = empty_steps(g_, like, g_.input_size, /*gaps=*/device_.lengths().has_value());
    Tensor t_grad_h0 = at::empty_like(layer_.h0), t_grad_c0 = two_states ? at::empty_like(layer_.c0) : nothing();
    if (mask[3])
      for (const Tensor& weight : layer_.weights) t_.t_grad_weights.push_back(at::empty_like(weight));
    if (empty()) {
      pass_states();
      pass(t_grad_h0, grad_h_n.tangent);
      if (two_states) pass(t_grad_c0, grad_c_n.tangent);
      if (mask[0]) t_.t_grad_input.zero_();
      for (Tensor& grad : t_.t_grad_weights) grad.zero_();
    } else {
      // Without any of them the tangents of the results were all that was wanted.
      params_.backward = mask[0] || mask[1] || mask[2] || mask[3];
      if (mask[0]) params_.t_grad_input = rows_of(g_, t_.t_grad_input, 0);
      for (int64_t d = 0; d < g_.directions; ++d) {
        DirectionTangent& direction = params_.direction[d];
        direction.grad_states = rows_of(g_, every_grad, d * g_.output_size);
        direction.grad_output = grad_output.rows(g_, d * g_.output_size);
        direction.grad_h_n = grad_h_n.pointer(d);
        direction.t_grad_h0 = block(t_grad_h0, d);
        if (two_states) {
          direction.grad_c = grad_c.rows(g_, d * g_.hidden_size);
          direction.grad_c_n = grad_c_n.pointer(d);
          direction.t_grad_c0 = block(t_grad_c0, d);
        }
        if (!mask[3]) continue;
        const WeightView of_weights(g_, t_.t_grad_weights.data(), d);
        direction.t_grad_w_ih = of_weights.w_ih->data_ptr();
        direction.t_grad_w_hh = of_weights.w_hh->data_ptr();
        if (!g_.biases) continue;
        direction.t_grad_b_ih = of_weights.b_ih->data_ptr();
        direction.t_grad_b_hh = of_weights.b_hh->data_ptr();
      }
      run();
    }
    return std::tuple_cat(result(),
                          BackwardResult(mask[0] ? t_.t_grad_input : nothing(), mask[1] ? t_grad_h0 : nothing(),
                                         mask[2] ? t_grad_c0 : nothing(), t_.t_grad_weights));
  }

 private:
  Tensor nothing() const { return at::empty({0}, layer_.input.options()); }
  bool empty() const { return g_.empty() || params_.sequence.rows == 0; }
  WeightView<const DualTensor> weights(int64_t d) const { return {g_, t_.weights.data(), d}; }
  static void pass(Tensor& to, const Tensor& from) { from.defined() ? to.copy_(from) : to.zero_(); }

  void pass_states() {
    t_.output.tangent.zero_();
    pass(t_h_n_, t_.h0.tangent);
    if (g_.info.states == 1) return;
    t_.c.tangent.zero_();
    pass(t_c_n_, t_.c0.tangent);
  }

  JvpResult result() const {
    if (g_.info.states == 1) return {t_.output.tangent, t_h_n_, nothing(), nothing()};
    return {t_.output.tangent, t_h_n_, t_c_n_, t_.c.tangent};
  }

  // Of a contiguous [N, G*H], which is kept alive for the engine.
  Rows gate_rows(const Tensor& gates) {
    if (!gates.defined()) return {};
    gates_.push_back(gates);
    return {gates.data_ptr(), g_.packed ? 0 : g_.batch * gates.stride(0), gates.stride(0)};
  }

  // sum + what the gates take of states [N, P] by w_hh.
  void add_hidden_product(Tensor& sum, const Tensor& states, const Tensor& w_hh) const {
    if (!g_.info.diagonal) return add_product(sum, states, w_hh.t());
    add_term(sum, diagonal_product(g_, states, w_hh));
  }

  // The parts of the gates' tangents that come from those of weights and biases, which are there all together, and from
  // the input's, unless the engine makes them.
  void add_gate_tangents(int64_t d) {
    const auto w = weights(d);
    Tensor igates, hgates;
    if (!Device::kProducts && t_.input.tangent.defined())
      add_product(igates, t_.input.tangent.reshape({g_.rows, g_.input_size}), w.w_ih->value.t());
    if (w.w_ih->tangent.defined()) {
      Tensor& of_state = g_.info.split_gates ? hgates : igates;
      add_product(igates, t_.rows, w.w_ih->tangent.t());
      add_hidden_product(of_state, t_.previous[d], w.w_hh->tangent);
      if (g_.biases) {
        igates.add_(w.b_ih->tangent);
        of_state.add_(w.b_hh->tangent);
      }
    }
    params_.direction[d].t_igates = gate_rows(igates);
    params_.direction[d].t_hgates = gate_rows(hgates);
  }

  // The gates themselves, for a cell without a tangent of its own.
  void add_gates(int64_t d) {
    const auto w = weights(d);
    for (const bool hidden : {false, true}) {
      Tensor values;
      if (hidden) {
        add_hidden_product(values, t_.previous[d], w.w_hh->value);
      } else {
        add_product(values, t_.rows, w.w_ih->value.t());
      }
      if (g_.biases) values.add_((hidden ? w.b_hh : w.b_ih)->value);
      (hidden ? params_.direction[d].hgates : params_.direction[d].igates) = gate_rows(values);
    }
  }

  void run() {
    const bool products = weights(0).w_ih->tangent.defined() || !g_.info.tangent ||
                          (!Device::kProducts && params_.backward && !t_.t_grad_weights.empty());
    if (products) t_.rows = rows_within_lengths(g_, device_.lengths(), t_.input.value);
    for (int64_t d = 0; d < g_.directions; ++d) {
      if (products) t_.previous[d] = device_.previous_states(t_.output.value, t_.h0.value, d);
      add_gate_tangents(d);
      if (!g_.info.tangent) add_gates(d);
    }
    device_.run(params_, t_);
  }

  const Geometry g_;
  const LayerTensors layer_;
  const Device device_;
  const Tensor saved_;
  TangentTensors t_;
  std::vector<Tensor> gates_;
  Tensor t_h_n_, t_c_n_;
  LayerTangent params_;
};

inline void check_tangent(const CellInfo& cell, const char* name, const OptionalTensor& tangent, const Tensor& of) {
  if (!tangent) return;
  TORCH_CHECK(tangent->sizes() == of.sizes(), "rnnfast.", cell.name, ": ", name, " has shape ", tangent->sizes(),
              ", it takes that of what it is the tangent of, ", of.sizes());
  TORCH_CHECK_VALUE(tangent->scalar_type() == of.scalar_type(), "rnnfast.", cell.name, ": ", name, " has dtype ",
                    tangent->scalar_type(), ", it takes that of what it is the tangent of, ", of.scalar_type());
  TORCH_CHECK(tangent->device() == of.device(), "rnnfast.", cell.name, ": ", name, " is on ", tangent->device(),
              ", it takes the device of what it is the tangent of, ", of.device());
}

inline void check_tangents(const Geometry& g, const LayerArguments& a, const OptionalTensor& t_input,
                           const OptionalTensor& t_h0, const OptionalTensor& t_c0, at::TensorList t_weights) {
  TORCH_CHECK(!g.projection, "rnnfast.", g.info.name, ": a layer with a projection has no kernel for tangents");
  TORCH_CHECK(!g.info.two_products, "rnnfast.", g.info.name,
              ": a cell with two products a step has no kernel for tangents");
  check_tangent(g.info, "t_input", t_input, a.input);
  check_tangent(g.info, "t_h0", t_h0, a.h0);
  if (a.c0) check_tangent(g.info, "t_c0", t_c0, *a.c0);
  TORCH_CHECK(t_weights.empty() || t_weights.size() == a.weights.size(), "rnnfast.", g.info.name, ": t_weights has ",
              t_weights.size(), " tensors, it takes none or as many as weights, ", a.weights.size());
  for (size_t i = 0; i < t_weights.size(); ++i)
    check_tangent(g.info, "a tangent of a weight", t_weights[i], a.weights[i]);
}

// The operator's arguments in float32 or float64, checked, with the states and gates that backward reads.
template <class Device, CellKind kind>
class TangentCall {
 public:
  TangentCall(const OptionalTensor& t_input, const OptionalTensor& t_h0, const OptionalTensor& t_c0,
              at::TensorList t_weights, const LayerArguments& a, const Gradients& grads, const Tensor& output,
              const Tensor& c, const Tensor& saved)
      : dtype_(a.input.scalar_type()) {
    const Geometry given = check_layer(kind, a);
    check_gradients(given, a, grads[0], grads[1], grads[2], grads[3], output, c, saved);
    check_tangents(given, a, t_input, t_h0, t_c0, t_weights);
    const Tensor input = widen(a.input), h0 = widen(a.h0);
    const OptionalTensor c0 = widen(a.c0);
    const std::vector<Tensor> weights = widen(a.weights);
    const LayerArguments wide{input, h0, c0, weights, a.batch_sizes, a.lengths, a.reset};
    Tensor gates = widen(saved);
    if (saved.numel() == 0 && given.info.saved > 0)
      gates = std::get<4>(forward_operator(kind).call(input, h0, c0, weights, a.batch_sizes, a.lengths, a.reset,
                                                      static_cast<int64_t>(Save::gates), std::nullopt, {}, false));
    layer_.emplace(check_layer(kind, wide), wide, widen(t_input), widen(t_h0), widen(t_c0), widen(t_weights),
                   widen(output), widen(c), gates);
  }

  TangentLayer<Device>& layer() { return *layer_; }
  Tensor narrow(const Tensor& tensor) const { return tensor.to(dtype_); }

 private:
  const at::ScalarType dtype_;
  std::optional<TangentLayer<Device>> layer_;
};

template <class Device, CellKind kind>
JvpResult tangent_jvp(const OptionalTensor& t_input, const OptionalTensor& t_h0, const OptionalTensor& t_c0,
                      at::TensorList t_weights, const Tensor& input, const Tensor& h0, const OptionalTensor& c0,
                      at::TensorList weights, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                      const OptionalTensor& reset, const Tensor& output, const Tensor& c, const Tensor& saved) {
  TangentCall<Device, kind> call(t_input, t_h0, t_c0, t_weights, {input, h0, c0, weights, batch_sizes, lengths, reset},
                                 {}, output, c, saved);
  const auto [t_output, t_h_n, t_c_n, t_c] = call.layer().forward();
  return {call.narrow(t_output), call.narrow(t_h_n), call.narrow(t_c_n), call.narrow(t_c)};
}

template <class Device, CellKind kind>
BackwardJvpResult tangent_backward_jvp(
    const OptionalTensor& t_grad_output, const OptionalTensor& t_grad_h_n, const OptionalTensor& t_grad_c_n,
    const OptionalTensor& t_grad_c, const OptionalTensor& t_input, const OptionalTensor& t_h0,
    const OptionalTensor& t_c0, at::TensorList t_weights, const OptionalTensor& grad_output,
    const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n, const OptionalTensor& grad_c, const Tensor& input,
    const Tensor& h0, const OptionalTensor& c0, at::TensorList weights, const OptionalTensor& batch_sizes,
    const OptionalTensor& lengths, const OptionalTensor& reset, const Tensor& output, const Tensor& c,
    const Tensor& saved, OutputMask output_mask, const OptionalTensor& grad_states) {
  const LayerArguments arguments{input, h0, c0, weights, batch_sizes, lengths, reset};
  Gradients grads{grad_output, grad_h_n, grad_c_n, grad_c};
  Gradients t_grads{t_grad_output, t_grad_h_n, t_grad_c_n, t_grad_c};
  TangentCall<Device, kind> call(t_input, t_h0, t_c0, t_weights, arguments, grads, output, c, saved);
  const Geometry geometry = check_layer(kind, arguments);
  check_gradients(geometry, arguments, t_grad_output, t_grad_h_n, t_grad_c_n, t_grad_c, output, c, saved);
  if (grad_states) check_steps(geometry, "grad_states", *grad_states, input, geometry.output_size);
  for (Gradients* gradients : {&grads, &t_grads})
    for (OptionalTensor& gradient : *gradients) gradient = widen(gradient);
  auto [t_output, t_h_n, t_c_n, t_c, t_grad_input, t_grad_h0, t_grad_c0, t_grad_weights] =
      call.layer().backward(grads, t_grads, widen(grad_states), output_mask);
  for (Tensor& gradient : t_grad_weights) gradient = call.narrow(gradient);
  return {call.narrow(t_output),     call.narrow(t_h_n),     call.narrow(t_c_n),     call.narrow(t_c),
          call.narrow(t_grad_input), call.narrow(t_grad_h0), call.narrow(t_grad_c0), t_grad_weights};
}

}  // namespace rnnfast::ops
