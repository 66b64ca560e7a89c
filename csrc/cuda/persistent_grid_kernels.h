// Owns: the border between the engine persistent_grid and its kernels, which are compiled apart, one file for each
// storage type. Must not know: CUDA headers, kernels.
#pragma once

#include "params.h"

namespace rnnfast::cuda::persistent_grid {

// For every cell; Math is an arithmetic of recurrent_tile.cuh.
template <class scalar_t, class Math>
int forward(const LayerForward& layer, const Spread& spread, const Context& context);

}  // namespace rnnfast::cuda::persistent_grid
