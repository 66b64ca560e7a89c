// Owns: the derivative of a layer along a tangent of its arguments, and that of its backward: the two loops over time.
// Must not know: equations (the cell has them), tensors.
//
// Forward: a step adds h' W_hh^T, h' the tangent of the state before it, and x' W_ih^T to the tangents of its gates,
// and the cell makes the tangent of the new state of them. Every state and gate is known. Backward: from the last step
// to the first, the cell on dual numbers turns the gradient of a step's state, with its tangent, into those of the
// gates; then, of the step before,
//   grad_h = grad_hgates W_hh       grad_h' = grad_hgates' W_hh + grad_hgates W_hh'
// the first of which backward may have kept.
// States are read where the tensors have them, so only backward carries anything from step to step. The gradients of
// the input and of the weights come behind it, from tangent_products.h.
//
// Included once per instruction set, after tangent_products.h. Storage and arithmetic have one type here.

namespace rnnfast::cpu::RNNFAST_ISA {

template <class Cell, class S>
class Tangent {
  using V = Vec<S>;
  using W = Dual<V>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int G = Cell::kGates;
  using HiddenMatrix = std::conditional_t<is_diagonal<Cell>, GateDiagonal<S>, GateMatrix<S>>;
  using HiddenColumns = std::conditional_t<is_diagonal<Cell>, ColumnDiagonal<S>, ColumnMatrix<S>>;
  using Workspace = TangentWorkspace<S>;
  using Shared = typename Workspace::Shared;

 public:
  static size_t workspace_bytes(const LayerTangent& layer, int threads) {
    return bytes_of(Workspace(layer, traits_of<Cell>, threads));
  }

  static void run(const LayerTangent& layer, void* workspace, int threads) {
    const Workspace sizes(layer, traits_of<Cell>, threads);
    const auto each_direction = [&](const auto& f) {
      Barrier barriers[2];
      run_carved(sizes, workspace, sizes.plan.threads, [&](const Carved<Workspace>& pieces, int rank, int size) {
        for_directions(layer.directions, rank, size, sizes.plan.divide, barriers, [&](int d, const Member& member) {
          f(Tangent(sizes, layer.direction[d], member, pieces.shared[d]), d);
        });
      });
    };
    each_direction([](const Tangent& direction, int) { direction.forward(); });
    if (!layer.backward) return;
    Steps passes[2];
    for (int d = 0; d < layer.directions; ++d) passes[d].begin = layer.sequence.steps;
    while (passes[0].begin > 0) {
      for (int d = 0; d < layer.directions; ++d)
        passes[d] = sizes.passes.pass_before(passes[d].begin, layer.direction[d].reverse);
      each_direction([&](const Tangent& direction, int d) { direction.backward(passes[d]); });
      TangentProducts<S>::run(sizes, workspace, passes);
    }
  }

 private:
  Tangent(const Workspace& sizes, const DirectionTangent& direction, const Member& member, const Shared& shared)
      : sizes_(sizes),
        l_(sizes.layer),
        d_(direction),
        m_(member),
        s_(l_.sequence),
        H_(l_.hidden_size),
        ld_(Workspace::ld_acc(H_)),
        ld_g_(sizes.padded_gates()),
        shared_(shared),
        gates_(sizes.gate_blocks()),
        columns_(column_blocks<S>(H_, member.divide, member.size)),
        w_ih_(gates_, static_cast<const S*>(d_.w_ih.value), nullptr, l_.input_size, shared.w_ih, shared.bias),
        rows_(row_share(s_, member)) {}

  int64_t time(int64_t s) const { return d_.reverse ? s_.steps - 1 - s : s; }
  int64_t living(int64_t s) const {
    return std::max<int64_t>(0, std::min(rows_.end, s_.batch_size(time(s))) - rows_.begin);
  }

  const S* previous(const Rows& rows, const void* first, int64_t t, int64_t slot) const {
    return previous_state<S>(s_, rows, first, H_, t, slot, d_.reverse);
  }
  S* row_of(const Rows& rows, int64_t t, int64_t slot) const { return at<S>(rows, s_, t, slot); }
  template <class T>
  T* saved_row(T* data, int64_t t, int64_t slot) const {
    return data ? data + (s_.offset(t) + slot) * Cell::kSaved * H_ : nullptr;
  }
  // The gate gradients of a row of a pass that begins with the row `origin`; their tangents stand ld_g_ further.
  S* gate_row(S* data, int64_t origin, int64_t t, int64_t slot) const {
    return data + (s_.offset(t) - origin + slot) * 2 * ld_g_;
  }
  static V load_or_zero(const S* row, int64_t unit, int64_t n) { return row ? load(row + unit, n) : V(S(0)); }

  // ------------------------------------------------------------------------------------------------- forward
  void forward() const {
    const HiddenMatrix w_hh(gates_, static_cast<const S*>(d_.w_hh.value), nullptr, H_, shared_.w_hh, shared_.bias);
    const Share all(gates_.count(), m_.rank, m_.size);
    for (int64_t b = all.begin; b < all.end; ++b) {
      w_hh.prepare(b);
      if (sizes_.projects()) w_ih_.prepare(b);
    }
    if (m_.rank == 0) memset(shared_.zeros, 0, H_ * sizeof(S));
    m_.wait();
    const Share blocks = block_share(gates_.count(), m_);
    alignas(64) S products[kTileElements<S>];
    int64_t projected = 0;  // steps
    const S* of_input = nullptr;
    for (int64_t s = 0; s < s_.steps; ++s) {
      const int64_t t = time(s), count = living(s);
      if (sizes_.projects() && s == projected) {
        projected = project(s, blocks);
        of_input = window();
      }
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        const int64_t width = gates_.vectors(b) * kLanes;
        for_chunks(rows_.begin, rows_.begin + count, w_hh.row_chunk(b), [&](int64_t first, int64_t n) {
          const S* t_h[kTileRows];
          for (int64_t i = 0; i < n; ++i) {
            const S* row = previous(d_.output.tangent, d_.h0.tangent, t, first + i);
            t_h[i] = row ? row : shared_.zeros;
          }
          w_hh.multiply(b, t_h, n, products, width);
          for (int64_t i = 0; i < n; ++i) {
            const int64_t row = first - rows_.begin + i;
            forward_cell(t, first + i, b, of_input ? of_input + row * gates_.columns() + gates_.column(b) : nullptr,
                         products + i * width);
          }
        });
      }
      if (of_input) of_input += count * gates_.columns();
      m_.wait_step();
    }
    const Share rows = m_.divide == Divide::rows ? rows_ : Share(s_.batch, m_.rank, m_.size);
    for (int64_t slot = rows.begin; slot < rows.end; ++slot) {
      last_state(d_.output.tangent, d_.h0.tangent, slot, d_.t_h_n);
      if (Cell::kStates > 1) last_state(d_.c.tangent, d_.c0.tangent, slot, d_.t_c_n);
    }
  }

  // The thread's rows of the window; the blocks of other threads stand in the same rows.
  S* window() const { return shared_.window + rows_.begin * sizes_.window_steps() * gates_.columns(); }

  // x' W_ih^T for the steps [s, returned) into the window, row after row.
  int64_t project(int64_t s, const Share& blocks) const {
    const int64_t end = std::min(s_.steps, s + sizes_.window_steps());
    const S* rows[kRowsAtOnce];
    int64_t count = 0;
    S* to = window();
    const auto multiply = [&] {
      for (int64_t b = blocks.begin; b < blocks.end; ++b)
        w_ih_.multiply(b, rows, count, to + gates_.column(b), gates_.columns());
      to += count * gates_.columns();
      count = 0;
    };
    for (; s < end; ++s)
      for (int64_t i = 0; i < living(s); ++i) {
        rows[count++] = row_of(l_.input.tangent, time(s), rows_.begin + i);
        if (count == kRowsAtOnce) multiply();
      }
    multiply();
    return end;
  }

  // of_input, of_state: the tangents of the gates that come from those of the input and of the state before.
  void forward_cell(int64_t t, int64_t slot, int64_t b, const S* of_input, const S* of_state) const {
    const Rows& state_rows = Cell::kStates > 1 ? d_.c.value : d_.output.value;
    const Rows& t_state_rows = Cell::kStates > 1 ? d_.c.tangent : d_.output.tangent;
    const DualPointer& initial = Cell::kStates > 1 ? d_.c0 : d_.h0;
    constexpr int kState = Cell::kStates - 1;  // the state that the cell reads
    const S* state_row = row_of(state_rows, t, slot);
    const S* prev_row = previous(state_rows, initial.value, t, slot);
    const S* t_prev_row = previous(t_state_rows, initial.tangent, t, slot);
    const S* saved_row = this->saved_row(static_cast<const S*>(d_.saved), t, slot);
    S* t_saved_row = this->saved_row(shared_.t_saved, t, slot);
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
        if (of_input) t_igates[g] = t_igates[g] + V::load(of_input + g * size + u);
        t_hgates[g] = V::load(of_state + g * size + u);
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
  void backward(const Steps& pass) const {
    const Stretch rows_of_pass = sizes_.passes.rows_of(pass, d_.reverse);
    const int64_t origin = rows_of_pass.first;
    const HiddenColumns w_hh(columns_, static_cast<const S*>(d_.w_hh.value), G * H_, shared_.columns_hh);
    const HiddenColumns t_w_hh(columns_, static_cast<const S*>(d_.w_hh.tangent), G * H_, shared_.t_columns_hh);
    if (rows_of_pass.begins) {
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
    }
    const Share blocks = block_share(columns_.count(), m_);
    // Which rows of the gradients the product with W_hh carries: values and tangents by turns, or the latter alone.
    const int64_t first_row = d_.grad_states.data ? 1 : 0, step = first_row + 1;
    for (int64_t s = pass.end - 1; s >= pass.begin; --s) {
      const int64_t t = time(s), count = living(s);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t b = blocks.begin; b < blocks.end; ++b) backward_cell(origin, t, rows_.begin + i, b);
      m_.wait_step();
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        const int chunk = kMaxRows[columns_.vectors(b)];
        S* grad = shared_.grad_h + rows_.begin * 2 * ld_ + columns_.column(b);
        const S* operands[kTileRows];
        for_chunks(0, 2 * count / step, chunk, [&](int64_t first, int64_t n) {
          for (int64_t i = 0; i < n; ++i) {
            const int64_t row = first_row + (first + i) * step;
            operands[i] = gate_row(shared_.grad_hgates, origin, t, rows_.begin + row / 2) + row % 2 * ld_g_;
          }
          S* carried = grad + (first_row + first * step) * ld_;
          w_hh.multiply(b, operands, n, carried, carried, step * ld_);
        });
        if (d_.w_hh.tangent)
          for_chunks(0, count, chunk, [&](int64_t first, int64_t n) {
            for (int64_t i = 0; i < n; ++i)
              operands[i] = gate_row(shared_.grad_hgates, origin, t, rows_.begin + first + i);
            S* tangent = grad + (2 * first + 1) * ld_;
            t_w_hh.multiply(b, operands, n, tangent, tangent, 2 * ld_);
          });
        for (int64_t i = 0; s_.reset && i < count; ++i)
          if (starts_from_zero(s_, t, rows_.begin + i, d_.reverse))
            for (int part = 0; part < 2; ++part)
              memset(grad + (2 * i + part) * ld_, 0, columns_.vectors(b) * kLanes * sizeof(S));
      }
    }
    if (!rows_of_pass.ends) return;
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

  void backward_cell(int64_t origin, int64_t t, int64_t slot, int64_t b) const {
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
    const auto pair = [](S* row, int64_t ld) { return Target{row, row + ld}; };
    constexpr int kState = Cell::kStates - 1;  // the state that the cell reads
    const DualRows& states = kState ? d_.c : d_.output;
    const DualPointer& initial = kState ? d_.c0 : d_.h0;
    const Pair state_rows = read(states), grad_output = read(d_.grad_output), grad_cell = read(d_.grad_c);
    const Pair prev_rows = {previous(states.value, initial.value, t, slot),
                            previous(states.tangent, initial.tangent, t, slot)};
    const Pair saved_rows = {saved_row(static_cast<const S*>(d_.saved), t, slot),
                             saved_row(static_cast<const S*>(shared_.t_saved), t, slot)};
    const Target igates = pair(gate_row(shared_.grad_igates, origin, t, slot), ld_g_);
    const Target hgates = pair(gate_row(shared_.grad_hgates, origin, t, slot), ld_g_);
    const Target carried_h = pair(shared_.grad_h + 2 * slot * ld_, ld_);
    const Target carried_c = kState ? pair(shared_.grad_c + 2 * slot * ld_, ld_) : Target{};
    const S* grad_state = row_of(d_.grad_states, t, slot);
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
      if (grad_state) grad[0].value = load(grad_state + u, n);
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

  const Workspace& sizes_;
  const LayerTangent& l_;
  const DirectionTangent& d_;
  const Member m_;
  const Sequence& s_;
  const int64_t H_, ld_, ld_g_;
  const Shared& shared_;
  const UnitBlocks gates_, columns_;
  const GateMatrix<S> w_ih_;
  const Share rows_;
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
