// Owns: the device of csrc/ops/device_cuda.h that the simulator stands for, and a way to force an engine on it.
// Must not know: engines.
#include <algorithm>

#include "cuda_engine.h"
#include "device_cuda.h"
#include "params.h"

namespace rnnfast::ops {

plan::Device cuda_device(int) {
  plan::Device device = {90, 132, 232448, 65536, true, {}};
  int clusters[cuda::kMostClusterBlocks];
  TORCH_CHECK(cuda::persistent_cluster::active_clusters(clusters) == 0, "the simulator does not know its clusters");
  std::copy(std::begin(clusters), std::end(clusters), device.clusters.begin());
  return device;
}

bool tf32_allowed() { return false; }

}  // namespace rnnfast::ops

// An empty name leaves the choice to the plan.
extern "C" __attribute__((visibility("default"))) void sim_force_engine(const char* name) {
  using namespace rnnfast::ops;
  force_cuda_engine(*name ? std::optional(find_cuda_engine(name)) : std::nullopt);
}
