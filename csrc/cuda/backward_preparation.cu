#include "backward_preparation.cuh"

#include "previous_states.cuh"
#include "two_products.cuh"

namespace rnnfast::cuda {
namespace {

template <class scalar_t>
struct Recomputed {
  int64_t first_row = 0, rows = 0, hidden_size = 0;  // of this chunk
  DeviceSequence sequence;
  bool reverse = false;
  const scalar_t* igates = nullptr;            // compact [N, G*H]
  const acc_type<scalar_t>* hgates = nullptr;  // [rows, G*H]; of a diagonal cell the next two in its place
  const scalar_t* h_prev = nullptr;            // [rows, H]
  const scalar_t* w_hh = nullptr;              // [G*H]
  const scalar_t* b_hh = nullptr;              // [G*H] or null
  DeviceRows<scalar_t> h;                      // rows of H: cells with one state
  const scalar_t* h0 = nullptr;                // [B, H]
  DeviceRows<scalar_t> c;                      // rows of H: cells with two states
  const scalar_t* c0 = nullptr;                // [B, H]
  scalar_t* saved = nullptr;                   // compact [N, S*H]; may be igates
};

// Equations: Cell::forward, of which `saved` alone is kept.
// Mapping: a thread an element of the state, rows counting through the chunk; it reads its igates before it writes to
// the same place. Nothing to synchronise.
template <class Cell, class scalar_t>
__global__ void __launch_bounds__(kThreads) recompute_kernel(const __grid_constant__ Recomputed<scalar_t> args) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;
  const int64_t H = args.hidden_size, unit = first_feature<1>();
  if (unit >= H) return;
  for (int64_t i = first_row(); i < args.rows; i += row_stride()) {
    const int64_t row = args.first_row + i;
    const int step = args.sequence.step_of(row), slot = static_cast<int>(row - args.sequence.row(step, 0));
    if (!args.sequence.lives(step, slot)) continue;
    acc_t igates[kGates], hgates[kGates], previous[kStates] = {}, state[kStates], saved[kSaved + 1];
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      igates[g] = to_acc(args.igates[(row * kGates + g) * H + unit]);
      if constexpr (is_diagonal<Cell>) {
        hgates[g] = to_acc(args.w_hh[g * H + unit]) * to_acc(args.h_prev[i * H + unit]);
      } else {
        hgates[g] = args.hgates[(i * kGates + g) * H + unit];
      }
      if (args.b_hh != nullptr) hgates[g] += to_acc(args.b_hh[g * H + unit]);
    }
    if constexpr (kStates == 1) {
      previous[0] = to_acc(previous_state(args.sequence, args.reverse, step, slot, args.h, args.h0 + slot * H, unit));
    } else {
      previous[1] = to_acc(previous_state(args.sequence, args.reverse, step, slot, args.c, args.c0 + slot * H, unit));
    }
    Cell::forward(igates, hgates, previous, state, saved);
#pragma unroll
    for (int s = 0; s < kSaved; ++s) from_acc(saved[s], args.saved[(row * kSaved + s) * H + unit]);
  }
}

// With layer normalisation what is kept are the products. Mapping as above.
template <class Cell, class scalar_t>
__global__ void __launch_bounds__(kThreads) keep_products_kernel(const __grid_constant__ Recomputed<scalar_t> args) {
  constexpr int kGates = Cell::kGates;
  const int64_t H = args.hidden_size, unit = first_feature<1>();
  if (unit >= H) return;
  for (int64_t i = first_row(); i < args.rows; i += row_stride()) {
    const int64_t row = args.first_row + i;
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      args.saved[((2 * row) * kGates + g) * H + unit] = args.igates[(row * kGates + g) * H + unit];
      from_acc(args.hgates[(i * kGates + g) * H + unit], args.saved[((2 * row + 1) * kGates + g) * H + unit]);
    }
  }
}

// S
int64_t saved_values(const LayerBackward& layer) { return cell_info(layer.cell).saved_values(layer.layer_norm); }

bool recomputes(const LayerBackward& layer) { return layer.direction[0].saved == nullptr && saved_values(layer) > 0; }

// Enough rows to fill a GPU, few enough to bound the workspace.
int64_t recomputed_rows(const LayerBackward& layer) {
  constexpr int64_t kBytes = int64_t{64} << 20;
  const int64_t row_bytes = cell_info(layer.cell).gates * layer.hidden_size * (layer.dtype == Dtype::f64 ? 8 : 4);
  return std::max<int64_t>(1, std::min(layer.sequence.rows, kBytes / row_bytes));
}

template <class Cell, class scalar_t>
int recompute(const LayerBackward& layer, int k, const BackwardProducts& products, const Context& context,
              const DeviceSequence& sequence, int64_t chunk, void* hgates, void* saved) {
  const DirectionBackward& d = layer.direction[k];
  const int64_t H = layer.hidden_size, P = layer.output_size, GH = Cell::kGates * H;
  Recomputed<scalar_t> args;
  args.hidden_size = H;
  args.sequence = sequence;
  args.reverse = d.reverse;
  args.igates = static_cast<const scalar_t*>(d.grad_igates);
  args.hgates = static_cast<const acc_type<scalar_t>*>(hgates);
  args.b_hh = static_cast<const scalar_t*>(d.weights.b_hh);
  args.h = DeviceRows<scalar_t>(d.output, layer.sequence);
  args.h0 = static_cast<const scalar_t*>(d.h0);
  args.c = DeviceRows<scalar_t>(d.c, layer.sequence);
  args.c0 = static_cast<const scalar_t*>(d.c0);
  args.saved = static_cast<scalar_t*>(saved);
  for (int64_t first = 0; first < layer.sequence.rows; first += chunk) {
    args.first_row = first;
    args.rows = std::min(chunk, layer.sequence.rows - first);
    const scalar_t* h_prev = static_cast<const scalar_t*>(products.h_prev) + first * P;
    if constexpr (is_diagonal<Cell>) {
      args.h_prev = h_prev;
      args.w_hh = static_cast<const scalar_t*>(d.weights.w_hh);
    } else {
      RNNFAST_RETURN_IF_ERROR(multiply(context.gemm, {.dtype = layer.dtype,
                                                      .m = args.rows,
                                                      .n = first_gates<Cell> * H,
                                                      .k = P,
                                                      .a = h_prev,
                                                      .lda = P,
                                                      .b = d.weights.w_hh,
                                                      .ldb = P,
                                                      .transpose_b = true,
                                                      .c = hgates,
                                                      .ldc = GH}));
    }
    if constexpr (has_two_products<Cell>) {
      Gate<scalar_t> gate{H, {}};
      gate.direction[0] = {args.rows,
                           args.igates + first * GH,
                           static_cast<acc_type<scalar_t>*>(hgates),
                           args.b_hh,
                           h_prev,
                           static_cast<scalar_t*>(products.gated) + first * P};
      const void* const w_hh[] = {d.weights.w_hh};
      RNNFAST_RETURN_IF_ERROR((second_product<Cell, scalar_t>(layer.dtype, gate, w_hh, 1, context)));
    }
    const auto kernel = layer.layer_norm ? keep_products_kernel<Cell, scalar_t> : recompute_kernel<Cell, scalar_t>;
    RNNFAST_RETURN_IF_ERROR(
        launch(kernel, rows_shape(H, args.rows, 1, 1), static_cast<cudaStream_t>(context.stream), args));
  }
  return 0;
}

}  // namespace

BackwardPreparation::BackwardPreparation(const LayerBackward& layer, Workspace& workspace) {
  const CellInfo info = cell_info(layer.cell);
  const int64_t H = layer.hidden_size, element = static_cast<int64_t>(size_of(layer.dtype));
  offsets_ = workspace.take<int64_t>(offsets_count(layer.sequence));
  if (!recomputes(layer)) return;
  chunk_ = recomputed_rows(layer);
  if (!info.diagonal) hgates_ = workspace.take<char>(chunk_ * info.gates * H * std::max<int64_t>(element, 4));
  // Of a cell with two products the gradients of the gates are there before its gate is read.
  const bool in_place = saved_values(layer) == info.gates && !info.two_products;
  for (int k = 0; k < layer.directions && !in_place; ++k) {
    saved_[k] = workspace.take<char>(layer.sequence.rows * saved_values(layer) * H * element);
  }
}

int BackwardPreparation::run(LayerBackward& layer, const BackwardProducts (&products)[2], const Context& context,
                             DeviceSequence& sequence) const {
  const auto stream = static_cast<cudaStream_t>(context.stream);
  RNNFAST_RETURN_IF_ERROR(device_sequence(layer.sequence, offsets_, stream, sequence));
  if (layer.sequence.rows == 0) return 0;
  PreviousStates states{layer.dtype, layer.output_size, layer.directions, layer.sequence, {}};
  for (int k = 0; k < layer.directions; ++k) {
    const DirectionBackward& d = layer.direction[k];
    states.direction[k] = {d.reverse, d.output, d.h0, products[k].h_prev};
  }
  RNNFAST_RETURN_IF_ERROR(enqueue_previous_states(states, layer.noise, sequence, stream));
  if (!recomputes(layer)) return 0;
  for (int k = 0; k < layer.directions; ++k) {
    DirectionBackward& d = layer.direction[k];
    void* saved = saved_[k] != nullptr ? saved_[k] : d.grad_igates;
    RNNFAST_RETURN_IF_ERROR(dispatch(layer.cell, layer.dtype, [&](auto cell, auto scalar) {
      return recompute<typename decltype(cell)::type, typename decltype(scalar)::type>(
          layer, k, products[k], context, sequence, chunk_, hgates_, saved);
    }));
    d.saved = saved;
  }
  return 0;
}

}  // namespace rnnfast::cuda
