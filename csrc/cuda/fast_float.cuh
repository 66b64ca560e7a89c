// Owns: the numbers in which a lane computes the cell where the state is rounded to 16 bits or to TF32 anyway: float,
// with nonlinearities from the hardware's approximate exponential and reciprocal, to about 1e-6 of their value, in a
// quarter of the instructions of the exact ones. A cell finds them by argument-dependent lookup, as those of SIMD
// types. Must not know: cells.
#pragma once

#include "device_ptx.h"

namespace rnnfast::cuda {

class FastFloat {
 public:
  FastFloat() = default;
  __device__ __forceinline__ explicit FastFloat(float value) : value_(value) {}
  __device__ __forceinline__ explicit FastFloat(int value) : value_(static_cast<float>(value)) {}
  __device__ __forceinline__ explicit FastFloat(double value) : value_(static_cast<float>(value)) {}
  __device__ __forceinline__ explicit operator float() const { return value_; }

  friend __device__ __forceinline__ FastFloat operator+(FastFloat a, FastFloat b) {
    return FastFloat(a.value_ + b.value_);
  }
  friend __device__ __forceinline__ FastFloat operator-(FastFloat a, FastFloat b) {
    return FastFloat(a.value_ - b.value_);
  }
  friend __device__ __forceinline__ FastFloat operator*(FastFloat a, FastFloat b) {
    return FastFloat(a.value_ * b.value_);
  }

  // exp(-x) overflows to infinity for very negative x, and 1 / infinity is the right limit, 0.
  friend __device__ __forceinline__ FastFloat sigmoid(FastFloat x) {
    return FastFloat(device::fast_reciprocal(1.0f + device::fast_exp2(-kLog2E * x.value_)));
  }
  // 1 - 2 / (exp(2 |x|) + 1), and near 0, where that cancels, the Taylor series. NaN passes through.
  friend __device__ __forceinline__ FastFloat tanh(FastFloat x) {
    constexpr float kSeries = 0.25f;  // beyond, the cancellation leaves 1e-6; up to here the series does
    const float size = fabsf(x.value_), square = x.value_ * x.value_;
    const float large = 1.0f - 2.0f * device::fast_reciprocal(1.0f + device::fast_exp2(2.0f * kLog2E * size));
    const float series = ((-17.0f / 315.0f * square + 2.0f / 15.0f) * square - 1.0f / 3.0f) * square;
    return FastFloat(size < kSeries ? x.value_ + x.value_ * series : copysignf(large, x.value_));
  }
  friend __device__ __forceinline__ FastFloat relu(FastFloat x) { return x.value_ < 0.0f ? FastFloat(0.0f) : x; }
  friend __device__ __forceinline__ FastFloat relu_mask(FastFloat y) {
    return FastFloat(y.value_ > 0.0f ? 1.0f : 0.0f);
  }

 private:
  static constexpr float kLog2E = 1.44269504f;
  float value_;
};

}  // namespace rnnfast::cuda
