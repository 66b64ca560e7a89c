// Owns: the one way to launch a kernel. It is typed, so that the arguments are checked against the kernel's parameters
// and the simulator can call the kernel as a function.
// Must not know: any kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace rnnfast::cuda {

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;
  bool cooperative = false;     // all blocks are resident at once, or the launch fails
  unsigned cluster_blocks = 1;  // along x; sm_90
};

// The driver may load a kernel that it is asked or told about, which is no part of a graph that this thread captures.
class Uncaptured {
 public:
  Uncaptured() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Uncaptured() { (void)cudaThreadExchangeStreamCaptureMode(&mode_); }
  Uncaptured(const Uncaptured&) = delete;
  Uncaptured& operator=(const Uncaptured&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Shared memory above 48 KB and clusters above 8 blocks must be asked for, kernel by kernel and device by device. The
// limit becomes the device's own, whatever the launch needs: another thread may launch the same kernel with less.
template <class... Parameters>
cudaError_t allow(void (*kernel)(Parameters...), const LaunchShape& shape) {
  constexpr size_t kSharedBytes = 48 * 1024;
  constexpr unsigned kClusterBlocks = 8;
  if (shape.shared_bytes <= kSharedBytes && shape.cluster_blocks <= kClusterBlocks) return cudaSuccess;
  const Uncaptured uncaptured;
  if (shape.shared_bytes > kSharedBytes) {
    int device = 0, most_bytes = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error == cudaSuccess) {
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes);
    }
    if (error != cudaSuccess) return error;
  }
  if (shape.cluster_blocks > kClusterBlocks) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (shape.cooperative) {
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    config.numAttrs = 1;
  } else if (shape.cluster_blocks > 1) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = shape.cluster_blocks;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    // A multiprocessor for each block while there are any, as the plan counts on.
    attributes[1].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
    attributes[1].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicySpread;
    config.numAttrs = 2;
  }
  if (const cudaError_t error = allow(kernel, shape); error != cudaSuccess) return error;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Ends the calling function with the error of expression, if any.
#define RNNFAST_RETURN_IF_ERROR(expression)                                       \
  do {                                                                            \
    if (const int error = static_cast<int>(expression); error != 0) return error; \
  } while (false)

}  // namespace rnnfast::cuda
