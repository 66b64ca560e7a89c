// Owns: the checks of an operator's arguments, written once for all devices, and the sizes they establish.
// Must not know: engines, allocation.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "params.h"
#include "signatures.h"

namespace rnnfast::ops {

// The sizes of one layer, as its tensors tell them. The letters are those of params.h.
struct Geometry {
  CellKind cell{};
  CellInfo info{};
  Dtype dtype{};
  int64_t steps = 0;        // T
  int64_t batch = 0;        // B
  int64_t rows = 0;         // N of the tensors: T * B, or the packed rows
  int64_t input_size = 0;   // I
  int64_t hidden_size = 0;  // H
  int64_t output_size = 0;  // P
  int64_t directions = 1;   // D
  bool packed = false;
  bool biases = false;
  bool projection = false;
  bool layer_norm = false;

  int64_t norms_per_direction() const { return layer_norm ? 2 * info.states : 0; }
  int64_t weights_per_direction() const { return 2 + (biases ? 2 : 0) + (projection ? 1 : 0) + norms_per_direction(); }
  // S
  int64_t saved_values() const { return info.saved_values(layer_norm); }
  // Elements of `saved` over N: with layer normalisation more than the S*H of a row.
  int64_t saved_elements_a_row() const {
    const int sums = size_of(dtype) < 4 ? 2 : 1;  // elements of a sum
    return saved_values() * hidden_size + (layer_norm ? kNormNumbers * sums : 0);
  }
  // Whether the two halves of the gates have gradients of their own.
  bool split_gates() const { return info.split_gates || layer_norm; }
  // No step to run, or no unit to run it for.
  bool empty() const { return rows == 0 || hidden_size == 0; }
};

// One direction's weights in an operator's list, or what goes with them in a list of the same order: their gradients,
// their tangents. The order is written here alone. Null: the layer has none.
template <class T>
struct WeightView {
  T *w_ih, *w_hh;
  T *b_ih = nullptr, *b_hh = nullptr;
  T* w_hr = nullptr;
  T *norm_ih = nullptr, *norm_hh = nullptr, *norm_c = nullptr, *norm_bias_c = nullptr;

  WeightView(const Geometry& geometry, T* list, int64_t direction) {
    T* next = list + direction * geometry.weights_per_direction();
    w_ih = next++;
    w_hh = next++;
    if (geometry.biases) {
      b_ih = next++;
      b_hh = next++;
    }
    if (geometry.projection) w_hr = next++;
    if (!geometry.layer_norm) return;
    norm_ih = next++;
    norm_hh = next++;
    if (geometry.info.states == 1) return;
    norm_c = next++;
    norm_bias_c = next++;
  }
};

// Throws ValueError for a dtype that the operator does not take, RuntimeError for a shape, a device, or a dtype other
// than the input's, as torch.nn does. Reads no data, and so does not synchronise with a device.
Geometry check_layer(CellKind cell, const LayerArguments& arguments);

// Throw ValueError for batch_sizes, RuntimeError for lengths, as torch.nn.utils.rnn does, for the values of what
// check_layer has passed. Both tensors are on the CPU.
void check_batch_sizes(const Geometry& geometry, const Tensor& batch_sizes);
void check_lengths(const Geometry& geometry, const Tensor& lengths);

Save check_save(CellKind cell, int64_t save);

// The probabilities of recurrent dropout and zoneout, and the first unit; the seeds are the caller's to enter. Throws
// ValueError for one of these numbers, RuntimeError for what does not go together.
Noise check_noise(const Geometry& geometry, const Tensor& input, const OptionalTensor& seed,
                  at::ArrayRef<double> noise);

// A gradient or state of every step: rows over time of D times `features`.
void check_steps(const Geometry& geometry, const char* argument, const Tensor& tensor, const Tensor& input,
                 int64_t features);

// The gradients, where they are given, have the shapes of what they are gradients of, and the states of every step,
// which backward reads, are there.
void check_gradients(const Geometry& geometry, const LayerArguments& arguments, const OptionalTensor& grad_output,
                     const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n, const OptionalTensor& grad_c,
                     const Tensor& output, const Tensor& c, const Tensor& saved);

}  // namespace rnnfast::ops
