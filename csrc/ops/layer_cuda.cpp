// Owns: the operators on CUDA: the device's view of time, the products over all steps, the workspace, the launch of the
// engine that the plan chose.
// Must not know: equations, loops over time, kernels.
#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "cuda_engine.h"
#include "device_cuda.h"
#include "gemm_cuda.h"
#include "layer.h"

namespace rnnfast::ops {
namespace {

// The tensors and the array behind a Sequence. Lengths on the device are not looked at: the kernels take one below 0 as
// 0 and one above T as T, which costs no synchronisation. Lengths on the CPU are checked, and those that were checked
// are copied.
class SequenceTensors {
 public:
  SequenceTensors(const Geometry& g, const LayerArguments& a, const LayerTensors& tensors) {
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
      sequence_.lengths = lengths_.const_data_ptr<int64_t>();
    }
  }
  const Sequence& sequence() const { return sequence_; }
  const Tensor& lengths() const { return lengths_; }  // undefined if every row has T steps

 private:
  Sequence sequence_;
  Tensor batch_sizes_, lengths_;
  std::vector<int64_t> offsets_;
};

struct Launchers {
  size_t (*forward_workspace_bytes)(const LayerForward& layer);
  int (*forward)(const LayerForward& layer, const cuda::Context& context);
  size_t (*backward_workspace_bytes)(const LayerBackward& layer);
  int (*backward)(const LayerBackward& layer, const cuda::BackwardProducts (&products)[2],
                  const cuda::Context& context);
};

#define RNNFAST_LAUNCHERS(engine)                                                                        \
  {cuda::engine::forward_workspace_bytes, cuda::engine::forward, cuda::engine::backward_workspace_bytes, \
   cuda::engine::backward}
#ifdef RNNFAST_OWN_CELL  // which the plan gives no persistent engine
#define RNNFAST_PERSISTENT_LAUNCHERS(engine) \
  {                                          \
  }
#else
#define RNNFAST_PERSISTENT_LAUNCHERS RNNFAST_LAUNCHERS
#endif
constexpr Launchers kLaunchers[plan::kEngines] = {
    // in the order of plan::Engine
    RNNFAST_PERSISTENT_LAUNCHERS(persistent_cta),
    RNNFAST_PERSISTENT_LAUNCHERS(persistent_cluster),
    RNNFAST_PERSISTENT_LAUNCHERS(persistent_grid),
    RNNFAST_LAUNCHERS(stepwise),
};
#undef RNNFAST_PERSISTENT_LAUNCHERS
#undef RNNFAST_LAUNCHERS

// The engine that the plan chose for one call, and the way to run it on the current stream.
class PlannedEngine {
 public:
  PlannedEngine(const Geometry& g, bool tf32, bool backward, bool noise)
      : plan_(choose_cuda_engine({g.cell, g.dtype, tf32, g.steps, g.batch, g.hidden_size, g.projection,
                                  static_cast<int>(g.directions), backward, noise, g.layer_norm},
                                 cuda_device())) {}

  void run(LayerForward layer, const Tensor& like) const {
    layer.spread = plan_.tile.spread;
    const Tensor workspace = allocate(launchers().forward_workspace_bytes(layer), like);
    CublasGemm gemm;
    check(launchers().forward(layer, context(workspace, gemm)));
  }
  void run(LayerBackward layer, const cuda::BackwardProducts (&products)[2], const Tensor& like) const {
    layer.spread = plan_.tile.spread;
    const Tensor workspace = allocate(launchers().backward_workspace_bytes(layer), like);
    CublasGemm gemm;
    check(launchers().backward(layer, products, context(workspace, gemm)));
  }

 private:
  const Launchers& launchers() const { return kLaunchers[static_cast<int>(plan_.engine)]; }
  // The allocator aligns to 512 bytes, and hands memory out again only behind this stream's work.
  static Tensor allocate(size_t bytes, const Tensor& like) {
    return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
  }
  static cuda::Context context(const Tensor& workspace, CublasGemm& gemm) {
    return {c10::cuda::getCurrentCUDAStream().stream(), workspace.data_ptr(), gemm.gemm()};
  }
  void check(int code) const {
    const auto error = static_cast<cudaError_t>(code);
    if (error == cudaSuccess) return;
    (void)cudaGetLastError();  // or the next call would report it again
    TORCH_CHECK(false, "rnnfast: the engine ", plan::kEngineNames[static_cast<int>(plan_.engine)],
                " failed to launch: ", cudaGetErrorString(error), " (", plan_.tile.blocks, " blocks of ",
                plan_.tile.threads, " threads and ", plan_.tile.shared_bytes, " bytes of shared memory)");
  }

  plan::Plan plan_;
};

// igates [N, G*H] = x W_ih^T + b_ih, all steps at once. Where they are normalised, the bias comes behind that.
void project_input(const Geometry& g, const Tensor& x, const WeightView<const Tensor>& weights, Tensor igates) {
  if (g.biases && !g.layer_norm) {
    at::addmm_out(igates, *weights.b_ih, x, weights.w_ih->t());
  } else {
    at::mm_out(igates, x, weights.w_ih->t());
  }
}

template <CellKind kind>
ForwardResult forward(const Tensor& input, const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                      const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& reset,
                      int64_t save_, const OptionalTensor& seed, at::ArrayRef<double> noise_, bool layer_norm) {
  const LayerArguments arguments{input, h0, c0, weights, batch_sizes, lengths, reset, layer_norm};
  const Geometry g = check_layer(kind, arguments);
  const Save save = check_save(kind, save_);
  const NoiseTensors noise(g, input, seed, noise_);
  const c10::cuda::CUDAGuard guard(input.device());
  const LayerTensors layer(arguments);
  const SequenceTensors sequence(g, arguments, layer);
  ForwardTensors tensors(g, input, save, /*gaps=*/false);  // the engine writes the zeros past a length
  if (g.empty()) {
    finish_empty_forward(layer, tensors);
    return tensors.result();
  }

  const Tensor x = layer.input.reshape({g.rows, g.input_size});
  const Tensor igates = at::empty({g.directions, g.rows, g.info.gates * g.hidden_size}, input.options());
  LayerForward params = forward_params(g, save, layer, tensors);
  params.noise = noise.params;
  params.sequence = sequence.sequence();
  params.tf32 = tf32_allowed();
  const PlannedEngine engine(g, params.tf32, /*backward=*/false, noise.any());
  for (int64_t d = 0; d < g.directions; ++d) {
    project_input(g, x, WeightView(g, layer.weights.data(), d), igates[d]);
    params.direction[d].igates = igates[d].data_ptr();
  }
  engine.run(params, input);
  return tensors.result();
}

// grad_w_hh [G*H] of a diagonal cell: the sum over rows of grad_hgates [N, G*H] times h_prev [N, H], in float32 for the
// 16-bit types, some rows at a time.
void sum_diagonal(const Tensor& grad_hgates, const Tensor& h_prev, const Tensor& grad_w_hh) {
  constexpr int64_t kElements = int64_t{16} << 20;
  const at::ScalarType acc = grad_w_hh.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t gates = grad_hgates.size(1) / h_prev.size(1);
  const int64_t most = std::max<int64_t>(1, kElements / grad_hgates.size(1));
  Tensor sum = at::zeros(grad_w_hh.sizes(), grad_w_hh.options().dtype(acc));
  for (int64_t first = 0; first < grad_hgates.size(0); first += most) {
    const int64_t rows = std::min(most, grad_hgates.size(0) - first);
    const Tensor states = h_prev.narrow(0, first, rows).to(acc).repeat({1, gates});
    sum.add_(states.mul_(grad_hgates.narrow(0, first, rows)).sum(0));
  }
  grad_w_hh.copy_(sum);
}

// The tensors behind BackwardProducts, [D, N, P or H]; undefined where the layer has no use for them.
struct ProductTensors {
  ProductTensors(const Geometry& g, const Tensor& like) {
    const auto empty = [&](int64_t features) { return at::empty({g.directions, g.rows, features}, like.options()); };
    h_prev = empty(g.output_size);
    if (g.projection) grad_h = empty(g.output_size);
    if (g.projection) hidden = empty(g.hidden_size);
    if (g.info.two_products) gated = empty(g.hidden_size);
  }
  cuda::BackwardProducts direction(int64_t d) const {
    return {block(h_prev, d), block(grad_h, d), block(hidden, d), block(gated, d)};
  }

  Tensor h_prev, grad_h, hidden, gated;
};

// The gradients that are sums over all rows: of the input and of the weights.
void reduce_gradients(const Geometry& g, const LayerTensors& layer, const SequenceTensors& sequence,
                      const ProductTensors& products, BackwardTensors& tensors) {
  Tensor x = layer.input.reshape({g.rows, g.input_size});
  if (tensors.mask[3] && sequence.lengths().defined()) {  // past a length the input may be anything, NaN too
    const Tensor step = at::arange(g.steps, sequence.lengths().options()).unsqueeze(1);
    x = x.masked_fill(step.ge(sequence.lengths()).view({g.rows, 1}), 0);
  }
  Tensor grad_x = tensors.mask[0] ? tensors.grad_input.view({g.rows, g.input_size}) : Tensor();
  for (int64_t d = 0; d < g.directions; ++d) {
    const Tensor grad_igates = tensors.grad_igates[d], grad_hgates = tensors.grad_hgates[d];
    if (grad_x.defined()) {
      const Tensor& w_ih = *WeightView(g, layer.weights.data(), d).w_ih;
      d == 0 ? at::mm_out(grad_x, grad_igates, w_ih) : grad_x.addmm_(grad_igates, w_ih);
    }
    if (!tensors.mask[3]) continue;
    const WeightView grads(g, tensors.grad_weights.data(), d);
    at::mm_out(*grads.w_ih, grad_igates.t(), x);
    const int64_t first = g.info.first_gates * g.hidden_size, others = g.info.gates * g.hidden_size - first;
    const auto grad_w_hh = [&](int64_t start, int64_t length, const Tensor& operand) {
      Tensor grad = grads.w_hh->narrow(0, start, length);
      at::mm_out(grad, grad_hgates.narrow(1, start, length).t(), operand);
    };
    g.info.diagonal ? sum_diagonal(grad_hgates, products.h_prev[d], *grads.w_hh)
                    : grad_w_hh(0, first, products.h_prev[d]);
    if (g.info.two_products) grad_w_hh(first, others, products.gated[d]);
    if (g.biases && !g.layer_norm) {
      at::sum_out(*grads.b_ih, grad_igates, 0);
      g.info.split_gates ? at::sum_out(*grads.b_hh, grad_hgates, 0) : grads.b_hh->copy_(*grads.b_ih);
    }
    if (g.projection) at::mm_out(*grads.w_hr, products.grad_h[d].t(), products.hidden[d]);
  }
}

template <CellKind kind>
BackwardResult backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                        const OptionalTensor& grad_c_n, const OptionalTensor& grad_c, const Tensor& input,
                        const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                        const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& reset,
                        const Tensor& output, const Tensor& c, const Tensor& saved, OutputMask output_mask,
                        const OptionalTensor& seed, at::ArrayRef<double> noise_, bool layer_norm) {
  const LayerArguments arguments{input, h0, c0, weights, batch_sizes, lengths, reset, layer_norm};
  const Geometry g = check_layer(kind, arguments);
  check_gradients(g, arguments, grad_output, grad_h_n, grad_c_n, grad_c, output, c, saved);
  const NoiseTensors noise(g, input, seed, noise_);
  noise.check_backward(g);
  const c10::cuda::CUDAGuard guard(input.device());
  const LayerTensors layer(arguments);
  const SequenceTensors sequence(g, arguments, layer);
  BackwardTensors tensors(g, layer, grad_output, grad_h_n, grad_c_n, grad_c, output, c, saved, output_mask,
                          /*gaps=*/false);  // past a length the gradients of the gates are zero, and so all others
  if (g.empty()) {
    finish_empty_backward(tensors);
    return tensors.result();
  }

  tensors.allocate_gate_gradients(g);
  LayerBackward params = backward_params(g, layer, tensors);
  params.noise = noise.params;
  params.sequence = sequence.sequence();
  params.tf32 = tf32_allowed();
  const PlannedEngine engine(g, params.tf32, /*backward=*/true, noise.any());
  const ProductTensors product_tensors(g, input);
  cuda::BackwardProducts products[2];
  const bool recompute = saved.numel() == 0 && g.saved_values() > 0;
  const Tensor x = recompute ? layer.input.reshape({g.rows, g.input_size}) : Tensor();
  for (int64_t d = 0; d < g.directions; ++d) {
    products[d] = product_tensors.direction(d);
    if (recompute) project_input(g, x, WeightView(g, layer.weights.data(), d), tensors.grad_igates[d]);
  }
  // Those of the norms, and with them of the biases, are no products over all steps: the engine makes them.
  if (g.layer_norm && output_mask[3]) set_weight_gradients(g, tensors, params);
  engine.run(params, products, input);
  reduce_gradients(g, layer, sequence, product_tensors, tensors);
  return tensors.result();
}

}  // namespace

TORCH_LIBRARY_IMPL(RNNFAST_LIBRARY, CUDA, m) {
#define RNNFAST_CUDA(name, Type)           \
  m.impl(#name, &forward<CellKind::name>); \
  m.impl(#name "_backward", &backward<CellKind::name>);
  RNNFAST_FOR_EACH_CELL(RNNFAST_CUDA)
#undef RNNFAST_CUDA
}

}  // namespace rnnfast::ops
