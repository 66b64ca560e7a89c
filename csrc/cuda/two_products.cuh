// Owns: what stands between the two products of a cell that has them (first_gates in cells.h), forward and backward:
//
//     hgates of the first gates = h W_hh^T                     the caller's GEMM, as for other cells
//     gated = cell's gate of igates, hgates + b_hh, h          gate_kernel
//     hgates of the other gates = gated W_hh^T                 a GEMM
//
//     grad_gated = the other gates' grad_hgates W_hh           a GEMM, behind the cell's backward
//     the first gate's grad_hgates, grad_h += that of gated    gate_backward_kernel, which also leaves gated
//     grad_h += the first gates' grad_hgates W_hh              the caller's GEMM
//
// Must not know: equations (csrc/cell has them), loops over time, tensors.
#pragma once

#include "stepwise.cuh"

namespace rnnfast::cuda {

template <class scalar_t>
struct GateDirection {
  using acc_t = acc_type<scalar_t>;
  int64_t rows = 0;
  const scalar_t* igates = nullptr;   // [rows, G*H]
  acc_t* hgates = nullptr;            // [rows, G*H]
  const scalar_t* b_hh = nullptr;     // [G*H] or null
  const scalar_t* operand = nullptr;  // [rows, H] what the first product read
  scalar_t* gated = nullptr;          // [rows, H] what the second reads
};

template <class scalar_t>
struct Gate {
  int64_t hidden_size = 0;
  GateDirection<scalar_t> direction[2];
};

// Equations: Cell::gate. Mapping: a thread an element. What it makes of a row that does not live, or behind a reset,
// where hgates are zero, the GEMM alone reads, row by row. Nothing to synchronise.
template <class Cell, class scalar_t>
__global__ void __launch_bounds__(kThreads) gate_kernel(const __grid_constant__ Gate<scalar_t> args) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kGates = Cell::kGates, kFirst = first_gates<Cell>;
  const GateDirection<scalar_t>& d = args.direction[blockIdx.z];
  const int64_t H = args.hidden_size, unit = first_feature<1>();
  if (unit >= H) return;
  for (int64_t row = first_row(); row < d.rows; row += row_stride()) {
    acc_t igates[kGates], hgates[kFirst], saved[Cell::kSaved];
#pragma unroll
    for (int g = 0; g < kFirst; ++g) {
      const int64_t at = (row * kGates + g) * H + unit;
      igates[g] = to_acc(d.igates[at]);
      hgates[g] = d.hgates[at];
      if (d.b_hh != nullptr) hgates[g] += to_acc(d.b_hh[g * H + unit]);
    }
    const acc_t operand = to_acc(d.operand[row * H + unit]);
    from_acc(Cell::gate(igates, hgates, operand, saved), d.gated[row * H + unit]);
  }
}

template <class scalar_t>
struct GateBackwardDirection {
  using acc_t = acc_type<scalar_t>;
  int64_t rows = 0, step = 0;
  bool reverse = false;
  const scalar_t* saved = nullptr;    // [rows, S*H]
  const scalar_t* operand = nullptr;  // [rows, H] what the first product read: zero where it read nothing
  const acc_t* grad_gated = nullptr;  // [rows, H]
  scalar_t* grad_gates = nullptr;     // [rows, G*H], zero for a row that does not live
  scalar_t* gated = nullptr;          // [rows, H], for the weight gradient
  acc_t* grad_h = nullptr;            // [B, H], carried
};

template <class scalar_t>
struct GateBackward {
  int64_t hidden_size = 0;
  const int64_t* lengths = nullptr;
  DeviceNoise<acc_type<scalar_t>> noise;
  GateBackwardDirection<scalar_t> direction[2];
};

// Equations: Cell::backward_gate; with recurrent dropout the operand is m h. Mapping: a thread an element. Nothing to
// synchronise.
template <class Cell, class scalar_t>
__global__ void __launch_bounds__(kThreads) gate_backward_kernel(const __grid_constant__ GateBackward<scalar_t> args) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kGates = Cell::kGates, kSaved = Cell::kSaved;
  const GateBackwardDirection<scalar_t>& d = args.direction[blockIdx.z];
  const int64_t H = args.hidden_size, unit = first_feature<1>();
  if (unit >= H) return;
  for (int64_t row = first_row(); row < d.rows; row += row_stride()) {
    const int64_t at = row * H + unit;
    if (!stepwise::lives(args.lengths, row, d.step)) {
      store_zero<1>(d.gated + at);
      continue;
    }
    acc_t saved[kSaved], grad_gate;
#pragma unroll
    for (int s = 0; s < kSaved; ++s) saved[s] = to_acc(d.saved[(row * kSaved + s) * H + unit]);
    const acc_t operand = to_acc(d.operand[at]);
    acc_t grad_operand = Cell::backward_gate(saved, operand, d.grad_gated[at], grad_gate);
    from_acc(grad_gate, d.grad_gates[row * kGates * H + unit]);
    from_acc(Cell::gated(saved, operand), d.gated[at]);
    if (args.noise.dropout) grad_operand *= args.noise.mask(d.reverse, row, unit);
    d.grad_h[at] += grad_operand;
  }
}

// ------------------------------------------------------------------------------------------------ host
// The rows of W_hh that belong to the second product.
template <class Cell, class scalar_t>
const scalar_t* second_weights(const void* w_hh, int64_t hidden_size) {
  return static_cast<const scalar_t*>(w_hh) + first_gates<Cell> * hidden_size * hidden_size;
}

// The gate and the second product of as many directions as there are weights.
template <class Cell, class scalar_t, size_t kDirections>
int second_product(Dtype dtype, const Gate<scalar_t>& gate, const void* const (&w_hh)[kDirections], int directions,
                   const Context& context) {
  const int64_t H = gate.hidden_size, G = Cell::kGates, first = first_gates<Cell>;
  RNNFAST_RETURN_IF_ERROR(launch(gate_kernel<Cell, scalar_t>, rows_shape(H, stepwise::most_rows(gate), 1, directions),
                                 static_cast<cudaStream_t>(context.stream), gate));
  for (int k = 0; k < directions; ++k) {
    const GateDirection<scalar_t>& d = gate.direction[k];
    RNNFAST_RETURN_IF_ERROR(multiply(context.gemm, {.dtype = dtype,
                                                    .m = d.rows,
                                                    .n = (G - first) * H,
                                                    .k = H,
                                                    .a = d.gated,
                                                    .lda = H,
                                                    .b = second_weights<Cell, scalar_t>(w_hh[k], H),
                                                    .ldb = H,
                                                    .transpose_b = true,
                                                    .c = d.hgates + first * H,
                                                    .ldc = G * H}));
  }
  return 0;
}

// Behind the cell's backward: back through the second product and the gate.
template <class Cell, class scalar_t>
int second_product_backward(const LayerBackward& layer, const GateBackward<scalar_t>& gate,
                            acc_type<scalar_t>* const (&grad_gated)[2], const Context& context) {
  const int64_t H = gate.hidden_size, G = Cell::kGates, first = first_gates<Cell>;
  for (int k = 0; k < layer.directions; ++k) {
    const GateBackwardDirection<scalar_t>& d = gate.direction[k];
    const void* const w_hh = layer.direction[k].weights.w_hh;
    RNNFAST_RETURN_IF_ERROR(multiply(context.gemm, {.dtype = layer.dtype,
                                                    .m = d.rows,
                                                    .n = H,
                                                    .k = (G - first) * H,
                                                    .a = d.grad_gates + first * H,
                                                    .lda = G * H,
                                                    .b = second_weights<Cell, scalar_t>(w_hh, H),
                                                    .ldb = H,
                                                    .c = grad_gated[k],
                                                    .ldc = H}));
  }
  return launch(gate_backward_kernel<Cell, scalar_t>, rows_shape(H, stepwise::most_rows(gate), 1, layer.directions),
                static_cast<cudaStream_t>(context.stream), gate);
}

}  // namespace rnnfast::cuda
