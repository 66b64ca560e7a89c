// Owns: the recurrence backward with W_hh spread over thread blocks, in which each block sends the others its part of
// their gradients of h. One launch runs all steps in both directions. Must not know: equations (csrc/cell has them),
// tensors, how sums go from block to block (a Scatter does).
//
// Teams, blocks and owners are those of persistent_spread.cuh. A step, from the last to the first:
//
//     grad_igates, grad_hgates, grad_h, grad_c = cell's backward     the owner of a tile of 16 units x 8 batch rows
//     parts of grad_h = W_hh[the block's gates]^T grad_hgates        a warp: some unit tiles of the team, all k
//     grad_h = sum over blocks of their parts                        the owner, in the blocks' order
//
// W_hh is read by rows, as forward reads it: the product has the block's own gates for k, and is there before anything
// comes from afar. What crosses is a float for each unit, in the order of the lanes that made it and will read it.
//
// Registers:     W_hh as far as they reach, the owners' gradients of states, what the next step reads.
// Shared memory: the rest of W_hh; grad_hgates of the block, twice; what the scatter receives.
// Scatter:       push_if(wanted, rank, place, sums) sends, and arrive() ends sending; collect(place, sums) waits for
//                what all blocks sent before, and adds it up. A barrier of the block stands between collecting and
//                the next sending.
// Synchronises:  a step has one block barrier between the owners' gradients and the products that read them; owners
//                wait for the sums of all blocks. A warp may still multiply while the owners write the gradients of the
//                next step, into the other copy; it has finished before the next barrier.
#pragma once

#include "persistent_spread.h"
#include "persistent_team.cuh"
#include "recurrent_lane.cuh"

namespace rnnfast::cuda {

template <class Operand>
struct ScatterShared {
  Operand* grad_hgates;  // [kScatterOperands, row_tiles, operand of 8 rows]
  uint4* w_hh;           // [warps, what does not fit into registers]
  float4* received;      // [copies, blocks, unit_tiles, row_tiles, lanes]: each a lane's four
  uint64_t* mbarriers;
  size_t bytes;

  __host__ __device__ ScatterShared(char* base, const ScatterSizes& sizes, ExchangeShared exchange) {
    device::SharedLayout layout(base);
    grad_hgates = layout.take<Operand>(kScatterOperands * sizes.operand_bytes / sizeof(Operand));
    w_hh = layout.take<uint4>(sizes.warps * sizes.weight_bytes / sizeof(uint4));
    received = layout.take<float4>(exchange.copies * sizes.received_bytes / sizeof(float4));
    mbarriers = layout.take<uint64_t>(exchange.mbarriers);
    bytes = layout.bytes();
  }
};

// One of the team's unit tiles, counted from the first of this block on, so that no block receives from all others at
// once. In one word, for few registers are left: above kPlace the rank of the block that has it, below where a block's
// sums for it begin among those for all tiles of that block (ScatterSizes::place).
class TeamTile {
 public:
  __device__ __forceinline__ TeamTile(const ScatterShape& shape, int number) {
    const int distance = number / shape.spread.unit_tiles, unit_tile = number - distance * shape.spread.unit_tiles;
    const int rank = static_cast<int>(blockIdx.x) + distance;
    word_ = (rank < shape.sizes.blocks ? rank : rank - shape.sizes.blocks) * kPlace + shape.sizes.place(unit_tile, 0);
  }
  __device__ __forceinline__ void next(const ScatterShape& shape) {
    const unsigned neighbour = word_ + shape.sizes.tile_sums, first_of_next_block = (word_ | (kPlace - 1)) + 1;
    const bool past_block = neighbour % kPlace == static_cast<unsigned>(shape.sizes.block_sums);
    const unsigned following = past_block ? first_of_next_block : neighbour;
    word_ = following == static_cast<unsigned>(shape.sizes.blocks) * kPlace ? 0 : following;
  }

  // A copy whose successors the compiler cannot compute beforehand: it would keep them in registers all the time.
  __device__ __forceinline__ TeamTile opaque() const {
    TeamTile tile = *this;
    tile.word_ = device::opaque(word_);
    return tile;
  }

  __device__ __forceinline__ int rank() const { return word_ / kPlace; }
  __device__ __forceinline__ int place() const { return word_ % kPlace; }

  __device__ __forceinline__ int first_unit(const ScatterShape& shape) const {
    return (rank() * shape.spread.unit_tiles + place() / shape.sizes.tile_sums) * kTileUnits;
  }

 private:
  static constexpr unsigned kPlace = 1 << 16;
  static_assert(kSpreadMostWarps * kSpreadMostWarps * kWarpLanes < kPlace, "more than all sums of a block");
  unsigned word_;
};

// ------------------------------------------------------------------------------------------------ the product
// The warp's unit tiles of the product of the block's gates with their rows of W_hh.
template <class Math>
class ScatterProduct {
 public:
  using Operand = typename Math::Operand;
  using Sums = typename Math::Sums;

  // element(unit, k) is W_hh, where k counts the block's gates in their order; 0 outside of it.
  template <class Element>
  __device__ __forceinline__ ScatterProduct(const ScatterShape& shape, uint4* w_hh, const Element& element)
      : shape_(shape), first_(shape, warp() * shape.sizes.tiles) {
    further_ = w_hh + warp() * (shape.sizes.weight_bytes / sizeof(uint4));
    TeamTile tile = first_;
    const auto load = [&](auto& weights, int tiles, uint4* shared) {
      int first_unit[kGroup];
#pragma unroll
      for (int t = 0; t < kGroup; ++t) {
        first_unit[t] = t < tiles ? tile.first_unit(shape) : kOutside;
        tile.next(shape);
      }
      const auto of_tile = [&](int t, int row, int k) { return element(first_unit[t] + unit_of_row(row), k); };
      weights.load(of_tile, shape.sizes.depth, shared);
    };
    const int further = shape.sizes.tiles > kGroup ? shape.sizes.tiles - kGroup : 0;
    load(in_registers_, count(), of_further_tile(further));
    for_each_further_group([&](auto& weights, int begin, uint4* shared) { load(weights, count() - begin, shared); });
  }

  // Calls deliver(wanted, row tile, unit tile of the team, a lane's sums) for each, and where the first group is not
  // full for some that are not wanted.
  template <class Deliver>
  __device__ __forceinline__ void multiply(const Operand* operand, const Deliver& deliver) const {
    const int count = this->count();
    if (count <= 0) return;
    for (int row_tile = 0; row_tile < shape_.spread.row_tiles; ++row_tile, operand += shape_.sizes.operand) {
      TeamTile tile = first_.opaque();
      const auto make = [&](const auto& weights, const auto& wanted) {
        constexpr int kTiles = std::decay_t<decltype(weights)>::kTiles;
        Sums sums[kTiles];
        weights.multiply(sums, operand);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          float mine[4];
          Math::finish(sums[t], mine);
          deliver(wanted(t), row_tile, tile, mine);
          tile.next(shape_);
        }
      };
      make(in_registers_, [&](int t) { return t < count; });
      for_each_further_group([&](auto& weights, int, uint4* shared) {
        weights.attach(shape_.sizes.depth, shared);
        make(weights, [](int) { return true; });  // a group of its size
      });
    }
  }

 private:
  static constexpr int kGroup = scatter_group(kOnTensorCores<Math>);
  static constexpr int kDepth = scatter_register_depth(kOnTensorCores<Math>);
  static constexpr int kOutside = 1 << 30;  // more units than there can be

  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kWarpLanes; }
  // How many tiles the warp has; below 1: none.
  __device__ __forceinline__ int count() const {
    const int left = shape_.sizes.blocks * shape_.spread.unit_tiles - warp() * shape_.sizes.tiles;
    return left < shape_.sizes.tiles ? left : shape_.sizes.tiles;
  }
  __device__ __forceinline__ uint4* of_further_tile(int tile) const {
    return further_ + tile * (shape_.sizes.tile_bytes / sizeof(uint4));
  }
  // Calls function(weights, first tile, where they lie) for the groups behind the first. The last may be smaller.
  template <class Function>
  __device__ __forceinline__ void for_each_further_group(const Function& function) const {
    for (int begin = kGroup; begin < count(); begin += kGroup) {
      with_group<kGroup>(count() - begin,
                         [&](auto& weights) { function(weights, begin, of_further_tile(begin - kGroup)); });
    }
  }
  template <int kTiles, class Function>
  static __device__ __forceinline__ void with_group(int left, const Function& function) {
    if constexpr (kTiles > 1) {
      if (left < kTiles) return with_group<kTiles - 1>(left, function);
    }
    WeightTile<Math, kTiles, 0, /*kRounds=*/1> weights;
    function(weights);
  }

  const ScatterShape& shape_;
  const TeamTile first_;
  uint4* further_;  // the warp's tiles behind the first group, and beyond them what of that registers do not hold
  WeightTile<Math, kGroup, kDepth, /*kRounds=*/1> in_registers_;
};

// ------------------------------------------------------------------------------------------------ the kernel
template <class Cell, class scalar_t, class Math, class Scatter>
__global__ void __launch_bounds__(kSpreadMostWarps* kWarpLanes, 1)
    scatter_backward_kernel(const __grid_constant__ BackwardLayerOnDevice<scalar_t> layer,
                            const __grid_constant__ ScatterShape shape) {
  if constexpr (!Scatter::kAvailable) return;
  constexpr int kGates = Cell::kGates;
  using Operand = typename Math::Operand;
  const BackwardDirectionOnDevice<scalar_t>& direction = layer.direction[blockIdx.z];
  const DeviceSequence& sequence = layer.sequence;
  const Spread& spread = shape.spread;
  const int H = layer.hidden_size;
  const SpreadWarp warp(spread);
  const ScatterShared<Operand> shared(device::dynamic_shared(), shape.sizes, Scatter::kShared);
  const int block_units = spread.unit_tiles * kTileUnits;
  const int first_of_block = static_cast<int>(blockIdx.x) * block_units;
  const int first_row = static_cast<int>(blockIdx.y) * spread.row_tiles * kTileRows;
  const TeamSteps steps(sequence, direction.reverse, first_row, spread.row_tiles);

  // Once: the padding stays zero.
  clear(shared.grad_hgates, kScatterOperands * spread.row_tiles * shape.sizes.operand);
  Scatter scatter(shape, shared.received, shared.mbarriers);  // a barrier, too
  const ScatterProduct<Math> product(shape, shared.w_hh, [&](int unit, int k) {
    int gate = 0;
#pragma unroll
    for (int g = 1; g < kGates; ++g) gate += k >= g * block_units;
    const int own = k - gate * block_units;
    const bool inside = unit < H && own < block_units && first_of_block + own < H;
    const int64_t row = static_cast<int64_t>(gate) * H + first_of_block + own;
    return Math::to_operand(inside ? to_acc(direction.w_hh[row * H + unit]) : 0.0f);
  });

  // A warp that owns nothing has rows past the batch.
  BackwardLane<Cell, scalar_t, typename Math::Number> lane(
      layer, direction, warp.owner ? first_row + warp.split * kTileRows : sequence.batch,
      first_of_block + warp.unit_tile * kTileUnits);
  const int place = warp.split * shape.sizes.operand + TileLane().place(warp.unit_tile * kTileUnits, sizeof(Operand));
  const int next_gate = operand_place(0, block_units, sizeof(Operand));
  lane.begin(steps.last - 1);
  float grad_h[4] = {};
  for (int index = steps.last - 1; index >= steps.first; --index) {
    Operand* grads = shared.grad_hgates + index % kScatterOperands * spread.row_tiles * shape.sizes.operand;
    if (warp.owner) {
      lane.step(index, grad_h);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          operand_pair<Math>(lane.operand(g, j))
              .store(grads + place + j * packet_units(sizeof(Operand)) + g * next_gate);
        }
      }
    }
    __syncthreads();
    product.multiply(grads, [&](bool wanted, int row_tile, const TeamTile& tile, const float(&sums)[4]) {
      scatter.push_if(wanted, tile.rank(), tile.place() + shape.sizes.place(0, row_tile), sums);
    });
    scatter.arrive();
    if (warp.owner) {
      lane.advance(index - 1);
      scatter.collect(shape.sizes.place(warp.unit_tile, warp.split), grad_h);
    }
  }
  lane.finish(steps.first, grad_h);
}

}  // namespace rnnfast::cuda
