// Owns: the engine persistent_cta. One launch runs all steps; each block runs the whole recurrence of 8 batch rows in
// one direction. W_hh stays on the chip, and blocks never wait for each other. Must not know: equations (csrc/cell has
// them), tensors, shapes that another engine should take (csrc/plan.cpp knows).
//
// Forward, a step:
//
//     hgates = W_hh h                        tensor cores, WeightTile: a warp has 16 units, all gates of each
//     h, c   = cell(igates, hgates, h, c)    in registers, ForwardLane: a lane has 2 units of 2 batch rows
//
// Mapping:       block x is the batch tile, block z the direction, warp w has units 16 w .. 16 w + 15.
// Registers:     W_hh as far as they reach, the states (c in float), the igates of the next step.
// Shared memory: the rest of W_hh; h as the product's operand, twice.
// Synchronises:  one barrier a step. Step t reads h[t % 2] and writes h[(t + 1) % 2]; the barrier at its end stands
//                between its writes and their readers at t + 1, and between its reads and the writes of t + 1.
#pragma once

#include "launch.cuh"
#include "persistent_cta_kernels.h"
#include "recurrent_lane.cuh"
#include "recurrent_tile.cuh"
#include "tiles.h"

namespace rnnfast::cuda::persistent_cta {

// ------------------------------------------------------------------------------------------------ shared memory
template <class Math>
constexpr bool kTensorCores = !std::is_same_v<Math, ScalarFloat>;

template <class Cell, class Math, bool kWide>
struct Kernel {
  using Operand = typename Math::Operand;
  static constexpr int kGates = Cell::kGates;
  static constexpr CtaShape kShape = cta_shape(kGates, kTensorCores<Math>, kWide);
  static constexpr int kMostThreads = kShape.most_warps * kWarpLanes;
  using Tile = WeightTile<Math, kGates, kShape.register_depth>;
};

template <class Cell, class Math, bool kWide>
struct ForwardShared {
  using Operand = typename Math::Operand;
  int depth, stride;
  Operand* h;   // [2, 8, stride]
  uint4* w_hh;  // [warps, what does not fit into registers]
  size_t bytes;

  __host__ __device__ ForwardShared(char* base, int hidden_size)
      : depth(depth_of(hidden_size, sizeof(Operand))), stride(operand_stride(hidden_size, sizeof(Operand))) {
    const int warps = round_up(hidden_size, kTileUnits) / kTileUnits;
    device::SharedLayout layout(base);
    h = layout.take<Operand>(2 * kTileRows * stride);
    w_hh = layout.take<uint4>(warps * weights());
    bytes = layout.bytes();
  }
  // Of one warp.
  __host__ __device__ size_t weights() const {
    return tile_shared_bytes(Cell::kGates, depth, Kernel<Cell, Math, kWide>::kShape.register_depth) / sizeof(uint4);
  }
};

// ------------------------------------------------------------------------------------------------ forward
template <class Cell, class scalar_t, class Math, bool kWide>
__global__ void __launch_bounds__(Kernel<Cell, Math, kWide>::kMostThreads, 1)
    forward_kernel(const __grid_constant__ ForwardLayerOnDevice<scalar_t> layer) {
  using Operand = typename Math::Operand;
  constexpr int kGates = Cell::kGates;
  const ForwardDirection<scalar_t>& direction = layer.direction[blockIdx.z];
  const int H = layer.hidden_size;
  const int warp = threadIdx.x / kWarpLanes, first_unit = warp * kTileUnits;
  const ForwardShared<Cell, Math, kWide> shared(device::dynamic_shared(), H);
  const TileLane of_lane;

  typename Kernel<Cell, Math, kWide>::Tile w_hh;
  w_hh.load(
      [&](int gate, int row, int k) {
        const int unit = first_unit + unit_of_row(row);
        return Math::to_operand(
            unit < H && k < H ? to_acc(direction.w_hh[(static_cast<int64_t>(gate) * H + unit) * H + k]) : 0.0f);
      },
      shared.depth, shared.w_hh + warp * shared.weights());
  clear(shared.h, 2 * kTileRows * shared.stride);

  ForwardLane<Cell, scalar_t> lane(layer, direction, static_cast<int>(blockIdx.x) * kTileRows, first_unit);
  const auto operand = [&](int index) { return shared.h + (index & 1) * kTileRows * shared.stride; };
  const auto publish = [&](Operand* h) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float value[2];
      lane.operand(j, value);
      store_operand<Math>(value, h + of_lane.row(j) * shared.stride + first_unit + of_lane.unit(0));
    }
  };
  lane.fetch(lane.first());
  __syncthreads();
  publish(operand(lane.first()));
  __syncthreads();

  for (int index = lane.first(); index < lane.last(); ++index) {
    typename Math::Sums sums[kGates];
    w_hh.multiply(sums, operand(index), shared.stride);
    float hgates[kGates][4];
#pragma unroll
    for (int g = 0; g < kGates; ++g) Math::finish(sums[g], hgates[g]);
    lane.step(index, hgates);
    publish(operand(index + 1));
    __syncthreads();
  }
  lane.finish();
}

// ------------------------------------------------------------------------------------------------ host
template <class Cell, class scalar_t, class Math, bool kWide>
int run(const LayerForward& layer, const Context& context) {
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const int H = static_cast<int>(layer.hidden_size);
  ForwardLayerOnDevice<scalar_t> args = forward_on_device<scalar_t>(layer);
  RNNFAST_RETURN_IF_ERROR(
      device_sequence(layer.sequence, static_cast<int64_t*>(context.workspace), stream, args.sequence));
  const auto kernel = forward_kernel<Cell, scalar_t, Math, kWide>;
  const LaunchShape shape = {dim3(static_cast<unsigned>((layer.sequence.batch + kTileRows - 1) / kTileRows), 1,
                                  static_cast<unsigned>(layer.directions)),
                             dim3(static_cast<unsigned>(round_up(H, kTileUnits) / kTileUnits * kWarpLanes)),
                             ForwardShared<Cell, Math, kWide>(nullptr, H).bytes};
  return launch(kernel, shape, stream, args);
}

template <class Cell, class scalar_t, class Math>
int run(const LayerForward& layer, const Context& context) {
  if (fits_cta_shape(layer.hidden_size, cta_shape(Cell::kGates, kTensorCores<Math>, false))) {
    return run<Cell, scalar_t, Math, false>(layer, context);
  }
  if constexpr (has_wide_cta_shape(Cell::kGates, sizeof(scalar_t))) {
    return run<Cell, scalar_t, Math, true>(layer, context);
  }
  return cudaErrorInvalidValue;
}

template <class scalar_t, class Math>
int forward(const LayerForward& layer, const Context& context) {
  switch (layer.cell) {
#define RNNFAST_CTA_FORWARD(name, Cell) \
  case CellKind::name:                  \
    return run<Cell, scalar_t, Math>(layer, context);
    RNNFAST_FOR_EACH_CELL(RNNFAST_CTA_FORWARD)
#undef RNNFAST_CTA_FORWARD
  }
  return cudaErrorInvalidValue;
}

}  // namespace rnnfast::cuda::persistent_cta
