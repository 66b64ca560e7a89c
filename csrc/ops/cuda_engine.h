// Owns: which CUDA engine a call takes: the plan's choice, unless one was forced.
// Must not know: what an engine does.
#pragma once

#include <optional>

#include "plan.h"

namespace rnnfast::ops {

// Forces an engine for the calls that begin later, of all threads; nullopt leaves the choice to the plan again.
void force_cuda_engine(std::optional<plan::Engine> engine);

// Throws RuntimeError where an engine was forced that cannot run the problem.
plan::Plan choose_cuda_engine(const plan::Problem& problem, const plan::Device& device);

// By its name; throws ValueError for one that is none.
plan::Engine find_cuda_engine(const std::string& name);

}  // namespace rnnfast::ops
