#include "previous_states.cuh"

#include "device_noise.cuh"

namespace rnnfast::cuda {
namespace {

template <class scalar_t>
struct GatheredDirection {
  DeviceRows<scalar_t> states;        // rows of F
  const scalar_t* initial = nullptr;  // [B, F] or null
  scalar_t* previous = nullptr;       // compact [N, F]
  bool reverse = false;
};

template <class scalar_t>
struct Gathered {
  int64_t rows = 0, features = 0;  // N, F
  DeviceSequence sequence;
  DeviceNoise<acc_type<scalar_t>> noise;
  GatheredDirection<scalar_t> direction[2];
};

// Mapping: a thread an element, rows counting through all steps. Nothing to synchronise.
template <class scalar_t>
__global__ void __launch_bounds__(kThreads) previous_states_kernel(const __grid_constant__ Gathered<scalar_t> args) {
  const GatheredDirection<scalar_t>& d = args.direction[blockIdx.z];
  const int64_t F = args.features, feature = first_feature<1>();
  if (feature >= F) return;
  for (int64_t row = first_row(); row < args.rows; row += row_stride()) {
    const int step = args.sequence.step_of(row), slot = static_cast<int>(row - args.sequence.row(step, 0));
    if (args.sequence.lives(step, slot)) {
      const scalar_t* initial = d.initial != nullptr ? d.initial + slot * F : nullptr;
      scalar_t state = previous_state(args.sequence, d.reverse, step, slot, d.states, initial, feature);
      if (args.noise.dropout) from_acc(args.noise.mask(d.reverse, slot, feature) * to_acc(state), state);
      d.previous[row * F + feature] = state;
    } else {
      store_zero<1>(d.previous + row * F + feature);
    }
  }
}

template <class scalar_t>
int gather(const PreviousStates& states, const Noise& noise, const DeviceSequence& sequence, cudaStream_t stream) {
  Gathered<scalar_t> args{states.sequence.rows, states.features, sequence, DeviceNoise<acc_type<scalar_t>>(noise), {}};
  for (int k = 0; k < states.directions; ++k) {
    const PreviousStates::Direction& d = states.direction[k];
    args.direction[k] = {DeviceRows<scalar_t>(d.states, states.sequence), static_cast<const scalar_t*>(d.initial),
                         static_cast<scalar_t*>(d.previous), d.reverse};
  }
  return launch(previous_states_kernel<scalar_t>, rows_shape(args.features, args.rows, 1, states.directions), stream,
                args);
}

}  // namespace

int enqueue_previous_states(const PreviousStates& states, const Noise& noise, const DeviceSequence& sequence,
                            cudaStream_t stream) {
  return dispatch_dtype<void>(states.dtype, [&](auto, auto scalar) {
    return gather<typename decltype(scalar)::type>(states, noise, sequence, stream);
  });
}

size_t previous_states_workspace_bytes(const Sequence& sequence) {
  Workspace workspace(nullptr);
  workspace.take<int64_t>(offsets_count(sequence));
  return workspace.bytes();
}

int previous_states(const PreviousStates& states, const Context& context) {
  const auto stream = static_cast<cudaStream_t>(context.stream);
  Workspace workspace(context.workspace);
  DeviceSequence sequence;
  RNNFAST_RETURN_IF_ERROR(
      device_sequence(states.sequence, workspace.take<int64_t>(offsets_count(states.sequence)), stream, sequence));
  if (states.sequence.rows == 0) return 0;
  return enqueue_previous_states(states, {}, sequence, stream);
}

}  // namespace rnnfast::cuda
