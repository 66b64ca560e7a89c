// Owns: one layer backward over the whole sequence.
// Must not know: equations (the cell has them), tensors.
//
// The loop goes from the last step to the first: the cell turns the gradient of a step's state into the gradients of
// its gates, and one product with W_hh carries them to the step before. The gradients of the input and of the weights
// come behind each pass of it, from backward_products.h. Where forward kept no gates they are computed again, for a
// window of steps at a time right before the loop reads them: every h is known, so that is two products, and the window
// stays in the cache. A cell with two products a step goes back through the second between the cell and the first.
//
// Included once per instruction set, after backward_products.h.

namespace rnnfast::cpu::RNNFAST_ISA {

template <class Cell, class S>
class Backward {
  using Unit = typename Product<S>::Unit;
  using Operand = typename Product<S>::Operand;
  using Acc = acc_t<S>;
  using V = Vec<Acc>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int G = Cell::kGates;
  static constexpr int kFirst = first_gates<Cell>;
  static constexpr bool kDiagonal = is_diagonal<Cell>;
  using HiddenColumns = std::conditional_t<kDiagonal, ColumnDiagonal<S>, ColumnMatrix<S>>;
  using HiddenMatrix = std::conditional_t<kDiagonal, GateDiagonal<S>, GateMatrix<S>>;
  using Workspace = BackwardWorkspace<S>;
  using Shared = typename Workspace::Shared;
  using Own = typename Workspace::Own;

 public:
  static size_t workspace_bytes(const LayerBackward& layer, int threads) {
    return bytes_of(Workspace(layer, traits_of<Cell>, threads));
  }

  static void run(const LayerBackward& layer, void* workspace, int threads) {
    const Workspace sizes(layer, traits_of<Cell>, threads);
    Steps passes[2];
    for (int d = 0; d < layer.directions; ++d) passes[d].begin = layer.sequence.steps;
    while (passes[0].begin > 0) {
      for (int d = 0; d < layer.directions; ++d)
        passes[d] = sizes.passes.pass_before(passes[d].begin, layer.direction[d].reverse);
      Barrier barriers[2];
      run_carved(sizes, workspace, sizes.plan.threads, [&](const Carved<Workspace>& pieces, int rank, int size) {
        for_directions(layer.directions, rank, size, sizes.plan.divide, barriers, [&](int d, const Member& member) {
          Backward(sizes, layer.direction[d], member, pieces.shared[d], pieces.own, passes[d]).run();
        });
      });
      GradientProducts<S>::run(sizes, workspace, passes);
    }
  }

 private:
  Backward(const Workspace& sizes, const DirectionBackward& direction, const Member& member, const Shared& shared,
           const Own& own, const Steps& pass)
      : l_(sizes.layer),
        d_(direction),
        m_(member),
        s_(sizes.layer.sequence),
        sizes_(sizes),
        shared_(shared),
        own_(own),
        pass_(pass),
        rows_(row_share(s_, member)),
        rows_of_pass_(sizes.passes.rows_of(pass, direction.reverse)),
        outputs_(column_blocks<S>(l_.output_size, member.divide, sizes.threads_a_direction())),
        hidden_(column_blocks<S>(l_.hidden_size, member.divide, sizes.threads_a_direction())),
        w_hh_(outputs_, static_cast<const S*>(d_.weights.w_hh), kFirst * l_.hidden_size, shared_.w_hh),
        w_second_(outputs_, second_rows<Cell, S>(d_.weights.w_hh, l_.hidden_size, l_.output_size),
                  (G - kFirst) * l_.hidden_size, shared_.w_second),
        w_hr_(hidden_, static_cast<const S*>(d_.weights.w_hr), l_.output_size, shared_.w_hr),
        w_ih_again_(sizes_.gate_blocks(G), static_cast<const S*>(d_.weights.w_ih), product_bias(d_.weights.b_ih),
                    l_.input_size, shared_.forward_ih, shared_.bias_ih),
        w_hh_again_(sizes_.gate_blocks(kFirst), static_cast<const S*>(d_.weights.w_hh), product_bias(d_.weights.b_hh),
                    l_.output_size, shared_.forward_hh, shared_.bias_hh),
        w_second_again_(sizes_.gate_blocks(G - kFirst),
                        second_rows<Cell, S>(d_.weights.w_hh, l_.hidden_size, l_.output_size),
                        second_rows<Cell, S>(d_.weights.b_hh, l_.hidden_size, 1), l_.output_size,
                        shared_.forward_second, shared_.bias_second),
        window_rows_(sizes.window_rows(rows_.end - rows_.begin)),
        window_(sizes.recomputes() ? shared.saved + sizes.windows().first(member, rows_) * sizes.saved_width()
                                   : nullptr),
        window_scales_(shared.scales ? shared.scales + 2 * sizes.windows().first(member, rows_) : nullptr),
        saved_(sizes.recomputes() ? window_ : static_cast<const S*>(direction.saved)),
        scales_(sizes.recomputes() ? window_scales_ : scales_behind(saved_, s_.rows, sizes.saved_width())),
        scale_rows_(sizes.recomputes() ? window_rows_ : s_.rows),
        output_share_(block_share(outputs_.count(), member)),
        hidden_share_(block_share(hidden_.count(), member)),
        ld_p_(Workspace::ld_acc(l_.output_size)),
        ld_h_(Workspace::ld_acc(l_.hidden_size)),
        ld_g_(sizes.ld_gates()),
        keep_h_(l_.noise, l_.noise.zoneout_h, Draw::zoneout_h, s_, d_.reverse, rows_,
                outputs_.first(output_share_.begin), end_of(outputs_, output_share_), l_.output_size,
                keep_of(shared.keep_h, l_.output_size)),
        keep_c_(l_.noise, l_.noise.zoneout_c, Draw::zoneout_c, s_, d_.reverse, rows_,
                hidden_.first(hidden_share_.begin), end_of(hidden_, hidden_share_), l_.hidden_size,
                keep_of(shared.keep_c, l_.hidden_size)),
        sums_(norm_sums(member.rank)) {}
  // Normalised gates get their bias behind the product.
  const S* product_bias(const void* bias) const { return l_.layer_norm ? nullptr : static_cast<const S*>(bias); }
  // The thread's part of Zoneout's buffers.
  Acc* keep_of(Acc* all, int64_t units) const {
    return all ? all + Zoneout<Acc>::first(l_.noise, sizes_.steps(), m_, rows_, units) : nullptr;
  }
  NormSums<Acc> norm_sums(int rank) const {
    const int lines = sizes_.norm_lines();
    return {lines, ld_h_, shared_.sums ? shared_.sums + rank * NormSums<Acc>::elements(lines, ld_h_) : nullptr};
  }

  void run() {
    if (rows_of_pass_.begins) {
      prepare();
      m_.wait();
    }
    for (int64_t s = pass_.end - 1; s >= pass_.begin;) {
      if (kDiagonal && sizes_.recomputes()) m_.wait_step();  // the window may still be read
      const int64_t begin = sizes_.recomputes() ? recompute(s) : pass_.begin;
      for (; s >= begin; --s) varied() ? step<true>(s) : step<false>(s);
    }
    if (sums_.wanted()) sums_.flush();
    if (!rows_of_pass_.ends) return;
    m_.wait();
    finish();
    if (sums_.wanted()) add_norm_sums();
  }

  int64_t time(int64_t s) const { return d_.reverse ? s_.steps - 1 - s : s; }
  int64_t living(int64_t s) const {
    return std::max<int64_t>(0, std::min(rows_.end, s_.batch_size(time(s))) - rows_.begin);
  }

  // The states before step t, null where they are zero.
  const S* previous_h(int64_t t, int64_t slot) const {
    return previous_state<S>(s_, d_.output, d_.h0, l_.output_size, t, slot, d_.reverse);
  }
  // Where a row's gradients lie among those of the pass.
  int64_t pass_row(int64_t t, int64_t slot) const { return s_.offset(t) - rows_of_pass_.first + slot; }
  // With recurrent dropout.
  Acc* mask(int64_t slot) const { return shared_.mask + slot * ld_draw(l_.output_size); }
  const S* previous_c(int64_t t, int64_t slot) const {
    return previous_state<S>(s_, d_.c, d_.c0, l_.hidden_size, t, slot, d_.reverse);
  }

  void prepare() {
    const Share outputs(outputs_.count(), m_.rank, m_.size);
    for (int64_t b = outputs.begin; b < outputs.end; ++b) {
      w_hh_.prepare(b);
      if constexpr (has_two_products<Cell>) w_second_.prepare(b);
    }
    if (shared_.outputs) {
      const Share hidden(hidden_.count(), m_.rank, m_.size);
      for (int64_t b = hidden.begin; b < hidden.end; ++b) w_hr_.prepare(b);
    }
    if (sizes_.recomputes()) {
      const Share blocks(sizes_.gate_blocks(G).count(), m_.rank, m_.size);
      for (int64_t b = blocks.begin; b < blocks.end; ++b) {
        w_ih_again_.prepare(b);
        w_hh_again_.prepare(b);
        if constexpr (has_two_products<Cell>) w_second_again_.prepare(b);
      }
    }
    const Share rows(s_.batch, m_.rank, m_.size);
    for (int64_t j = rows.begin; j < rows.end; ++j) {
      const int64_t b = s_.batch_row(j);
      carry_in(d_.grad_h_n, b, l_.output_size, shared_.grad_h + j * ld_p_);
      if (Cell::kStates > 1) carry_in(d_.grad_c_n, b, l_.hidden_size, shared_.grad_c + j * ld_h_);
      if (shared_.mask) draw_dropout(l_.noise, d_.reverse, b, l_.output_size, mask(j));
    }
    if constexpr (takes_layer_norm<Cell>)
      if (l_.layer_norm && m_.rank == 0) prepare_norms();
    if (sums_.wanted())
      for (int rank = m_.rank; rank < sizes_.threads_a_direction(); rank += m_.size) norm_sums(rank).clear();
    // The last pair of an odd row is half a pair.
    if (G * l_.hidden_size % Product<S>::kPair != 0) {
      const Share all(sizes_.passes.rows(), m_.rank, m_.size);
      for (int64_t row = all.begin; row < all.end; ++row) {
        memset(shared_.igates + row * ld_g_ + G * l_.hidden_size, 0, sizeof(Operand));
        memset(shared_.hgates + row * ld_g_ + G * l_.hidden_size, 0, sizeof(Operand));
      }
    }
    if (shared_.outputs && sizes_.ld_outputs() > l_.output_size) {
      const Share all(sizes_.passes.rows(), m_.rank, m_.size);
      for (int64_t row = all.begin; row < all.end; ++row)
        memset(shared_.outputs + (row + 1) * sizes_.ld_outputs() - 1, 0, sizeof(Operand));
    }
  }

  static void carry_in(const void* grad, int64_t b, int64_t width, Acc* to) {
    for (int64_t u = 0; u < width; u += kLanes)
      (grad ? load(static_cast<const S*>(grad) + b * width + u, width - u) : V(Acc(0))).store(to + u);
  }

  // saved of the thread's rows, as forward would have kept it, for the steps [returned, last]: as many as fit.
  int64_t recompute(int64_t last) {
    int64_t begin = last, total = living(last);
    while (begin > pass_.begin && total + living(begin - 1) <= window_rows_) total += living(--begin);
    window_end_ = total;
    const Share share = m_.divide == Divide::units ? Share(total, m_.rank, m_.size) : Share(total, 0, 1);
    int64_t s = begin, i = share.begin;  // the i-th row of step s comes next
    const auto skip = [&] {
      for (; s <= last && i >= living(s); ++s) i -= living(s);
    };
    for_chunks(share.begin, share.end, kRowsAtOnce, [&](int64_t first, int64_t count) {
      const Unit *x[kRowsAtOnce], *h[kRowsAtOnce];
      const S *prev_h[kRowsAtOnce], *prev_c[kRowsAtOnce];
      for (int64_t row = 0; row < count; ++row, ++i) {
        skip();
        const int64_t t = time(s), slot = rows_.begin + i;
        const S* input = at<const S>(l_.input, s_, t, slot);
        Unit* copy = own_.inputs + row * units_of<S>(l_.input_size);
        if (!reads_in_place<S>(l_.input_size)) copy_row<S>(input, l_.input_size, copy);
        x[row] = reads_in_place<S>(l_.input_size) ? reinterpret_cast<const Unit*>(input) : copy;
        prev_h[row] = previous_h(t, slot);
        copy = own_.states + row * units_of<S>(l_.output_size);
        if (!prev_h[row]) {
          zero_units<S>(copy, l_.output_size);
        } else if (shared_.mask) {
          store_masked(prev_h[row], mask(slot), l_.output_size, copy);
        } else if (!reads_in_place<S>(l_.output_size)) {
          copy_row<S>(prev_h[row], l_.output_size, copy);
        }
        const bool in_place = prev_h[row] && !shared_.mask && reads_in_place<S>(l_.output_size);
        h[row] = in_place ? reinterpret_cast<const Unit*>(prev_h[row]) : copy;
        prev_c[row] = Cell::kStates > 1 ? previous_c(t, slot) : nullptr;
      }
      if constexpr (takes_layer_norm<Cell>)
        if (l_.layer_norm) return recompute_normalised(x, h, first, count);
      S* saved_rows = window_ + first * saved_width();
      if constexpr (has_two_products<Cell>) return recompute_two_products(x, h, count, saved_rows);
      const UnitBlocks blocks = sizes_.gate_blocks(G);
      for (int64_t b = 0; b < blocks.count(); ++b) {
        const int64_t columns = blocks.vectors(b) * kLanes, size = blocks.size(b);
        w_ih_again_.multiply(b, x, count, own_.igates, columns);
        w_hh_again_.multiply(b, h, count, own_.hgates, columns);
        for (int64_t row = 0; row < count; ++row) {
          S* saved = saved_rows + row * saved_width() + blocks.first(b);
          for (int64_t u = 0; u < size; u += kLanes) {
            const int64_t n = std::min<int64_t>(kLanes, size - u), unit = blocks.first(b) + u;
            V ig[G], hg[G], prev[2] = {V(Acc(0)), V(Acc(0))}, state[2], values[Cell::kSaved + 1];
            for (int g = 0; g < G; ++g) {
              ig[g] = V::load(own_.igates + row * columns + g * size + u);
              hg[g] = V::load(own_.hgates + row * columns + g * size + u);
            }
            if (Cell::kStates == 1 && prev_h[row]) prev[0] = load(prev_h[row] + unit, n);
            if (Cell::kStates > 1 && prev_c[row]) prev[1] = load(prev_c[row] + unit, n);
            Cell::forward(ig, hg, prev, state, values);
            for (int k = 0; k < Cell::kSaved; ++k) store(saved + k * l_.hidden_size + u, values[k], n);
          }
        }
      }
    });
    m_.wait_step();
    return begin;
  }

  // The same for a cell with two products, for the rows x and h.
  void recompute_two_products(const Unit* const* x, const Unit* const* h, int64_t count, S* saved_rows) {
    const UnitBlocks blocks = sizes_.gate_blocks(G);
    const Unit* gated_rows[kRowsAtOnce];
    for (int64_t row = 0; row < count; ++row) gated_rows[row] = own_.gated + row * units_of<S>(l_.output_size);
    zero_units<S>(own_.gated, count * units_of<S>(l_.output_size) * Product<S>::kPair);
    for (const bool second : {false, true})
      for (int64_t b = 0; b < blocks.count(); ++b) {
        const int64_t columns = blocks.vectors(b) * kLanes, size = blocks.size(b);
        Acc* igates = own_.igates + blocks.column(b) * kRowsAtOnce;
        if (second) {
          w_second_again_.multiply(b, gated_rows, count, own_.hgates, columns);
        } else {
          w_ih_again_.multiply(b, x, count, igates, columns);
          w_hh_again_.multiply(b, h, count, own_.hgates, columns);
        }
        for (int64_t row = 0; row < count; ++row)
          for (int64_t u = 0; u < size; u += kLanes) {
            const int64_t n = std::min<int64_t>(kLanes, size - u), unit = blocks.first(b) + u;
            const auto gate = [&](const Acc* gates, int g) { return V::load(gates + row * columns + g * size + u); };
            V ig[G], hg[G], values[Cell::kSaved];
            for (int g = 0; g < G; ++g) ig[g] = gate(igates, g);
            if (second) {
              V prev[1] = {V(Acc(0))}, state[1];  // which finish makes, and nobody reads
              for (int g = 0; g < kFirst; ++g) values[g] = V(Acc(0));
              for (int g = kFirst; g < G; ++g) hg[g - kFirst] = gate(own_.hgates, g - kFirst);
              Cell::finish(ig, hg, prev, state, values);
            } else {
              for (int g = 0; g < kFirst; ++g) hg[g] = gate(own_.hgates, g);
              const V gated = Cell::gate(ig, hg, load(reinterpret_cast<const Operand*>(h[row]) + unit, n), values);
              store_operand<S>(reinterpret_cast<Operand*>(own_.gated + row * units_of<S>(l_.output_size)) + unit, gated,
                               n);
            }
            for (int k = second ? kFirst : 0; k < (second ? Cell::kSaved : kFirst); ++k)
              store(saved_rows + row * saved_width() + k * l_.hidden_size + unit, values[k], n);
          }
      }
  }

  // Whether there is recurrent dropout, zoneout or layer normalisation: kVaried.
  bool varied() const { return shared_.mask || keep_h_.on() || keep_c_.on() || l_.layer_norm; }

  // norm_layer.h
  static constexpr int kGradHalves = Cell::kSplitGates ? 2 : 1;  // the other half has the same gradient
  struct NormRow;
  struct NormRows;
  void prepare_norms() const;
  const Acc* norm_line(int line) const { return shared_.norms + line * ld_h_; }
  // How many of a vector's units there are from the u-th on. kWhole: H is whole vectors, and the compiler knows it.
  template <bool kWhole>
  int64_t lanes(int64_t u) const {
    return kWhole ? kLanes : std::min<int64_t>(kLanes, l_.hidden_size - u);
  }
  void normalised_cells(int64_t t, int64_t count, int64_t place);
  NormRow norm_row(int64_t t, int64_t slot, const S* normals, Acc* left) const;
  int64_t left_stride() const { return sizes_.norm_vectors() * ld_h_; }
  V take_grad_h(const NormRow& row, int64_t u, int64_t n) const;
  void forward_again(const S* normals, int64_t u, int64_t n, const V* prev, V* values, V* state) const;
  void recompute_normalised(const Unit* const* x, const Unit* const* h, int64_t first, int64_t count);
  template <bool kWhole>
  void back_to_c(NormRows& rows);
  template <bool kWhole>
  void back_to_gates(NormRows& rows);
  template <bool kWhole>
  void back_to_products(const NormRows& rows);
  void add_norm_sums();

  int64_t saved_width() const { return sizes_.saved_width(); }

  template <bool kVaried>
  void step(int64_t s) {
    const int64_t t = time(s), count = living(s), row = pass_row(t, rows_.begin);
    const Unit* operands[kTileRows];
    if constexpr (kVaried) {
      keep_h_.reach(t);
      keep_c_.reach(t);
    }
    if (shared_.outputs) {
      for (int64_t i = 0; i < count; ++i) output_gradient<kVaried>(t, rows_.begin + i);
      m_.wait_step();
      for (int64_t b = hidden_share_.begin; b < hidden_share_.end; ++b)
        for_chunks(0, count, kTileRows, [&](int64_t i, int64_t n) {
          for (int64_t r = 0; r < n; ++r)
            operands[r] = reinterpret_cast<const Unit*>(shared_.outputs + (row + i + r) * sizes_.ld_outputs());
          w_hr_.multiply(b, operands, n, nullptr, shared_.grad_hidden + (rows_.begin + i) * ld_h_ + hidden_.column(b),
                         ld_h_);
        });
    }
    // Windows are filled in the order of steps and read from their end.
    const int64_t place = sizes_.recomputes() ? window_end_ -= count : s_.offset(t) + rows_.begin;
    const S* saved = saved_ + place * saved_width();
    const bool normalised = kVaried && l_.layer_norm;
    if constexpr (kVaried && takes_layer_norm<Cell>)
      if (normalised) normalised_cells(t, count, place);
    for (int64_t i = 0; i < count && !normalised; ++i) cell<kVaried>(t, rows_.begin + i, saved + i * saved_width());
    if (!kDiagonal) m_.wait_step();  // else each thread reads its own units of the gates
    if constexpr (has_two_products<Cell>) {
      second_product<kVaried>(t, count, saved);
      m_.wait_step();
    }
    for (int64_t b = output_share_.begin; b < output_share_.end; ++b) {
      for_chunks(0, count, chunk_rows(outputs_.vectors(b)), [&](int64_t i, int64_t n) {
        for (int64_t r = 0; r < n; ++r)
          operands[r] = reinterpret_cast<const Unit*>(shared_.hgates + (row + i + r) * ld_g_);
        Acc* grad = shared_.grad_h + (rows_.begin + i) * ld_p_ + outputs_.column(b);
        const Acc* carried = shared_.outputs && !(kVaried && keep_h_.on()) ? nullptr : grad;
        if (kVaried && shared_.mask) {
          multiply_masked(b, operands, rows_.begin + i, n, carried, grad);
        } else {
          w_hh_.multiply(b, operands, n, carried, grad, ld_p_);
        }
        for (int64_t r = 0; r < n; ++r)
          if (starts_from_zero(s_, t, rows_.begin + i + r, d_.reverse))
            memset(grad + r * ld_p_, 0, outputs_.vectors(b) * kLanes * sizeof(Acc));
      });
    }
  }
  // Of a cell with two products: back through the second, and through the gate of what it read.
  template <bool kVaried>
  void second_product(int64_t t, int64_t count, const S* saved) {
    const int64_t H = l_.hidden_size, row = pass_row(t, rows_.begin);
    const Unit* operands[kTileRows];
    for (int64_t b = output_share_.begin; b < output_share_.end; ++b) {
      const int64_t columns = outputs_.vectors(b) * kLanes;
      for_chunks(0, count, chunk_rows(outputs_.vectors(b)), [&](int64_t i, int64_t n) {
        for (int64_t r = 0; r < n; ++r)
          operands[r] = reinterpret_cast<const Unit*>(shared_.hgates + (row + i + r) * ld_g_ + kFirst * H);
        w_second_.multiply(b, operands, n, nullptr, own_.grad_input, columns);
        for (int64_t r = 0; r < n; ++r) {
          const int64_t slot = rows_.begin + i + r;
          const S* prev = previous_h(t, slot);
          for (int64_t u = 0; u < outputs_.size(b); u += kLanes) {
            const int64_t lanes = std::min<int64_t>(kLanes, outputs_.size(b) - u), unit = outputs_.first(b) + u;
            V values[Cell::kSaved], grad_gate, operand(Acc(0)), factor(Acc(1));
            for (int k = 0; k < Cell::kSaved; ++k)
              values[k] = load(saved + (i + r) * saved_width() + k * H + unit, lanes);
            if (prev) operand = load(prev + unit, lanes);
            if (kVaried && shared_.mask) {
              factor = V::load(mask(slot) + unit);
              operand = operand * factor;
            }
            const V grad = V::load(own_.grad_input + r * columns + u);
            const V grad_operand = Cell::backward_gate(values, operand, grad, grad_gate);
            store(shared_.hgates + (row + i + r) * ld_g_ + unit, grad_gate, lanes);
            store(shared_.gated + (row + i + r) * l_.output_size + unit, Cell::gated(values, operand), lanes);
            Acc* carried = shared_.grad_h + slot * ld_p_ + unit;
            (V::load(carried) + (kVaried ? factor * grad_operand : grad_operand)).store(carried);
          }
        }
      });
    }
  }

  // grad = carried + m (gates W_hh) for the n rows from `slot` on and the columns of block b.
  void multiply_masked(int64_t b, const Unit* const* gates, int64_t slot, int64_t n, const Acc* carried,
                       Acc* grad) const {
    const int64_t columns = outputs_.vectors(b) * kLanes;
    w_hh_.multiply(b, gates, n, nullptr, own_.grad_input, columns);
    for (int64_t r = 0; r < n; ++r)
      for (int64_t u = 0; u < columns; u += kLanes) {
        const V product = V::load(own_.grad_input + r * columns + u) * V::load(mask(slot + r) + outputs_.first(b) + u);
        (carried ? V::load(carried + r * ld_p_ + u) + product : product).store(grad + r * ld_p_ + u);
      }
  }
  static int chunk_rows(int64_t vectors) { return kMaxRows[std::min<int64_t>(kMaxVectors, vectors)]; }

  // With a projection: the gradient of the step's output, kept for the products over the steps. With zoneout that is
  // the candidate's part; the last state's stays behind as what is carried.
  template <bool kVaried>
  void output_gradient(int64_t t, int64_t slot) {
    Operand* to = shared_.outputs + pass_row(t, slot) * sizes_.ld_outputs();
    for (int64_t b = output_share_.begin; b < output_share_.end; ++b)
      for (int64_t u = 0; u < outputs_.size(b); u += kLanes) {
        const int64_t n = std::min<int64_t>(kLanes, outputs_.size(b) - u), unit = outputs_.first(b) + u;
        V grad = V::load(shared_.grad_h + slot * ld_p_ + unit);
        if (d_.grad_output.data) grad = grad + load(at<const S>(d_.grad_output, s_, t, slot) + unit, n);
        if (kVaried && keep_h_.on()) {
          const V kept = divide_gradient(V::load(keep_h_.row(slot) + unit), grad);
          kept.store(shared_.grad_h + slot * ld_p_ + unit);
        }
        store(to + unit, grad, n);
      }
  }

  template <bool kVaried>
  void cell(int64_t t, int64_t slot, const S* saved) {
    const int64_t H = l_.hidden_size, row = pass_row(t, slot);
    const bool zero = starts_from_zero(s_, t, slot, d_.reverse);
    const S* h = at<const S>(d_.output, s_, t, slot);
    const S* c = Cell::kStates > 1 ? at<const S>(d_.c, s_, t, slot) : nullptr;
    const S* prev_h = Cell::kStates == 1 ? previous_h(t, slot) : nullptr;
    const S* prev_c = Cell::kStates > 1 ? previous_c(t, slot) : nullptr;
    const S* grad_output = at<const S>(d_.grad_output, s_, t, slot);
    const S* grad_cell = at<const S>(d_.grad_c, s_, t, slot);
    S* grad_state = at<S>(d_.grad_states, s_, t, slot);
    Operand* igates = shared_.igates + row * ld_g_;
    Operand* hgates = shared_.hgates + row * ld_g_;
    const Acc* keep_h = kVaried && !shared_.outputs ? keep_h_.row(slot) : nullptr;
    const Acc* keep_c = kVaried ? keep_c_.row(slot) : nullptr;
    for (int64_t b = hidden_share_.begin; b < hidden_share_.end; ++b)
      for (int64_t u = hidden_.first(b); u < hidden_.first(b) + hidden_.size(b); u += kLanes) {
        const int64_t n = std::min<int64_t>(kLanes, hidden_.first(b) + hidden_.size(b) - u);
        V values[Cell::kSaved + 1], prev[2] = {V(Acc(0)), V(Acc(0))}, state[2] = {V(Acc(0)), V(Acc(0))}, grad[2];
        V grad_igates[G], grad_hgates[G], grad_prev[2], kept[2] = {V(Acc(0)), V(Acc(0))};
        for (int k = 0; k < Cell::kSaved; ++k) values[k] = load(saved + k * H + u, n);
        Acc* carried_h = shared_.grad_h + slot * ld_p_ + u;
        Acc* carried_c = Cell::kStates > 1 ? shared_.grad_c + slot * ld_h_ + u : nullptr;
        if (shared_.outputs) {
          grad[0] = V::load(shared_.grad_hidden + slot * ld_h_ + u);
        } else {
          grad[0] = V::load(carried_h);
          if (grad_output) grad[0] = grad[0] + load(grad_output + u, n);
        }
        if (!kVaried && grad_state) store(grad_state + u, grad[0], n);
        if (kVaried && keep_h) kept[0] = divide_gradient(V::load(keep_h + u), grad[0]);
        if constexpr (Cell::kStates > 1) {
          state[1] = load(c + u, n);
          if (prev_c) prev[1] = load(prev_c + u, n);
          grad[1] = V::load(carried_c);
          if (grad_cell) grad[1] = grad[1] + load(grad_cell + u, n);
          if (kVaried && keep_c) {
            kept[1] = divide_gradient(V::load(keep_c + u), grad[1]);
            state[1] = Cell::candidate(values, prev);
          }
          if (shared_.outputs) store(shared_.hidden + row * H + u, Cell::hidden(values, state), n);
        } else {
          state[0] = load(h + u, n);
          if (prev_h) prev[0] = load(prev_h + u, n);
        }
        Cell::backward(values, prev, state, grad, grad_igates, grad_hgates, grad_prev);
        for (int g = 0; g < G; ++g) {
          store(igates + g * H + u, grad_igates[g], n);
          if (Cell::kSplitGates) store(hgates + g * H + u, grad_hgates[g], n);
        }
        if (kVaried && keep_h) grad_prev[0] = grad_prev[0] + kept[0];
        if (kVaried && Cell::kStates > 1 && keep_c) grad_prev[1] = grad_prev[1] + kept[1];
        // The part that does not pass W_hh; the product is added to it.
        if (!shared_.outputs) grad_prev[0].store(carried_h);
        if (Cell::kStates > 1) (zero ? V(Acc(0)) : grad_prev[1]).store(carried_c);
      }
  }

  void finish() {
    const Share rows = m_.divide == Divide::rows ? rows_ : Share(s_.batch, m_.rank, m_.size);
    for (int64_t j = rows.begin; j < rows.end; ++j) {
      const int64_t b = s_.batch_row(j);
      if (d_.grad_h0)
        for (int64_t u = 0; u < l_.output_size; u += kLanes)
          store(static_cast<S*>(d_.grad_h0) + b * l_.output_size + u, V::load(shared_.grad_h + j * ld_p_ + u),
                l_.output_size - u);
      if (Cell::kStates > 1 && d_.grad_c0)
        for (int64_t u = 0; u < l_.hidden_size; u += kLanes)
          store(static_cast<S*>(d_.grad_c0) + b * l_.hidden_size + u, V::load(shared_.grad_c + j * ld_h_ + u),
                l_.hidden_size - u);
    }
  }

  const LayerBackward& l_;
  const DirectionBackward& d_;
  const Member m_;
  const Sequence& s_;
  const Workspace& sizes_;
  const Shared& shared_;
  const Own& own_;
  const Steps pass_;
  const Share rows_;
  const Stretch rows_of_pass_;
  const UnitBlocks outputs_, hidden_;
  const HiddenColumns w_hh_;
  const ColumnMatrix<S> w_second_, w_hr_;
  const GateMatrix<S> w_ih_again_;  // for recomputing
  const HiddenMatrix w_hh_again_;
  const GateMatrix<S> w_second_again_;
  const int64_t window_rows_;
  S* const window_;           // what was recomputed last
  Acc* const window_scales_;  // [2, window_rows_]
  const S* const saved_;      // [N, S*H] what forward kept, or the window
  const Acc* const scales_;   // [2, scale_rows_] of the halves of the gates that were normalised, of the same rows
  const int64_t scale_rows_;
  int64_t window_end_ = 0;  // how much of it the loop has still to read, in rows
  const Share output_share_, hidden_share_;
  const int64_t ld_p_, ld_h_, ld_g_;
  Zoneout<Acc> keep_h_, keep_c_;
  NormSums<Acc> sums_;
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
