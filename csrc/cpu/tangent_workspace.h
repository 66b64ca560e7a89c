// Owns: the sizes of a layer along a tangent and its workspace: what the threads of a direction share, what each thread
// has to itself.
// Must not know: which cell it is, but for its numbers; equations, tensors.
//
// Included once per instruction set, after layer.h. Compiled once for all cells. Storage and arithmetic have one type.

namespace rnnfast::cpu::RNNFAST_ISA {

template <class S>
class TangentWorkspace {
  static_assert(std::is_same_v<S, acc_t<S>>, "tangents are float32 or float64");
  static constexpr int kLanes = Vec<S>::kLanes;

 public:
  static constexpr int64_t kRowsAtOnce = 64;  // rows of a product over several steps

  struct Shared {
    S *w_ih, *w_hh;                // forward: in gate panels
    S* bias;                       // zeros
    S* window;                     // [B * window_steps, columns of the gates] x' W_ih^T
    S *columns_hh, *t_columns_hh;  // backward: W_hh and its tangent in column panels
    S *columns_ih, *t_columns_ih;  // and W_ih, for the gradient of the input
    S* zeros;                      // [H]
    S* t_saved;                    // [N, S*H]: written by forward, read by backward
    S *grad_h, *grad_c;            // [B, 2, ld]: each row's gradient, then its tangent
    S *grad_igates, *grad_hgates;  // [N, 2, ld_gates]: likewise, of the two halves of the gates
    S *sums_ih, *sums_hh;          // weight gradients not summed in place
  };
  struct Own {
    S* panels;      // of WeightGradient
    S* grad_input;  // [kRowsAtOnce, columns of one block]
  };

  const LayerTangent& layer;
  const CellTraits cell;
  const int threads;  // the most there may be
  const Plan plan;    // of the loops

  TangentWorkspace(const LayerTangent& layer, const CellTraits& cell, int threads)
      : layer(layer),
        cell(cell),
        threads(threads),
        plan(make_plan(cell.gates, layer.input_size, layer.hidden_size, hidden_inputs(), layer.directions,
                       layer.sequence, sizeof(S), /*whole_rows=*/false, threads)) {}

  // How many threads the products over all steps take: they can use some that the loops cannot.
  int team_size() const {
    const double row = row_cycles(cell.gates, layer.input_size, layer.hidden_size, hidden_inputs());
    return row * double(layer.sequence.rows) * layer.directions < 1e5 ? 1 : threads;
  }
  int64_t gates() const { return cell.gates * layer.hidden_size; }
  // A row of gate gradients; see BackwardWorkspace::ld_gates.
  int64_t ld_gates() const {
    const int64_t line = 64 / sizeof(S);
    return gates() % (8 * line) != 0 ? gates() : gates() + line;
  }
  int64_t ld_states() const { return round_up(layer.hidden_size, kLanes); }
  // The input is projected for so many steps at once.
  int64_t window_steps() const {
    return std::max<int64_t>(1, kRowsAtOnce / std::max<int64_t>(1, layer.sequence.batch));
  }
  bool projects() const { return layer.input.tangent.data != nullptr; }

  // A block is one vector of units, or as many as fill four vectors of gates.
  UnitBlocks gate_blocks() const { return unit_blocks<S>(cell.gates, cell.gates, layer.hidden_size, plan.divide); }
  UnitBlocks state_blocks() const { return column_blocks(layer.hidden_size, plan.divide); }
  static UnitBlocks column_blocks(int64_t units, Divide divide) {
    UnitBlocks blocks;
    blocks.units = units;
    blocks.lanes = kLanes;
    blocks.block = kLanes * (divide == Divide::units ? 1 : kMaxVectors);
    return blocks;
  }

  size_t bytes() const {
    Carver carver(nullptr);
    Shared shared[2];
    Own own;
    carve(carver, 0, shared, own);
    return carver.used();
  }
  // The pieces of a workspace for each direction and for a thread.
  void carve(void* workspace, int rank, Shared (&shared)[2], Own& own) const {
    Carver carver(workspace);
    carve(carver, rank, shared, own);
  }

 private:
  // States that a unit sees.
  int64_t hidden_inputs() const { return cell.diagonal ? 1 : layer.hidden_size; }

  void carve(Carver& carver, int rank, Shared (&shared)[2], Own& own) const {
    for (int d = 0; d < layer.directions; ++d) shared[d] = carve_shared(layer.direction[d], carver);
    for (int r = 0; r < threads; ++r) {
      const Own of_thread = carve_own(carver);
      if (r == rank) own = of_thread;
    }
  }

  Shared carve_shared(const DirectionTangent& direction, Carver& carver) const {
    const int64_t I = layer.input_size, H = layer.hidden_size, B = layer.sequence.batch, N = layer.sequence.rows;
    const UnitBlocks gates_of = gate_blocks();
    const auto gate_panels = [&](int64_t k) { return carver.take<S>(GateMatrix<S>::packed_units(gates_of, k)); };
    const auto columns = [&](const UnitBlocks& blocks, const void* weights) {
      return weights ? carver.take<S>(ColumnMatrix<S>::packed_units(blocks, gates())) : nullptr;
    };
    const auto sums = [&](int64_t n) {
      return WeightGradient<S>::sums_in_place(n) ? nullptr
                                                 : carver.take<S>(WeightGradient<S>::sum_elements(gates(), n));
    };
    Shared s{};
    if (!cell.diagonal) s.w_hh = gate_panels(H);
    s.bias = carver.take<S>(gates_of.columns());
    s.zeros = carver.take<S>(H);
    if (projects()) {
      s.w_ih = gate_panels(I);
      s.window = carver.take<S>(B * window_steps() * gates_of.columns());
    }
    if (!layer.backward) return s;
    s.t_saved = carver.take<S>(N * cell.saved * H);
    s.grad_h = carver.take<S>(B * 2 * ld_states());
    if (cell.states > 1) s.grad_c = carver.take<S>(B * 2 * ld_states());
    s.grad_igates = carver.take<S>(N * 2 * ld_gates());
    s.grad_hgates = cell.split_gates ? carver.take<S>(N * 2 * ld_gates()) : s.grad_igates;
    if (!cell.diagonal) {
      s.columns_hh = columns(state_blocks(), direction.w_hh.value);
      s.t_columns_hh = columns(state_blocks(), direction.w_hh.tangent);
    }
    if (layer.t_grad_input.data) {
      s.columns_ih = columns(column_blocks(I, Divide::rows), direction.w_ih.value);
      s.t_columns_ih = columns(column_blocks(I, Divide::rows), direction.w_ih.tangent);
    }
    if (direction.t_grad_w_hh) {
      s.sums_ih = sums(I);
      s.sums_hh = cell.diagonal ? carver.take<S>(DiagonalGradient<S>::sum_elements(cell.gates, H)) : sums(H);
    }
    return s;
  }

  Own carve_own(Carver& carver) const {
    Own o{};
    if (!layer.backward) return o;
    if (layer.direction[0].t_grad_w_hh)
      o.panels = carver.take<S>(WeightGradient<S>::panel_units(std::max(layer.input_size, layer.hidden_size)));
    if (layer.t_grad_input.data) o.grad_input = carver.take<S>(kRowsAtOnce * kMaxVectors * kLanes);
    return o;
  }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
