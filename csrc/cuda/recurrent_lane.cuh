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
//       lane.store(index)                               behind what others wait for, lane.operand()
//     lane.finish()                                     h_n, c_n
//
//     BackwardLane lane(...);                           gradients of h_n, c_n
//     lane.fetch(last - 1)                              what forward left, and the gradient of the output
//     for index in lane.last() - 1 .. lane.first():
//       lane.step(index, product)                       and fetches index - 1
//       lane.store(index)                               behind what others wait for, lane.operand()
//       product = sum over gates of W_hh^T lane.operand()
//     lane.finish(product)                              gradients of h0, c0
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
struct BackwardDirection {
  const scalar_t* w_hh = nullptr;     // [G*H, H]
  const scalar_t* c0 = nullptr;       // [B, H]: cells with two states
  const scalar_t* h_prev = nullptr;   // compact [N, H]
  const scalar_t* saved = nullptr;    // compact [N, S*H]; may be grad_igates
  DeviceRows<const scalar_t> output;  // rows of H
  DeviceRows<const scalar_t> c;       // rows of H: cells with two states

  DeviceRows<const scalar_t> grad_output;  // rows of H; data null: zero
  DeviceRows<const scalar_t> grad_c;       // rows of H; data null: zero
  const scalar_t* grad_h_n = nullptr;      // [B, H]; null: zero
  const scalar_t* grad_c_n = nullptr;      // [B, H]; null: zero
  scalar_t* grad_h0 = nullptr;             // [B, H]
  scalar_t* grad_c0 = nullptr;             // [B, H]: cells with two states
  scalar_t* grad_igates = nullptr;         // compact [N, G*H]
  scalar_t* grad_hgates = nullptr;         // compact [N, G*H]: cells with split gates
  bool reverse = false;
};

template <class Direction>
struct LayerOnDevice {
  int hidden_size = 0;
  bool paired = false;  // two units at a time can be loaded and stored
  DeviceSequence sequence;
  Direction direction[2];
};
template <class scalar_t>
using ForwardLayerOnDevice = LayerOnDevice<ForwardDirection<scalar_t>>;
template <class scalar_t>
using BackwardLayerOnDevice = LayerOnDevice<BackwardDirection<scalar_t>>;

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
  // Whether a reset cuts the state on the way into a step, as the byte that says so: not 0. Forward crosses the border
  // before it, reverse the one behind. As a byte lest the load be waited for here.
  __device__ __forceinline__ unsigned cut(int index, int j) const {
    const int border = reverse_ ? step(index) + 1 : step(index);
    if (sequence_.reset == nullptr || border >= length_[j]) return 0;
    return reinterpret_cast<const unsigned char*>(sequence_.reset)[sequence_.row(border, slot_[j])];
  }

 private:
  const DeviceSequence& sequence_;
  int slot_[2], length_[2], first_ = 0, last_ = 0;
  bool reverse_;
};

// The two units of a lane. A lane without any must not call load and store.
struct LaneUnits {
  int hidden_size, first, count;
  bool paired;

  __device__ __forceinline__ LaneUnits(int hidden_size, int first_unit, bool paired)
      : hidden_size(hidden_size), first(first_unit + TileLane().unit(0)), paired(paired) {
    const int left = hidden_size - first;
    count = left < 0 ? 0 : left > 2 ? 2 : left;
  }

  // All blocks of a row of [parts, H].
  template <int kParts, class scalar_t>
  __device__ __forceinline__ void load(const scalar_t* row, Pair<scalar_t>* parts) const {
    row += first;
    if (paired) {
#pragma unroll
      for (int n = 0; n < kParts; ++n) parts[n] = Pair<scalar_t>::load(row + static_cast<int64_t>(n) * hidden_size);
    } else {
#pragma unroll
      for (int n = 0; n < kParts; ++n) {
        parts[n] = Pair<scalar_t>::load(row + static_cast<int64_t>(n) * hidden_size, count);
      }
    }
  }
  template <int kParts, class scalar_t>
  __device__ __forceinline__ void store(const Pair<scalar_t>* parts, scalar_t* row) const {
    row += first;
    if (paired) {
#pragma unroll
      for (int n = 0; n < kParts; ++n) parts[n].store(row + static_cast<int64_t>(n) * hidden_size);
    } else {
#pragma unroll
      for (int n = 0; n < kParts; ++n) parts[n].store(row + static_cast<int64_t>(n) * hidden_size, count);
    }
  }

  // A row of [H].
  template <class scalar_t>
  __device__ __forceinline__ Pair<scalar_t> load(const scalar_t* row) const {
    Pair<scalar_t> pair;
    load<1>(row, &pair);
    return pair;
  }
  template <class scalar_t>
  __device__ __forceinline__ void store(const Pair<scalar_t>& pair, scalar_t* row) const {
    store<1>(&pair, row);
  }
};

// Two units into value[2 i + j], for batch row j; and from there.
template <class scalar_t>
__device__ __forceinline__ void spread(const Pair<scalar_t>& pair, float (&value)[4], int j) {
  float units[2];
  pair.unpack(units);
  value[j] = units[0];
  value[2 + j] = units[1];
}
template <class scalar_t>
__device__ __forceinline__ Pair<scalar_t> gather(const float (&value)[4], int j) {
  const float units[2] = {value[j], value[2 + j]};
  return Pair<scalar_t>(units);
}

// ------------------------------------------------------------------------------------------------ forward
// number_t is what the cell computes with, as the product's arithmetic says.
template <class Cell, class scalar_t, class number_t>
class ForwardLane {
 public:
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;

  __device__ __forceinline__ ForwardLane(const ForwardLayerOnDevice<scalar_t>& layer,
                                         const ForwardDirection<scalar_t>& direction, int first_row, int first_unit)
      : sequence_(layer.sequence),
        direction_(direction),
        rows_(layer.sequence, direction.reverse, first_row),
        units_(layer.hidden_size, first_unit, layer.paired) {
    if (units_.count == 0) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!rows_.exists(j)) continue;
      const int64_t at = static_cast<int64_t>(rows_.slot(j)) * units_.hidden_size;
      spread(units_.load(direction_.h0 + at), state_[0], j);
      if constexpr (kStates == 2) spread(units_.load(direction_.c0 + at), state_[1], j);
    }
    if (direction_.b_hh != nullptr) {
      Pair<scalar_t> bias[kGates];
      units_.template load<kGates>(direction_.b_hh, bias);
#pragma unroll
      for (int g = 0; g < kGates; ++g) bias[g].unpack(bias_[g]);
    }
  }

  __device__ __forceinline__ int first() const { return rows_.first(); }
  __device__ __forceinline__ int last() const { return rows_.last(); }

  // Makes ready for a step: loads its igates, and sees which rows a reset cuts before it.
  __device__ __forceinline__ void fetch(int index) {
#pragma unroll
    for (int j = 0; j < 2; ++j) fetch_row(index, j);
  }

  // The h that the next step's product reads: of units 0 and 1, batch row j.
  __device__ __forceinline__ void operand(int j, float (&h)[2]) const {
    h[0] = cut_[j] ? 0.0f : state_[0][j];
    h[1] = cut_[j] ? 0.0f : state_[0][2 + j];
  }

  // hgates[gate][2 i + j] is W_hh h, without bias, of unit i and batch row j.
  __device__ __forceinline__ void step(int index, const float (&hgates)[kGates][4]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      step_row(j, hgates);
      fetch_row(index + 1, j);
    }
  }

  // Stores the step computed last.
  __device__ __forceinline__ void store(int index) const {
    const int step = rows_.step(index);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!lived_[j]) {
        if (ended(index, j)) store_end(step, j);
        continue;
      }
      const int64_t row = sequence_.row(step, rows_.slot(j));
      units_.store(gather<scalar_t>(state_[0], j), direction_.output.at(sequence_, row, step, rows_.slot(j)));
      if constexpr (kStates == 2) {
        if (direction_.c.data != nullptr) {
          units_.store(gather<scalar_t>(state_[1], j), direction_.c.at(sequence_, row, step, rows_.slot(j)));
        }
      }
      if (kSaved > 0 && direction_.saved != nullptr) {
        units_.template store<kSaved>(saved_[j], direction_.saved + row * kSaved * units_.hidden_size);
      }
    }
  }

  // Stores the last states, and the zeros of the steps at which no row of the tile lives.
  __device__ __forceinline__ void finish() const {
    if (units_.count == 0) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!rows_.exists(j)) continue;
      const int64_t at = static_cast<int64_t>(rows_.slot(j)) * units_.hidden_size;
      units_.store(gather<scalar_t>(state_[0], j), direction_.h_n + at);
      if constexpr (kStates == 2) units_.store(gather<scalar_t>(state_[1], j), direction_.c_n + at);
      for (int index = 0; index < rows_.first(); ++index) {
        if (ended(index, j)) store_end(rows_.step(index), j);
      }
      for (int index = rows_.last(); index < sequence_.steps; ++index) {
        if (ended(index, j)) store_end(rows_.step(index), j);
      }
    }
  }

 private:
  __device__ __forceinline__ bool ended(int index, int j) const { return units_.count > 0 && rows_.ended(index, j); }
  __device__ __forceinline__ void step_row(int j, const float (&hgates)[kGates][4]) {
    lived_[j] = live_[j];
    if (!lived_[j]) return;
    float igates[kGates][2], saved[kSaved + 1][2];
#pragma unroll
    for (int g = 0; g < kGates; ++g) igates_[j][g].unpack(igates[g]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = 2 * i + j;
      number_t from_x[kGates], from_h[kGates], before[kStates], after[kStates], save[kSaved + 1];
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        from_x[g] = number_t(igates[g][i]);
        from_h[g] = number_t(hgates[g][at] + bias_[g][i]);
      }
#pragma unroll
      for (int s = 0; s < kStates; ++s) before[s] = number_t(cut_[j] ? 0.0f : state_[s][at]);
      Cell::forward(from_x, from_h, before, after, save);
#pragma unroll
      for (int s = 0; s < kStates; ++s) state_[s][at] = float(after[s]);
      state_[0][at] = rounded<scalar_t>(state_[0][at]);
#pragma unroll
      for (int s = 0; s < kSaved; ++s) saved[s][i] = float(save[s]);
    }
#pragma unroll
    for (int s = 0; s < kSaved; ++s) saved_[j][s] = Pair<scalar_t>(saved[s]);
  }
  __device__ __forceinline__ void fetch_row(int index, int j) {
    live_[j] = units_.count > 0 && index < rows_.last() && rows_.lives(index, j);
    cut_[j] = 0;
    if (!live_[j]) return;
    cut_[j] = rows_.cut(index, j);
    units_.template load<kGates>(
        direction_.igates + sequence_.row(rows_.step(index), rows_.slot(j)) * kGates * units_.hidden_size, igates_[j]);
  }
  __device__ __forceinline__ void store_end(int step, int j) const {
    const Pair<scalar_t> zero;
    const int64_t row = sequence_.row(step, rows_.slot(j));
    units_.store(zero, direction_.output.at(sequence_, row, step, rows_.slot(j)));
    if (kStates == 2 && direction_.c.data != nullptr) {
      units_.store(zero, direction_.c.at(sequence_, row, step, rows_.slot(j)));
    }
  }

  const DeviceSequence& sequence_;
  const ForwardDirection<scalar_t>& direction_;
  const LaneRows rows_;
  const LaneUnits units_;
  float state_[kStates][4] = {};              // [state][2 i + j]; h rounded to its dtype, c in full
  float bias_[kGates][2] = {};                // [gate][i]
  Pair<scalar_t> igates_[2][kGates] = {};     // [j][gate], of the step to come
  bool live_[2] = {};                         // at the step to come
  unsigned cut_[2] = {};                      // before the step to come, if not 0
  Pair<scalar_t> saved_[2][kSaved + 1] = {};  // [j][value], of the step computed last
  bool lived_[2] = {};                        // at the step computed last
};

// ------------------------------------------------------------------------------------------------ backward
template <class Cell, class scalar_t, class number_t>
class BackwardLane {
 public:
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;

  __device__ __forceinline__ BackwardLane(const BackwardLayerOnDevice<scalar_t>& layer,
                                          const BackwardDirection<scalar_t>& direction, int first_row, int first_unit)
      : sequence_(layer.sequence),
        direction_(direction),
        rows_(layer.sequence, direction.reverse, first_row),
        units_(layer.hidden_size, first_unit, layer.paired) {
    if (units_.count == 0) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!rows_.exists(j)) continue;
      const int64_t at = static_cast<int64_t>(rows_.slot(j)) * units_.hidden_size;
      if (direction_.grad_h_n != nullptr) spread(units_.load(direction_.grad_h_n + at), carried_[0], j);
      if constexpr (kStates == 2) {
        if (direction_.grad_c_n != nullptr) spread(units_.load(direction_.grad_c_n + at), carried_[1], j);
      }
    }
  }

  __device__ __forceinline__ int first() const { return rows_.first(); }
  __device__ __forceinline__ int last() const { return rows_.last(); }

  // Loads what a step reads.
  __device__ __forceinline__ void fetch(int index) {
#pragma unroll
    for (int j = 0; j < 2; ++j) fetch_row(index, j);
  }

  // product[2 i + j] is the sum over gates of W_hh^T times the operand of the step computed before this one, index + 1;
  // at first it is not read.
  __device__ __forceinline__ void step(int index, const float (&product)[4]) {
    carry(product);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      carries_[j] = live_[j];
      cuts_[j] = cut_[j];
      // Each way fetches for itself: where the ways have met, the compiler would hold more in registers.
      if (carries_[j]) {
        step_row(j);
        fetch_row(index - 1, j);
      } else {
#pragma unroll
        for (int g = 0; g < kGates; ++g) grad_igates_[j][g] = grad_hgates_[j][g] = {};
        fetch_row(index - 1, j);
      }
    }
  }

  // Stores the step computed last.
  __device__ __forceinline__ void store(int index) const {
    const int step = rows_.step(index);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!carries_[j]) {
        if (ended(index, j)) store_end(step, j);
        continue;
      }
      const int64_t row = sequence_.row(step, rows_.slot(j)) * kGates * units_.hidden_size;
      units_.template store<kGates>(Cell::kSplitGates ? grad_igates_[j] : grad_hgates_[j],
                                    direction_.grad_igates + row);
      if constexpr (Cell::kSplitGates) units_.template store<kGates>(grad_hgates_[j], direction_.grad_hgates + row);
    }
  }

  // The gradient of a gate's hidden half, of units 0 and 1, batch row j: what the product of this step reads.
  __device__ __forceinline__ Pair<scalar_t> operand(int gate, int j) const { return grad_hgates_[j][gate]; }

  // Stores the gradients of the initial states, and the zeros of the steps at which no row of the tile lives.
  __device__ __forceinline__ void finish(const float (&product)[4]) {
    if (units_.count == 0) return;
    carry(product);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!rows_.exists(j)) continue;
      const int64_t at = static_cast<int64_t>(rows_.slot(j)) * units_.hidden_size;
      units_.store(gather<scalar_t>(carried_[0], j), direction_.grad_h0 + at);
      if constexpr (kStates == 2) units_.store(gather<scalar_t>(carried_[1], j), direction_.grad_c0 + at);
      for (int index = 0; index < rows_.first(); ++index) {
        if (ended(index, j)) store_end(rows_.step(index), j);
      }
      for (int index = rows_.last(); index < sequence_.steps; ++index) {
        if (ended(index, j)) store_end(rows_.step(index), j);
      }
    }
  }

 private:
  __device__ __forceinline__ bool ended(int index, int j) const { return units_.count > 0 && rows_.ended(index, j); }
  __device__ __forceinline__ void step_row(int j) {
    float saved[kSaved + 1][2], state[2], before[2], grad_h[2], grad_c[2];
#pragma unroll
    for (int s = 0; s < kSaved; ++s) saved_[j][s].unpack(saved[s]);
    state_[j].unpack(state);
    before_[j].unpack(before);
    grad_output_[j].unpack(grad_h);
    grad_c_[j].unpack(grad_c);
    float grad_igates[kGates][2], grad_hgates[kGates][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = 2 * i + j;
      number_t from_x[kGates], from_h[kGates], previous[kStates] = {}, after[kStates] = {}, grad[kStates],
                                               grad_previous[kStates], save[kSaved + 1];
#pragma unroll
      for (int s = 0; s < kSaved; ++s) save[s] = number_t(saved[s][i]);
      // Of cells with two states backward reads the second alone.
      previous[kStates - 1] = number_t(kStates == 2 && cuts_[j] ? 0.0f : before[i]);
      after[kStates - 1] = number_t(state[i]);
      grad[0] = number_t(carried_[0][at] + grad_h[i]);
      if constexpr (kStates == 2) grad[1] = number_t(carried_[1][at] + grad_c[i]);
      Cell::backward(save, previous, after, grad, from_x, from_h, grad_previous);
#pragma unroll
      for (int s = 0; s < kStates; ++s) carried_[s][at] = float(grad_previous[s]);
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        grad_igates[g][i] = float(from_x[g]);
        grad_hgates[g][i] = float(from_h[g]);
      }
    }
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      grad_hgates_[j][g] = Pair<scalar_t>(grad_hgates[g]);
      if constexpr (Cell::kSplitGates) grad_igates_[j][g] = Pair<scalar_t>(grad_igates[g]);
    }
  }
  __device__ __forceinline__ void fetch_row(int index, int j) {
    live_[j] = units_.count > 0 && index >= rows_.first() && rows_.lives(index, j);
    cut_[j] = 0;
    if (!live_[j]) return;
    cut_[j] = rows_.cut(index, j);
    const int step = rows_.step(index), slot = rows_.slot(j);
    const int64_t row = sequence_.row(step, slot);
    units_.template load<kSaved>(direction_.saved + row * kSaved * units_.hidden_size, saved_[j]);
    if constexpr (kStates == 2) {
      const int before = rows_.step(index - 1);
      const bool starts = before < 0 || !rows_.lives(index - 1, j);
      state_[j] = units_.load(direction_.c.at(sequence_, row, step, slot));
      before_[j] = units_.load(starts ? direction_.c0 + static_cast<int64_t>(slot) * units_.hidden_size
                                      : direction_.c.at(sequence_, sequence_.row(before, slot), before, slot));
    } else {
      state_[j] = units_.load(direction_.output.at(sequence_, row, step, slot));
      before_[j] = units_.load(direction_.h_prev + row * units_.hidden_size);  // zero behind a reset
    }
    if (direction_.grad_output.data != nullptr) {
      grad_output_[j] = units_.load(direction_.grad_output.at(sequence_, row, step, slot));
    }
    if (kStates == 2 && direction_.grad_c.data != nullptr) {
      grad_c_[j] = units_.load(direction_.grad_c.at(sequence_, row, step, slot));
    }
  }
  // The gradient of the state before a step: the cell's own, and through W_hh; none where a reset cut that state.
  __device__ __forceinline__ void carry(const float (&product)[4]) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!carries_[j]) continue;
#pragma unroll
      for (int at = j; at < 4; at += 2) {
        carried_[0][at] = cuts_[j] ? 0.0f : carried_[0][at] + product[at];
        if constexpr (kStates == 2) carried_[1][at] = cuts_[j] ? 0.0f : carried_[1][at];
      }
    }
  }
  __device__ __forceinline__ void store_end(int step, int j) const {
    const Pair<scalar_t> zero[kGates];
    const int64_t row = sequence_.row(step, rows_.slot(j)) * kGates * units_.hidden_size;
    units_.template store<kGates>(zero, direction_.grad_igates + row);
    if constexpr (Cell::kSplitGates) units_.template store<kGates>(zero, direction_.grad_hgates + row);
  }

  const DeviceSequence& sequence_;
  const BackwardDirection<scalar_t>& direction_;
  const LaneRows rows_;
  const LaneUnits units_;
  // Of the step computed last.
  float carried_[kStates][4] = {};              // [state][2 i + j]: gradient of the state
  Pair<scalar_t> grad_hgates_[2][kGates] = {};  // [j][gate]
  Pair<scalar_t> grad_igates_[2][kGates] = {};  // likewise: cells with split gates
  bool carries_[2] = {};                        // whether the row lived
  unsigned cuts_[2] = {};                       // whether a reset cut
  // Of the step to come; [j].
  Pair<scalar_t> saved_[2][kSaved + 1] = {}, state_[2] = {}, before_[2] = {}, grad_output_[2] = {}, grad_c_[2] = {};
  bool live_[2] = {};
  unsigned cut_[2] = {};
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

template <class scalar_t>
BackwardLayerOnDevice<scalar_t> backward_on_device(const LayerBackward& layer, const BackwardProducts (&products)[2]) {
  BackwardLayerOnDevice<scalar_t> result;
  result.hidden_size = static_cast<int>(layer.hidden_size);
  result.paired = layer.hidden_size % 2 == 0;
  for (int k = 0; k < layer.directions; ++k) {
    const DirectionBackward& from = layer.direction[k];
    BackwardDirection<scalar_t>& to = result.direction[k];
    to.w_hh = static_cast<const scalar_t*>(from.weights.w_hh);
    to.c0 = static_cast<const scalar_t*>(from.c0);
    to.h_prev = static_cast<const scalar_t*>(products[k].h_prev);
    to.saved = static_cast<const scalar_t*>(from.saved);
    to.output = DeviceRows<const scalar_t>(from.output);
    to.c = DeviceRows<const scalar_t>(from.c);
    to.grad_output = DeviceRows<const scalar_t>(from.grad_output);
    to.grad_c = DeviceRows<const scalar_t>(from.grad_c);
    to.grad_h_n = static_cast<const scalar_t*>(from.grad_h_n);
    to.grad_c_n = static_cast<const scalar_t*>(from.grad_c_n);
    to.grad_h0 = static_cast<scalar_t*>(from.grad_h0);
    to.grad_c0 = static_cast<scalar_t*>(from.grad_c0);
    to.grad_igates = static_cast<scalar_t*>(from.grad_igates);
    to.grad_hgates = static_cast<scalar_t*>(from.grad_hgates);
    to.reverse = from.reverse;
    for (const void* data :
         {from.c0, static_cast<const void*>(products[k].h_prev), from.saved, from.grad_h_n, from.grad_c_n,
          static_cast<const void*>(from.grad_h0), static_cast<const void*>(from.grad_c0),
          static_cast<const void*>(from.grad_igates), static_cast<const void*>(from.grad_hgates)}) {
      result.paired = result.paired && aligned_for_pairs<scalar_t>(data);
    }
    for (const Rows* rows : {&from.output, &from.c, &from.grad_output, &from.grad_c}) {
      result.paired = result.paired && aligned_for_pairs<scalar_t>(*rows);
    }
  }
  return result;
}

}  // namespace rnnfast::cuda
