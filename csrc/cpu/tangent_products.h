// Owns: the products over the steps of a pass that backward's loop along a tangent leaves.
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
  // passes: of each direction.
  static void run(const Workspace& sizes, void* workspace, const Steps* passes) {
    const LayerTangent& layer = sizes.layer;
    Barrier everyone;
    run_carved(sizes, workspace, sizes.team_size(), [&](const Carved<Workspace>& pieces, int rank, int size) {
      const Products products(sizes, pieces.own, rank, size);
      products.each_window(sizes.passes, passes, [&](int d, const Steps* windows, const Stretch& of, int64_t origin) {
        const DirectionTangent& direction = layer.direction[d];
        const typename Workspace::Shared& shared = pieces.shared[d];
        const int64_t ld = sizes.padded_gates(), first = (of.first - origin) * 2 * ld;
        if (layer.t_grad_input.data) {
          const DualPointer& w_ih = direction.w_ih;
          const typename Products::InputTerm terms[2] = {
              {w_ih.value, shared.columns_ih, shared.grad_igates + first + ld},
              {w_ih.tangent, shared.t_columns_ih, shared.grad_igates + first}};
          const int count = w_ih.tangent ? 2 : 1;
          for (int i = 0; of.begins && i < count; ++i) products.prepare_input(terms[i]);
          // The other direction's part of a row may be another thread's.
          if (of.begins || layer.directions == 2) everyone.wait(size);
          products.input(terms, count, 2 * ld, of, products.grad_input(layer.t_grad_input, nullptr, windows, d));
        }
        if (direction.t_grad_w_hh)
          grad_weights(sizes, products, direction, shared, of, shared.grad_igates + first, shared.grad_hgates + first);
      });
    });
  }

 private:
  // igates, hgates: the gradients of the stretch.
  static void grad_weights(const Workspace& sizes, const Products& products, const DirectionTangent& d,
                           const typename Workspace::Shared& shared, const Stretch& of, const S* igates,
                           const S* hgates) {
    using Gradients = typename Products::Gradients;
    const Sequence& s = sizes.layer.sequence;
    const DualRows& input = sizes.layer.input;
    const int64_t I = sizes.layer.input_size, H = sizes.layer.hidden_size, ld = sizes.padded_gates();
    const Share m = products.slice(sizes.gates());
    const auto tangents = [&](const S* gates) { return Gradients{gates + ld, 2 * ld, of}; };
    const auto pairs = [&](const S* gates) {
      return Gradients{gates, ld, {2 * of.first, 2 * of.rows, of.begins, of.ends}};
    };
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
      products.weight(pairs(igates), m, I, by_turns(inputs(input.value), inputs(input.tangent)), shared.sums_ih,
                      d.t_grad_w_ih);
    } else if (I > 0) {
      products.weight(tangents(igates), m, I, products.each_row(inputs(input.value)), shared.sums_ih, d.t_grad_w_ih);
    }
    const auto both_states = by_turns(states(d.output.value, d.h0.value), states(d.output.tangent, d.h0.tangent));
    products.hidden_weight(pairs(hgates), m, both_states, shared.sums_hh, d.t_grad_w_hh);
    if (d.t_grad_b_ih) products.biases(tangents(igates), tangents(hgates), shared.sums_b, d.t_grad_b_ih, d.t_grad_b_hh);
  }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
