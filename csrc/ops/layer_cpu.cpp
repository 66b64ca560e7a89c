// Owns: the operators on the CPU: the host's view of time, the workspace, the call of the engine.
// Must not know: equations, loops over time.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "layer.h"

namespace rnnfast::ops {
namespace {

int max_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// A step of a small layer takes microseconds, so its workspace is not worth an allocation.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    if (bytes > sizeof(small_)) large_ = at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().dtype(at::kByte));
  }
  void* data() { return large_.defined() ? large_.data_ptr() : small_; }  // the allocator aligns to 64, too

 private:
  alignas(64) static thread_local char small_[32 << 10];
  Tensor large_;
};
alignas(64) thread_local char Workspace::small_[32 << 10];

// The arrays behind a Sequence.
class HostSequence {
 public:
  HostSequence(const Geometry& g, const LayerArguments& a, const LayerTensors& tensors) {
    sequence_.steps = g.steps;
    sequence_.batch = g.batch;
    sequence_.rows = g.rows;
    sequence_.packed = g.packed;
    sequence_.reset = tensors.reset.defined() ? tensors.reset.const_data_ptr<bool>() : nullptr;
    if (g.packed) read_batch_sizes(g, a.batch_sizes->contiguous());
    if (a.lengths) sort_lengths(g, *a.lengths);
  }
  const Sequence& sequence() const { return sequence_; }

 private:
  void read_batch_sizes(const Geometry& g, const Tensor& tensor) {
    check_batch_sizes(g, tensor);
    const int64_t* values = tensor.const_data_ptr<int64_t>();
    batch_sizes_.assign(values, values + g.steps);
    set_steps();
  }

  void sort_lengths(const Geometry& g, const Tensor& tensor) {
    TORCH_CHECK(tensor.device().is_cpu(), "rnnfast.", g.info.name, ": lengths is on ", tensor.device(),
                ", it takes cpu for input on cpu");
    check_lengths(g, tensor);
    const Tensor contiguous = tensor.contiguous();
    const int64_t* lengths = contiguous.const_data_ptr<int64_t>();
    batch_sizes_.assign(g.steps, 0);
    for (int64_t b = 0; b < g.batch; ++b) {
      if (lengths[b] > 0) ++batch_sizes_[lengths[b] - 1];
    }
    for (int64_t t = g.steps - 1; t > 0; --t) batch_sizes_[t - 1] += batch_sizes_[t];
    set_steps();

    batch_index_.resize(g.batch);
    std::iota(batch_index_.begin(), batch_index_.end(), 0);
    std::stable_sort(batch_index_.begin(), batch_index_.end(),
                     [lengths](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    sequence_.batch_index = batch_index_.data();
  }

  void set_steps() {
    offsets_.resize(batch_sizes_.size());
    std::exclusive_scan(batch_sizes_.begin(), batch_sizes_.end(), offsets_.begin(), int64_t{0});
    sequence_.batch_sizes = batch_sizes_.data();
    sequence_.offsets = offsets_.data();
    sequence_.rows = batch_sizes_.empty() ? 0 : offsets_.back() + batch_sizes_.back();
  }

  Sequence sequence_;
  std::vector<int64_t> batch_sizes_, offsets_, batch_index_;
};

template <CellKind kind>
ForwardResult forward(const Tensor& input, const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                      const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& reset,
                      int64_t save_) {
  const LayerArguments arguments{input, h0, c0, weights, batch_sizes, lengths, reset};
  const Geometry geometry = check_layer(kind, arguments);
  const Save save = check_save(kind, save_);
  const LayerTensors layer(arguments);
  const HostSequence host(geometry, arguments, layer);
  ForwardTensors tensors(geometry, input, save, /*gaps=*/lengths.has_value());
  if (geometry.empty() || host.sequence().rows == 0) {
    finish_empty_forward(layer, tensors);
    return tensors.result();
  }

  LayerForward params = forward_params(geometry, save, layer, tensors);
  params.sequence = host.sequence();
  const int threads = max_threads();
  const cpu::Engine& engine = cpu::engine();
  Workspace workspace(engine.forward_workspace_bytes(params, threads));
  engine.forward(params, workspace.data(), threads);
  return tensors.result();
}

template <CellKind kind>
BackwardResult backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                        const OptionalTensor& grad_c_n, const OptionalTensor& grad_c, const Tensor& input,
                        const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                        const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& reset,
                        const Tensor& output, const Tensor& c, const Tensor& saved, OutputMask output_mask) {
  const LayerArguments arguments{input, h0, c0, weights, batch_sizes, lengths, reset};
  const Geometry geometry = check_layer(kind, arguments);
  check_gradients(geometry, arguments, grad_output, grad_h_n, grad_c_n, grad_c, output, c, saved);
  const LayerTensors layer(arguments);
  const HostSequence host(geometry, arguments, layer);
  BackwardTensors tensors(geometry, layer, grad_output, grad_h_n, grad_c_n, grad_c, output, c, saved, output_mask,
                          /*gaps=*/lengths.has_value());
  if (geometry.empty() || host.sequence().rows == 0) {
    finish_empty_backward(tensors);
    return tensors.result();
  }

  LayerBackward params = backward_params(geometry, layer, tensors);
  params.sequence = host.sequence();
  if (output_mask[0]) {
    params.grad_input = {tensors.grad_input.data_ptr(), geometry.packed ? 0 : tensors.grad_input.stride(0),
                         tensors.grad_input.stride(geometry.packed ? 0 : 1)};
  }
  if (output_mask[3]) {
    for (int64_t d = 0; d < geometry.directions; ++d) {
      Tensor* grads = &tensors.grad_weights[d * geometry.weights_per_direction()];
      DirectionBackward& direction = params.direction[d];
      direction.grad_w_ih = grads[0].data_ptr();
      direction.grad_w_hh = grads[1].data_ptr();
      if (geometry.biases) {
        direction.grad_b_ih = grads[2].data_ptr();
        direction.grad_b_hh = grads[3].data_ptr();
      }
      if (geometry.projection) direction.grad_w_hr = grads[geometry.biases ? 4 : 2].data_ptr();
    }
  }
  const int threads = max_threads();
  const cpu::Engine& engine = cpu::engine();
  Workspace workspace(engine.backward_workspace_bytes(params, threads));
  engine.backward(params, workspace.data(), threads);
  return tensors.result();
}

}  // namespace

TORCH_LIBRARY_IMPL(rnnfast, CPU, m) {
#define RNNFAST_CPU(name, Type)            \
  m.impl(#name, &forward<CellKind::name>); \
  m.impl(#name "_backward", &backward<CellKind::name>);
  RNNFAST_FOR_EACH_CELL(RNNFAST_CPU)
#undef RNNFAST_CPU
}

}  // namespace rnnfast::ops
