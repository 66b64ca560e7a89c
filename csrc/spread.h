// Owns: how the engines that spread W_hh over thread blocks cut a layer, on which their kernels, their launchers and
// the plan agree. Must not know: CUDA headers, equations.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tiles.h"

namespace rnnfast::cuda {

// The cut. A team of blocks computes a group of batch rows, in one direction. Each block has some of the units, and
// unit_tiles x depth_splits warps, which divide its product: gathering, those of a unit tile its k; scattering, all of
// them the team's units.
struct Spread {
  int unit_tiles = 1;    // tiles of 16 hidden units of a block
  int row_tiles = 1;     // tiles of 8 batch rows of a team; at most depth_splits
  int depth_splits = 1;  // warps for each of a block's unit tiles
};

// What crosses blocks in a step backward, in an engine that can do both. Gathering, each block receives the gradients
// of all gates, and makes of them the gradients of its own units' h. Scattering, it makes of its own gates' gradients
// its part of the gradient of every h, and sends the sums, of float, to the blocks that add them up. That is chosen
// where the gates of a unit take more bytes than a sum.
RNNFAST_SIZES bool scatters(int gates, int operand_bytes) {
  return gates * operand_bytes > static_cast<int>(sizeof(float));
}

// What exchanging keeps in the shared memory of each block: copies of what the team exchanges, and mbarriers.
struct ExchangeShared {
  int copies, mbarriers;
};
constexpr ExchangeShared kClusterShared = {2, 2}, kGridShared = {1, 0};

// The blocks of a cluster, at most, of which more than 8 are not on every device that has clusters; and at least, for a
// block alone cannot store asynchronously.
constexpr int kMostClusterBlocks = 16, kClusterLeastBlocks = 2, kGridLeastBlocks = 1;

// 256 threads of 255 registers: more warps would leave less of the registers to W_hh.
constexpr int kSpreadMostWarps = 8;
// Tiles of k of each gate that a warp keeps in registers. Without tensor cores sums take four times the registers,
// float is read ahead in twice as many, and backward carries more from step to step.
RNNFAST_SIZES int spread_register_depth(int gates, int operand_bytes, bool backward, bool tensor_cores) {
  if (gates == 1) return tensor_cores ? 24 : 20;
  if (gates <= 3) return tensor_cores ? (backward ? 8 : 10) : backward ? 4 : 6;
  if (!tensor_cores) return 2;
  return (backward ? 6 : 8) - (operand_bytes == 4 ? 2 : 0);
}

constexpr int kSumsBytes = 16;  // of a lane, for a unit tile and a row tile: four

struct TeamSizes {
  int blocks;  // of a team
  int teams;   // of a direction
  int warps;   // of a block
  int units;   // of a team, those past H included

  RNNFAST_SIZES TeamSizes(const Spread& spread, int hidden_size, int64_t batch)
      : blocks(round_up(hidden_size, spread.unit_tiles * kTileUnits) / (spread.unit_tiles * kTileUnits)),
        teams(static_cast<int>((batch + spread.row_tiles * kTileRows - 1) / (spread.row_tiles * kTileRows))),
        warps(spread.unit_tiles * spread.depth_splits),
        units(blocks * spread.unit_tiles * kTileUnits) {}
};

// One loop over time, with gathering. A team exchanges for each batch row a vector of `parts` parts, each with an
// element for every unit: forward h, backward the gradients of each gate. Forward multiplies it by W_hh of each gate,
// and backward each part by the transpose of its gate's W_hh.
struct SpreadSizes : TeamSizes {
  int all_depth, depth;  // tiles of k of a part, and how many of them each warp has (the last may have fewer)
  int parts;             // of a vector
  int part, row_tile;    // elements of a part of 8 rows, and of all parts, in shared memory
  size_t vector_bytes;   // the vectors of a team
  size_t sent_bytes;     // of them, without the padding of k
  size_t weight_bytes;   // W_hh of a warp beside its registers
  size_t partial_bytes;  // the sums of all warps but the one that adds them up

  RNNFAST_SIZES SpreadSizes(const Spread& spread, int hidden_size, int64_t batch, int gates, bool backward,
                            int element_bytes, bool tensor_cores)
      : TeamSizes(spread, hidden_size, batch),
        all_depth(depth_of(units, element_bytes)),
        depth(round_up((all_depth + spread.depth_splits - 1) / spread.depth_splits, 2)),
        parts(backward ? gates : 1),
        part(operand_size(units, element_bytes)),
        row_tile(parts * part),
        vector_bytes(static_cast<size_t>(spread.row_tiles) * row_tile * element_bytes),
        sent_bytes(static_cast<size_t>(spread.row_tiles) * kTileRows * parts * units * element_bytes),
        weight_bytes(
            tile_shared_bytes(gates, depth, spread_register_depth(gates, element_bytes, backward, tensor_cores))),
        partial_bytes(static_cast<size_t>(spread.unit_tiles) * (spread.depth_splits - 1) * spread.row_tiles *
                      (backward ? 1 : gates) * kWarpLanes * kSumsBytes) {}

  // Shared memory of a block.
  RNNFAST_SIZES size_t shared_bytes(ExchangeShared exchange) const {
    return exchange.copies * vector_bytes + warps * weight_bytes + partial_bytes +
           exchange.mbarriers * sizeof(uint64_t);
  }
};

// Copies of the gradients of its own gates that a block keeps, scattering: warps may read one while the next is
// written.
constexpr int kScatterOperands = 2;
// The loop backward, with scattering. The product of a block has the gradients of its own units' gates for k, and makes
// sums for all unit tiles of the team. A warp has some of these, a group of them side by side.
RNNFAST_SIZES int scatter_group(bool tensor_cores) { return tensor_cores ? 4 : 2; }
// Tiles of k of a warp's first group that it keeps in registers.
RNNFAST_SIZES int scatter_register_depth(bool tensor_cores) { return tensor_cores ? 6 : 4; }

struct ScatterSizes : TeamSizes {
  int depth;              // tiles of k
  int tiles;              // unit tiles of the team that a warp has (the last may have fewer)
  int tile_sums;          // of a block for a tile of another and all rows: each a lane's four
  int block_sums;         // for all its tiles
  int operand;            // elements of 8 rows
  size_t operand_bytes;   // the gradients of the block's gates, of all rows
  size_t tile_bytes;      // W_hh of a tile behind the first group
  size_t weight_bytes;    // W_hh of a warp beside its registers
  size_t received_bytes;  // the sums of all blocks for this one

  RNNFAST_SIZES ScatterSizes(const Spread& spread, int hidden_size, int64_t batch, int gates, int element_bytes,
                             bool tensor_cores)
      : TeamSizes(spread, hidden_size, batch),
        depth(depth_of(gates * spread.unit_tiles * kTileUnits, element_bytes)),
        tiles((blocks * spread.unit_tiles + warps - 1) / warps),
        tile_sums(spread.row_tiles * kWarpLanes),
        block_sums(spread.unit_tiles * tile_sums),
        operand(operand_size(gates * spread.unit_tiles * kTileUnits, element_bytes)),
        operand_bytes(static_cast<size_t>(spread.row_tiles) * operand * element_bytes),
        tile_bytes(tile_shared_bytes(1, depth, 0)),
        weight_bytes(tile_shared_bytes(scatter_group(tensor_cores), depth, scatter_register_depth(tensor_cores)) +
                     (tiles > scatter_group(tensor_cores) ? tiles - scatter_group(tensor_cores) : 0) * tile_bytes),
        received_bytes(static_cast<size_t>(blocks) * block_sums * kSumsBytes) {}

  // Shared memory of a block.
  RNNFAST_SIZES size_t shared_bytes(ExchangeShared exchange) const {
    return kScatterOperands * operand_bytes + exchange.copies * received_bytes + warps * weight_bytes +
           exchange.mbarriers * sizeof(uint64_t);
  }

  // Of a tile's sums, among those of a block for all tiles of another.
  RNNFAST_SIZES int place(int unit_tile, int row_tile) const { return unit_tile * tile_sums + row_tile * kWarpLanes; }
};

}  // namespace rnnfast::cuda
