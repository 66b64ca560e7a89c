// Owns: the derivative of a layer along a tangent of its arguments, and that of its backward: the two loops over time.
// Must not know: equations (the cell has them), products over all steps, tensors.
//
// Forward: a step adds h' W_hh^T, h' the tangent of the state before it, to the tangents of its gates, and the cell
// makes the tangent of the new state of them. Every state and gate is known.
// Backward: from the last step to the first, the cell on dual numbers turns the gradient of a step's state, with its
// tangent, into those of the gates; then, of the step before,
//   grad_h = grad_hgates W_hh       grad_h' = grad_hgates' W_hh + grad_hgates W_hh'
// States are read where the tensors have them, so only backward carries anything from step to step.
//
// Included once per instruction set, after layer.h. Storage and arithmetic have one type here.

namespace rnnfast::cpu::RNNFAST_ISA {

template <class Cell, class S>
class Tangent {
  static_assert(std::is_same_v<S, acc_t<S>>, "tangents are float32 or float64");
  using V = Vec<S>;
  using W = Dual<V>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int G = Cell::kGates;
  using HiddenMatrix = std::conditional_t<is_diagonal<Cell>, GateDiagonal<S>, GateMatrix<S>>;
  using HiddenColumns = std::conditional_t<is_diagonal<Cell>, ColumnDiagonal<S>, ColumnMatrix<S>>;

  struct Shared {
    S* gate_panels;    // forward: W_hh as a GateMatrix
    S* bias;           // zeros
    S* column_panels;  // backward: W_hh as a ColumnMatrix
    S* t_panels;       // and its tangent
    S* zeros;          // [H]
    S* grad_h;         // [B, 2, ld]: each row's gradient, then its tangent
    S* grad_c;         // [B, 2, ld]
  };

 public:
  static size_t workspace_bytes(const LayerTangent& l, int threads) {
    Carver carver(nullptr);
    for (int d = 0; d < l.directions; ++d) carve(l, widest_member(l, plan_of(l, threads)), carver);
    return carver.used();
  }
  static void run_forward(const LayerTangent& l, void* workspace, int threads) {
    run(l, workspace, threads, [](const Tangent& direction) { direction.forward(); });
  }
  static void run_backward(const LayerTangent& l, void* workspace, int threads) {
    run(l, workspace, threads, [](const Tangent& direction) { direction.backward(); });
  }

 private:
  template <class F>
  static void run(const LayerTangent& l, void* workspace, int threads, const F& f) {
    const Plan plan = plan_of(l, threads);
    const size_t part = workspace_bytes(l, threads) / l.directions;
    Barrier barriers[2];
    run_team(plan.threads, [&](int rank, int size) {
      FlushDenormals flush;
      for_directions(l.directions, rank, size, plan.divide, barriers, [&](int d, const Member& member) {
        Carver carver(static_cast<char*>(workspace) + d * part);
        f(Tangent(l, l.direction[d], member, carve(l, widest_member(l, plan), carver)));
      });
    });
  }

  static Plan plan_of(const LayerTangent& l, int threads) {
    const int64_t inputs = is_diagonal<Cell> ? 1 : l.hidden_size;
    return make_plan(G, inputs, l.hidden_size, inputs, l.directions, l.sequence, sizeof(S), /*whole_rows=*/false,
                     threads);
  }
  static Member widest_member(const LayerTangent& l, const Plan& plan) {
    const bool split = l.directions == 2 && plan.threads > 1;
    return Member{0, split ? (plan.threads + 1) / 2 : plan.threads, plan.divide, nullptr};
  }
  // A block is one vector of units, or as many as fill four vectors of gates.
  static UnitBlocks gate_blocks(const LayerTangent& l, const Member& m) {
    return unit_blocks<S>(G, l.hidden_size, m.divide);
  }
  static UnitBlocks column_blocks(const LayerTangent& l, const Member& m) {
    UnitBlocks blocks;
    blocks.units = l.hidden_size;
    blocks.lanes = kLanes;
    blocks.block = kLanes * (m.divide == Divide::units ? 1 : kMaxVectors);
    return blocks;
  }
  static int64_t ld(const LayerTangent& l) { return round_up(l.hidden_size, kLanes); }

  static Shared carve(const LayerTangent& l, const Member& m, Carver& carver) {
    const UnitBlocks gates = gate_blocks(l, m);
    const int64_t H = l.hidden_size, B = l.sequence.batch;
    Shared s{};
    s.gate_panels = carver.take<S>(HiddenMatrix::packed_units(gates, H));
    s.bias = carver.take<S>(gates.columns());
    s.column_panels = carver.take<S>(HiddenColumns::packed_units(column_blocks(l, m), G * H));
    s.t_panels = carver.take<S>(HiddenColumns::packed_units(column_blocks(l, m), G * H));
    s.zeros = carver.take<S>(H);
    s.grad_h = carver.take<S>(B * 2 * ld(l));
    s.grad_c = carver.take<S>(B * 2 * ld(l));
    return s;
  }

  Tangent(const LayerTangent& layer, const DirectionTangent& direction, const Member& member, const Shared& shared)
      : l_(layer),
        d_(direction),
        m_(member),
        s_(layer.sequence),
        H_(layer.hidden_size),
        ld_(ld(layer)),
        shared_(shared),
        gates_(gate_blocks(layer, member)),
        columns_(column_blocks(layer, member)),
        rows_(row_share(s_, member)) {}

  int64_t time(int64_t s) const { return d_.reverse ? s_.steps - 1 - s : s; }
  int64_t living(int64_t s) const {
    return std::max<int64_t>(0, std::min(rows_.end, s_.batch_size(time(s))) - rows_.begin);
  }

  const S* previous(const Rows& rows, const void* first, int64_t t, int64_t slot) const {
    return previous_state<S>(s_, rows, first, H_, t, slot, d_.reverse);
  }
  S* row_of(const Rows& rows, int64_t t, int64_t slot) const { return rows.data ? at<S>(rows, s_, t, slot) : nullptr; }
  template <class T>
  T* saved_row(T* data, int64_t t, int64_t slot) const {
    return data ? data + (s_.offset(t) + slot) * Cell::kSaved * H_ : nullptr;
  }
  static V load_or_zero(const S* row, int64_t unit, int64_t n) { return row ? load(row + unit, n) : V(S(0)); }

  // ------------------------------------------------------------------------------------------------- forward
  void forward() const {
    const HiddenMatrix w_hh(gates_, static_cast<const S*>(d_.w_hh.value), nullptr, H_, shared_.gate_panels,
                            shared_.bias);
    const Share all(gates_.count(), m_.rank, m_.size);
    for (int64_t b = all.begin; b < all.end; ++b) w_hh.prepare(b);
    if (m_.rank == 0) memset(shared_.zeros, 0, H_ * sizeof(S));
    m_.wait();
    const Share blocks = block_share(gates_.count(), m_);
    alignas(64) S products[kTileRows * kMaxBlockVectors * kLanes];
    for (int64_t s = 0; s < s_.steps; ++s) {
      const int64_t t = time(s), count = living(s);
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        const int64_t width = gates_.vectors(b) * kLanes;
        for_chunks(rows_.begin, rows_.begin + count, w_hh.row_chunk(b), [&](int64_t first, int64_t n) {
          const S* t_h[kTileRows];
          for (int64_t i = 0; i < n; ++i) {
            const S* row = previous(d_.output.tangent, d_.h0.tangent, t, first + i);
            t_h[i] = row ? row : shared_.zeros;
          }
          w_hh.multiply(b, t_h, n, products, width);
          for (int64_t i = 0; i < n; ++i) forward_cell(t, first + i, b, products + i * width);
        });
      }
      m_.wait_step();
    }
    const Share rows = m_.divide == Divide::rows ? rows_ : Share(s_.batch, m_.rank, m_.size);
    for (int64_t slot = rows.begin; slot < rows.end; ++slot) {
      last_state(d_.output.tangent, d_.h0.tangent, slot, d_.t_h_n);
      if (Cell::kStates > 1) last_state(d_.c.tangent, d_.c0.tangent, slot, d_.t_c_n);
    }
  }

  void forward_cell(int64_t t, int64_t slot, int64_t b, const S* products) const {
    const Rows& state_rows = Cell::kStates > 1 ? d_.c.value : d_.output.value;
    const Rows& t_state_rows = Cell::kStates > 1 ? d_.c.tangent : d_.output.tangent;
    const DualPointer& initial = Cell::kStates > 1 ? d_.c0 : d_.h0;
    constexpr int kState = Cell::kStates - 1;  // the state that the cell reads
    const S* state_row = row_of(state_rows, t, slot);
    const S* prev_row = previous(state_rows, initial.value, t, slot);
    const S* t_prev_row = previous(t_state_rows, initial.tangent, t, slot);
    const S* saved_row = this->saved_row(static_cast<const S*>(d_.saved), t, slot);
    S* t_saved_row = this->saved_row(static_cast<S*>(d_.t_saved), t, slot);
    const S* t_igates_row = row_of(d_.t_igates, t, slot);
    const S* t_hgates_row = Cell::kSplitGates ? row_of(d_.t_hgates, t, slot) : nullptr;
    [[maybe_unused]] const S* igates_row = row_of(d_.igates, t, slot);
    [[maybe_unused]] const S* hgates_row = row_of(d_.hgates, t, slot);
    S* t_output_row = row_of(d_.output.tangent, t, slot);
    S* t_c_row = Cell::kStates > 1 ? row_of(d_.c.tangent, t, slot) : nullptr;
    const int64_t size = gates_.size(b);
    for (int64_t u = 0; u < size; u += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, size - u), unit = gates_.first(b) + u;
      V saved[Cell::kSaved + 1], t_saved[Cell::kSaved + 1], state[2], prev[2], t_state[2], t_prev[2];
      V t_igates[G], t_hgates[G];
      for (int k = 0; k < Cell::kSaved; ++k) saved[k] = load(saved_row + k * H_ + unit, n);
      for (int g = 0; g < G; ++g) {
        t_igates[g] = load_or_zero(t_igates_row, g * H_ + unit, n);
        t_hgates[g] = V::load(products + g * size + u);
        if (Cell::kSplitGates) t_hgates[g] = t_hgates[g] + load_or_zero(t_hgates_row, g * H_ + unit, n);
      }
      state[kState] = load(state_row + unit, n);
      prev[kState] = load_or_zero(prev_row, unit, n);
      t_prev[kState] = load_or_zero(t_prev_row, unit, n);
      if constexpr (has_tangent<Cell>) {
        Cell::tangent(saved, prev, state, t_igates, t_hgates, t_prev, t_state, t_saved);
      } else {
        W igates[G], hgates[G], dual_prev[2], dual_state[2], dual_saved[Cell::kSaved + 1];
        for (int g = 0; g < G; ++g) {
          igates[g] = {load(igates_row + g * H_ + unit, n), t_igates[g]};
          hgates[g] = {load(hgates_row + g * H_ + unit, n), t_hgates[g]};
        }
        dual_prev[kState] = {prev[kState], t_prev[kState]};
        Cell::forward(igates, hgates, dual_prev, dual_state, dual_saved);
        for (int k = 0; k < Cell::kStates; ++k) t_state[k] = dual_state[k].tangent;
        for (int k = 0; k < Cell::kSaved; ++k) t_saved[k] = dual_saved[k].tangent;
      }
      store(t_output_row + unit, t_state[0], n);
      if (Cell::kStates > 1) store(t_c_row + unit, t_state[1], n);
      if (t_saved_row)
        for (int k = 0; k < Cell::kSaved; ++k) store(t_saved_row + k * H_ + unit, t_saved[k], n);
    }
  }

  // to [B, H]: the tangent of a row's last state, its initial one's where the row has no steps.
  void last_state(const Rows& rows, const void* first, int64_t slot, void* to) const {
    int64_t steps = s_.steps;
    while (steps > 0 && s_.batch_size(steps - 1) <= slot) --steps;
    const int64_t b = s_.batch_row(slot);
    const S* from = steps   ? row_of(rows, d_.reverse ? 0 : steps - 1, slot)
                    : first ? static_cast<const S*>(first) + b * H_
                            : shared_.zeros;
    memcpy(static_cast<S*>(to) + b * H_, from, H_ * sizeof(S));
  }

  // ------------------------------------------------------------------------------------------------- backward
  void backward() const {
    const HiddenColumns w_hh(columns_, static_cast<const S*>(d_.w_hh.value), G * H_, shared_.column_panels);
    const HiddenColumns t_w_hh(columns_, static_cast<const S*>(d_.w_hh.tangent), G * H_, shared_.t_panels);
    const Share all(columns_.count(), m_.rank, m_.size);
    for (int64_t b = all.begin; b < all.end; ++b) {
      w_hh.prepare(b);
      if (d_.w_hh.tangent) t_w_hh.prepare(b);
    }
    const Share carried(s_.batch, m_.rank, m_.size);
    for (int64_t slot = carried.begin; slot < carried.end; ++slot) {
      carry_in(d_.grad_h_n, slot, shared_.grad_h);
      if (Cell::kStates > 1) carry_in(d_.grad_c_n, slot, shared_.grad_c);
    }
    m_.wait();
    const Share blocks = block_share(columns_.count(), m_);
    const DualRows& hgates = Cell::kSplitGates ? d_.grad_hgates : d_.grad_igates;
    for (int64_t s = s_.steps - 1; s >= 0; --s) {
      const int64_t t = time(s), count = living(s);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t b = blocks.begin; b < blocks.end; ++b) backward_cell(t, rows_.begin + i, b);
      m_.wait_step();
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        const int chunk = kMaxRows[columns_.vectors(b)];
        S* grad = shared_.grad_h + rows_.begin * 2 * ld_ + columns_.column(b);
        const S* operands[kTileRows];
        for_chunks(0, 2 * count, chunk, [&](int64_t first, int64_t n) {
          for (int64_t i = 0; i < n; ++i) {
            const int64_t row = first + i;
            operands[i] = row_of(row % 2 ? hgates.tangent : hgates.value, t, rows_.begin + row / 2);
          }
          w_hh.multiply(b, operands, n, grad + first * ld_, grad + first * ld_, ld_);
        });
        if (d_.w_hh.tangent)
          for_chunks(0, count, chunk, [&](int64_t first, int64_t n) {
            for (int64_t i = 0; i < n; ++i) operands[i] = row_of(hgates.value, t, rows_.begin + first + i);
            S* tangent = grad + (2 * first + 1) * ld_;
            t_w_hh.multiply(b, operands, n, tangent, tangent, 2 * ld_);
          });
        for (int64_t i = 0; s_.reset && i < count; ++i)
          if (starts_from_zero(s_, t, rows_.begin + i, d_.reverse))
            for (int part = 0; part < 2; ++part)
              memset(grad + (2 * i + part) * ld_, 0, columns_.vectors(b) * kLanes * sizeof(S));
      }
    }
    m_.wait_step();
    const Share rows = m_.divide == Divide::rows ? rows_ : Share(s_.batch, m_.rank, m_.size);
    for (int64_t slot = rows.begin; slot < rows.end; ++slot) {
      const int64_t to = s_.batch_row(slot) * H_, from = (2 * slot + 1) * ld_;
      memcpy(static_cast<S*>(d_.t_grad_h0) + to, shared_.grad_h + from, H_ * sizeof(S));
      if (Cell::kStates > 1) memcpy(static_cast<S*>(d_.t_grad_c0) + to, shared_.grad_c + from, H_ * sizeof(S));
    }
  }

  void carry_in(const DualPointer& grad, int64_t slot, S* carried) const {
    const int64_t from = s_.batch_row(slot) * H_;
    const void* const parts[] = {grad.value, grad.tangent};
    for (int part = 0; part < 2; ++part) {
      const S* row = parts[part] ? static_cast<const S*>(parts[part]) + from : nullptr;
      for (int64_t u = 0; u < H_; u += kLanes)
        load_or_zero(row, u, H_ - u).store(carried + (2 * slot + part) * ld_ + u);
    }
  }

  void backward_cell(int64_t t, int64_t slot, int64_t b) const {
    // Where one row's value and tangent lie; null where they are zero.
    struct Pair {
      const S *value, *tangent;
      W load(int64_t unit, int64_t n) const { return {load_or_zero(value, unit, n), load_or_zero(tangent, unit, n)}; }
    };
    struct Target {
      S *value, *tangent;
      void store(int64_t unit, const W& x, int64_t n) const {
        RNNFAST_ISA::store(value + unit, x.value, n);
        RNNFAST_ISA::store(tangent + unit, x.tangent, n);
      }
    };
    const auto read = [&](const DualRows& rows) {
      return Pair{row_of(rows.value, t, slot), row_of(rows.tangent, t, slot)};
    };
    const auto write = [&](const DualRows& rows) {
      return Target{row_of(rows.value, t, slot), row_of(rows.tangent, t, slot)};
    };
    constexpr int kState = Cell::kStates - 1;  // the state that the cell reads
    const DualRows& states = kState ? d_.c : d_.output;
    const DualPointer& initial = kState ? d_.c0 : d_.h0;
    const Pair state_rows = read(states), grad_output = read(d_.grad_output), grad_cell = read(d_.grad_c);
    const Pair prev_rows = {previous(states.value, initial.value, t, slot),
                            previous(states.tangent, initial.tangent, t, slot)};
    const Pair saved_rows = {saved_row(static_cast<const S*>(d_.saved), t, slot),
                             saved_row(static_cast<const S*>(d_.t_saved), t, slot)};
    const Target igates = write(d_.grad_igates), hgates = write(d_.grad_hgates);
    const Target carried_h = {shared_.grad_h + 2 * slot * ld_, shared_.grad_h + (2 * slot + 1) * ld_};
    const Target carried_c = {shared_.grad_c + 2 * slot * ld_, shared_.grad_c + (2 * slot + 1) * ld_};
    const bool zero = starts_from_zero(s_, t, slot, d_.reverse);
    const int64_t end = columns_.first(b) + columns_.size(b);
    for (int64_t u = columns_.first(b); u < end; u += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, end - u);
      W saved[Cell::kSaved + 1], prev[2], state[2], grad[2], grad_igates[G], grad_hgates[G], grad_prev[2];
      for (int k = 0; k < Cell::kSaved; ++k) saved[k] = saved_rows.load(k * H_ + u, n);
      state[kState] = state_rows.load(u, n);
      prev[kState] = prev_rows.load(u, n);
      const auto carried = [&](const Target& from) { return W(V::load(from.value + u), V::load(from.tangent + u)); };
      grad[0] = carried(carried_h) + grad_output.load(u, n);
      if (kState) grad[1] = carried(carried_c) + grad_cell.load(u, n);
      Cell::backward(saved, prev, state, grad, grad_igates, grad_hgates, grad_prev);
      for (int g = 0; g < G; ++g) {
        igates.store(g * H_ + u, grad_igates[g], n);
        if (Cell::kSplitGates) hgates.store(g * H_ + u, grad_hgates[g], n);
      }
      // The part that does not pass W_hh; the products are added to it.
      carried_h.store(u, grad_prev[0], kLanes);
      if (kState) carried_c.store(u, zero ? W(0) : grad_prev[1], kLanes);
    }
  }

  const LayerTangent& l_;
  const DirectionTangent& d_;
  const Member m_;
  const Sequence& s_;
  const int64_t H_, ld_;
  const Shared shared_;
  const UnitBlocks gates_, columns_;
  const Share rows_;
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
