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

// What a block gets of dynamic shared memory unless the kernel asks for more.
constexpr size_t kSharedBytesUnasked = 48 << 10;

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  if (shape.shared_bytes > kSharedBytesUnasked) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error != cudaSuccess ? error : cudaGetLastError();
}

// Ends the calling function with the error of expression, if any.
#define RNNFAST_RETURN_IF_ERROR(expression)                                       \
  do {                                                                            \
    if (const int error = static_cast<int>(expression); error != 0) return error; \
  } while (false)

}  // namespace rnnfast::cuda
