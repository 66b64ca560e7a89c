#include "device_cuda.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>

namespace rnnfast::ops {

plan::Device cuda_device(int index) {
  const cudaDeviceProp& properties = index < 0 ? *at::cuda::getCurrentDeviceProperties()
                                               : *at::cuda::getDeviceProperties(static_cast<c10::DeviceIndex>(index));
  plan::Device device;
  device.capability = properties.major * 10 + properties.minor;
  device.multiprocessors = properties.multiProcessorCount;
  device.shared_bytes = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  device.registers = properties.regsPerMultiprocessor;
  device.cooperative = properties.cooperativeLaunch != 0;
  device.clusters = properties.major == 9 || properties.major == 10;  // those of sm_12x have 8 blocks at most
  return device;
}

bool tf32_allowed() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

}  // namespace rnnfast::ops
