// Owns: the kernels of the engine persistent_cta in float32, with and without TF32. Must not know: how they work.
#include "persistent_cta.cuh"

namespace rnnfast::cuda::persistent_cta {

template int forward<float, TensorCoreTf32>(const LayerForward&, const Context&);
template int forward<float, ScalarFloat>(const LayerForward&, const Context&);
template int backward<float, TensorCoreTf32>(const LayerBackward&, const BackwardProducts (&)[2], const Context&,
                                             const DeviceSequence&);
template int backward<float, ScalarFloat>(const LayerBackward&, const BackwardProducts (&)[2], const Context&,
                                          const DeviceSequence&);

}  // namespace rnnfast::cuda::persistent_cta
