// Owns: the random numbers of the masks inside the recurrence: a function of a seed and of what is drawn, so that
// every engine, every thread and backward draw the same ones.
// Must not know: what a mask is multiplied with, where seeds come from.
//
// Philox4x32-7: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. Seven rounds are
// the fewest that pass all of TestU01's BigCrush there; the ten that are usual elsewhere would be a margin that masks
// have no need of, at almost half as much time again.
#pragma once

#include <cstdint>

#include "cell/host_device.h"

namespace rnnfast {

// What a number is drawn for.
enum class Draw : uint32_t { recurrent_dropout, zoneout_h, zoneout_c };

// Steps whose numbers come out of one call.
constexpr int kPhiloxWords = 4;
constexpr int kPhiloxRounds = 7;

// Where the numbers of a unit lie: in which call, and, for zoneout, at which of its words (the step modulo 4).
// Recurrent dropout, the same at every step, has step 0.
RNNFAST_HOST_DEVICE uint32_t philox_step(int64_t step) { return static_cast<uint32_t>(step / kPhiloxWords); }
RNNFAST_HOST_DEVICE uint32_t philox_purpose(Draw draw, bool reverse) {
  return static_cast<uint32_t>(draw) * 2 + (reverse ? 1 : 0);
}

// A number below this one means "dropped" or "kept": so many of 2^32 as the probability, which is below 1.
inline uint32_t philox_threshold(double probability) { return static_cast<uint32_t>(probability * 4294967296.0); }

RNNFAST_HOST_DEVICE void multiply_wide(uint32_t x, uint32_t by, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(x) * by;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

// The counter (unit, step, purpose, 0) becomes four random words. U is uint32_t, or a vector of them for neighbouring
// units, for which its own namespace has a multiply_wide.
template <class U>
RNNFAST_HOST_DEVICE void philox(U unit, uint32_t step, uint32_t purpose, int64_t seed, U (&words)[kPhiloxWords]) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  words[0] = unit;
  words[1] = U(step);
  words[2] = U(purpose);
  words[3] = U(0u);
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    U high0, low0, high1, low1;
    multiply_wide(words[0], 0xD2511F53u, high0, low0);
    multiply_wide(words[2], 0xCD9E8D57u, high1, low1);
    words[0] = high1 ^ words[1] ^ U(key0);
    words[1] = low1;
    words[2] = high0 ^ words[3] ^ U(key1);
    words[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

}  // namespace rnnfast
