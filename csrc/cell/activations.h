// Owns: the nonlinearities of a recurrent cell and their derivatives, for scalars.
// A SIMD type brings its own tanh(V), sigmoid(V) and relu(V) in its own namespace, where argument-dependent lookup
// finds them; the cells call the functions unqualified.
// Must not know: pointers, indices, batches.
#pragma once

#include <cmath>

#include "host_device.h"

namespace rnnfast {

RNNFAST_HOST_DEVICE float tanh(float x) { return ::tanhf(x); }
RNNFAST_HOST_DEVICE double tanh(double x) { return ::tanh(x); }

// exp(-x) overflows to infinity for very negative x, and 1 / infinity is the right limit, 0.
RNNFAST_HOST_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + ::expf(-x)); }
RNNFAST_HOST_DEVICE double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }

// Written so that NaN passes through.
RNNFAST_HOST_DEVICE float relu(float x) { return x < 0.0f ? 0.0f : x; }
RNNFAST_HOST_DEVICE double relu(double x) { return x < 0.0 ? 0.0 : x; }

// 1 where y > 0, 0 elsewhere; y is the output of relu.
RNNFAST_HOST_DEVICE float relu_mask(float y) { return y > 0.0f ? 1.0f : 0.0f; }
RNNFAST_HOST_DEVICE double relu_mask(double y) { return y > 0.0 ? 1.0 : 0.0; }

// The derivative of each nonlinearity is taken from its output y, so that nothing else need be kept.
struct Tanh {
  template <class V>
  static RNNFAST_HOST_DEVICE V value(V x) {
    return tanh(x);
  }
  template <class V>
  static RNNFAST_HOST_DEVICE V derivative(V y) {
    return V(1) - y * y;
  }
};

struct Sigmoid {
  template <class V>
  static RNNFAST_HOST_DEVICE V value(V x) {
    return sigmoid(x);
  }
  template <class V>
  static RNNFAST_HOST_DEVICE V derivative(V y) {
    return y * (V(1) - y);
  }
};

struct Relu {
  template <class V>
  static RNNFAST_HOST_DEVICE V value(V x) {
    return relu(x);
  }
  template <class V>
  static RNNFAST_HOST_DEVICE V derivative(V y) {
    return relu_mask(y);
  }
};

// x where x > 0, kSlope x elsewhere, as torch.nn.functional.leaky_relu has it by default.
struct LeakyRelu {
  static constexpr double kSlope = 0.01;
  template <class V>
  static RNNFAST_HOST_DEVICE V value(V x) {
    return relu(x) - V(kSlope) * relu(V(0) - x);
  }
  template <class V>
  static RNNFAST_HOST_DEVICE V derivative(V y) {
    return relu_mask(y) + V(kSlope) * (V(1) - relu_mask(y));
  }
};

// No nonlinearity: a linear recurrence.
struct Identity {
  template <class V>
  static RNNFAST_HOST_DEVICE V value(V x) {
    return x;
  }
  template <class V>
  static RNNFAST_HOST_DEVICE V derivative(V) {
    return V(1);
  }
};

}  // namespace rnnfast
