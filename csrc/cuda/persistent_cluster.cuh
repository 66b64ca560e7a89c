// Owns: how the blocks of a team exchange numbers in the engine persistent_cluster: a team is a cluster (sm_90), and
// each block pushes its numbers into the shared memory of all. Its launches. Must not know: cells, what is exchanged.
#pragma once

#include "device_ptx.h"
#include "persistent_spread.h"
#include "recurrent_lane.cuh"

namespace rnnfast::cuda::persistent_cluster {

// Every block has the whole vector, twice, in its own shared memory, so that the product reads nothing from afar. A
// turn ends with the cluster's barrier, whose arrival releases the pushes and whose wait acquires those of all blocks.
// No block leaves while another may push: nothing is pushed behind the last wait.
template <class Operand_>
class ClusterExchange {
 public:
  using Operand = Operand_;
  static constexpr bool kAvailable = device::kHasClusters;
  static constexpr int kCopies = kClusterCopies;  // of the vector in shared memory
  struct Arguments {};

  __device__ __forceinline__ ClusterExchange(const Arguments&, const SpreadShape& shape, Operand* shared)
      : sizes_(shape.sizes), size_(shape.spread.row_tiles * kTileRows * shape.sizes.stride), vectors_(shared) {
    clear(vectors_, kCopies * size_);  // once: the padding stays zero
    device::cluster_arrive_release();  // a block may push once all have begun, and cleared their vectors
    device::cluster_wait_acquire();
  }

  // Two neighbouring units of all parts, in two rows of the team. Each block begins with itself, so that no block
  // receives from all others at once.
  template <int kParts>
  __device__ __forceinline__ void publish(int row, int unit, const Pair<Operand> (&pairs)[2][kParts]) {
    Operand* place = vectors(turn_) + row * sizes_.stride + unit;
    const unsigned blocks = sizes_.blocks;
    unsigned rank = blockIdx.x;
    for (unsigned i = 0; i < blocks; ++i) {
      const device::RemoteShared<Operand> remote(place, rank);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          remote.store(j * sizes_.stride + part * sizes_.part, pairs[j][part]);
        }
      }
      rank = rank + 1 == blocks ? 0 : rank + 1;
    }
  }

  __device__ __forceinline__ void arrive() {
    device::cluster_arrive_release();
    ++turn_;
  }

  // The vectors of the last arrival.
  __device__ __forceinline__ const Operand* wait() {
    device::cluster_wait_acquire();
    return vectors(turn_ - 1);
  }

 private:
  __device__ __forceinline__ Operand* vectors(unsigned turn) const { return vectors_ + turn % 2 * size_; }

  const SpreadSizes& sizes_;
  const int size_;
  Operand* const vectors_;
  unsigned turn_ = 0;  // arrivals of this block
};

// ------------------------------------------------------------------------------------------------ host
// The exchange needs no memory.
template <class Operand>
struct ClusterBuffers {
  typename ClusterExchange<Operand>::Arguments arguments;

  ClusterBuffers(int, const SpreadShape&, Workspace&) {}
  cudaError_t prepare(cudaStream_t) const { return cudaSuccess; }
};

template <class Operand>
struct Exchange : ClusterExchange<Operand> {
  using ClusterExchange<Operand>::ClusterExchange;
  using Buffers = ClusterBuffers<Operand>;

  template <class... Parameters, class... Arguments>
  static cudaError_t launch(void (*kernel)(Parameters...), LaunchShape shape, cudaStream_t stream,
                            const Arguments&... arguments) {
    shape.cluster_blocks = shape.grid.x;
    return cuda::launch(kernel, shape, stream, arguments...);
  }
};

}  // namespace rnnfast::cuda::persistent_cluster
