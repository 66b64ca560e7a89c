// Owns: a warp's and a team's part of a layer, in the engines that spread W_hh over thread blocks. Must not know: what
// is computed there, and how blocks exchange it.
#pragma once

#include "device_sequence.cuh"
#include "recurrent_lane.cuh"
#include "spread.h"

namespace rnnfast::cuda {

// The warp's place in its block.
struct SpreadWarp {
  int unit_tile, split;
  bool owner;  // of row tile `split`

  __device__ __forceinline__ explicit SpreadWarp(const Spread& spread)
      : unit_tile(threadIdx.x / kWarpLanes % spread.unit_tiles),
        split(threadIdx.x / kWarpLanes / spread.unit_tiles),
        owner(split < spread.row_tiles) {}
};

// The steps at which a row of the team lives; the same in all its blocks.
struct TeamSteps {
  int first, last;

  __device__ __forceinline__ TeamSteps(const DeviceSequence& sequence, bool reverse, int first_row, int row_tiles)
      : first(static_cast<int>(sequence.steps)), last(0) {
    for (int tile = 0; tile < row_tiles; ++tile) {
      const LaneRows rows(sequence, reverse, first_row + tile * kTileRows);
      if (rows.first() == rows.last()) continue;
      first = rows.first() < first ? rows.first() : first;
      last = rows.last() > last ? rows.last() : last;
    }
  }
};

}  // namespace rnnfast::cuda
