// Owns: how the blocks of a team exchange numbers in the engine persistent_grid: through global memory, which the L2
// cache holds, with one counter of arrivals a team. Its launches.
// Must not know: cells, what is exchanged.
#pragma once

#include "device_ptx.h"
#include "device_sequence.cuh"
#include "launch.cuh"
#include "persistent_spread.h"
#include "workspace.cuh"

namespace rnnfast::cuda::persistent_grid {

// An arrival adds one to the team's counter with release, behind a barrier of the block; a wait is over when the
// counter says that all blocks have arrived so often. One thread of a block waits, with acquire; the block's barrier
// passes on what it saw. Then the block copies the vector into its shared memory, past the first-level cache.
template <class Operand_>
class GridExchange {
 public:
  using Operand = Operand_;
  static constexpr bool kAvailable = true;
  static constexpr int kCopies = 1;       // of the vector in shared memory
  static constexpr int kFlagStride = 32;  // counters lie in cache lines of their own
  struct Arguments {
    Operand* vectors = nullptr;    // [D, teams, 2, rows, columns]
    unsigned* arrivals = nullptr;  // [D, teams, kFlagStride], zero
  };

  __device__ __forceinline__ GridExchange(const Arguments& arguments, const SpreadShape& shape, Operand* shared)
      : columns_(shape.sizes.columns),
        stride_(shape.sizes.stride),
        rows_(shape.spread.row_tiles * kTileRows),
        blocks_(shape.sizes.blocks),
        shared_(shared) {
    const int64_t team = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
    vectors_ = arguments.vectors + team * 2 * rows_ * columns_;
    arrivals_ = arguments.arrivals + team * kFlagStride;
    for (int i = threadIdx.x; i < rows_ * stride_; i += blockDim.x) from_acc(0.0f, shared_[i]);
  }

  __device__ __forceinline__ void publish(int row, int column, const Packet<Operand, 2>& pair) {
    *reinterpret_cast<Packet<Operand, 2>*>(vector(turn_) + row * columns_ + column) = pair;
  }

  __device__ __forceinline__ void arrive() {
    __syncthreads();
    if (threadIdx.x == 0) device::add_release(arrivals_, 1);
    ++turn_;
  }

  // The vector of the last arrival, in shared memory.
  __device__ __forceinline__ const Operand* wait() {
    if (threadIdx.x == 0) {
      while (device::load_acquire(arrivals_) < turn_ * blocks_) continue;
    }
    __syncthreads();
    constexpr int kWidth = 16 / sizeof(Operand);
    const Operand* const from = vector(turn_ - 1);
    const int packets = columns_ / kWidth;
    for (int i = threadIdx.x; i < rows_ * packets; i += blockDim.x) {
      const int row = i / packets, column = i % packets * kWidth;
      *reinterpret_cast<uint4*>(shared_ + row * stride_ + column) =
          __ldcg(reinterpret_cast<const uint4*>(from + row * columns_ + column));
    }
    __syncthreads();
    return shared_;
  }

 private:
  __device__ __forceinline__ Operand* vector(unsigned turn) const { return vectors_ + turn % 2 * rows_ * columns_; }

  const int columns_, stride_, rows_;
  const unsigned blocks_;
  Operand* const shared_;
  Operand* vectors_;
  unsigned* arrivals_;
  unsigned turn_ = 0;  // arrivals of this block
};

// ------------------------------------------------------------------------------------------------ host
template <class Operand>
class GridWorkspace {
 public:
  typename GridExchange<Operand>::Arguments arguments;
  int64_t* offsets;  // of a packed input
  size_t bytes;

  GridWorkspace(const Sequence& sequence, int directions, const SpreadShape& shape, void* base) {
    const int64_t teams = static_cast<int64_t>(directions) * shape.sizes.teams;
    const int64_t flags = teams * GridExchange<Operand>::kFlagStride;
    Workspace workspace(base);
    arguments.vectors = workspace.take<Operand>(teams * 2 * shape.spread.row_tiles * kTileRows * shape.sizes.columns);
    arguments.arrivals = workspace.take<unsigned>(flags);
    offsets = workspace.take<int64_t>(offsets_count(sequence));
    bytes = workspace.bytes();
    arrival_bytes_ = flags * sizeof(unsigned);
  }
  cudaError_t prepare(cudaStream_t stream) const {
    return cudaMemsetAsync(arguments.arrivals, 0, arrival_bytes_, stream);
  }

 private:
  size_t arrival_bytes_;
};

// Launches a kernel whose blocks wait for each other, unless the device cannot hold all of them at once.
template <class... Parameters, class... Arguments>
cudaError_t launch_resident(void (*kernel)(Parameters...), LaunchShape shape, cudaStream_t stream,
                            const Arguments&... arguments) {
  int device = 0, multiprocessors = 0, blocks = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) error = allow(kernel, shape);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, static_cast<int>(shape.block.x),
                                                          shape.shared_bytes);
  }
  if (error != cudaSuccess) return error;
  const int64_t wanted = static_cast<int64_t>(shape.grid.x) * shape.grid.y * shape.grid.z;
  if (wanted > static_cast<int64_t>(multiprocessors) * blocks) return cudaErrorCooperativeLaunchTooLarge;
  shape.cooperative = true;
  return launch(kernel, shape, stream, arguments...);
}

template <class Operand>
struct Exchange : GridExchange<Operand> {
  using GridExchange<Operand>::GridExchange;
  using Workspace = GridWorkspace<Operand>;

  template <class... Parameters, class... Arguments>
  static cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                            const Arguments&... arguments) {
    return launch_resident(kernel, shape, stream, arguments...);
  }
};

}  // namespace rnnfast::cuda::persistent_grid
