// Owns: the products over the steps that backward's loop along a tangent leaves.
// Must not know: which cell it is, but for its numbers; equations, tensors.
//
// A gradient is a product, and its tangent the sum of two: a' b + a b'. A row of gate gradients has its tangent behind
// it, so that of a weight gradient is one product of twice the rows, with those of b' and b by turns.
//
// Included once per instruction set, after tangent_workspace.h. Compiled once for all cells.

namespace rnnfast::cpu::RNNFAST_ISA {

template <class S>
class TangentProducts {
  using Workspace = TangentWorkspace<S>;
  using Products = ProductsOverSteps<S, LayerTangent>;

 public:
  static void run(const Workspace& sizes, void* workspace) {
    const LayerTangent& layer = sizes.layer;
    Barrier everyone;
    run_carved(sizes, workspace, sizes.team_size(), [&](const Carved<Workspace>& pieces, int rank, int size) {
      const Products products(sizes, pieces.own, rank, size);
      if (layer.t_grad_input.data) {
        typename Products::InputTerm terms[4];
        int count = 0;
        for (int d = 0; d < layer.directions; ++d) {
          const DualPointer& w_ih = layer.direction[d].w_ih;
          const typename Workspace::Shared& shared = pieces.shared[d];
          terms[count++] = {w_ih.value, shared.columns_ih, shared.grad_igates + sizes.padded_gates()};
          if (w_ih.tangent) terms[count++] = {w_ih.tangent, shared.t_columns_ih, shared.grad_igates};
        }
        for (int i = 0; i < count; ++i) products.prepare_input(terms[i]);
        everyone.wait(size);
        products.input(terms, count, 2 * sizes.padded_gates(), {0, layer.sequence.rows}, {layer.t_grad_input});
      }
      for (int d = 0; d < layer.directions; ++d)
        if (layer.direction[d].t_grad_w_hh) grad_weights(sizes, products, layer.direction[d], pieces.shared[d]);
    });
  }

 private:
  static void grad_weights(const Workspace& sizes, const Products& products, const DirectionTangent& d,
                           const typename Workspace::Shared& shared) {
    using Gradients = typename Products::Gradients;
    const Sequence& s = sizes.layer.sequence;
    const DualRows& input = sizes.layer.input;
    const int64_t I = sizes.layer.input_size, H = sizes.layer.hidden_size, ld = sizes.padded_gates();
    const Share m = products.slice(sizes.gates());
    const auto tangents = [&](const S* gates) { return Gradients{gates + ld, 2 * ld, {0, s.rows}}; };
    const auto pairs = [&](const S* gates) { return Gradients{gates, ld, {0, 2 * s.rows}}; };
    const auto by_turns = [&](const auto& value, const auto& tangent) {
      static_assert(WeightGradient<S>::kDepth % 2 == 0 && DiagonalGradient<S>::kDepth % 2 == 0,
                    "whole pairs at a time");
      return [=, &s](int64_t first, int64_t count, const S** rows) {
        for_rows(s, first / 2, count / 2, [&](int64_t i, int64_t t, int64_t slot) {
          rows[2 * i] = tangent(i, t, slot);
          rows[2 * i + 1] = value(i, t, slot);
        });
      };
    };
    const auto inputs = [&](const Rows& rows) {
      return [&](int64_t, int64_t t, int64_t slot) { return at<const S>(rows, s, t, slot); };
    };
    const auto states = [&](const Rows& rows, const void* first) {
      return [&, first](int64_t, int64_t t, int64_t slot) {
        return previous_state<S>(s, rows, first, H, t, slot, d.reverse);
      };
    };

    if (I > 0 && input.tangent.data) {
      products.weight(pairs(shared.grad_igates), m, I, by_turns(inputs(input.value), inputs(input.tangent)),
                      shared.sums_ih, d.t_grad_w_ih);
    } else if (I > 0) {
      products.weight(tangents(shared.grad_igates), m, I, products.each_row(inputs(input.value)), shared.sums_ih,
                      d.t_grad_w_ih);
    }
    const auto both_states = by_turns(states(d.output.value, d.h0.value), states(d.output.tangent, d.h0.tangent));
    products.hidden_weight(pairs(shared.grad_hgates), m, both_states, shared.sums_hh, d.t_grad_w_hh);
    if (d.t_grad_b_ih)
      products.biases(tangents(shared.grad_igates), tangents(shared.grad_hgates), nullptr, d.t_grad_b_ih,
                      d.t_grad_b_hh);
  }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
