// Owns: the numbers in which a lane computes the cell, all of its units and rows as one, and their nonlinearities: the
// exact ones; and where the state is rounded to 16 bits or to TF32 anyway, some from the hardware's approximate
// exponential and reciprocal, to about 1e-6 of their value, in a quarter of the instructions. A cell finds them by
// argument-dependent lookup, as those of SIMD types. Must not know: cells.
#pragma once

#include "cell/activations.h"
#include "device_ptx.h"

namespace rnnfast::cuda {

// What belongs to different units and rows stands side by side at every step of a cell, so that the instructions of one
// fill the time in which another's are under way.
template <class Functions>
class LaneNumber {
 public:
  static constexpr int kCount = 4;

  LaneNumber() = default;
  __device__ __forceinline__ explicit LaneNumber(const float (&value)[kCount]) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) value_[k] = value[k];
  }
  __device__ __forceinline__ explicit LaneNumber(double constant) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) value_[k] = static_cast<float>(constant);
  }
  __device__ __forceinline__ float operator[](int k) const { return value_[k]; }

  friend __device__ __forceinline__ LaneNumber operator+(const LaneNumber& a, const LaneNumber& b) {
    return each([&](int k) { return a[k] + b[k]; });
  }
  friend __device__ __forceinline__ LaneNumber operator-(const LaneNumber& a, const LaneNumber& b) {
    return each([&](int k) { return a[k] - b[k]; });
  }
  friend __device__ __forceinline__ LaneNumber operator*(const LaneNumber& a, const LaneNumber& b) {
    return each([&](int k) { return a[k] * b[k]; });
  }
  friend __device__ __forceinline__ LaneNumber sigmoid(const LaneNumber& x) {
    return each([&](int k) { return Functions::sigmoid(x[k]); });
  }
  friend __device__ __forceinline__ LaneNumber tanh(const LaneNumber& x) {
    return each([&](int k) { return Functions::tanh(x[k]); });
  }
  friend __device__ __forceinline__ LaneNumber relu(const LaneNumber& x) {
    return each([&](int k) { return rnnfast::relu(x[k]); });
  }
  friend __device__ __forceinline__ LaneNumber relu_mask(const LaneNumber& y) {
    return each([&](int k) { return rnnfast::relu_mask(y[k]); });
  }

 private:
  template <class Function>
  static __device__ __forceinline__ LaneNumber each(const Function& function) {
    LaneNumber result;
#pragma unroll
    for (int k = 0; k < kCount; ++k) result.value_[k] = function(k);
    return result;
  }

  float value_[kCount];
};

struct ExactFunctions {
  static __device__ __forceinline__ float sigmoid(float x) { return rnnfast::sigmoid(x); }
  static __device__ __forceinline__ float tanh(float x) { return rnnfast::tanh(x); }
};

struct FastFunctions {
  // exp(-x) overflows to infinity for very negative x, and 1 / infinity is the right limit, 0.
  static __device__ __forceinline__ float sigmoid(float x) {
    return device::fast_reciprocal(1.0f + device::fast_exp2(-kLog2E * x));
  }
  // x p(x^2) / q(x^2) with the p and q of least largest relative error up to kLimit: 1.2e-7, and rounding. tanh(kLimit)
  // is 1 - 3.4e-7. One reciprocal, where the exponential would take two of the slow instructions and, near 0, a series
  // beside them. No branch, which would keep the compiler from running several side by side. NaN passes through.
  static __device__ __forceinline__ float tanh(float x) {
    constexpr float kLimit = 7.8f;
    x = device::clamp(x, kLimit);
    const float y = x * x;
    const float p = ((1.16357205e-5f * y + 2.96988920e-3f) * y + 1.29431158e-1f) * y + 9.99999881e-1f;
    const float q = (((2.52623693e-7f * y + 2.41354632e-4f) * y + 2.38923989e-2f) * y + 4.62763518e-1f) * y + 1.0f;
    return x * p * device::fast_reciprocal(q);
  }

 private:
  static constexpr float kLog2E = 1.44269504f;
};

}  // namespace rnnfast::cuda
