// Owns: the device of csrc/ops/device_cuda.h that the simulator stands for, and a way to force an engine on it.
// Must not know: engines.
#include "cuda_engine.h"
#include "device_cuda.h"

namespace rnnfast::ops {

plan::Device cuda_device(int) {
  plan::Device device = {90, 132, 232448, 65536, true, {}};
  // Not what the simulator runs at once, which is less: the plan is to choose as on that device.
  for (size_t i = 0; i < device.clusters.size(); ++i) device.clusters[i] = device.multiprocessors / (int(i) + 1);
  return device;
}

bool tf32_allowed() { return false; }

}  // namespace rnnfast::ops

// An empty name leaves the choice to the plan.
extern "C" __attribute__((visibility("default"))) void sim_force_engine(const char* name) {
  using namespace rnnfast::ops;
  force_cuda_engine(*name ? std::optional(find_cuda_engine(name)) : std::nullopt);
}
