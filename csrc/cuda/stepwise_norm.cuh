// Owns: a step of the stepwise engine with layer normalisation (cell/layer_norm.h), forward and backward, and the
// gradients of the norms' weights and of the biases.
// Must not know: equations (csrc/cell has them), loops over time, tensors.
//
// A row is normalised over all of its gates, so each row of a step has a thread block of its own, whose threads walk
// along its units, each over the same ones every time. What a thread needs of a unit later it leaves in the workspace;
// what all need are sums over the row, made by the block in one order.
#pragma once

#include "cell/layer_norm.h"
#include "device_ptx.h"
#include "stepwise_step.cuh"
#include "tiles.h"

namespace rnnfast::cuda::stepwise {

constexpr int kNormThreads = 256;  // of a block at most; whole warps

template <class scalar_t>
struct NormDirection {
  using acc_t = acc_type<scalar_t>;
  const scalar_t* norm[2] = {};                         // [G*H] of the input half of the gates and of the hidden half
  const scalar_t* bias[2] = {};                         // [G*H] or null
  const scalar_t *norm_c = nullptr, *bias_c = nullptr;  // [H]: cells with two states
  acc_t* values = nullptr;                              // [B, several, H] what threads leave of a row for later
  // Backward: [B, norm_lines, H] sums over the steps of each row, null where not wanted. Lines of G*H are of norm[0],
  // norm[1], bias[0] and bias[1], lines of H of norm_c and bias_c.
  acc_t* sums = nullptr;
};

template <class scalar_t>
struct NormStep {
  NormDirection<scalar_t> direction[2];
};

inline int norm_lines(const CellInfo& info) { return 4 * info.gates + (info.states == 2 ? 2 : 0); }
// What `values` has for each unit: what the cell keeps and c; and in backward two gradients on the way to c, and those
// of both halves of the gates.
inline int forward_norm_values(const CellInfo& info) { return info.states == 2 ? info.saved + 1 : 0; }
inline int backward_norm_values(const CellInfo& info) { return info.saved + 3 + 2 * info.gates; }

inline LaunchShape norm_shape(int64_t hidden_size, int64_t rows, int directions) {
  int threads = 32;
  while (threads < hidden_size && threads < kNormThreads) threads *= 2;
  return {dim3(static_cast<unsigned>(rows), directions), dim3(threads)};
}

template <class scalar_t>
NormDirection<scalar_t> norm_direction(const DirectionWeights& w, acc_type<scalar_t>* values) {
  const auto typed = [](const void* pointer) { return static_cast<const scalar_t*>(pointer); };
  return {{typed(w.norm_ih), typed(w.norm_hh)},
          {typed(w.b_ih), typed(w.b_hh)},
          typed(w.norm_c),
          typed(w.norm_bias_c),
          values,
          nullptr};
}

// ------------------------------------------------------------------------------------------------ device
// The sums over the block's threads, in a fixed order, for all of them: over a warp, then over the warps.
template <int kCount, class acc_t>
__device__ __forceinline__ void block_sums(acc_t (&value)[kCount]) {
  RNNFAST_SHARED(acc_t, sums, [kCount][kNormThreads / kWarpLanes]);
  const unsigned warp = threadIdx.x / kWarpLanes, warps = blockDim.x / kWarpLanes;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int lanes = kWarpLanes / 2; lanes > 0; lanes /= 2) value[i] += __shfl_xor_sync(kAllLanes, value[i], lanes);
  }
  __syncthreads();  // the sums before these have been read
  if (threadIdx.x % kWarpLanes == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i][warp] = value[i];
  }
  __syncthreads();  // all is there
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    value[i] = sums[i][0];
    for (unsigned w = 1; w < warps; ++w) value[i] += sums[i][w];
  }
}

template <class acc_t>
struct Statistics {
  acc_t mean, scale;
};

// Of kCount vectors of n numbers, by which they are normalised. element(i, e) is number e of the i-th.
template <class acc_t, int kCount, class Element>
__device__ __forceinline__ void find_statistics(int64_t n, const Element& element, Statistics<acc_t> (&of)[kCount]) {
  acc_t sums[kCount] = {};
  for (int64_t e = threadIdx.x; e < n; e += blockDim.x) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += element(i, e);
  }
  block_sums(sums);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    of[i].mean = sums[i] / acc_t(n);
    sums[i] = 0;
  }
  for (int64_t e = threadIdx.x; e < n; e += blockDim.x) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const acc_t distance = element(i, e) - of[i].mean;
      sums[i] += distance * distance;
    }
  }
  block_sums(sums);
#pragma unroll
  for (int i = 0; i < kCount; ++i) of[i].scale = norm_scale(sums[i] / acc_t(n));
}

// weight n + bias
template <class acc_t, class scalar_t>
__device__ __forceinline__ acc_t scaled(acc_t n, const scalar_t* weight, const scalar_t* bias, int64_t e) {
  const acc_t product = to_acc(weight[e]) * n;
  return bias != nullptr ? product + to_acc(bias[e]) : product;
}

// ------------------------------------------------------------------------------------------------ forward
// Equations: Cell::forward of both halves of the gates, normalised; with two states Cell::hidden of the normalised c.
// Behind a reset W_hh h, h and c are zero. igates and hgates are the products alone; `saved` gets both.
// Mapping: a block a row, see above. Synchronisation: that of block_sums; between them a thread reads what it wrote.
// The 1 in the launch bounds keeps ptxas from spilling for the sake of more blocks an SM.
template <class Cell, class scalar_t>
__global__ void __launch_bounds__(kNormThreads, 1)
    norm_forward_kernel(const __grid_constant__ ForwardStep<scalar_t> args,
                        const __grid_constant__ NormStep<scalar_t> norms) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;
  const ForwardStepDirection<scalar_t>& d = args.direction[blockIdx.y];
  const NormDirection<scalar_t>& w = norms.direction[blockIdx.y];
  const DeviceNoise<acc_t>& noise = args.noise;
  const int64_t H = args.hidden_size, GH = kGates * H, row = blockIdx.x;
  if (row >= d.rows) return;
  if (!lives(args.lengths, row, d.step)) {
    for (int64_t unit = threadIdx.x; unit < H; unit += blockDim.x) {
      if (d.output != nullptr) store_zero<1>(d.output + row * d.output_stride + unit);
      if (d.hidden != nullptr) store_zero<1>(d.hidden + row * H + unit);
      if (d.c_output != nullptr) store_zero<1>(d.c_output + row * d.c_output_stride + unit);
    }
    return;
  }
  const bool cut = d.entered.cuts(args.lengths, row);

  const auto product = [&](int half, int64_t e) {
    if (half == 0) return to_acc(d.igates[row * GH + e]);
    return cut ? acc_t(0) : d.hgates[row * GH + e];
  };
  Statistics<acc_t> of[2];
  find_statistics(GH, product, of);

  const auto write_h = [&](int64_t unit, acc_t h) {
    const int64_t at = row * H + unit;
    if (d.hidden != nullptr) return from_acc(h, d.hidden[at]);
    if (noise.zoneout_h > 0) {
      const acc_t old = cut ? acc_t(0) : to_acc(d.h[at]);
      h = zoned(noise.keep_h(d.reverse, d.step, row, unit), old, h);
    }
    if (d.masked != nullptr) from_acc(noise.mask(d.reverse, row, unit) * rounded<scalar_t>(h), d.masked[at]);
    from_acc(h, d.output[row * d.output_stride + unit]);
    from_acc(h, d.h[at]);
  };

  acc_t* const values = w.values + row * (kSaved + 1) * H;
  for (int64_t unit = threadIdx.x; unit < H; unit += blockDim.x) {
    acc_t gates[2][kGates], previous[kStates] = {}, state[kStates], saved[kSaved + 1];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        const int64_t e = g * H + unit;
        const acc_t x = product(half, e);
        gates[half][g] = scaled(normalised(x, of[half].mean, of[half].scale), w.norm[half], w.bias[half], e);
        if (d.saved != nullptr) from_acc(x, d.saved[(2 * row + half) * GH + e]);
      }
    }
    if (!cut) {
      if (d.h != nullptr) previous[0] = to_acc(d.h[row * H + unit]);
      if constexpr (kStates == 2) previous[1] = d.c[row * H + unit];
    }
    Cell::forward(gates[0], gates[1], previous, state, saved);
    if constexpr (kStates == 1) {
      write_h(unit, state[0]);
    } else {
#pragma unroll
      for (int s = 0; s < kSaved; ++s) values[s * H + unit] = saved[s];
      values[kSaved * H + unit] = state[1];
      acc_t c = state[1];
      if (noise.zoneout_c > 0) c = zoned(noise.keep_c(d.reverse, d.step, row, unit), previous[1], c);
      d.c[row * H + unit] = c;
      if constexpr (!std::is_same_v<acc_t, scalar_t>) from_acc(c, d.c_n[row * H + unit]);
      if (d.c_output != nullptr) from_acc(c, d.c_output[row * d.c_output_stride + unit]);
    }
  }
  if constexpr (kStates == 2) {
    const acc_t* const c = values + kSaved * H;
    Statistics<acc_t> of_c[1];
    find_statistics(H, [&](int, int64_t unit) { return c[unit]; }, of_c);
    for (int64_t unit = threadIdx.x; unit < H; unit += blockDim.x) {
      acc_t state[kStates] = {}, saved[kSaved];
#pragma unroll
      for (int s = 0; s < kSaved; ++s) saved[s] = values[s * H + unit];
      state[1] = scaled(normalised(c[unit], of_c[0].mean, of_c[0].scale), w.norm_c, w.bias_c, unit);
      write_h(unit, Cell::hidden(saved, state));
    }
  }
}

// ------------------------------------------------------------------------------------------------ backward
// Equations: forward's once more, from the products in `saved`; then Cell::backward, with two states in its two parts,
// and normalised_backward from c as h read it to c and from the gates to the products.
// Mapping: a block a row, see above. The sums for the weights' gradients are of one row each, so no two blocks meet.
// Synchronisation: that of block_sums; between them a thread reads what it wrote.
template <class Cell, class scalar_t>
__global__ void __launch_bounds__(kNormThreads, 1)
    norm_backward_kernel(const __grid_constant__ BackwardStep<scalar_t> args,
                         const __grid_constant__ NormStep<scalar_t> norms) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;
  const BackwardStepDirection<scalar_t>& d = args.direction[blockIdx.y];
  const NormDirection<scalar_t>& w = norms.direction[blockIdx.y];
  const DeviceNoise<acc_t>& noise = args.noise;
  const int64_t H = args.hidden_size, GH = kGates * H, row = blockIdx.x;
  if (row >= d.rows) return;
  scalar_t* const grad_products[2] = {d.grad_igates + row * GH, d.grad_hgates + row * GH};
  if (!lives(args.lengths, row, d.step)) {
    for (int64_t e = threadIdx.x; e < GH; e += blockDim.x) {
      store_zero<1>(grad_products[0] + e);
      store_zero<1>(grad_products[1] + e);
      if (d.hidden != nullptr && e < H) store_zero<1>(d.hidden + row * H + e);
    }
    return;
  }
  const bool cut = d.entered.cuts(args.lengths, row), left = d.left.cuts(args.lengths, row);

  const auto product = [&](int half, int64_t e) { return to_acc(d.saved[(2 * row + half) * GH + e]); };
  Statistics<acc_t> of[2];
  find_statistics(GH, product, of);
  const auto normal = [&](int half, int64_t e) { return normalised(product(half, e), of[half].mean, of[half].scale); };

  acc_t* const values = w.values + row * (kSaved + 3 + 2 * kGates) * H;  // kSaved of the cell, then
  acc_t *const c = values + kSaved * H, *const grad_read = c + H, *const grad_o = grad_read + H;
  acc_t* const grad_gates = grad_o + H;  // [2, G, H]
  acc_t* const sums = w.sums != nullptr ? w.sums + row * (4 * kGates + 2 * (kStates - 1)) * H : nullptr;

  // What the cell makes of the row's gates, once more.
  const auto forward = [&](int64_t unit, acc_t(&previous)[kStates], acc_t(&state)[kStates], acc_t(&saved)[kSaved + 1]) {
    acc_t gates[2][kGates];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int g = 0; g < kGates; ++g)
        gates[half][g] = scaled(normal(half, g * H + unit), w.norm[half], w.bias[half], g * H + unit);
    }
#pragma unroll
    for (int s = 0; s < kStates; ++s) previous[s] = 0;
    if (!cut) {
      const Previous<scalar_t>& from = kStates == 1 ? d.h_prev : d.c_prev;
      previous[kStates - 1] = to_acc(from.row(args.lengths, row, H)[unit]);
    }
    Cell::forward(gates[0], gates[1], previous, state, saved);
  };
  // The gradient of h; what zoneout's last h gets of it takes the place of what is carried.
  const auto take_grad_h = [&](int64_t unit) {
    if (d.grad_hidden != nullptr) return d.grad_hidden[row * H + unit];
    acc_t& carried = d.grad_h[row * H + unit];
    acc_t grad = left ? acc_t(0) : carried;
    if (d.grad_output != nullptr) grad += to_acc(d.grad_output[row * d.grad_output_stride + unit]);
    carried = noise.zoneout_h > 0 ? divide_gradient(noise.keep_h(d.reverse, d.step, row, unit), grad) : acc_t(0);
    return grad;
  };
  // The gates' gradients through the norms' weights.
  acc_t means[4] = {};
  const auto leave_gates = [&](int64_t unit, const acc_t(&grads)[2][kGates], acc_t grad_previous) {
    if (d.grad_h != nullptr) d.grad_h[row * H + unit] += grad_previous;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        const int64_t e = g * H + unit;
        const acc_t n = normal(half, e), grad = to_acc(w.norm[half][e]) * grads[half][g];
        if (sums != nullptr) {
          sums[half * GH + e] += grads[half][g] * n;
          if (half == 0 || Cell::kSplitGates) sums[(2 + half) * GH + e] += grads[half][g];
        }
        grad_gates[half * GH + e] = grad;
        means[2 * half] += grad;
        means[2 * half + 1] += grad * n;
      }
    }
  };

  if constexpr (kStates == 1) {
    for (int64_t unit = threadIdx.x; unit < H; unit += blockDim.x) {
      acc_t previous[1], state[1], saved[kSaved + 1], grads[2][kGates], grad_previous[1];
      forward(unit, previous, state, saved);
      const acc_t grad[1] = {take_grad_h(unit)};
      Cell::backward(saved, previous, state, grad, grads[0], grads[1], grad_previous);
      leave_gates(unit, grads, grad_previous[0]);
    }
  } else {
    for (int64_t unit = threadIdx.x; unit < H; unit += blockDim.x) {
      acc_t previous[kStates], state[kStates], saved[kSaved + 1];
      forward(unit, previous, state, saved);
#pragma unroll
      for (int s = 0; s < kSaved; ++s) values[s * H + unit] = saved[s];
      c[unit] = state[1];
    }
    Statistics<acc_t> of_c[1];
    find_statistics(H, [&](int, int64_t unit) { return c[unit]; }, of_c);
    const auto normal_c = [&](int64_t unit) { return normalised(c[unit], of_c[0].mean, of_c[0].scale); };

    acc_t means_c[2] = {};
    for (int64_t unit = threadIdx.x; unit < H; unit += blockDim.x) {
      acc_t state[kStates] = {}, saved[kSaved], of_gate;
#pragma unroll
      for (int s = 0; s < kSaved; ++s) saved[s] = values[s * H + unit];
      const acc_t n = normal_c(unit);
      state[1] = scaled(n, w.norm_c, w.bias_c, unit);
      if (d.hidden != nullptr) from_acc(Cell::hidden(saved, state), d.hidden[row * H + unit]);
      const acc_t grad = Cell::hidden_backward(saved, state, take_grad_h(unit), of_gate);
      if (sums != nullptr) {
        sums[4 * GH + unit] += grad * n;
        sums[4 * GH + H + unit] += grad;
      }
      grad_read[unit] = to_acc(w.norm_c[unit]) * grad;
      grad_o[unit] = of_gate;
      means_c[0] += grad_read[unit];
      means_c[1] += grad_read[unit] * n;
    }
    block_sums(means_c);

    for (int64_t unit = threadIdx.x; unit < H; unit += blockDim.x) {
      acc_t previous[kStates] = {}, saved[kSaved], grads[2][kGates], grad_previous[kStates], kept = 0;
#pragma unroll
      for (int s = 0; s < kSaved; ++s) saved[s] = values[s * H + unit];
      if (!cut) previous[1] = to_acc(d.c_prev.row(args.lengths, row, H)[unit]);
      acc_t& carried = d.grad_c[row * H + unit];
      acc_t grad = carried;
      if (d.grad_c_output != nullptr) grad += to_acc(d.grad_c_output[row * d.grad_c_output_stride + unit]);
      if (noise.zoneout_c > 0) kept = divide_gradient(noise.keep_c(d.reverse, d.step, row, unit), grad);
      grad += normalised_backward(normal_c(unit), of_c[0].scale, grad_read[unit], means_c[0] / acc_t(H),
                                  means_c[1] / acc_t(H));
      Cell::candidate_backward(saved, previous, grad, grad_o[unit], grads[0], grads[1], grad_previous);
      carried = cut ? acc_t(0) : grad_previous[1] + kept;
      leave_gates(unit, grads, grad_previous[0]);
    }
  }

  block_sums(means);
  for (int64_t unit = threadIdx.x; unit < H; unit += blockDim.x) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        const int64_t e = g * H + unit;
        from_acc(normalised_backward(normal(half, e), of[half].scale, grad_gates[half * GH + e],
                                     means[2 * half] / acc_t(GH), means[2 * half + 1] / acc_t(GH)),
                 grad_products[half][e]);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------ gradients of weights
template <class scalar_t>
struct NormGradientsDirection {
  acc_type<scalar_t>* sums = nullptr;  // as NormDirection's
  scalar_t* gradients[6] = {};         // of norm[0], norm[1], bias[0], bias[1], norm_c, bias_c; null: not wanted
};

template <class scalar_t>
struct NormGradients {
  int64_t rows = 0, hidden_size = 0;
  int gates = 0, lines = 0;
  bool split_gates = false;
  NormGradientsDirection<scalar_t> direction[2];
};

// Mapping: a thread an element. Nothing to synchronise.
template <class scalar_t>
__global__ void __launch_bounds__(kThreads)
    clear_norm_sums_kernel(const __grid_constant__ NormGradients<scalar_t> args) {
  const int64_t width = args.lines * args.hidden_size, e = first_feature<1>();
  if (e >= width) return;
  for (int64_t row = first_row(); row < args.rows; row += row_stride())
    args.direction[blockIdx.z].sums[row * width + e] = 0;
}

// The sums over the rows, one after the other. Mapping: a thread an element of a gradient. Nothing to synchronise.
template <class scalar_t>
__global__ void __launch_bounds__(kThreads) add_norm_sums_kernel(const __grid_constant__ NormGradients<scalar_t> args) {
  const NormGradientsDirection<scalar_t>& d = args.direction[blockIdx.z];
  const int64_t H = args.hidden_size, GH = args.gates * H, width = args.lines * H, e = first_feature<1>();
  if (e >= width || first_row() > 0) return;
  const int64_t kind = e < 4 * GH ? e / GH : 4 + (e - 4 * GH) / H;
  const int64_t unit = e < 4 * GH ? e % GH : e % H;
  scalar_t* gradient = nullptr;
#pragma unroll
  for (int k = 0; k < 6; ++k) gradient = kind == k ? d.gradients[k] : gradient;
  if (gradient == nullptr) return;
  const int64_t from = kind == 3 && !args.split_gates ? e - GH : e;  // both biases have one gradient
  acc_type<scalar_t> sum = 0;
  for (int64_t row = 0; row < args.rows; ++row) sum += d.sums[row * width + from];
  from_acc(sum, gradient[unit]);
}

// Host: the sums of a layer's backward, cleared before its loop and added up behind it, where they are wanted.
template <class scalar_t>
class NormSums {
 public:
  static bool wanted(const LayerBackward& layer) { return layer.direction[0].grad_norm_ih != nullptr; }

  NormSums(const LayerBackward& layer, acc_type<scalar_t>* const (&sums)[2])
      : wanted_(wanted(layer)), directions_(layer.directions) {
    const CellInfo info = cell_info(layer.cell);
    args_ = {layer.sequence.batch, layer.hidden_size, info.gates, norm_lines(info), info.split_gates, {}};
    const auto typed = [](void* gradient) { return static_cast<scalar_t*>(gradient); };
    for (int k = 0; k < directions_; ++k) {
      const DirectionBackward& d = layer.direction[k];
      args_.direction[k] = {sums[k],
                            {typed(d.grad_norm_ih), typed(d.grad_norm_hh), typed(d.grad_b_ih), typed(d.grad_b_hh),
                             typed(d.grad_norm_c), typed(d.grad_norm_bias_c)}};
    }
  }
  int clear(cudaStream_t stream) const { return run(clear_norm_sums_kernel<scalar_t>, args_.rows, stream); }
  int add(cudaStream_t stream) const { return run(add_norm_sums_kernel<scalar_t>, 1, stream); }

 private:
  template <class Kernel>
  int run(Kernel kernel, int64_t rows, cudaStream_t stream) const {
    if (!wanted_) return 0;
    return launch(kernel, rows_shape(args_.lines * args_.hidden_size, rows, 1, directions_), stream, args_);
  }

  bool wanted_;
  int directions_;
  NormGradients<scalar_t> args_;
};

}  // namespace rnnfast::cuda::stepwise
