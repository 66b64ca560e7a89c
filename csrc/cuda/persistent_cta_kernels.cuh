// Owns: the border between the engine persistent_cta and its kernels, which are compiled apart, one file for each
// storage type. Must not know: kernels.
#pragma once

#include "device_sequence.cuh"

namespace rnnfast::cuda::persistent_cta {

// For every cell; Math is an arithmetic of recurrent_tile.cuh.
template <class scalar_t, class Math>
int forward(const LayerForward& layer, const Context& context);

// After BackwardPreparation.
template <class scalar_t, class Math>
int backward(const LayerBackward& layer, const BackwardProducts (&products)[2], const Context& context,
             const DeviceSequence& sequence);

}  // namespace rnnfast::cuda::persistent_cta
