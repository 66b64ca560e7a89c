// Owns: the launchers of the engine persistent_grid: the choice of the kernels by storage type and arithmetic.
// Must not know: the kernels.
#include "persistent_grid.cuh"
#include "persistent_grid_kernels.h"

namespace rnnfast::cuda::persistent_grid {

size_t forward_workspace_bytes(const LayerForward& layer, const Spread& spread) {
  const int gates = cell_info(layer.cell).gates;
  const auto bytes = [&](auto math) {
    using Math = decltype(math);
    const SpreadShape shape = spread_shape<Math>(spread, layer.hidden_size, layer.sequence.batch, 1, gates);
    return GridWorkspace<typename Math::Operand>(layer.sequence, layer.directions, shape, nullptr).bytes;
  };
  return size_of(layer.dtype) == 2 ? bytes(TensorCore<__half>()) : bytes(TensorCoreTf32());
}

int forward(const LayerForward& layer, const Spread& spread, const Context& context) {
  switch (layer.dtype) {
    case Dtype::bf16:
      return forward<__nv_bfloat16, TensorCore<__nv_bfloat16>>(layer, spread, context);
    case Dtype::f16:
      return forward<__half, TensorCore<__half>>(layer, spread, context);
    case Dtype::f32:
      return layer.tf32 ? forward<float, TensorCoreTf32>(layer, spread, context)
                        : forward<float, ScalarFloat>(layer, spread, context);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace rnnfast::cuda::persistent_grid
