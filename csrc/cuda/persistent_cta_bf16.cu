// Owns: the kernels of the engine persistent_cta in bf16. Must not know: how they work.
#include "persistent_cta.cuh"

namespace rnnfast::cuda::persistent_cta {

template int forward<__nv_bfloat16, TensorCore<__nv_bfloat16>>(const LayerForward&, const Context&);
template int backward<__nv_bfloat16, TensorCore<__nv_bfloat16>>(const LayerBackward&, const BackwardProducts (&)[2],
                                                                const Context&, const DeviceSequence&);

}  // namespace rnnfast::cuda::persistent_cta
