// Owns: what forward and backward of the stepwise engine share: which rows live and where a reset cuts, at one step.
// Must not know: equations, tensors.
#pragma once

#include "device_noise.cuh"
#include "pointwise.cuh"

namespace rnnfast::cuda::stepwise {

// ------------------------------------------------------------------------------------------------ device
// Whether a row of a step lives, which it does up to its length. (The rows of a packed step all live.)
__device__ __forceinline__ bool lives(const int64_t* lengths, int64_t slot, int64_t step) {
  return lengths == nullptr || step < lengths[slot];
}

// The border between step - 1 and step, where a reset at step cuts the states of both directions. A row that does not
// live at step has no such border.
struct Border {
  const bool* reset = nullptr;  // [rows]; null: nothing is cut
  int64_t rows = 0;
  int64_t step = 0;

  __device__ __forceinline__ bool cuts(const int64_t* lengths, int64_t slot) const {
    return reset != nullptr && slot < rows && lives(lengths, slot, step) && reset[slot];
  }
};

// The state a step starts from: the neighbouring step's where the row lives there, else the initial one.
template <class scalar_t>
struct Previous {
  const scalar_t* data = nullptr;  // the neighbouring step's rows
  int64_t stride = 0;
  int64_t rows = 0;
  int64_t step = 0;
  const scalar_t* initial = nullptr;  // [B, features], contiguous

  __device__ __forceinline__ const scalar_t* row(const int64_t* lengths, int64_t slot, int64_t features) const {
    return slot < rows && lives(lengths, slot, step) ? data + slot * stride : initial + slot * features;
  }
};

// ------------------------------------------------------------------------------------------------ host
// Where a direction stands: the step it computes, and the one it comes from.
struct Position {
  int64_t step, previous;
  bool has_previous;

  // index counts the steps in the direction's own order.
  Position(const Sequence& sequence, bool reverse, int64_t index)
      : step(reverse ? sequence.steps - 1 - index : index),
        previous(reverse ? step + 1 : step - 1),
        has_previous(index > 0) {}
};

// The border a direction crosses when it enters a step. There is none where the reverse direction starts.
inline Border border_into(const Sequence& sequence, bool reverse, const Position& at) {
  if (sequence.reset == nullptr || (reverse && !at.has_previous)) return {};
  const int64_t step = reverse ? at.previous : at.step;
  return {sequence.reset + sequence.offset(step), sequence.batch_size(step), step};
}

template <class scalar_t>
Previous<scalar_t> previous_rows(const Sequence& sequence, const Position& at, const Rows& rows, const void* initial) {
  Previous<scalar_t> previous;
  previous.initial = static_cast<const scalar_t*>(initial);
  if (at.has_previous) {
    previous.data = static_cast<const scalar_t*>(rows.data) + rows.at(sequence, at.previous, 0);
    previous.stride = rows.stride_b;
    previous.rows = sequence.batch_size(at.previous);
    previous.step = at.previous;
  }
  return previous;
}

template <class scalar_t>
scalar_t* row_pointer(const Sequence& sequence, const Rows& rows, int64_t step) {
  return rows.data ? static_cast<scalar_t*>(rows.data) + rows.at(sequence, step, 0) : nullptr;
}

// How many rows a step's launch is for; a direction that is not there has none. A packed step may have none at all.
template <class Step>
int64_t most_rows(const Step& step) {
  return std::max(step.direction[0].rows, step.direction[1].rows);
}

template <class T>
T* advance(T* pointer, int64_t elements) {
  return pointer ? pointer + elements : nullptr;
}

}  // namespace rnnfast::cuda::stepwise
