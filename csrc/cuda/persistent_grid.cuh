// Owns: how the blocks of a team exchange numbers in the engine persistent_grid: through global memory, which the L2
// cache holds, with one counter of arrivals a team. Its launches.
// Must not know: cells, what is exchanged.
#pragma once

#include "device_ptx.h"
#include "persistent_spread.h"
#include "recurrent_lane.cuh"

namespace rnnfast::cuda::persistent_grid {

// An arrival adds one to the team's counter with release, behind a barrier of the block; a wait is over when the
// counter says that all blocks have arrived so often. One thread of a block waits, with acquire; the block's barrier
// passes on what it saw. Then the block copies the vector into its shared memory, past the first-level cache.
template <class Operand_>
class GridExchange {
 public:
  using Operand = Operand_;
  static constexpr bool kAvailable = true;
  static constexpr ExchangeShared kShared = kGridShared;
  static constexpr int kLeastBlocks = kGridLeastBlocks;
  static constexpr int kFlagStride = 32;  // counters lie in cache lines of their own
  struct Arguments {
    Operand* vectors = nullptr;    // [D, teams, 2, row_tiles, parts, operand of 8 rows, without padding]
    unsigned* arrivals = nullptr;  // [D, teams, kFlagStride], zero
  };

  __device__ __forceinline__ GridExchange(const Arguments& arguments, const SpreadShape& shape, Operand* shared,
                                          uint64_t*)
      : arguments_(arguments), shape_(shape), shared_(shared) {
    clear(shared_, shape.spread.row_tiles * shape.sizes.row_tile);  // once: the padding stays zero
  }

  // The lane's two units of all parts, in its two rows.
  template <int kParts>
  __device__ __forceinline__ void publish(int row_tile, int unit, const Pair<Operand> (&pairs)[2][kParts]) {
    Operand* place =
        vectors(turn_) + row_tile * kParts * part() + operand_place(TileLane().row(0), unit, sizeof(Operand));
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) pairs[j][i].store(place + j * kPacketUnits + i * part());
    }
  }

  __device__ __forceinline__ void arrive() {
    __syncthreads();
    if (threadIdx.x == 0) device::add_release(arrivals(), 1);
    ++turn_;
  }

  // The vectors of the last arrival, in shared memory.
  __device__ __forceinline__ const Operand* wait() {
    if (threadIdx.x == 0) {
      // Both counts wrap around; the difference does not, for no block is more than a turn ahead.
      const unsigned all = turn_ * static_cast<unsigned>(shape_.sizes.blocks);
      while (static_cast<int>(device::load_acquire(arrivals()) - all) < 0) continue;
    }
    __syncthreads();
    const Operand* from = vectors(turn_ - 1);
    Operand* to = shared_;
    for (int i = 0; i < shape_.spread.row_tiles * shape_.sizes.parts; ++i, from += part(), to += shape_.sizes.part) {
      for (int j = static_cast<int>(threadIdx.x) * kPacketUnits; j < part(); j += blockDim.x * kPacketUnits) {
        device::cp_async_16(to + j, from + j);  // all of them under way at once
      }
    }
    device::cp_async_commit();
    device::cp_async_wait<0>();
    __syncthreads();
    return shared_;
  }

 private:
  static constexpr int kPacketUnits = packet_units(sizeof(Operand));

  __device__ __forceinline__ int64_t team() const { return static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y; }
  __device__ __forceinline__ int part() const { return shape_.sizes.units * kTileRows; }
  __device__ __forceinline__ unsigned* arrivals() const { return arguments_.arrivals + team() * kFlagStride; }
  __device__ __forceinline__ Operand* vectors(unsigned turn) const {
    return arguments_.vectors + (team() * 2 + turn % 2) * shape_.spread.row_tiles * shape_.sizes.parts * part();
  }

  const Arguments& arguments_;
  const SpreadShape& shape_;
  Operand* const shared_;
  unsigned turn_ = 0;  // arrivals of this block
};

// ------------------------------------------------------------------------------------------------ host
template <class Operand>
class GridBuffers {
 public:
  typename GridExchange<Operand>::Arguments arguments;

  GridBuffers(int directions, const SpreadShape& shape, Workspace& workspace) {
    const int64_t teams = static_cast<int64_t>(directions) * shape.sizes.teams;
    const int64_t rows = teams * 2 * shape.spread.row_tiles * kTileRows;
    const int64_t flags = teams * GridExchange<Operand>::kFlagStride;
    arguments.vectors = workspace.take<Operand>(rows * shape.sizes.parts * shape.sizes.units);
    arguments.arrivals = workspace.take<unsigned>(flags);
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
    const Uncaptured uncaptured;
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
  using Buffers = GridBuffers<Operand>;
  using Scatter = void;  // none

  template <class... Parameters, class... Arguments>
  static cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                            const Arguments&... arguments) {
    return launch_resident(kernel, shape, stream, arguments...);
  }
};

}  // namespace rnnfast::cuda::persistent_grid
