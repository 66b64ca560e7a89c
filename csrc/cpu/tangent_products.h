// Owns: what backward along a tangent has left to do when its loop is through: the tangents of the gradients of the
// input and of the weights, over all steps.
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
  using V = Vec<S>;
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
      const TangentProducts products(sizes, shared, own, rank, size);
      if (sizes.layer.t_grad_input.data) products.grad_input(everyone);
      for (int d = 0; d < sizes.layer.directions; ++d)
        if (sizes.layer.direction[d].t_grad_w_hh) products.grad_weights(sizes.layer.direction[d], shared[d]);
    });
  }

 private:
  TangentProducts(const Workspace& sizes, const typename Workspace::Shared (&shared)[2],
                  const typename Workspace::Own& own, int rank, int size)
      : l_(sizes.layer),
        s_(sizes.layer.sequence),
        sizes_(sizes),
        shared_(shared),
        own_(own),
        rank_(rank),
        size_(size),
        gates_(sizes.gates()),
        ld_(sizes.ld_gates()) {}

  // The sum over directions of igates' W_ih + igates W_ih', a slice of rows a thread.
  void grad_input(Barrier& everyone) const {
    const UnitBlocks blocks = Workspace::column_blocks(l_.input_size, Divide::rows);
    // f(W_ih, the first row of gate gradients that it meets) for each term of the sum.
    const auto for_terms = [&](const auto& f) {
      for (int d = 0; d < l_.directions; ++d) {
        const DualPointer& w_ih = l_.direction[d].w_ih;
        const S *value = static_cast<const S*>(w_ih.value), *tangent = static_cast<const S*>(w_ih.tangent);
        f(ColumnMatrix<S>(blocks, value, gates_, shared_[d].columns_ih), shared_[d].grad_igates + ld_);
        if (tangent) f(ColumnMatrix<S>(blocks, tangent, gates_, shared_[d].t_columns_ih), shared_[d].grad_igates);
      }
    };
    const Share pack(blocks.count(), rank_, size_);
    for_terms([&](const ColumnMatrix<S>& weights, const S*) {
      for (int64_t b = pack.begin; b < pack.end; ++b) weights.prepare(b);
    });
    everyone.wait(size_);
    const Share rows(s_.rows, rank_, size_);
    for_chunks(rows.begin, rows.end, kRowsAtOnce, [&](int64_t first, int64_t count) {
      for (int64_t b = 0; b < blocks.count(); ++b) {
        const int64_t columns = blocks.vectors(b) * kLanes;
        const S* sum = nullptr;
        for_terms([&](const ColumnMatrix<S>& weights, const S* gates) {
          const S* operands[kRowsAtOnce];
          for (int64_t i = 0; i < count; ++i) operands[i] = gates + (first + i) * 2 * ld_;
          weights.multiply(b, operands, count, sum, own_.grad_input, columns);
          sum = own_.grad_input;
        });
        for_rows(s_, first, count, [&](int64_t i, int64_t t, int64_t slot) {
          S* to = at<S>(l_.t_grad_input, s_, t, slot) + blocks.first(b);
          for (int64_t u = 0; u < blocks.size(b); u += kLanes)
            store(to + u, V::load(own_.grad_input + i * columns + u), blocks.size(b) - u);
        });
      }
    });
  }

  void grad_weights(const DirectionTangent& d, const typename Workspace::Shared& shared) const {
    const int64_t I = l_.input_size, H = l_.hidden_size;
    Share m(divide_up(gates_, kLanes), rank_, size_);
    m.begin *= kLanes;
    m.end = std::min(gates_, m.end * kLanes);
    const auto product = [&](int64_t n, S* sums, void* grad) {
      return [=, this](const S* gates, int64_t ld, int64_t rows, const auto& source) {
        WeightGradient<S>::run(gates, ld, m.begin, m.end, n, rows, source, own_.panels, sums, static_cast<S*>(grad));
      };
    };
    const auto inputs = [&](const Rows& rows) {
      return [&](int64_t t, int64_t slot) { return at<const S>(rows, s_, t, slot); };
    };
    const auto states = [&](const Rows& rows, const void* first) {
      return [&, first](int64_t t, int64_t slot) { return previous_state<S>(s_, rows, first, H, t, slot, d.reverse); };
    };
    const auto with_states = [&](const auto& run) {
      by_turns(shared.grad_hgates, states(d.output.value, d.h0.value), states(d.output.tangent, d.h0.tangent), run);
    };

    if (I > 0 && l_.input.tangent.data) {
      by_turns(shared.grad_igates, inputs(l_.input.value), inputs(l_.input.tangent),
               product(I, shared.sums_ih, d.t_grad_w_ih));
    } else if (I > 0) {
      const auto source = [&](int64_t first, int64_t count, const S** rows) {
        for_rows(s_, first, count,
                 [&](int64_t i, int64_t t, int64_t slot) { rows[i] = inputs(l_.input.value)(t, slot); });
      };
      product(I, shared.sums_ih, d.t_grad_w_ih)(shared.grad_igates + ld_, 2 * ld_, s_.rows, source);
    }
    if (sizes_.cell.diagonal) {
      const Share vectors(divide_up(H, kLanes), rank_, size_);
      with_states([&](const S* gates, int64_t ld, int64_t rows, const auto& source) {
        DiagonalGradient<S>::run(gates, ld, vectors.begin, vectors.end, sizes_.cell.gates, H, rows, source,
                                 shared.sums_hh, static_cast<S*>(d.t_grad_w_hh));
      });
    } else {
      with_states(product(H, shared.sums_hh, d.t_grad_w_hh));
    }
    if (d.t_grad_b_ih) grad_biases(d, shared, m);
  }

  // run(A, its leading dimension, rows, the rows of B) for the product A^T B that is the sum of gates'^T b + gates^T
  // b', of which value and tangent give a row of b and of b'.
  template <class Values, class Tangents, class Run>
  void by_turns(const S* gates, const Values& value, const Tangents& tangent, const Run& run) const {
    static_assert(WeightGradient<S>::kDepth % 2 == 0 && DiagonalGradient<S>::kDepth % 2 == 0, "whole pairs at a time");
    run(gates, ld_, 2 * s_.rows, [&](int64_t first, int64_t count, const S** rows) {
      for_rows(s_, first / 2, count / 2, [&](int64_t i, int64_t t, int64_t slot) {
        rows[2 * i] = tangent(t, slot);
        rows[2 * i + 1] = value(t, slot);
      });
    });
  }

  void grad_biases(const DirectionTangent& d, const typename Workspace::Shared& shared, const Share& m) const {
    S *of_igates = static_cast<S*>(d.t_grad_b_ih), *of_hgates = static_cast<S*>(d.t_grad_b_hh);
    const auto sums = [&](const S* gates, S* to) {
      WeightGradient<S>::column_sums(gates + ld_, 2 * ld_, m.begin, m.end, s_.rows, to);
    };
    sums(shared.grad_igates, of_igates);
    if (sizes_.cell.split_gates) {
      sums(shared.grad_hgates, of_hgates);
    } else if (m.begin < m.end) {
      memcpy(of_hgates + m.begin, of_igates + m.begin, (m.end - m.begin) * sizeof(S));
    }
  }

  const LayerTangent& l_;
  const Sequence& s_;
  const Workspace& sizes_;
  const typename Workspace::Shared (&shared_)[2];
  const typename Workspace::Own& own_;
  const int rank_, size_;
  const int64_t gates_, ld_;
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
