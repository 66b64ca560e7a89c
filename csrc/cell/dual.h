// Owns: dual numbers, a value with its derivative along one direction. A cell's backward evaluated on them is the
// derivative of backward.
// Must not know: pointers, indices, batches.
#pragma once

#include "activations.h"

namespace rnnfast {

template <class V>
struct Dual {
  V value, tangent;

  Dual() = default;
  RNNFAST_HOST_DEVICE Dual(V value, V tangent) : value(value), tangent(tangent) {}
  // A constant; cells write V(0) and V(0.01).
  explicit RNNFAST_HOST_DEVICE Dual(double constant) : value(constant), tangent(0) {}

  friend RNNFAST_HOST_DEVICE Dual operator+(const Dual& a, const Dual& b) {
    return {a.value + b.value, a.tangent + b.tangent};
  }
  friend RNNFAST_HOST_DEVICE Dual operator-(const Dual& a, const Dual& b) {
    return {a.value - b.value, a.tangent - b.tangent};
  }
  friend RNNFAST_HOST_DEVICE Dual operator*(const Dual& a, const Dual& b) {
    return {a.value * b.value, a.value * b.tangent + a.tangent * b.value};
  }
  friend RNNFAST_HOST_DEVICE Dual tanh(const Dual& x) {
    const V y = tanh(x.value);
    return {y, x.tangent * Tanh::derivative(y)};
  }
  friend RNNFAST_HOST_DEVICE Dual sigmoid(const Dual& x) {
    const V y = sigmoid(x.value);
    return {y, x.tangent * Sigmoid::derivative(y)};
  }
  friend RNNFAST_HOST_DEVICE Dual relu(const Dual& x) {
    const V y = relu(x.value);
    return {y, x.tangent * Relu::derivative(y)};
  }
  // A step, whose derivative is zero wherever it has one.
  friend RNNFAST_HOST_DEVICE Dual relu_mask(const Dual& y) { return {relu_mask(y.value), V(0)}; }
};

}  // namespace rnnfast
