// Owns: the states that the steps of a layer on the CPU read. Must not know: engines, equations.
#pragma once

#include "host_cpu.h"
#include "layer.h"

namespace rnnfast::ops {

// [N, P]: the state that each step of direction d reads, from those of every step and the initial one (undefined:
// zero). float32 or float64.
Tensor previous_states(const Geometry& geometry, const Sequence& sequence, const Tensor& output, const Tensor& h0,
                       int64_t d);

}  // namespace rnnfast::ops
