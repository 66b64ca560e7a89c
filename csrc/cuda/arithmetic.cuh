// Owns: the way from a layer to the template arguments of its persistent kernels: the cell, and of the dtype the
// storage type and the arithmetic. Must not know: what a cell computes, kernels.
#pragma once

#include "pointwise.cuh"
#include "recurrent_tile.cuh"

namespace rnnfast::cuda {

// Calls function(Type<scalar_t>, Type<Math>).
template <class Function>
int choose_arithmetic(Dtype dtype, bool tf32, const Function& function) {
  switch (dtype) {
    case Dtype::bf16:
      return function(Type<__nv_bfloat16>(), Type<TensorCore<__nv_bfloat16>>());
    case Dtype::f16:
      return function(Type<__half>(), Type<TensorCore<__half>>());
    case Dtype::f32:
      return tf32 ? function(Type<float>(), Type<TensorCoreTf32>()) : function(Type<float>(), Type<ScalarFloat>());
    default:
      return cudaErrorInvalidValue;
  }
}

// Calls function(Type<Cell>), for a cell that has persistent kernels.
template <class Function>
int dispatch_persistent(CellKind cell, const Function& function) {
  switch (cell) {
#define RNNFAST_DISPATCH_CELL(name, Cell) \
  case CellKind::name:                    \
    return function(Type<Cell>());
    RNNFAST_FOR_EACH_PERSISTENT_CELL(RNNFAST_DISPATCH_CELL)
#undef RNNFAST_DISPATCH_CELL
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace rnnfast::cuda
