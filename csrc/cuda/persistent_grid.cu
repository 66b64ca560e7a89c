// Owns: the launchers of the engine persistent_grid.
// Must not know: the kernels.
#include "persistent_grid.cuh"

namespace rnnfast::cuda::persistent_grid {

size_t forward_workspace_bytes(const LayerForward& layer, const Spread& spread) {
  return SpreadEngine<Exchange>::forward_workspace_bytes(layer, spread);
}

int forward(const LayerForward& layer, const Spread& spread, const Context& context) {
  return SpreadEngine<Exchange>::forward(layer, spread, context);
}

size_t backward_workspace_bytes(const LayerBackward& layer, const Spread& spread) {
  return SpreadEngine<Exchange>::backward_workspace_bytes(layer, spread);
}

int backward(const LayerBackward& layer, const BackwardProducts (&products)[2], const Spread& spread,
             const Context& context) {
  return SpreadEngine<Exchange>::backward(layer, products, spread, context);
}

}  // namespace rnnfast::cuda::persistent_grid
