// Owns: what every operator on CUDA hands to an engine beside tensors: the device's view of time, the workspace, the
// stream. Must not know: engines, equations.
#pragma once

#include <string>
#include <vector>

#include "gemm_cuda.h"
#include "layer.h"

namespace rnnfast::ops {

// The tensors and the array behind a Sequence. Lengths on the device are not looked at: the kernels take one below 0 as
// 0 and one above T as T, which costs no synchronisation. Lengths on the CPU are checked, and those that were checked
// are copied.
class DeviceSequenceTensors {
 public:
  DeviceSequenceTensors(const Geometry& geometry, const LayerArguments& arguments, const LayerTensors& tensors);
  const Sequence& sequence() const { return sequence_; }
  const OptionalTensor& lengths() const { return lengths_; }  // on the device; none if every row has T steps

 private:
  Sequence sequence_;
  Tensor batch_sizes_;
  OptionalTensor lengths_;
  std::vector<int64_t> offsets_;
};

// One call of an engine on the current stream.
class EngineCall {
 public:
  EngineCall(size_t workspace_bytes, const Tensor& like);
  EngineCall(const EngineCall&) = delete;
  EngineCall& operator=(const EngineCall&) = delete;

  // As long as this object lives.
  cuda::Context context();

 private:
  Tensor workspace_;
  CublasGemm gemm_;
};

// What a launcher's code means; empty: nothing failed. The error is taken off the device, or the next call would report
// it again.
std::string take_launch_error(int code);

}  // namespace rnnfast::ops
