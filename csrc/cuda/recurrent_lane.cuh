// Owns: what one lane of a persistent kernel does beside the product: the cell of its two hidden units and two batch
// rows (TileLane), all through the sequence, with the state in registers; which of its rows live, where a reset cuts;
// loads of the step to come, stores of the step that was. Must not know: equations (csrc/cell has them), where W lies,
// how h travels.
//
//     ForwardLane lane(...);                            state = h0, c0
//     lane.fetch(first)                                 igates of the first step; a reset before it cuts
//     for index in lane.first() .. lane.last():
//       hgates = W_hh lane.operand()                    the engine's
//       lane.step(index, hgates)                        and fetches index + 1, a reset before which cuts
//     lane.finish()                                     h_n, c_n
//
// An index counts steps in the direction's own order. Batch rows past the batch and hidden units past H take part in
// the product with harmless numbers; nothing of them is stored.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cell/cells.h"
#include "device_sequence.cuh"
#include "recurrent_tile.cuh"
#include "storage.cuh"

namespace rnnfast::cuda {

template <class scalar_t>
struct ForwardDirection {
  const scalar_t* w_hh = nullptr;  // [G*H, H]
  const scalar_t* b_hh = nullptr;  // [G*H] or null
  const scalar_t* h0 = nullptr;    // [B, H]
  const scalar_t* c0 = nullptr;    // [B, H]: cells with two states

  const scalar_t* igates = nullptr;  // compact [N, G*H]
  DeviceRows<scalar_t> output;       // rows of H
  DeviceRows<scalar_t> c;            // rows of H; data null: not wanted
  scalar_t* h_n = nullptr;           // [B, H]
  scalar_t* c_n = nullptr;           // [B, H]: cells with two states
  scalar_t* saved = nullptr;         // compact [N, S*H]; null: not wanted
  bool reverse = false;
};

template <class scalar_t>
struct ForwardLayerOnDevice {
  int hidden_size = 0;
  bool paired = false;  // two units at a time can be loaded and stored
  DeviceSequence sequence;
  ForwardDirection<scalar_t> direction[2];
};

// ------------------------------------------------------------------------------------------------ rows and time
// The two rows of a lane in time.
class LaneRows {
 public:
  __device__ __forceinline__ LaneRows(const DeviceSequence& sequence, bool reverse, int first_row)
      : sequence_(sequence), reverse_(reverse) {
    const TileLane lane;
    int most = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      slot_[j] = first_row + lane.row(j);
      length_[j] = sequence.length(slot_[j]);
      most = most < length_[j] ? length_[j] : most;
    }
    // Over the four lanes of a quad, which together have all rows of the tile.
#pragma unroll
    for (int step = 1; step <= 2; step *= 2) {
      const int other = __shfl_xor_sync(kAllLanes, most, step);
      most = most < other ? other : most;
    }
    first_ = reverse ? sequence.steps - most : 0;
    last_ = first_ + most;
  }

  // Outside of [first, last) none of the tile's rows lives. The same for all lanes of all warps with these rows.
  __device__ __forceinline__ int first() const { return first_; }
  __device__ __forceinline__ int last() const { return last_; }

  __device__ __forceinline__ int slot(int j) const { return slot_[j]; }
  __device__ __forceinline__ bool exists(int j) const { return slot_[j] < sequence_.batch; }
  __device__ __forceinline__ int step(int index) const { return reverse_ ? sequence_.steps - 1 - index : index; }
  __device__ __forceinline__ bool lives(int index, int j) const { return step(index) < length_[j]; }
  // A row of a padded input that has ended: its results are zero. (A packed input has no such rows.)
  __device__ __forceinline__ bool ended(int index, int j) const {
    return sequence_.offsets == nullptr && exists(j) && !lives(index, j);
  }
  // Whether a reset cuts the state on the way into a step. Forward crosses the border before it, reverse the one
  // behind.
  __device__ __forceinline__ bool cut(int index, int j) const {
    const int border = reverse_ ? step(index) + 1 : step(index);
    return sequence_.reset != nullptr && border < length_[j] && sequence_.reset[sequence_.row(border, slot_[j])];
  }

 private:
  const DeviceSequence& sequence_;
  int slot_[2], length_[2], first_ = 0, last_ = 0;
  bool reverse_;
};

// The two units of a lane.
struct LaneUnits {
  int hidden_size, first, count;
  bool paired;

  __device__ __forceinline__ LaneUnits(int hidden_size, int first_unit, bool paired)
      : hidden_size(hidden_size), first(first_unit + TileLane().unit(0)), paired(paired) {
    const int left = hidden_size - first;
    count = left < 0 ? 0 : left > 2 ? 2 : left;
  }

  // Block `part` of a row of [parts, H].
  template <class scalar_t>
  __device__ __forceinline__ Packet<scalar_t, 2> load(const scalar_t* row, int part = 0) const {
    return load_pair(row + static_cast<int64_t>(part) * hidden_size + first, count, paired);
  }
  template <class scalar_t>
  __device__ __forceinline__ void store(const float (&value)[2], scalar_t* row, int part = 0) const {
    store_pair(value, row + static_cast<int64_t>(part) * hidden_size + first, count, paired);
  }
};

// ------------------------------------------------------------------------------------------------ forward
template <class Cell, class scalar_t>
class ForwardLane {
 public:
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;

  __device__ __forceinline__ ForwardLane(const ForwardLayerOnDevice<scalar_t>& layer,
                                         const ForwardDirection<scalar_t>& direction, int first_row, int first_unit)
      : sequence_(layer.sequence),
        direction_(direction),
        rows_(layer.sequence, direction.reverse, first_row),
        units_(layer.hidden_size, first_unit, layer.paired) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!rows_.exists(j)) continue;
      const int64_t at = static_cast<int64_t>(rows_.slot(j)) * units_.hidden_size;
      keep(units_.load(direction_.h0 + at), state_[0], j);
      if constexpr (kStates == 2) keep(units_.load(direction_.c0 + at), state_[1], j);
    }
    if (direction_.b_hh != nullptr) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        const Packet<scalar_t, 2> bias = units_.load(direction_.b_hh, g);
        bias_[g][0] = to_acc(bias.value[0]);
        bias_[g][1] = to_acc(bias.value[1]);
      }
    }
  }

  __device__ __forceinline__ int first() const { return rows_.first(); }
  __device__ __forceinline__ int last() const { return rows_.last(); }

  // Makes ready for a step: loads its igates, and forgets the state of rows that a reset cuts before it.
  __device__ __forceinline__ void fetch(int index) {
    const int step = rows_.step(index);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      live_[j] = index < rows_.last() && rows_.lives(index, j);
      cut_[j] = live_[j] && rows_.cut(index, j);
      if (!live_[j]) continue;
      const scalar_t* row = direction_.igates + sequence_.row(step, rows_.slot(j)) * kGates * units_.hidden_size;
#pragma unroll
      for (int g = 0; g < kGates; ++g) igates_[g][j] = units_.load(row, g);
    }
  }

  // The h that the next step's product reads: of units 0 and 1, batch row j.
  __device__ __forceinline__ void operand(int j, float (&h)[2]) const {
    h[0] = cut_[j] ? 0.0f : state_[0][j];
    h[1] = cut_[j] ? 0.0f : state_[0][2 + j];
  }

  // hgates[gate][2 i + j] is W_hh h, without bias, of unit i and batch row j.
  __device__ __forceinline__ void step(int index, const float (&hgates)[kGates][4]) {
    float igates[kGates][4];
    bool live[2], cut[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      live[j] = live_[j];
      cut[j] = cut_[j];
#pragma unroll
      for (int g = 0; g < kGates; ++g) keep(igates_[g][j], igates[g], j);
    }
    fetch(index + 1);
    const int step = rows_.step(index);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!live[j]) {
        if (rows_.ended(index, j)) store_end(step, j);
        continue;
      }
      float state[kStates][2], saved[kSaved + 1][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float from_x[kGates], from_h[kGates], before[kStates], after[kStates], save[kSaved + 1];
#pragma unroll
        for (int g = 0; g < kGates; ++g) {
          from_x[g] = igates[g][2 * i + j];
          from_h[g] = hgates[g][2 * i + j] + bias_[g][i];
        }
#pragma unroll
        for (int s = 0; s < kStates; ++s) before[s] = cut[j] ? 0.0f : state_[s][2 * i + j];
        Cell::forward(from_x, from_h, before, after, save);
#pragma unroll
        for (int s = 0; s < kStates; ++s) state_[s][2 * i + j] = state[s][i] = after[s];
        state_[0][2 * i + j] = rounded(after[0]);
#pragma unroll
        for (int s = 0; s < kSaved; ++s) saved[s][i] = save[s];
      }
      units_.store(state[0], direction_.output.at(sequence_, step, rows_.slot(j)));
      if constexpr (kStates == 2) {
        if (direction_.c.data != nullptr) units_.store(state[1], direction_.c.at(sequence_, step, rows_.slot(j)));
      }
      if (kSaved > 0 && direction_.saved != nullptr) {
        scalar_t* row = direction_.saved + sequence_.row(step, rows_.slot(j)) * kSaved * units_.hidden_size;
#pragma unroll
        for (int s = 0; s < kSaved; ++s) units_.store(saved[s], row, s);
      }
    }
  }

  // Stores the last states, and the zeros of the steps at which no row of the tile lives.
  __device__ __forceinline__ void finish() const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!rows_.exists(j)) continue;
      const int64_t at = static_cast<int64_t>(rows_.slot(j)) * units_.hidden_size;
      const float h[2] = {state_[0][j], state_[0][2 + j]};
      units_.store(h, direction_.h_n + at);
      if constexpr (kStates == 2) {
        const float c[2] = {state_[1][j], state_[1][2 + j]};
        units_.store(c, direction_.c_n + at);
      }
      for (int index = 0; index < rows_.first(); ++index) {
        if (rows_.ended(index, j)) store_end(rows_.step(index), j);
      }
      for (int index = rows_.last(); index < sequence_.steps; ++index) {
        if (rows_.ended(index, j)) store_end(rows_.step(index), j);
      }
    }
  }

 private:
  static __device__ __forceinline__ void keep(const Packet<scalar_t, 2>& pair, float (&value)[4], int j) {
    value[j] = to_acc(pair.value[0]);
    value[2 + j] = to_acc(pair.value[1]);
  }
  static __device__ __forceinline__ float rounded(float x) {
    scalar_t stored;
    from_acc(x, stored);
    return to_acc(stored);
  }
  __device__ __forceinline__ void store_end(int step, int j) const {
    const float zero[2] = {};
    units_.store(zero, direction_.output.at(sequence_, step, rows_.slot(j)));
    if (kStates == 2 && direction_.c.data != nullptr) {
      units_.store(zero, direction_.c.at(sequence_, step, rows_.slot(j)));
    }
  }

  const DeviceSequence& sequence_;
  const ForwardDirection<scalar_t>& direction_;
  const LaneRows rows_;
  const LaneUnits units_;
  float state_[kStates][4] = {};                // [state][2 i + j]; h rounded to its dtype, c in full
  float bias_[kGates][2] = {};                  // [gate][i]
  Packet<scalar_t, 2> igates_[kGates][2] = {};  // [gate][j], of the step to come
  bool live_[2] = {}, cut_[2] = {};             // at the step to come
};

// ------------------------------------------------------------------------------------------------ host
// Whether pairs of elements can be loaded from rows that start at data and repeat every stride elements.
template <class scalar_t>
bool aligned_for_pairs(const void* data, int64_t stride = 0) {
  return reinterpret_cast<uintptr_t>(data) % (2 * sizeof(scalar_t)) == 0 && stride % 2 == 0;
}
template <class scalar_t>
bool aligned_for_pairs(const Rows& rows) {
  return aligned_for_pairs<scalar_t>(rows.data, rows.stride_b) && rows.stride_t % 2 == 0;
}

// A layer as kernels see it, but for its sequence.
template <class scalar_t>
ForwardLayerOnDevice<scalar_t> forward_on_device(const LayerForward& layer) {
  ForwardLayerOnDevice<scalar_t> result;
  result.hidden_size = static_cast<int>(layer.hidden_size);
  result.paired = layer.hidden_size % 2 == 0;
  for (int k = 0; k < layer.directions; ++k) {
    const DirectionForward& from = layer.direction[k];
    ForwardDirection<scalar_t>& to = result.direction[k];
    to.w_hh = static_cast<const scalar_t*>(from.weights.w_hh);
    to.b_hh = static_cast<const scalar_t*>(from.weights.b_hh);
    to.h0 = static_cast<const scalar_t*>(from.h0);
    to.c0 = static_cast<const scalar_t*>(from.c0);
    to.igates = static_cast<const scalar_t*>(from.igates);
    to.output = DeviceRows<scalar_t>(from.output);
    to.c = DeviceRows<scalar_t>(from.c);
    to.h_n = static_cast<scalar_t*>(from.h_n);
    to.c_n = static_cast<scalar_t*>(from.c_n);
    to.saved = static_cast<scalar_t*>(from.saved);
    to.reverse = from.reverse;
    for (const void* data :
         {static_cast<const void*>(to.b_hh), static_cast<const void*>(to.h0), static_cast<const void*>(to.c0),
          static_cast<const void*>(to.igates), static_cast<const void*>(to.h_n), static_cast<const void*>(to.c_n),
          static_cast<const void*>(to.saved)}) {
      result.paired = result.paired && aligned_for_pairs<scalar_t>(data);
    }
    result.paired = result.paired && aligned_for_pairs<scalar_t>(from.output) && aligned_for_pairs<scalar_t>(from.c);
  }
  return result;
}

}  // namespace rnnfast::cuda
