// Owns: what one lane of a persistent kernel does beside the product: the cell of its two hidden units and two batch
// rows (TileLane), all through the sequence, with the state in registers; which of its rows live, where a reset cuts;
// loads of the step to come, stores of the step that was. Must not know: equations (csrc/cell has them), where W lies,
// how h travels.
//
//     ForwardLane lane(...);                            state = h0, c0
//     lane.begin(first)                                 a reset before it cuts lane.operand()
//     lane.advance(first)
//     for index in lane.first() .. lane.last():
//       hgates = W_hh lane.operand()                    the engine's
//       lane.step(index, hgates)
//       lane.advance(index + 1)                         behind what others wait for, lane.operand()
//     lane.finish()                                     h_n, c_n
//
//     BackwardLane lane(...);                           gradients of h_n, c_n
//     lane.begin(last - 1)                              what forward left, and the gradient of the output
//     for index in lane.last() - 1 .. lane.first():
//       lane.step(index, product)
//       lane.advance(index - 1)                         behind what others wait for, lane.operand()
//       product = sum over gates of W_hh^T lane.operand()
//     lane.finish(first, product)                       gradients of h0, c0
//
// advance stores the step that was, and loads what the step to come reads. A lane computes its units and rows as one
// LaneNumber, and loads and stores them without a branch for each: between branches the compiler can have the
// instructions of one fill the time that another's take.
//
// An index counts steps in the direction's own order. Batch rows past the batch and hidden units past H take part in
// the product with harmless numbers; nothing of them is stored.
#pragma once

#include <cstdint>

#include "cell/cells.h"
#include "device_sequence.cuh"
#include "recurrent_tile.cuh"
#include "storage.cuh"

namespace rnnfast::cuda {

template <class scalar_t>
struct ForwardDirectionOnDevice {
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
struct BackwardDirectionOnDevice {
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
  int64_t compact_step = 0;  // from place to place in a compact buffer of one value a unit: H, or padded B*H
  bool paired = false;       // two units at a time can be loaded and stored
  DeviceSequence sequence;
  Direction direction[2];
};
template <class scalar_t>
using ForwardLayerOnDevice = LayerOnDevice<ForwardDirectionOnDevice<scalar_t>>;
template <class scalar_t>
using BackwardLayerOnDevice = LayerOnDevice<BackwardDirectionOnDevice<scalar_t>>;

// ------------------------------------------------------------------------------------------------ rows and time
// The two rows of a lane in time, neighbours in the batch. An idle lane has none.
class LaneRows {
 public:
  __device__ __forceinline__ LaneRows(const DeviceSequence& sequence, bool reverse, int first_row, bool idle = false)
      : sequence_(sequence), slot_(first_row + TileLane().row(0)), idle_(idle), reverse_(reverse) {
    int most = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      length_[j] = sequence.length(slot_ + j);
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
    if (idle) length_[0] = length_[1] = 0;
  }

  // Outside of [first, last) none of the tile's rows lives. The same for all lanes of all warps with these rows.
  __device__ __forceinline__ int first() const { return first_; }
  __device__ __forceinline__ int last() const { return last_; }

  __device__ __forceinline__ bool exists(int j) const { return !idle_ && slot_ + j < sequence_.batch; }
  __device__ __forceinline__ bool lives(int index, int j) const {
    return static_cast<unsigned>(step(index)) < static_cast<unsigned>(length_[j]);
  }
  // Calls function(index, wanted) for the steps at which one of the two rows exists and does not live, where results
  // are zero. Without lengths there are none.
  template <class Function>
  __device__ __forceinline__ void for_each_ended(const Function& function) const {
    if (sequence_.lengths == nullptr) return;
    for (int index = 0; index < sequence_.steps; ++index) {
      const bool ended[2] = {exists(0) && !lives(index, 0), exists(1) && !lives(index, 1)};
      if (ended[0] || ended[1]) function(index, ended);
    }
  }

  // Where steps lie in DeviceRows; of one outside of the sequence anything.
  template <int kSteps>
  __device__ __forceinline__ void places(const int (&index)[kSteps], int64_t (&place)[kSteps]) const {
    if (sequence_.offsets == nullptr) {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) place[k] = step(index[k]);
    } else {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) place[k] = in_sequence(index[k]) ? sequence_.offsets[step(index[k])] : 0;
    }
  }
  __device__ __forceinline__ int64_t place(int index) const {
    int64_t result[1];
    places({index}, result);
    return result[0];
  }
  // Loads whether a reset cuts the state on the way into a step: then not 0. Forward crosses the border before it,
  // reverse the one behind.
  __device__ __forceinline__ void load_cut(int index, int j, unsigned& cut) const {
    const int border = reverse_ ? step(index) + 1 : step(index);
    const bool crosses = lives(index, j) && border < length_[j];
    cut = 0;
    device::load_byte_if(crosses, sequence_.reset + (crosses ? sequence_.row(border, slot_ + j) : 0), cut);
  }

 private:
  __device__ __forceinline__ int step(int index) const { return reverse_ ? sequence_.steps - 1 - index : index; }
  __device__ __forceinline__ bool in_sequence(int index) const {
    return static_cast<unsigned>(index) < static_cast<unsigned>(sequence_.steps);
  }

  const DeviceSequence& sequence_;
  int slot_, length_[2], first_ = 0, last_ = 0;
  bool idle_, reverse_;
};

// Where a lane's units and rows lie in memory. It has two units, or one, or none: then it must not load and store.
class LaneMemory {
 public:
  __device__ __forceinline__ LaneMemory(int hidden_size, int64_t compact_step, int first_unit, int first_row,
                                        bool paired)
      : hidden_size_(hidden_size),
        compact_step_(compact_step),
        unit_(first_unit + TileLane().unit(0)),
        slot_(first_row + TileLane().row(0)),
        paired_(paired) {}

  __device__ __forceinline__ int units() const {
    const int left = hidden_size_ - unit_;
    return left < 0 ? 0 : left > 2 ? 2 : left;
  }

  // Where the units of the first row lie at place 0; null where there is no tensor. Computed once: the compiler, which
  // would do it again at each step, must not see how.
  template <class T>
  __device__ __forceinline__ T* origin(T* data, int64_t row_stride) const {
    return data == nullptr ? nullptr : device::opaque(data + slot_ * row_stride + unit_);
  }

  // Calls function(access), once for all that is to be loaded or stored together: whether units move in pairs is the
  // same for all.
  template <class Function>
  __device__ __forceinline__ void visit(const Function& function) const {
    if (paired_) {
      function(Access<true>{hidden_size_, 2, compact_step_});
    } else {
      function(Access<false>{hidden_size_, units(), compact_step_});
    }
  }

  // A tensor [B, H].
  template <class scalar_t>
  __device__ __forceinline__ void load_state(const scalar_t* from, const bool (&wanted)[2],
                                             Pair<scalar_t> (&pairs)[2][1]) const {
    visit([&](auto access) { access.template load<1>(origin(from, hidden_size_), hidden_size_, wanted, pairs); });
  }
  template <class scalar_t>
  __device__ __forceinline__ void store_state(const Pair<scalar_t> (&pairs)[2][1], const bool (&wanted)[2],
                                              scalar_t* to) const {
    visit([&](auto access) { access.template store<1>(pairs, wanted, origin(to, hidden_size_), hidden_size_); });
  }

 private:
  // Loads and stores all parts of two rows [parts, H], `stride` apart, of those that are wanted.
  template <bool kPaired>
  struct Access {
    int hidden_size, units;
    int64_t compact_step;

    template <int kParts, class scalar_t, int kRoom>
    __device__ __forceinline__ void load(const scalar_t* row, int64_t stride, const bool (&wanted)[2],
                                         Pair<scalar_t> (&parts)[2][kRoom]) const {
      each<kParts>(row, stride, [&](int j, int n, const scalar_t* at) {
        if constexpr (kPaired) {
          parts[j][n].load_if(wanted[j], at);
        } else if (wanted[j]) {
          parts[j][n] = Pair<scalar_t>::load(at, units);
        }
      });
    }
    template <int kParts, class scalar_t, int kRoom>
    __device__ __forceinline__ void store(const Pair<scalar_t> (&parts)[2][kRoom], const bool (&wanted)[2],
                                          scalar_t* row, int64_t stride) const {
      each<kParts>(row, stride, [&](int j, int n, scalar_t* at) {
        if constexpr (kPaired) {
          parts[j][n].store_if(wanted[j], at);
        } else if (wanted[j]) {
          parts[j][n].store(at, units);
        }
      });
    }

    // The same in a compact buffer, at a place in time.
    template <int kParts, class scalar_t, int kRoom>
    __device__ __forceinline__ void load_compact(const scalar_t* first, int64_t place, const bool (&wanted)[2],
                                                 Pair<scalar_t> (&parts)[2][kRoom]) const {
      load<kParts>(first + place * compact_step * kParts, kParts * hidden_size, wanted, parts);
    }
    template <int kParts, class scalar_t, int kRoom>
    __device__ __forceinline__ void store_compact(const Pair<scalar_t> (&parts)[2][kRoom], const bool (&wanted)[2],
                                                  scalar_t* first, int64_t place) const {
      store<kParts>(parts, wanted, first + place * compact_step * kParts, kParts * hidden_size);
    }

   private:
    template <int kParts, class T, class Function>
    __device__ __forceinline__ void each(T* row, int64_t stride, const Function& function) const {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int n = 0; n < kParts; ++n) function(j, n, row + static_cast<unsigned>(n * hidden_size));
        row += stride;
      }
    }
  };

  int hidden_size_;
  int64_t compact_step_;
  int unit_, slot_;
  bool paired_;
};

// A lane's two units of its two rows: what lies in memory as a pair of units for each row is to a cell one number,
// value[2 i + j]; and back.
template <class Number, class scalar_t>
__device__ __forceinline__ Number number_of(const Pair<scalar_t>& row0, const Pair<scalar_t>& row1) {
  float units[2][2];
  row0.unpack(units[0]);
  row1.unpack(units[1]);
  return Number({units[0][0], units[1][0], units[0][1], units[1][1]});
}
template <class scalar_t, class Number>
__device__ __forceinline__ Pair<scalar_t> pair_of(const Number& number, int j) {
  const float units[2] = {number[j], number[2 + j]};
  return Pair<scalar_t>(units);
}
// The rows of `there` that live, and of `other` those that do not.
template <class Number>
__device__ __forceinline__ Number where(const bool (&live)[2], const Number& there, const Number& other) {
  return Number({live[0] ? there[0] : other[0], live[1] ? there[1] : other[1], live[0] ? there[2] : other[2],
                 live[1] ? there[3] : other[3]});
}
// The rows that no reset cut; of the others zero.
template <class Number>
__device__ __forceinline__ Number uncut(const unsigned (&cut)[2], const Number& number) {
  return where({cut[0] == 0, cut[1] == 0}, number, Number(0));
}

// ------------------------------------------------------------------------------------------------ forward
// Number is what the cell computes with, as the product's arithmetic says.
template <class Cell, class scalar_t, class Number>
class ForwardLane {
 public:
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;

  __device__ __forceinline__ ForwardLane(const ForwardLayerOnDevice<scalar_t>& layer,
                                         const ForwardDirectionOnDevice<scalar_t>& direction, int first_row,
                                         int first_unit)
      : sequence_(layer.sequence),
        direction_(direction),
        memory_(layer.hidden_size, layer.compact_step, first_unit, first_row, layer.paired),
        rows_(layer.sequence, direction.reverse, first_row, memory_.units() == 0),
        igates_(memory_.origin(direction.igates, kGates * layer.hidden_size)),
        output_(memory_.origin(direction.output.data, direction.output.stride_b)),
        c_output_(memory_.origin(direction.c.data, direction.c.stride_b)),
        saved_output_(memory_.origin(direction.saved, kSaved * layer.hidden_size)) {
    const bool exist[2] = {rows_.exists(0), rows_.exists(1)};
    memory_.load_state(direction_.h0, exist, h_);
    if constexpr (kStates == 2) {
      Pair<scalar_t> c[2][1];
      memory_.load_state(direction_.c0, exist, c);
      c_ = number_of<Number>(c[0][0], c[1][0]);
    }
    if (direction_.b_hh != nullptr) {
      Pair<scalar_t> bias[2][kGates];  // of the first row alone: it is that of all
      memory_.visit([&](auto access) {
        access.template load<kGates>(memory_.origin(direction_.b_hh, 0), 0, {memory_.units() > 0, false}, bias);
      });
#pragma unroll
      for (int g = 0; g < kGates; ++g) bias[0][g].unpack(bias_[g]);
    }
  }

  __device__ __forceinline__ int first() const { return rows_.first(); }
  __device__ __forceinline__ int last() const { return rows_.last(); }

  // Looks at the resets before the first of the steps and behind it.
  __device__ __forceinline__ void begin(int index) {
    if (sequence_.reset == nullptr) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      rows_.load_cut(index, j, cut_[j]);
      rows_.load_cut(index + 1, j, next_cut_[j]);
    }
  }

  // On to a step: stores the one before it, and loads what it reads.
  __device__ __forceinline__ void advance(int index) {
    int64_t place[2];
    rows_.places({index - 1, index}, place);
    memory_.visit([&](auto access) {
      fetch(access, index, place[1]);
      store(access, index - 1, place[0]);
    });
    if (sequence_.reset == nullptr) return;
    if constexpr (kStates == 2) c_ = uncut(cut_, c_);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      h_[j][0] = operand(j);
      // A step ahead of what is loaded above, for the next operand wants it before that is read.
      cut_[j] = next_cut_[j];
      rows_.load_cut(index + 2, j, next_cut_[j]);
    }
  }

  // The h that the next step's product reads: of units 0 and 1, batch row j.
  __device__ __forceinline__ Pair<scalar_t> operand(int j) const { return cut_[j] ? Pair<scalar_t>() : h_[j][0]; }

  // hgates[gate][2 i + j] is W_hh h, without bias, of unit i and batch row j.
  __device__ __forceinline__ void step(int index, const float (&hgates)[kGates][4]) {
    Number from_x[kGates], from_h[kGates], before[kStates], after[kStates], saved[kSaved + 1];
#pragma unroll
    for (int g = 0; g < kGates; ++g) {
      from_x[g] = number_of<Number>(next_[0][g], next_[1][g]);
      from_h[g] = Number(hgates[g]) + Number({bias_[g][0], bias_[g][0], bias_[g][1], bias_[g][1]});
    }
    before[0] = number_of<Number>(h_[0][0], h_[1][0]);
    if constexpr (kStates == 2) before[1] = c_;
    Cell::forward(from_x, from_h, before, after, saved);
    const bool live[2] = {rows_.lives(index, 0), rows_.lives(index, 1)};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (live[j]) h_[j][0] = pair_of<scalar_t>(after[0], j);
#pragma unroll
      for (int s = 0; s < kSaved; ++s) saved_[j][s] = pair_of<scalar_t>(saved[s], j);
    }
    if constexpr (kStates == 2) c_ = where(live, after[1], c_);
  }

  // Stores the last states, and the zeros of rows that have ended.
  __device__ __forceinline__ void finish() const {
    const bool exist[2] = {rows_.exists(0), rows_.exists(1)};
    memory_.store_state(h_, exist, direction_.h_n);
    if constexpr (kStates == 2) {
      const Pair<scalar_t> c[2][1] = {{pair_of<scalar_t>(c_, 0)}, {pair_of<scalar_t>(c_, 1)}};
      memory_.store_state(c, exist, direction_.c_n);
    }
    const Pair<scalar_t> zero[2][1];
    rows_.for_each_ended([&](int index, const bool(&ended)[2]) {
      memory_.visit([&](auto access) { store_states(access, rows_.place(index), ended, zero, zero); });
    });
  }

 private:
  template <class Access>
  __device__ __forceinline__ void fetch(const Access& access, int index, int64_t place) {
    const bool live[2] = {rows_.lives(index, 0), rows_.lives(index, 1)};
    access.template load_compact<kGates>(igates_, place, live, next_);
  }
  template <class Access>
  __device__ __forceinline__ void store(const Access& access, int index, int64_t place) const {
    const bool live[2] = {rows_.lives(index, 0), rows_.lives(index, 1)};
    Pair<scalar_t> c[2][1];
    if constexpr (kStates == 2) {
#pragma unroll
      for (int j = 0; j < 2; ++j) c[j][0] = pair_of<scalar_t>(c_, j);
    }
    store_states(access, place, live, h_, c);
    if (kSaved > 0 && saved_output_ != nullptr) {
      access.template store_compact<kSaved>(saved_, live, saved_output_, place);
    }
  }
  template <class Access>
  __device__ __forceinline__ void store_states(const Access& access, int64_t place, const bool (&wanted)[2],
                                               const Pair<scalar_t> (&h)[2][1], const Pair<scalar_t> (&c)[2][1]) const {
    access.template store<1>(h, wanted, output_ + place * direction_.output.stride_t, direction_.output.stride_b);
    if (kStates == 2 && c_output_ != nullptr) {
      access.template store<1>(c, wanted, c_output_ + place * direction_.c.stride_t, direction_.c.stride_b);
    }
  }

  const DeviceSequence& sequence_;
  const ForwardDirectionOnDevice<scalar_t>& direction_;
  const LaneMemory memory_;
  const LaneRows rows_;
  const scalar_t* const igates_;  // of the lane's units, likewise the next three
  scalar_t* const output_;
  scalar_t* const c_output_;
  scalar_t* const saved_output_;
  Pair<scalar_t> h_[2][1] = {};               // [j], as it is stored
  Number c_ = Number(0);                      // cells with two states
  float bias_[kGates][2] = {};                // [gate][i]
  Pair<scalar_t> next_[2][kGates] = {};       // [j][gate]: igates of the step to come
  unsigned cut_[2] = {}, next_cut_[2] = {};   // before the step to come, and before the one behind it, if not 0
  Pair<scalar_t> saved_[2][kSaved + 1] = {};  // [j][value], of the step computed last
};

// ------------------------------------------------------------------------------------------------ backward
template <class Cell, class scalar_t, class Number>
class BackwardLane {
 public:
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates, kSaved = Cell::kSaved;

  __device__ __forceinline__ BackwardLane(const BackwardLayerOnDevice<scalar_t>& layer,
                                          const BackwardDirectionOnDevice<scalar_t>& direction, int first_row,
                                          int first_unit)
      : sequence_(layer.sequence),
        direction_(direction),
        memory_(layer.hidden_size, layer.compact_step, first_unit, first_row, layer.paired),
        rows_(layer.sequence, direction.reverse, first_row, memory_.units() == 0),
        saved_(memory_.origin(direction.saved, kSaved * layer.hidden_size)),
        states_(memory_.origin(of_states().data, of_states().stride_b)),
        h_prev_(memory_.origin(direction.h_prev, layer.hidden_size)),
        grad_output_(memory_.origin(direction.grad_output.data, direction.grad_output.stride_b)),
        grad_igates_(memory_.origin(direction.grad_igates, kGates * layer.hidden_size)),
        grad_hgates_(memory_.origin(direction.grad_hgates, kGates * layer.hidden_size)) {
    const bool exist[2] = {rows_.exists(0), rows_.exists(1)};
    const scalar_t* const last[2] = {direction_.grad_h_n, direction_.grad_c_n};
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      Pair<scalar_t> grad[2][1];
      if (last[s] != nullptr) memory_.load_state(last[s], exist, grad);
      carried_[s] = number_of<Number>(grad[0][0], grad[1][0]);
    }
  }

  __device__ __forceinline__ int first() const { return rows_.first(); }
  __device__ __forceinline__ int last() const { return rows_.last(); }

  // Makes ready for the first of the steps, which is the last in time.
  __device__ __forceinline__ void begin(int index) {
    memory_.visit([&](auto access) {
      if constexpr (kStates == 2) {
        fetch_c(access, index, rows_.place(index));
        share_c();
      }
      fetch(access, index, rows_.place(index), rows_.place(index - 1));
    });
    if (sequence_.reset == nullptr) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) rows_.load_cut(index, j, cut_[j]);
  }

  // product[2 i + j] is the sum over gates of W_hh^T times the operand of the step computed before this one, index + 1;
  // at first it is not read.
  __device__ __forceinline__ void step(int index, const float (&product)[4]) {
    carry(index + 1, product);
    Number saved[kSaved + 1], previous[kStates], state[kStates], grad[kStates];
    Number from_x[kGates], from_h[kGates], grad_previous[kStates];
#pragma unroll
    for (int s = 0; s < kSaved; ++s) saved[s] = number_of<Number>(next_.saved[0][s], next_.saved[1][s]);
    // Of cells with two states backward reads the second alone.
    state[kStates - 1] = number_of<Number>(next_.state[0][0], next_.state[1][0]);
    previous[kStates - 1] = number_of<Number>(next_.previous[0][0], next_.previous[1][0]);
    grad[0] = carried_[0] + number_of<Number>(next_.grad_output[0][0], next_.grad_output[1][0]);
    if constexpr (kStates == 2) {
      grad[1] = carried_[1] + number_of<Number>(next_.grad_c[0][0], next_.grad_c[1][0]);
      if (sequence_.reset != nullptr) previous[1] = uncut(cut_, previous[1]);
    }
    Cell::backward(saved, previous, state, grad, from_x, from_h, grad_previous);
    const bool live[2] = {rows_.lives(index, 0), rows_.lives(index, 1)};
#pragma unroll
    for (int s = 0; s < kStates; ++s) carried_[s] = where(live, grad_previous[s], carried_[s]);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) {
        from_h_[j][g] = live[j] ? pair_of<scalar_t>(from_h[g], j) : Pair<scalar_t>();
        if (Cell::kSplitGates) from_x_[j][g] = live[j] ? pair_of<scalar_t>(from_x[g], j) : Pair<scalar_t>();
      }
    }
  }

  // On to a step: stores the one computed before it, index + 1, and loads what it reads.
  __device__ __forceinline__ void advance(int index) {
    if constexpr (kStates == 2) share_c();
    int64_t place[3];
    rows_.places({index + 1, index, index - 1}, place);
    memory_.visit([&](auto access) {
      fetch(access, index, place[1], place[2]);
      store(access, place[0], {rows_.lives(index + 1, 0), rows_.lives(index + 1, 1)});
    });
    if (sequence_.reset == nullptr) return;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      last_cut_[j] = cut_[j];
      rows_.load_cut(index, j, cut_[j]);
    }
  }

  // The gradient of a gate's hidden half, of units 0 and 1, batch row j: what the product of this step reads.
  __device__ __forceinline__ Pair<scalar_t> operand(int gate, int j) const { return from_h_[j][gate]; }

  // Behind the last of the steps: stores the gradients of the initial states, and the zeros of rows that have ended.
  __device__ __forceinline__ void finish(int index, const float (&product)[4]) {
    carry(index, product);
    const bool exist[2] = {rows_.exists(0), rows_.exists(1)};
    scalar_t* const initial[2] = {direction_.grad_h0, direction_.grad_c0};
#pragma unroll
    for (int s = 0; s < kStates; ++s) {
      const Pair<scalar_t> grad[2][1] = {{pair_of<scalar_t>(carried_[s], 0)}, {pair_of<scalar_t>(carried_[s], 1)}};
      memory_.store_state(grad, exist, initial[s]);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int g = 0; g < kGates; ++g) from_x_[j][g] = from_h_[j][g] = {};
    }
    rows_.for_each_ended([&](int index, const bool(&ended)[2]) {
      memory_.visit([&](auto access) { store(access, rows_.place(index), ended); });
    });
  }

 private:
  __device__ __forceinline__ const DeviceRows<const scalar_t>& of_states() const {
    return kStates == 2 ? direction_.c : direction_.output;
  }

  template <class Access>
  __device__ __forceinline__ void fetch(const Access& access, int index, int64_t place, int64_t place_before) {
    const bool live[2] = {rows_.lives(index, 0), rows_.lives(index, 1)};
    access.template load_compact<kSaved>(saved_, place, live, next_.saved);
    if constexpr (kStates == 2) {
      fetch_c(access, index - 1, place_before);
    } else {
      load(access, states_, of_states(), place, live, next_.state);
      access.template load_compact<1>(h_prev_, place, live, next_.previous);  // zero behind a reset
    }
    if (grad_output_ != nullptr) {
      load(access, grad_output_, direction_.grad_output, place, live, next_.grad_output);
    }
    if (kStates == 2 && direction_.grad_c.data != nullptr) {
      // Rarely there, so that its address has no registers of its own.
      const DeviceRows<const scalar_t>& grad_c = direction_.grad_c;
      load(access, memory_.origin(grad_c.data, grad_c.stride_b), grad_c, place, live, next_.grad_c);
    }
  }
  // c of a step is what the one computed before it had as the c before.
  __device__ __forceinline__ void share_c() {
#pragma unroll
    for (int j = 0; j < 2; ++j) next_.state[j][0] = next_.previous[j][0];
  }
  // Loads the c of a step, as what the one behind it reads; of rows that begin there, c0.
  template <class Access>
  __device__ __forceinline__ void fetch_c(const Access& access, int index, int64_t place) {
    bool lives[2], begins[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      lives[j] = rows_.lives(index, j);
      begins[j] = !lives[j] && rows_.lives(index + 1, j);
    }
    load(access, states_, of_states(), place, lives, next_.previous);
    if (begins[0] || begins[1]) memory_.load_state(direction_.c0, begins, next_.previous);
  }
  template <class Access>
  __device__ __forceinline__ void load(const Access& access, const scalar_t* first,
                                       const DeviceRows<const scalar_t>& rows, int64_t place, const bool (&wanted)[2],
                                       Pair<scalar_t> (&pairs)[2][1]) const {
    access.template load<1>(first + place * rows.stride_t, rows.stride_b, wanted, pairs);
  }
  template <class Access>
  __device__ __forceinline__ void store(const Access& access, int64_t place, const bool (&wanted)[2]) const {
    access.template store_compact<kGates>(Cell::kSplitGates ? from_x_ : from_h_, wanted, grad_igates_, place);
    if constexpr (Cell::kSplitGates) access.template store_compact<kGates>(from_h_, wanted, grad_hgates_, place);
  }
  // The gradient of the state before a step: the cell's own, and through W_hh; none where a reset cut that state.
  __device__ __forceinline__ void carry(int index, const float (&product)[4]) {
    carried_[0] = where({rows_.lives(index, 0), rows_.lives(index, 1)}, carried_[0] + Number(product), carried_[0]);
    if (sequence_.reset == nullptr) return;
#pragma unroll
    for (int s = 0; s < kStates; ++s) carried_[s] = uncut(last_cut_, carried_[s]);
  }

  const DeviceSequence& sequence_;
  const BackwardDirectionOnDevice<scalar_t>& direction_;
  const LaneMemory memory_;
  const LaneRows rows_;
  const scalar_t* const saved_;  // of the lane's units, likewise the next five
  const scalar_t* const states_;
  const scalar_t* const h_prev_;
  const scalar_t* const grad_output_;
  scalar_t* const grad_igates_;
  scalar_t* const grad_hgates_;
  // Of the step computed last: the gradients of the state, of the igates in cells with split gates, of the hgates.
  Number carried_[kStates];
  Pair<scalar_t> from_x_[2][kGates] = {}, from_h_[2][kGates] = {};  // [j][gate]
  unsigned last_cut_[2] = {};                                       // whether a reset cut the state before it
  // Of the step to come; [j][value].
  struct {
    Pair<scalar_t> saved[2][kSaved + 1], state[2][1], previous[2][1], grad_output[2][1], grad_c[2][1];
  } next_;
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
  result.compact_step = layer.hidden_size * (layer.sequence.packed ? 1 : layer.sequence.batch);
  result.paired = layer.hidden_size % 2 == 0;
  for (int k = 0; k < layer.directions; ++k) {
    const DirectionForward& from = layer.direction[k];
    ForwardDirectionOnDevice<scalar_t>& to = result.direction[k];
    to.w_hh = static_cast<const scalar_t*>(from.weights.w_hh);
    to.b_hh = static_cast<const scalar_t*>(from.weights.b_hh);
    to.h0 = static_cast<const scalar_t*>(from.h0);
    to.c0 = static_cast<const scalar_t*>(from.c0);
    to.igates = static_cast<const scalar_t*>(from.igates);
    to.output = DeviceRows<scalar_t>(from.output, layer.sequence);
    to.c = DeviceRows<scalar_t>(from.c, layer.sequence);
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
  result.compact_step = layer.hidden_size * (layer.sequence.packed ? 1 : layer.sequence.batch);
  result.paired = layer.hidden_size % 2 == 0;
  for (int k = 0; k < layer.directions; ++k) {
    const DirectionBackward& from = layer.direction[k];
    BackwardDirectionOnDevice<scalar_t>& to = result.direction[k];
    to.w_hh = static_cast<const scalar_t*>(from.weights.w_hh);
    to.c0 = static_cast<const scalar_t*>(from.c0);
    to.h_prev = static_cast<const scalar_t*>(products[k].h_prev);
    to.saved = static_cast<const scalar_t*>(from.saved);
    to.output = DeviceRows<const scalar_t>(from.output, layer.sequence);
    to.c = DeviceRows<const scalar_t>(from.c, layer.sequence);
    to.grad_output = DeviceRows<const scalar_t>(from.grad_output, layer.sequence);
    to.grad_c = DeviceRows<const scalar_t>(from.grad_c, layer.sequence);
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
