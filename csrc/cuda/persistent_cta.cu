// Owns: the launcher of the engine persistent_cta: the choice of the kernels by storage type and arithmetic.
// Must not know: the kernels.
#include "arithmetic.cuh"
#include "backward_preparation.cuh"
#include "persistent_cta_kernels.cuh"
#include "recurrent_tile.cuh"

namespace rnnfast::cuda::persistent_cta {

size_t forward_workspace_bytes(const LayerForward& layer) {
  return static_cast<size_t>(offsets_count(layer.sequence)) * sizeof(int64_t);
}

int forward(const LayerForward& layer, const Context& context) {
  return choose_arithmetic(layer.dtype, layer.tf32, [&](auto scalar, auto math) {
    return forward<typename decltype(scalar)::type, typename decltype(math)::type>(layer, context);
  });
}

size_t backward_workspace_bytes(const LayerBackward& layer) {
  Workspace workspace(nullptr);
  const BackwardPreparation preparation(layer, workspace);
  return workspace.bytes();
}

int backward(const LayerBackward& given, const BackwardProducts (&products)[2], const Context& context) {
  Workspace workspace(context.workspace);
  const BackwardPreparation preparation(given, workspace);
  LayerBackward layer = given;
  DeviceSequence sequence;
  RNNFAST_RETURN_IF_ERROR(preparation.run(layer, products, context, sequence));
  return choose_arithmetic(layer.dtype, layer.tf32, [&](auto scalar, auto math) {
    return backward<typename decltype(scalar)::type, typename decltype(math)::type>(layer, products, context, sequence);
  });
}

}  // namespace rnnfast::cuda::persistent_cta
