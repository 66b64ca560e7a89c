// Owns: what every operator on the CPU hands to the engine beside tensors: the host's view of time, the number of
// threads.
// Must not know: engines, equations.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "layer.h"
#include "memory.h"

namespace rnnfast::ops {

// Run the engine for the layer's dtype on the threads there are, with this thread's workspace.
template <class Layer>
void run_with_workspace(const Layer& layer, size_t (*cpu::EngineTable::*workspace_bytes)(const Layer&, int),
                        void (*cpu::EngineTable::*run)(const Layer&, void*, int)) {
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const cpu::EngineTable& engine = cpu::engine(layer.dtype);
  Workspace workspace((engine.*workspace_bytes)(layer, threads));
  (engine.*run)(layer, workspace.data(), threads);
}
inline void run_engine(const LayerForward& layer) {
  run_with_workspace(layer, &cpu::EngineTable::forward_workspace_bytes, &cpu::EngineTable::forward);
}
inline void run_engine(const LayerBackward& layer) {
  run_with_workspace(layer, &cpu::EngineTable::backward_workspace_bytes, &cpu::EngineTable::backward);
}
inline void run_engine(const LayerTangent& layer) {
  run_with_workspace(layer, &cpu::EngineTable::tangent_workspace_bytes, &cpu::EngineTable::tangent);
}

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

}  // namespace rnnfast::ops
