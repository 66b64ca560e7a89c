// Owns: the kernels of the engine persistent_cluster in f16. Must not know: how they work.
#include "persistent_cluster.cuh"
#include "persistent_spread.cuh"

namespace rnnfast::cuda {

template int spread_forward<__half, TensorCore<__half>, persistent_cluster::Exchange<__half>>(const LayerForward&,
                                                                                              const Context&,
                                                                                              Workspace&);
template int spread_backward<__half, TensorCore<__half>, persistent_cluster::Exchange<__half>>(
    const LayerBackward&, const BackwardProducts (&)[2], const DeviceSequence&, const Context&, Workspace&);

}  // namespace rnnfast::cuda
