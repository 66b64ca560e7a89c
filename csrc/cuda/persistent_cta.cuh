// Owns: the engine persistent_cta. One launch runs all steps; each block runs the whole recurrence of 8 batch rows in
// one direction. W_hh stays on the chip, and blocks never wait for each other. Must not know: equations (csrc/cell has
// them), tensors, shapes that another engine should take (csrc/plan.cpp knows).
//
// Forward, a step:
//
//     hgates = W_hh h                                  tensor cores, WeightTile: a warp has 16 units, all gates of each
//     h, c   = cell(igates, hgates, h, c)              in registers, ForwardLane: a lane has 2 units of 2 batch rows
//
// Backward, a step, from the last to the first:
//
//     grad_igates, grad_hgates, grad_h, grad_c = cell's backward                 in registers, BackwardLane
//     grad_h += sum over gates of W_hh[gate]^T grad_hgates[gate]                 tensor cores: a warp has 16 columns of
//                                                                                W_hh, those of its units
//
// Mapping:       block x is the batch tile, block z the direction, warp w has units 16 w .. 16 w + 15.
// Registers:     W_hh as far as they reach, the states or their gradients (in float), what the next step reads.
// Shared memory: the rest of W_hh; the product's operand (h; the gradients of all gates), twice.
// Synchronises:  one barrier a step, between the writes of a step's operand and its reads. Steps alternate between two
//                operands: who writes one again has passed a barrier that all pass after they have read it.
#pragma once

#include "arithmetic.cuh"
#include "launch.cuh"
#include "persistent_cta_kernels.cuh"
#include "pointwise.cuh"
#include "recurrent_lane.cuh"
#include "recurrent_tile.cuh"
#include "tiles.h"

namespace rnnfast::cuda::persistent_cta {

// ------------------------------------------------------------------------------------------------ shared memory
template <class Cell, class Math, bool kWide, bool kBackward>
struct Kernel {
  using Operand = typename Math::Operand;
  static constexpr int kGates = Cell::kGates;
  static constexpr CtaShape kShape = cta_shape(kGates, sizeof(Operand), kOnTensorCores<Math>, kWide, kBackward);
  static constexpr int kMostThreads = kShape.most_warps * kWarpLanes;
  using Tile = WeightTile<Math, kGates, kShape.register_depth>;
};

// The operand has k values for each batch row: H forward, all gates of it backward, each padded.
template <class Cell, class Math, bool kWide, bool kBackward>
struct Shared {
  using Operand = typename Math::Operand;
  int depth;          // tiles of k of a gate
  int gate, operand;  // elements of the operand of a gate, and of the whole
  Operand* operands;  // two
  uint4* w_hh;        // [warps, what does not fit into registers]
  size_t bytes;

  __host__ __device__ Shared(char* base, int hidden_size)
      : depth(depth_of(hidden_size, sizeof(Operand))),
        gate(operand_size(hidden_size, sizeof(Operand))),
        operand(kBackward ? Cell::kGates * gate : gate) {
    device::SharedLayout layout(base);
    operands = layout.take<Operand>(2 * operand);
    w_hh = layout.take<uint4>(warps_of(hidden_size) * weights());
    bytes = layout.bytes();
  }
  // Of one warp.
  __host__ __device__ int weights() const {
    return tile_shared_bytes(Cell::kGates, depth, Kernel<Cell, Math, kWide, kBackward>::kShape.register_depth) /
           sizeof(uint4);
  }
};

// ------------------------------------------------------------------------------------------------ forward
template <class Cell, class scalar_t, class Math, bool kWide>
__global__ void __launch_bounds__(Kernel<Cell, Math, kWide, /*kBackward=*/false>::kMostThreads, 1)
    forward_kernel(const __grid_constant__ ForwardLayerOnDevice<scalar_t> layer) {
  using Operand = typename Math::Operand;
  constexpr int kGates = Cell::kGates;
  const ForwardDirectionOnDevice<scalar_t>& direction = layer.direction[blockIdx.z];
  const int H = layer.hidden_size;
  const int warp = threadIdx.x / kWarpLanes, first_unit = warp * kTileUnits;
  const Shared<Cell, Math, kWide, /*kBackward=*/false> shared(device::dynamic_shared(), H);
  const int place = TileLane().place(first_unit, sizeof(Operand));

  typename Kernel<Cell, Math, kWide, /*kBackward=*/false>::Tile w_hh;
  w_hh.load(
      [&](int gate, int row, int k) {
        const int unit = first_unit + unit_of_row(row);
        return Math::to_operand(
            unit < H && k < H ? to_acc(direction.w_hh[(static_cast<int64_t>(gate) * H + unit) * H + k]) : 0.0f);
      },
      shared.depth, shared.w_hh + warp * shared.weights());
  clear(shared.operands, 2 * shared.operand);

  ForwardLane<Cell, scalar_t, typename Math::Number> lane(layer, direction, static_cast<int>(blockIdx.x) * kTileRows,
                                                          first_unit);
  const auto operand = [&](int index) { return shared.operands + (index & 1) * shared.operand; };
  const auto publish = [&](Operand* h) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      operand_pair<Math>(lane.operand(j)).store(h + place + j * packet_units(sizeof(Operand)));
    }
  };
  lane.begin(lane.first());
  __syncthreads();
  publish(operand(lane.first()));
  __syncthreads();
  lane.advance(lane.first());

  for (int index = lane.first(); index < lane.last(); ++index) {
    typename Math::Sums sums[kGates];
    w_hh.multiply(sums, operand(index));
    float hgates[kGates][4];
#pragma unroll
    for (int g = 0; g < kGates; ++g) Math::finish(sums[g], hgates[g]);
    lane.step(index, hgates);
    publish(operand(index + 1));
    __syncthreads();
    lane.advance(index + 1);
  }
  lane.finish();
}

// ------------------------------------------------------------------------------------------------ backward
template <class Cell, class scalar_t, class Math, bool kWide>
__global__ void __launch_bounds__(Kernel<Cell, Math, kWide, /*kBackward=*/true>::kMostThreads, 1)
    backward_kernel(const __grid_constant__ BackwardLayerOnDevice<scalar_t> layer) {
  using Operand = typename Math::Operand;
  constexpr int kGates = Cell::kGates;
  const BackwardDirectionOnDevice<scalar_t>& direction = layer.direction[blockIdx.z];
  const int H = layer.hidden_size;
  const int warp = threadIdx.x / kWarpLanes, first_unit = warp * kTileUnits;
  const Shared<Cell, Math, kWide, /*kBackward=*/true> shared(device::dynamic_shared(), H);
  const int place = TileLane().place(first_unit, sizeof(Operand));
  const int gate = device::opaque(shared.gate);  // or it would be computed again, for which no register is left

  typename Kernel<Cell, Math, kWide, /*kBackward=*/true>::Tile w_hh;
  w_hh.load(
      [&](int gate, int row, int k) {
        const int unit = first_unit + unit_of_row(row);
        return Math::to_operand(
            unit < H && k < H ? to_acc(direction.w_hh[(static_cast<int64_t>(gate) * H + k) * H + unit]) : 0.0f);
      },
      shared.depth, shared.w_hh + warp * shared.weights());
  clear(shared.operands, 2 * shared.operand);

  BackwardLane<Cell, scalar_t, typename Math::Number> lane(layer, direction, static_cast<int>(blockIdx.x) * kTileRows,
                                                           first_unit);
  lane.begin(lane.last() - 1);
  __syncthreads();

  float product[4] = {};
  for (int index = lane.last() - 1; index >= lane.first(); --index) {
    Operand* operand = shared.operands + (index & 1) * shared.operand;
    lane.step(index, product);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        operand_pair<Math>(lane.operand(g, j)).store(operand + place + j * packet_units(sizeof(Operand)) + g * gate);
      }
    }
    __syncthreads();
    lane.advance(index - 1);
    constexpr int kSums = kOnTensorCores<Math> ? kGates : 1;
    typename Math::Sums sums[kSums];
    w_hh.multiply_each(sums, operand, gate);
    Math::finish(sums[0], product);
#pragma unroll
    for (int s = 1; s < kSums; ++s) {
      float more[4];
      Math::finish(sums[s], more);
#pragma unroll
      for (int i = 0; i < 4; ++i) product[i] += more[i];
    }
  }
  lane.finish(lane.first(), product);
}

// ------------------------------------------------------------------------------------------------ host
inline LaunchShape launch_shape(const Sequence& sequence, int hidden_size, int directions, size_t shared_bytes) {
  return {
      dim3(static_cast<unsigned>((sequence.batch + kTileRows - 1) / kTileRows), 1, static_cast<unsigned>(directions)),
      dim3(static_cast<unsigned>(warps_of(hidden_size) * kWarpLanes)), shared_bytes};
}

template <class Cell, class scalar_t, class Math, bool kWide>
int launch_forward(const LayerForward& layer, const Context& context) {
  const auto stream = static_cast<cudaStream_t>(context.stream);
  ForwardLayerOnDevice<scalar_t> args = forward_on_device<scalar_t>(layer);
  RNNFAST_RETURN_IF_ERROR(
      device_sequence(layer.sequence, static_cast<int64_t*>(context.workspace), stream, args.sequence));
  const size_t shared_bytes = Shared<Cell, Math, kWide, /*kBackward=*/false>(nullptr, args.hidden_size).bytes;
  return launch(forward_kernel<Cell, scalar_t, Math, kWide>,
                launch_shape(layer.sequence, args.hidden_size, layer.directions, shared_bytes), stream, args);
}

template <class Cell, class scalar_t, class Math, bool kWide>
int launch_backward(const LayerBackward& layer, const BackwardProducts (&products)[2], const Context& context,
                    const DeviceSequence& sequence) {
  const auto stream = static_cast<cudaStream_t>(context.stream);
  BackwardLayerOnDevice<scalar_t> args = backward_on_device<scalar_t>(layer, products);
  args.sequence = sequence;
  const size_t shared_bytes = Shared<Cell, Math, kWide, /*kBackward=*/true>(nullptr, args.hidden_size).bytes;
  return launch(backward_kernel<Cell, scalar_t, Math, kWide>,
                launch_shape(layer.sequence, args.hidden_size, layer.directions, shared_bytes), stream, args);
}

// Calls function(Type<Cell>, wide) for the layer's cell and the shape that holds it.
template <class Math, bool kBackward, class Function>
int choose_kernel(CellKind cell, int64_t hidden_size, const Function& function) {
  return dispatch_persistent(cell, [&](auto type) -> int {
    using Cell = typename decltype(type)::type;
    using Operand = typename Math::Operand;
    if (fits_cta_shape(hidden_size,
                       cta_shape(Cell::kGates, sizeof(Operand), kOnTensorCores<Math>, /*wide=*/false, kBackward))) {
      return function(type, std::false_type());
    }
    if constexpr (has_wide_cta_shape(Cell::kGates, sizeof(Operand))) {
      return function(type, std::true_type());
    }
    return cudaErrorInvalidValue;
  });
}

template <class scalar_t, class Math>
int forward(const LayerForward& layer, const Context& context) {
  return choose_kernel<Math, /*kBackward=*/false>(layer.cell, layer.hidden_size, [&](auto cell, auto wide) {
    return launch_forward<typename decltype(cell)::type, scalar_t, Math, wide>(layer, context);
  });
}

template <class scalar_t, class Math>
int backward(const LayerBackward& layer, const BackwardProducts (&products)[2], const Context& context,
             const DeviceSequence& sequence) {
  return choose_kernel<Math, /*kBackward=*/true>(layer.cell, layer.hidden_size, [&](auto cell, auto wide) {
    return launch_backward<typename decltype(cell)::type, scalar_t, Math, wide>(layer, products, context, sequence);
  });
}

}  // namespace rnnfast::cuda::persistent_cta
