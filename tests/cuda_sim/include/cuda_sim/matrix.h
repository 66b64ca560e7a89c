// Owns: models of the matrix instructions mma.sync.m16n8k16 (16-bit), mma.sync.m16n8k8 (TF32) and ldmatrix, with the
// fragment layouts of the PTX ISA.
// Must not know: how warps meet.
#pragma once

#include "cuda_sim.h"

namespace cuda_sim {

// Own conversions: those of NVIDIA's headers would be instrumented.
CUDA_SIM_UNCHECKED inline float half_bits_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  uint32_t word = static_cast<uint32_t>(bits & 0x7fff) << 13;
  float value;
  memcpy(&value, &word, 4);
  value *= 0x1p112f;  // moves the exponent's bias from 15 to 127, subnormals included
  memcpy(&word, &value, 4);
  if ((bits & 0x7c00) == 0x7c00) word = 0x7f800000u | (bits & 0x3ffu) << 13;
  word |= sign;
  memcpy(&value, &word, 4);
  return value;
}
CUDA_SIM_UNCHECKED inline float bfloat16_bits_to_float(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

struct MmaOperands {
  uint32_t a[4], b[2];
  float c[4];
};

template <bool kBfloat16>
CUDA_SIM_UNCHECKED void mma_lanes(Lane* lanes, uint32_t mask, uint32_t present) {
  if (mask != ~0u || present != ~0u) {
    fail(cudaErrorLaunchFailure, "mma.sync with an incomplete warp (%08x)", present);
  }
  float a[16][16], b[16][8];
  const auto value = [](uint32_t word, int half) CUDA_SIM_UNCHECKED {
    const uint16_t bits = half ? word >> 16 : word & 0xffff;
    return kBfloat16 ? bfloat16_bits_to_float(bits) : half_bits_to_float(bits);
  };
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperands& in = *static_cast<const MmaOperands*>(lanes[lane].in);
    const int group = lane / 4, first = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      a[group][first + half] = value(in.a[0], half);
      a[group + 8][first + half] = value(in.a[1], half);
      a[group][first + 8 + half] = value(in.a[2], half);
      a[group + 8][first + 8 + half] = value(in.a[3], half);
      b[first + half][group] = value(in.b[0], half);
      b[first + 8 + half][group] = value(in.b[1], half);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperands& in = *static_cast<const MmaOperands*>(lanes[lane].in);
    float* out = static_cast<float*>(lanes[lane].out);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
      out[i] = in.c[i] + sum;
    }
  }
}

// The nearest float of 10 mantissa bits, ties away from zero; what is not finite stays.
CUDA_SIM_UNCHECKED inline float round_to_tf32(float x) {
  uint32_t word;
  memcpy(&word, &x, 4);
  if ((word & 0x7f800000u) != 0x7f800000u) word = (word + 0x1000u) & ~0x1fffu;
  memcpy(&x, &word, 4);
  return x;
}

// The instruction reads the upper 19 bits of a and b.
CUDA_SIM_UNCHECKED inline void mma_tf32_lanes(Lane* lanes, uint32_t mask, uint32_t present) {
  if (mask != ~0u || present != ~0u) {
    fail(cudaErrorLaunchFailure, "mma.sync with an incomplete warp (%08x)", present);
  }
  float a[16][8], b[8][8];
  const auto value = [](uint32_t word) CUDA_SIM_UNCHECKED {
    word &= ~0x1fffu;
    float x;
    memcpy(&x, &word, 4);
    return x;
  };
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperands& in = *static_cast<const MmaOperands*>(lanes[lane].in);
    const int group = lane / 4, column = lane % 4;
    a[group][column] = value(in.a[0]);
    a[group + 8][column] = value(in.a[1]);
    a[group][column + 4] = value(in.a[2]);
    a[group + 8][column + 4] = value(in.a[3]);
    b[column][group] = value(in.b[0]);
    b[column + 4][group] = value(in.b[1]);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const MmaOperands& in = *static_cast<const MmaOperands*>(lanes[lane].in);
    float* out = static_cast<float*>(lanes[lane].out);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + (i >= 2 ? 8 : 0), column = lane % 4 * 2 + i % 2;
      float sum = 0;
      for (int k = 0; k < 8; ++k) sum += a[row][k] * b[k][column];
      out[i] = in.c[i] + sum;
    }
  }
}

// d = a b + c
inline void mma(WarpFunction lanes, float* d, const uint32_t* a, const uint32_t* b, const float* c, const char* file,
                int line) {
  MmaOperands in;
  float out[4];
  for (int i = 0; i < 4; ++i) in.a[i] = a[i], in.c[i] = c[i];
  for (int i = 0; i < 2; ++i) in.b[i] = b[i];
  warp_collective(~0u, lanes, Lane{&in, out, 0, 32}, false, file, line);
  for (int i = 0; i < 4; ++i) d[i] = out[i];
}
template <bool kBfloat16>
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, const float* c, CUDA_SIM_CALLER) {
  mma(mma_lanes<kBfloat16>, d, a, b, c, file, line);
}
inline void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b, const float* c, CUDA_SIM_CALLER) {
  mma(mma_tf32_lanes, d, a, b, c, file, line);
}

template <int kMatrices>
CUDA_SIM_UNCHECKED void ldmatrix_lanes(Lane* lanes, uint32_t, uint32_t present) {
  if (present != ~0u) fail(cudaErrorLaunchFailure, "ldmatrix with an incomplete warp (%08x)", present);
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < kMatrices; ++m) {
      const auto* row = static_cast<const uint32_t*>(lanes[m * 8 + lane / 4].in);
      static_cast<uint32_t*>(lanes[lane].out)[m] = row[lane % 4];
    }
  }
}

// Every lane reads the 16-byte row it points to, as an access of its own; then the warp exchanges.
template <int kMatrices>
void ldmatrix(uint32_t* registers, const void* row, CUDA_SIM_CALLER) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail(cudaErrorMisalignedAddress, "ldmatrix: row is not 16-byte aligned");
  uint4 value{};
  uint32_t out[kMatrices];
  if (lane_index() < 8 * kMatrices) value = *static_cast<const uint4*>(row);
  warp_collective(~0u, ldmatrix_lanes<kMatrices>, Lane{&value, out, 0, 32}, false, file, line);
  for (int m = 0; m < kMatrices; ++m) registers[m] = out[m];
}

}  // namespace cuda_sim
