// Owns: the operators on CUDA, first derivatives included: the products over all steps, the launch of the engine that
// the plan chose.
// Must not know: equations, loops over time, kernels.
#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "call_cuda.h"
#include "cuda_engine.h"
#include "device_cuda.h"
#include "products.h"

namespace rnnfast::ops {
namespace {

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
    EngineCall call(launchers().forward_workspace_bytes(layer), like);
    check(launchers().forward(layer, call.context()));
  }
  void run(LayerBackward layer, const cuda::BackwardProducts (&products)[2], const Tensor& like) const {
    layer.spread = plan_.tile.spread;
    EngineCall call(launchers().backward_workspace_bytes(layer), like);
    check(launchers().backward(layer, products, call.context()));
  }

 private:
  const Launchers& launchers() const { return kLaunchers[static_cast<int>(plan_.engine)]; }
  void check(int code) const {
    const std::string error = take_launch_error(code);
    TORCH_CHECK(error.empty(), "rnnfast: the engine ", plan::kEngineNames[static_cast<int>(plan_.engine)],
                " failed to launch: ", error, " (", plan_.tile.blocks, " blocks of ", plan_.tile.threads,
                " threads and ", plan_.tile.shared_bytes, " bytes of shared memory)");
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
  const DeviceSequenceTensors sequence(g, arguments, layer);
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
void reduce_gradients(const Geometry& g, const LayerTensors& layer, const DeviceSequenceTensors& sequence,
                      const ProductTensors& products, BackwardTensors& tensors) {
  const Tensor x = tensors.mask[3] ? rows_within_lengths(g, sequence.lengths(), layer.input) : Tensor();
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
    if (g.info.diagonal) {
      grads.w_hh->copy_(sum_diagonal_product(g, products.h_prev[d], grad_hgates));
    } else {
      grad_w_hh(0, first, products.h_prev[d]);
    }
    if (g.info.two_products) grad_w_hh(first, others, products.gated[d]);
    if (g.biases && !g.layer_norm) {
      at::sum_out(*grads.b_ih, grad_igates, 0);
      g.info.split_gates ? at::sum_out(*grads.b_hh, grad_hgates, 0) : grads.b_hh->copy_(*grads.b_ih);
    }
    if (g.projection) at::mm_out(*grads.w_hr, products.grad_h[d].t(), products.hidden[d]);
  }
}

// Backward up to the sums over all rows: the gradients of the initial states and of the gates, and what goes with
// these.
ProductTensors run_backward(const Geometry& g, const LayerTensors& layer, const DeviceSequenceTensors& sequence,
                            const NoiseTensors& noise, bool norm_gradients, BackwardTensors& tensors) {
  tensors.allocate_gate_gradients(g);
  LayerBackward params = backward_params(g, layer, tensors);
  params.noise = noise.params;
  params.sequence = sequence.sequence();
  params.tf32 = tf32_allowed();
  const PlannedEngine engine(g, params.tf32, /*backward=*/true, noise.any());
  const ProductTensors product_tensors(g, layer.input);
  cuda::BackwardProducts products[2];
  const bool recompute = tensors.saved.numel() == 0 && g.saved_values() > 0;
  const Tensor x = recompute ? layer.input.reshape({g.rows, g.input_size}) : Tensor();
  for (int64_t d = 0; d < g.directions; ++d) {
    products[d] = product_tensors.direction(d);
    if (recompute) project_input(g, x, WeightView(g, layer.weights.data(), d), tensors.grad_igates[d]);
  }
  if (norm_gradients) set_weight_gradients(g, tensors, params);
  engine.run(params, products, layer.input);
  return product_tensors;
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
  const DeviceSequenceTensors sequence(g, arguments, layer);
  BackwardTensors tensors(g, layer, grad_output, grad_h_n, grad_c_n, grad_c, output, c, saved, output_mask,
                          /*gaps=*/false);  // past a length the gradients of the gates are zero, and so all others
  if (g.empty()) {
    finish_empty_backward(tensors);
    return tensors.result();
  }

  // Those of the norms, and with them of the biases, are no products over all steps: the engine makes them.
  const ProductTensors products =
      run_backward(g, layer, sequence, noise, /*norm_gradients=*/g.layer_norm && output_mask[3], tensors);
  reduce_gradients(g, layer, sequence, products, tensors);
  return tensors.result();
}

// For what was traced with CPU tensors and runs with CUDA ones: autograd does not call it here.
template <CellKind kind>
BackwardWithStatesResult backward_with_states(const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                                              const OptionalTensor&, const Tensor&, const Tensor&,
                                              const OptionalTensor&, at::TensorList, const OptionalTensor&,
                                              const OptionalTensor&, const OptionalTensor&, const Tensor&,
                                              const Tensor&, const Tensor&, OutputMask) {
  TORCH_CHECK(false, "rnnfast.", cell_info(kind).name,
              "_backward_with_states: expected CPU tensors, got CUDA ones, whose engines keep no gradients of states; "
              "trace with CUDA tensors what is to run with them");
}

// The weight gradients of each group of rows apart.
template <CellKind kind>
BackwardResult grouped_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                const OptionalTensor& grad_c_n, const OptionalTensor& grad_c, const Tensor& input,
                                const Tensor& h0, const OptionalTensor& c0, at::TensorList weights,
                                const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                                const OptionalTensor& reset, const Tensor& output, const Tensor& c, const Tensor& saved,
                                OutputMask output_mask, int64_t groups) {
  const LayerArguments arguments{input, h0, c0, weights, batch_sizes, lengths, reset};
  const Geometry g = check_layer(kind, arguments);
  check_gradients(g, arguments, grad_output, grad_h_n, grad_c_n, grad_c, output, c, saved);
  const c10::cuda::CUDAGuard guard(input.device());
  const LayerTensors layer(arguments);
  const DeviceSequenceTensors sequence(g, arguments, layer);
  check_groups(g, sequence.sequence(), groups);
  OutputMask mask = output_mask;
  mask[3] = false;
  BackwardTensors tensors(g, layer, grad_output, grad_h_n, grad_c_n, grad_c, output, c, saved, mask, /*gaps=*/false);
  std::vector<Tensor> grad_weights;
  if (g.empty()) {
    finish_empty_backward(tensors);
    if (output_mask[3]) grad_weights = empty_grouped_gradients(weights, groups);
  } else {
    const NoiseTensors no_noise(g, input, std::nullopt, {});
    const ProductTensors products = run_backward(g, layer, sequence, no_noise, /*norm_gradients=*/false, tensors);
    reduce_gradients(g, layer, sequence, products, tensors);
    if (output_mask[3])
      grad_weights = grouped_gradients(g, rows_within_lengths(g, sequence.lengths(), layer.input),
                                       products.h_prev.unbind(), tensors.grad_igates, tensors.grad_hgates, groups);
  }
  auto [grad_input, grad_h0, grad_c0, none] = tensors.result();
  return {grad_input, grad_h0, grad_c0, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(RNNFAST_LIBRARY, CUDA, m) {
#define RNNFAST_CUDA(name, Type)                                                \
  m.impl(#name, &forward<CellKind::name>);                                      \
  m.impl(#name "_backward", &backward<CellKind::name>);                         \
  m.impl(#name "_backward_with_states", &backward_with_states<CellKind::name>); \
  m.impl(#name "_grouped_backward", &grouped_backward<CellKind::name>);
  RNNFAST_FOR_EACH_CELL(RNNFAST_CUDA)
#undef RNNFAST_CUDA
}

}  // namespace rnnfast::ops
