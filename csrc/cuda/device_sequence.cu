// Owns: the way of a packed sequence's offsets to the device.
// Must not know: cells, states.
#include "device_sequence.cuh"

#include <algorithm>

#include "launch.cuh"

namespace rnnfast::cuda {
namespace {

constexpr int kOffsetsPerLaunch = 480;  // kernel parameters hold 4 KB

struct Offsets {
  int64_t* to = nullptr;
  int count = 0;
  int64_t value[kOffsetsPerLaunch] = {};
};

// One thread a value; nothing to synchronise.
__global__ void __launch_bounds__(kOffsetsPerLaunch) store_offsets_kernel(const __grid_constant__ Offsets args) {
  if (static_cast<int>(threadIdx.x) < args.count) args.to[threadIdx.x] = args.value[threadIdx.x];
}

}  // namespace

cudaError_t device_sequence(const Sequence& sequence, int64_t* offsets, cudaStream_t stream, DeviceSequence& result) {
  result.steps = static_cast<int>(sequence.steps);
  result.batch = static_cast<int>(sequence.batch);
  result.offsets = sequence.packed ? offsets : nullptr;
  result.lengths = sequence.lengths;
  result.reset = sequence.reset;
  const int64_t count = offsets_count(sequence);
  for (int64_t first = 0; first < count; first += kOffsetsPerLaunch) {
    Offsets args;
    args.to = offsets + first;
    args.count = static_cast<int>(std::min<int64_t>(kOffsetsPerLaunch, count - first));
    for (int i = 0; i < args.count; ++i) {
      args.value[i] = first + i < sequence.steps ? sequence.offsets[first + i] : sequence.rows;
    }
    const cudaError_t error = launch(store_offsets_kernel, {dim3(1), dim3(kOffsetsPerLaunch)}, stream, args);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace rnnfast::cuda
