// Owns: the sizes of a warp's tile (cuda/recurrent_tile.cuh) and of what it reads, on which the persistent kernels and
// the plan agree. Must not know: CUDA headers, equations.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define RNNFAST_SIZES __host__ __device__ constexpr
#else
#define RNNFAST_SIZES constexpr
#endif

namespace rnnfast::cuda {

constexpr int kWarpLanes = 32;
constexpr int kTileUnits = 16;       // rows of the matrix instruction: hidden units of a warp
constexpr int kTileRows = 8;         // columns of the matrix instruction: rows of the batch
constexpr int kFragmentBytes = 512;  // W of 16 rows and one tile of k, in any arithmetic

RNNFAST_SIZES int round_up(int value, int step) { return (value + step - 1) / step * step; }

// k in one tile: 32 bytes of the operand.
RNNFAST_SIZES int tile_depth(int operand_bytes) { return 32 / operand_bytes; }

// Tiles of k, in whole pairs.
RNNFAST_SIZES int depth_of(int k, int operand_bytes) {
  return round_up(k, 2 * tile_depth(operand_bytes)) / tile_depth(operand_bytes);
}

// Elements from a batch row of the operand to the next: an odd multiple of 16 bytes, so that eight rows of 16 bytes lie
// in different banks.
RNNFAST_SIZES int operand_stride(int k, int operand_bytes) {
  return round_up(k, 2 * tile_depth(operand_bytes)) + 16 / operand_bytes;
}

// Shared memory of one warp's tiles of W, of which register_depth tiles of k lie in registers.
RNNFAST_SIZES int tile_shared_bytes(int tiles, int depth, int register_depth) {
  return depth > register_depth ? (depth - register_depth) * tiles * kFragmentBytes : 0;
}

// ------------------------------------------------------------------------------------------------ persistent_cta
// A block's warps, one for each 16 hidden units, and the tiles of k of each gate that a warp keeps in registers; what
// does not fit lies in shared memory. Registers are dealt to warps by fours: 255 a thread for 8 warps, 168 for 12, 128
// for 16. Without tensor cores the sums of a gate take four times the registers.
struct CtaShape {
  int most_warps, register_depth;
};
RNNFAST_SIZES CtaShape cta_shape(int gates, bool tensor_cores, bool wide) {
  if (gates == 1) return {16, tensor_cores ? 16 : 8};
  if (wide) return {12, gates <= 3 ? 6 : 4};
  return {8, tensor_cores ? 8 : gates <= 3 ? 6 : 4};
}
// The wide shape serves the 16-bit types: of float, no more fits into shared memory.
RNNFAST_SIZES bool has_wide_cta_shape(int gates, int operand_bytes) { return gates > 1 && operand_bytes == 2; }
RNNFAST_SIZES bool fits_cta_shape(int64_t hidden_size, CtaShape shape) {
  return hidden_size <= static_cast<int64_t>(shape.most_warps) * kTileUnits;
}

}  // namespace rnnfast::cuda
