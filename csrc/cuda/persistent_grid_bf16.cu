// Owns: the kernels of the engine persistent_grid in bf16. Must not know: how they work.
#include "persistent_grid.cuh"
#include "persistent_spread.cuh"

namespace rnnfast::cuda {

template int spread_forward<__nv_bfloat16, TensorCore<__nv_bfloat16>, persistent_grid::Exchange<__nv_bfloat16>>(
    const LayerForward&, const Context&, Workspace&);
template int spread_backward<__nv_bfloat16, TensorCore<__nv_bfloat16>, persistent_grid::Exchange<__nv_bfloat16>>(
    const LayerBackward&, const BackwardProducts (&)[2], const DeviceSequence&, const Context&, Workspace&);

}  // namespace rnnfast::cuda
