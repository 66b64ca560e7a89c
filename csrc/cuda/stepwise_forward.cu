// Owns: the forward of the stepwise engine. A step is
//
//     hgates = h W_hh^T                                        the caller's GEMM, accumulation type
//     h, c = cell(igates, hgates + b_hh, h, c)                 forward_step_kernel
//     h = hidden W_hr^T                                        with a projection: a GEMM and store_projection_kernel
//
// Of a cell with two products a step, two_products.cuh stands between the first GEMM and the kernel. With layer
// normalisation igates are W_ih x alone, and norm_forward_kernel (stepwise_norm.cuh) stands for forward_step_kernel.
// The kernel that has h applies zoneout to it; with recurrent dropout it also leaves m h for the next step's GEMM.
// h_n and the workspace's c hold the running states, so that a row that has ended, or not begun, keeps its own.
// Of a diagonal cell there is no GEMM: the first kernel multiplies w_hh with h, or with m h, unit by unit.
//
// Must not know: equations (csrc/cell has them), tensors.
#include "stepwise_norm.cuh"
#include "stepwise_step.cuh"
#include "two_products.cuh"

namespace rnnfast::cuda::stepwise {
namespace {

// Equations: Cell::forward, on hgates + b_hh; behind a reset h W_hh^T, h and c are zero. Of a diagonal cell hgates are
// w_hh * h.
// Mapping: a thread computes kWidth units of a row, all gates of each, and goes on to further rows; the bias stays in
// registers. Everything lies in global memory, each element belongs to one thread, and there is nothing to synchronise:
// the stream orders the steps.
// The 1 in the launch bounds keeps ptxas from spilling registers for the sake of more blocks an SM; 0 leaves it alone.
template <class Cell, class scalar_t, int kWidth>
__global__ void __launch_bounds__(kThreads, is_diagonal<Cell> || Cell::kGates == 1 ? 1 : 0)
    forward_step_kernel(const __grid_constant__ ForwardStep<scalar_t> args) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;
  const ForwardStepDirection<scalar_t>& d = args.direction[blockIdx.z];
  const int64_t H = args.hidden_size;
  const int64_t unit = first_feature<kWidth>();
  if (unit >= H) return;

  acc_t bias[kGates][kWidth] = {};
  if (d.b_hh != nullptr) {
#pragma unroll
    for (int g = 0; g < kGates; ++g) load(d.b_hh + g * H + unit, bias[g]);
  }

  for (int64_t row = first_row(); row < d.rows; row += row_stride()) {
    if (!lives(args.lengths, row, d.step)) {
      if (d.output != nullptr) store_zero<kWidth>(d.output + row * d.output_stride + unit);
      if (d.hidden != nullptr) store_zero<kWidth>(d.hidden + row * H + unit);
      if (d.c_output != nullptr) store_zero<kWidth>(d.c_output + row * d.c_output_stride + unit);
      continue;
    }
    const bool cut = d.entered.cuts(args.lengths, row);

    acc_t igates[kGates][kWidth], hgates[kGates][kWidth], operand[kWidth];
    if constexpr (is_diagonal<Cell>) load((d.masked != nullptr ? d.masked : d.h) + row * H + unit, operand);
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      const int64_t at = (row * kGates + g) * H + unit;
      load(d.igates + at, igates[g]);
      if constexpr (is_diagonal<Cell>) {
        load(d.w_hh + g * H + unit, hgates[g]);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) hgates[g][k] *= operand[k];
      } else {
        load(d.hgates + at, hgates[g]);
      }
#pragma unroll
      for (int k = 0; k < kWidth; ++k) hgates[g][k] = (cut ? acc_t(0) : hgates[g][k]) + bias[g][k];
    }
    acc_t previous[kStates][kWidth] = {};
    if (!cut) {
      if (d.h != nullptr) load(d.h + row * H + unit, previous[0]);
      if constexpr (kStates == 2) load(d.c + row * H + unit, previous[1]);
    }

    acc_t state[kStates][kWidth], saved[kSaved + 1][kWidth];
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      acc_t i[kGates], h[kGates], from[kStates], to[kStates], keep[kSaved + 1];
#pragma unroll
      for (int g = 0; g < kGates; ++g) i[g] = igates[g][k], h[g] = hgates[g][k];
#pragma unroll
      for (int s = 0; s < kStates; ++s) from[s] = previous[s][k];
      Cell::forward(i, h, from, to, keep);
#pragma unroll
      for (int s = 0; s < kStates; ++s) state[s][k] = to[s];
#pragma unroll
      for (int s = 0; s < kSaved; ++s) saved[s][k] = keep[s];
    }

    const DeviceNoise<acc_t>& noise = args.noise;
    if (kStates == 2 && noise.zoneout_c > 0) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const acc_t keep = noise.keep_c(d.reverse, d.step, row, unit + k);
        state[kStates - 1][k] = zoned(keep, previous[kStates - 1][k], state[kStates - 1][k]);
      }
    }
    if (d.hidden != nullptr) {
      store(state[0], d.hidden + row * H + unit);
    } else {
      if (noise.zoneout_h > 0) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          const acc_t keep = noise.keep_h(d.reverse, d.step, row, unit + k);
          state[0][k] = zoned(keep, previous[0][k], state[0][k]);
        }
      }
      if (d.masked != nullptr) {
        acc_t masked[kWidth];
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
          masked[k] = noise.mask(d.reverse, row, unit + k) * rounded<scalar_t>(state[0][k]);
        store(masked, d.masked + row * H + unit);
      }
      store(state[0], d.output + row * d.output_stride + unit);
      store(state[0], d.h + row * H + unit);
    }
    if constexpr (kStates == 2) {
      store(state[1], d.c + row * H + unit);
      if constexpr (!std::is_same_v<acc_t, scalar_t>) store(state[1], d.c_n + row * H + unit);
      if (d.c_output != nullptr) store(state[1], d.c_output + row * d.c_output_stride + unit);
    }
    if (d.saved != nullptr) {
#pragma unroll
      for (int s = 0; s < kSaved; ++s) store(saved[s], d.saved + (row * kSaved + s) * H + unit);
    }
  }
}

template <class scalar_t>
struct ProjectionDirection {
  int64_t rows = 0, step = 0;
  bool reverse = false;
  const acc_type<scalar_t>* projected = nullptr;  // [rows, P]
  scalar_t* h = nullptr;                          // [B, P], the running state
  scalar_t* masked = nullptr;                     // [B, P], the same behind recurrent dropout, or null
  scalar_t* output = nullptr;                     // rows of P
  int64_t output_stride = 0;
  Border entered;
};

template <class scalar_t>
struct Projection {
  int64_t output_size = 0;
  const int64_t* lengths = nullptr;
  DeviceNoise<acc_type<scalar_t>> noise;
  ProjectionDirection<scalar_t> direction[2];
};

// output = h = projected, with zoneout's part of the last h. One thread an element; nothing to synchronise.
template <class scalar_t>
__global__ void __launch_bounds__(kThreads) store_projection_kernel(const __grid_constant__ Projection<scalar_t> args) {
  const ProjectionDirection<scalar_t>& d = args.direction[blockIdx.z];
  const int64_t P = args.output_size;
  const int64_t p = first_feature<1>();
  if (p >= P) return;
  for (int64_t row = first_row(); row < d.rows; row += row_stride()) {
    scalar_t* output = d.output + row * d.output_stride + p;
    if (!lives(args.lengths, row, d.step)) {
      store_zero<1>(output);
      continue;
    }
    acc_type<scalar_t> h = d.projected[row * P + p];
    if (args.noise.zoneout_h > 0) {
      const acc_type<scalar_t> old =
          d.entered.cuts(args.lengths, row) ? acc_type<scalar_t>(0) : to_acc(d.h[row * P + p]);
      h = zoned(args.noise.keep_h(d.reverse, d.step, row, p), old, h);
    }
    from_acc(h, *output);
    d.h[row * P + p] = *output;
    if (d.masked != nullptr) from_acc(args.noise.mask(d.reverse, row, p) * to_acc(*output), d.masked[row * P + p]);
  }
}

template <class scalar_t>
struct InitialDirection {
  const scalar_t* h0 = nullptr;  // [B, P]
  const scalar_t* c0 = nullptr;  // [B, H] or null
  scalar_t* h_n = nullptr;       // [B, P]
  scalar_t* masked = nullptr;    // [B, P] or null
  bool reverse = false;
  acc_type<scalar_t>* c = nullptr;  // [B, H]
  scalar_t* c_n = nullptr;          // [B, H]
};

template <class scalar_t>
struct Initial {
  int64_t rows = 0, hidden_size = 0, output_size = 0;
  DeviceNoise<acc_type<scalar_t>> noise;
  InitialDirection<scalar_t> direction[2];
};

// The running states start as the initial ones. One thread a unit; nothing to synchronise.
template <class scalar_t>
__global__ void __launch_bounds__(kThreads) initial_states_kernel(const __grid_constant__ Initial<scalar_t> args) {
  const InitialDirection<scalar_t>& d = args.direction[blockIdx.z];
  const int64_t H = args.hidden_size, P = args.output_size;
  const int64_t unit = first_feature<1>();
  for (int64_t row = first_row(); row < args.rows; row += row_stride()) {
    if (unit < P) {
      const scalar_t h = d.h0[row * P + unit];
      d.h_n[row * P + unit] = h;
      if (d.masked != nullptr) from_acc(args.noise.mask(d.reverse, row, unit) * to_acc(h), d.masked[row * P + unit]);
    }
    if (unit < H && d.c0 != nullptr) {
      const scalar_t c = d.c0[row * H + unit];
      d.c_n[row * H + unit] = c;
      d.c[row * H + unit] = to_acc(c);
    }
  }
}

// ------------------------------------------------------------------------------------------------ host
template <class scalar_t>
struct ForwardWorkspace {
  using acc_t = acc_type<scalar_t>;
  acc_t* hgates[2] = {};     // [B, G*H]: null for a diagonal cell
  acc_t* c[2] = {};          // [B, H]: 16-bit cells with two states; the others run in c_n
  scalar_t* hidden[2] = {};  // [B, H]: with a projection
  acc_t* projected[2] = {};  // [B, P]: with a projection
  scalar_t* masked[2] = {};  // [B, P]: with recurrent dropout
  scalar_t* gated[2] = {};   // [B, H]: of a cell with two products
  acc_t* values[2] = {};     // [B, forward_norm_values, H]: with layer normalisation
  size_t bytes = 0;

  ForwardWorkspace(const LayerForward& layer, void* base) {
    const CellInfo info = cell_info(layer.cell);
    const int64_t B = layer.sequence.batch, H = layer.hidden_size, P = layer.output_size;
    Workspace workspace(base);
    for (int k = 0; k < layer.directions; ++k) {
      if (!info.diagonal) hgates[k] = workspace.take<acc_t>(B * info.gates * H);
      if (info.states == 2 && !std::is_same_v<acc_t, scalar_t>) c[k] = workspace.take<acc_t>(B * H);
      if (layer.direction[k].weights.w_hr != nullptr) {
        hidden[k] = workspace.take<scalar_t>(B * H);
        projected[k] = workspace.take<acc_t>(B * P);
      }
      if (layer.noise.recurrent_dropout > 0) masked[k] = workspace.take<scalar_t>(B * P);
      if (info.two_products) gated[k] = workspace.take<scalar_t>(B * H);
      if (layer.layer_norm) values[k] = workspace.take<acc_t>(B * forward_norm_values(info) * H);
    }
    bytes = workspace.bytes();
  }
};

template <class Cell, class scalar_t>
bool can_vectorise(const LayerForward& layer) {
  constexpr int width = kVectorWidth<scalar_t>;
  bool all = layer.hidden_size % width == 0;
  for (int k = 0; k < layer.directions; ++k) {
    const DirectionForward& d = layer.direction[k];
    for (const void* pointer :
         {is_diagonal<Cell> ? d.weights.w_hh : nullptr, d.weights.b_hh, static_cast<const void*>(d.igates),
          static_cast<const void*>(d.h_n), static_cast<const void*>(d.c_n), static_cast<const void*>(d.saved)}) {
      all = all && aligned<scalar_t>(pointer, layer.hidden_size, width);
    }
    all = all && (d.weights.w_hr != nullptr || aligned<scalar_t>(d.output, width)) && aligned<scalar_t>(d.c, width);
  }
  return all;
}

// The loop over time of one call: enqueues kernels and products in the order of the steps.
template <class Cell, class scalar_t>
class ForwardLoop {
 public:
  ForwardLoop(const LayerForward& layer, const Context& context)
      : layer_(layer),
        context_(context),
        stream_(static_cast<cudaStream_t>(context.stream)),
        workspace_(layer, context.workspace),
        noise_(layer.noise),
        width_(can_vectorise<Cell, scalar_t>(layer) ? kVectorWidth<scalar_t> : 1),
        projects_(layer.direction[0].weights.w_hr != nullptr) {
    for (int k = 0; k < layer.directions; ++k) {
      norms_.direction[k] = norm_direction<scalar_t>(layer.direction[k].weights, workspace_.values[k]);
    }
  }

  int run() const {
    RNNFAST_RETURN_IF_ERROR(begin_states());
    for (int64_t index = 0; index < layer_.sequence.steps; ++index) {
      const ForwardStep<scalar_t> step = step_at(index);
      if (most_rows(step) == 0) continue;
      if constexpr (!is_diagonal<Cell>) RNNFAST_RETURN_IF_ERROR(multiply_hidden(step));
      if constexpr (has_two_products<Cell>) RNNFAST_RETURN_IF_ERROR(multiply_gated(step));
      RNNFAST_RETURN_IF_ERROR(run_cells(step));
      if (projects_) RNNFAST_RETURN_IF_ERROR(project(step));
    }
    return 0;
  }

 private:
  using acc_t = acc_type<scalar_t>;

  acc_t* running_c(int k) const {
    return workspace_.c[k] != nullptr ? workspace_.c[k] : static_cast<acc_t*>(layer_.direction[k].c_n);
  }
  // What the product with W_hh reads.
  const scalar_t* hidden_operand(int k) const {
    return workspace_.masked[k] != nullptr ? workspace_.masked[k]
                                           : static_cast<const scalar_t*>(layer_.direction[k].h_n);
  }

  int begin_states() const {
    const int64_t B = layer_.sequence.batch, H = layer_.hidden_size, P = layer_.output_size;
    Initial<scalar_t> initial{B, H, P, noise_, {}};
    for (int k = 0; k < layer_.directions; ++k) {
      const DirectionForward& d = layer_.direction[k];
      InitialDirection<scalar_t>& to = initial.direction[k];
      to.h0 = static_cast<const scalar_t*>(d.h0);
      if (Cell::kStates == 2) to.c0 = static_cast<const scalar_t*>(d.c0);
      to.h_n = static_cast<scalar_t*>(d.h_n);
      to.masked = workspace_.masked[k];
      to.reverse = d.reverse;
      to.c = running_c(k);
      to.c_n = static_cast<scalar_t*>(d.c_n);
    }
    return launch(initial_states_kernel<scalar_t>, rows_shape(std::max(H, P), B, 1, layer_.directions), stream_,
                  initial);
  }

  // What the cells of a step read and write; index counts the steps in each direction's own order.
  ForwardStep<scalar_t> step_at(int64_t index) const {
    const Sequence& sequence = layer_.sequence;
    const int64_t H = layer_.hidden_size, GH = Cell::kGates * H;
    const int64_t SH = traits_of<Cell>.saved_values(layer_.layer_norm) * H;
    ForwardStep<scalar_t> step{H, sequence.lengths, noise_, {}};
    for (int k = 0; k < layer_.directions; ++k) {
      const DirectionForward& d = layer_.direction[k];
      const Position at(sequence, d.reverse, index);
      const int64_t offset = sequence.offset(at.step);
      ForwardStepDirection<scalar_t>& to = step.direction[k];
      to.rows = sequence.batch_size(at.step);
      to.step = at.step;
      to.reverse = d.reverse;
      to.igates = static_cast<const scalar_t*>(d.igates) + offset * GH;
      to.hgates = workspace_.hgates[k];
      if (is_diagonal<Cell>) to.w_hh = static_cast<const scalar_t*>(d.weights.w_hh);
      to.b_hh = static_cast<const scalar_t*>(d.weights.b_hh);
      to.c = running_c(k);
      to.c_n = static_cast<scalar_t*>(d.c_n);
      to.c_output = row_pointer<scalar_t>(sequence, d.c, at.step);
      to.c_output_stride = d.c.stride_b;
      to.saved = advance(static_cast<scalar_t*>(d.saved), offset * SH);
      to.entered = border_into(sequence, d.reverse, at);
      if (projects_) {
        to.hidden = workspace_.hidden[k];
      } else {
        to.h = static_cast<scalar_t*>(d.h_n);
        to.masked = workspace_.masked[k];
        to.output = row_pointer<scalar_t>(sequence, d.output, at.step);
        to.output_stride = d.output.stride_b;
      }
    }
    return step;
  }

  // hgates = h W_hh^T; of a cell with two products those of the first gates.
  int multiply_hidden(const ForwardStep<scalar_t>& step) const {
    const int64_t H = layer_.hidden_size, P = layer_.output_size;
    for (int k = 0; k < layer_.directions; ++k) {
      RNNFAST_RETURN_IF_ERROR(multiply(context_.gemm, {.dtype = layer_.dtype,
                                                       .m = step.direction[k].rows,
                                                       .n = first_gates<Cell> * H,
                                                       .k = P,
                                                       .a = hidden_operand(k),
                                                       .lda = P,
                                                       .b = layer_.direction[k].weights.w_hh,
                                                       .ldb = P,
                                                       .transpose_b = true,
                                                       .c = workspace_.hgates[k],
                                                       .ldc = Cell::kGates * H}));
    }
    return 0;
  }

  // hgates of the other gates, of a cell with two products.
  int multiply_gated(const ForwardStep<scalar_t>& step) const {
    Gate<scalar_t> gate{layer_.hidden_size, {}};
    const void* w_hh[2] = {};
    for (int k = 0; k < layer_.directions; ++k) {
      const ForwardStepDirection<scalar_t>& s = step.direction[k];
      gate.direction[k] = {s.rows, s.igates, workspace_.hgates[k], s.b_hh, hidden_operand(k), workspace_.gated[k]};
      w_hh[k] = layer_.direction[k].weights.w_hh;
    }
    return second_product<Cell, scalar_t>(layer_.dtype, gate, w_hh, layer_.directions, context_);
  }

  int run_cells(const ForwardStep<scalar_t>& step) const {
    const int64_t H = layer_.hidden_size, rows = most_rows(step);
    if constexpr (takes_layer_norm<Cell>) {
      if (layer_.layer_norm) {
        return launch(norm_forward_kernel<Cell, scalar_t>, norm_shape(H, rows, layer_.directions), stream_, step,
                      norms_);
      }
    }
    const auto kernel = width_ == 1 ? forward_step_kernel<Cell, scalar_t, 1>
                                    : forward_step_kernel<Cell, scalar_t, kVectorWidth<scalar_t>>;
    return launch(kernel, rows_shape(H, rows, width_, layer_.directions), stream_, step);
  }

  // output = h = hidden W_hr^T
  int project(const ForwardStep<scalar_t>& step) const {
    const int64_t H = layer_.hidden_size, P = layer_.output_size;
    Projection<scalar_t> projection{P, layer_.sequence.lengths, noise_, {}};
    for (int k = 0; k < layer_.directions; ++k) {
      const DirectionForward& d = layer_.direction[k];
      const ForwardStepDirection<scalar_t>& s = step.direction[k];
      RNNFAST_RETURN_IF_ERROR(multiply(context_.gemm, {.dtype = layer_.dtype,
                                                       .m = s.rows,
                                                       .n = P,
                                                       .k = H,
                                                       .a = s.hidden,
                                                       .lda = H,
                                                       .b = d.weights.w_hr,
                                                       .ldb = H,
                                                       .transpose_b = true,
                                                       .c = workspace_.projected[k],
                                                       .ldc = P}));
      ProjectionDirection<scalar_t>& to = projection.direction[k];
      to.rows = s.rows;
      to.step = s.step;
      to.reverse = s.reverse;
      to.projected = workspace_.projected[k];
      to.h = static_cast<scalar_t*>(d.h_n);
      to.masked = workspace_.masked[k];
      to.output = row_pointer<scalar_t>(layer_.sequence, d.output, s.step);
      to.output_stride = d.output.stride_b;
      to.entered = s.entered;
    }
    return launch(store_projection_kernel<scalar_t>, rows_shape(P, most_rows(step), 1, layer_.directions), stream_,
                  projection);
  }

  const LayerForward& layer_;
  const Context& context_;
  const cudaStream_t stream_;
  const ForwardWorkspace<scalar_t> workspace_;
  const DeviceNoise<acc_t> noise_;
  const int width_;  // units of a thread
  const bool projects_;
  NormStep<scalar_t> norms_;
};

}  // namespace

size_t forward_workspace_bytes(const LayerForward& layer) {
  return dispatch_dtype<void>(layer.dtype, [&](auto, auto scalar) {
    return ForwardWorkspace<typename decltype(scalar)::type>(layer, nullptr).bytes;
  });
}

int forward(const LayerForward& layer, const Context& context) {
  if (layer.sequence.batch == 0) return 0;
  return dispatch(layer.cell, layer.dtype, [&](auto cell, auto scalar) {
    return ForwardLoop<typename decltype(cell)::type, typename decltype(scalar)::type>(layer, context).run();
  });
}

}  // namespace rnnfast::cuda::stepwise
