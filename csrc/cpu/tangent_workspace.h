// Owns: the sizes of a layer along a tangent and its workspace: what the threads of a direction share, what each thread
// has to itself.
// Must not know: which cell it is, but for its numbers; equations, tensors.
//
// Included once per instruction set, after products_over_steps.h. Compiled once for all cells. Storage and arithmetic
// have one type.

namespace rnnfast::cpu::RNNFAST_ISA {

template <class S>
class TangentWorkspace : public GradientSizes<S, LayerTangent> {
  using Sizes = GradientSizes<S, LayerTangent>;
  using Sizes::carve_buffers, Sizes::carve_columns, Sizes::carve_hidden_sums, Sizes::carve_sums, Sizes::bias_sums;
  static_assert(std::is_same_v<S, acc_t<S>>, "tangents are float32 or float64");

 public:
  using Sizes::cell, Sizes::gates, Sizes::layer, Sizes::ld_acc, Sizes::padded_gates, Sizes::plan;

  struct Shared {
    S *w_ih, *w_hh;                // forward: in gate panels
    S* bias;                       // zeros
    S* window;                     // [B * window_steps, columns of the gates] x' W_ih^T
    S *columns_hh, *t_columns_hh;  // backward: W_hh and its tangent in column panels; null: in place
    S *columns_ih, *t_columns_ih;  // and W_ih, for the gradient of the input
    S* zeros;                      // [H]
    S* t_saved;                    // [N, S*H]: written by forward, read by backward
    S *grad_h, *grad_c;            // [B, 2, ld]: each row's gradient, then its tangent
    S *grad_igates, *grad_hgates;  // [R, 2, ld_gates]: likewise, of the two halves of the gates, of the rows of a pass
    S *sums_ih, *sums_hh;          // weight gradients not summed in place
    S* sums_b;                     // of the biases
  };
  using Own = typename Sizes::Buffers;

  // Several threads would wait for each other behind each window, for no gain that shows.
  const Passes passes;

  TangentWorkspace(const LayerTangent& layer, const CellTraits& cell, int threads)
      : Sizes(layer, cell, /*output_size=*/layer.hidden_size, /*whole_rows=*/false, threads),
        passes(layer.sequence, (cell.split_gates ? 2 : 1) * 2 * padded_gates() * sizeof(S),
               WeightGradient<S>::kDepth / 2, /*windows=*/this->team_size() == 1) {}

  // The input is projected for so many steps at once.
  int64_t window_steps() const {
    return std::max<int64_t>(1, kRowsAtOnce / std::max<int64_t>(1, layer.sequence.batch));
  }
  bool projects() const { return layer.input.tangent.data != nullptr; }

  // A block is one vector of units, or as many as fill four vectors of gates.
  UnitBlocks gate_blocks() const { return unit_blocks<S>(cell.gates, cell.gates, layer.hidden_size, plan.divide); }

  Shared carve_shared(const DirectionTangent& direction, Carver& carver) const {
    const int64_t I = layer.input_size, H = layer.hidden_size, B = layer.sequence.batch, N = layer.sequence.rows;
    const UnitBlocks gates_of = gate_blocks();
    const auto gate_panels = [&](int64_t k) { return carver.take<S>(GateMatrix<S>::packed_units(gates_of, k)); };
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
    s.grad_h = carver.take<S>(B * 2 * ld_acc(H));
    if (cell.states > 1) s.grad_c = carver.take<S>(B * 2 * ld_acc(H));
    s.grad_igates = carver.take<S>(passes.rows() * 2 * padded_gates());
    s.grad_hgates = cell.split_gates ? carver.take<S>(passes.rows() * 2 * padded_gates()) : s.grad_igates;
    const auto columns = [&](const DualPointer& weight, int64_t n, S*& value, S*& tangent) {
      value = carve_columns(carver, gates(), n);
      if (weight.tangent) tangent = carve_columns(carver, gates(), n);
    };
    if (!cell.diagonal) columns(direction.w_hh, H, s.columns_hh, s.t_columns_hh);
    if (layer.t_grad_input.data) columns(direction.w_ih, I, s.columns_ih, s.t_columns_ih);
    if (direction.t_grad_w_hh) {
      s.sums_ih = carve_sums(carver, gates(), I);
      s.sums_hh = carve_hidden_sums(carver);
      s.sums_b = carver.take<S>(bias_sums());
    }
    return s;
  }

  Own carve_own(Carver& carver) const {
    Own o{};
    if (layer.backward) carve_buffers(carver, o);
    return o;
  }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
