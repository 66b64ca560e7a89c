// Owns: the kernels of the engine persistent_grid in bf16. Must not know: how they work.
#include "persistent_grid.cuh"
#include "persistent_grid_kernels.h"

namespace rnnfast::cuda::persistent_grid {

template <class scalar_t, class Math>
int forward(const LayerForward& layer, const Spread& spread, const Context& context) {
  return spread_forward<scalar_t, Math, Exchange<typename Math::Operand>>(layer, spread, context);
}

template int forward<__nv_bfloat16, TensorCore<__nv_bfloat16>>(const LayerForward&, const Spread&, const Context&);

}  // namespace rnnfast::cuda::persistent_grid
