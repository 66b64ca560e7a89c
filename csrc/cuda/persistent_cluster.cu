// Owns: the launchers of the engine persistent_cluster.
// Must not know: the kernels.
#include "persistent_cluster.cuh"

namespace rnnfast::cuda::persistent_cluster {

size_t forward_workspace_bytes(const LayerForward& layer) {
  return SpreadEngine<Exchange>::forward_workspace_bytes(layer);
}

int forward(const LayerForward& layer, const Context& context) {
  return SpreadEngine<Exchange>::forward(layer, context);
}

size_t backward_workspace_bytes(const LayerBackward& layer) {
  return SpreadEngine<Exchange>::backward_workspace_bytes(layer);
}

int backward(const LayerBackward& layer, const BackwardProducts (&products)[2], const Context& context) {
  return SpreadEngine<Exchange>::backward(layer, products, context);
}

}  // namespace rnnfast::cuda::persistent_cluster
