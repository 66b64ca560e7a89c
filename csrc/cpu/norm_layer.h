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
  for (int i = 0; i < 4; ++i) {
    const S* from = static_cast<const S*>(vectors[i]);
    for_gates([&](int64_t gate, int64_t column, int64_t n) {
      store(shared_.norms + i * columns_ + column, from ? load(from + gate, n) : V(Acc(0)), n);
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
  const Statistics<Acc> of = statistics(row, G * l_.hidden_size);  // only the last block's columns are padded
  if (kept) for_gates([&](int64_t gate, int64_t column, int64_t n) { store(kept + gate, V::load(row + column), n); });
  const Acc *weights = shared_.norms + 2 * half * columns_, *shifts = weights + columns_;
  for (int64_t e = 0; e < columns_; e += kLanes)
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
  for_chunks(0, count, sizes_.norm_rows(), [&](int64_t first, int64_t chunk) {
    StepRow* rows = own_.rows + first;
    const Acc* igates = own_.igates + (igates_row + first) * ld_gates_;
    for (int64_t b = 0; b < hidden_.count(); ++b)
      for_chunks(0, chunk, w_hh_.row_chunk(b), [&](int64_t i, int64_t n) {
        for (int64_t r = 0; r < n; ++r) h[r] = reinterpret_cast<const Unit*>(rows[i + r].h);
        w_hh_.multiply(b, h, n, own_.hgates + i * ld_gates_ + hidden_.column(b), ld_gates_);
      });
    // What a row's sums and roots wait for, others fill: each part for several rows after each other.
    for_chunks(0, chunk, kTileRows, [&](int64_t i, int64_t n) {
      Acc* half = own_.hgates + i * ld_gates_;
      for (int64_t r = 0; r < n; ++r) {
        S* kept = std::exchange(rows[i + r].saved, nullptr);
        normalise(half + r * ld_gates_, 1, kept ? kept + G * l_.hidden_size : nullptr);
        if (Cell::kStates > 1) rows[i + r].values = own_.values + r * (Cell::kSaved + 1) * ld_c_;
      }
      for (int64_t b = 0; b < hidden_.count(); ++b) {
        const Acc *ig = igates + i * ld_gates_ + hidden_.column(b), *hg = half + hidden_.column(b);
        int64_t r = 0;
        for (; r + kAbreast <= n; r += kAbreast)
          cell<true, kAbreast>(rows + i + r, b, ig + r * ld_gates_, hg + r * ld_gates_);
        for (; r < n; ++r) cell<true, 1>(rows + i + r, b, ig + r * ld_gates_, hg + r * ld_gates_);
      }
      if constexpr (Cell::kStates > 1)
        for (int64_t r = 0; r < n; ++r) hidden_from_c(rows[i + r]);
    });
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
// A row of a step, and what the parts of its way back hand on.
template <class Cell, class S>
struct Backward<Cell, S>::NormRow {
  const S* products;  // [2, G*H] the two halves of the gates before they were normalised
  int64_t slot, at;   // its row in buffers of the batch, and in those of all steps
  bool zero;
  const S *prev_h, *prev_c, *grad_output, *grad_cell;
  const Acc *keep_h, *keep_c;
  Acc *values, *last;              // [S, ld_h] what the cell kept; [ld_h] h' or c'
  Acc *grad_c, *grad_output_gate;  // [ld_h] of c as h' reads it before the norm's weight; what hidden_backward leaves
  Acc* grads;                      // [2, G, ld_h] of the gates before the norms' weights
  Statistics<Acc> of[2], of_c;
  V means[2][2], means_c[2];  // of the gradient, and of its product with what is normalised

  // The normalised product of gate g and a vector of units.
  V normal(int half, int g, int64_t u, int64_t n, int64_t H) const {
    return normalised(load(products + (half * G + g) * H + u, n), of[half].mean, of[half].scale);
  }
  V normal_c(int64_t u) const { return normalised(V::load(last + u), of_c.mean, of_c.scale); }
  void load_values(int64_t u, int64_t ld, V* to) const {
    for (int k = 0; k < Cell::kSaved; ++k) to[k] = V::load(values + k * ld + u);
  }
  void load_prev(int64_t u, int64_t n, V* prev) const {
    prev[0] = prev_h ? load(prev_h + u, n) : V(Acc(0));
    prev[1] = prev_c ? load(prev_c + u, n) : V(Acc(0));
  }
};

// The thread's `count` rows of step t; products [count, 2, G*H].
template <class Cell, class S>
void Backward<Cell, S>::normalised_cells(int64_t t, int64_t count, const S* products) {
  // What a row's sums and roots wait for, others fill: each part for several rows after each other.
  for_chunks(0, count, sizes_.norm_rows(), [&](int64_t first, int64_t n) {
    NormRow rows[Workspace::kNormRows];
    for (int64_t r = 0; r < n; ++r)
      rows[r] = norm_row(t, rows_.begin + first + r, products + (first + r) * saved_width(), r);
    for (int64_t r = 0; r < n; ++r) forward_again(rows[r]);
    if constexpr (Cell::kStates > 1)
      for (int64_t r = 0; r < n; ++r) back_to_c(rows[r]);
    for (int64_t r = 0; r < n; ++r) back_to_gates(rows[r]);
    for (int64_t r = 0; r < n; ++r) back_to_products(rows[r]);
  });
}

// The index-th of those whose parts run after each other.
template <class Cell, class S>
typename Backward<Cell, S>::NormRow Backward<Cell, S>::norm_row(int64_t t, int64_t slot, const S* products,
                                                                int64_t index) const {
  const int64_t gates = G * l_.hidden_size;
  NormRow row;
  row.products = products;
  row.slot = slot;
  row.at = s_.offset(t) + slot;
  row.zero = starts_from_zero(s_, t, slot, d_.reverse);
  row.prev_h = Cell::kStates == 1 ? previous_h(t, slot) : nullptr;
  row.prev_c = Cell::kStates > 1 ? previous_c(t, slot) : nullptr;
  row.grad_output = d_.grad_output.data ? at<const S>(d_.grad_output, s_, t, slot) : nullptr;
  row.grad_cell = d_.grad_c.data ? at<const S>(d_.grad_c, s_, t, slot) : nullptr;
  row.keep_h = shared_.outputs ? nullptr : keep_h_.row(slot);
  row.keep_c = keep_c_.row(slot);
  row.values = own_.norms + index * sizes_.norm_vectors() * ld_h_;
  row.last = row.values + Cell::kSaved * ld_h_;
  row.grad_c = row.last + ld_h_;
  row.grad_output_gate = row.grad_c + ld_h_;
  row.grads = row.grad_output_gate + ld_h_;
  for (int half = 0; half < 2; ++half) row.of[half] = statistics(products + half * gates, gates);
  return row;
}

// The cell's values, and its last state.
template <class Cell, class S>
void Backward<Cell, S>::forward_again(NormRow& row) const {
  const int64_t H = l_.hidden_size;
  for (int64_t u = 0; u < H; u += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, H - u);
    V gates[2][G], prev[2], state[2], values[Cell::kSaved + 1];
    for (int half = 0; half < 2; ++half)
      for (int g = 0; g < G; ++g) {
        gates[half][g] = row.normal(half, g, u, n, H) * load(norm_weights(half) + g * H + u, n);
        if (const S* bias = norm_bias(half)) gates[half][g] = gates[half][g] + load(bias + g * H + u, n);
      }
    row.load_prev(u, n, prev);
    Cell::forward(gates[0], gates[1], prev, state, values);
    for (int k = 0; k < Cell::kSaved; ++k) values[k].store(row.values + k * ld_h_ + u);
    state[Cell::kStates - 1].store(row.last + u);
  }
}

// The gradient of h', and in place of what is carried the part that zoneout's last h gets.
template <class Cell, class S>
Vec<acc_t<S>> Backward<Cell, S>::take_grad_h(const NormRow& row, int64_t u, int64_t n) const {
  if (shared_.outputs) return V::load(shared_.grad_hidden + row.slot * ld_h_ + u);
  Acc* carried = shared_.grad_h + row.slot * ld_p_ + u;
  V grad = V::load(carried);
  if (row.grad_output) grad = grad + load(row.grad_output + u, n);
  (row.keep_h ? divide_gradient(V::load(row.keep_h + u), grad) : V(Acc(0))).store(carried);
  return grad;
}

// From h' to c as h' reads it.
template <class Cell, class S>
void Backward<Cell, S>::back_to_c(NormRow& row) {
  const int64_t H = l_.hidden_size;
  const S *weight = static_cast<const S*>(d_.weights.norm_c), *bias = static_cast<const S*>(d_.weights.norm_bias_c);
  row.of_c = statistics(row.last, H);
  V sums[2] = {V(Acc(0)), V(Acc(0))};
  for (int64_t u = 0; u < H; u += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, H - u);
    V values[Cell::kSaved + 1], state[2], grad_gate;
    row.load_values(u, ld_h_, values);
    const V c = row.normal_c(u), by = load(weight + u, n);
    state[1] = c * by + load(bias + u, n);
    if (shared_.outputs) store(shared_.hidden + row.at * H + u, Cell::hidden(values, state), n);
    V grad = Cell::hidden_backward(values, state, take_grad_h(row, u, n), grad_gate);
    if (sums_.wanted()) {
      sums_.add(4 * G, u, grad * c);
      sums_.add(4 * G + 1, u, grad);
    }
    grad = grad * by;
    sums[0] = sums[0] + grad;
    sums[1] = sums[1] + grad * c;
    grad.store(row.grad_c + u);
    grad_gate.store(row.grad_output_gate + u);
  }
  for (int i = 0; i < 2; ++i) row.means_c[i] = sum_lanes(sums[i]) * V(Acc(1) / Acc(H));
}

// To the gates.
template <class Cell, class S>
void Backward<Cell, S>::back_to_gates(NormRow& row) {
  const int64_t H = l_.hidden_size;
  V sums[2][2];
  for (auto& half : sums)
    for (V& sum : half) sum = V(Acc(0));
  for (int64_t u = 0; u < H; u += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, H - u);
    V values[Cell::kSaved + 1], prev[2], grads[2][G], grad_prev[2];
    row.load_values(u, ld_h_, values);
    row.load_prev(u, n, prev);
    if constexpr (Cell::kStates > 1) {
      Acc* carried = shared_.grad_c + row.slot * ld_h_ + u;
      V grad = V::load(carried), kept(Acc(0));
      if (row.grad_cell) grad = grad + load(row.grad_cell + u, n);
      if (row.keep_c) kept = divide_gradient(V::load(row.keep_c + u), grad);
      grad = grad + normalised_backward(row.normal_c(u), row.of_c.scale, V::load(row.grad_c + u), row.means_c[0],
                                        row.means_c[1]);
      Cell::candidate_backward(values, prev, grad, V::load(row.grad_output_gate + u), grads[0], grads[1], grad_prev);
      (row.zero ? V(Acc(0)) : grad_prev[1] + kept).store(carried);
    } else {
      const V state[1] = {V::load(row.last + u)}, grad[1] = {take_grad_h(row, u, n)};
      Cell::backward(values, prev, state, grad, grads[0], grads[1], grad_prev);
    }
    // The part that does not pass W_hh; the product is added to it.
    if (!shared_.outputs) {
      Acc* carried = shared_.grad_h + row.slot * ld_p_ + u;
      (V::load(carried) + grad_prev[0]).store(carried);
    }
    for (int half = 0; half < 2; ++half)
      for (int g = 0; g < G; ++g) {
        const V x = row.normal(half, g, u, n, H);
        V grad = grads[half][g];
        if (sums_.wanted()) {
          sums_.add(half * G + g, u, grad * x);
          if (half == 0 || Cell::kSplitGates) sums_.add((2 + half) * G + g, u, grad);
        }
        grad = grad * load(norm_weights(half) + g * H + u, n);
        sums[half][0] = sums[half][0] + grad;
        sums[half][1] = sums[half][1] + grad * x;
        grad.store(row.grads + (half * G + g) * ld_h_ + u);
      }
  }
  if (sums_.wanted()) sums_.end_row();
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 2; ++i) row.means[half][i] = sum_lanes(sums[half][i]) * V(Acc(1) / Acc(G * H));
}

// To the products.
template <class Cell, class S>
void Backward<Cell, S>::back_to_products(const NormRow& row) const {
  const int64_t H = l_.hidden_size;
  for (int half = 0; half < 2; ++half) {
    Operand* to = (half == 0 ? shared_.igates : shared_.hgates) + row.at * ld_g_;
    for (int g = 0; g < G; ++g)
      for (int64_t u = 0; u < H; u += kLanes) {
        const int64_t n = std::min<int64_t>(kLanes, H - u);
        const V grad = V::load(row.grads + (half * G + g) * ld_h_ + u), x = row.normal(half, g, u, n, H);
        store(to + g * H + u, normalised_backward(x, row.of[half].scale, grad, row.means[half][0], row.means[half][1]),
              n);
      }
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
