// Owns: how the blocks of a team exchange numbers in the engine persistent_cluster: a team is a cluster (sm_90), and
// each block pushes its numbers into the shared memory of all. Its launches. Must not know: cells, what is exchanged.
#pragma once

#include "device_ptx.h"
#include "device_sequence.cuh"
#include "launch.cuh"
#include "persistent_spread.h"
#include "workspace.cuh"

namespace rnnfast::cuda::persistent_cluster {

// Every block has the whole vector, twice, in its own shared memory, so that the product reads nothing from afar. A
// turn ends with the cluster's barrier, whose arrival releases the pushes and whose wait acquires those of all blocks.
// No block leaves while another may push: nothing is pushed behind the last wait.
template <class Operand_>
class ClusterExchange {
 public:
  using Operand = Operand_;
  static constexpr bool kAvailable = device::kHasClusters;
  static constexpr int kCopies = 2;  // of the vector in shared memory
  struct Arguments {};

  __device__ __forceinline__ ClusterExchange(const Arguments&, const SpreadShape& shape, Operand* shared)
      : stride_(shape.sizes.stride),
        size_(shape.spread.row_tiles * kTileRows * stride_),
        blocks_(shape.sizes.blocks),
        vectors_(shared) {
    for (int i = threadIdx.x; i < kCopies * size_; i += blockDim.x) from_acc(0.0f, vectors_[i]);
    device::cluster_arrive_release();  // a block may push once all have begun, and cleared their vectors
    device::cluster_wait_acquire();
  }

  // Each block begins with another peer, so that no block receives from all at once.
  __device__ __forceinline__ void publish(int row, int column, const Packet<Operand, 2>& pair) {
    auto* const place = reinterpret_cast<Packet<Operand, 2>*>(vector(turn_) + row * stride_ + column);
    unsigned rank = blockIdx.x;
    for (unsigned i = 0; i < blocks_; ++i) {
      device::store_remote(place, rank, pair);
      rank = rank + 1 == blocks_ ? 0 : rank + 1;
    }
  }

  __device__ __forceinline__ void arrive() {
    device::cluster_arrive_release();
    ++turn_;
  }

  // The vector of the last arrival.
  __device__ __forceinline__ const Operand* wait() {
    device::cluster_wait_acquire();
    return vector(turn_ - 1);
  }

 private:
  __device__ __forceinline__ Operand* vector(unsigned turn) const { return vectors_ + turn % 2 * size_; }

  const int stride_, size_;
  const unsigned blocks_;
  Operand* const vectors_;
  unsigned turn_ = 0;  // arrivals of this block
};

// ------------------------------------------------------------------------------------------------ host
template <class Operand>
class ClusterWorkspace {
 public:
  typename ClusterExchange<Operand>::Arguments arguments;
  int64_t* offsets;  // of a packed input
  size_t bytes;

  ClusterWorkspace(const Sequence& sequence, int, const SpreadShape&, void* base) {
    Workspace workspace(base);
    offsets = workspace.take<int64_t>(offsets_count(sequence));
    bytes = workspace.bytes();
  }
  cudaError_t prepare(cudaStream_t) const { return cudaSuccess; }
};

template <class Operand>
struct Exchange : ClusterExchange<Operand> {
  using ClusterExchange<Operand>::ClusterExchange;
  using Workspace = ClusterWorkspace<Operand>;

  template <class... Parameters, class... Arguments>
  static cudaError_t launch(void (*kernel)(Parameters...), LaunchShape shape, cudaStream_t stream,
                            const Arguments&... arguments) {
    shape.cluster_blocks = shape.grid.x;
    return cuda::launch(kernel, shape, stream, arguments...);
  }
};

}  // namespace rnnfast::cuda::persistent_cluster
