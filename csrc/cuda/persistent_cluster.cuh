// Owns: how the blocks of a team exchange numbers in the engine persistent_cluster: a team is a cluster (sm_90), and
// blocks push numbers into the shared memory of others. Its launches. Must not know: cells, what is exchanged.
#pragma once

#include "device_ptx.h"
#include "persistent_spread.h"
#include "persistent_team.cuh"
#include "recurrent_lane.cuh"

namespace rnnfast::cuda::persistent_cluster {

// What a block of a cluster receives, turn after turn. A push is an asynchronous store that counts its bytes at an
// mbarrier of the block it goes to, one for turns of an even number and one for the others: a turn ends, for each block
// by itself, when all bytes are there that it expects. So no message follows the numbers, and nobody waits for its
// other stores: to arrive at the cluster's barrier with release is to wait until the whole GPU sees them. No block
// leaves while another may push: each waits for the last turn.
class ClusterTurns {
 public:
  __device__ __forceinline__ explicit ClusterTurns(uint64_t* mbarriers) : mbarriers_(mbarriers) {}

  // A barrier of the cluster, behind which all blocks are ready to receive.
  __device__ __forceinline__ void begin() const {
    if (threadIdx.x < kClusterShared.mbarriers) device::mbarrier_init(mbarriers_ + threadIdx.x);
    device::cluster_arrive_release();
    device::cluster_wait_acquire();
  }

  // The turn in which numbers are pushed now, modulo 2, and where they count.
  __device__ __forceinline__ unsigned now() const { return turn_ % 2; }
  __device__ __forceinline__ uint64_t* mbarrier() const { return mbarriers_ + now(); }

  // Ends the turn for those who push, and says what the block receives in it.
  __device__ __forceinline__ void arrive(int bytes) {
    if (threadIdx.x == 0) device::mbarrier_arrive_expect(mbarrier(), bytes);
    ++turn_;
  }
  // Until all of it is there; the turn, modulo 2.
  __device__ __forceinline__ unsigned wait() const {
    const unsigned last = turn_ - 1;
    device::mbarrier_wait_acquire(mbarriers_ + last % 2, last / 2 % 2);
    return last % 2;
  }

 private:
  uint64_t* const mbarriers_;
  unsigned turn_ = 0;  // that have ended
};

// Every block has the whole vector, twice, in its own shared memory, so that the product reads nothing from afar. A
// vector is overwritten two turns later. By then the block that writes has received the turn between, to which every
// block adds only when all of its warps have read the vector before.
template <class Operand_>
class ClusterExchange {
 public:
  using Operand = Operand_;
  static constexpr bool kAvailable = device::kHasClusters;
  static constexpr ExchangeShared kShared = kClusterShared;
  static constexpr int kLeastBlocks = kClusterLeastBlocks;
  struct Arguments {};

  __device__ __forceinline__ ClusterExchange(const Arguments&, const SpreadShape& shape, Operand* vectors,
                                             uint64_t* mbarriers)
      : sizes_(shape.sizes), row_tiles_(shape.spread.row_tiles), vectors_(vectors), turns_(mbarriers) {
    clear(vectors_, kShared.copies * row_tiles_ * sizes_.row_tile);  // once: the padding stays zero
    turns_.begin();
  }

  // The lane's two units of all parts, in its two rows; by whole warps. Each block begins with itself, so that no block
  // receives from all others at once.
  template <int kParts>
  __device__ __forceinline__ void publish(int row_tile, int unit, const Pair<Operand> (&pairs)[2][kParts]) {
    uint4 packets[kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part) packets[part] = gather(pairs[0][part], pairs[1][part]);
    __syncwarp();  // a lane sends numbers of others, which have read what they are made of
    Operand* place = vectors(turns_.now()) + row_tile * sizes_.row_tile +
                     operand_place(TileLane().row(packet_row()), unit / kPacketUnits * kPacketUnits, sizeof(Operand));
    uint64_t* mbarrier = turns_.mbarrier();
    const unsigned blocks = sizes_.blocks;
    const auto send = [&](unsigned distance) {
      const unsigned sum = blockIdx.x + distance;
      const unsigned rank = min(sum, sum - blocks);  // modulo: where sum < blocks, the difference wraps around
      const device::RemoteShared<Operand> remote(place, rank);
      const device::RemoteShared<uint64_t> remote_mbarrier(mbarrier, rank);
#pragma unroll
      for (int part = 0; part < kParts; ++part) remote.store_async(part * sizes_.part, packets[part], remote_mbarrier);
    };
    constexpr unsigned kTogether = 4;  // of which the addresses are computed side by side
    unsigned distance = TileLane().quad / 2 % kHolders;
    for (; distance + (kTogether - 1) * kHolders < blocks; distance += kTogether * kHolders) {
#pragma unroll
      for (unsigned i = 0; i < kTogether; ++i) send(distance + i * kHolders);
    }
    for (; distance < blocks; distance += kHolders) send(distance);
  }

  __device__ __forceinline__ void arrive() { turns_.arrive(static_cast<int>(sizes_.sent_bytes)); }

  // The vectors of the last arrival.
  __device__ __forceinline__ const Operand* wait() { return vectors(turns_.wait()); }

 private:
  // A store is a packet: lanes with neighbouring units put them together, half of them those of their first row, half
  // those of their second. Where a packet is the units of four lanes, two lanes have the same, and share the blocks.
  // What goes to a block from a warp are neighbouring bytes.
  static constexpr int kPacketUnits = packet_units(sizeof(Operand)), kHolders = 4 / sizeof(Operand);

  static __device__ __forceinline__ int packet_row() { return TileLane().quad % 2; }  // the lane's first or second

  static __device__ __forceinline__ uint4 gather(const Pair<Operand>& first, const Pair<Operand>& second) {
    constexpr int kNextQuad = 4;  // lanes
    constexpr int kWords = sizeof(Pair<Operand>) / sizeof(unsigned);
    const bool odd = packet_row() == 1;
    unsigned rows[2][kWords], words[2 * kWords];  // words: of one row, of this lane and the next in the order of units
    memcpy(rows[0], &first, sizeof rows[0]);
    memcpy(rows[1], &second, sizeof rows[1]);
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const unsigned mine = odd ? rows[1][w] : rows[0][w];
      const unsigned taken = __shfl_xor_sync(kAllLanes, odd ? rows[0][w] : rows[1][w], kNextQuad);
      words[w] = odd ? taken : mine;
      words[kWords + w] = odd ? mine : taken;
    }
    if constexpr (kHolders == 1) {
      return make_uint4(words[0], words[1], words[2], words[3]);
    } else {
      const unsigned lower = __shfl_xor_sync(kAllLanes, words[0], 2 * kNextQuad);
      const unsigned upper = __shfl_xor_sync(kAllLanes, words[1], 2 * kNextQuad);
      return TileLane().quad / 2 % 2 == 0 ? make_uint4(words[0], words[1], lower, upper)
                                          : make_uint4(lower, upper, words[0], words[1]);
    }
  }

  __device__ __forceinline__ Operand* vectors(unsigned copy) const {
    return vectors_ + copy * row_tiles_ * sizes_.row_tile;
  }

  const SpreadSizes& sizes_;
  const int row_tiles_;
  Operand* const vectors_;
  ClusterTurns turns_;
};

// Sums go to the block that adds them up, which has room for those of each block, twice. The room is used again two
// turns later. By then the block that writes has received the turn between, to which every block adds only behind a
// barrier of its own that follows its collecting: which the caller owes.
class ClusterScatter {
 public:
  static constexpr bool kAvailable = device::kHasClusters;
  static constexpr ExchangeShared kShared = kClusterShared;

  // A barrier of the cluster.
  __device__ __forceinline__ ClusterScatter(const ScatterShape& shape, float4* received, uint64_t* mbarriers)
      : shape_(shape), received_(received + threadIdx.x % kWarpLanes), turns_(mbarriers) {
    turns_.begin();
  }

  // The lane's sums for a tile of the block of that rank, if they are wanted. The tile's place is ScatterSizes'.
  __device__ __forceinline__ void push_if(bool wanted, int rank, int place, const float (&sums)[4]) const {
    uint4 words;
    memcpy(&words, sums, sizeof words);
    const device::RemoteShared<float4> remote(from_block(turns_.now(), blockIdx.x) + place, rank);
    remote.store_async_if(wanted, 0, words, device::RemoteShared<uint64_t>(turns_.mbarrier(), rank));
  }

  __device__ __forceinline__ void arrive() { turns_.arrive(static_cast<int>(shape_.sizes.received_bytes)); }

  // What all blocks sent before the last arrival for a tile of this one, added up in their order.
  __device__ __forceinline__ void collect(int place, float (&sums)[4]) const {
    float added[1][4] = {};
    add_parts(added, from_block(turns_.wait(), 0) + place, shape_.sizes.blocks, shape_.sizes.block_sums);
    memcpy(sums, added, sizeof sums);
  }

 private:
  __device__ __forceinline__ float4* from_block(unsigned copy, unsigned rank) const {
    return received_ + (copy * shape_.sizes.blocks + rank) * shape_.sizes.block_sums;
  }

  const ScatterShape& shape_;
  float4* const received_;  // of the lane
  ClusterTurns turns_;
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
  using Scatter = ClusterScatter;

  template <class... Parameters, class... Arguments>
  static cudaError_t launch(void (*kernel)(Parameters...), LaunchShape shape, cudaStream_t stream,
                            const Arguments&... arguments) {
    shape.cluster_blocks = shape.grid.x;
    return cuda::launch(kernel, shape, stream, arguments...);
  }
};

}  // namespace rnnfast::cuda::persistent_cluster
