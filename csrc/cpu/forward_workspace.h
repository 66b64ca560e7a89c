// Owns: forward's sizes and its workspace: what the threads of a direction share, what each thread has to itself.
// Must not know: which cell it is, but for its numbers; equations, tensors.
//
// Included once per instruction set, after noise.h. Compiled once for all cells.

namespace rnnfast::cpu::RNNFAST_ISA {

template <class S>
class ForwardWorkspace {
  using Unit = typename Product<S>::Unit;
  using Operand = typename Product<S>::Operand;
  using Acc = acc_t<S>;
  static constexpr int kLanes = Vec<Acc>::kLanes;

 public:
  // What the threads of one direction share.
  struct Shared {
    Unit *w_ih, *w_hh, *w_hr;          // packed weights; null: used in place
    Acc *bias_ih, *bias_hh, *bias_hr;  // [columns]
    Unit* h[2];                        // [B, ld_h] before and after a step, in turn
    Acc* c;                            // [B, ld_c]
    Unit* hidden;                      // [B, ld_hidden] before the projection w_hr
    // Of a cell with two products only; w_hh has the first gates then.
    Unit* w_second;
    Acc* bias_second;
    Unit* gated;  // [B, ld_h] what the second product reads
    // With recurrent dropout only; h has the masked state then.
    Unit* unmasked;  // [B, ld_h]
    Acc* mask;       // [B, ld_draw(P)]
    Acc* norms;      // [4, columns] with layer normalisation: weights and bias of each half of the gates
  };
  // Where a row of one step reads and writes.
  struct StepRow {
    const Operand* h;  // [P] the state before the step
    Operand* next_h;   // [P] the state after it
    Acc* c;            // [H] the cell state, updated in place
    Operand* hidden;   // [H] the state before the projection; null without one
    Operand* gated;    // [H] what the second product reads
    S* output;         // [P]
    S* c_output;       // [H] or null
    S* saved;          // [S*H] or null
    bool drop;         // the next step starts from zero
    Acc* values;       // [S+1, ld_c] with layer normalisation, two states: what the cell kept, and c'
    // With noise only. h and next_h are what products read, the cell reads prev_h.
    const Operand* prev_h;       // [P]
    Operand* unmasked;           // [P] the state after the step; null without recurrent dropout
    const Acc* mask;             // [P] of recurrent dropout; null: off
    const Acc *keep_h, *keep_c;  // [P], [H] zoneout's k; null: off
  };
  // What a thread has to itself.
  struct Own {
    StepRow* rows;         // [B]
    Acc* igates;           // [capacity, columns of the thread's blocks]
    const Unit** inputs;   // [capacity]
    Unit* converted;       // [capacity, units of I], where inputs cannot be read in place
    Acc *keep_h, *keep_c;  // of Zoneout
    // With layer normalisation only.
    Acc* hgates;  // [norm_rows, ld_gates]
    Acc* values;  // [kNormRows, S+1, ld_c]
  };

  const LayerForward& layer;
  const CellTraits cell;
  const Plan plan;

  ForwardWorkspace(const LayerForward& layer, const CellTraits& cell, int threads)
      : layer(layer),
        cell(cell),
        plan(make_plan(cell.gates, layer.input_size, layer.hidden_size, cell.diagonal ? 1 : layer.output_size,
                       layer.directions, layer.sequence, size_of(layer.dtype), layer.layer_norm, threads)) {}

  bool projects() const { return layer.direction[0].weights.w_hr != nullptr; }
  int64_t saved_width() const { return (layer.layer_norm ? 2 * cell.gates : cell.saved) * layer.hidden_size; }
  // The tile of the first product has the width that fits.
  UnitBlocks hidden_blocks(int gates) const {
    UnitBlocks blocks = unit_blocks<S>(cell.first_gates, cell.gates, layer.hidden_size, plan.divide);
    blocks.gates = gates;
    return blocks;
  }
  UnitBlocks output_blocks() const { return unit_blocks<S>(1, 1, layer.output_size, plan.divide); }
  // Rows whose igates are computed at once: about a quarter of a megabyte, and at least one step.
  int64_t capacity() const {
    const int64_t rows = (256 << 10) / std::max<int64_t>(1, ld_gates() * sizeof(Acc));
    return std::min(std::max(layer.sequence.batch, rows), layer.sequence.rows);
  }
  // The columns of a row of gates. With layer normalisation rows lie whole, else those of a block after each other.
  // Whole rows a multiple of a large power of two apart would meet in one set of the cache.
  int64_t ld_gates() const { return hidden_blocks(cell.gates).columns() + (layer.layer_norm ? 64 / sizeof(Acc) : 0); }
  // With layer normalisation: rows whose products stand in the cache until the last unit's is there.
  int64_t norm_rows() const {
    const int64_t rows = (128 << 10) / (ld_gates() * sizeof(Acc));
    return std::min(layer.sequence.batch, std::max<int64_t>(kTileRows, rows));
  }
  // Rows of state are padded to whole vectors, so that loads and stores need no mask.
  static int64_t ld_units(int64_t n) { return round_up(units_of<S>(n), kLanes); }
  static int64_t ld_acc(int64_t n) { return round_up(n, kLanes); }

  size_t bytes() const { return layer.directions * direction_bytes(); }
  // A direction's pieces of a workspace, and those of a thread in it.
  void carve(void* workspace, int direction, int rank, Shared& shared, Own& own) const {
    Carver carver(static_cast<char*>(workspace) + direction * direction_bytes());
    shared = carve_shared(carver);
    for (int r = 0; r <= rank; ++r) own = carve_own(carver);
  }

 private:
  size_t direction_bytes() const {
    Carver carver(nullptr);
    carve_shared(carver);
    const bool split = layer.directions == 2 && plan.threads > 1;
    for (int r = 0; r < (split ? (plan.threads + 1) / 2 : plan.threads); ++r) carve_own(carver);
    return carver.used();
  }

  Shared carve_shared(Carver& carver) const {
    const UnitBlocks hidden = hidden_blocks(cell.gates), output = output_blocks();
    const int64_t batch = layer.sequence.batch, P = layer.output_size;
    const auto weights = [&](const UnitBlocks& blocks, int64_t k) {
      if (GateMatrix<S>::in_place(layer.sequence.rows, k)) return static_cast<Unit*>(nullptr);
      return carver.take<Unit>(GateMatrix<S>::packed_units(blocks, k));
    };
    Shared s{};
    s.w_ih = weights(hidden, layer.input_size);
    if (!cell.diagonal) s.w_hh = weights(hidden_blocks(cell.first_gates), P);
    s.bias_ih = carver.take<Acc>(hidden.columns());
    s.bias_hh = carver.take<Acc>(hidden.columns());
    if (cell.two_products) {
      const UnitBlocks second = hidden_blocks(cell.gates - cell.first_gates);
      s.w_second = weights(second, P);
      s.bias_second = carver.take<Acc>(second.columns());
      s.gated = carver.take<Unit>(batch * ld_units(P));
    }
    for (Unit*& h : s.h) h = carver.take<Unit>(batch * ld_units(P));
    s.c = carver.take<Acc>(cell.states > 1 ? batch * ld_acc(layer.hidden_size) : 0);
    if (projects()) {
      s.w_hr = weights(output, layer.hidden_size);
      s.bias_hr = carver.take<Acc>(output.columns());
      s.hidden = carver.take<Unit>(batch * ld_units(layer.hidden_size));
    }
    if (layer.noise.recurrent_dropout > 0) {
      s.unmasked = carver.take<Unit>(batch * ld_units(P));
      s.mask = carver.take<Acc>(batch * ld_draw(P));
    }
    if (layer.layer_norm) s.norms = carver.take<Acc>(4 * hidden.columns());
    return s;
  }

  Own carve_own(Carver& carver) const {
    const int64_t rows = capacity();
    Own own{};
    own.rows = carver.take<StepRow>(layer.sequence.batch);
    own.igates = carver.take<Acc>(rows * ld_gates());
    own.inputs = carver.take<const Unit*>(rows);
    if (!reads_in_place<S>(layer.input_size)) own.converted = carver.take<Unit>(rows * units_of<S>(layer.input_size));
    const auto keep = [&](double p, int64_t units) {
      return p > 0 ? carver.take<Acc>(Zoneout<Acc>::elements(layer.noise, p, layer.sequence.batch, units)) : nullptr;
    };
    own.keep_h = keep(layer.noise.zoneout_h, layer.output_size);
    own.keep_c = keep(layer.noise.zoneout_c, layer.hidden_size);
    if (layer.layer_norm) {
      own.hgates = carver.take<Acc>(norm_rows() * ld_gates());
      if (cell.states > 1) own.values = carver.take<Acc>(kNormRows<Acc> * (cell.saved + 1) * ld_acc(layer.hidden_size));
    }
    return own;
  }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
