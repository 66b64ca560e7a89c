// Owns: how forward and backward go through a step whose gates, and c, are normalised: members of both classes.
// Must not know: equations, tensors.
//
// A thread has whole rows. Forward's products leave all gates of some rows before the first of them is normalised,
// where they lie, and goes on as without; what it keeps for backward are the products. From these backward normalises
// anew, runs the cell forward, and then the way back: from h to c as h reads it, to c, to the gates, to the products.
//
// Included once per instruction set, after forward.h and backward.h.

namespace rnnfast::cpu::RNNFAST_ISA {

// ------------------------------------------------------------------------------------------------------- forward
// The norm's weights and the bias of each half of the gates, in the order of their columns.
template <class Cell, class S>
void Forward<Cell, S>::prepare_norms() const {
  const void* const vectors[4] = {d_.weights.norm_ih, d_.weights.b_ih, d_.weights.norm_hh, d_.weights.b_hh};
  const int64_t columns = hidden_.columns();
  for (int i = 0; i < 4; ++i) {
    const S* from = static_cast<const S*>(vectors[i]);
    for_gates([&](int64_t gate, int64_t column, int64_t n) {
      store(shared_.norms + i * columns + column, from ? load(from + gate, n) : V(Acc(0)), n);
    });
  }
}

// The gates of a row by vectors: f(where in [G*H], column, how many).
template <class Cell, class S>
template <class F>
void Forward<Cell, S>::for_gates(const F& f) const {
  for (int64_t b = 0; b < hidden_.count(); ++b)
    for (int64_t g = 0, size = hidden_.size(b); g < G; ++g)
      for (int64_t u = 0; u < size; u += kLanes)
        f(g * l_.hidden_size + hidden_.first(b) + u, hidden_.column(b) + g * size + u,
          std::min<int64_t>(kLanes, size - u));
}

// One half of a row's gates where it lies: the product before, and norm LN(product) + bias behind. kept [G*H] or null
// takes the product.
template <class Cell, class S>
void Forward<Cell, S>::normalise(Acc* row, int half, S* kept) const {
  const int64_t columns = hidden_.columns();
  const Statistics<Acc> of = statistics(row, G * l_.hidden_size);  // only the last block's columns are padded
  if (kept) for_gates([&](int64_t gate, int64_t column, int64_t n) { store(kept + gate, V::load(row + column), n); });
  const Acc *weights = shared_.norms + 2 * half * columns, *shifts = weights + columns;
  for (int64_t e = 0; e < columns; e += kLanes)
    (normalised(V::load(row + e), of.mean, of.scale) * V::load(weights + e) + V::load(shifts + e)).store(row + e);
}

// The input half of the gates of the steps [s, end), as project left them.
template <class Cell, class S>
void Forward<Cell, S>::normalise_igates(int64_t s, int64_t end) const {
  for (Acc* row = own_.igates; s < end; ++s)
    for (int64_t i = 0; i < living(s); ++i, row += ld_gates_) normalise(row, 0, saved_row(s, rows_.begin + i));
}

// The cells of a step's `count` rows.
template <class Cell, class S>
void Forward<Cell, S>::normalised_cells(int64_t count, int64_t igates_row) const {
  const Unit* h[kTileRows];
  for_chunks(0, count, norm_rows(l_, m_), [&](int64_t first, int64_t chunk) {
    StepRow* rows = own_.rows + first;
    const Acc* igates = own_.igates + (igates_row + first) * ld_gates_;
    for (int64_t b = 0; b < hidden_.count(); ++b)
      for_chunks(0, chunk, w_hh_.row_chunk(b), [&](int64_t i, int64_t n) {
        for (int64_t r = 0; r < n; ++r) h[r] = reinterpret_cast<const Unit*>(rows[i + r].h);
        w_hh_.multiply(b, h, n, own_.hgates + i * ld_gates_ + hidden_.column(b), ld_gates_);
      });
    for (int64_t i = 0; i < chunk; i += kAbreast) {
      const int64_t n = std::min<int64_t>(kAbreast, chunk - i);
      for (int64_t r = i; r < i + n; ++r) {
        S* kept = std::exchange(rows[r].saved, nullptr);
        normalise(own_.hgates + r * ld_gates_, 1, kept ? kept + G * l_.hidden_size : nullptr);
        if (Cell::kStates > 1) rows[r].values = own_.values + (r - i) * (Cell::kSaved + 1) * ld_c_;
      }
      for (int64_t b = 0; b < hidden_.count(); ++b) {
        const Acc *ig = igates + i * ld_gates_ + hidden_.column(b),
                  *hg = own_.hgates + i * ld_gates_ + hidden_.column(b);
        n == kAbreast ? cell<true, kAbreast>(rows + i, b, ig, hg) : cell<true, 1>(rows + i, b, ig, hg);
      }
      if constexpr (Cell::kStates > 1)
        for (int64_t r = i; r < i + n; ++r) hidden_from_c(rows[r]);
    }
  });
}

// h' of a row from all of c' and what the cell kept.
template <class Cell, class S>
void Forward<Cell, S>::hidden_from_c(const StepRow& row) const {
  const int64_t H = l_.hidden_size;
  const S *weight = static_cast<const S*>(d_.weights.norm_c), *shift = static_cast<const S*>(d_.weights.norm_bias_c);
  const Acc* c = row.values + Cell::kSaved * ld_c_;
  const Statistics<Acc> of_c = statistics(c, H);
  for (int64_t u = 0; u < H; u += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, H - u);
    V saved[Cell::kSaved + 1], state[2];
    for (int k = 0; k < Cell::kSaved; ++k) saved[k] = V::load(row.values + k * ld_c_ + u);
    state[1] = normalised(V::load(c + u), of_c.mean, of_c.scale) * load(weight + u, n) + load(shift + u, n);
    const V h = Cell::hidden(saved, state);
    if (row.hidden) {
      store_operand<S>(row.hidden + u, h, n);
    } else {
      write_h<true>(row, u, n, h);
    }
  }
}

// ------------------------------------------------------------------------------------------------------ backward
// One row of a step; products [2, G*H] are the two halves of its gates before they were normalised.
template <class Cell, class S>
void Backward<Cell, S>::normalised_cell(int64_t t, int64_t slot, const S* products) {
  const int64_t H = l_.hidden_size, row = s_.offset(t) + slot;
  const bool zero = starts_from_zero(s_, t, slot, d_.reverse);
  const S* prev_h = Cell::kStates == 1 ? previous_h(t, slot) : nullptr;
  const S* prev_c = Cell::kStates > 1 ? previous_c(t, slot) : nullptr;
  const S* grad_output = d_.grad_output.data ? at<const S>(d_.grad_output, s_, t, slot) : nullptr;
  const S* grad_cell = d_.grad_c.data ? at<const S>(d_.grad_c, s_, t, slot) : nullptr;
  const Acc *keep_h = shared_.outputs ? nullptr : keep_h_.row(slot), *keep_c = keep_c_.row(slot);
  const S* weights[2] = {static_cast<const S*>(d_.weights.norm_ih), static_cast<const S*>(d_.weights.norm_hh)};
  const S* shifts[2] = {static_cast<const S*>(d_.weights.b_ih), static_cast<const S*>(d_.weights.b_hh)};
  const Statistics<Acc> of[2] = {statistics(products, G * H), statistics(products + G * H, G * H)};
  const auto normal = [&](int half, int g, int64_t u, int64_t n) {
    return normalised(load(products + (half * G + g) * H + u, n), of[half].mean, of[half].scale);
  };
  const auto units = [&](const auto& f) {
    for (int64_t u = 0; u < H; u += kLanes) f(u, std::min<int64_t>(kLanes, H - u));
  };
  const auto load_values = [&](int64_t u, V* values) {
    for (int k = 0; k < Cell::kSaved; ++k) values[k] = V::load(own_.values + k * ld_h_ + u);
  };
  const auto load_prev = [&](int64_t u, int64_t n, V* prev) {
    prev[0] = prev_h ? load(prev_h + u, n) : V(Acc(0));
    prev[1] = prev_c ? load(prev_c + u, n) : V(Acc(0));
  };
  // The gradient of h', and in place of what is carried the part that zoneout's last h gets.
  const auto take_grad_h = [&](int64_t u, int64_t n) {
    if (shared_.outputs) return V::load(shared_.grad_hidden + slot * ld_h_ + u);
    Acc* carried = shared_.grad_h + slot * ld_p_ + u;
    V grad = V::load(carried);
    if (grad_output) grad = grad + load(grad_output + u, n);
    (keep_h ? divide_gradient(V::load(keep_h + u), grad) : V(Acc(0))).store(carried);
    return grad;
  };

  // Forward again: the cell's values, and its last state, h' or c'.
  Acc* last = own_.values + Cell::kSaved * ld_h_;
  units([&](int64_t u, int64_t n) {
    V gates[2][G], prev[2], state[2], values[Cell::kSaved + 1];
    for (int half = 0; half < 2; ++half)
      for (int g = 0; g < G; ++g) {
        gates[half][g] = normal(half, g, u, n) * load(weights[half] + g * H + u, n);
        if (shifts[half]) gates[half][g] = gates[half][g] + load(shifts[half] + g * H + u, n);
      }
    load_prev(u, n, prev);
    Cell::forward(gates[0], gates[1], prev, state, values);
    for (int k = 0; k < Cell::kSaved; ++k) values[k].store(own_.values + k * ld_h_ + u);
    state[Cell::kStates - 1].store(last + u);
  });

  // From h' to c as h' reads it, whose gradient is left in grad_c, and that of the gate between them in grad_gate.
  Statistics<Acc> of_c;
  V means_c[2] = {V(Acc(0)), V(Acc(0))};
  Acc *grad_c = last + ld_h_, *grad_gate = grad_c + ld_h_;
  if constexpr (Cell::kStates > 1) {
    of_c = statistics(last, H);
    units([&](int64_t u, int64_t n) {
      V values[Cell::kSaved + 1], state[2], gate;
      load_values(u, values);
      const V c = normalised(V::load(last + u), of_c.mean, of_c.scale);
      const V weight = load(static_cast<const S*>(d_.weights.norm_c) + u, n);
      state[1] = c * weight + load(static_cast<const S*>(d_.weights.norm_bias_c) + u, n);
      if (shared_.outputs) store(shared_.hidden + row * H + u, Cell::hidden(values, state), n);
      V grad = Cell::hidden_backward(values, state, take_grad_h(u, n), gate);
      if (sums_.wanted()) {
        sums_.add(4 * G, u, grad * c);
        sums_.add(4 * G + 1, u, grad);
      }
      grad = grad * weight;
      means_c[0] = means_c[0] + grad;
      means_c[1] = means_c[1] + grad * c;
      grad.store(grad_c + u);
      gate.store(grad_gate + u);
    });
    for (V& mean : means_c) mean = sum_lanes(mean) * V(Acc(1) / Acc(H));
  }

  // To the gates.
  V means[2][2];
  for (auto& half : means)
    for (V& mean : half) mean = V(Acc(0));
  units([&](int64_t u, int64_t n) {
    V values[Cell::kSaved + 1], prev[2], grads[2][G], grad_prev[2];
    load_values(u, values);
    load_prev(u, n, prev);
    if constexpr (Cell::kStates > 1) {
      Acc* carried = shared_.grad_c + slot * ld_h_ + u;
      V grad = V::load(carried), kept(Acc(0));
      if (grad_cell) grad = grad + load(grad_cell + u, n);
      if (keep_c) kept = divide_gradient(V::load(keep_c + u), grad);
      const V c = normalised(V::load(last + u), of_c.mean, of_c.scale);
      grad = grad + normalised_backward(c, of_c.scale, V::load(grad_c + u), means_c[0], means_c[1]);
      Cell::candidate_backward(values, prev, grad, V::load(grad_gate + u), grads[0], grads[1], grad_prev);
      (zero ? V(Acc(0)) : grad_prev[1] + kept).store(carried);
    } else {
      const V state[1] = {V::load(last + u)}, grad[1] = {take_grad_h(u, n)};
      Cell::backward(values, prev, state, grad, grads[0], grads[1], grad_prev);
    }
    // The part that does not pass W_hh; the product is added to it.
    if (!shared_.outputs) {
      Acc* carried = shared_.grad_h + slot * ld_p_ + u;
      (V::load(carried) + grad_prev[0]).store(carried);
    }
    for (int half = 0; half < 2; ++half)
      for (int g = 0; g < G; ++g) {
        const V x = normal(half, g, u, n);
        V grad = grads[half][g];
        if (sums_.wanted()) {
          sums_.add(half * G + g, u, grad * x);
          if (half == 0 || Cell::kSplitGates) sums_.add((2 + half) * G + g, u, grad);
        }
        grad = grad * load(weights[half] + g * H + u, n);
        means[half][0] = means[half][0] + grad;
        means[half][1] = means[half][1] + grad * x;
        grad.store(own_.grads + (half * G + g) * ld_h_ + u);
      }
  });
  if (sums_.wanted()) sums_.end_row();

  // To the products.
  for (int half = 0; half < 2; ++half) {
    Operand* to = (half == 0 ? shared_.igates : shared_.hgates) + row * ld_g_;
    for (V& mean : means[half]) mean = sum_lanes(mean) * V(Acc(1) / Acc(G * H));
    for (int g = 0; g < G; ++g)
      units([&](int64_t u, int64_t n) {
        const V grad = V::load(own_.grads + (half * G + g) * ld_h_ + u);
        store(to + g * H + u,
              normalised_backward(normal(half, g, u, n), of[half].scale, grad, means[half][0], means[half][1]), n);
      });
  }
}

// The gradients of norms and biases, from the sums of all threads, which share the units out.
template <class Cell, class S>
void Backward<Cell, S>::add_norm_sums() {
  sums_.flush();
  m_.wait();
  void* const of_gates[4] = {d_.grad_norm_ih, d_.grad_norm_hh, d_.grad_b_ih, d_.grad_b_hh};
  void* const of_c[2] = {d_.grad_norm_c, d_.grad_norm_bias_c};
  const Share share(ld_h_ / kLanes, m_.rank, m_.size);
  for (int64_t u = share.begin * kLanes; u < share.end * kLanes; u += kLanes) {
    const auto write = [&](int line, void* to, int64_t first) {
      V sum(Acc(0));
      for (int rank = 0; rank < m_.size; ++rank) sum = sum + norm_sums(rank).total(line, u);
      if (to) store(static_cast<S*>(to) + first + u, sum, l_.hidden_size - u);
    };
    for (int kind = 0; kind < 4; ++kind)
      for (int g = 0; g < G; ++g)
        write((kind == 3 && !Cell::kSplitGates ? 2 : kind) * G + g, of_gates[kind], g * l_.hidden_size);
    for (int kind = 0; kind < 2 && Cell::kStates > 1; ++kind) write(4 * G + kind, of_c[kind], 0);
  }
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
