// Owns: the product of the persistent engines, by one warp: 16 rows of W for each of its tiles, times a state of 8
// batch rows. Where W and the state lie, and who computes what. Must not know: cells, engines, how a state comes to lie
// in shared memory.
//
//     sums[tile] += W[tile] h        W[tile] [16, K]   h [K, 8]   sums[tile] [16, 8]
//
// W is the A operand of the matrix instruction and h, batch rows as columns, the B operand. For a forward step the
// tiles are the gates of the same 16 hidden units, so that every lane receives all gates of its units.
//
// Lanes: lane 4q + c holds rows q and q + 8 of each tile and columns 2c and 2c + 1. Rows are dealt to units such that
// these are neighbours in memory:
//
//     row r is unit 2 (r % 8) + r / 8;   a lane's value[2 i + j] is unit 2q + i, batch row 2c + j
//
// W lies in registers as far as they reach (kRegisterDepth tiles of k) and from there on in shared memory, in the
// order in which lanes read it: 16 bytes a lane, without bank conflicts. h lies in shared memory in Math::Operand, as
// operand_place says, padded with zeros to whole pairs of k tiles.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "device_ptx.h"
#include "lane_number.cuh"
#include "storage.cuh"
#include "tiles.h"

namespace rnnfast::cuda {

// What one lane of a warp owns of a tile of 16 units and 8 batch rows.
struct TileLane {
  int lane = threadIdx.x % kWarpLanes;
  int quad = lane / 4, column = lane % 4;

  __device__ __forceinline__ int unit(int i) const { return 2 * quad + i; }
  __device__ __forceinline__ int row(int j) const { return 2 * column + j; }

  // Of the lane's units among those from first_unit on, and its first row, in an operand; the other row is a packet on.
  __device__ __forceinline__ int place(int first_unit, int operand_bytes) const {
    return device::opaque(operand_place(row(0), first_unit + unit(0), operand_bytes));
  }
};

__device__ __forceinline__ int unit_of_row(int row) { return 2 * (row % 8) + row / 8; }

// ------------------------------------------------------------------------------------------------ arithmetic
// The arithmetics of the product. Operand is what is multiplied, kDepth the k of a tile, Fragment a lane's part of h
// for two tiles of k, which load reads from h + offset(). pack makes a lane's part of W from element(row, k);
// multiply adds the product with one tile of k; finish gives the lane its four sums.

// 16-bit tensor cores.
template <class scalar_t>
struct TensorCore {
  using Operand = scalar_t;
  using Number = LaneNumber<FastFunctions>;
  static constexpr int kDepth = 16;
  struct Sums {
    float value[4] = {};
  };
  using Fragment = uint32_t[4];

  static __device__ __forceinline__ Operand to_operand(float x) {
    Operand result;
    from_acc(x, result);
    return result;
  }
  template <class Element>
  static __device__ __forceinline__ void pack(const Element& element, uint32_t (&a)[4]) {
    const TileLane lane;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane.quad + i % 2 * 8, k = lane.column * 2 + i / 2 * 8;
      const Operand pair[2] = {element(row, k), element(row, k + 1)};
      memcpy(&a[i], pair, sizeof pair);
    }
  }
  // Lane l addresses packet l: of ldmatrix, row l % 8 of matrix l / 8.
  static __device__ __forceinline__ int offset() { return threadIdx.x % kWarpLanes * packet_units(sizeof(Operand)); }
  static __device__ __forceinline__ void load(const Operand* h, Fragment& fragment) {
    device::ldmatrix_x4(fragment, h);
  }
  static __device__ __forceinline__ void multiply(Sums& sums, const uint32_t (&a)[4], const Fragment& h, int tile) {
    const uint32_t b[2] = {h[2 * tile], h[2 * tile + 1]};
    device::mma_m16n8k16<std::is_same_v<scalar_t, __nv_bfloat16>>(sums.value, a, b, sums.value);
  }
  static __device__ __forceinline__ void finish(const Sums& sums, float (&value)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = sums.value[i];
  }
};

// float rounded to TF32, on tensor cores.
struct TensorCoreTf32 {
  using Operand = float;
  using Number = LaneNumber<FastFunctions>;
  static constexpr int kDepth = 8;
  struct Sums {
    float value[4] = {};
  };
  using Fragment = uint32_t[4];

  static __device__ __forceinline__ Operand to_operand(float x) { return device::round_to_tf32(x); }
  template <class Element>
  static __device__ __forceinline__ void pack(const Element& element, uint32_t (&a)[4]) {
    const TileLane lane;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Operand value = element(lane.quad + i % 2 * 8, lane.column + i / 2 * 4);
      memcpy(&a[i], &value, sizeof value);
    }
  }
  // ldmatrix moves 32-bit words as well: a row of 16 bytes is four of them, one for each lane of a quad.
  static __device__ __forceinline__ int offset() { return threadIdx.x % kWarpLanes * packet_units(sizeof(Operand)); }
  static __device__ __forceinline__ void load(const Operand* h, Fragment& fragment) {
    device::ldmatrix_x4(fragment, h);
  }
  static __device__ __forceinline__ void multiply(Sums& sums, const uint32_t (&a)[4], const Fragment& h, int tile) {
    const uint32_t b[2] = {h[2 * tile], h[2 * tile + 1]};
    device::mma_m16n8k8_tf32(sums.value, a, b, sums.value);
  }
  static __device__ __forceinline__ void finish(const Sums& sums, float (&value)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = sums.value[i];
  }
};

// float without tensor cores. The lanes of a quad share rows q and q + 8 and divide k: each sums all 8 columns over its
// own two k of a tile, and finish adds up the quad and leaves each lane its two columns. What lanes 0 and 1 read of a
// column lies 128 bytes before what 2 and 3 do, in the same banks: those take each pair of columns in the other order.
struct ScalarFloat {
  using Operand = float;
  using Number = LaneNumber<ExactFunctions>;
  static constexpr int kDepth = 8;
  struct Sums {
    float value[2][8] = {};  // [row][n], n ^ (c / 2) the column
  };
  struct Fragment {
    float value[2][8][2];  // [tile of k][n][k], n ^ (c / 2) the column
  };

  static __device__ __forceinline__ Operand to_operand(float x) { return x; }
  template <class Element>
  static __device__ __forceinline__ void pack(const Element& element, uint32_t (&a)[4]) {
    const TileLane lane;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Operand value = element(lane.quad + i / 2 * 8, lane.column * 2 + i % 2);
      memcpy(&a[i], &value, sizeof value);
    }
  }
  static __device__ __forceinline__ int offset() { return operand_place(0, TileLane().column * 2, sizeof(Operand)); }
  static __device__ __forceinline__ void load(const Operand* h, Fragment& fragment) {
    const int swap = TileLane().column / 2 * packet_units(sizeof(Operand));
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int n = 0; n < kTileRows; ++n) {
        const int place = operand_place(n, tile * kDepth, sizeof(Operand));
        rnnfast::cuda::load(h + place + (n % 2 == 0 ? swap : -swap), fragment.value[tile][n]);
      }
    }
  }
  static __device__ __forceinline__ void multiply(Sums& sums, const uint32_t (&a)[4], const Fragment& h, int tile) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float weight;
        memcpy(&weight, &a[2 * i + k], sizeof weight);
#pragma unroll
        for (int n = 0; n < 8; ++n) sums.value[i][n] += weight * h.value[tile][n][k];
      }
    }
  }
  // Twice, a lane keeps the half of its columns that holds its own and exchanges the other: columns 4 (c / 2) + 0..3
  // with lane c ^ 2, then 2c and 2c + 1 with lane c ^ 1.
  static __device__ __forceinline__ void finish(const Sums& sums, float (&value)[4]) {
    const TileLane lane;
    const bool upper = lane.column & 2, odd = lane.column & 1;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float(&sum)[8] = sums.value[i];
      float half[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float theirs = upper ? sum[n ^ 1] : sum[n + 4];
        half[n] = (upper ? sum[(n ^ 1) + 4] : sum[n]) + __shfl_xor_sync(kAllLanes, theirs, 2);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        value[2 * i + j] = (odd ? half[j + 2] : half[j]) + __shfl_xor_sync(kAllLanes, odd ? half[j] : half[j + 2], 1);
      }
    }
  }
};

template <class Math>
constexpr bool kOnTensorCores = !std::is_same_v<Math, ScalarFloat>;

// ------------------------------------------------------------------------------------------------ the operand
// By the whole block: zero, so that the padding of k multiplies by zero.
template <class Operand>
__device__ __forceinline__ void clear(Operand* values, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) from_acc(0.0f, values[i]);
}

// A lane's units of one batch row, as the product's operand.
template <class Math, class scalar_t>
__device__ __forceinline__ Pair<typename Math::Operand> operand_pair(const Pair<scalar_t>& pair) {
  if constexpr (sizeof(scalar_t) == 2) {
    return pair;
  } else {
    float value[2];
    pair.unpack(value);
    const float operand[2] = {Math::to_operand(value[0]), Math::to_operand(value[1])};
    return Pair<float>(operand);
  }
}

// ------------------------------------------------------------------------------------------------ the tile
// A warp's part of W: kTiles tiles of 16 rows, `depth` tiles of k each (an even number), of which the first
// kRegisterDepth lie in registers; of the others kRounds pairs are under way at once, where registers are left for
// that.
template <class Math, int kTiles_, int kRegisterDepth, int kRounds = 2>
class WeightTile {
 public:
  static constexpr int kTiles = kTiles_;
  static_assert(kRegisterDepth % 2 == 0, "k is walked in pairs of tiles");
  using Operand = typename Math::Operand;
  using Sums = typename Math::Sums;

  // element(tile, row, k) is W, 0 outside of it; `shared` is the warp's own, of tile_shared_bytes. No barrier follows:
  // a lane reads back what it wrote itself.
  template <class Element>
  __device__ __forceinline__ void load(const Element& element, int depth, uint4* shared) {
    attach(depth, shared);
#pragma unroll
    for (int k = 0; k < kRegisterDepth; ++k) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (k < depth) pack(element, tile, k, registers_[k][tile]);
      }
    }
    // Compiled for sm_80, the largest kernels have no registers left for more than two at a time.
    for (int k = kRegisterDepth; k < depth; ++k) {
#pragma unroll(device::kHasClusters ? kTiles : 2)
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t a[4];
        pack(element, tile, k, a);
        *shared_fragment(tile, k) = make_uint4(a[0], a[1], a[2], a[3]);
      }
    }
  }

  // What another loaded before, all of it into `shared`.
  __device__ __forceinline__ void attach(int depth, uint4* shared) {
    depth_ = depth;
    offset_ = device::opaque(Math::offset());
    shared_ = shared + threadIdx.x % kWarpLanes;
  }

  // sums[tile] += W[tile] h
  __device__ __forceinline__ void multiply(Sums (&sums)[kTiles], const Operand* h) const {
    walk<true>(sums, h + offset_, 0);
  }
  // sums[tile % kSums] += W[tile] h[tile], where the tiles' h lie `next` elements apart. Several sums, to be added up,
  // keep more products under way.
  template <int kSums>
  __device__ __forceinline__ void multiply_each(Sums (&sums)[kSums], const Operand* h, int next) const {
    walk<false>(sums, h + offset_, next);
  }

 private:
  static constexpr int kTile = Math::kDepth * kTileRows;  // elements of h in a tile of k

  template <class Element>
  static __device__ __forceinline__ void pack(const Element& element, int tile, int k, uint32_t (&a)[4]) {
    Math::pack([&](int row, int inner) { return element(tile, row, k * Math::kDepth + inner); }, a);
  }
  __device__ __forceinline__ uint4* shared_fragment(int tile, int k) const {
    return shared_ + ((k - kRegisterDepth) * kTiles + tile) * kWarpLanes;
  }

  template <bool kOneOperand, int kSums>
  __device__ __forceinline__ void walk(Sums (&sums)[kSums], const Operand* h, int next) const {
    walk_registers<kOneOperand, kRegisterDepth>(sums, h, next);
    // With an operand for each tile there are products enough in one round, and no registers for two.
#pragma unroll(kOneOperand ? kRounds : 1)
    for (int k = kRegisterDepth; k < depth_; k += 2) {
      typename Math::Fragment fragment;
      if (kOneOperand) Math::load(h + k * kTile, fragment);
      // With one sum for all tiles, one operand at a time: together they would fill the registers.
#pragma unroll(kSums == 1 ? 1 : kTiles)
      for (int tile = 0; tile < kTiles; ++tile) {
        if (!kOneOperand) Math::load(h + tile * next + k * kTile, fragment);
#pragma unroll
        for (int inner = 0; inner < 2; ++inner) {
          const uint4 packed = *shared_fragment(tile, k + inner);
          const uint32_t a[4] = {packed.x, packed.y, packed.z, packed.w};
          Math::multiply(sums[tile % kSums], a, fragment, inner);
        }
      }
    }
  }

  // As much of kDepth tiles of k as there is. One question, and then no branch, behind which the compiler would have
  // all products finished before it begins the next.
  template <bool kOneOperand, int kDepth, int kSums>
  __device__ __forceinline__ void walk_registers(Sums (&sums)[kSums], const Operand* h, int next) const {
    if constexpr (kDepth > 0) {
      if (depth_ < kDepth) return walk_registers<kOneOperand, kDepth - 2>(sums, h, next);
#pragma unroll
      for (int k = 0; k < kDepth; k += 2) {
        typename Math::Fragment fragment;
        if (kOneOperand) Math::load(h + k * kTile, fragment);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          if (!kOneOperand) Math::load(h + tile * next + k * kTile, fragment);
          Math::multiply(sums[tile % kSums], registers_[k][tile], fragment, 0);
          Math::multiply(sums[tile % kSums], registers_[k + 1][tile], fragment, 1);
        }
      }
    }
  }

  uint32_t registers_[kRegisterDepth == 0 ? 1 : kRegisterDepth][kTiles][4];
  uint4* shared_ = nullptr;
  int depth_ = 0, offset_ = 0;
};

}  // namespace rnnfast::cuda
