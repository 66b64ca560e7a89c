// Owns: the recurrence with W_hh spread over thread blocks, for the engines persistent_grid and persistent_cluster. One
// launch runs all steps in both directions. Must not know: equations (csrc/cell has them), tensors, how numbers go from
// block to block (an Exchange does).
//
// A team of blocks computes a group of batch rows in one direction; each block has some of the hidden units, and all k
// of their products. A step, forward:
//
//     hgates = W_hh h                                   a warp: one tile of 16 units, all gates, a part of k
//     h, c   = cell(igates, hgates, h, c)               the owner of 16 units x 8 batch rows adds up the parts
//
// and backward, from the last step to the first:
//
//     grad_h = sum over gates of W_hh[gate]^T grad_hgates[gate]          likewise; of the step after this one
//     grad_igates, grad_hgates, grad_h, grad_c = cell's backward         the owner
//
// This backward gathers the gradients of all gates, and shares product, exchange and synchronisation with forward.
// Where sums of grad_h move less, and the exchange has a Scatter, persistent_scatter.cuh runs backward.
//
// Mapping:       block x is the place in the team, block y the team, block z the direction. Warp w has unit tile
//                w % unit_tiles and the part w / unit_tiles = s of k; it owns row tile s, where there is one.
// Registers:     W_hh as far as they reach, the owners' states or their gradients, what the next step reads.
// Shared memory: the rest of W_hh; the exchanged vectors of the team (h; grad_hgates); the sums over parts of k.
// Synchronises:  a step waits for the vectors of the whole team, has one block barrier between the sums over parts and
//                the owners that add them (their own first, the others in order), and arrives with the owners' new
//                numbers. The vectors are double-buffered by the exchange: a block that has seen all others arrive at a
//                step knows that they have read the vectors of the step before, into whose place it writes next. The
//                same wait keeps the sums of a step from those of the next.
#pragma once

#include "launch.cuh"
#include "persistent_scatter.cuh"
#include "persistent_spread.h"
#include "persistent_team.cuh"
#include "recurrent_lane.cuh"

namespace rnnfast::cuda {

// ------------------------------------------------------------------------------------------------ shared memory
template <class Exchange>
struct SpreadShared {
  using Operand = typename Exchange::Operand;
  Operand* vectors;  // [copies, row_tiles, parts, operand of 8 rows]
  uint4* w_hh;       // [warps, what does not fit into registers]
  float4* partials;  // [depth_splits - 1, unit_tiles, row_tiles, sums, lanes]: each a lane's four
  uint64_t* mbarriers;
  size_t bytes;

  __host__ __device__ SpreadShared(char* base, const SpreadSizes& sizes) {
    device::SharedLayout layout(base);
    vectors = layout.take<Operand>(Exchange::kShared.copies * sizes.vector_bytes / sizeof(Operand));
    w_hh = layout.take<uint4>(sizes.warps * sizes.weight_bytes / sizeof(uint4));
    partials = layout.take<float4>(sizes.partial_bytes / sizeof(float4));
    mbarriers = layout.take<uint64_t>(Exchange::kShared.mbarriers);
    bytes = layout.bytes();
  }
};

// ------------------------------------------------------------------------------------------------ the product
// The warp's part of a product with the matrices of all gates, and the owner's sum over all parts. Forward has a sum
// for each gate, of the same vector; backward one, of a vector with a part for each gate.
template <class Math, int kGates, bool kBackward>
class SpreadProduct {
 public:
  static constexpr int kSums = kBackward ? 1 : kGates;
  using Operand = typename Math::Operand;

  // element(gate, row, k) is the matrix, 0 outside of it.
  template <class Element>
  __device__ __forceinline__ SpreadProduct(const SpreadShape& shape, const SpreadWarp& warp, uint4* w_hh,
                                           float4* partials, const Element& element)
      : shape_(shape), warp_(warp), first_k_(warp.split * shape.sizes.depth * Math::kDepth), partials_(partials) {
    const int left = shape.sizes.all_depth - warp.split * shape.sizes.depth;
    const int depth = left < 0 ? 0 : left < shape.sizes.depth ? left : shape.sizes.depth;
    weights_.load([&](int gate, int row, int k) { return element(gate, row, first_k_ + k); }, depth,
                  w_hh + threadIdx.x / kWarpLanes * (shape.sizes.weight_bytes / sizeof(uint4)));
  }

  // Leaves the warp's part for the owners of all rows of the team; the part that it owns itself, made last, in `own`.
  __device__ __forceinline__ void multiply(const Operand* vectors, float (&own)[kSums][4]) const {
    int row_tile = warp_.split;
    for (int i = 0; i < shape_.spread.row_tiles; ++i) {
      row_tile = row_tile + 1 < shape_.spread.row_tiles ? row_tile + 1 : 0;
      const Operand* vector = vectors + row_tile * shape_.sizes.row_tile + first_k_ * kTileRows;
      if constexpr (!kBackward) {
        typename Math::Sums sums[kGates];
        weights_.multiply(sums, vector);
#pragma unroll
        for (int s = 0; s < kSums; ++s) Math::finish(sums[s], own[s]);
      } else {
        // Several chains of products, so that one does not wait for the other.
        constexpr int kChains = kOnTensorCores<Math> ? kGates : 1;
        typename Math::Sums sums[kChains];
        weights_.multiply_each(sums, vector, shape_.sizes.part);
        Math::finish(sums[0], own[0]);
#pragma unroll
        for (int chain = 1; chain < kChains; ++chain) {
          float more[4];
          Math::finish(sums[chain], more);
#pragma unroll
          for (int j = 0; j < 4; ++j) own[0][j] += more[j];
        }
      }
      if (row_tile == warp_.split) break;
      // The owner, whose split is row_tile, leaves none.
      float4* partial = at(warp_.split < row_tile ? warp_.split : warp_.split - 1, row_tile);
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        partial[s * kWarpLanes] = make_float4(own[s][0], own[s][1], own[s][2], own[s][3]);
      }
    }
  }

  // Behind a barrier, by the owner of the warp's row tile: adds what the others left to its own part.
  __device__ __forceinline__ void sum(float (&sums)[kSums][4]) const {
    const int next = shape_.spread.unit_tiles * shape_.spread.row_tiles * kSums * kWarpLanes;
    add_parts(sums, at(0, warp_.split), shape_.spread.depth_splits - 1, next);
  }

 private:
  // Where one of those that do not own a row tile, counted in their order, leaves its part of it.
  __device__ __forceinline__ float4* at(int other, int row_tile) const {
    const int place = (other * shape_.spread.unit_tiles + warp_.unit_tile) * shape_.spread.row_tiles + row_tile;
    return partials_ + place * kSums * kWarpLanes + threadIdx.x % kWarpLanes;
  }

  const SpreadShape& shape_;
  const SpreadWarp& warp_;
  const int first_k_;
  float4* const partials_;
  static constexpr int kDepth = spread_register_depth(kGates, sizeof(Operand), kBackward, kOnTensorCores<Math>);
  WeightTile<Math, kGates, kDepth> weights_;
};

// ------------------------------------------------------------------------------------------------ forward
// The exchanged vector is h.
template <class Cell, class scalar_t, class Math, class Exchange>
__global__ void __launch_bounds__(kSpreadMostWarps* kWarpLanes, 1)
    spread_forward_kernel(const __grid_constant__ ForwardLayerOnDevice<scalar_t> layer,
                          const __grid_constant__ SpreadShape shape,
                          const __grid_constant__ typename Exchange::Arguments exchange_arguments) {
  if constexpr (!Exchange::kAvailable) return;
  constexpr int kGates = Cell::kGates;
  const ForwardDirectionOnDevice<scalar_t>& direction = layer.direction[blockIdx.z];
  const DeviceSequence& sequence = layer.sequence;
  const Spread& spread = shape.spread;
  const int H = layer.hidden_size;
  const SpreadWarp warp(spread);
  const SpreadShared<Exchange> shared(device::dynamic_shared(), shape.sizes);
  const int first_unit = (static_cast<int>(blockIdx.x) * spread.unit_tiles + warp.unit_tile) * kTileUnits;
  const int first_row = static_cast<int>(blockIdx.y) * spread.row_tiles * kTileRows;
  const TeamSteps steps(sequence, direction.reverse, first_row, spread.row_tiles);

  Exchange exchange(exchange_arguments, shape, shared.vectors, shared.mbarriers);
  const SpreadProduct<Math, kGates, false> product(
      shape, warp, shared.w_hh, shared.partials, [&](int gate, int row, int k) {
        const int unit = first_unit + unit_of_row(row);
        const bool inside = unit < H && k < H;
        return Math::to_operand(inside ? to_acc(direction.w_hh[(static_cast<int64_t>(gate) * H + unit) * H + k])
                                       : 0.0f);
      });

  // A warp that owns nothing has rows past the batch.
  ForwardLane<Cell, scalar_t, typename Math::Number> lane(
      layer, direction, warp.owner ? first_row + warp.split * kTileRows : sequence.batch, first_unit);
  const int unit = first_unit + TileLane().unit(0);
  const auto publish = [&]() {
    if (!warp.owner) return;
    const Pair<typename Math::Operand> h[2][1] = {{operand_pair<Math>(lane.operand(0))},
                                                  {operand_pair<Math>(lane.operand(1))}};
    exchange.publish(warp.split, unit, h);
  };

  if (steps.first < steps.last) {
    lane.begin(steps.first);
    publish();
    exchange.arrive();
    if (warp.owner) lane.advance(steps.first);
  }
  for (int index = steps.first; index < steps.last; ++index) {
    float hgates[kGates][4];
    product.multiply(exchange.wait(), hgates);
    __syncthreads();
    if (warp.owner) {
      product.sum(hgates);
      lane.step(index, hgates);
    }
    const bool last = index + 1 == steps.last;
    if (!last) {
      publish();
      exchange.arrive();
    }
    if (warp.owner) lane.advance(index + 1);
  }
  lane.finish();
}

// ------------------------------------------------------------------------------------------------ backward
// The exchanged vector is grad_hgates, a part for each gate.
template <class Cell, class scalar_t, class Math, class Exchange>
__global__ void __launch_bounds__(kSpreadMostWarps* kWarpLanes, 1)
    spread_backward_kernel(const __grid_constant__ BackwardLayerOnDevice<scalar_t> layer,
                           const __grid_constant__ SpreadShape shape,
                           const __grid_constant__ typename Exchange::Arguments exchange_arguments) {
  if constexpr (!Exchange::kAvailable) return;
  constexpr int kGates = Cell::kGates;
  const BackwardDirectionOnDevice<scalar_t>& direction = layer.direction[blockIdx.z];
  const DeviceSequence& sequence = layer.sequence;
  const Spread& spread = shape.spread;
  const int H = layer.hidden_size;
  const SpreadWarp warp(spread);
  const SpreadShared<Exchange> shared(device::dynamic_shared(), shape.sizes);
  const int first_unit = (static_cast<int>(blockIdx.x) * spread.unit_tiles + warp.unit_tile) * kTileUnits;
  const int first_row = static_cast<int>(blockIdx.y) * spread.row_tiles * kTileRows;
  const TeamSteps steps(sequence, direction.reverse, first_row, spread.row_tiles);

  Exchange exchange(exchange_arguments, shape, shared.vectors, shared.mbarriers);
  const SpreadProduct<Math, kGates, true> product(
      shape, warp, shared.w_hh, shared.partials, [&](int gate, int row, int k) {
        const int unit = first_unit + unit_of_row(row);
        const bool inside = unit < H && k < H;
        return Math::to_operand(inside ? to_acc(direction.w_hh[(static_cast<int64_t>(gate) * H + k) * H + unit])
                                       : 0.0f);
      });

  BackwardLane<Cell, scalar_t, typename Math::Number> lane(
      layer, direction, warp.owner ? first_row + warp.split * kTileRows : sequence.batch, first_unit);
  const int unit = first_unit + TileLane().unit(0);
  lane.begin(steps.last - 1);
  float grad_h[1][4] = {};
  for (int index = steps.last - 1; index >= steps.first; --index) {
    if (warp.owner) {
      lane.step(index, grad_h[0]);
      Pair<typename Math::Operand> grads[2][kGates];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int g = 0; g < kGates; ++g) grads[j][g] = operand_pair<Math>(lane.operand(g, j));
      }
      exchange.publish(warp.split, unit, grads);
    }
    exchange.arrive();
    if (warp.owner) lane.advance(index - 1);
    product.multiply(exchange.wait(), grad_h);
    __syncthreads();
    if (warp.owner) product.sum(grad_h);
  }
  lane.finish(steps.first, grad_h[0]);
}

// ------------------------------------------------------------------------------------------------ host
template <class Exchange>
bool is_possible(const Spread& spread, int64_t hidden_size) {
  return spread.unit_tiles > 0 && spread.row_tiles > 0 && spread.row_tiles <= spread.depth_splits &&
         spread.unit_tiles * spread.depth_splits <= kSpreadMostWarps &&
         hidden_size > (Exchange::kLeastBlocks - 1) * spread.unit_tiles * kTileUnits;
}

// Launches a kernel with the arguments that follow the layer, on blocks of so much shared memory.
template <class Exchange, class... Parameters, class... Arguments>
int launch_spread(void (*kernel)(Parameters...), int directions, const TeamSizes& sizes, size_t shared_bytes,
                  cudaStream_t stream, const Arguments&... arguments) {
  LaunchShape launch;
  launch.grid =
      dim3(static_cast<unsigned>(sizes.blocks), static_cast<unsigned>(sizes.teams), static_cast<unsigned>(directions));
  launch.block = dim3(static_cast<unsigned>(sizes.warps * kWarpLanes));
  launch.shared_bytes = shared_bytes;
  return Exchange::launch(kernel, launch, stream, arguments...);
}

// With the buffers of the exchange.
template <class Exchange, class Layer>
int launch_exchange(void (*kernel)(Layer, SpreadShape, typename Exchange::Arguments), const Layer& layer,
                    int directions, const SpreadShape& shape, cudaStream_t stream, Workspace& workspace) {
  const typename Exchange::Buffers buffers(directions, shape, workspace);
  RNNFAST_RETURN_IF_ERROR(buffers.prepare(stream));
  return launch_spread<Exchange>(kernel, directions, shape.sizes, SpreadShared<Exchange>(nullptr, shape.sizes).bytes,
                                 stream, layer, shape, buffers.arguments);
}

template <class scalar_t, class Math, class Exchange>
int spread_forward(const LayerForward& layer, const Context& context, Workspace& workspace) {
  if (!is_possible<Exchange>(layer.spread, layer.hidden_size)) return cudaErrorInvalidValue;
  ForwardLayerOnDevice<scalar_t> args = forward_on_device<scalar_t>(layer);
  RNNFAST_RETURN_IF_ERROR(device_sequence(layer.sequence, workspace.take<int64_t>(offsets_count(layer.sequence)),
                                          static_cast<cudaStream_t>(context.stream), args.sequence));
  return dispatch_persistent(layer.cell, [&](auto cell) {
    using Cell = typename decltype(cell)::type;
    const SpreadShape shape =
        spread_shape<Math>(layer.spread, layer.hidden_size, layer.sequence.batch, Cell::kGates, /*backward=*/false);
    return launch_exchange<Exchange>(spread_forward_kernel<Cell, scalar_t, Math, Exchange>, args, layer.directions,
                                     shape, static_cast<cudaStream_t>(context.stream), workspace);
  });
}

template <class Cell, class Math, class Exchange, class scalar_t>
int launch_backward(const LayerBackward& layer, const BackwardLayerOnDevice<scalar_t>& args, const Context& context,
                    Workspace& workspace) {
  using Scatter = typename Exchange::Scatter;
  constexpr int kGates = Cell::kGates;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  if constexpr (!std::is_void_v<Scatter> && scatters(kGates, sizeof(typename Math::Operand))) {
    const ScatterShape shape = scatter_shape<Math>(layer.spread, layer.hidden_size, layer.sequence.batch, kGates);
    const size_t shared_bytes = ScatterShared<typename Math::Operand>(nullptr, shape.sizes, Scatter::kShared).bytes;
    return launch_spread<Exchange>(scatter_backward_kernel<Cell, scalar_t, Math, Scatter>, layer.directions,
                                   shape.sizes, shared_bytes, stream, args, shape);
  } else {
    const SpreadShape shape =
        spread_shape<Math>(layer.spread, layer.hidden_size, layer.sequence.batch, kGates, /*backward=*/true);
    return launch_exchange<Exchange>(spread_backward_kernel<Cell, scalar_t, Math, Exchange>, args, layer.directions,
                                     shape, stream, workspace);
  }
}

template <class scalar_t, class Math, class Exchange>
int spread_backward(const LayerBackward& layer, const BackwardProducts (&products)[2], const DeviceSequence& sequence,
                    const Context& context, Workspace& workspace) {
  if (!is_possible<Exchange>(layer.spread, layer.hidden_size)) return cudaErrorInvalidValue;
  BackwardLayerOnDevice<scalar_t> args = backward_on_device<scalar_t>(layer, products);
  args.sequence = sequence;
  return dispatch_persistent(layer.cell, [&](auto cell) {
    return launch_backward<typename decltype(cell)::type, Math, Exchange>(layer, args, context, workspace);
  });
}

}  // namespace rnnfast::cuda
