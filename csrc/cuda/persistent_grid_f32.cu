// Owns: the kernels of the engine persistent_grid in f32. Must not know: how they work.
#include "persistent_grid.cuh"
#include "persistent_spread.cuh"

namespace rnnfast::cuda {

template int spread_forward<float, TensorCoreTf32, persistent_grid::Exchange<float>>(const LayerForward&,
                                                                                     const Context&, Workspace&);
template int spread_backward<float, TensorCoreTf32, persistent_grid::Exchange<float>>(const LayerBackward&,
                                                                                      const BackwardProducts (&)[2],
                                                                                      const DeviceSequence&,
                                                                                      const Context&, Workspace&);
template int spread_forward<float, ScalarFloat, persistent_grid::Exchange<float>>(const LayerForward&, const Context&,
                                                                                  Workspace&);
template int spread_backward<float, ScalarFloat, persistent_grid::Exchange<float>>(const LayerBackward&,
                                                                                   const BackwardProducts (&)[2],
                                                                                   const DeviceSequence&,
                                                                                   const Context&, Workspace&);

}  // namespace rnnfast::cuda
