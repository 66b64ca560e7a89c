// Owns: how numbers lie in memory and how they are computed with: the storage types, their accumulation types, and
// vector loads and stores that convert between the two.
// Must not know: cells, layers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "device_ptx.h"

namespace rnnfast::cuda {

// Arithmetic is float for the 16-bit types, and the storage type itself otherwise.
template <class scalar_t>
using acc_type = std::conditional_t<sizeof(scalar_t) == 2, float, scalar_t>;

__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }

__device__ __forceinline__ void from_acc(float x, __half& out) { out = __float2half_rn(x); }
__device__ __forceinline__ void from_acc(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void from_acc(float x, float& out) { out = x; }
__device__ __forceinline__ void from_acc(double x, double& out) { out = x; }

// x as it will be read back.
template <class scalar_t>
__device__ __forceinline__ acc_type<scalar_t> rounded(acc_type<scalar_t> x) {
  scalar_t stored;
  from_acc(x, stored);
  return to_acc(stored);
}

// What one load or store instruction moves; 2, 4, 8 or 16 bytes.
template <class scalar_t, int kWidth>
struct alignas(sizeof(scalar_t) * kWidth) Packet {
  scalar_t value[kWidth];
};

// Units a thread handles: four where rows are aligned for it, else one. double gains nothing from more than one.
template <class scalar_t>
constexpr int kVectorWidth = sizeof(scalar_t) == 8 ? 1 : 4;

template <int kWidth, class scalar_t>
__device__ __forceinline__ void load(const scalar_t* from, acc_type<scalar_t> (&to)[kWidth]) {
  const Packet<scalar_t, kWidth> packet = *reinterpret_cast<const Packet<scalar_t, kWidth>*>(from);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) to[k] = to_acc(packet.value[k]);
}

template <int kWidth, class scalar_t>
__device__ __forceinline__ void store(const acc_type<scalar_t> (&from)[kWidth], scalar_t* to) {
  Packet<scalar_t, kWidth> packet;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) from_acc(from[k], packet.value[k]);
  *reinterpret_cast<Packet<scalar_t, kWidth>*>(to) = packet;
}

template <int kWidth, class scalar_t>
__device__ __forceinline__ void store_zero(scalar_t* to) {
  const acc_type<scalar_t> zero[kWidth] = {};
  store<kWidth>(zero, to);
}

// Two neighbouring elements as they lie in memory. In one word, lest each 16-bit element take a register, and lest a
// load be waited for where it is issued instead of where its elements are unpacked.
template <class scalar_t>
class Pair {
 public:
  Pair() = default;
  __device__ __forceinline__ explicit Pair(const acc_type<scalar_t> (&value)[2]) {
    // One instruction for the 16-bit types.
    if constexpr (std::is_same_v<scalar_t, __nv_bfloat16>) {
      const __nv_bfloat162 both = __floats2bfloat162_rn(value[0], value[1]);
      memcpy(&bits_, &both, sizeof bits_);
    } else if constexpr (std::is_same_v<scalar_t, __half>) {
      const __half2 both = __floats2half2_rn(value[0], value[1]);
      memcpy(&bits_, &both, sizeof bits_);
    } else {
      memcpy(&bits_, value, sizeof bits_);
    }
  }

  // One instruction; aligned to the pair.
  static __device__ __forceinline__ Pair load(const scalar_t* from) {
    Pair pair;
    pair.bits_ = *reinterpret_cast<const Word*>(from);
    return pair;
  }
  __device__ __forceinline__ void store(scalar_t* to) const { *reinterpret_cast<Word*>(to) = bits_; }
  // In global memory, where they are wanted.
  __device__ __forceinline__ void load_if(bool wanted, const scalar_t* from) {
    device::load_if(wanted, reinterpret_cast<const Word*>(from), bits_);
  }
  __device__ __forceinline__ void store_if(bool wanted, scalar_t* to) const {
    device::store_if(wanted, bits_, reinterpret_cast<Word*>(to));
  }

  // Anywhere; of the two, `count` are there, one at least. The other reads as zero.
  static __device__ __forceinline__ Pair load(const scalar_t* from, int count) {
    Packet<scalar_t, 2> packet;
    packet.value[0] = from[0];
    from_acc(acc_type<scalar_t>(0), packet.value[1]);
    if (count > 1) packet.value[1] = from[1];
    Pair pair;
    memcpy(&pair.bits_, &packet, sizeof packet);
    return pair;
  }
  __device__ __forceinline__ void store(scalar_t* to, int count) const {
    const Packet<scalar_t, 2> both = packet();
    to[0] = both.value[0];
    if (count > 1) to[1] = both.value[1];
  }

  __device__ __forceinline__ Packet<scalar_t, 2> packet() const {
    Packet<scalar_t, 2> packet;
    memcpy(&packet, &bits_, sizeof packet);
    return packet;
  }
  __device__ __forceinline__ void unpack(acc_type<scalar_t> (&value)[2]) const {
    Pair pair;
    pair.bits_ = whole(bits_);
    const Packet<scalar_t, 2> packet = pair.packet();
    value[0] = to_acc(packet.value[0]);
    value[1] = to_acc(packet.value[1]);
  }

 private:
  static_assert(sizeof(scalar_t) <= 4, "a pair fits into a word of 64 bits");
  using Bits = std::conditional_t<sizeof(scalar_t) == 2, uint32_t, uint64_t>;
  typedef Bits __attribute__((may_alias)) Word;  // as which elements are moved; nvcc would copy them byte by byte

  static __device__ __forceinline__ uint32_t whole(uint32_t bits) { return device::opaque(bits); }
  static __device__ __forceinline__ uint64_t whole(uint64_t bits) { return bits; }

  Word bits_ = 0;
};

}  // namespace rnnfast::cuda
