// Owns: the kernels of the engine persistent_grid in f16. Must not know: how they work.
#include "persistent_grid.cuh"
#include "persistent_spread.cuh"

namespace rnnfast::cuda {

template int spread_forward<__half, TensorCore<__half>, persistent_grid::Exchange<__half>>(const LayerForward&,
                                                                                           const Context&, Workspace&);
template int spread_backward<__half, TensorCore<__half>, persistent_grid::Exchange<__half>>(
    const LayerBackward&, const BackwardProducts (&)[2], const DeviceSequence&, const Context&, Workspace&);

}  // namespace rnnfast::cuda
