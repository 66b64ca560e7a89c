// Owns: the operators <cell>_jvp and <cell>_backward_jvp on CUDA: the launch of the stepwise engine, and the products
// over all steps behind it.
// Must not know: equations, loops over time, kernels.
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "call_cuda.h"
#include "tangent.h"

namespace rnnfast::ops::tangent_cuda {
namespace {

void check(const Geometry& g, int code) {
  const std::string error = take_launch_error(code);
  TORCH_CHECK(error.empty(), "rnnfast.", g.info.name,
              ": the engine stepwise failed to launch along a tangent: ", error);
}

class Cuda {
 public:
  static constexpr bool kProducts = false;

  Cuda(const Geometry& geometry, const LayerArguments& arguments, const LayerTensors& tensors)
      : g_(geometry), guard_(arguments.input.device()), time_(geometry, arguments, tensors) {}

  const Sequence& sequence() const { return time_.sequence(); }
  const OptionalTensor& lengths() const { return time_.lengths(); }

  Tensor previous_states(const Tensor& states, const Tensor& initial, int64_t d) const {
    const Tensor previous = at::empty({g_.rows, g_.output_size}, states.options());
    cuda::PreviousStates params{g_.dtype, g_.output_size, 1, sequence(), {}};
    params.direction[0] = {d == 1, rows_of(g_, states, d * g_.output_size), block(initial, d), previous.data_ptr()};
    EngineCall call(cuda::previous_states_workspace_bytes(sequence()), states);
    check(g_, cuda::previous_states(params, call.context()));
    return previous;
  }

  void run(LayerTangent params, TangentTensors& tensors) const {
    const Tensor& like = tensors.h0.value;
    Tensor grad_igates, grad_hgates;
    if (params.backward) {
      grad_igates = at::empty({g_.directions, g_.rows, 2, g_.info.gates * g_.hidden_size}, like.options());
      grad_hgates = g_.info.split_gates ? at::empty_like(grad_igates) : grad_igates;
    }
    for (int64_t d = 0; d < g_.directions; ++d) {
      params.direction[d].grad_igates = block(grad_igates, d);
      params.direction[d].grad_hgates = block(grad_hgates, d);
    }
    {
      EngineCall call(cuda::stepwise::tangent_workspace_bytes(params), like);
      check(g_, cuda::stepwise::tangent(params, call.context()));
    }
    for (int64_t d = 0; params.backward && d < g_.directions; ++d) {
      const DualTensor igates = parts(grad_igates[d]), hgates = parts(grad_hgates[d]);
      const WeightView<const DualTensor> weights(g_, tensors.weights.data(), d);
      if (tensors.t_grad_input.defined()) {
        Tensor sum = tensors.t_grad_input.view({g_.rows, g_.input_size});
        d == 0 ? at::mm_out(sum, igates.tangent, weights.w_ih->value) : sum.addmm_(igates.tangent, weights.w_ih->value);
        if (weights.w_ih->tangent.defined()) sum.addmm_(igates.value, weights.w_ih->tangent);
      }
      if (!tensors.t_grad_weights.empty()) grad_weights(tensors, igates, hgates, d);
    }
  }

 private:
  // Of [N, 2, G*H].
  static DualTensor parts(const Tensor& pairs) { return {pairs.select(1, 0), pairs.select(1, 1)}; }

  // A gradient is a product, and its tangent the sum of two: a' b + a b'.
  void grad_weights(TangentTensors& tensors, const DualTensor& igates, const DualTensor& hgates, int64_t d) const {
    const WeightView grads(g_, tensors.t_grad_weights.data(), d);
    at::mm_out(*grads.w_ih, igates.tangent.t(), tensors.rows);
    if (tensors.input.tangent.defined())
      grads.w_ih->addmm_(igates.value.t(), rows_within_lengths(g_, lengths(), tensors.input.tangent));
    const Tensor& h = tensors.previous[d];
    const Tensor t_h = previous_states(tensors.output.tangent, tensors.h0.tangent, d);
    if (g_.info.diagonal) {
      grads.w_hh->copy_(sum_diagonal_product(g_, h, hgates.tangent).add_(sum_diagonal_product(g_, t_h, hgates.value)));
    } else {
      at::mm_out(*grads.w_hh, hgates.tangent.t(), h);
      grads.w_hh->addmm_(hgates.value.t(), t_h);
    }
    if (!g_.biases) return;
    at::sum_out(*grads.b_ih, igates.tangent, 0);
    g_.info.split_gates ? at::sum_out(*grads.b_hh, hgates.tangent, 0) : grads.b_hh->copy_(*grads.b_ih);
  }

  const Geometry g_;
  const c10::cuda::CUDAGuard guard_;
  const DeviceSequenceTensors time_;
};

}  // namespace

TORCH_LIBRARY_IMPL(RNNFAST_LIBRARY, CUDA, m) {
#define RNNFAST_CUDA(name, Type)                            \
  m.impl(#name "_jvp", &tangent_jvp<Cuda, CellKind::name>); \
  m.impl(#name "_backward_jvp", &tangent_backward_jvp<Cuda, CellKind::name>);
  RNNFAST_FOR_EACH_CELL(RNNFAST_CUDA)
#undef RNNFAST_CUDA
}

}  // namespace rnnfast::ops::tangent_cuda
