// Owns: the launcher of the engine persistent_cta: the choice of the kernels by storage type and arithmetic.
// Must not know: the kernels.
#include "device_sequence.cuh"
#include "persistent_cta_kernels.h"
#include "recurrent_tile.cuh"

namespace rnnfast::cuda::persistent_cta {

size_t forward_workspace_bytes(const LayerForward& layer) {
  return static_cast<size_t>(offsets_count(layer.sequence)) * sizeof(int64_t);
}

int forward(const LayerForward& layer, const Context& context) {
  switch (layer.dtype) {
    case Dtype::bf16:
      return forward<__nv_bfloat16, TensorCore<__nv_bfloat16>>(layer, context);
    case Dtype::f16:
      return forward<__half, TensorCore<__half>>(layer, context);
    case Dtype::f32:
      return layer.tf32 ? forward<float, TensorCoreTf32>(layer, context) : forward<float, ScalarFloat>(layer, context);
    default:
      return cudaErrorInvalidValue;
  }
}

size_t backward_workspace_bytes(const LayerBackward& layer) { return stepwise::backward_workspace_bytes(layer); }
int backward(const LayerBackward& layer, const BackwardProducts (&products)[2], const Context& context) {
  return stepwise::backward(layer, products, context);
}

}  // namespace rnnfast::cuda::persistent_cta
