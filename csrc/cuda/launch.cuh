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
};

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error != cudaSuccess ? error : cudaGetLastError();
}

}  // namespace rnnfast::cuda
