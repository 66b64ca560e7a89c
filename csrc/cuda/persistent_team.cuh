// Owns: a warp's and a team's part of a layer, in the engines that spread W_hh over thread blocks, and how parts of a
// sum come together. Must not know: what is summed up there, and how blocks exchange it.
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
      : first(sequence.steps), last(0) {
    for (int tile = 0; tile < row_tiles; ++tile) {
      const LaneRows rows(sequence, reverse, first_row + tile * kTileRows);
      if (rows.first() == rows.last()) continue;
      first = rows.first() < first ? rows.first() : first;
      last = rows.last() > last ? rows.last() : last;
    }
  }
};

// Adds kTogether parts of a lane's sums that lie `stride` apart in shared memory, in their order.
template <int kTogether, int kSums>
__device__ __forceinline__ void add_some(float (&sums)[kSums][4], const float4* parts, int stride) {
  float4 values[kTogether][kSums];
#pragma unroll
  for (int i = 0; i < kTogether; ++i) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) values[i][s] = parts[i * stride + s * kWarpLanes];
  }
#pragma unroll
  for (int i = 0; i < kTogether; ++i) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      sums[s][0] += values[i][s].x;
      sums[s][1] += values[i][s].y;
      sums[s][2] += values[i][s].z;
      sums[s][3] += values[i][s].w;
    }
  }
}

// Adds `count` of them. Where there is one sum, registers are left to have several loads under way at once; in a loop
// with one load the next waits until the last has been added.
template <int kSums>
__device__ __forceinline__ void add_parts(float (&sums)[kSums][4], const float4* parts, int count, int stride) {
  constexpr int kTogether = kSums == 1 ? 4 : 1;
#pragma unroll 1
  for (; count >= kTogether; count -= kTogether, parts += kTogether * stride) add_some<kTogether>(sums, parts, stride);
#pragma unroll 1
  for (; count > 0; --count, parts += stride) add_some<1>(sums, parts, stride);
}

}  // namespace rnnfast::cuda
