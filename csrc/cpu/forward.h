// Owns: one layer forward over the whole sequence.
// Must not know: equations (the cell has them), tensors.
//
// For each direction: a block of steps is projected at once (igates = x W_ih^T + b_ih for as many rows as stay in the
// second-level cache), then the steps run one by one. A step is, per block of hidden units and chunk of rows, one
// register tile (hgates = h W_hh^T + b_hh) and the cell on its result while that lies in the first-level cache. A cell
// with two products goes through the blocks twice: the second time its operand is what the first gates left. Of a
// diagonal cell the product is elementwise, and threads that divide the units meet at the ends alone.
//
// Included once per instruction set, after forward_workspace.h.

namespace rnnfast::cpu::RNNFAST_ISA {

template <class Cell, class S>
class Forward {
  using P = Product<S>;
  using Unit = typename P::Unit;
  using Operand = typename P::Operand;
  using Acc = acc_t<S>;
  using V = Vec<Acc>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int G = Cell::kGates;
  static constexpr int kFirst = first_gates<Cell>;
  static constexpr int kAbreast = 2;  // rows that go through the cell side by side
  static constexpr bool kDiagonal = is_diagonal<Cell>;
  using HiddenMatrix = std::conditional_t<kDiagonal, GateDiagonal<S>, GateMatrix<S>>;

  using Workspace = ForwardWorkspace<S>;
  using Shared = typename Workspace::Shared;
  using StepRow = typename Workspace::StepRow;
  using Own = typename Workspace::Own;

 public:
  static size_t workspace_bytes(const LayerForward& layer, int threads) {
    return Workspace(layer, traits_of<Cell>, threads).bytes();
  }

  static void run(const LayerForward& layer, void* workspace, int threads) {
    const Workspace sizes(layer, traits_of<Cell>, threads);
    Barrier barriers[2];
    run_team(sizes.plan.threads, [&](int rank, int size) {
      FlushDenormals flush;
      for_directions(layer.directions, rank, size, sizes.plan.divide, barriers, [&](int d, const Member& member) {
        const Share slots = row_share(layer.sequence, member);
        Shared shared;
        Own own;
        sizes.carve(workspace, d, member, slots, shared, own);
        Forward(sizes, layer.direction[d], member, slots, shared, own).run();
      });
    });
  }

 private:
  Forward(const Workspace& sizes, const DirectionForward& direction, const Member& member, const Share& slots,
          const Shared& shared, const Own& own)
      : l_(sizes.layer),
        d_(direction),
        m_(member),
        s_(sizes.layer.sequence),
        sizes_(sizes),
        shared_(shared),
        own_(own),
        hidden_(sizes.hidden_blocks(G)),
        output_(sizes.output_blocks()),
        w_ih_(hidden_, static_cast<const S*>(d_.weights.w_ih), product_bias(d_.weights.b_ih), l_.input_size,
              shared_.w_ih, shared_.bias_ih),
        w_hh_(sizes.hidden_blocks(kFirst), static_cast<const S*>(d_.weights.w_hh), product_bias(d_.weights.b_hh),
              l_.output_size, shared_.w_hh, shared_.bias_hh),
        w_second_(sizes.hidden_blocks(G - kFirst),
                  second_rows<Cell, S>(d_.weights.w_hh, l_.hidden_size, l_.output_size),
                  second_rows<Cell, S>(d_.weights.b_hh, l_.hidden_size, 1), l_.output_size, shared_.w_second,
                  shared_.bias_second),
        w_hr_(output_, static_cast<const S*>(d_.weights.w_hr), nullptr, l_.hidden_size, shared_.w_hr, shared_.bias_hr),
        rows_(slots),
        blocks_(block_share(hidden_.count(), member)),
        output_share_(block_share(output_.count(), member)),
        ld_h_(Workspace::ld_units(l_.output_size)),
        ld_c_(Workspace::ld_acc(l_.hidden_size)),
        ld_hidden_(Workspace::ld_units(l_.hidden_size)),
        columns_(hidden_.columns()),
        ld_gates_(sizes.ld_gates()),
        capacity_(sizes.capacity(rows_.end - rows_.begin)),
        scales_(d_.saved ? scales_behind(static_cast<S*>(d_.saved), s_.rows, sizes.saved_width()) : nullptr) {
    const UnitBlocks& h_blocks = shared_.hidden ? output_ : hidden_;
    const Share& h_share = shared_.hidden ? output_share_ : blocks_;
    keep_h_ = Zoneout<Acc>(l_.noise, l_.noise.zoneout_h, Draw::zoneout_h, s_, d_.reverse, rows_,
                           h_blocks.first(h_share.begin), end_of(h_blocks, h_share), l_.output_size, own_.keep_h);
    keep_c_ = Zoneout<Acc>(l_.noise, l_.noise.zoneout_c, Draw::zoneout_c, s_, d_.reverse, rows_,
                           hidden_.first(blocks_.begin), end_of(hidden_, blocks_), l_.hidden_size, own_.keep_c);
    varied_ = keep_h_.on() || keep_c_.on() || shared_.mask || l_.layer_norm;
  }
  // Normalised gates get their bias behind the product.
  const S* product_bias(const void* bias) const { return l_.layer_norm ? nullptr : static_cast<const S*>(bias); }

  void run() {
    prepare();
    m_.wait();
    for (int64_t s = 0; s < s_.steps;) {
      const int64_t end = project(s);
      if (l_.layer_norm) normalise_igates(s, end);
      for (int64_t row = 0; s < end; ++s) {
        varied_ ? step<true>(s, row) : step<false>(s, row);
        row += living(s);
      }
    }
    m_.wait_step();
    finish();
  }

  int64_t time(int64_t s) const { return d_.reverse ? s_.steps - 1 - s : s; }
  // The thread's rows that live at the s-th step.
  int64_t living(int64_t s) const {
    return std::max<int64_t>(0, std::min(rows_.end, s_.batch_size(time(s))) - rows_.begin);
  }
  Acc* igates(int64_t b) const { return own_.igates + hidden_.column(b) * (l_.layer_norm ? 1 : capacity_); }
  // From a row of gates to the next, in block b.
  int64_t gates_stride(int64_t b) const { return l_.layer_norm ? ld_gates_ : hidden_.vectors(b) * kLanes; }
  Unit* h_row(int64_t s, int64_t slot) const { return shared_.h[s & 1] + slot * ld_h_; }
  // With recurrent dropout.
  Unit* unmasked(int64_t slot) const { return shared_.unmasked + slot * ld_h_; }
  Acc* mask(int64_t slot) const { return shared_.mask + slot * ld_draw(l_.output_size); }

  void prepare() {
    const Share hidden(hidden_.count(), m_.rank, m_.size);
    for (int64_t b = hidden.begin; b < hidden.end; ++b) {
      w_ih_.prepare(b);
      w_hh_.prepare(b);
      if constexpr (has_two_products<Cell>) w_second_.prepare(b);
    }
    if (shared_.hidden) {
      const Share output(output_.count(), m_.rank, m_.size);
      for (int64_t b = output.begin; b < output.end; ++b) w_hr_.prepare(b);
    }
    if (l_.layer_norm && m_.rank == 0) prepare_norms();
    // Rows that start late, or never, find the initial state in either buffer.
    const Share rows(s_.batch, m_.rank, m_.size);
    for (int64_t j = rows.begin; j < rows.end; ++j) {
      const int64_t b = s_.batch_row(j);
      const S* h0 = static_cast<const S*>(d_.h0) + b * l_.output_size;
      if (shared_.mask) {
        draw_dropout(l_.noise, d_.reverse, b, l_.output_size, mask(j));
        for (int i = 0; i < 2; ++i) store_masked(h0, mask(j), l_.output_size, h_row(i, j));
        copy_row<S>(h0, l_.output_size, unmasked(j));
      } else {
        for (int i = 0; i < 2; ++i) copy_row<S>(h0, l_.output_size, h_row(i, j));
      }
      Acc* c = shared_.c + j * ld_c_;
      if (shared_.hidden) zero_units<S>(shared_.hidden + j * ld_hidden_, l_.hidden_size);
      if constexpr (has_two_products<Cell>) zero_units<S>(shared_.gated + j * ld_h_, l_.hidden_size);
      if (Cell::kStates > 1)
        for (int64_t u = 0; u < l_.hidden_size; u += kLanes)
          load(static_cast<const S*>(d_.c0) + b * l_.hidden_size + u, l_.hidden_size - u).store(c + u);
      if (!d_.reverse && s_.steps > 0 && j < s_.batch_size(0) && starts_from_zero(s_, 0, j, false)) {
        zero_units<S>(h_row(0, j), l_.output_size);
        if (shared_.mask) zero_units<S>(unmasked(j), l_.output_size);
        if (Cell::kStates > 1) memset(c, 0, ld_c_ * sizeof(Acc));
      }
    }
  }

  // igates of the thread's rows and units for the steps [s, returned), as many as fit.
  int64_t project(int64_t s) {
    int64_t count = 0;
    for (; s < s_.steps && count + living(s) <= capacity_; ++s) {
      const int64_t t = time(s);
      for (int64_t j = rows_.begin; j < rows_.begin + living(s); ++j, ++count) {
        const S* x = at<const S>(l_.input, s_, t, j);
        if (reads_in_place<S>(l_.input_size)) {
          own_.inputs[count] = reinterpret_cast<const Unit*>(x);
        } else {
          Unit* copy = own_.converted + count * units_of<S>(l_.input_size);
          copy_row<S>(x, l_.input_size, copy);
          own_.inputs[count] = copy;
        }
      }
    }
    for (int64_t b = blocks_.begin; b < blocks_.end; ++b)
      w_ih_.multiply(b, own_.inputs, count, igates(b), gates_stride(b));
    return s;
  }

  // norm_layer.h
  void prepare_norms() const;
  void normalise(Acc* rows, int64_t count, int half, const int64_t* at) const;
  void normalise_igates(int64_t s, int64_t end) const;
  void normalised_cells(int64_t count, int64_t igates_row, int64_t place) const;
  void hidden_from_c(const StepRow* rows, int64_t count) const;
  Acc* values(int64_t row) const { return own_.values + row * (Cell::kSaved + 1) * ld_c_; }

  // kVaried: with recurrent dropout, zoneout or layer normalisation.
  template <bool kVaried>
  void step(int64_t s, int64_t igates_row) {
    const int64_t count = living(s);
    if constexpr (kVaried) {
      keep_h_.reach(time(s));
      keep_c_.reach(time(s));
    }
    for (int64_t i = 0; i < count; ++i) own_.rows[i] = step_row<kVaried>(s, rows_.begin + i);
    if constexpr (has_two_products<Cell>) return two_products<kVaried>(count, igates_row);
    alignas(64) Acc hgates[kTileElements<Acc>];
    const Unit* h[kTileRows];
    const bool normalised = kVaried && l_.layer_norm;
    if constexpr (kVaried && takes_layer_norm<Cell>)
      if (normalised) normalised_cells(count, igates_row, s_.offset(time(s)) + rows_.begin);
    for (int64_t b = blocks_.begin; b < blocks_.end && !normalised; ++b) {
      const int64_t columns = hidden_.vectors(b) * kLanes;
      const Acc* igates = this->igates(b) + igates_row * columns;
      for_chunks(0, count, w_hh_.row_chunk(b), [&](int64_t i, int64_t n) {
        for (int64_t r = 0; r < n; ++r) h[r] = reinterpret_cast<const Unit*>(own_.rows[i + r].h);
        // The product takes longer than these lines take to arrive.
        for (int64_t e = 0; e < n * columns; e += 64 / sizeof(Acc)) __builtin_prefetch(igates + i * columns + e);
        w_hh_.multiply(b, h, n, hgates, columns);
        int64_t r = 0;
        for (; r + kAbreast <= n; r += kAbreast)
          cell<kVaried, kAbreast>(own_.rows + i + r, b, igates + (i + r) * columns, hgates + r * columns);
        for (; r < n; ++r) cell<kVaried, 1>(own_.rows + i + r, b, igates + (i + r) * columns, hgates + r * columns);
      });
    }
    if (kDiagonal) return;  // nobody reads another thread's units
    m_.wait_step();
    if (!shared_.hidden) return;
    for (int64_t b = output_share_.begin; b < output_share_.end; ++b) {
      const int64_t columns = output_.vectors(b) * kLanes;
      for_chunks(0, count, w_hr_.row_chunk(b), [&](int64_t i, int64_t n) {
        for (int64_t r = 0; r < n; ++r) h[r] = reinterpret_cast<const Unit*>(own_.rows[i + r].hidden);
        w_hr_.multiply(b, h, n, hgates, columns);
        for (int64_t r = 0; r < n; ++r)
          for (int64_t u = 0; u < output_.size(b); u += kLanes)
            write_h<kVaried>(own_.rows[i + r], output_.first(b) + u, output_.size(b) - u,
                             V::load(hgates + r * columns + u));
      });
    }
    m_.wait_step();
  }

  // The step of a cell with two products. What the first gates save takes the place of their igates.
  template <bool kVaried>
  void two_products(int64_t count, int64_t igates_row) {
    each_tile(
        w_hh_, [](const StepRow& row) { return row.h; }, count, igates_row,
        [this](auto abreast, const Tile& tile) { gate<abreast>(tile); });
    m_.wait_step();
    each_tile(
        w_second_, [](const StepRow& row) { return row.gated; }, count, igates_row,
        [this](auto abreast, const Tile& tile) { finish_cell<kVaried, abreast>(tile); });
    m_.wait_step();
  }

  // A vector of units of rows abreast.
  struct Tile {
    const StepRow* rows;
    int64_t unit, n;    // n units from `unit` on
    int64_t stride;     // from gate to gate
    int64_t columns;    // from row to row
    Acc* igates;        // of all gates
    const Acc* hgates;  // of those whose product this is
  };

  // One of two products over the thread's rows and units: f(how many rows abreast, tile).
  template <class Source, class F>
  void each_tile(const GateMatrix<S>& weights, const Source& operand, int64_t count, int64_t igates_row, const F& f) {
    alignas(64) Acc hgates[kTileElements<Acc>];
    const Unit* operands[kTileRows];
    for (int64_t b = blocks_.begin; b < blocks_.end; ++b) {
      const int64_t columns = hidden_.vectors(b) * kLanes, size = hidden_.size(b);
      Acc* igates = this->igates(b) + igates_row * columns;
      for_chunks(0, count, weights.row_chunk(b), [&](int64_t i, int64_t n) {
        for (int64_t r = 0; r < n; ++r) operands[r] = reinterpret_cast<const Unit*>(operand(own_.rows[i + r]));
        weights.multiply(b, operands, n, hgates, columns);
        for (int64_t u = 0; u < size; u += kLanes) {
          const auto tile = [&](int64_t r) {
            return Tile{own_.rows + i + r,
                        hidden_.first(b) + u,
                        std::min<int64_t>(kLanes, size - u),
                        size,
                        columns,
                        igates + (i + r) * columns + u,
                        hgates + r * columns + u};
          };
          int64_t r = 0;
          for (; r + kAbreast <= n; r += kAbreast) f(std::integral_constant<int, kAbreast>(), tile(r));
          for (; r < n; ++r) f(std::integral_constant<int, 1>(), tile(r));
        }
      });
    }
  }

  template <int N>
  inline __attribute__((always_inline)) void gate(const Tile& at) const {
    using W = Batch<Acc, N>;
    W ig[kFirst], hg[kFirst], saved[Cell::kSaved];
    for (int g = 0; g < kFirst; ++g) {
      ig[g] = W::map([&](int r) { return V::load(at.igates + r * at.columns + g * at.stride); });
      hg[g] = W::map([&](int r) { return V::load(at.hgates + r * at.columns + g * at.stride); });
    }
    const W operand = W::map([&](int r) { return load(at.rows[r].h + at.unit, at.n); });
    const W gated = Cell::gate(ig, hg, operand, saved);
    for (int r = 0; r < N; ++r) {
      const StepRow& row = at.rows[r];
      store_operand<S>(row.gated + at.unit, gated.part[r], at.n);
      for (int g = 0; g < kFirst; ++g) {
        store(at.igates + r * at.columns + g * at.stride, saved[g].part[r], at.n);
        if (row.saved) store(row.saved + g * l_.hidden_size + at.unit, saved[g].part[r], at.n);
      }
    }
  }

  template <bool kVaried, int N>
  inline __attribute__((always_inline)) void finish_cell(const Tile& at) const {
    using W = Batch<Acc, N>;
    W ig[G], hg[G], prev[1], state[1], saved[Cell::kSaved];
    for (int g = 0; g < G; ++g) {
      ig[g] = W::map([&](int r) { return V::load(at.igates + r * at.columns + g * at.stride); });
      if (g < kFirst) {
        saved[g] = ig[g];
      } else {
        hg[g - kFirst] = W::map([&](int r) { return V::load(at.hgates + r * at.columns + (g - kFirst) * at.stride); });
      }
    }
    prev[0] = W::map([&](int r) { return load((kVaried ? at.rows[r].prev_h : at.rows[r].h) + at.unit, at.n); });
    Cell::finish(ig, hg, prev, state, saved);
    for (int r = 0; r < N; ++r) {
      const StepRow& row = at.rows[r];
      if (row.saved)
        for (int k = kFirst; k < Cell::kSaved; ++k)
          store(row.saved + k * l_.hidden_size + at.unit, saved[k].part[r], at.n);
      write_h<kVaried>(row, at.unit, at.n, state[0].part[r]);
    }
  }

  template <bool kVaried>
  StepRow step_row(int64_t s, int64_t slot) const {
    const int64_t t = time(s);
    StepRow row;
    row.h = reinterpret_cast<const Operand*>(h_row(s, slot));
    row.next_h = reinterpret_cast<Operand*>(h_row(s + 1, slot));
    row.c = shared_.c + slot * ld_c_;
    row.hidden = shared_.hidden ? reinterpret_cast<Operand*>(shared_.hidden + slot * ld_hidden_) : nullptr;
    if constexpr (has_two_products<Cell>) row.gated = reinterpret_cast<Operand*>(shared_.gated + slot * ld_h_);
    row.output = at<S>(d_.output, s_, t, slot);
    row.c_output = at<S>(d_.c, s_, t, slot);
    // With layer normalisation the cell keeps nothing.
    row.saved =
        d_.saved && !l_.layer_norm ? static_cast<S*>(d_.saved) + (s_.offset(t) + slot) * sizes_.saved_width() : nullptr;
    row.drop = s_.reset && has_next(s_, t, slot, d_.reverse) && boundary_after(s_, t, slot, d_.reverse);
    if constexpr (kVaried) {
      row.keep_h = keep_h_.row(slot);
      row.keep_c = keep_c_.row(slot);
      row.mask = shared_.mask ? mask(slot) : nullptr;
      row.unmasked = shared_.mask ? reinterpret_cast<Operand*>(unmasked(slot)) : nullptr;
      row.prev_h = shared_.mask ? row.unmasked : row.h;
    }
    return row;
  }

  // The n (at least one) outputs from unit u on: to the output and to the state that the next step reads.
  template <bool kVaried>
  static void write_h(const StepRow& row, int64_t u, int64_t n, V h) {
    if (kVaried && row.keep_h) h = zoned(V::load(row.keep_h + u), load(row.prev_h + u, n), h);
    store(row.output + u, h, n);
    if (row.drop) h = V(Acc(0));
    if (kVaried && row.mask) {
      store_operand<S>(row.unmasked + u, h, n);
      h = load(row.unmasked + u, n) * V::load(row.mask + u);
    }
    store_operand<S>(row.next_h + u, h, n);
  }

  // The cell on N rows and the units of block b; igates and hgates hold the block's columns of each row. kToValues: h'
  // waits for all of c', and the row's values take what it is made of.
  template <bool kVaried, int N, bool kToValues = false>
  void cell(const StepRow* rows, int64_t b, const Acc* igates, const Acc* hgates) const {
    const int64_t first = hidden_.first(b), size = hidden_.size(b);
    const int64_t columns = kVaried ? gates_stride(b) : hidden_.vectors(b) * kLanes;
    int64_t u = 0;
    for (; u + kLanes <= size; u += kLanes)
      cell_vectors<kVaried, N, kToValues>(rows, first + u, kLanes, size, columns, igates + u, hgates + u);
    if (u < size) cell_vectors<kVaried, N, kToValues>(rows, first + u, size - u, size, columns, igates + u, hgates + u);
  }

  // n units from `unit` on; the gates of a unit lie `stride` apart, those of the next row `columns`.
  template <bool kVaried, int N, bool kToValues>
  inline __attribute__((always_inline)) void cell_vectors(const StepRow* rows, int64_t unit, int64_t n, int64_t stride,
                                                          int64_t columns, const Acc* igates, const Acc* hgates) const {
    using W = Batch<Acc, N>;
    W ig[G], hg[G], prev[2], state[2], saved[Cell::kSaved + 1];
    for (int g = 0; g < G; ++g) {
      ig[g] = W::map([&](int r) { return V::load(igates + r * columns + g * stride); });
      hg[g] = W::map([&](int r) { return V::load(hgates + r * columns + g * stride); });
    }
    if (Cell::kStates == 1)
      prev[0] = W::map([&](int r) { return load((kVaried ? rows[r].prev_h : rows[r].h) + unit, n); });
    if (Cell::kStates > 1) prev[1] = W::map([&](int r) { return load(rows[r].c + unit, n); });
    Cell::forward(ig, hg, prev, state, saved);
    for (int r = 0; r < N; ++r) {
      const StepRow& row = rows[r];
      if (Cell::kStates > 1) {
        if (kToValues) {
          for (int k = 0; k < Cell::kSaved; ++k) saved[k].part[r].store(row.values + k * ld_c_ + unit);
          state[1].part[r].store(row.values + Cell::kSaved * ld_c_ + unit);
        }
        if (kVaried && row.keep_c)
          state[1].part[r] = zoned(V::load(row.keep_c + unit), prev[1].part[r], state[1].part[r]);
        store(row.c + unit, row.drop ? V(Acc(0)) : state[1].part[r], n);
        if (row.c_output) store(row.c_output + unit, state[1].part[r], n);
      }
      if (row.saved)
        for (int k = 0; k < Cell::kSaved; ++k) store(row.saved + k * l_.hidden_size + unit, saved[k].part[r], n);
      if (kToValues) continue;
      if (row.hidden) {
        store_operand<S>(row.hidden + unit, state[0].part[r], n);
      } else {
        write_h<kVaried>(row, unit, n, state[0].part[r]);
      }
    }
  }

  // The last states, from the buffer that the row's last step wrote.
  void finish() {
    const Share rows = m_.divide == Divide::rows ? rows_ : Share(s_.batch, m_.rank, m_.size);
    for (int64_t j = rows.begin; j < rows.end; ++j) {
      const int64_t b = s_.batch_row(j);
      int64_t steps = s_.steps;
      if (s_.batch_sizes && !d_.reverse)
        while (steps > 0 && s_.batch_sizes[steps - 1] <= j) --steps;
      const Operand* h = reinterpret_cast<const Operand*>(shared_.mask ? unmasked(j) : h_row(steps, j));
      for (int64_t u = 0; u < l_.output_size; u += kLanes)
        store(static_cast<S*>(d_.h_n) + b * l_.output_size + u, load(h + u), l_.output_size - u);
      if (Cell::kStates > 1)
        for (int64_t u = 0; u < l_.hidden_size; u += kLanes)
          store(static_cast<S*>(d_.c_n) + b * l_.hidden_size + u, V::load(shared_.c + j * ld_c_ + u),
                l_.hidden_size - u);
    }
  }

  const LayerForward& l_;
  const DirectionForward& d_;
  const Member m_;
  const Sequence& s_;
  const Workspace& sizes_;
  const Shared shared_;
  const Own own_;
  const UnitBlocks hidden_, output_;
  const GateMatrix<S> w_ih_;
  const HiddenMatrix w_hh_;
  const GateMatrix<S> w_second_, w_hr_;
  const Share rows_, blocks_, output_share_;
  const int64_t ld_h_, ld_c_, ld_hidden_, columns_, ld_gates_, capacity_;
  Acc* const scales_;  // [2, N] of the halves of the gates, behind what is saved of all rows; null: nothing is saved
  Zoneout<Acc> keep_h_, keep_c_;
  bool varied_;
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
