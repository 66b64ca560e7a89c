// Owns: what the kernels share that compute every element by itself: how threads map to features and rows, vector
// loads, the way from (cell, dtype) to a template. Must not know: equations, tensors, time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cell/cells.h"
#include "launch.cuh"
#include "params.h"
#include "storage.cuh"
#include "workspace.cuh"

namespace rnnfast::cuda {

constexpr int kThreads = 128;

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
  __builtin_unreachable();
}

// A packed step may have no rows.
inline int multiply(const Gemm& gemm, const GemmArguments& arguments) {
  return arguments.m == 0 ? 0 : gemm.run(gemm.context, arguments);
}

}  // namespace rnnfast::cuda
