// Owns: what backward and backward along a tangent have in common: sizes of a layer, and the products over the steps
// that a loop leaves, the gradients of the input and of the weights.
// Must not know: which cell it is, but for its numbers; which of the products are wanted; equations, tensors.
//
// Included once per instruction set, after passes.h. Compiled once for all cells.

namespace rnnfast::cpu::RNNFAST_ISA {

constexpr int64_t kRowsAtOnce = 64;  // rows of a product over several steps

// The sizes, and how the parts of a workspace are carved that both have.
template <class S, class Layer>
class GradientSizes {
  using Unit = typename Product<S>::Unit;
  using Operand = typename Product<S>::Operand;
  using Acc = acc_t<S>;

 public:
  static constexpr int kLanes = Vec<Acc>::kLanes;

  // What a thread has for the products.
  struct Buffers {
    Unit* panels;     // of WeightGradient
    Acc* grad_input;  // [kRowsAtOnce, columns of one block]
  };

  const Layer& layer;
  const CellTraits cell;
  const int64_t output_size;  // P
  const int threads;          // the most there may be
  const Plan plan;            // of the loop

  GradientSizes(const Layer& layer, const CellTraits& cell, int64_t output_size, bool whole_rows, int threads)
      : layer(layer),
        cell(cell),
        output_size(output_size),
        threads(threads),
        plan(make_plan(cell.gates, layer.input_size, layer.hidden_size, hidden_inputs(), layer.directions,
                       layer.sequence, sizeof(S), whole_rows, threads)) {}

  // How many threads the products over the steps take: they can use some that the loop cannot.
  int team_size() const {
    const double row = row_cycles(cell.gates, layer.input_size, layer.hidden_size, hidden_inputs());
    return row * double(layer.sequence.rows) * layer.directions < 1e5 ? 1 : threads;
  }
  int64_t gates() const { return cell.gates * layer.hidden_size; }
  // A row of gate gradients, whole pairs. The weight gradients walk down columns: rows a multiple of a large power of
  // two apart would meet in one set of the cache, so such rows lie a cache line further apart.
  int64_t padded_gates() const {
    const int64_t width = round_up(gates(), Product<S>::kPair), line = 64 / sizeof(Operand);
    return width % (8 * line) != 0 ? width : width + line;
  }
  static int64_t ld_acc(int64_t n) { return round_up(n, kLanes); }

 protected:
  // The column panels of a weight [k, n]; null: it is used in place.
  Unit* carve_columns(Carver& carver, int64_t k, int64_t n) const {
    if (ColumnMatrix<S>::in_place(layer.sequence.rows, k, n)) return nullptr;
    // The narrowest blocks a team may choose pad no more than this.
    return carver.take<Unit>(round_up(n, kMaxVectors * kLanes) * units_of<S>(k));
  }
  // The sums of a weight gradient [m, n]; null: they are made in place.
  static Acc* carve_sums(Carver& carver, int64_t m, int64_t n) {
    return WeightGradient<S>::sums_in_place(n) ? nullptr : carver.take<Acc>(WeightGradient<S>::sum_elements(m, n));
  }
  int64_t bias_sums() const { return 2 * ld_acc(gates()); }
  // That of W_hh.
  Acc* carve_hidden_sums(Carver& carver) const {
    if (!cell.diagonal) return carve_sums(carver, gates(), output_size);
    return carver.take<Acc>(DiagonalGradient<S>::sum_elements(cell.gates, layer.hidden_size));
  }
  void carve_buffers(Carver& carver, Buffers& buffers) const {
    const int64_t widest = std::max({layer.input_size, layer.hidden_size, output_size});
    buffers.panels = carver.take<Unit>(WeightGradient<S>::panel_units(widest));
    buffers.grad_input = carver.take<Acc>(kRowsAtOnce * kMaxVectors * kLanes);
  }

 private:
  // States that a unit sees.
  int64_t hidden_inputs() const { return cell.diagonal ? 1 : output_size; }
};

// One thread's part of the products: gradients of the input, of a weight, of W_hh, of the biases.
template <class S, class Layer>
class ProductsOverSteps {
  using Sizes = GradientSizes<S, Layer>;
  using Unit = typename Product<S>::Unit;
  using Operand = typename Product<S>::Operand;
  using Acc = acc_t<S>;
  using V = Vec<Acc>;
  static constexpr int kLanes = V::kLanes;

 public:
  // Gradients of gates, or of projected outputs, of a stretch of rows.
  struct Gradients {
    const Operand* data;  // [rows, ld]
    int64_t ld;
    Stretch of;
  };
  struct InputTerm {
    const void* w_ih;      // [G*H, I]
    Unit* packed;          // its column panels; null: in place
    const Operand* gates;  // [rows, ld] gradients
  };

  // Two directions may add to a row at different times.
  struct GradInput {
    Rows rows;
    bool of_two = false;
    int64_t begin = 0, end = 0;  // the steps whose rows have the other direction's part
    Acc* partial = nullptr;      // [N, ld_acc(I)] where the first part lies; null: in the rows themselves
  };

  ProductsOverSteps(const Sizes& sizes, const typename Sizes::Buffers& own, int rank, int size)
      : sizes_(sizes), s_(sizes.layer.sequence), own_(own), rank_(rank), size_(size) {}

  // f(d, windows, rows, origin) for every window of a pass, direction by direction; windows: of each direction, origin:
  // the row with which the pass of direction d begins.
  template <class F>
  void each_window(const Passes& of, const Steps* passes, const F& f) const {
    const Layer& layer = sizes_.layer;
    Steps windows[2];
    for (int d = 0; d < layer.directions; ++d) windows[d].begin = passes[d].end;
    while (windows[0].begin > passes[0].begin) {
      for (int d = 0; d < layer.directions; ++d)
        windows[d] = of.window_before(windows[d].begin, layer.direction[d].reverse);
      for (int d = 0; d < layer.directions; ++d) {
        const bool reverse = layer.direction[d].reverse;
        f(d, windows, of.rows_of(windows[d], reverse), of.rows_of(passes[d], reverse).first);
      }
    }
  }
  // For direction d, while direction 0 makes its products of a pair of windows before direction 1.
  GradInput grad_input(const Rows& rows, Acc* partial, const Steps* windows, int d) const {
    GradInput to{rows};
    if (sizes_.layer.directions == 1) return to;
    to.of_two = true;
    to.begin = d == 0 ? 0 : windows[0].begin;
    to.end = d == 0 ? s_.steps - windows[1].end : s_.steps;
    to.partial = partial;
    return to;
  }

  // Packs what input() reads, a part a thread.
  void prepare_input(const InputTerm& term) const {
    const UnitBlocks blocks = input_blocks();
    const Share pack(blocks.count(), rank_, size_);
    for (int64_t b = pack.begin; b < pack.end; ++b) weights(blocks, term).prepare(b);
  }
  // The gradient of the input = the sum over the terms of gates W_ih, a slice of the rows a thread.
  void input(const InputTerm* terms, int count, int64_t ld, const Stretch& of, const GradInput& to) const {
    const UnitBlocks blocks = input_blocks();
    const int64_t ld_partial = Sizes::ld_acc(sizes_.layer.input_size);
    const Share slice(of.rows, rank_, size_);
    for_chunks(slice.begin, slice.end, kRowsAtOnce, [&](int64_t first, int64_t rows) {
      for (int64_t b = 0; b < blocks.count(); ++b) {
        const int64_t columns = blocks.vectors(b) * kLanes;
        const auto each_vector = [&](const auto& f) {
          for_rows(s_, of.first + first, rows, [&](int64_t r, int64_t t, int64_t slot) {
            S* row = at<S>(to.rows, s_, t, slot) + blocks.first(b);
            Acc* partial = to.partial ? to.partial + (of.first + first + r) * ld_partial + blocks.first(b) : nullptr;
            const bool second = t >= to.begin && t < to.end;
            for (int64_t u = 0; u < blocks.size(b); u += kLanes)
              f(own_.grad_input + r * columns + u, row + u, partial ? partial + u : nullptr, second,
                blocks.size(b) - u);
          });
        };
        if (to.of_two)
          each_vector([](Acc* sum, const S* row, const Acc* partial, bool second, int64_t n) {
            (!second ? V(Acc(0)) : partial ? V::load(partial) : load(row, n)).store(sum);
          });
        for (int i = 0; i < count; ++i) {
          const Unit* operands[kRowsAtOnce];
          for (int64_t r = 0; r < rows; ++r)
            operands[r] = reinterpret_cast<const Unit*>(terms[i].gates + (first + r) * ld);
          weights(blocks, terms[i])
              .multiply(b, operands, rows, i > 0 || to.of_two ? own_.grad_input : nullptr, own_.grad_input, columns);
        }
        each_vector([](const Acc* sum, S* row, Acc* partial, bool second, int64_t n) {
          if (partial && !second) {
            V::load(sum).store(partial);
          } else {
            store(row, V::load(sum), n);
          }
        });
      }
    });
  }

  // The thread's part of m rows of a weight gradient.
  Share slice(int64_t m) const {
    Share share(divide_up(m, kLanes), rank_, size_);
    share.begin *= kLanes;
    share.end = std::min(m, share.end * kLanes);
    return share;
  }
  // The rows m of grad = gradients^T source; source [rows, n], as WeightGradient takes it.
  template <class Source>
  void weight(const Gradients& of, const Share& m, int64_t n, const Source& source, Acc* sums, void* grad) const {
    WeightGradient<S>::run(of.data, of.ld, m.begin, m.end, n, of.of, source, own_.panels, sums, static_cast<S*>(grad));
  }
  // That of W_hh, source [rows, P]; of a diagonal the thread's units.
  template <class Source>
  void hidden_weight(const Gradients& of, const Share& m, const Source& source, Acc* sums, void* grad) const {
    if (!sizes_.cell.diagonal) return weight(of, m, sizes_.output_size, source, sums, grad);
    const int64_t H = sizes_.layer.hidden_size;
    const Share vectors(divide_up(H, kLanes), rank_, size_);
    DiagonalGradient<S>::run(of.data, of.ld, vectors.begin, vectors.end, sizes_.cell.gates, H, of.of, source, sums,
                             static_cast<S*>(grad));
  }
  // sums: bias_sums(), from stretch to stretch.
  void biases(const Gradients& igates, const Gradients& hgates, Acc* sums, void* grad_b_ih, void* grad_b_hh) const {
    const Share m = slice(sizes_.gates());
    const auto sum = [&](const Gradients& of, Acc* sums, void* grad) {
      WeightGradient<S>::column_sums(of.data, of.ld, m.begin, m.end, of.of, sums, static_cast<S*>(grad));
    };
    sum(igates, sums, grad_b_ih);
    if (sizes_.cell.split_gates) {
      sum(hgates, sums + Sizes::ld_acc(sizes_.gates()), grad_b_hh);
    } else if (igates.of.ends && m.begin < m.end) {
      memcpy(static_cast<S*>(grad_b_hh) + m.begin, static_cast<S*>(grad_b_ih) + m.begin, (m.end - m.begin) * sizeof(S));
    }
  }

  // A source of rows of steps: row(i, t, slot) for the i-th that is asked for.
  template <class F>
  auto each_row(const F& row) const {
    return [=, this](int64_t first, int64_t count, const S** rows) {
      for_rows(s_, first, count, [&](int64_t i, int64_t t, int64_t slot) { rows[i] = row(i, t, slot); });
    };
  }

 private:
  UnitBlocks input_blocks() const { return column_blocks<S>(sizes_.layer.input_size, Divide::rows, 1); }
  ColumnMatrix<S> weights(const UnitBlocks& blocks, const InputTerm& term) const {
    return ColumnMatrix<S>(blocks, static_cast<const S*>(term.w_ih), sizes_.gates(), term.packed);
  }

  const Sizes& sizes_;
  const Sequence& s_;
  const typename Sizes::Buffers& own_;
  const int rank_, size_;
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
