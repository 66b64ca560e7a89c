// Owns: recurrent dropout and zoneout as kernels see them: the factor of one unit of one row, drawn where it is wanted.
// Must not know: cells, tensors.
#pragma once

#include "cell/zoneout.h"
#include "params.h"
#include "philox.h"
#include "storage.cuh"

namespace rnnfast::cuda {

template <class acc_t>
struct DeviceNoise {
  const int64_t* seeds = nullptr;                // [B]; null: zoneout takes its expectation
  uint32_t dropped = 0, kept_h = 0, kept_c = 0;  // thresholds
  uint32_t first_unit = 0;                       // by which masks count the call's units
  bool dropout = false;
  acc_t scale = 1;                     // 1 / (1 - p) of recurrent dropout
  acc_t zoneout_h = 0, zoneout_c = 0;  // probabilities

  DeviceNoise() = default;
  explicit DeviceNoise(const Noise& noise)
      : seeds(noise.seeds),
        dropped(philox_threshold(noise.recurrent_dropout)),
        kept_h(philox_threshold(noise.zoneout_h)),
        kept_c(philox_threshold(noise.zoneout_c)),
        first_unit(static_cast<uint32_t>(noise.first_unit)),
        dropout(noise.recurrent_dropout > 0),
        scale(static_cast<acc_t>(1 / (1 - noise.recurrent_dropout))),
        zoneout_h(static_cast<acc_t>(noise.zoneout_h)),
        zoneout_c(static_cast<acc_t>(noise.zoneout_c)) {}

  // m: 0 or 1 / (1 - p).
  __device__ __forceinline__ acc_t mask(bool reverse, int64_t row, int64_t unit) const {
    return below(dropped, Draw::recurrent_dropout, reverse, 0, row, unit) ? acc_t(0) : scale;
  }
  // k of h, where zoneout_h is not zero.
  __device__ __forceinline__ acc_t keep_h(bool reverse, int64_t step, int64_t row, int64_t unit) const {
    return seeds == nullptr ? zoneout_h : acc_t(below(kept_h, Draw::zoneout_h, reverse, step, row, unit));
  }
  __device__ __forceinline__ acc_t keep_c(bool reverse, int64_t step, int64_t row, int64_t unit) const {
    return seeds == nullptr ? zoneout_c : acc_t(below(kept_c, Draw::zoneout_c, reverse, step, row, unit));
  }

 private:
  __device__ __forceinline__ bool below(uint32_t threshold, Draw draw, bool reverse, int64_t step, int64_t row,
                                        int64_t unit) const {
    uint32_t words[kPhiloxWords];
    philox(first_unit + static_cast<uint32_t>(unit), philox_step(step), philox_purpose(draw, reverse), seeds[row],
           words);
    const int word = static_cast<int>(step % kPhiloxWords);  // not as an index, or words would lie in local memory
    return (word < 2 ? (word == 0 ? words[0] : words[1]) : (word == 2 ? words[2] : words[3])) < threshold;
  }
};

}  // namespace rnnfast::cuda
