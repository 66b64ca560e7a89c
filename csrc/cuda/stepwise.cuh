// Owns: what forward and backward of the stepwise engine share: which rows live, where a reset cuts, how threads map to
// units and rows, the way from (cell, dtype) to a template.
// Must not know: equations, tensors.
#pragma once

#include <algorithm>

#include "cell/cells.h"
#include "launch.cuh"
#include "params.h"
#include "storage.cuh"
#include "workspace.cuh"

namespace rnnfast::cuda::stepwise {

constexpr int kThreads = 128;

// ------------------------------------------------------------------------------------------------ device
// Rows of a step that have ended: those past their length. (The rows of a packed step all live.)
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

// Threads run along the features of a row, kWidth of them each; a block's y and the grid's y run over rows, with a
// stride where the grid is too small for all; the grid's z is the direction.
template <int kWidth>
__device__ __forceinline__ int64_t first_feature() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kWidth;
}
__device__ __forceinline__ int64_t first_row() { return static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y; }
__device__ __forceinline__ int64_t row_stride() { return static_cast<int64_t>(gridDim.y) * blockDim.y; }

// ------------------------------------------------------------------------------------------------ host
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The launch that goes with first_feature and first_row.
inline LaunchShape rows_shape(int64_t features, int64_t rows, int width, int directions) {
  const int64_t columns = ceil_div(features, width);
  int x = 1;
  while (x < columns && x < kThreads) x *= 2;
  const int y = kThreads / x;
  const int64_t most_y = 65535;
  return {dim3(static_cast<unsigned>(ceil_div(columns, x)), static_cast<unsigned>(std::min(ceil_div(rows, y), most_y)),
               directions),
          dim3(x, y)};
}

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

template <class T>
T* advance(T* pointer, int64_t elements) {
  return pointer ? pointer + elements : nullptr;
}

// Whether rows of width-wide packets can start at data and repeat every stride elements.
template <class scalar_t>
bool aligned(const void* data, int64_t stride, int width) {
  return data == nullptr ||
         (reinterpret_cast<uintptr_t>(data) % (sizeof(scalar_t) * width) == 0 && stride % width == 0);
}
template <class scalar_t>
bool aligned(const Rows& rows, int width) {
  return aligned<scalar_t>(rows.data, rows.stride_b, width) && rows.stride_t % width == 0;
}

template <class T>
struct Type {
  using type = T;
};

// Calls function(Type<Cell>, Type<scalar_t>).
template <class Cell, class Function>
auto dispatch_dtype(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::f64:
      return function(Type<Cell>(), Type<double>());
    case Dtype::f16:
      return function(Type<Cell>(), Type<__half>());
    case Dtype::bf16:
      return function(Type<Cell>(), Type<__nv_bfloat16>());
    default:
      return function(Type<Cell>(), Type<float>());
  }
}

template <class Function>
auto dispatch(CellKind cell, Dtype dtype, const Function& function) {
  switch (cell) {
#define RNNFAST_DISPATCH_CELL(name, Cell) \
  case CellKind::name:                    \
    return dispatch_dtype<Cell>(dtype, function);
    RNNFAST_FOR_EACH_CELL(RNNFAST_DISPATCH_CELL)
#undef RNNFAST_DISPATCH_CELL
  }
  return decltype(dispatch_dtype<LstmCell>(dtype, function))();
}

// A packed step may have no rows.
inline int multiply(const Gemm& gemm, const GemmArguments& arguments) {
  return arguments.m == 0 ? 0 : gemm.run(gemm.context, arguments);
}

}  // namespace rnnfast::cuda::stepwise
