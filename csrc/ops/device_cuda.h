// Owns: what there is to know of a device: its properties, and torch's settings for it.
// Must not know: engines, layers.
#pragma once

#include "plan.h"

namespace rnnfast::ops {

// The current one, if index is negative.
plan::Device cuda_device(int index = -1);

// Whether float32 products may round their factors to TF32: torch.backends.cuda.matmul's setting, which cuBLAS follows.
bool tf32_allowed();

}  // namespace rnnfast::ops
