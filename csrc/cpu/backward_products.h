// Owns: the products over the steps of a pass that backward's loop leaves.
// Must not know: which cell it is, but for its numbers; equations, tensors.
//
// Included once per instruction set, after backward_workspace.h. Compiled once for all cells.

namespace rnnfast::cpu::RNNFAST_ISA {

template <class S>
class GradientProducts {
  using Workspace = BackwardWorkspace<S>;
  using Products = ProductsOverSteps<S, LayerBackward>;

 public:
  // passes: of each direction.
  static void run(const Workspace& sizes, void* workspace, const Steps* passes) {
    const LayerBackward& layer = sizes.layer;
    Barrier everyone;
    run_carved(sizes, workspace, sizes.team_size(), [&](const Carved<Workspace>& pieces, int rank, int size) {
      const Products products(sizes, pieces.own, rank, size);
      if (layer.grad_input.data) {
        typename Products::InputTerm terms[2];
        for (int d = 0; d < layer.directions; ++d)
          terms[d] = {layer.direction[d].weights.w_ih, pieces.shared[d].w_ih, pieces.shared[d].igates};
        // Two directions have one pass.
        const Stretch rows = sizes.rows_of(passes[0], layer.direction[0].reverse);
        products.input(terms, layer.directions, sizes.ld_gates(), rows, layer.grad_input, everyone);
      }
      for (int d = 0; d < layer.directions; ++d) {
        const DirectionBackward& direction = layer.direction[d];
        if (!direction.grad_w_hh) continue;
        for (int64_t end = passes[d].end; end > passes[d].begin;) {
          const Steps window = sizes.window_before(end, direction.reverse);
          grad_weights(sizes, products, direction, pieces.shared[d], pieces.own.masked,
                       sizes.rows_of(window, direction.reverse), sizes.rows_of(passes[d], direction.reverse).first);
          end = window.begin;
        }
      }
    });
  }

 private:
  // origin: the row with which the pass begins.
  static void grad_weights(const Workspace& sizes, const Products& products, const DirectionBackward& d,
                           const typename Workspace::Shared& shared, S* masked, const Stretch& of, int64_t origin) {
    using V = Vec<acc_t<S>>;
    const Sequence& s = sizes.layer.sequence;
    const int64_t I = sizes.layer.input_size, H = sizes.layer.hidden_size, P = sizes.layer.output_size;
    const Share m = products.slice(sizes.gates());
    const auto gradients = [&](const auto* of_pass, int64_t ld) {
      return typename Products::Gradients{of_pass + (of.first - origin) * ld, ld, of};
    };
    const auto igates = gradients(shared.igates, sizes.ld_gates()), hgates = gradients(shared.hgates, sizes.ld_gates());
    const auto inputs =
        products.each_row([&](int64_t, int64_t t, int64_t slot) { return at<const S>(sizes.layer.input, s, t, slot); });
    const auto states = products.each_row([&](int64_t i, int64_t t, int64_t slot) -> const S* {
      const S* h = previous_state<S>(s, d.output, d.h0, P, t, slot, d.reverse);
      if (!shared.mask || !h) return h;
      S* row = masked + i * P;
      const auto* mask = shared.mask + slot * ld_draw(P);
      for (int64_t u = 0; u < P; u += V::kLanes) store(row + u, load(h + u, P - u) * V::load(mask + u), P - u);
      return row;
    });
    const auto of_pass = [=](const S* data, int64_t width) {
      return [=](int64_t first, int64_t count, const S** rows) {
        for (int64_t i = 0; i < count; ++i) rows[i] = data + (first - origin + i) * width;
      };
    };

    if (I > 0) products.weight(igates, m, I, inputs, shared.sums_ih, d.grad_w_ih);
    Share first = m, second = m;  // the gates of W_hh's first product, and of its second
    first.end = std::min(m.end, sizes.first_gates());
    second.begin = std::max(m.begin, sizes.first_gates());
    products.hidden_weight(hgates, first, states, shared.sums_hh, d.grad_w_hh);
    if (sizes.cell.two_products)
      products.weight(hgates, second, P, of_pass(shared.gated, P), shared.sums_hh, d.grad_w_hh);
    if (shared.outputs)
      products.weight(gradients(shared.outputs, sizes.ld_outputs()), products.slice(P), H, of_pass(shared.hidden, H),
                      shared.sums_hr, d.grad_w_hr);
    if (d.grad_b_ih && !sizes.layer.layer_norm)
      products.biases(igates, hgates, shared.sums_b, d.grad_b_ih, d.grad_b_hh);
  }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
