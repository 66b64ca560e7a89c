// Owns: the stepwise engine along a tangent: the derivative of a layer, and that of its backward. Forward a step is
//
//     t_hgates = t_h W_hh^T                                 the caller's GEMM
//     t_h, t_c = cell's tangent                             tangent_step_kernel
//
// and backward, from the last step to the first in the direction's own order,
//
//     grad_igates, grad_hgates, grad_h, grad_c = cell's backward on dual numbers     backward_tangent_step_kernel
//     grad_h += grad_hgates W_hh                            the caller's GEMM, of values and tangents at once
//     grad_h's tangent += grad_hgates t_W_hh                a GEMM where W_hh has a tangent
//
// A row of gradients has its tangent behind it: [rows, 2, features]. Of a diagonal cell the kernels multiply with w_hh
// themselves, unit by unit. The products over all steps are the caller's. States and gates are known; of the tangents
// of states t_h_n and t_c_n hold the running ones. A reset cuts these where they are read, and the gradient of h as
// well, since a GEMM adds to every row. Must not know: equations (csrc/cell has them), tensors.
#include "cell/dual.h"
#include "stepwise.cuh"

namespace rnnfast::cuda::stepwise {
namespace {

// Rows of one step; null: zero.
template <class scalar_t>
struct StepRows {
  scalar_t* data = nullptr;
  int64_t stride = 0;

  StepRows() = default;
  StepRows(const Sequence& sequence, const Rows& rows, int64_t step)
      : data(row_pointer<scalar_t>(sequence, rows, step)), stride(rows.stride_b) {}

  __device__ __forceinline__ scalar_t load(int64_t row, int64_t feature) const {
    return data != nullptr ? data[row * stride + feature] : scalar_t(0);
  }
  __device__ __forceinline__ void store(int64_t row, int64_t feature, scalar_t value) const {
    data[row * stride + feature] = value;
  }
};

template <class scalar_t>
struct DualStepRows {
  StepRows<scalar_t> value, tangent;

  DualStepRows() = default;
  DualStepRows(const Sequence& sequence, const DualRows& rows, int64_t step)
      : value(sequence, rows.value, step), tangent(sequence, rows.tangent, step) {}

  __device__ __forceinline__ Dual<scalar_t> load(int64_t row, int64_t feature) const {
    return {value.load(row, feature), tangent.load(row, feature)};
  }
};

// Of the state before a step, where the initial one may be zero.
template <class scalar_t>
__device__ __forceinline__ scalar_t load_previous(const Previous<scalar_t>& previous, const int64_t* lengths,
                                                  int64_t row, int64_t features, int64_t feature) {
  if (row < previous.rows && lives(lengths, row, previous.step)) return previous.data[row * previous.stride + feature];
  return previous.initial != nullptr ? previous.initial[row * features + feature] : scalar_t(0);
}

template <class scalar_t>
struct TangentStepDirection {
  int64_t rows = 0, step = 0;
  const scalar_t* saved = nullptr;          // [rows, S*H]
  scalar_t* t_saved = nullptr;              // [rows, S*H] or null
  StepRows<scalar_t> igates, hgates;        // rows of G*H: a cell without a tangent of its own
  StepRows<scalar_t> t_igates, t_hgates;    // rows of G*H: what does not come from the state before
  const scalar_t* t_product = nullptr;      // [rows, G*H]: t_h W_hh^T; null for a diagonal cell
  const scalar_t* w_hh = nullptr;           // [G*H]: a diagonal cell's
  StepRows<scalar_t> state;                 // rows of H, the state that the cell reads: c where there is one, else h
  Previous<scalar_t> previous;              // the same state of the step before
  StepRows<scalar_t> t_output, t_c_output;  // rows of H
  scalar_t *t_h = nullptr, *t_c = nullptr;  // [B, H], running; t_c of cells with two states
  Border entered;
};

template <class scalar_t>
struct TangentStep {
  int64_t hidden_size = 0;
  const int64_t* lengths = nullptr;
  TangentStepDirection<scalar_t> direction[2];
};

// Equations: Cell::tangent, or Cell::forward on dual numbers.
// Mapping: a thread computes a unit of a row, all gates of it, and goes on to further rows. Everything lies in global
// memory, each element belongs to one thread, and there is nothing to synchronise: the stream orders the steps.
template <class Cell, class scalar_t>
__global__ void __launch_bounds__(kThreads) tangent_step_kernel(const __grid_constant__ TangentStep<scalar_t> args) {
  constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved, kState = kStates - 1;
  const TangentStepDirection<scalar_t>& d = args.direction[blockIdx.z];
  const int64_t H = args.hidden_size, unit = first_feature<1>();
  if (unit >= H) return;

  for (int64_t row = first_row(); row < d.rows; row += row_stride()) {
    if (!lives(args.lengths, row, d.step)) {
      d.t_output.store(row, unit, 0);
      if constexpr (kStates == 2) d.t_c_output.store(row, unit, 0);
      continue;
    }
    const bool cut = d.entered.cuts(args.lengths, row);
    const scalar_t t_h = cut ? scalar_t(0) : d.t_h[row * H + unit];

    scalar_t saved[kSaved + 1], t_saved[kSaved + 1], state[kStates] = {}, previous[kStates] = {};
    scalar_t t_igates[kGates], t_hgates[kGates], t_state[kStates], t_previous[kStates] = {};
#pragma unroll
    for (int s = 0; s < kSaved; ++s) saved[s] = d.saved[(row * kSaved + s) * H + unit];
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      const int64_t gate = g * H + unit;
      t_igates[g] = d.t_igates.load(row, gate);
      if constexpr (is_diagonal<Cell>) {
        t_hgates[g] = d.w_hh[gate] * t_h;
      } else {
        t_hgates[g] = cut ? scalar_t(0) : d.t_product[row * kGates * H + gate];
      }
      if constexpr (Cell::kSplitGates) t_hgates[g] += d.t_hgates.load(row, gate);
    }
    state[kState] = d.state.load(row, unit);
    if (!cut) {
      previous[kState] = load_previous(d.previous, args.lengths, row, H, unit);
      t_previous[kState] = kStates == 2 ? d.t_c[row * H + unit] : t_h;
    }

    if constexpr (has_tangent<Cell>) {
      Cell::tangent(saved, previous, state, t_igates, t_hgates, t_previous, t_state, t_saved);
    } else {
      using Number = Dual<scalar_t>;
      Number igates[kGates], hgates[kGates], from[kStates], to[kStates], keep[kSaved + 1];
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        igates[g] = {d.igates.load(row, g * H + unit), t_igates[g]};
        hgates[g] = {d.hgates.load(row, g * H + unit), t_hgates[g]};
      }
#pragma unroll
      for (int s = 0; s < kStates; ++s) from[s] = {previous[s], t_previous[s]};
      Cell::forward(igates, hgates, from, to, keep);
#pragma unroll
      for (int s = 0; s < kStates; ++s) t_state[s] = to[s].tangent;
#pragma unroll
      for (int s = 0; s < kSaved; ++s) t_saved[s] = keep[s].tangent;
    }

    d.t_output.store(row, unit, t_state[0]);
    d.t_h[row * H + unit] = t_state[0];
    if constexpr (kStates == 2) {
      d.t_c_output.store(row, unit, t_state[1]);
      d.t_c[row * H + unit] = t_state[1];
    }
    if (d.t_saved == nullptr) continue;
#pragma unroll
    for (int s = 0; s < kSaved; ++s) d.t_saved[(row * kSaved + s) * H + unit] = t_saved[s];
  }
}

template <class scalar_t>
struct BackwardTangentStepDirection {
  int64_t rows = 0, step = 0;
  const scalar_t *saved = nullptr, *t_saved = nullptr;  // [rows, S*H]
  const scalar_t *w_hh = nullptr, *t_w_hh = nullptr;    // [G*H]: a diagonal cell's; t_w_hh may be null
  DualStepRows<scalar_t> state;                         // rows of H, the state that the cell reads
  Previous<scalar_t> previous, t_previous;              // the same state of the step before
  DualStepRows<scalar_t> grad_output, grad_c_output;    // rows of H
  scalar_t *grad_h = nullptr, *grad_c = nullptr;        // [B, 2, H], carried; grad_c of cells with two states
  scalar_t* grad_igates = nullptr;                      // [rows, 2, G*H]
  scalar_t* grad_hgates = nullptr;                      // [rows, 2, G*H]: of cells that split their gates
  Border entered, left;                                 // on the way into this step, and from it into the next
};

template <class scalar_t>
struct BackwardTangentStep {
  int64_t hidden_size = 0;
  const int64_t* lengths = nullptr;
  BackwardTangentStepDirection<scalar_t> direction[2];
};

// Equations: Cell::backward on dual numbers. Of a diagonal cell also grad_h += sum over gates of w_hh * grad_hgates.
// Mapping: as above.
template <class Cell, class scalar_t>
__global__ void __launch_bounds__(kThreads)
    backward_tangent_step_kernel(const __grid_constant__ BackwardTangentStep<scalar_t> args) {
  using Number = Dual<scalar_t>;
  constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved, kState = kStates - 1;
  const BackwardTangentStepDirection<scalar_t>& d = args.direction[blockIdx.z];
  const int64_t H = args.hidden_size, unit = first_feature<1>();
  if (unit >= H) return;

  for (int64_t row = first_row(); row < d.rows; row += row_stride()) {
    const auto store_gates = [&](scalar_t* gates, const Number* grads) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        scalar_t* const gate = gates + (2 * row * kGates + g) * H + unit;
        gate[0] = grads[g].value;
        gate[kGates * H] = grads[g].tangent;
      }
    };
    Number grad_igates[kGates], grad_hgates[kGates];
    if (!lives(args.lengths, row, d.step)) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) grad_igates[g] = Number(0);
      store_gates(d.grad_igates, grad_igates);
      if constexpr (Cell::kSplitGates) store_gates(d.grad_hgates, grad_igates);
      continue;
    }
    const bool cut = d.entered.cuts(args.lengths, row);

    Number saved[kSaved + 1], state[kStates], previous[kStates], grad[kStates], grad_previous[kStates];
#pragma unroll
    for (int s = 0; s < kSaved; ++s) {
      const int64_t at = (row * kSaved + s) * H + unit;
      saved[s] = {d.saved[at], d.t_saved[at]};
    }
    for (int s = 0; s < kStates; ++s) state[s] = previous[s] = Number(0);
    state[kState] = d.state.load(row, unit);
    if (!cut) {
      previous[kState] = {load_previous(d.previous, args.lengths, row, H, unit),
                          load_previous(d.t_previous, args.lengths, row, H, unit)};
    }
    const auto carried = [&](const scalar_t* of) {
      return Number(of[2 * row * H + unit], of[(2 * row + 1) * H + unit]);
    };
    const auto carry = [&](const Number& grad, scalar_t* to) {
      to[2 * row * H + unit] = grad.value;
      to[(2 * row + 1) * H + unit] = grad.tangent;
    };
    grad[0] = d.grad_output.load(row, unit);
    if (!d.left.cuts(args.lengths, row)) grad[0] = grad[0] + carried(d.grad_h);
    if constexpr (kStates == 2) grad[1] = carried(d.grad_c) + d.grad_c_output.load(row, unit);

    Cell::backward(saved, previous, state, grad, grad_igates, grad_hgates, grad_previous);

    store_gates(d.grad_igates, grad_igates);
    if constexpr (Cell::kSplitGates) store_gates(d.grad_hgates, grad_hgates);
    if constexpr (is_diagonal<Cell>) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        const int64_t gate = g * H + unit;
        const Number w_hh(d.w_hh[gate], d.t_w_hh != nullptr ? d.t_w_hh[gate] : scalar_t(0));
        grad_previous[0] = grad_previous[0] + w_hh * grad_hgates[g];
      }
    }
    carry(grad_previous[0], d.grad_h);
    if constexpr (kStates == 2) carry(cut ? Number(0) : grad_previous[1], d.grad_c);
  }
}

template <class scalar_t>
struct EndsDirection {
  // forward
  const scalar_t *t_h0 = nullptr, *t_c0 = nullptr;  // [B, H] or null
  scalar_t *t_h_n = nullptr, *t_c_n = nullptr;      // [B, H]
  // backward
  const scalar_t *grad_h_n = nullptr, *t_grad_h_n = nullptr;  // [B, H] or null
  const scalar_t *grad_c_n = nullptr, *t_grad_c_n = nullptr;  // [B, H] or null
  scalar_t *t_grad_h0 = nullptr, *t_grad_c0 = nullptr;        // [B, H]
  scalar_t *grad_h = nullptr, *grad_c = nullptr;              // [B, 2, H]
  Border entered;                                             // on the way into the first step
};

// Both ends of a sequence. What belongs to c is null for cells with one state.
template <class scalar_t>
struct Ends {
  int64_t rows = 0, hidden_size = 0;
  const int64_t* lengths = nullptr;
  EndsDirection<scalar_t> direction[2];
};

template <class scalar_t>
__device__ __forceinline__ scalar_t load_or_zero(const scalar_t* from, int64_t at) {
  return from != nullptr ? from[at] : scalar_t(0);
}

// The running tangents start as those of the initial states. One thread a unit; nothing to synchronise.
// The 1 in the launch bounds, here and below, keeps ptxas from spilling registers for the sake of more blocks an SM.
template <class scalar_t>
__global__ void __launch_bounds__(kThreads, 1) first_tangents_kernel(const __grid_constant__ Ends<scalar_t> args) {
  const EndsDirection<scalar_t>& d = args.direction[blockIdx.z];
  const int64_t H = args.hidden_size, unit = first_feature<1>();
  if (unit >= H) return;
  for (int64_t row = first_row(); row < args.rows; row += row_stride()) {
    const int64_t at = row * H + unit;
    d.t_h_n[at] = load_or_zero(d.t_h0, at);
    if (d.t_c_n != nullptr) d.t_c_n[at] = load_or_zero(d.t_c0, at);
  }
}

// The carried gradients start as those of the last states. Mapping: as above.
template <class scalar_t>
__global__ void __launch_bounds__(kThreads, 1)
    first_gradient_tangents_kernel(const __grid_constant__ Ends<scalar_t> args) {
  const EndsDirection<scalar_t>& d = args.direction[blockIdx.z];
  const int64_t H = args.hidden_size, unit = first_feature<1>();
  if (unit >= H) return;
  for (int64_t row = first_row(); row < args.rows; row += row_stride()) {
    const int64_t at = row * H + unit, to = 2 * row * H + unit;
    d.grad_h[to] = load_or_zero(d.grad_h_n, at);
    d.grad_h[to + H] = load_or_zero(d.t_grad_h_n, at);
    if (d.grad_c == nullptr) continue;
    d.grad_c[to] = load_or_zero(d.grad_c_n, at);
    d.grad_c[to + H] = load_or_zero(d.t_grad_c_n, at);
  }
}

// The tangents of the gradients of the initial states: what was carried to the first step. Mapping: as above.
template <class scalar_t>
__global__ void __launch_bounds__(kThreads, 1)
    last_gradient_tangents_kernel(const __grid_constant__ Ends<scalar_t> args) {
  const EndsDirection<scalar_t>& d = args.direction[blockIdx.z];
  const int64_t H = args.hidden_size, unit = first_feature<1>();
  if (unit >= H) return;
  for (int64_t row = first_row(); row < args.rows; row += row_stride()) {
    const int64_t at = row * H + unit, from = (2 * row + 1) * H + unit;
    d.t_grad_h0[at] = d.entered.cuts(args.lengths, row) ? scalar_t(0) : d.grad_h[from];
    if (d.grad_c != nullptr) d.t_grad_c0[at] = d.grad_c[from];
  }
}

// ------------------------------------------------------------------------------------------------ host
template <class scalar_t>
struct TangentWorkspace {
  scalar_t* t_product[2] = {};  // [B, G*H]: null for a diagonal cell
  scalar_t* t_saved[2] = {};    // compact [N, S*H]: backward
  scalar_t* grad_h[2] = {};     // [B, 2, H]: backward
  scalar_t* grad_c[2] = {};     // [B, 2, H]: backward, cells with two states
  size_t bytes = 0;

  TangentWorkspace(const LayerTangent& layer, void* base) {
    const CellInfo info = cell_info(layer.cell);
    const int64_t B = layer.sequence.batch, H = layer.hidden_size;
    Workspace workspace(base);
    for (int k = 0; k < layer.directions; ++k) {
      if (!info.diagonal) t_product[k] = workspace.take<scalar_t>(B * info.gates * H);
      if (!layer.backward) continue;
      t_saved[k] = workspace.take<scalar_t>(layer.sequence.rows * info.saved * H);
      grad_h[k] = workspace.take<scalar_t>(B * 2 * H);
      if (info.states == 2) grad_c[k] = workspace.take<scalar_t>(B * 2 * H);
    }
    bytes = workspace.bytes();
  }
};

// The two loops over time of one call: enqueues kernels and products in the order of the steps, and back again.
template <class Cell, class scalar_t>
class TangentLoops {
 public:
  TangentLoops(const LayerTangent& layer, const Context& context)
      : layer_(layer),
        context_(context),
        stream_(static_cast<cudaStream_t>(context.stream)),
        workspace_(layer, context.workspace) {}

  int run() const {
    const int64_t steps = layer_.sequence.steps;
    RNNFAST_RETURN_IF_ERROR(run_ends(first_tangents_kernel<scalar_t>));
    for (int64_t index = 0; index < steps; ++index) {
      const TangentStep<scalar_t> step = forward_step_at(index);
      if (most_rows(step) == 0) continue;
      if constexpr (!is_diagonal<Cell>) RNNFAST_RETURN_IF_ERROR(multiply_hidden(step));
      RNNFAST_RETURN_IF_ERROR(launch(tangent_step_kernel<Cell, scalar_t>, shape(most_rows(step)), stream_, step));
    }
    if (!layer_.backward) return 0;
    RNNFAST_RETURN_IF_ERROR(run_ends(first_gradient_tangents_kernel<scalar_t>));
    for (int64_t index = steps - 1; index >= 0; --index) {
      const BackwardTangentStep<scalar_t> step = backward_step_at(index);
      if (most_rows(step) == 0) continue;
      RNNFAST_RETURN_IF_ERROR(
          launch(backward_tangent_step_kernel<Cell, scalar_t>, shape(most_rows(step)), stream_, step));
      if constexpr (!is_diagonal<Cell>) RNNFAST_RETURN_IF_ERROR(back_through_hidden(step));
    }
    return run_ends(last_gradient_tangents_kernel<scalar_t>);
  }

 private:
  static constexpr int kGates = Cell::kGates;

  static const scalar_t* data(const void* pointer) { return static_cast<const scalar_t*>(pointer); }
  static scalar_t* data(void* pointer) { return static_cast<scalar_t*>(pointer); }

  LaunchShape shape(int64_t rows) const { return rows_shape(layer_.hidden_size, rows, 1, layer_.directions); }

  int run_ends(void (*kernel)(Ends<scalar_t>)) const {
    Ends<scalar_t> ends{layer_.sequence.batch, layer_.hidden_size, layer_.sequence.lengths, {}};
    for (int k = 0; k < layer_.directions; ++k) {
      const DirectionTangent& d = layer_.direction[k];
      EndsDirection<scalar_t>& to = ends.direction[k];
      to.t_h0 = data(d.h0.tangent);
      to.t_h_n = data(d.t_h_n);
      to.grad_h_n = data(d.grad_h_n.value);
      to.t_grad_h_n = data(d.grad_h_n.tangent);
      to.t_grad_h0 = data(d.t_grad_h0);
      to.grad_h = workspace_.grad_h[k];
      to.entered = border_into_step(d.reverse, 0);
      if (Cell::kStates == 1) continue;
      to.t_c0 = data(d.c0.tangent);
      to.t_c_n = data(d.t_c_n);
      to.grad_c_n = data(d.grad_c_n.value);
      to.t_grad_c_n = data(d.grad_c_n.tangent);
      to.t_grad_c0 = data(d.t_grad_c0);
      to.grad_c = workspace_.grad_c[k];
    }
    return launch(kernel, shape(layer_.sequence.batch), stream_, ends);
  }

  // The border on the way into a step, of which there is none behind the last.
  Border border_into_step(bool reverse, int64_t index) const {
    const Sequence& sequence = layer_.sequence;
    return index < sequence.steps ? border_into(sequence, reverse, Position(sequence, reverse, index)) : Border();
  }

  // The state that the cell reads.
  static const DualRows& state(const DirectionTangent& d) { return Cell::kStates == 2 ? d.c : d.output; }
  static const DualPointer& initial(const DirectionTangent& d) { return Cell::kStates == 2 ? d.c0 : d.h0; }

  // What the cells of a step read and write; index counts the steps in each direction's own order.
  TangentStep<scalar_t> forward_step_at(int64_t index) const {
    const Sequence& sequence = layer_.sequence;
    const int64_t H = layer_.hidden_size;
    TangentStep<scalar_t> step{H, sequence.lengths, {}};
    for (int k = 0; k < layer_.directions; ++k) {
      const DirectionTangent& d = layer_.direction[k];
      const Position at(sequence, d.reverse, index);
      const auto rows = [&](const Rows& of) { return StepRows<scalar_t>(sequence, of, at.step); };
      const int64_t saved = sequence.offset(at.step) * Cell::kSaved * H;
      TangentStepDirection<scalar_t>& to = step.direction[k];
      to.rows = sequence.batch_size(at.step);
      to.step = at.step;
      to.saved = advance(data(d.saved), saved);
      to.t_saved = advance(workspace_.t_saved[k], saved);
      to.igates = rows(d.igates);
      to.hgates = rows(d.hgates);
      to.t_igates = rows(d.t_igates);
      to.t_hgates = rows(d.t_hgates);
      to.t_product = workspace_.t_product[k];
      if (is_diagonal<Cell>) to.w_hh = data(d.w_hh.value);
      to.state = rows(state(d).value);
      to.previous = previous_rows<scalar_t>(sequence, at, state(d).value, initial(d).value);
      to.t_output = rows(d.output.tangent);
      to.t_h = data(d.t_h_n);
      to.entered = border_into(sequence, d.reverse, at);
      if (Cell::kStates == 1) continue;
      to.t_c_output = rows(d.c.tangent);
      to.t_c = data(d.t_c_n);
    }
    return step;
  }

  BackwardTangentStep<scalar_t> backward_step_at(int64_t index) const {
    const Sequence& sequence = layer_.sequence;
    const int64_t H = layer_.hidden_size;
    BackwardTangentStep<scalar_t> step{H, sequence.lengths, {}};
    for (int k = 0; k < layer_.directions; ++k) {
      const DirectionTangent& d = layer_.direction[k];
      const Position at(sequence, d.reverse, index);
      const auto rows = [&](const DualRows& of) { return DualStepRows<scalar_t>(sequence, of, at.step); };
      const int64_t offset = sequence.offset(at.step), saved = offset * Cell::kSaved * H;
      BackwardTangentStepDirection<scalar_t>& to = step.direction[k];
      to.rows = sequence.batch_size(at.step);
      to.step = at.step;
      to.saved = advance(data(d.saved), saved);
      to.t_saved = advance(workspace_.t_saved[k], saved);
      if (is_diagonal<Cell>) {
        to.w_hh = data(d.w_hh.value);
        to.t_w_hh = data(d.w_hh.tangent);
      }
      to.state = rows(state(d));
      to.previous = previous_rows<scalar_t>(sequence, at, state(d).value, initial(d).value);
      to.t_previous = previous_rows<scalar_t>(sequence, at, state(d).tangent, initial(d).tangent);
      to.grad_output = rows(d.grad_output);
      to.grad_h = workspace_.grad_h[k];
      to.grad_igates = data(d.grad_igates) + offset * 2 * kGates * H;
      if (Cell::kSplitGates) to.grad_hgates = data(d.grad_hgates) + offset * 2 * kGates * H;
      to.entered = border_into_step(d.reverse, index);
      to.left = border_into_step(d.reverse, index + 1);
      if (Cell::kStates == 1) continue;
      to.grad_c_output = rows(d.grad_c);
      to.grad_c = workspace_.grad_c[k];
    }
    return step;
  }

  // t_product = t_h W_hh^T
  int multiply_hidden(const TangentStep<scalar_t>& step) const {
    const int64_t H = layer_.hidden_size;
    for (int k = 0; k < layer_.directions; ++k) {
      RNNFAST_RETURN_IF_ERROR(multiply(context_.gemm, {.dtype = layer_.dtype,
                                                       .m = step.direction[k].rows,
                                                       .n = kGates * H,
                                                       .k = H,
                                                       .a = step.direction[k].t_h,
                                                       .lda = H,
                                                       .b = layer_.direction[k].w_hh.value,
                                                       .ldb = H,
                                                       .transpose_b = true,
                                                       .c = workspace_.t_product[k],
                                                       .ldc = kGates * H}));
    }
    return 0;
  }

  // grad_h += grad_hgates W_hh, values and tangents, whose rows take turns; the tangents also += grad_hgates t_W_hh
  int back_through_hidden(const BackwardTangentStep<scalar_t>& step) const {
    const int64_t H = layer_.hidden_size, GH = kGates * H;
    for (int k = 0; k < layer_.directions; ++k) {
      const BackwardTangentStepDirection<scalar_t>& s = step.direction[k];
      const scalar_t* const grad_hgates = Cell::kSplitGates ? s.grad_hgates : s.grad_igates;
      const DualPointer& w_hh = layer_.direction[k].w_hh;
      RNNFAST_RETURN_IF_ERROR(multiply(context_.gemm, {.dtype = layer_.dtype,
                                                       .m = 2 * s.rows,
                                                       .n = H,
                                                       .k = GH,
                                                       .a = grad_hgates,
                                                       .lda = GH,
                                                       .b = w_hh.value,
                                                       .ldb = H,
                                                       .c = s.grad_h,
                                                       .ldc = H,
                                                       .accumulate = true}));
      if (w_hh.tangent == nullptr) continue;
      RNNFAST_RETURN_IF_ERROR(multiply(context_.gemm, {.dtype = layer_.dtype,
                                                       .m = s.rows,
                                                       .n = H,
                                                       .k = GH,
                                                       .a = grad_hgates,
                                                       .lda = 2 * GH,
                                                       .b = w_hh.tangent,
                                                       .ldb = H,
                                                       .c = s.grad_h + H,
                                                       .ldc = 2 * H,
                                                       .accumulate = true}));
    }
    return 0;
  }

  const LayerTangent& layer_;
  const Context& context_;
  const cudaStream_t stream_;
  const TangentWorkspace<scalar_t> workspace_;
};

template <class Cell>
int run(const LayerTangent& layer, const Context& context) {
  if constexpr (has_two_products<Cell>) {
    return cudaErrorNotSupported;
  } else {
    return layer.dtype == Dtype::f64 ? TangentLoops<Cell, double>(layer, context).run()
                                     : TangentLoops<Cell, float>(layer, context).run();
  }
}

}  // namespace

size_t tangent_workspace_bytes(const LayerTangent& layer) {
  return layer.dtype == Dtype::f64 ? TangentWorkspace<double>(layer, nullptr).bytes
                                   : TangentWorkspace<float>(layer, nullptr).bytes;
}

int tangent(const LayerTangent& layer, const Context& context) {
  if (layer.sequence.batch == 0) return 0;
  switch (layer.cell) {
#define RNNFAST_TANGENT(name, Cell) \
  case CellKind::name:              \
    return run<Cell>(layer, context);
    RNNFAST_FOR_EACH_CELL(RNNFAST_TANGENT)
#undef RNNFAST_TANGENT
  }
  __builtin_unreachable();
}

}  // namespace rnnfast::cuda::stepwise
