// Owns: the border between the engines that spread W_hh over blocks and their kernels, which are compiled apart, one
// file for each engine and storage type; the choice among those. Must not know: the kernels.
#pragma once

#include "cell/cells.h"
#include "params.h"
#include "recurrent_tile.cuh"
#include "spread.h"

namespace rnnfast::cuda {

// What crosses the launch beside the layer.
struct SpreadShape {
  Spread spread;
  SpreadSizes sizes;
};

template <class Math>
constexpr bool kOnTensorCores = !std::is_same_v<Math, ScalarFloat>;

template <class Math>
SpreadShape spread_shape(const Spread& spread, int64_t hidden_size, int64_t batch, int slices, int tiles) {
  return {spread, SpreadSizes(spread, static_cast<int>(hidden_size), batch, slices, tiles,
                              sizeof(typename Math::Operand), kOnTensorCores<Math>)};
}

template <class scalar_t, class Math, class Exchange>
int spread_forward(const LayerForward& layer, const Spread& spread, const Context& context);

// Calls function(scalar_t(), Math()).
template <class Function>
int dispatch_math(Dtype dtype, bool tf32, const Function& function) {
  switch (dtype) {
    case Dtype::bf16:
      return function(__nv_bfloat16(), TensorCore<__nv_bfloat16>());
    case Dtype::f16:
      return function(__half(), TensorCore<__half>());
    case Dtype::f32:
      return tf32 ? function(float(), TensorCoreTf32()) : function(float(), ScalarFloat());
    default:
      return cudaErrorInvalidValue;
  }
}

// The launchers of an engine, by how its blocks exchange numbers. To the host an exchange is
//   Exchange::Workspace(sequence, directions, shape, base)   with bytes, offsets, the kernel's arguments,
//   prepare(stream) Exchange::launch(kernel, launch shape, stream, arguments...)
template <template <class> class Exchange>
struct SpreadEngine {
  static size_t workspace_bytes(const Sequence& sequence, Dtype dtype, int directions, const Spread& spread,
                                int64_t hidden_size, int slices, int tiles) {
    const auto bytes = [&](auto math) {
      using Math = decltype(math);
      const SpreadShape shape = spread_shape<Math>(spread, hidden_size, sequence.batch, slices, tiles);
      return typename Exchange<typename Math::Operand>::Workspace(sequence, directions, shape, nullptr).bytes;
    };
    return size_of(dtype) == 2 ? bytes(TensorCore<__half>()) : bytes(TensorCoreTf32());
  }
  static size_t forward_workspace_bytes(const LayerForward& layer, const Spread& spread) {
    return workspace_bytes(layer.sequence, layer.dtype, layer.directions, spread, layer.hidden_size, 1,
                           cell_info(layer.cell).gates);
  }
  static int forward(const LayerForward& layer, const Spread& spread, const Context& context) {
    return dispatch_math(layer.dtype, layer.tf32, [&](auto scalar, auto math) {
      using Math = decltype(math);
      return spread_forward<decltype(scalar), Math, Exchange<typename Math::Operand>>(layer, spread, context);
    });
  }
};

}  // namespace rnnfast::cuda
