// Owns: one layer backward over the whole sequence.
// Must not know: equations (the cell has them), tensors.
//
// First the loop, from the last step to the first: the cell turns the gradient of a step's state into the gradients of
// its gates, and one product with W_hh carries them to the step before. Then, over all steps at once: the gradient of
// the input, and the weight gradients. Where forward kept no gates they are computed again, for a window of steps at a
// time right before the loop reads them: every h is known, so that is two products, and the window stays in the cache.
// A cell with two products a step goes back through the second between the cell and the first.
//
// Included once per instruction set, after layer.h.

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
  static constexpr int64_t kRowsAtOnce = 64;   // rows of a product over all steps
  static constexpr int64_t kWindowRows = 256;  // rows whose gates are computed again at once, or those of one step

  // What a direction's loop leaves, and what it needs.
  struct Shared {
    Unit* w_hh;        // [G*H, P] in column panels; null: in place
    Unit* w_hr;        // [P, H] in column panels; null: in place or no projection
    Acc* grad_h;       // [B, ld_p] carried from step to step
    Acc* grad_c;       // [B, ld_h]
    Acc* grad_hidden;  // [B, ld_h] gradient of the state before the projection
    Operand* igates;   // [N, ld_g] gradients of the input half of the gates
    Operand* hgates;   // [N, ld_g] and of the hidden half
    Operand* outputs;  // [N, ld_o] gradients of the projected state
    S* hidden;         // [N, H] the state before the projection
    // Of a cell with two products only; w_hh and forward_hh have the first gates then.
    Unit *w_second, *forward_second;
    Acc* bias_second;
    S* gated;                          // [N, P] what the second product read
    S* saved;                          // [window rows, S*H] recomputed, where all threads have all rows
    Unit* w_ih;                        // [G*H, I] in column panels, for the gradient of the input; null: in place
    Acc *sums_ih, *sums_hh, *sums_hr;  // weight gradients not summed in place
    Unit *forward_ih, *forward_hh;     // panels for recomputing
    Acc *bias_ih, *bias_hh;
    Acc* mask;  // [B, ld_draw(P)] of recurrent dropout; null: off
    Acc* sums;  // of NormSums, of each thread; null: no layer normalisation, or not wanted
  };
  struct Own {
    Unit* panels;           // of WeightGradient
    Acc* grad_input;        // [kRowsAtOnce, columns of one block]
    Acc *igates, *hgates;   // [kRowsAtOnce, columns of one block], for recomputing; with two products igates of all
    Unit* gated;            // [kRowsAtOnce, units of P]
    Unit *inputs, *states;  // [kRowsAtOnce, units], where rows cannot be read in place
    S* saved;               // [window rows, S*H] recomputed, where the thread has rows of its own
    Acc *keep_h, *keep_c;   // of Zoneout
    S* masked;              // [WeightGradient::kDepth, P] states behind recurrent dropout
    Acc* norms;             // [norm_rows, kNormVectors, ld_h] of NormRow; null without layer normalisation
  };

 public:
  static size_t workspace_bytes(const LayerBackward& layer, int threads) {
    Carver carver(nullptr);
    carve(layer, threads, carver, nullptr, nullptr);
    return carver.used();
  }

  static void run(const LayerBackward& layer, void* workspace, int threads) {
    const Plan plan = plan_of(layer, threads);
    auto with_buffers = [&](int rank, const auto& f) {
      FlushDenormals flush;
      Carver carver(workspace);
      Shared shared[2];
      Own own;
      carve(layer, threads, carver, shared, &own, rank);
      f(shared, own);
    };
    Barrier barriers[2], everyone;
    run_team(plan.threads, [&](int rank, int size) {
      with_buffers(rank, [&](const Shared* shared, const Own& own) {
        for_directions(layer.directions, rank, size, plan.divide, barriers, [&](int d, const Member& member) {
          Backward(layer, layer.direction[d], member, shared[d], own).run();
        });
      });
    });
    // The products over all steps can use threads that the loop cannot.
    run_team(team_size(layer, threads), [&](int rank, int size) {
      with_buffers(rank, [&](const Shared* shared, const Own& own) {
        grad_input(layer, shared, own, rank, size, everyone);
        for (int d = 0; d < layer.directions; ++d) grad_weights(layer, layer.direction[d], shared[d], own, rank, size);
      });
    });
  }

 private:
  static Plan plan_of(const LayerBackward& l, int threads) {
    return make_plan(G, l.input_size, l.hidden_size, hidden_inputs(l), l.directions, l.sequence, size_of(l.dtype),
                     l.layer_norm, threads);
  }
  static int team_size(const LayerBackward& l, int threads) {
    const double cycles =
        row_cycles(G, l.input_size, l.hidden_size, hidden_inputs(l)) * double(l.sequence.rows) * l.directions;
    return cycles < 1e5 ? 1 : threads;
  }
  // States that a unit sees.
  static int64_t hidden_inputs(const LayerBackward& l) { return kDiagonal ? 1 : l.output_size; }
  static bool projects(const LayerBackward& l) { return l.direction[0].weights.w_hr != nullptr; }
  static bool recomputes(const LayerBackward& l) { return saved_width(l) > 0 && !l.direction[0].saved; }
  static int64_t saved_width(const LayerBackward& l) { return (l.layer_norm ? 2 * G : Cell::kSaved) * l.hidden_size; }
  static constexpr int kNormLines =
      4 * G + (Cell::kStates > 1 ? 2 : 0);  // of NormSums: norms, biases; norm and bias of c

  // Four vectors of columns a block; with units divided, fewer where that shares them out more evenly.
  static UnitBlocks column_blocks(int64_t units, Divide divide, int size) {
    UnitBlocks blocks;
    blocks.units = units;
    blocks.gates = 1;
    blocks.lanes = kLanes;
    blocks.block = kMaxVectors * kLanes;
    if (divide == Divide::units) {
      int64_t best = -1;
      for (int vectors = kMaxVectors; vectors > 0; --vectors) {
        const int64_t longest = divide_up(divide_up(units, vectors * kLanes), size) * vectors;
        if (best >= 0 && longest >= best) continue;
        best = longest;
        blocks.block = vectors * kLanes;
      }
    }
    return blocks;
  }
  // A row of gate gradients, whole pairs. The weight gradients walk down columns: rows a multiple of a large power of
  // two apart would meet in one set of the cache, so such rows lie a cache line further apart.
  static int64_t ld_gates(const LayerBackward& l) {
    const int64_t width = round_up(G * l.hidden_size, Product<S>::kPair), line = 64 / sizeof(Operand);
    return l.direction[0].grad_igates || width % (8 * line) != 0 ? width : width + line;
  }
  static int64_t ld_outputs(const LayerBackward& l) { return round_up(l.output_size, Product<S>::kPair); }
  static int64_t ld_acc(int64_t n) { return round_up(n, kLanes); }
  static int64_t window_rows(const LayerBackward& l) {
    return std::min(l.sequence.rows, std::max(kWindowRows, l.sequence.batch));
  }
  static UnitBlocks gate_blocks(const LayerBackward& l, int gates = G) {
    UnitBlocks blocks = unit_blocks<S>(kFirst, l.hidden_size, Member{});
    blocks.gates = gates;
    return blocks;
  }

  static void carve(const LayerBackward& l, int threads, Carver& carver, Shared* shared, Own* own, int rank = 0) {
    const int64_t N = l.sequence.rows, B = l.sequence.batch, H = l.hidden_size, P = l.output_size, I = l.input_size;
    const int64_t gates = G * H;
    const Divide divide = plan_of(l, threads).divide;
    auto columns = [&](int64_t rows, int64_t k, int64_t n) {
      if (ColumnMatrix<S>::in_place(rows, k, n)) return static_cast<Unit*>(nullptr);
      // The narrowest blocks a team may choose pad no more than this.
      return carver.take<Unit>(round_up(n, kMaxVectors * kLanes) * units_of<S>(k));
    };
    auto sums = [&](int64_t m, int64_t n) {
      return WeightGradient<S>::sums_in_place(n) ? nullptr : carver.take<Acc>(WeightGradient<S>::sum_elements(m, n));
    };
    for (int d = 0; d < l.directions; ++d) {
      Shared s{};
      if (!kDiagonal) s.w_hh = columns(N, kFirst * H, P);
      s.grad_h = carver.take<Acc>(B * ld_acc(P));
      if (Cell::kStates > 1) s.grad_c = carver.take<Acc>(B * ld_acc(H));
      const DirectionBackward& direction = l.direction[d];
      s.igates =
          direction.grad_igates ? static_cast<Operand*>(direction.grad_igates) : carver.take<Operand>(N * ld_gates(l));
      s.hgates = !Cell::kSplitGates && !l.layer_norm ? s.igates
                 : direction.grad_hgates             ? static_cast<Operand*>(direction.grad_hgates)
                                                     : carver.take<Operand>(N * ld_gates(l));
      if constexpr (has_two_products<Cell>) {
        s.w_second = columns(N, gates - kFirst * H, P);
        s.gated = carver.take<S>(N * P);
      }
      if (projects(l)) {
        s.w_hr = columns(N, P, H);
        s.grad_hidden = carver.take<Acc>(B * ld_acc(H));
        s.outputs = carver.take<Operand>(N * ld_outputs(l));
        s.hidden = carver.take<S>(N * H);
        s.sums_hr = sums(P, H);
      }
      if (l.grad_input.data) s.w_ih = columns(N, gates, I);
      if (l.direction[d].grad_w_hh) {
        s.sums_ih = sums(gates, I);
        s.sums_hh = kDiagonal ? carver.take<Acc>(DiagonalGradient<S>::sum_elements(G, H)) : sums(gates, P);
      }
      if (recomputes(l)) {
        const UnitBlocks blocks = gate_blocks(l), first = gate_blocks(l, kFirst), second = gate_blocks(l, G - kFirst);
        const auto panels = [&](const UnitBlocks& of, int64_t k) {
          return GateMatrix<S>::in_place(N, k) ? nullptr : carver.take<Unit>(GateMatrix<S>::packed_units(of, k));
        };
        s.forward_ih = panels(blocks, I);
        if (!kDiagonal) s.forward_hh = panels(first, P);
        s.bias_ih = carver.take<Acc>(blocks.columns());
        s.bias_hh = carver.take<Acc>(first.columns());
        if constexpr (has_two_products<Cell>) {
          s.forward_second = panels(second, P);
          s.bias_second = carver.take<Acc>(second.columns());
        }
        if (divide == Divide::units) s.saved = carver.take<S>(window_rows(l) * saved_width(l));
      }
      if (l.noise.recurrent_dropout > 0) s.mask = carver.take<Acc>(B * ld_draw(P));
      if (l.layer_norm && direction.grad_w_hh)
        s.sums = carver.take<Acc>(threads * NormSums<Acc>::elements(kNormLines, ld_acc(H)));
      if (shared) shared[d] = s;
    }
    for (int r = 0; r < threads; ++r) {
      Own o{};
      o.panels = carver.take<Unit>(WeightGradient<S>::panel_units(std::max(I, std::max(H, P))));
      o.grad_input = carver.take<Acc>(kRowsAtOnce * kMaxVectors * kLanes);
      if (recomputes(l)) {
        o.igates = carver.take<Acc>(kRowsAtOnce *
                                    (has_two_products<Cell> ? gate_blocks(l).columns() : kMaxBlockVectors * kLanes));
        if constexpr (has_two_products<Cell>) o.gated = carver.take<Unit>(kRowsAtOnce * units_of<S>(P));
        o.hgates = carver.take<Acc>(kRowsAtOnce * kMaxBlockVectors * kLanes);
        o.inputs = carver.take<Unit>(kRowsAtOnce * units_of<S>(I));
        o.states = carver.take<Unit>(kRowsAtOnce * units_of<S>(P));
        if (divide == Divide::rows) o.saved = carver.take<S>(window_rows(l) * saved_width(l));
      }
      const auto keep = [&](double p, int64_t units) {
        return p > 0 ? carver.take<Acc>(Zoneout<Acc>::elements(l.noise, p, B, units)) : nullptr;
      };
      o.keep_h = keep(l.noise.zoneout_h, P);
      o.keep_c = keep(l.noise.zoneout_c, H);
      if (l.noise.recurrent_dropout > 0) o.masked = carver.take<S>(WeightGradient<S>::kDepth * P);
      if (l.layer_norm) o.norms = carver.take<Acc>(norm_rows(l) * kNormVectors * ld_acc(H));
      if (own && r == rank) *own = o;
    }
  }

  Backward(const LayerBackward& layer, const DirectionBackward& direction, const Member& member, const Shared& shared,
           const Own& own)
      : l_(layer),
        d_(direction),
        m_(member),
        s_(layer.sequence),
        shared_(shared),
        own_(own),
        outputs_(column_blocks(l_.output_size, member.divide, member.size)),
        hidden_(column_blocks(l_.hidden_size, member.divide, member.size)),
        w_hh_(outputs_, static_cast<const S*>(d_.weights.w_hh), kFirst * l_.hidden_size, shared_.w_hh),
        w_second_(outputs_, behind_first(d_.weights.w_hh, l_.output_size), (G - kFirst) * l_.hidden_size,
                  shared_.w_second),
        w_hr_(hidden_, static_cast<const S*>(d_.weights.w_hr), l_.output_size, shared_.w_hr),
        w_ih_again_(gate_blocks(l_), static_cast<const S*>(d_.weights.w_ih), product_bias(d_.weights.b_ih),
                    l_.input_size, shared_.forward_ih, shared_.bias_ih),
        w_hh_again_(gate_blocks(l_, kFirst), static_cast<const S*>(d_.weights.w_hh), product_bias(d_.weights.b_hh),
                    l_.output_size, shared_.forward_hh, shared_.bias_hh),
        w_second_again_(gate_blocks(l_, G - kFirst), behind_first(d_.weights.w_hh, l_.output_size),
                        behind_first(d_.weights.b_hh, 1), l_.output_size, shared_.forward_second, shared_.bias_second),
        saved_(static_cast<const S*>(direction.saved)),
        window_(member.divide == Divide::units ? shared.saved : own.saved),
        rows_(row_share(s_, member)),
        output_share_(block_share(outputs_.count(), member)),
        hidden_share_(block_share(hidden_.count(), member)),
        ld_p_(ld_acc(l_.output_size)),
        ld_h_(ld_acc(l_.hidden_size)),
        ld_g_(ld_gates(layer)),
        keep_h_(l_.noise, l_.noise.zoneout_h, Draw::zoneout_h, s_, d_.reverse, rows_,
                outputs_.first(output_share_.begin), end_of(outputs_, output_share_), l_.output_size, own_.keep_h),
        keep_c_(l_.noise, l_.noise.zoneout_c, Draw::zoneout_c, s_, d_.reverse, rows_,
                hidden_.first(hidden_share_.begin), end_of(hidden_, hidden_share_), l_.hidden_size, own_.keep_c),
        sums_(norm_sums(member.rank)) {}
  // Normalised gates get their bias behind the product.
  const S* product_bias(const void* bias) const { return l_.layer_norm ? nullptr : static_cast<const S*>(bias); }
  NormSums<Acc> norm_sums(int rank) const {
    return {kNormLines, ld_h_,
            shared_.sums ? shared_.sums + rank * NormSums<Acc>::elements(kNormLines, ld_h_) : nullptr};
  }

  void run() {
    prepare();
    if (sums_.wanted()) sums_.clear();
    m_.wait();
    for (int64_t s = s_.steps - 1; s >= 0;) {
      if (kDiagonal && recomputes(l_)) m_.wait_step();  // the window may still be read
      const int64_t begin = recomputes(l_) ? recompute(s) : 0;
      for (; s >= begin; --s) varied() ? step<true>(s) : step<false>(s);
    }
    m_.wait_step();
    finish();
    if (sums_.wanted()) add_norm_sums();
  }

  // The rows of a weight that belong to the second product.
  const S* behind_first(const void* weight, int64_t width) const {
    return weight ? static_cast<const S*>(weight) + kFirst * l_.hidden_size * width : nullptr;
  }

  int64_t time(int64_t s) const { return d_.reverse ? s_.steps - 1 - s : s; }
  int64_t living(int64_t s) const {
    return std::max<int64_t>(0, std::min(rows_.end, s_.batch_size(time(s))) - rows_.begin);
  }

  // The state before step t, null where it is zero.
  const S* previous(const Rows& rows, const void* first, int64_t width, int64_t t, int64_t slot) const {
    if (starts_from_zero(s_, t, slot, d_.reverse)) return nullptr;
    if (has_previous(s_, t, slot, d_.reverse)) return at<const S>(rows, s_, d_.reverse ? t + 1 : t - 1, slot);
    return static_cast<const S*>(first) + s_.batch_row(slot) * width;
  }
  const S* previous_h(int64_t t, int64_t slot) const { return previous(d_.output, d_.h0, l_.output_size, t, slot); }
  // With recurrent dropout.
  Acc* mask(int64_t slot) const { return shared_.mask + slot * ld_draw(l_.output_size); }
  const S* previous_c(int64_t t, int64_t slot) const { return previous(d_.c, d_.c0, l_.hidden_size, t, slot); }

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
    if (recomputes(l_)) {
      const Share blocks(gate_blocks(l_).count(), m_.rank, m_.size);
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
    // The last pair of an odd row is half a pair.
    if (G * l_.hidden_size % Product<S>::kPair != 0) {
      const Share all(s_.rows, m_.rank, m_.size);
      for (int64_t row = all.begin; row < all.end; ++row) {
        memset(shared_.igates + row * ld_g_ + G * l_.hidden_size, 0, sizeof(Operand));
        memset(shared_.hgates + row * ld_g_ + G * l_.hidden_size, 0, sizeof(Operand));
      }
    }
    if (shared_.outputs && ld_outputs(l_) > l_.output_size) {
      const Share all(s_.rows, m_.rank, m_.size);
      for (int64_t row = all.begin; row < all.end; ++row)
        memset(shared_.outputs + (row + 1) * ld_outputs(l_) - 1, 0, sizeof(Operand));
    }
  }

  static void carry_in(const void* grad, int64_t b, int64_t width, Acc* to) {
    for (int64_t u = 0; u < width; u += kLanes)
      (grad ? load(static_cast<const S*>(grad) + b * width + u, width - u) : V(Acc(0))).store(to + u);
  }

  // saved of the thread's rows, as forward would have kept it, for the steps [returned, last]: as many as fit.
  int64_t recompute(int64_t last) {
    int64_t begin = last, total = living(last);
    while (begin > 0 && total + living(begin - 1) <= window_rows(l_)) total += living(--begin);
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
      S* saved_rows = window_ + first * saved_width();
      if constexpr (has_two_products<Cell>) return recompute_two_products(x, h, count, saved_rows);
      const UnitBlocks blocks = gate_blocks(l_);
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
              if (!l_.layer_norm) continue;
              store(saved + g * l_.hidden_size + u, ig[g], n);
              store(saved + (G + g) * l_.hidden_size + u, hg[g], n);
            }
            if (l_.layer_norm) continue;  // which runs the cell behind the norms
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
    const UnitBlocks blocks = gate_blocks(l_);
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
  struct NormRow;
  static constexpr int64_t kNormRows = 8;
  static constexpr int kNormVectors = Cell::kSaved + 3 + 2 * G;  // of a row, with an element a unit
  static int64_t norm_rows(const LayerBackward& l) {
    const int64_t rows = (24 << 10) / (kNormVectors * ld_acc(l.hidden_size) * sizeof(Acc));  // the first-level cache
    return std::max<int64_t>(1, std::min(kNormRows, rows));
  }
  const S* norm_weights(int half) const {
    return static_cast<const S*>(half == 0 ? d_.weights.norm_ih : d_.weights.norm_hh);
  }
  const S* norm_bias(int half) const { return static_cast<const S*>(half == 0 ? d_.weights.b_ih : d_.weights.b_hh); }
  void normalised_cells(int64_t t, int64_t count, const S* products);
  NormRow norm_row(int64_t t, int64_t slot, const S* products, int64_t index) const;
  V take_grad_h(const NormRow& row, int64_t u, int64_t n) const;
  void forward_again(NormRow& row) const;
  void back_to_c(NormRow& row);
  void back_to_gates(NormRow& row);
  void back_to_products(const NormRow& row) const;
  void add_norm_sums();

  int64_t saved_width() const { return saved_width(l_); }

  template <bool kVaried>
  void step(int64_t s) {
    const int64_t t = time(s), count = living(s), row = s_.offset(t) + rows_.begin;
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
            operands[r] = reinterpret_cast<const Unit*>(shared_.outputs + (row + i + r) * ld_outputs(l_));
          w_hr_.multiply(b, operands, n, nullptr, shared_.grad_hidden + (rows_.begin + i) * ld_h_ + hidden_.column(b),
                         ld_h_);
        });
    }
    // Windows are filled in the order of steps and read from their end.
    const S* saved = recomputes(l_) ? window_ + (window_end_ -= count) * saved_width() : saved_ + row * saved_width();
    const bool normalised = kVaried && l_.layer_norm;
    if constexpr (kVaried && takes_layer_norm<Cell>)
      if (normalised) normalised_cells(t, count, saved);
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
    const int64_t H = l_.hidden_size, row = s_.offset(t) + rows_.begin;
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

  // With a projection: the gradient of the step's output, kept for the products over all steps. With zoneout that is
  // the candidate's part; the last state's stays behind as what is carried.
  template <bool kVaried>
  void output_gradient(int64_t t, int64_t slot) {
    Operand* to = shared_.outputs + (s_.offset(t) + slot) * ld_outputs(l_);
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
    const int64_t H = l_.hidden_size, row = s_.offset(t) + slot;
    const bool zero = starts_from_zero(s_, t, slot, d_.reverse);
    const S* h = at<const S>(d_.output, s_, t, slot);
    const S* c = Cell::kStates > 1 ? at<const S>(d_.c, s_, t, slot) : nullptr;
    const S* prev_h = Cell::kStates == 1 ? previous_h(t, slot) : nullptr;
    const S* prev_c = Cell::kStates > 1 ? previous_c(t, slot) : nullptr;
    const S* grad_output = d_.grad_output.data ? at<const S>(d_.grad_output, s_, t, slot) : nullptr;
    const S* grad_cell = d_.grad_c.data ? at<const S>(d_.grad_c, s_, t, slot) : nullptr;
    Operand* igates = shared_.igates + row * ld_g_;
    Operand* hgates = shared_.hgates + row * ld_g_;
    const Acc* keep_h = kVaried && !shared_.outputs ? keep_h_.row(slot) : nullptr;
    const Acc* keep_c = kVaried ? keep_c_.row(slot) : nullptr;
    for (int64_t b = hidden_share_.begin; b < hidden_share_.end; ++b)
      for (int64_t u = hidden_.first(b); u < hidden_.first(b) + hidden_.size(b); u += kLanes) {
        const int64_t n = std::min<int64_t>(kLanes, hidden_.first(b) + hidden_.size(b) - u);
        V values[Cell::kSaved + 1], prev[2] = {V(Acc(0)), V(Acc(0))}, state[2] = {V(Acc(0)), V(Acc(0))}, grad[2];
        V grad_igates[G], grad_hgates[G], grad_prev[2], kept[2];
        for (int k = 0; k < Cell::kSaved; ++k) values[k] = load(saved + k * H + u, n);
        Acc* carried_h = shared_.grad_h + slot * ld_p_ + u;
        Acc* carried_c = shared_.grad_c + slot * ld_h_ + u;
        if (shared_.outputs) {
          grad[0] = V::load(shared_.grad_hidden + slot * ld_h_ + u);
        } else {
          grad[0] = V::load(carried_h);
          if (grad_output) grad[0] = grad[0] + load(grad_output + u, n);
        }
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

  // grad_input = sum over directions of igates . W_ih, a slice of rows a thread.
  static void grad_input(const LayerBackward& l, const Shared* shared, const Own& own, int rank, int size,
                         Barrier& everyone) {
    if (!l.grad_input.data) return;
    const int64_t I = l.input_size;
    const UnitBlocks blocks = column_blocks(I, Divide::rows, 1);
    auto weights = [&](int d) {
      return ColumnMatrix<S>(blocks, static_cast<const S*>(l.direction[d].weights.w_ih), G * l.hidden_size,
                             shared[d].w_ih);
    };
    const Share pack(blocks.count(), rank, size);
    for (int d = 0; d < l.directions; ++d)
      for (int64_t b = pack.begin; b < pack.end; ++b) weights(d).prepare(b);
    everyone.wait(size);
    const Share rows(l.sequence.rows, rank, size);
    for_chunks(rows.begin, rows.end, kRowsAtOnce, [&](int64_t first, int64_t count) {
      for (int64_t b = 0; b < blocks.count(); ++b) {
        const int64_t columns = blocks.vectors(b) * kLanes;
        for (int d = 0; d < l.directions; ++d) {
          const Unit* operands[kRowsAtOnce];
          for (int64_t i = 0; i < count; ++i)
            operands[i] = reinterpret_cast<const Unit*>(shared[d].igates + (first + i) * ld_gates(l));
          weights(d).multiply(b, operands, count, d ? own.grad_input : nullptr, own.grad_input, columns);
        }
        for_rows(l.sequence, first, count, [&](int64_t i, int64_t t, int64_t slot) {
          S* to = at<S>(l.grad_input, l.sequence, t, slot) + blocks.first(b);
          for (int64_t u = 0; u < blocks.size(b); u += kLanes)
            store(to + u, V::load(own.grad_input + i * columns + u), blocks.size(b) - u);
        });
      }
    });
  }

  static void grad_weights(const LayerBackward& l, const DirectionBackward& d, const Shared& shared, const Own& own,
                           int rank, int size) {
    if (!d.grad_w_hh) return;
    const Sequence& s = l.sequence;
    const int64_t gates = G * l.hidden_size;
    auto slice = [&](int64_t m) {
      Share share(divide_up(m, kLanes), rank, size);
      share.begin *= kLanes;
      share.end = std::min(m, share.end * kLanes);
      return share;
    };
    const Member alone{};
    const Backward self(l, d, alone, shared, own);
    const Share m = slice(gates);
    if (l.input_size > 0) {
      WeightGradient<S>::run(
          shared.igates, ld_gates(l), m.begin, m.end, l.input_size, s.rows,
          [&](int64_t first, int64_t count, const S** rows) {
            for_rows(s, first, count,
                     [&](int64_t i, int64_t t, int64_t slot) { rows[i] = at<const S>(l.input, s, t, slot); });
          },
          own.panels, shared.sums_ih, static_cast<S*>(d.grad_w_ih));
    }
    const int64_t first_end = kFirst * l.hidden_size;
    const auto states = [&](int64_t first, int64_t count, const S** rows) {
      for_rows(s, first, count, [&](int64_t i, int64_t t, int64_t slot) {
        rows[i] = self.previous_h(t, slot);
        if (!shared.mask || !rows[i]) return;
        S* masked = own.masked + i * l.output_size;
        for (int64_t u = 0; u < l.output_size; u += kLanes) {
          const int64_t n = l.output_size - u;
          store(masked + u, load(rows[i] + u, n) * V::load(self.mask(slot) + u), n);
        }
        rows[i] = masked;
      });
    };
    if constexpr (kDiagonal) {
      const Share vectors(divide_up(l.hidden_size, kLanes), rank, size);
      DiagonalGradient<S>::run(shared.hgates, ld_gates(l), vectors.begin, vectors.end, G, l.hidden_size, s.rows, states,
                               shared.sums_hh, static_cast<S*>(d.grad_w_hh));
    } else {
      WeightGradient<S>::run(shared.hgates, ld_gates(l), m.begin, std::min(m.end, first_end), l.output_size, s.rows,
                             states, own.panels, shared.sums_hh, static_cast<S*>(d.grad_w_hh));
    }
    if constexpr (has_two_products<Cell>) {
      WeightGradient<S>::run(
          shared.hgates, ld_gates(l), std::max(m.begin, first_end), m.end, l.output_size, s.rows,
          [&](int64_t first, int64_t count, const S** rows) {
            for (int64_t i = 0; i < count; ++i) rows[i] = shared.gated + (first + i) * l.output_size;
          },
          own.panels, shared.sums_hh, static_cast<S*>(d.grad_w_hh));
    }
    if (shared.outputs) {
      const Share p = slice(l.output_size);
      WeightGradient<S>::run(
          shared.outputs, ld_outputs(l), p.begin, p.end, l.hidden_size, s.rows,
          [&](int64_t first, int64_t count, const S** rows) {
            for (int64_t i = 0; i < count; ++i) rows[i] = shared.hidden + (first + i) * l.hidden_size;
          },
          own.panels, shared.sums_hr, static_cast<S*>(d.grad_w_hr));
    }
    if (d.grad_b_ih && !l.layer_norm) {
      WeightGradient<S>::column_sums(shared.igates, ld_gates(l), m.begin, m.end, s.rows, static_cast<S*>(d.grad_b_ih));
      if (Cell::kSplitGates) {
        WeightGradient<S>::column_sums(shared.hgates, ld_gates(l), m.begin, m.end, s.rows,
                                       static_cast<S*>(d.grad_b_hh));
      } else {
        memcpy(static_cast<S*>(d.grad_b_hh) + m.begin, static_cast<const S*>(d.grad_b_ih) + m.begin,
               std::max<int64_t>(0, m.end - m.begin) * sizeof(S));
      }
    }
  }

  const LayerBackward& l_;
  const DirectionBackward& d_;
  const Member m_;
  const Sequence& s_;
  const Shared& shared_;
  const Own& own_;
  const UnitBlocks outputs_, hidden_;
  const HiddenColumns w_hh_;
  const ColumnMatrix<S> w_second_, w_hr_;
  const GateMatrix<S> w_ih_again_;  // for recomputing
  const HiddenMatrix w_hh_again_;
  const GateMatrix<S> w_second_again_;
  const S* const saved_;    // [N, S*H] what forward kept; null: recompute
  S* const window_;         // what was recomputed last
  int64_t window_end_ = 0;  // how much of it the loop has still to read, in rows
  const Share rows_, output_share_, hidden_share_;
  const int64_t ld_p_, ld_h_, ld_g_;
  Zoneout<Acc> keep_h_, keep_c_;
  NormSums<Acc> sums_;
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
