#include "call_cuda.h"

#include <ATen/Functions.h>
#include <c10/cuda/CUDAStream.h>

#include <numeric>

namespace rnnfast::ops {

DeviceSequenceTensors::DeviceSequenceTensors(const Geometry& g, const LayerArguments& a, const LayerTensors& tensors) {
  sequence_.steps = g.steps;
  sequence_.batch = g.batch;
  sequence_.rows = g.rows;
  sequence_.packed = g.packed;
  sequence_.reset = tensors.reset.defined() ? tensors.reset.const_data_ptr<bool>() : nullptr;
  if (g.packed) {
    check_batch_sizes(g, *a.batch_sizes);
    batch_sizes_ = a.batch_sizes->contiguous();
    const int64_t* sizes = batch_sizes_.const_data_ptr<int64_t>();
    offsets_.resize(g.steps);
    std::exclusive_scan(sizes, sizes + g.steps, offsets_.begin(), int64_t{0});
    sequence_.batch_sizes = sizes;
    sequence_.offsets = offsets_.data();
  }
  if (a.lengths) {
    Tensor lengths = *a.lengths;
    if (lengths.device().is_cpu()) {
      // Pinned memory would be read when the stream comes to it, and again at each replay of a graph, with what the
      // caller has written there by then. The clone is pageable: it has been read when the call returns, and torch
      // refuses to capture its copy.
      lengths = lengths.clone(at::MemoryFormat::Contiguous);
      check_lengths(g, lengths);
    }
    lengths_ = lengths.to(tensors.input.device(), /*non_blocking=*/true).contiguous();
    sequence_.lengths = lengths_->const_data_ptr<int64_t>();
  }
}

// The allocator aligns to 512 bytes, and hands memory out again only behind this stream's work.
EngineCall::EngineCall(size_t workspace_bytes, const Tensor& like)
    : workspace_(at::empty({static_cast<int64_t>(workspace_bytes)}, like.options().dtype(at::kByte))) {}

cuda::Context EngineCall::context() {
  return {c10::cuda::getCurrentCUDAStream().stream(), workspace_.data_ptr(), gemm_.gemm()};
}

std::string take_launch_error(int code) {
  const auto error = static_cast<cudaError_t>(code);
  if (error == cudaSuccess) return {};
  (void)cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace rnnfast::ops
