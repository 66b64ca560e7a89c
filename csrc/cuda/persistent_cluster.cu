// Owns: the launchers of the engine persistent_cluster.
// Must not know: the kernels.
#include "persistent_cluster.cuh"

namespace rnnfast::cuda::persistent_cluster {
namespace {

// Stands for the engine's kernels in questions: given all shared memory, a block of either has a multiprocessor to
// itself.
__global__ void __launch_bounds__(kSpreadMostWarps* kWarpLanes, 1) block_of_a_multiprocessor() {}

}  // namespace

int active_clusters(int (&clusters)[kMostClusterBlocks]) {
  for (int& count : clusters) count = 0;
  const Uncaptured uncaptured;
  int device = 0, any = 0, most_bytes = 0;
  RNNFAST_RETURN_IF_ERROR(cudaGetDevice(&device));
  RNNFAST_RETURN_IF_ERROR(cudaDeviceGetAttribute(&any, cudaDevAttrClusterLaunch, device));
  if (any == 0) return 0;
  // Such a device runs code made for older ones too, in which the kernels are empty.
  cudaFuncAttributes code = {};
  RNNFAST_RETURN_IF_ERROR(cudaFuncGetAttributes(&code, block_of_a_multiprocessor));
  constexpr int kFirstWithClusters = 90;
  if (code.ptxVersion < kFirstWithClusters) return 0;
  RNNFAST_RETURN_IF_ERROR(cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  LaunchShape largest;
  largest.shared_bytes = most_bytes;
  largest.cluster_blocks = kMostClusterBlocks;
  RNNFAST_RETURN_IF_ERROR(allow(block_of_a_multiprocessor, largest));
  for (unsigned blocks = 1; blocks <= kMostClusterBlocks; ++blocks) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = blocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kSpreadMostWarps * kWarpLanes);
    config.dynamicSmemBytes = most_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters[blocks - 1], block_of_a_multiprocessor, &config);
    if (error == cudaSuccess) continue;
    // Drivers refuse sizes with several errors. The next call would report them again; those that stay, it will.
    (void)cudaGetLastError();
    clusters[blocks - 1] = 0;
  }
  return 0;
}

size_t forward_workspace_bytes(const LayerForward& layer) {
  return SpreadEngine<Exchange>::forward_workspace_bytes(layer);
}

int forward(const LayerForward& layer, const Context& context) {
  return SpreadEngine<Exchange>::forward(layer, context);
}

size_t backward_workspace_bytes(const LayerBackward& layer) {
  return SpreadEngine<Exchange>::backward_workspace_bytes(layer);
}

int backward(const LayerBackward& layer, const BackwardProducts (&products)[2], const Context& context) {
  return SpreadEngine<Exchange>::backward(layer, products, context);
}

}  // namespace rnnfast::cuda::persistent_cluster
