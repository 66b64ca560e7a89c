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
constexpr unsigned kAllLanes = 0xffffffffu;
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

// The operand of a product, k values of each of 8 batch rows, is packets of 16 bytes, [k / packet][8][packet]: what the
// rows have of a packet are a matrix of ldmatrix, 128 bytes in all banks, and a tile of 16 units is whole lines of
// memory.
RNNFAST_SIZES int packet_units(int operand_bytes) { return 16 / operand_bytes; }
RNNFAST_SIZES int operand_size(int k, int operand_bytes) {  // elements, those past k included
  return depth_of(k, operand_bytes) * tile_depth(operand_bytes) * kTileRows;
}
RNNFAST_SIZES int operand_place(int row, int k, int operand_bytes) {
  const int packet = packet_units(operand_bytes);
  return (k / packet * kTileRows + row) * packet + k % packet;
}

// Shared memory of one warp's tiles of W, of which register_depth tiles of k lie in registers.
RNNFAST_SIZES int tile_shared_bytes(int tiles, int depth, int register_depth) {
  return depth > register_depth ? (depth - register_depth) * tiles * kFragmentBytes : 0;
}

// ------------------------------------------------------------------------------------------------ persistent_cta
// One for each 16 hidden units.
RNNFAST_SIZES int warps_of(int hidden_size) { return round_up(hidden_size, kTileUnits) / kTileUnits; }

// The most warps of a block, and the tiles of k of each gate that a warp keeps in registers; what does not fit lies in
// shared memory. Registers are dealt to warps by fours: 255 a thread for 8 warps, 168 for 12, 128 for 16. Beside the
// weights they hold what a lane reads ahead, of which float takes twice as many, and sums, of which a gate without
// tensor cores takes four times as many; the backward of an LSTM reads the most ahead.
struct CtaShape {
  int most_warps, register_depth;
};
RNNFAST_SIZES CtaShape cta_shape(int gates, int operand_bytes, bool tensor_cores, bool wide, bool backward) {
  if (gates == 1) return tensor_cores ? CtaShape{16, 16} : CtaShape{12, 12};
  if (wide) return {12, 4};
  if (gates <= 3) return {8, tensor_cores ? 8 : 6};
  if (!tensor_cores) return {8, backward ? 2 : 4};
  return {8, operand_bytes == 4 ? 6 : 8};
}
// The wide shape serves the 16-bit types: of float, no more fits into shared memory.
RNNFAST_SIZES bool has_wide_cta_shape(int gates, int operand_bytes) { return gates > 1 && operand_bytes == 2; }
RNNFAST_SIZES bool fits_cta_shape(int64_t hidden_size, CtaShape shape) {
  return hidden_size <= static_cast<int64_t>(shape.most_warps) * kTileUnits;
}

// The operand of a block's product, twice, and the tiles of k that lie in shared memory.
RNNFAST_SIZES int cta_shared_bytes(int hidden_size, int gates, int operand_bytes, CtaShape shape, bool backward) {
  const int operand = 2 * (backward ? gates : 1) * operand_size(hidden_size, operand_bytes) * operand_bytes;
  const int depth = depth_of(hidden_size, operand_bytes);
  return operand + warps_of(hidden_size) * tile_shared_bytes(gates, depth, shape.register_depth);
}

}  // namespace rnnfast::cuda
