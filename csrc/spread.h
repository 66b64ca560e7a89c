// Owns: how the engines that spread W_hh over thread blocks cut a layer, on which their kernels, their launchers and
// the plan agree. Must not know: CUDA headers, equations.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tiles.h"

namespace rnnfast::cuda {

// The cut. A team of blocks computes a group of batch rows, in one direction. Each block has some of the units, and its
// warps divide the k of their product.
struct Spread {
  int unit_tiles = 1;    // tiles of 16 hidden units of a block
  int row_tiles = 1;     // tiles of 8 batch rows of a team; at most depth_splits
  int depth_splits = 1;  // warps that share a unit tile's product
};

// 256 threads of 255 registers: more warps would leave less of the registers to W_hh.
constexpr int kSpreadMostWarps = 8;
// Tiles of k that a warp with so many row tiles of W_hh keeps in registers. Without tensor cores sums take four times
// the registers.
RNNFAST_SIZES int spread_register_depth(int tiles, bool tensor_cores) {
  if (tiles == 1) return tensor_cores ? 24 : 20;
  if (tiles <= 3) return tensor_cores ? 10 : 6;
  return tensor_cores ? 8 : 2;
}

// One loop over time. The team exchanges `slices` numbers for each unit and batch row (1 forward: h; the number of
// gates backward: their gradients), and multiplies them by `tiles` matrices with a row for each unit (the number of
// gates forward, 1 backward).
struct SpreadSizes {
  int blocks;            // of a team
  int teams;             // of a direction
  int warps;             // of a block
  int columns;           // exchanged numbers of a batch row
  int stride;            // of a batch row of them, in elements
  int all_depth, depth;  // tiles of k, and how many of them each warp has (the last may have fewer)
  size_t operand_bytes;  // the exchanged numbers of a team
  size_t weight_bytes;   // W_hh of a warp beside its registers
  size_t partial_bytes;  // the sums of all warps

  RNNFAST_SIZES SpreadSizes(const Spread& spread, int hidden_size, int64_t batch, int slices, int tiles,
                            int element_bytes, bool tensor_cores)
      : blocks(round_up(hidden_size, spread.unit_tiles * kTileUnits) / (spread.unit_tiles * kTileUnits)),
        teams(static_cast<int>((batch + spread.row_tiles * kTileRows - 1) / (spread.row_tiles * kTileRows))),
        warps(spread.unit_tiles * spread.depth_splits),
        columns(blocks * spread.unit_tiles * kTileUnits * slices),
        stride(operand_stride(columns, element_bytes)),
        all_depth(depth_of(columns, element_bytes)),
        depth(round_up((all_depth + spread.depth_splits - 1) / spread.depth_splits, 2)),
        operand_bytes(static_cast<size_t>(spread.row_tiles) * kTileRows * stride * element_bytes),
        weight_bytes(tile_shared_bytes(tiles, depth, spread_register_depth(tiles, tensor_cores))),
        partial_bytes(static_cast<size_t>(warps) * spread.row_tiles * tiles * kWarpLanes * 16) {}

  // Shared memory of a block whose exchange keeps so many copies of the exchanged numbers there.
  RNNFAST_SIZES size_t shared_bytes(int copies) const {
    return copies * operand_bytes + warps * weight_bytes + partial_bytes;
  }
};

}  // namespace rnnfast::cuda
