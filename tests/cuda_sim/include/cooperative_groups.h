// Stands in for the toolkit's <cooperative_groups.h>: blocks, grids, clusters and tiles of a warp.
#pragma once

#include "cuda_sim.h"

namespace cooperative_groups {

struct thread_block {
  void sync(CUDA_SIM_CALLER) const { cuda_sim::block_barrier(file, line); }
  unsigned thread_rank() const { return cuda_sim::thread_linear(); }
  unsigned size() const { return blockDim.x * blockDim.y * blockDim.z; }
  unsigned num_threads() const { return size(); }
  dim3 group_index() const { return dim3(blockIdx.x, blockIdx.y, blockIdx.z); }
};
inline thread_block this_thread_block() { return {}; }

struct grid_group {
  bool is_valid() const { return true; }
  void sync(CUDA_SIM_CALLER) const { cuda_sim::grid_barrier(file, line); }
  unsigned long long block_rank() const { return cuda_sim::block_linear(); }
  unsigned long long num_blocks() const { return 1ull * gridDim.x * gridDim.y * gridDim.z; }
  unsigned long long thread_rank() const {
    return block_rank() * this_thread_block().size() + cuda_sim::thread_linear();
  }
  unsigned long long size() const { return num_blocks() * this_thread_block().size(); }
};
inline grid_group this_grid() { return {}; }

struct cluster_group {
  struct arrival_token {
    unsigned phase;
  };
  void sync(CUDA_SIM_CALLER) const { cuda_sim::cluster_wait(cuda_sim::cluster_arrive(file, line), file, line); }
  arrival_token barrier_arrive(CUDA_SIM_CALLER) const { return {cuda_sim::cluster_arrive(file, line)}; }
  void barrier_wait(arrival_token&& token, CUDA_SIM_CALLER) const { cuda_sim::cluster_wait(token.phase, file, line); }
  unsigned block_rank() const { return cuda_sim::cluster_rank(); }
  unsigned num_blocks() const { return cuda_sim::cluster_size(); }
  template <class T>
  T* map_shared_rank(T* address, int rank) const {
    return static_cast<T*>(cuda_sim::map_rank(address, rank));
  }
};
inline cluster_group this_cluster() { return {}; }

template <unsigned kSize>
struct thread_block_tile {
  static constexpr unsigned size() { return kSize; }
  unsigned thread_rank() const { return cuda_sim::lane_index() % kSize; }
  uint32_t mask() const {
    return kSize == 32 ? ~0u : ((1u << kSize % 32) - 1) << (cuda_sim::lane_index() & ~(kSize - 1));
  }
  void sync(CUDA_SIM_CALLER) const { __syncwarp(mask(), file, line); }
  template <class T>
  T shfl(T value, int source, CUDA_SIM_CALLER) const {
    return cuda_sim::shuffle<cuda_sim::Shuffle::index>(mask(), value, source, kSize, file, line);
  }
  template <class T>
  T shfl_down(T value, unsigned delta, CUDA_SIM_CALLER) const {
    return cuda_sim::shuffle<cuda_sim::Shuffle::down>(mask(), value, static_cast<int>(delta), kSize, file, line);
  }
  template <class T>
  T shfl_xor(T value, int lane_mask, CUDA_SIM_CALLER) const {
    return cuda_sim::shuffle<cuda_sim::Shuffle::exclusive_or>(mask(), value, lane_mask, kSize, file, line);
  }
};
template <unsigned kSize>
thread_block_tile<kSize> tiled_partition(const thread_block&) {
  return {};
}

}  // namespace cooperative_groups
