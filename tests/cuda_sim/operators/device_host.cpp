// Owns: the device of csrc/ops/device_cuda.h that the simulator stands for, and a way to force an engine on it.
// Must not know: engines.
#include "cuda_engine.h"
#include "device_cuda.h"

namespace rnnfast::ops {

plan::Device cuda_device(int) { return {90, 132, 232448, 65536, true, true}; }

bool tf32_allowed() { return false; }

}  // namespace rnnfast::ops

// An empty name leaves the choice to the plan.
extern "C" __attribute__((visibility("default"))) void sim_force_engine(const char* name) {
  using namespace rnnfast::ops;
  force_cuda_engine(*name ? std::optional(find_cuda_engine(name)) : std::nullopt);
}
