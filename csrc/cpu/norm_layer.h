// Owns: how forward and backward go through a step whose gates, and c, are normalised: members of both classes.
// Must not know: equations, tensors.
//
// A thread has whole rows. Forward's products leave all gates of some rows before the first of them is normalised,
// where they lie, and goes on as without; what it keeps for backward are the normalised products and what they were
// scaled by. From these backward runs the cell forward where it knows more than h, and then goes the way back: from h
// to c as h reads it, to c, to the gates, to the products.
//
// Included once per instruction set, after forward.h and backward.h.

namespace rnnfast::cpu::RNNFAST_ISA {

// ------------------------------------------------------------------------------------------------------- forward
// The norm's weights and the bias of each half of the gates, in the order of their columns.
template <class Cell, class S>
void Forward<Cell, S>::prepare_norms() const {
  for (int i = 0; i < 4; ++i) {
    const S* from = i % 2 == 0 ? norm_weights<S>(d_.weights, i / 2) : norm_bias<S>(d_.weights, i / 2);
    for_gates(hidden_, [&](int64_t gate, int64_t column, int64_t n) {
      store(shared_.norms + i * columns_ + column, from ? load(from + gate, n) : V(Acc(0)), n);
    });
  }
}

// One half of the gates of `count` rows where they lie: the products before, and norm LN(product) + bias behind. at:
// the places of these rows among those of all steps, where what backward wants is kept.
template <class Cell, class S>
void Forward<Cell, S>::normalise(Acc* rows, int64_t count, int half, const int64_t* at) const {
  // Only the last block's columns are padded.
  const Statistics<Acc> of = statistics(rows, ld_gates_, count, G * l_.hidden_size);
  const Acc *weights = shared_.norms + 2 * half * columns_, *shifts = weights + columns_;
  if (d_.saved) {
    S* kept[kNormRows<Acc>];
    for (int64_t r = 0; r < count; ++r) {
      kept[r] = static_cast<S*>(d_.saved) + at[r] * sizes_.saved_width() + half * G * l_.hidden_size;
      scales_[half * s_.rows + at[r]] = of.scale.lanes[r];
    }
    for_gates(hidden_, [&](int64_t gate, int64_t column, int64_t n) {
      const V weight = V::load(weights + column), shift = V::load(shifts + column);
      for (int64_t r = 0; r < count; ++r) {
        Acc* product = rows + r * ld_gates_ + column;
        const V normal = of.normal(V::load(product), r);
        store(kept[r] + gate, normal, n);
        store(product, normal * weight + shift, n);
      }
    });
    return;
  }
  for (int64_t e = 0; e < columns_; e += kLanes) {
    const V weight = V::load(weights + e), shift = V::load(shifts + e);
    for (int64_t r = 0; r < count; ++r) {
      Acc* product = rows + r * ld_gates_ + e;
      (of.normal(V::load(product), r) * weight + shift).store(product);
    }
  }
}

// The input half of the gates of the steps [s, end), as project left them: rows at once, of whatever steps.
template <class Cell, class S>
void Forward<Cell, S>::normalise_igates(int64_t s, int64_t end) const {
  Acc* rows = own_.igates;
  int64_t count = 0, at[kNormRows<Acc>];
  const auto flush = [&] {
    normalise(rows, count, 0, at);
    rows += count * ld_gates_;
    count = 0;
  };
  for (; s < end; ++s)
    for (int64_t i = 0; i < living(s); ++i) {
      at[count++] = s_.offset(time(s)) + rows_.begin + i;
      if (count == kNormRows<Acc>) flush();
    }
  flush();
}

// The cells of a step's `count` rows, the first of which is the place-th of all steps.
template <class Cell, class S>
void Forward<Cell, S>::normalised_cells(int64_t count, int64_t igates_row, int64_t place) const {
  const Unit* h[kTileRows];
  for_chunks(0, count, sizes_.norm_rows(), [&](int64_t first, int64_t chunk) {
    StepRow* rows = own_.rows + first;
    const Acc* igates = own_.igates + (igates_row + first) * ld_gates_;
    for (int64_t b = 0; b < hidden_.count(); ++b)
      for_chunks(0, chunk, w_hh_.row_chunk(b), [&](int64_t i, int64_t n) {
        for (int64_t r = 0; r < n; ++r) h[r] = reinterpret_cast<const Unit*>(rows[i + r].h);
        w_hh_.multiply(b, h, n, own_.hgates + i * ld_gates_ + hidden_.column(b), ld_gates_);
      });
    for_chunks(0, chunk, kNormRows<Acc>, [&](int64_t i, int64_t n) {
      Acc* half = own_.hgates + i * ld_gates_;
      int64_t at[kNormRows<Acc>];
      for (int64_t r = 0; r < n; ++r) {
        at[r] = place + first + i + r;
        if (Cell::kStates > 1) rows[i + r].values = values(r);
      }
      normalise(half, n, 1, at);
      for (int64_t b = 0; b < hidden_.count(); ++b) {
        const Acc *ig = igates + i * ld_gates_ + hidden_.column(b), *hg = half + hidden_.column(b);
        constexpr bool kToValues = Cell::kStates > 1;
        int64_t r = 0;
        for (; r + kAbreast <= n; r += kAbreast)
          cell<true, kAbreast, kToValues>(rows + i + r, b, ig + r * ld_gates_, hg + r * ld_gates_);
        for (; r < n; ++r) cell<true, 1, kToValues>(rows + i + r, b, ig + r * ld_gates_, hg + r * ld_gates_);
      }
      if constexpr (Cell::kStates > 1) hidden_from_c(rows + i, n);
    });
  });
}

// h' of rows from all of c' and what the cell kept.
template <class Cell, class S>
void Forward<Cell, S>::hidden_from_c(const StepRow* rows, int64_t count) const {
  const int64_t H = l_.hidden_size;
  const S *weight = static_cast<const S*>(d_.weights.norm_c), *shift = static_cast<const S*>(d_.weights.norm_bias_c);
  const Acc* c = values(0) + Cell::kSaved * ld_c_;
  const Statistics<Acc> of = statistics(c, values(1) - values(0), count, H);
  for (int64_t r = 0; r < count; ++r) {
    const StepRow& row = rows[r];
    for (int64_t u = 0; u < H; u += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, H - u);
      V saved[Cell::kSaved + 1], state[2];
      for (int k = 0; k < Cell::kSaved; ++k) saved[k] = V::load(row.values + k * ld_c_ + u);
      const V c = V::load(row.values + Cell::kSaved * ld_c_ + u);
      state[1] = of.normal(c, r) * load(weight + u, n) + load(shift + u, n);
      const V h = Cell::hidden(saved, state);
      if (row.hidden) {
        store_operand<S>(row.hidden + u, h, n);
      } else {
        write_h<true>(row, u, n, h);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------ backward
// A row of a step. Null where there is none, or zero.
template <class Cell, class S>
struct Backward<Cell, S>::NormRow {
  int64_t slot;      // its row in buffers of the batch
  const S* normals;  // [2, G*H] the two halves of the gates, normalised
  bool zero;
  const S *h, *prev_h, *prev_c, *grad_output, *grad_cell;
  const Acc *keep_h, *keep_c;
  Acc* grads;  // [1 or 2 halves, G, ld_h] of the gates
  // With two states.
  Acc *values = nullptr, *c = nullptr;  // [S, ld_h] what the cell kept; [ld_h] c'
  // [ld_h] of c as h' reads it before the norm's weight; what hidden_backward leaves
  Acc *grad_c = nullptr, *grad_output_gate = nullptr;

  RNNFAST_INLINE void load_values(int64_t u, int64_t ld, V* to) const {
    for (int k = 0; k < Cell::kSaved; ++k) to[k] = V::load(values + k * ld + u);
  }
  RNNFAST_INLINE void load_prev(int64_t u, int64_t n, V* prev) const {
    prev[0] = prev_h ? load(prev_h + u, n) : V(Acc(0));
    prev[1] = prev_c ? load(prev_c + u, n) : V(Acc(0));
  }
};

// Rows whose parts of the way back run after each other, and what the parts hand on.
template <class Cell, class S>
struct Backward<Cell, S>::NormRows {
  int64_t count;
  int64_t at;  // the first's row in buffers of the pass
  NormRow row[kNormRows<Acc>];
  PerRow<Acc> scale[2];
  Statistics<Acc> of_c;
  PerRow<Acc> means[2][2], means_c[2];  // of the gradient, and of its product with what is normalised

  RNNFAST_INLINE V normal_c(int64_t r, int64_t u) const { return of_c.normal(V::load(row[r].c + u), r); }
};

template <class Cell, class S>
void Backward<Cell, S>::prepare_norms() const {
  const DirectionWeights& w = d_.weights;
  const auto line = [&](int to, const S* from) {
    for (int64_t u = 0; u < ld_h_; u += kLanes)
      (from ? load(from + u, l_.hidden_size - u) : V(Acc(0))).store(shared_.norms + to * ld_h_ + u);
  };
  for (int half = 0; half < 2; ++half)
    for (int g = 0; g < G; ++g) {
      const S* bias = norm_bias<S>(w, half);
      line(half * G + g, norm_weights<S>(w, half) + g * l_.hidden_size);
      line((2 + half) * G + g, bias ? bias + g * l_.hidden_size : nullptr);
    }
  if (Cell::kStates == 1) return;
  line(4 * G, static_cast<const S*>(w.norm_c));
  line(4 * G + 1, static_cast<const S*>(w.norm_bias_c));
}

// The thread's `count` rows of step t, the first of which is the place-th of what was saved.
template <class Cell, class S>
void Backward<Cell, S>::normalised_cells(int64_t t, int64_t count, int64_t place) {
  for_chunks(0, count, sizes_.norm_rows(), [&](int64_t first, int64_t n) {
    NormRows rows;
    rows.count = n;
    rows.at = pass_row(t, rows_.begin + first);
    for (int half = 0; half < 2; ++half)
      load(scales_ + half * scale_rows_ + place + first, n).store(rows.scale[half].lanes);
    for (int64_t r = 0; r < n; ++r)
      rows.row[r] = norm_row(t, rows_.begin + first + r, saved_ + (place + first + r) * saved_width(),
                             own_.norms + r * left_stride());
    const auto back = [&](auto whole) {
      if constexpr (Cell::kStates > 1) back_to_c<whole>(rows);
      back_to_gates<whole>(rows);
      back_to_products<whole>(rows);
    };
    l_.hidden_size % kLanes == 0 ? back(std::true_type()) : back(std::false_type());
  });
}

// left: where the parts of the way back leave what they hand on.
template <class Cell, class S>
typename Backward<Cell, S>::NormRow Backward<Cell, S>::norm_row(int64_t t, int64_t slot, const S* normals,
                                                                Acc* left) const {
  NormRow row;
  row.slot = slot;
  row.normals = normals;
  row.zero = starts_from_zero(s_, t, slot, d_.reverse);
  row.prev_h = Cell::kStates == 1 ? previous_h(t, slot) : nullptr;
  row.prev_c = Cell::kStates > 1 ? previous_c(t, slot) : nullptr;
  row.h = at<const S>(d_.output, s_, t, slot);  // where zoneout kept the last one, the cell's gradient is zero
  row.grad_output = at<const S>(d_.grad_output, s_, t, slot);
  row.grad_cell = at<const S>(d_.grad_c, s_, t, slot);
  row.keep_h = shared_.outputs ? nullptr : keep_h_.row(slot);
  row.keep_c = keep_c_.row(slot);
  row.grads = left;
  if (Cell::kStates > 1) {
    row.values = row.grads + kGradHalves * G * ld_h_;
    row.c = row.values + Cell::kSaved * ld_h_;
    row.grad_c = row.c + ld_h_;
    row.grad_output_gate = row.grad_c + ld_h_;
  }
  return row;
}

// What the cell keeps, and its state, of a vector of units: from the halves of their gates, normalised [2, G*H].
template <class Cell, class S>
RNNFAST_INLINE void Backward<Cell, S>::forward_again(const S* normals, int64_t u, int64_t n, const V* prev, V* values,
                                                     V* state) const {
  const int64_t H = l_.hidden_size;
  V gates[2][G];
  for (int half = 0; half < 2; ++half)
    for (int g = 0; g < G; ++g)
      gates[half][g] = load(normals + (half * G + g) * H + u, n) * V::load(norm_line(half * G + g) + u) +
                       V::load(norm_line((2 + half) * G + g) + u);
  Cell::forward(gates[0], gates[1], prev, state, values);
}

// What forward would have kept of `count` rows, bit for bit; they take their place in the window from `first` on. x, h:
// what their step read.
template <class Cell, class S>
void Backward<Cell, S>::recompute_normalised(const Unit* const* x, const Unit* const* h, int64_t first, int64_t count) {
  const int64_t gates = G * l_.hidden_size, ld = sizes_.ld_gates_again();
  const UnitBlocks blocks = sizes_.gate_blocks(G);
  Acc* const halves[2] = {own_.igates, own_.hgates};
  for (int64_t b = 0; b < blocks.count(); ++b) {
    w_ih_again_.multiply(b, x, count, halves[0] + blocks.column(b), ld);
    w_hh_again_.multiply(b, h, count, halves[1] + blocks.column(b), ld);
  }
  for (int half = 0; half < 2; ++half)
    for_chunks(0, count, kNormRows<Acc>, [&](int64_t i, int64_t n) {
      const Acc* rows = halves[half] + i * ld;
      const Statistics<Acc> of = statistics(rows, ld, n, gates);
      S* normals = window_ + (first + i) * saved_width() + half * gates;
      for_gates(blocks, [&](int64_t gate, int64_t column, int64_t lanes) {
        for (int64_t r = 0; r < n; ++r)
          store(normals + r * saved_width() + gate, of.normal(V::load(rows + r * ld + column), r), lanes);
      });
      store(window_scales_ + half * window_rows_ + first + i, V::load(of.scale.lanes), n);
    });
}

// The gradient of h', and in place of what is carried the part that zoneout's last h gets.
template <class Cell, class S>
RNNFAST_INLINE Vec<acc_t<S>> Backward<Cell, S>::take_grad_h(const NormRow& row, int64_t u, int64_t n) const {
  if (shared_.outputs) return V::load(shared_.grad_hidden + row.slot * ld_h_ + u);
  Acc* carried = shared_.grad_h + row.slot * ld_p_ + u;
  V grad = V::load(carried);
  if (row.grad_output) grad = grad + load(row.grad_output + u, n);
  (row.keep_h ? divide_gradient(V::load(row.keep_h + u), grad) : V(Acc(0))).store(carried);
  return grad;
}

// From h' to c as h' reads it.
template <class Cell, class S>
template <bool kWhole>
void Backward<Cell, S>::back_to_c(NormRows& rows) {
  const int64_t H = l_.hidden_size, ld = ld_h_;
  const Acc *weight = norm_line(4 * G), *bias = norm_line(4 * G + 1);
  const NormSums<Acc> sums = sums_;  // a copy, which no store to memory can change
  for (int64_t r = 0; r < rows.count; ++r) {
    const NormRow& row = rows.row[r];
    for (int64_t u = 0; u < H; u += kLanes) {
      const int64_t n = lanes<kWhole>(u);
      V values[Cell::kSaved + 1], prev[2], state[2];
      row.load_prev(u, n, prev);
      forward_again(row.normals, u, n, prev, values, state);
      for (int k = 0; k < Cell::kSaved; ++k) values[k].store(row.values + k * ld + u);
      state[1].store(row.c + u);
    }
  }
  rows.of_c = statistics(rows.row[0].c, left_stride(), rows.count, H);
  RowSums<Acc> row_sums[2];
  for (int64_t r = 0; r < rows.count; ++r) {
    const NormRow& row = rows.row[r];
    V row_sum[2] = {V(Acc(0)), V(Acc(0))};
    for (int64_t u = 0; u < H; u += kLanes) {
      const int64_t n = lanes<kWhole>(u);
      V values[Cell::kSaved + 1], state[2], grad_gate;
      row.load_values(u, ld, values);
      const V c = rows.normal_c(r, u), by = V::load(weight + u);
      state[1] = c * by + V::load(bias + u);
      if (shared_.outputs) store(shared_.hidden + (rows.at + r) * H + u, Cell::hidden(values, state), n);
      V grad = Cell::hidden_backward(values, state, take_grad_h(row, u, n), grad_gate);
      if (sums.wanted()) {
        sums.add(4 * G, u, grad * c);
        sums.add(4 * G + 1, u, grad);
      }
      grad = grad * by;
      row_sum[0] = row_sum[0] + grad;
      row_sum[1] = row_sum[1] + grad * c;
      grad.store(row.grad_c + u);
      grad_gate.store(row.grad_output_gate + u);
    }
    for (int i = 0; i < 2; ++i) row_sums[i][r] = row_sum[i];
  }
  for (int i = 0; i < 2; ++i) row_sums[i].means(rows.count, H).store(rows.means_c[i].lanes);
}

// To the gates.
template <class Cell, class S>
template <bool kWhole>
void Backward<Cell, S>::back_to_gates(NormRows& rows) {
  const int64_t H = l_.hidden_size, ld = ld_h_;
  const Acc* const weights = norm_line(0);
  RowSums<Acc> row_sums[2][2];
  for (int64_t r = 0; r < rows.count; ++r) {
    const NormRow& row = rows.row[r];
    V row_sum[2][2];
    for (auto& half : row_sum)
      for (V& sum : half) sum = V(Acc(0));
    for (int64_t u = 0; u < H; u += kLanes) {
      const int64_t n = lanes<kWhole>(u);
      V values[Cell::kSaved + 1], prev[2], grads[2][G], grad_prev[2];
      row.load_prev(u, n, prev);
      if constexpr (Cell::kStates > 1) {
        row.load_values(u, ld, values);
        Acc* carried = shared_.grad_c + row.slot * ld + u;
        V grad = V::load(carried), kept(Acc(0));
        if (row.grad_cell) grad = grad + load(row.grad_cell + u, n);
        if (row.keep_c) kept = divide_gradient(V::load(row.keep_c + u), grad);
        grad = grad + normalised_backward(rows.normal_c(r, u), rows.of_c.scale[r], V::load(row.grad_c + u),
                                          rows.means_c[0][r], rows.means_c[1][r]);
        Cell::candidate_backward(values, prev, grad, V::load(row.grad_output_gate + u), grads[0], grads[1], grad_prev);
        (row.zero ? V(Acc(0)) : grad_prev[1] + kept).store(carried);
      } else {
        V again[1];  // as row.h is, but for the rounding of what was saved
        if constexpr (Cell::kSaved > 0) forward_again(row.normals, u, n, prev, values, again);
        const V state[1] = {load(row.h + u, n)}, grad[1] = {take_grad_h(row, u, n)};
        Cell::backward(values, prev, state, grad, grads[0], grads[1], grad_prev);
      }
      // The part that does not pass W_hh; the product is added to it.
      if (!shared_.outputs) {
        Acc* carried = shared_.grad_h + row.slot * ld_p_ + u;
        (V::load(carried) + grad_prev[0]).store(carried);
      }
      for (int half = 0; half < 2; ++half)
        for (int g = 0; g < G; ++g) {
          const V grad = grads[half][g] * V::load(weights + (half * G + g) * ld + u);
          row_sum[half][0] = row_sum[half][0] + grad;
          row_sum[half][1] = row_sum[half][1] + grad * load(row.normals + (half * G + g) * H + u, n);
          if (half < kGradHalves) grads[half][g].store(row.grads + (half * G + g) * ld + u);
        }
    }
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 2; ++i) row_sums[half][i][r] = row_sum[half][i];
  }
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 2; ++i) row_sums[half][i].means(rows.count, G * H).store(rows.means[half][i].lanes);
}

// To the products. Both halves at once, which mostly have one gradient.
template <class Cell, class S>
template <bool kWhole>
void Backward<Cell, S>::back_to_products(const NormRows& rows) {
  const int64_t H = l_.hidden_size, ld = ld_h_, ld_g = ld_g_;
  const int64_t normals_stride = saved_width(), grads_stride = left_stride();
  const NormSums<Acc> sums = sums_;
  Operand* const products[2] = {shared_.igates + rows.at * ld_g, shared_.hgates + rows.at * ld_g};
  for (int g = 0; g < G; ++g)
    for (int64_t u = 0; u < H; u += kLanes) {
      const int64_t n = lanes<kWhole>(u), gate = g * H + u;
      const S* const normals = rows.row[0].normals + gate;
      const Acc* const grads = rows.row[0].grads + g * ld + u;
      V weight[2], grad_weight[2], grad_bias[2];
      for (int half = 0; half < 2; ++half) {
        weight[half] = V::load(norm_line(half * G + g) + u);
        grad_weight[half] = grad_bias[half] = V(Acc(0));
      }
      for (int64_t r = 0; r < rows.count; ++r)
        for (int half = 0; half < 2; ++half) {
          const V x = load(normals + r * normals_stride + half * G * H, n),
                  grad = V::load(grads + r * grads_stride + half % kGradHalves * G * ld);
          grad_weight[half] = grad_weight[half] + grad * x;
          grad_bias[half] = grad_bias[half] + grad;
          store(products[half] + r * ld_g + gate,
                normalised_backward(x, rows.scale[half][r], grad * weight[half], rows.means[half][0][r],
                                    rows.means[half][1][r]),
                n);
        }
      if (!sums.wanted()) continue;
      for (int half = 0; half < 2; ++half) {
        sums.add(half * G + g, u, grad_weight[half]);
        if (half == 0 || Cell::kSplitGates) sums.add((2 + half) * G + g, u, grad_bias[half]);
      }
    }
  if (sums_.wanted()) sums_.end_rows(rows.count);
}

// The gradients of norms and biases, from the sums of all threads, which share the units out.
template <class Cell, class S>
void Backward<Cell, S>::add_norm_sums() {
  void* const of_gates[4] = {d_.grad_norm_ih, d_.grad_norm_hh, d_.grad_b_ih, d_.grad_b_hh};
  void* const of_c[2] = {d_.grad_norm_c, d_.grad_norm_bias_c};
  const Share share(ld_h_ / kLanes, m_.rank, m_.size);
  for (int64_t u = share.begin * kLanes; u < share.end * kLanes; u += kLanes) {
    const auto write = [&](int line, void* to, int64_t first) {
      V sum(Acc(0));
      for (int rank = 0; rank < sizes_.threads_a_direction(); ++rank) sum = sum + norm_sums(rank).total(line, u);
      if (to) store(static_cast<S*>(to) + first + u, sum, l_.hidden_size - u);
    };
    for (int kind = 0; kind < 4; ++kind)
      for (int g = 0; g < G; ++g)
        write((kind == 3 && !Cell::kSplitGates ? 2 : kind) * G + g, of_gates[kind], g * l_.hidden_size);
    for (int kind = 0; kind < 2 && Cell::kStates > 1; ++kind) write(4 * G + kind, of_c[kind], 0);
  }
}

}  // namespace rnnfast::cpu::RNNFAST_ISA
