// Owns: the kernels of the engine persistent_cta in f16. Must not know: how they work.
#include "persistent_cta.cuh"

namespace rnnfast::cuda::persistent_cta {

template int forward<__half, TensorCore<__half>>(const LayerForward&, const Context&);
template int backward<__half, TensorCore<__half>>(const LayerBackward&, const BackwardProducts (&)[2], const Context&,
                                                  const DeviceSequence&);

}  // namespace rnnfast::cuda::persistent_cta
