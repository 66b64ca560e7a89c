// Owns: what backward has left to do when its loop is through: the gradient of the input and the weight gradients, one
// product over all steps each.
// Must not know: which cell it is, but for its numbers; equations, tensors.
//
// Included once per instruction set, after backward_workspace.h. Compiled once for all cells.

namespace rnnfast::cpu::RNNFAST_ISA {

template <class S>
class ProductsOverSteps {
  using Workspace = BackwardWorkspace<S>;
  using Unit = typename Product<S>::Unit;
  using Operand = typename Product<S>::Operand;
  using Acc = acc_t<S>;
  using V = Vec<Acc>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int64_t kRowsAtOnce = Workspace::kRowsAtOnce;

 public:
  static void run(const Workspace& sizes, void* workspace) {
    Barrier everyone;
    run_team(sizes.team_size(), [&](int rank, int size) {
      FlushDenormals flush;
      typename Workspace::Shared shared[2];
      typename Workspace::Own own;
      sizes.carve(workspace, rank, shared, own);
      const ProductsOverSteps products(sizes, shared, own, rank, size);
      if (sizes.layer.grad_input.data) products.grad_input(everyone);
      for (int d = 0; d < sizes.layer.directions; ++d)
        if (sizes.layer.direction[d].grad_w_hh) products.grad_weights(sizes.layer.direction[d], shared[d]);
    });
  }

 private:
  ProductsOverSteps(const Workspace& sizes, const typename Workspace::Shared (&shared)[2],
                    const typename Workspace::Own& own, int rank, int size)
      : l_(sizes.layer),
        s_(sizes.layer.sequence),
        sizes_(sizes),
        shared_(shared),
        own_(own),
        rank_(rank),
        size_(size),
        gates_(sizes.gates()),
        ld_g_(sizes.ld_gates()) {}

  // The sum over directions of igates W_ih, a slice of rows a thread.
  void grad_input(Barrier& everyone) const {
    const UnitBlocks blocks = Workspace::column_blocks(l_.input_size, Divide::rows, 1);
    const auto weights = [&](int d) {
      return ColumnMatrix<S>(blocks, static_cast<const S*>(l_.direction[d].weights.w_ih), gates_, shared_[d].w_ih);
    };
    const Share pack(blocks.count(), rank_, size_);
    for (int d = 0; d < l_.directions; ++d)
      for (int64_t b = pack.begin; b < pack.end; ++b) weights(d).prepare(b);
    everyone.wait(size_);
    const Share rows(s_.rows, rank_, size_);
    for_chunks(rows.begin, rows.end, kRowsAtOnce, [&](int64_t first, int64_t count) {
      for (int64_t b = 0; b < blocks.count(); ++b) {
        const int64_t columns = blocks.vectors(b) * kLanes;
        for (int d = 0; d < l_.directions; ++d) {
          const Unit* operands[kRowsAtOnce];
          for (int64_t i = 0; i < count; ++i)
            operands[i] = reinterpret_cast<const Unit*>(shared_[d].igates + (first + i) * ld_g_);
          weights(d).multiply(b, operands, count, d ? own_.grad_input : nullptr, own_.grad_input, columns);
        }
        for_rows(s_, first, count, [&](int64_t i, int64_t t, int64_t slot) {
          S* to = at<S>(l_.grad_input, s_, t, slot) + blocks.first(b);
          for (int64_t u = 0; u < blocks.size(b); u += kLanes)
            store(to + u, V::load(own_.grad_input + i * columns + u), blocks.size(b) - u);
        });
      }
    });
  }

  // The thread's rows of a weight gradient that has m of them.
  Share slice(int64_t m) const {
    Share share(divide_up(m, kLanes), rank_, size_);
    share.begin *= kLanes;
    share.end = std::min(m, share.end * kLanes);
    return share;
  }

  void grad_weights(const DirectionBackward& d, const typename Workspace::Shared& shared) const {
    const int64_t I = l_.input_size, H = l_.hidden_size, P = l_.output_size;
    const Share m = slice(gates_);
    // The rows [begin, end) of grad = gates^T source, source [N, n].
    const auto product = [&](const Operand* gates, int64_t ld, int64_t begin, int64_t end, int64_t n,
                             const auto& source, Acc* sums, void* grad) {
      WeightGradient<S>::run(gates, ld, begin, end, n, s_.rows, source, own_.panels, sums, static_cast<S*>(grad));
    };
    const auto inputs = [&](int64_t first, int64_t count, const S** rows) {
      for_rows(s_, first, count,
               [&](int64_t i, int64_t t, int64_t slot) { rows[i] = at<const S>(l_.input, s_, t, slot); });
    };
    const auto states = [&](int64_t first, int64_t count, const S** rows) {
      for_rows(s_, first, count, [&](int64_t i, int64_t t, int64_t slot) {
        rows[i] = previous_state<S>(s_, d.output, d.h0, P, t, slot, d.reverse);
        if (!shared.mask || !rows[i]) return;
        S* masked = own_.masked + i * P;
        const Acc* mask = shared.mask + slot * ld_draw(P);
        for (int64_t u = 0; u < P; u += kLanes) store(masked + u, load(rows[i] + u, P - u) * V::load(mask + u), P - u);
        rows[i] = masked;
      });
    };
    const auto compact = [](const S* data, int64_t width) {
      return [=](int64_t first, int64_t count, const S** rows) {
        for (int64_t i = 0; i < count; ++i) rows[i] = data + (first + i) * width;
      };
    };

    if (I > 0) product(shared.igates, ld_g_, m.begin, m.end, I, inputs, shared.sums_ih, d.grad_w_ih);
    if (sizes_.cell.diagonal) {
      const Share vectors(divide_up(H, kLanes), rank_, size_);
      DiagonalGradient<S>::run(shared.hgates, ld_g_, vectors.begin, vectors.end, sizes_.cell.gates, H, s_.rows, states,
                               shared.sums_hh, static_cast<S*>(d.grad_w_hh));
    } else {
      const int64_t end = std::min(m.end, sizes_.first_gates());
      product(shared.hgates, ld_g_, m.begin, end, P, states, shared.sums_hh, d.grad_w_hh);
    }
    if (sizes_.cell.two_products) {
      const int64_t begin = std::max(m.begin, sizes_.first_gates());
      product(shared.hgates, ld_g_, begin, m.end, P, compact(shared.gated, P), shared.sums_hh, d.grad_w_hh);
    }
    if (shared.outputs) {
      const Share p = slice(P);
      product(shared.outputs, sizes_.ld_outputs(), p.begin, p.end, H, compact(shared.hidden, H), shared.sums_hr,
              d.grad_w_hr);
    }
    if (d.grad_b_ih && !l_.layer_norm) grad_biases(d, shared, m);
  }

  void grad_biases(const DirectionBackward& d, const typename Workspace::Shared& shared, const Share& m) const {
    S *of_igates = static_cast<S*>(d.grad_b_ih), *of_hgates = static_cast<S*>(d.grad_b_hh);
    WeightGradient<S>::column_sums(shared.igates, ld_g_, m.begin, m.end, s_.rows, of_igates);
    if (sizes_.cell.split_gates) {
      WeightGradient<S>::column_sums(shared.hgates, ld_g_, m.begin, m.end, s_.rows, of_hgates);
    } else if (m.begin < m.end) {
      memcpy(of_hgates + m.begin, of_igates + m.begin, (m.end - m.begin) * sizeof(S));
    }
  }

  const LayerBackward& l_;
  const Sequence& s_;
  const Workspace& sizes_;
  const typename Workspace::Shared (&shared_)[2];
  const typename Workspace::Own& own_;
  const int rank_, size_;
  const int64_t gates_, ld_g_;
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
