// Owns: the backward of the stepwise engine. After what BackwardPreparation does over all steps, a step is, from the
// last to the first in the direction's own order,
//
//     grad_h += grad_output; grad_hidden = grad_h W_hr              with a projection: a kernel and a GEMM
//     grad_igates, grad_hgates, grad_h, grad_c = cell's backward    backward_step_kernel
//     grad_h += grad_hgates W_hh                                    the caller's GEMM
//     grad_h += m (grad_hgates W_hh)                                with recurrent dropout: a GEMM and a kernel
//
// Of a cell with two products a step, two_products.cuh stands between the kernel and the last GEMM. With layer
// normalisation norm_backward_kernel (stepwise_norm.cuh) stands for backward_step_kernel. Of a diagonal cell
// backward_step_kernel does the last two as well, unit by unit.
//
// The workspace's grad_h and grad_c, in the accumulation type, carry the gradient of the state from a step to the one
// before it. A reset between the two cuts grad_h where it is read, since the GEMM adds to every row.
// Must not know: equations (csrc/cell has them), tensors.
#include "backward_preparation.cuh"
#include "stepwise_norm.cuh"
#include "stepwise_step.cuh"
#include "two_products.cuh"

namespace rnnfast::cuda::stepwise {
namespace {

// Equations: Cell::backward. Of a diagonal cell also grad_h += m * (sum over gates of w_hh * grad_hgates).
// Mapping: a thread computes kWidth units of a row, all gates of each, and goes on to further rows. It reads its saved
// values before it writes gradients to the same place. Everything lies in global memory, each element
// belongs to one thread, and there is nothing to synchronise: the stream orders the steps.
// The 1 in the launch bounds keeps ptxas from spilling float64 registers for the sake of more blocks an SM.
template <class Cell, class scalar_t, int kWidth>
__global__ void __launch_bounds__(kThreads, 1)
    backward_step_kernel(const __grid_constant__ BackwardStep<scalar_t> args) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;
  const BackwardStepDirection<scalar_t>& d = args.direction[blockIdx.z];
  const int64_t H = args.hidden_size;
  const int64_t unit = first_feature<kWidth>();
  if (unit >= H) return;

  for (int64_t row = first_row(); row < d.rows; row += row_stride()) {
    const auto gate = [&](int g) { return (row * kGates + g) * H + unit; };
    if (!lives(args.lengths, row, d.step)) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        store_zero<kWidth>(d.grad_igates + gate(g));
        if (d.grad_hgates != nullptr) store_zero<kWidth>(d.grad_hgates + gate(g));
      }
      if (d.hidden != nullptr) store_zero<kWidth>(d.hidden + row * H + unit);
      continue;
    }
    const bool cut = d.entered.cuts(args.lengths, row);

    acc_t previous[kStates][kWidth] = {}, state[kStates][kWidth] = {};
    if constexpr (kStates == 2) {
      if (!cut) load(d.c_prev.row(args.lengths, row, H) + unit, previous[1]);
      load(d.c + row * d.c_stride + unit, state[1]);
    } else {
      if (!cut) load(d.h_prev.row(args.lengths, row, H) + unit, previous[0]);
      load(d.output + row * d.output_stride + unit, state[0]);
    }

    acc_t saved[kSaved + 1][kWidth];
#pragma unroll
    for (int s = 0; s < kSaved; ++s) load(d.saved + (row * kSaved + s) * H + unit, saved[s]);

    acc_t grad[kStates][kWidth] = {}, more[kWidth];
    if (d.grad_hidden != nullptr) {
      load(d.grad_hidden + row * H + unit, grad[0]);
    } else {
      if (!d.left.cuts(args.lengths, row)) load(d.grad_h + row * H + unit, grad[0]);
      if (d.grad_output != nullptr) {
        load(d.grad_output + row * d.grad_output_stride + unit, more);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) grad[0][k] += more[k];
      }
    }
    if constexpr (kStates == 2) {
      load(d.grad_c + row * H + unit, grad[1]);
      if (d.grad_c_output != nullptr) {
        load(d.grad_c_output + row * d.grad_c_output_stride + unit, more);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) grad[1][k] += more[k];
      }
    }

    // Zoneout: the part of the last state, and the candidate's in its place.
    const DeviceNoise<acc_t>& noise = args.noise;
    acc_t kept[kStates][kWidth] = {};
    if (noise.zoneout_h > 0 && d.grad_hidden == nullptr) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k)
        kept[0][k] = divide_gradient(noise.keep_h(d.reverse, d.step, row, unit + k), grad[0][k]);
    }
    if constexpr (kStates == 2) {
      if (noise.zoneout_c > 0) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          kept[1][k] = divide_gradient(noise.keep_c(d.reverse, d.step, row, unit + k), grad[1][k]);
          acc_t keep[kSaved], from[kStates] = {acc_t(0), previous[1][k]};
          for (int s = 0; s < kSaved; ++s) keep[s] = saved[s][k];
          state[1][k] = Cell::candidate(keep, from);
        }
      }
    }

    acc_t grad_igates[kGates][kWidth], grad_hgates[kGates][kWidth], grad_previous[kStates][kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      acc_t keep[kSaved + 1], from[kStates], to[kStates], grad_to[kStates], gi[kGates], gh[kGates], grad_from[kStates];
#pragma unroll
      for (int s = 0; s < kSaved; ++s) keep[s] = saved[s][k];
#pragma unroll
      for (int s = 0; s < kStates; ++s) from[s] = previous[s][k], to[s] = state[s][k], grad_to[s] = grad[s][k];
      Cell::backward(keep, from, to, grad_to, gi, gh, grad_from);
#pragma unroll
      for (int g = 0; g < kGates; ++g) grad_igates[g][k] = gi[g], grad_hgates[g][k] = gh[g];
#pragma unroll
      for (int s = 0; s < kStates; ++s) grad_previous[s][k] = grad_from[s] + kept[s][k];
    }

#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      store(grad_igates[g], d.grad_igates + gate(g));
      if (d.grad_hgates != nullptr) store(grad_hgates[g], d.grad_hgates + gate(g));
    }
    if constexpr (is_diagonal<Cell>) {
      acc_t product[kWidth] = {};
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        acc_t weight[kWidth];
        load(d.w_hh + g * H + unit, weight);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) product[k] += weight[k] * rounded<scalar_t>(grad_hgates[g][k]);
      }
#pragma unroll
      for (int k = 0; k < kWidth; ++k)
        grad_previous[0][k] += noise.dropout ? noise.mask(d.reverse, row, unit + k) * product[k] : product[k];
    }
    if (d.grad_h != nullptr) store(grad_previous[0], d.grad_h + row * H + unit);
    if constexpr (kStates == 2) {
      acc_t* grad_c = d.grad_c + row * H + unit;
      cut ? store_zero<kWidth>(grad_c) : store(grad_previous[1], grad_c);
      if (d.hidden != nullptr) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          acc_t keep[kSaved], to[kStates] = {acc_t(0), state[1][k]};
#pragma unroll
          for (int s = 0; s < kSaved; ++s) keep[s] = saved[s][k];
          more[k] = Cell::hidden(keep, to);
        }
        store(more, d.hidden + row * H + unit);
      }
    }
  }
}

template <class scalar_t>
struct ProjectedDirection {
  int64_t rows = 0, step = 0;
  bool reverse = false;
  const scalar_t* grad_output = nullptr;  // rows of P; null: zero
  int64_t grad_output_stride = 0;
  acc_type<scalar_t>* carried = nullptr;  // [B, P]
  scalar_t* grad_h = nullptr;             // [rows, P]
  Border left;
};

template <class scalar_t>
struct Projected {
  int64_t output_size = 0;
  const int64_t* lengths = nullptr;
  DeviceNoise<acc_type<scalar_t>> noise;
  ProjectedDirection<scalar_t> direction[2];
};

// grad_h = carried + grad_output, and the carried gradient starts again from zero, or with zoneout from the part of the
// last state. One thread an element; nothing to synchronise.
template <class scalar_t>
__global__ void __launch_bounds__(kThreads) grad_projected_kernel(const __grid_constant__ Projected<scalar_t> args) {
  const ProjectedDirection<scalar_t>& d = args.direction[blockIdx.z];
  const int64_t P = args.output_size;
  const int64_t p = first_feature<1>();
  if (p >= P) return;
  for (int64_t row = first_row(); row < d.rows; row += row_stride()) {
    acc_type<scalar_t> grad = 0;
    if (lives(args.lengths, row, d.step)) {
      acc_type<scalar_t>* carried = d.carried + row * P + p;
      if (!d.left.cuts(args.lengths, row)) grad = *carried;
      if (d.grad_output != nullptr) grad += to_acc(d.grad_output[row * d.grad_output_stride + p]);
      *carried = args.noise.zoneout_h > 0 ? divide_gradient(args.noise.keep_h(d.reverse, d.step, row, p), grad) : 0;
    }
    from_acc(grad, d.grad_h[row * P + p]);
  }
}

template <class scalar_t>
struct MaskedDirection {
  int64_t rows = 0;
  bool reverse = false;
  const acc_type<scalar_t>* product = nullptr;  // [rows, P]
  acc_type<scalar_t>* carried = nullptr;        // [B, P]
};

template <class scalar_t>
struct Masked {
  int64_t output_size = 0;
  DeviceNoise<acc_type<scalar_t>> noise;
  MaskedDirection<scalar_t> direction[2];
};

// carried += m product; for a row that does not live the product is zero. One thread an element; nothing to
// synchronise.
template <class scalar_t>
__global__ void __launch_bounds__(kThreads) add_masked_kernel(const __grid_constant__ Masked<scalar_t> args) {
  const MaskedDirection<scalar_t>& d = args.direction[blockIdx.z];
  const int64_t P = args.output_size;
  const int64_t p = first_feature<1>();
  if (p >= P) return;
  for (int64_t row = first_row(); row < d.rows; row += row_stride())
    d.carried[row * P + p] += args.noise.mask(d.reverse, row, p) * d.product[row * P + p];
}

template <class scalar_t>
struct CarriedDirection {
  const scalar_t* grad_h_n = nullptr;  // [B, P]; null: zero
  const scalar_t* grad_c_n = nullptr;  // [B, H]; null: zero
  scalar_t* grad_h0 = nullptr;         // [B, P]
  scalar_t* grad_c0 = nullptr;         // [B, H]
  acc_type<scalar_t>* grad_h = nullptr;
  acc_type<scalar_t>* grad_c = nullptr;  // null: a cell with one state
  Border entered;                        // on the way into the first step
};

template <class scalar_t>
struct Carried {
  int64_t rows = 0, hidden_size = 0, output_size = 0;
  const int64_t* lengths = nullptr;
  CarriedDirection<scalar_t> direction[2];
};

// The carried gradients start as those of the last states. One thread a unit; nothing to synchronise.
template <class scalar_t>
__global__ void __launch_bounds__(kThreads) first_gradients_kernel(const __grid_constant__ Carried<scalar_t> args) {
  const CarriedDirection<scalar_t>& d = args.direction[blockIdx.z];
  const int64_t H = args.hidden_size, P = args.output_size;
  const int64_t unit = first_feature<1>();
  using acc_t = acc_type<scalar_t>;
  for (int64_t row = first_row(); row < args.rows; row += row_stride()) {
    const int64_t p = row * P + unit, h = row * H + unit;
    if (unit < P) d.grad_h[p] = d.grad_h_n != nullptr ? to_acc(d.grad_h_n[p]) : acc_t(0);
    if (unit < H && d.grad_c != nullptr) d.grad_c[h] = d.grad_c_n != nullptr ? to_acc(d.grad_c_n[h]) : acc_t(0);
  }
}

// The gradients of the initial states are what is carried in the end. One thread a unit; nothing to synchronise.
template <class scalar_t>
__global__ void __launch_bounds__(kThreads) last_gradients_kernel(const __grid_constant__ Carried<scalar_t> args) {
  const CarriedDirection<scalar_t>& d = args.direction[blockIdx.z];
  const int64_t H = args.hidden_size, P = args.output_size;
  const int64_t unit = first_feature<1>();
  using acc_t = acc_type<scalar_t>;
  for (int64_t row = first_row(); row < args.rows; row += row_stride()) {
    const int64_t p = row * P + unit, h = row * H + unit;
    if (unit < P) from_acc(d.entered.cuts(args.lengths, row) ? acc_t(0) : d.grad_h[p], d.grad_h0[p]);
    if (unit < H && d.grad_c != nullptr) from_acc(d.grad_c[h], d.grad_c0[h]);
  }
}

// ------------------------------------------------------------------------------------------------ host
template <class scalar_t>
struct BackwardWorkspace {
  using acc_t = acc_type<scalar_t>;
  acc_t* grad_h[2] = {};       // [B, P]
  acc_t* grad_c[2] = {};       // [B, H]: cells with two states
  acc_t* grad_hidden[2] = {};  // [B, H]: with a projection
  acc_t* product[2] = {};      // [B, P]: with recurrent dropout
  acc_t* grad_gated[2] = {};   // [B, H]: of a cell with two products
  acc_t* values[2] = {};       // [B, backward_norm_values, H]: with layer normalisation
  acc_t* sums[2] = {};         // [B, norm_lines, H]: with layer normalisation whose gradients are wanted
  BackwardPreparation preparation;
  size_t bytes = 0;

  BackwardWorkspace(const LayerBackward& layer, Workspace workspace) : preparation(layer, workspace) {
    const CellInfo info = cell_info(layer.cell);
    const int64_t B = layer.sequence.batch, H = layer.hidden_size, P = layer.output_size;
    for (int k = 0; k < layer.directions; ++k) {
      grad_h[k] = workspace.take<acc_t>(B * P);
      if (info.states == 2) grad_c[k] = workspace.take<acc_t>(B * H);
      if (layer.direction[k].weights.w_hr != nullptr) grad_hidden[k] = workspace.take<acc_t>(B * H);
      if (layer.noise.recurrent_dropout > 0 && !info.diagonal) product[k] = workspace.take<acc_t>(B * P);
      if (info.two_products) grad_gated[k] = workspace.take<acc_t>(B * H);
      if (!layer.layer_norm) continue;
      values[k] = workspace.take<acc_t>(B * backward_norm_values(info) * H);
      if (NormSums<scalar_t>::wanted(layer)) sums[k] = workspace.take<acc_t>(B * norm_lines(info) * H);
    }
    bytes = workspace.bytes();
  }
};

template <class Cell, class scalar_t>
bool can_vectorise(const LayerBackward& layer, const BackwardProducts (&products)[2]) {
  constexpr int width = kVectorWidth<scalar_t>;
  bool all = layer.hidden_size % width == 0;
  for (int k = 0; k < layer.directions; ++k) {
    const DirectionBackward& d = layer.direction[k];
    for (const void* pointer :
         {d.h0, d.c0, d.saved, is_diagonal<Cell> ? d.weights.w_hh : nullptr, static_cast<const void*>(d.grad_igates),
          static_cast<const void*>(d.grad_hgates), static_cast<const void*>(products[k].hidden)}) {
      all = all && aligned<scalar_t>(pointer, layer.hidden_size, width);
    }
    for (const Rows& rows : {d.c, d.grad_c}) all = all && aligned<scalar_t>(rows, width);
    if (d.weights.w_hr != nullptr) continue;
    for (const Rows& rows : {d.output, d.grad_output}) all = all && aligned<scalar_t>(rows, width);
  }
  return all;
}

// The loop over time of one call, behind BackwardPreparation: enqueues kernels and products, the last step first.
template <class Cell, class scalar_t>
class BackwardLoop {
 public:
  BackwardLoop(const LayerBackward& layer, const BackwardProducts (&products)[2], const Context& context,
               const BackwardWorkspace<scalar_t>& workspace)
      : layer_(layer),
        products_(products),
        context_(context),
        stream_(static_cast<cudaStream_t>(context.stream)),
        workspace_(workspace),
        noise_(layer.noise),
        width_(can_vectorise<Cell, scalar_t>(layer, products) ? kVectorWidth<scalar_t> : 1),
        projects_(layer.direction[0].weights.w_hr != nullptr) {
    for (int k = 0; k < layer.directions; ++k) {
      norms_.direction[k] = norm_direction<scalar_t>(layer.direction[k].weights, workspace.values[k]);
      norms_.direction[k].sums = workspace.sums[k];
    }
  }

  int run() const {
    RNNFAST_RETURN_IF_ERROR(begin_gradients());
    for (int64_t index = layer_.sequence.steps - 1; index >= 0; --index) {
      const BackwardStep<scalar_t> step = step_at(index);
      if (most_rows(step) == 0) continue;
      if (projects_) RNNFAST_RETURN_IF_ERROR(back_through_projection(step));
      RNNFAST_RETURN_IF_ERROR(run_cells(step));
      if constexpr (has_two_products<Cell>) RNNFAST_RETURN_IF_ERROR(back_through_gated(step));
      if constexpr (!is_diagonal<Cell>) RNNFAST_RETURN_IF_ERROR(back_through_hidden(step));
    }
    return finish_gradients();
  }

 private:
  using acc_t = acc_type<scalar_t>;

  int begin_gradients() const {
    return launch(first_gradients_kernel<scalar_t>, states_shape(), stream_, carried_gradients());
  }
  int finish_gradients() const {
    return launch(last_gradients_kernel<scalar_t>, states_shape(), stream_, carried_gradients());
  }
  LaunchShape states_shape() const {
    return rows_shape(std::max(layer_.hidden_size, layer_.output_size), layer_.sequence.batch, 1, layer_.directions);
  }
  Carried<scalar_t> carried_gradients() const {
    Carried<scalar_t> carried{
        layer_.sequence.batch, layer_.hidden_size, layer_.output_size, layer_.sequence.lengths, {}};
    for (int k = 0; k < layer_.directions; ++k) {
      const DirectionBackward& d = layer_.direction[k];
      CarriedDirection<scalar_t>& to = carried.direction[k];
      to.grad_h_n = static_cast<const scalar_t*>(d.grad_h_n);
      to.grad_c_n = static_cast<const scalar_t*>(d.grad_c_n);
      to.grad_h0 = static_cast<scalar_t*>(d.grad_h0);
      to.grad_c0 = static_cast<scalar_t*>(d.grad_c0);
      to.grad_h = workspace_.grad_h[k];
      to.grad_c = workspace_.grad_c[k];
      to.entered = border_into_step(d.reverse, 0);
    }
    return carried;
  }

  // The border on the way into a step, of which there is none behind the last.
  Border border_into_step(bool reverse, int64_t index) const {
    const Sequence& sequence = layer_.sequence;
    return index < sequence.steps ? border_into(sequence, reverse, Position(sequence, reverse, index)) : Border();
  }

  // What the cells of a step read and write; index counts the steps in each direction's own order.
  BackwardStep<scalar_t> step_at(int64_t index) const {
    const Sequence& sequence = layer_.sequence;
    const int64_t H = layer_.hidden_size, GH = Cell::kGates * H;
    const int64_t SH = traits_of<Cell>.saved_values(layer_.layer_norm) * H;
    BackwardStep<scalar_t> step{H, sequence.lengths, noise_, {}};
    for (int k = 0; k < layer_.directions; ++k) {
      const DirectionBackward& d = layer_.direction[k];
      const Position at(sequence, d.reverse, index);
      const int64_t offset = sequence.offset(at.step);
      BackwardStepDirection<scalar_t>& to = step.direction[k];
      to.rows = sequence.batch_size(at.step);
      to.step = at.step;
      to.reverse = d.reverse;
      to.saved = advance(static_cast<const scalar_t*>(d.saved), offset * SH);
      if (is_diagonal<Cell>) to.w_hh = static_cast<const scalar_t*>(d.weights.w_hh);
      to.grad_igates = static_cast<scalar_t*>(d.grad_igates) + offset * GH;
      if (Cell::kSplitGates || layer_.layer_norm) to.grad_hgates = static_cast<scalar_t*>(d.grad_hgates) + offset * GH;
      if (Cell::kStates == 2) {
        to.c = row_pointer<scalar_t>(sequence, d.c, at.step);
        to.c_stride = d.c.stride_b;
        to.c_prev = previous_rows<scalar_t>(sequence, at, d.c, d.c0);
        to.grad_c = workspace_.grad_c[k];
        to.grad_c_output = row_pointer<scalar_t>(sequence, d.grad_c, at.step);
        to.grad_c_output_stride = d.grad_c.stride_b;
      }
      to.entered = border_into_step(d.reverse, index);
      to.left = border_into_step(d.reverse, index + 1);
      if (projects_) {
        to.grad_hidden = workspace_.grad_hidden[k];
        to.hidden = static_cast<scalar_t*>(products_[k].hidden) + offset * H;
      } else {
        if (Cell::kStates == 1) to.h_prev = previous_rows<scalar_t>(sequence, at, d.output, d.h0);
        to.output = row_pointer<scalar_t>(sequence, d.output, at.step);
        to.output_stride = d.output.stride_b;
        to.grad_output = row_pointer<scalar_t>(sequence, d.grad_output, at.step);
        to.grad_output_stride = d.grad_output.stride_b;
        to.grad_h = workspace_.grad_h[k];
      }
    }
    return step;
  }

  // grad_h += grad_output; grad_hidden = grad_h W_hr
  int back_through_projection(const BackwardStep<scalar_t>& step) const {
    const int64_t H = layer_.hidden_size, P = layer_.output_size;
    Projected<scalar_t> projected{P, layer_.sequence.lengths, noise_, {}};
    for (int k = 0; k < layer_.directions; ++k) {
      const DirectionBackward& d = layer_.direction[k];
      const BackwardStepDirection<scalar_t>& s = step.direction[k];
      ProjectedDirection<scalar_t>& to = projected.direction[k];
      to.rows = s.rows;
      to.step = s.step;
      to.reverse = s.reverse;
      to.grad_output = row_pointer<scalar_t>(layer_.sequence, d.grad_output, s.step);
      to.grad_output_stride = d.grad_output.stride_b;
      to.carried = workspace_.grad_h[k];
      to.grad_h = static_cast<scalar_t*>(products_[k].grad_h) + layer_.sequence.offset(s.step) * P;
      to.left = s.left;
    }
    RNNFAST_RETURN_IF_ERROR(launch(grad_projected_kernel<scalar_t>, elements_shape(P, step), stream_, projected));
    for (int k = 0; k < layer_.directions; ++k) {
      RNNFAST_RETURN_IF_ERROR(multiply(context_.gemm, {.dtype = layer_.dtype,
                                                       .m = step.direction[k].rows,
                                                       .n = H,
                                                       .k = P,
                                                       .a = projected.direction[k].grad_h,
                                                       .lda = P,
                                                       .b = layer_.direction[k].weights.w_hr,
                                                       .ldb = H,
                                                       .c = workspace_.grad_hidden[k],
                                                       .ldc = H}));
    }
    return 0;
  }

  int run_cells(const BackwardStep<scalar_t>& step) const {
    const int64_t H = layer_.hidden_size, rows = most_rows(step);
    if constexpr (takes_layer_norm<Cell>) {
      if (layer_.layer_norm) {
        return launch(norm_backward_kernel<Cell, scalar_t>, norm_shape(H, rows, layer_.directions), stream_, step,
                      norms_);
      }
    }
    const auto kernel = width_ == 1 ? backward_step_kernel<Cell, scalar_t, 1>
                                    : backward_step_kernel<Cell, scalar_t, kVectorWidth<scalar_t>>;
    return launch(kernel, rows_shape(H, rows, width_, layer_.directions), stream_, step);
  }

  // Of a cell with two products: back through the second and through the gate before it.
  int back_through_gated(const BackwardStep<scalar_t>& step) const {
    const int64_t P = layer_.output_size;
    GateBackward<scalar_t> gate{layer_.hidden_size, layer_.sequence.lengths, noise_, {}};
    for (int k = 0; k < layer_.directions; ++k) {
      const BackwardStepDirection<scalar_t>& s = step.direction[k];
      const int64_t offset = layer_.sequence.offset(s.step);
      GateBackwardDirection<scalar_t>& to = gate.direction[k];
      to.rows = s.rows;
      to.step = s.step;
      to.reverse = s.reverse;
      to.saved = s.saved;
      to.operand = static_cast<const scalar_t*>(products_[k].h_prev) + offset * P;
      to.grad_gated = workspace_.grad_gated[k];
      to.grad_gates = s.grad_igates;
      to.gated = static_cast<scalar_t*>(products_[k].gated) + offset * P;
      to.grad_h = s.grad_h;
    }
    return second_product_backward<Cell, scalar_t>(layer_, gate, workspace_.grad_gated, context_);
  }

  // grad_h += grad_hgates W_hh, with recurrent dropout m times that; of a cell with two products of the first gates.
  int back_through_hidden(const BackwardStep<scalar_t>& step) const {
    const int64_t H = layer_.hidden_size, P = layer_.output_size;
    Masked<scalar_t> masked{P, noise_, {}};
    for (int k = 0; k < layer_.directions; ++k) {
      const BackwardStepDirection<scalar_t>& s = step.direction[k];
      acc_t* const product = workspace_.product[k];
      RNNFAST_RETURN_IF_ERROR(multiply(context_.gemm, {.dtype = layer_.dtype,
                                                       .m = s.rows,
                                                       .n = P,
                                                       .k = first_gates<Cell> * H,
                                                       .a = s.grad_hgates != nullptr ? s.grad_hgates : s.grad_igates,
                                                       .lda = Cell::kGates * H,
                                                       .b = layer_.direction[k].weights.w_hh,
                                                       .ldb = P,
                                                       .c = product != nullptr ? product : workspace_.grad_h[k],
                                                       .ldc = P,
                                                       .accumulate = product == nullptr}));
      masked.direction[k] = {s.rows, s.reverse, product, workspace_.grad_h[k]};
    }
    if (layer_.noise.recurrent_dropout == 0) return 0;
    return launch(add_masked_kernel<scalar_t>, elements_shape(P, step), stream_, masked);
  }

  // The launch of a kernel with a thread for each element of the step's rows.
  LaunchShape elements_shape(int64_t features, const BackwardStep<scalar_t>& step) const {
    return rows_shape(features, most_rows(step), 1, layer_.directions);
  }

  const LayerBackward& layer_;
  const BackwardProducts (&products_)[2];
  const Context& context_;
  const cudaStream_t stream_;
  const BackwardWorkspace<scalar_t>& workspace_;
  const DeviceNoise<acc_t> noise_;
  const int width_;  // units of a thread
  const bool projects_;
  NormStep<scalar_t> norms_;
};

template <class Cell, class scalar_t>
int run(LayerBackward layer, const BackwardProducts (&products)[2], const Context& context) {
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const BackwardWorkspace<scalar_t> workspace(layer, Workspace(context.workspace));
  const NormSums<scalar_t> norm_sums(layer, workspace.sums);
  if (layer.sequence.batch > 0) {
    DeviceSequence device_sequence;  // the kernels of a step need none
    RNNFAST_RETURN_IF_ERROR(workspace.preparation.run(layer, products, context, device_sequence));
    RNNFAST_RETURN_IF_ERROR(norm_sums.clear(stream));
    RNNFAST_RETURN_IF_ERROR((BackwardLoop<Cell, scalar_t>(layer, products, context, workspace).run()));
  }
  return norm_sums.add(stream);
}

}  // namespace

size_t backward_workspace_bytes(const LayerBackward& layer) {
  return dispatch_dtype<void>(layer.dtype, [&](auto, auto scalar) {
    return BackwardWorkspace<typename decltype(scalar)::type>(layer, Workspace(nullptr)).bytes;
  });
}

int backward(const LayerBackward& layer, const BackwardProducts (&products)[2], const Context& context) {
  return dispatch(layer.cell, layer.dtype, [&](auto cell, auto scalar) {
    return run<typename decltype(cell)::type, typename decltype(scalar)::type>(layer, products, context);
  });
}

}  // namespace rnnfast::cuda::stepwise
