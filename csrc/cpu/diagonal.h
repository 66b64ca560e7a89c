// Owns: the products with a W_hh that is a diagonal for every gate, kept as a vector [G*H]: each has the interface of
// the class of product.h whose place it takes.
// Must not know: cells, time, threads.
//
// Included once per instruction set, after product.h. Nothing is packed: a weight meets one unit of a row. Only the
// weight gradient is a sum, over rows, in parts like those of the bias; its order is that of the rows.

namespace rnnfast::cpu::RNNFAST_ISA {

// hgates = w * h + b, as GateMatrix has h W^T + b.
template <class S>
class GateDiagonal {
 public:
  using Unit = typename Product<S>::Unit;
  using Operand = typename Product<S>::Operand;
  using Acc = acc_t<S>;
  using V = Vec<Acc>;

  GateDiagonal(const UnitBlocks& blocks, const S* weights, const S* bias, int64_t, Unit*, Acc*)
      : blocks_(blocks), weights_(weights), bias_(bias) {}

  void prepare(int64_t) const {}
  int row_chunk(int64_t) const { return kTileRows; }

  void multiply(int64_t b, const Unit* const* rows, int64_t count, Acc* out, int64_t ld_out) const {
    const int64_t first = blocks_.first(b), size = blocks_.size(b);
    for (int64_t g = 0; g < blocks_.gates; ++g)
      for (int64_t u = 0; u < size; u += V::kLanes) {
        const int64_t n = size - u, at = g * blocks_.units + first + u;
        const V weight = load(weights_ + at, n), bias = bias_ ? load(bias_ + at, n) : V(Acc(0));
        for (int64_t r = 0; r < count; ++r) {
          const V h = load(reinterpret_cast<const Operand*>(rows[r]) + first + u, n);
          store(out + r * ld_out + g * size + u, weight * h + bias, n);
        }
      }
  }

 private:
  UnitBlocks blocks_;
  const S* weights_;
  const S* bias_;
};

// grad_h = sum over gates of w * grad_hgates, as ColumnMatrix has grad_hgates W.
template <class S>
class ColumnDiagonal {
 public:
  using Unit = typename Product<S>::Unit;
  using Operand = typename Product<S>::Operand;
  using Acc = acc_t<S>;
  using V = Vec<Acc>;

  // k: elements of a row, G*H.
  ColumnDiagonal(const UnitBlocks& blocks, const S* weights, int64_t k, Unit*)
      : blocks_(blocks), weights_(weights), k_(k) {}

  void prepare(int64_t) const {}

  void multiply(int64_t b, const Unit* const* rows, int64_t count, const Acc* init, Acc* out, int64_t ld_out) const {
    const int64_t first = blocks_.first(b), size = blocks_.size(b);
    for (int64_t r = 0; r < count; ++r) {
      const Operand* gates = reinterpret_cast<const Operand*>(rows[r]) + first;
      for (int64_t u = 0; u < size; u += V::kLanes) {
        V sum = init ? V::load(init + r * ld_out + u) : V(Acc(0));
        for (int64_t g = 0; g < k_; g += blocks_.units)
          sum = load(weights_ + g + first + u, size - u) * load(gates + g + u, size - u) + sum;
        sum.store(out + r * ld_out + u);
      }
    }
  }

 private:
  UnitBlocks blocks_;
  const S* weights_;
  int64_t k_;
};

// grad_w [G*H] = sum over rows of A[row] * B[row], as WeightGradient has A^T B: A [rows, G*H] are gate gradients, B
// [rows, H] states, null for zero. A slice of the units at a time.
template <class S>
class DiagonalGradient {
 public:
  using Operand = typename Product<S>::Operand;
  using Acc = acc_t<S>;
  using V = Vec<Acc>;
  static constexpr int kDepth = WeightGradient<S>::kDepth;

  static int64_t sum_elements(int64_t gates, int64_t units) { return gates * round_up(units, V::kLanes); }

  // The vectors [begin, end) of the units of each gate.
  template <class RowSource>
  static void run(const Operand* a, int64_t lda, int64_t begin, int64_t end, int64_t gates, int64_t units,
                  const Stretch& of, const RowSource& source, Acc* sums, S* out) {
    constexpr int64_t kSumRows = 32;  // the rounding error of one long sum would show in float32
    const auto for_vectors = [&](const auto& f) {
      for (int64_t v = begin; v < end; ++v)
        for (int64_t g = 0; g < gates; ++g) f(v * V::kLanes, g, sums + g * round_up(units, V::kLanes) + v * V::kLanes);
    };
    if (of.begins) for_vectors([](int64_t, int64_t, Acc* sum) { V(Acc(0)).store(sum); });
    for (int64_t first = 0; first < of.rows; first += kDepth) {
      const int64_t depth = std::min<int64_t>(kDepth, of.rows - first);
      const S* b[kDepth];
      source(of.first + first, depth, b);
      for (int64_t row = 0; row < depth; row += kSumRows) {
        const int64_t last = std::min(depth, row + kSumRows);
        for_vectors([&](int64_t u, int64_t g, Acc* sum) {
          V part(Acc(0));
          for (int64_t r = row; r < last; ++r)
            if (b[r]) part = load(a + (first + r) * lda + g * units + u, units - u) * load(b[r] + u, units - u) + part;
          (V::load(sum) + part).store(sum);
        });
      }
    }
    if (of.ends)
      for_vectors([&](int64_t u, int64_t g, Acc* sum) { store(out + g * units + u, V::load(sum), units - u); });
  }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
