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
      products.each_window(sizes.passes, passes, [&](int d, const Steps* windows, const Stretch& of, int64_t origin) {
        const DirectionBackward& direction = layer.direction[d];
        if (layer.grad_input.data) {
          const typename Products::InputTerm term{direction.weights.w_ih, pieces.shared[d].w_ih,
                                                  pieces.shared[d].igates + (of.first - origin) * sizes.ld_gates()};
          if (of.begins) products.prepare_input(term);
          // The other direction's part of a row may be another thread's.
          if (of.begins || layer.directions == 2) everyone.wait(size);
          products.input(&term, 1, sizes.ld_gates(), of,
                         products.grad_input(layer.grad_input, pieces.shared[0].grad_input, windows, d));
        }
        if (direction.grad_w_hh)
          grad_weights(sizes, products, direction, pieces.shared[d], pieces.own.masked, of, origin);
      });
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
