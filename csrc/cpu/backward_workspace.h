// Owns: backward's sizes and its workspace: what the threads of a direction share, what each thread has to itself.
// Must not know: which cell it is, but for its numbers; equations, tensors.
//
// Included once per instruction set, after products_over_steps.h. Compiled once for all cells.

namespace rnnfast::cpu::RNNFAST_ISA {

template <class S>
class BackwardWorkspace : public GradientSizes<S, LayerBackward> {
  using Sizes = GradientSizes<S, LayerBackward>;
  using Unit = typename Product<S>::Unit;
  using Operand = typename Product<S>::Operand;
  using Acc = acc_t<S>;
  using Sizes::carve_buffers, Sizes::carve_columns, Sizes::carve_hidden_sums, Sizes::carve_sums, Sizes::bias_sums,
      Sizes::kLanes;

 public:
  using Sizes::cell, Sizes::gates, Sizes::layer, Sizes::ld_acc, Sizes::padded_gates, Sizes::plan, Sizes::threads;
  static constexpr int64_t kWindowRows = 256;  // rows whose gates are computed again at once, or those of one step

  // What a direction's loop leaves, and what it needs.
  struct Shared {
    Unit* w_hh;        // [G*H, P] in column panels; null: in place
    Unit* w_hr;        // [P, H] in column panels; null: in place or no projection
    Acc* grad_h;       // [B, ld_p] carried from step to step
    Acc* grad_c;       // [B, ld_h]
    Acc* grad_hidden;  // [B, ld_h] gradient of the state before the projection
    // Of the rows of a pass, R:
    Operand* igates;   // [R, ld_g] gradients of the input half of the gates
    Operand* hgates;   // [R, ld_g] and of the hidden half
    Operand* outputs;  // [R, ld_o] gradients of the projected state
    S* hidden;         // [R, H] the state before the projection
    // Of a cell with two products only; w_hh and forward_hh have the first gates then.
    Unit *w_second, *forward_second;
    Acc* bias_second;
    S* gated;                          // [R, P] what the second product read
    Unit* w_ih;                        // [G*H, I] in column panels, for the gradient of the input; null: in place
    Acc* grad_input;                   // of the first of two directions: [N, ld_acc(I)] what is half a sum, in 16 bits
    Acc *sums_ih, *sums_hh, *sums_hr;  // weight gradients not summed in place
    Acc* sums_b;                       // of the biases
    Unit *forward_ih, *forward_hh;     // panels for recomputing
    Acc *bias_ih, *bias_hh;
    Acc* mask;  // [B, ld_draw(P)] of recurrent dropout; null: off
    // Of all threads:
    S* saved;              // [window rows, S*H] recomputed
    Acc* scales;           // [2, window rows] of the halves of the gates, recomputed with layer normalisation
    Acc *keep_h, *keep_c;  // of Zoneout
    // With layer normalisation only.
    Acc* norms;  // [norm_lines, ld_h] the lines of NormSums: what they are gradients of; zeros without a bias
    Acc* sums;   // of NormSums, of each thread; null: not wanted
  };
  struct Own : Sizes::Buffers {
    Acc *igates, *hgates;   // [kRowsAtOnce, columns of one block], for recomputing; with two products igates of all,
                            // with layer normalisation both
    Unit* gated;            // [kRowsAtOnce, units of P]
    Unit *inputs, *states;  // [kRowsAtOnce, units], where rows cannot be read in place
    S* masked;              // [WeightGradient::kDepth, P] states behind recurrent dropout
    // With layer normalisation only.
    Acc* norms;  // [norm_rows, norm_vectors, ld_h] of NormRow
  };

  const Passes passes;

  BackwardWorkspace(const LayerBackward& layer, const CellTraits& cell, int threads)
      : Sizes(layer, cell, layer.output_size, /*whole_rows=*/layer.layer_norm, threads),
        passes(layer.sequence, halves() * ld_gates() * sizeof(Operand), WeightGradient<S>::kDepth,
               balanced() && !layer.direction[0].grad_igates) {}

  // As planned; the runtime may give fewer, and not in each pass as many.
  int threads_a_direction() const { return std::max(1, plan.threads / layer.directions); }
  bool projects() const { return layer.direction[0].weights.w_hr != nullptr; }
  bool recomputes() const { return saved_width() > 0 && !layer.direction[0].saved; }
  int64_t first_gates() const { return cell.first_gates * layer.hidden_size; }
  int64_t saved_width() const { return cell.saved_values(layer.layer_norm) * layer.hidden_size; }
  int64_t ld_gates() const { return layer.direction[0].grad_igates ? gates() : padded_gates(); }
  int64_t ld_outputs() const { return round_up(layer.output_size, Product<S>::kPair); }
  int64_t window_rows(int64_t slots) const { return std::min(layer.sequence.rows, std::max(kWindowRows, slots)); }
  RowRoom windows() const {
    const int64_t B = layer.sequence.batch;
    return plan.divide == Divide::rows ? RowRoom{true, B, kWindowRows} : RowRoom{true, window_rows(B), 0};
  }
  RowRoom steps() const { return {plan.divide == Divide::rows, layer.sequence.batch, 0}; }

  // Norms, then biases, of both halves of the gates; norm and bias of c.
  int norm_lines() const { return 4 * cell.gates + (cell.states > 1 ? 2 : 0); }
  // Of a NormRow: vectors with an element a unit.
  int norm_vectors() const { return (cell.split_gates ? 2 : 1) * cell.gates + (cell.states > 1 ? cell.saved + 3 : 0); }
  // As many as fit into the first-level cache.
  int64_t norm_rows() const {
    const int64_t rows = (24 << 10) / (norm_vectors() * ld_acc(layer.hidden_size) * sizeof(Acc));
    return std::max<int64_t>(1, std::min<int64_t>(kNormRows<Acc>, rows));
  }

  // For recomputing.
  UnitBlocks gate_blocks(int gates) const {
    UnitBlocks blocks = unit_blocks<S>(cell.first_gates, cell.gates, layer.hidden_size, Divide::rows);
    blocks.gates = gates;
    return blocks;
  }

  // Recomputed with layer normalisation, rows of gates lie whole, as in forward.
  int64_t ld_gates_again() const { return gate_blocks(cell.gates).columns() + 64 / sizeof(Acc); }

  Shared carve_shared(const DirectionBackward& direction, Carver& carver) const {
    const int64_t N = layer.sequence.rows, B = layer.sequence.batch, H = layer.hidden_size, P = layer.output_size;
    const int64_t I = layer.input_size, R = passes.rows();
    const auto gate_gradients = [&](void* given) {
      return given ? static_cast<Operand*>(given) : carver.take<Operand>(R * ld_gates());
    };
    Shared s{};
    if (!cell.diagonal) s.w_hh = carve_columns(carver, first_gates(), P);
    s.grad_h = carver.take<Acc>(B * ld_acc(P));
    if (cell.states > 1) s.grad_c = carver.take<Acc>(B * ld_acc(H));
    s.igates = gate_gradients(direction.grad_igates);
    s.hgates = cell.split_gates || layer.layer_norm ? gate_gradients(direction.grad_hgates) : s.igates;
    if (cell.two_products) {
      s.w_second = carve_columns(carver, gates() - first_gates(), P);
      s.gated = carver.take<S>(R * P);
    }
    if (projects()) {
      s.w_hr = carve_columns(carver, P, H);
      s.grad_hidden = carver.take<Acc>(B * ld_acc(H));
      s.outputs = carver.take<Operand>(R * ld_outputs());
      s.hidden = carver.take<S>(R * H);
      s.sums_hr = carve_sums(carver, P, H);
    }
    if (layer.grad_input.data) {
      s.w_ih = carve_columns(carver, gates(), I);
      if (layer.directions == 2 && !direction.reverse && !std::is_same_v<S, Acc>)
        s.grad_input = carver.take<Acc>(N * ld_acc(I));
    }
    if (direction.grad_w_hh) {
      s.sums_ih = carve_sums(carver, gates(), I);
      s.sums_hh = carve_hidden_sums(carver);
      s.sums_b = carver.take<Acc>(bias_sums());
    }
    if (recomputes()) {
      const UnitBlocks all = gate_blocks(cell.gates), first = gate_blocks(cell.first_gates);
      const auto panels = [&](const UnitBlocks& of, int64_t k) {
        return GateMatrix<S>::in_place(N, k) ? nullptr : carver.take<Unit>(GateMatrix<S>::packed_units(of, k));
      };
      s.forward_ih = panels(all, I);
      if (!cell.diagonal) s.forward_hh = panels(first, P);
      s.bias_ih = carver.take<Acc>(all.columns());
      s.bias_hh = carver.take<Acc>(first.columns());
      if (cell.two_products) {
        const UnitBlocks second = gate_blocks(cell.gates - cell.first_gates);
        s.forward_second = panels(second, P);
        s.bias_second = carver.take<Acc>(second.columns());
      }
      s.saved = carver.take<S>(windows().rows(threads_a_direction()) * saved_width());
      if (layer.layer_norm) s.scales = carver.take<Acc>(2 * windows().rows(threads_a_direction()));
    }
    const auto keep = [&](double p, int64_t units) {
      return p > 0 ? carver.take<Acc>(Zoneout<Acc>::elements(layer.noise, steps(), threads_a_direction(), units))
                   : nullptr;
    };
    s.keep_h = keep(layer.noise.zoneout_h, P);
    s.keep_c = keep(layer.noise.zoneout_c, H);
    if (layer.noise.recurrent_dropout > 0) s.mask = carver.take<Acc>(B * ld_draw(P));
    if (layer.layer_norm) s.norms = carver.take<Acc>(norm_lines() * ld_acc(H));
    if (layer.layer_norm && direction.grad_w_hh)
      s.sums = carver.take<Acc>(threads_a_direction() * NormSums<Acc>::elements(norm_lines(), ld_acc(H)));
    return s;
  }

  Own carve_own(Carver& carver) const {
    const int64_t H = layer.hidden_size, P = layer.output_size, I = layer.input_size;
    Own o{};
    carve_buffers(carver, o);
    if (recomputes()) {
      constexpr int64_t kBlock = kMaxBlockVectors * kLanes;
      const int64_t columns = layer.layer_norm ? ld_gates_again() : kBlock;
      o.igates = carver.take<Acc>(kRowsAtOnce * (cell.two_products ? gate_blocks(cell.gates).columns() : columns));
      if (cell.two_products) o.gated = carver.take<Unit>(kRowsAtOnce * units_of<S>(P));
      o.hgates = carver.take<Acc>(kRowsAtOnce * columns);
      o.inputs = carver.take<Unit>(kRowsAtOnce * units_of<S>(I));
      o.states = carver.take<Unit>(kRowsAtOnce * units_of<S>(P));
    }
    if (layer.noise.recurrent_dropout > 0) o.masked = carver.take<S>(WeightGradient<S>::kDepth * P);
    if (layer.layer_norm) o.norms = carver.take<Acc>(norm_rows() * norm_vectors() * ld_acc(H));
    return o;
  }

 private:
  // Whether each thread's work is equal in every pass of the loop. Threads with rows of their own wait for each other
  // behind each.
  bool balanced() const {
    return plan.divide == Divide::units || plan.threads <= layer.directions || !layer.sequence.batch_sizes;
  }
  int halves() const { return cell.split_gates || layer.layer_norm ? 2 : 1; }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
