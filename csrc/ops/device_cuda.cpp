#include "device_cuda.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "params.h"

namespace rnnfast::ops {
namespace {

plan::Device ask(c10::DeviceIndex index) {
  const cudaDeviceProp& properties = *at::cuda::getDeviceProperties(index);
  plan::Device device;
  device.capability = properties.major * 10 + properties.minor;
  device.multiprocessors = properties.multiProcessorCount;
  device.shared_bytes = static_cast<int64_t>(properties.sharedMemPerBlockOptin);
  device.registers = properties.regsPerMultiprocessor;
  device.cooperative = properties.cooperativeLaunch != 0;
#ifndef RNNFAST_OWN_CELL  // which the plan gives no persistent engine
  const c10::cuda::CUDAGuard guard(index);
  int clusters[cuda::kMostClusterBlocks];
  const auto error = static_cast<cudaError_t>(cuda::persistent_cluster::active_clusters(clusters));
  if (error == cudaSuccess) {
    std::copy(std::begin(clusters), std::end(clusters), device.clusters.begin());
  } else {
    (void)cudaGetLastError();  // or the next call would report it again
    TORCH_WARN("rnnfast: how many clusters of blocks cuda:", static_cast<int>(index),
               " runs at once could not be asked, so that no layer runs in clusters: ", cudaGetErrorString(error));
  }
#endif
  return device;
}

}  // namespace

plan::Device cuda_device(int index) {
  static std::mutex mutex;
  static std::map<c10::DeviceIndex, plan::Device> known;  // what a device is does not change
  const auto device = index < 0 ? c10::cuda::current_device() : static_cast<c10::DeviceIndex>(index);
  const std::lock_guard lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known.emplace(device, ask(device)).first->second;
}

bool tf32_allowed() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

}  // namespace rnnfast::ops
