// Owns: the way from a layer's dtype to the storage type and the arithmetic of its persistent kernels.
// Must not know: cells, kernels.
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

}  // namespace rnnfast::cuda
