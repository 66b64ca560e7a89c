// Owns: the equations of layer normalisation, forward and backward, for one element of a row whose statistics are
// known. Must not know: cells, how statistics are summed.
#pragma once

#include <cmath>

#include "host_device.h"

namespace rnnfast {

// n = (x - mean) / sqrt(variance + epsilon)   y = weight n + bias      the variance is the mean of (x - mean)^2
//
//   igates = norm_ih LN(W_ih x) + b_ih   hgates = norm_hh LN(W_hh h) + b_hh      over all gates of a row, G*H elements
//   h' = o tanh(norm_c LN(c') + norm_bias_c)                                     LSTM, over its H units
//
// where the biases are absent in a layer without them. c' itself goes on as it is.
// Ba, Kiros and Hinton, "Layer Normalization", arXiv:1607.06450 (2016), with its LSTM.
constexpr double kNormEpsilon = 1e-5;

template <class T>
RNNFAST_HOST_DEVICE T norm_scale(T variance) {
  using std::sqrt;
  return T(1) / sqrt(variance + T(kNormEpsilon));
}

// scale: norm_scale of the row's variance
template <class V>
RNNFAST_HOST_DEVICE V normalised(const V& x, const V& mean, const V& scale) {
  return (x - mean) * scale;
}

// The gradient of x from that of n, and the row's means of grad and of grad n.
template <class V>
RNNFAST_HOST_DEVICE V normalised_backward(const V& n, const V& scale, const V& grad, const V& mean_grad,
                                          const V& mean_grad_n) {
  return scale * (grad - mean_grad - n * mean_grad_n);
}

}  // namespace rnnfast
