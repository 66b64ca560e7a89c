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
    StepRow* rows;         // [slots]
    Acc* igates;           // [capacity, columns]; where units are divided, that of all threads
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
  int64_t saved_width() const { return cell.saved_values(layer.layer_norm) * layer.hidden_size; }
  // The tile of the first product has the width that fits.
  UnitBlocks hidden_blocks(int gates) const {
    UnitBlocks blocks = unit_blocks<S>(cell.first_gates, cell.gates, layer.hidden_size, plan.divide);
    blocks.gates = gates;
    return blocks;
  }
  UnitBlocks output_blocks() const { return unit_blocks<S>(1, 1, layer.output_size, plan.divide); }
  // Rows whose igates a thread with so many slots computes at once: about a quarter of a megabyte, and at least one
  // step.
  int64_t capacity(int64_t slots) const { return std::max(slots, rows_at_once()); }
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
  // A direction's pieces of a workspace, and those of a thread in it, which has the given slots.
  void carve(void* workspace, int direction, const Member& member, const Share& slots, Shared& shared, Own& own) const {
    Carver carver(static_cast<char*>(workspace) + direction * direction_bytes());
    shared = carve_shared(carver);
    own = carve_own(carver, member, slots);
  }

 private:
  size_t direction_bytes() const {
    Carver carver(nullptr);
    carve_shared(carver);
    carve_own(carver, Member{}, Share(0, 0, 1));
    return carver.used();
  }
  // As planned; the runtime may give fewer.
  int threads_a_direction() const { return layer.directions == 2 ? (plan.threads + 1) / 2 : plan.threads; }
  int64_t rows_at_once() const {
    const int64_t rows = (256 << 10) / std::max<int64_t>(1, ld_gates() * sizeof(Acc));
    return std::min(std::max<int64_t>(1, rows), layer.sequence.rows);
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

  Own carve_own(Carver& carver, const Member& m, const Share& slots) const {
    const int64_t batch = layer.sequence.batch;
    const int threads = threads_a_direction();
    const bool divided = plan.divide == Divide::rows;
    // A row apart, two threads do not write to one cache line.
    const RowRoom step{divided, batch, 1}, several{divided, batch, rows_at_once()};
    const auto take = [&]<class T>(T*& piece, const RowRoom& room, int64_t width) {
      piece = carver.take<T>(room.rows(threads) * width) + room.first(m, slots) * width;
    };
    const auto take_keep = [&](Acc*& piece, double p, int64_t units) {
      if (p > 0)
        piece = carver.take<Acc>(Zoneout<Acc>::elements(layer.noise, step, threads, units)) +
                Zoneout<Acc>::first(layer.noise, step, m, slots, units);
    };
    const auto take_own = [&](Acc*& piece, int64_t elements) {
      piece = carver.take<Acc>(threads * elements) + m.rank * elements;
    };
    Own own{};
    take(own.rows, step, 1);
    take(own.igates, divided ? several : RowRoom{true, capacity(batch), 0}, ld_gates());
    take(own.inputs, several, 1);
    if (!reads_in_place<S>(layer.input_size)) take(own.converted, several, units_of<S>(layer.input_size));
    take_keep(own.keep_h, layer.noise.zoneout_h, layer.output_size);
    take_keep(own.keep_c, layer.noise.zoneout_c, layer.hidden_size);
    if (layer.layer_norm) {
      take_own(own.hgates, norm_rows() * ld_gates());
      if (cell.states > 1) take_own(own.values, kNormRows<Acc> * (cell.saved + 1) * ld_acc(layer.hidden_size));
    }
    return own;
  }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
