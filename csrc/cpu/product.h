// Owns: the matrix products of the engine: register tiles, packed weight panels, weight gradients.
// Must not know: cells, time, threads.
//
// Included once per instruction set, after simd.h. Every sum over k has one order, whatever the tile: kSumUnits of k
// after each other in one accumulator, and these parts added up, the bias or whatever is added to first. So a row's
// result does not depend on the other rows, nor on how a sequence is cut, and a long sum loses no more than a short
// one.

namespace rnnfast::cpu::RNNFAST_ISA {

// The widest tiles that fit the register file: kMaxRows[nv] rows by nv vectors of columns.
#if defined(RNNFAST_HAS_AVX512)
constexpr int kMaxRows[5] = {0, 8, 8, 8, 6};
#else
constexpr int kMaxRows[5] = {0, 8, 6, 4, 3};
#endif
constexpr int kMaxVectors = 4;
constexpr int kTileRows = 8;

constexpr int64_t kSumUnits = 256;

// out[r][:] = init[r][:] + sum over k of a(r, k) * w[k][:], for MR rows and NV vectors of columns.
template <class S, int MR, int NV, class A>
inline __attribute__((always_inline)) void tile(A a, const typename Product<S>::Unit* w, int64_t ldw, int64_t units,
                                                const acc_t<S>* init, int64_t ld_init, acc_t<S>* out, int64_t ld_out) {
  using P = Product<S>;
  using V = Vec<acc_t<S>>;
  using U = Vec<typename P::Unit>;
  constexpr int kLanes = V::kLanes;
  for (int64_t begin = 0;;) {
    const int64_t end = begin + kSumUnits < units ? begin + kSumUnits : units;
    V sum[MR][NV];
    for (int r = 0; r < MR; ++r)
      for (int v = 0; v < NV; ++v) sum[r][v] = V(acc_t<S>(0));
    for (int64_t k = begin; k < end; ++k) {
      U row[NV];
      for (int v = 0; v < NV; ++v) row[v] = U::load(w + k * ldw + v * kLanes);
      for (int r = 0; r < MR; ++r) {
        const typename P::Unit x = a(r, k);
        for (int v = 0; v < NV; ++v) sum[r][v] = P::multiply_add(sum[r][v], x, row[v]);
      }
    }
    for (int r = 0; r < MR; ++r)
      for (int v = 0; v < NV; ++v) {
        if (init) sum[r][v] = V::load(init + r * ld_init + v * kLanes) + sum[r][v];
        sum[r][v].store(out + r * ld_out + v * kLanes);
      }
    if (end == units) return;
    begin = end;
    init = out;
    ld_init = ld_out;
  }
}

// Unit k of a row of storage, whose elements are another type than units, and aligned as such.
template <class Unit>
inline Unit load_unit(const Unit* row, int64_t k) {
  Unit unit;
  memcpy(&unit, row + k, sizeof unit);
  return unit;
}

// Rows of the left operand anywhere in memory, one pointer each.
template <class S, int MR, int NV>
void row_tile(const typename Product<S>::Unit* const* rows, const typename Product<S>::Unit* w, int64_t ldw,
              int64_t units, const acc_t<S>* init, int64_t ld_init, acc_t<S>* out, int64_t ld_out) {
  const typename Product<S>::Unit* a[MR];
  for (int r = 0; r < MR; ++r) a[r] = rows[r];
  tile<S, MR, NV>([&](int r, int64_t k) { return load_unit(a[r], k); }, w, ldw, units, init, ld_init, out, ld_out);
}

// The left operand packed [units][MR]; adds to out if accumulate is set.
template <class S, int MR, int NV>
void outer_tile(const typename Product<S>::Unit* a, const typename Product<S>::Unit* w, int64_t ldw, int64_t units,
                bool accumulate, acc_t<S>* out, int64_t ld_out) {
  tile<S, MR, NV>([&](int r, int64_t k) { return a[k * MR + r]; }, w, ldw, units, accumulate ? out : nullptr, ld_out,
                  out, ld_out);
}

template <class S>
using RowTile = void (*)(const typename Product<S>::Unit* const*, const typename Product<S>::Unit*, int64_t, int64_t,
                         const acc_t<S>*, int64_t, acc_t<S>*, int64_t);
template <class S>
using OuterTile = void (*)(const typename Product<S>::Unit*, const typename Product<S>::Unit*, int64_t, int64_t, bool,
                           acc_t<S>*, int64_t);

template <class S, int NV, int... MR>
RowTile<S> pick_row_tile(int rows, std::integer_sequence<int, MR...>) {
  static constexpr RowTile<S> table[] = {row_tile<S, MR + 1, NV>...};
  return table[rows - 1];
}
template <class S, int NV, int... MR>
OuterTile<S> pick_outer_tile(int rows, std::integer_sequence<int, MR...>) {
  static constexpr OuterTile<S> table[] = {outer_tile<S, MR + 1, NV>...};
  return table[rows - 1];
}
// Tiles see operands and sums only: storage types that differ in neither share them.
template <class S>
using TileType = std::conditional_t<std::is_same_v<typename Product<S>::Operand, acc_t<S>>, acc_t<S>, S>;

template <int NV>
using RowCounts = std::make_integer_sequence<int, kMaxRows[NV]>;

template <class S>
RowTile<TileType<S>> pick_row_tile(int rows, int vectors) {
  switch (vectors) {
    case 1:
      return pick_row_tile<TileType<S>, 1>(rows, RowCounts<1>{});
    case 2:
      return pick_row_tile<TileType<S>, 2>(rows, RowCounts<2>{});
    case 3:
      return pick_row_tile<TileType<S>, 3>(rows, RowCounts<3>{});
    default:
      return pick_row_tile<TileType<S>, 4>(rows, RowCounts<4>{});
  }
}
template <class S>
OuterTile<TileType<S>> pick_outer_tile(int rows, int vectors) {
  switch (vectors) {
    case 1:
      return pick_outer_tile<TileType<S>, 1>(rows, RowCounts<1>{});
    case 2:
      return pick_outer_tile<TileType<S>, 2>(rows, RowCounts<2>{});
    case 3:
      return pick_outer_tile<TileType<S>, 3>(rows, RowCounts<3>{});
    default:
      return pick_outer_tile<TileType<S>, 4>(rows, RowCounts<4>{});
  }
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// [begin, end) cut into pieces of nearly equal size, none above `most`.
template <class F>
inline void for_chunks(int64_t begin, int64_t end, int64_t most, const F& f) {
  for (int64_t pieces = divide_up(end - begin, most); pieces > 0; --pieces) {
    const int64_t n = divide_up(end - begin, pieces);
    f(begin, n);
    begin += n;
  }
}

// The units a storage row of k elements takes, and whether it can be read in place.
template <class S>
constexpr int64_t units_of(int64_t k) {
  return divide_up(k, Product<S>::kPair);
}
template <class S>
constexpr bool reads_in_place(int64_t k) {
  return std::is_same_v<S, typename Product<S>::Operand> && k % Product<S>::kPair == 0;
}

// Copies a row of k elements into operands, padded with zeros to whole units.
template <class S>
inline void copy_row(const S* from, int64_t k, typename Product<S>::Unit* to) {
  using Operand = typename Product<S>::Operand;
  Operand* out = reinterpret_cast<Operand*>(to);
  if constexpr (std::is_same_v<S, Operand>) {
    memcpy(out, from, k * sizeof(S));
  } else {
    constexpr int kLanes = Vec<acc_t<S>>::kLanes;
    for (int64_t i = 0; i < k; i += kLanes) store(out + i, load(from + i, k - i), k - i);
  }
  for (int64_t i = k; i < units_of<S>(k) * Product<S>::kPair; ++i) memset(out + i, 0, sizeof(Operand));
}

// The hidden units of a layer cut into blocks; a block's columns are its gates side by side, padded to whole vectors.
struct UnitBlocks {
  int64_t units = 0;  // H
  int64_t block = 0;  // units a block, the last one may have fewer
  int gates = 1;
  int lanes = 1;

  int64_t count() const { return divide_up(units, block); }
  int64_t first(int64_t b) const { return b * block; }
  int64_t size(int64_t b) const { return units - first(b) < block ? units - first(b) : block; }
  int64_t vectors(int64_t b) const { return divide_up(gates * size(b), lanes); }
  // Every block but the last has the same width.
  int64_t column(int64_t b) const { return b * divide_up(gates * block, lanes) * lanes; }
  int64_t columns() const { return count() == 0 ? 0 : column(count() - 1) + vectors(count() - 1) * lanes; }
};

// A weight matrix [G*H, K], row-major, as the right operand of rows times W^T. The product wants lanes along the
// columns (the rows of W), so W is transposed, sixteen (kLanes) rows at a time: into panels [units][vectors][lanes] of
// up to four vectors that are read at every step, or, where a few rows are all there is, in registers on the way.
template <class S>
class GateMatrix {
 public:
  using Unit = typename Product<S>::Unit;
  using Acc = acc_t<S>;
  static constexpr int kLanes = Vec<Acc>::kLanes;
  static constexpr int kFewRows = 4;

  // Whether `rows`, over all steps, are too few to pay for packing.
  static bool in_place(int64_t rows, int64_t k) { return rows <= kFewRows && reads_in_place<S>(k); }

  // packed: storage for packed_units(), or null for in place.
  GateMatrix(const UnitBlocks& blocks, const S* weights, const S* bias, int64_t k, Unit* packed, Acc* bias_columns)
      : blocks_(blocks),
        weights_(weights),
        bias_(bias),
        k_(k),
        units_(units_of<S>(k)),
        packed_(packed),
        bias_columns_(bias_columns) {}

  static int64_t packed_units(const UnitBlocks& blocks, int64_t k) { return blocks.columns() * units_of<S>(k); }

  // Prepares block b; every block must be prepared before multiply reads it.
  void prepare(int64_t b) const {
    const int64_t size = blocks_.size(b), columns = blocks_.gates * size, vectors = blocks_.vectors(b);
    Acc* bias = bias_columns_ + blocks_.column(b);
    for (int64_t g = 0, column = 0; g < blocks_.gates; ++g)
      for (int64_t u = 0; u < size; ++u, ++column)
        bias[column] = bias_ ? to_acc(bias_[g * blocks_.units + blocks_.first(b) + u]) : Acc(0);
    for (int64_t column = columns; column < vectors * kLanes; ++column) bias[column] = Acc(0);
    if (!packed_) return;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t panel = v / kMaxVectors * kMaxVectors;
      const int64_t width = std::min<int64_t>(kMaxVectors, vectors - panel) * kLanes;
      Unit* to = packed_ + (blocks_.column(b) + panel * kLanes) * units_ + (v - panel) * kLanes;
      const S* rows[kLanes];
      find_rows(b, v, rows);
      for (int64_t u = 0; u < units_; u += kLanes) {
        Vec<Unit> block[kLanes];
        load_transposed(rows, u, block);
        const int n = int(std::min<int64_t>(kLanes, units_ - u));
        for (int i = 0; i < n; ++i) block[i].store(to + (u + i) * width);
      }
    }
  }

  // out[r][column - column(b)] = bias + rows[r] . W^T for the columns of block b.
  void multiply(int64_t b, const Unit* const* rows, int64_t count, Acc* out, int64_t ld_out) const {
    if (!packed_) return multiply_in_place(b, rows, count, out, ld_out);
    const int64_t vectors = blocks_.vectors(b), column = blocks_.column(b);
    // One panel at a time: it stays in the cache while the rows pass.
    for (int64_t v = 0; v < vectors; v += kMaxVectors) {
      const int nv = int(std::min<int64_t>(kMaxVectors, vectors - v));
      const Unit* panel = packed_ + (column + v * kLanes) * units_;
      const Acc* bias = bias_columns_ + column + v * kLanes;
      for_chunks(0, count, kMaxRows[nv], [&](int64_t r, int64_t n) {
        pick_row_tile<S>(int(n), nv)(rows + r, panel, nv * kLanes, units_, bias, 0, out + r * ld_out + v * kLanes,
                                     ld_out);
      });
    }
  }

  // The most rows that one pass over a block's panels takes.
  int row_chunk(int64_t b) const {
    return packed_ ? kMaxRows[std::min<int64_t>(kMaxVectors, blocks_.vectors(b))] : kFewRows;
  }

 private:
  // The rows of W that are the columns of vector v of block b. Columns that only pad repeat the last row: their results
  // are never read.
  void find_rows(int64_t b, int64_t v, const S* (&rows)[kLanes]) const {
    const int64_t size = blocks_.size(b), last = blocks_.gates * size - 1;
    int64_t gate = v * kLanes / size, unit = v * kLanes % size;
    for (int i = 0; i < kLanes; ++i) {
      rows[i] = weights_ + (gate * blocks_.units + blocks_.first(b) + unit) * k_;
      if (v * kLanes + i >= last) continue;
      if (++unit == size) unit = 0, ++gate;
    }
  }

  // Units [u, u + kLanes) of sixteen rows, as columns; units past the end are zero.
  void load_transposed(const S* const (&rows)[kLanes], int64_t u, Vec<Unit> (&block)[kLanes]) const {
    constexpr int kPair = Product<S>::kPair;
    if (u + kLanes <= units_ && reads_in_place<S>(k_)) {
      for (int i = 0; i < kLanes; ++i) block[i] = Vec<Unit>::load(reinterpret_cast<const Unit*>(rows[i]) + u);
    } else {
      for (int i = 0; i < kLanes; ++i) {
        Unit part[kLanes] = {};
        copy_row<S>(rows[i] + u * kPair, std::min<int64_t>(kLanes * kPair, k_ - u * kPair), part);
        block[i] = Vec<Unit>::load(part);
      }
    }
    transpose(block);
  }

  void multiply_in_place(int64_t b, const Unit* const* rows, int64_t count, Acc* out, int64_t ld_out) const {
    switch (count) {
      case 1:
        return multiply_in_place<1>(b, rows, out, ld_out);
      case 2:
        return multiply_in_place<2>(b, rows, out, ld_out);
      case 3:
        return multiply_in_place<3>(b, rows, out, ld_out);
      case 4:
        return multiply_in_place<4>(b, rows, out, ld_out);
    }
  }
  template <int MR>
  void multiply_in_place(int64_t b, const Unit* const* a, Acc* out, int64_t ld_out) const {
    for (int64_t v = 0; v < blocks_.vectors(b); ++v) {
      const S* rows[kLanes];
      find_rows(b, v, rows);
      Vec<Acc> total[MR], sum[MR];
      for (int r = 0; r < MR; ++r) {
        total[r] = Vec<Acc>::load(bias_columns_ + blocks_.column(b) + v * kLanes);
        sum[r] = Vec<Acc>(Acc(0));
      }
      static_assert(kSumUnits % kLanes == 0, "a part of the sum is whole blocks");
      for (int64_t u = 0; u < units_; u += kLanes) {
        Vec<Unit> block[kLanes];
        load_transposed(rows, u, block);
        const int n = int(std::min<int64_t>(kLanes, units_ - u));
        if (n == kLanes) {
          for (int i = 0; i < kLanes; ++i)
            for (int r = 0; r < MR; ++r) sum[r] = Product<S>::multiply_add(sum[r], load_unit(a[r], u + i), block[i]);
        } else {
          for (int i = 0; i < n; ++i)
            for (int r = 0; r < MR; ++r) sum[r] = Product<S>::multiply_add(sum[r], load_unit(a[r], u + i), block[i]);
        }
        if ((u + kLanes) % kSumUnits != 0 && u + kLanes < units_) continue;
        for (int r = 0; r < MR; ++r) {
          total[r] = total[r] + sum[r];
          sum[r] = Vec<Acc>(Acc(0));
        }
      }
      for (int r = 0; r < MR; ++r) total[r].store(out + r * ld_out + v * kLanes);
    }
  }

  UnitBlocks blocks_;
  const S* weights_;
  const S* bias_;
  int64_t k_, units_;
  Unit* packed_;
  Acc* bias_columns_;
};

// A matrix [K, N], row-major, as the right operand of rows times W: backward's products. Columns are cut into blocks;
// a panel is [units][vectors][lanes]. Packing only copies, so in place means a larger row stride and nothing else.
template <class S>
class ColumnMatrix {
 public:
  using Unit = typename Product<S>::Unit;
  using Acc = acc_t<S>;
  static constexpr int kLanes = Vec<Acc>::kLanes;

  static bool in_place(int64_t rows, int64_t k, int64_t n) {
    return Product<S>::kPair == 1 && reads_in_place<S>(k) && n % kLanes == 0 && rows <= 32;
  }

  ColumnMatrix(const UnitBlocks& blocks, const S* weights, int64_t k, Unit* packed)
      : blocks_(blocks), weights_(weights), k_(k), units_(units_of<S>(k)), packed_(packed) {}

  static int64_t packed_units(const UnitBlocks& blocks, int64_t k) { return blocks.columns() * units_of<S>(k); }

  void prepare(int64_t b) const {
    if (!packed_) return;
    constexpr int kPair = Product<S>::kPair;
    using Operand = typename Product<S>::Operand;
    const int64_t vectors = blocks_.vectors(b);
    for (int64_t v = 0; v < vectors; v += kMaxVectors) {
      const int64_t width = std::min<int64_t>(kMaxVectors, vectors - v) * kLanes;
      const int64_t first = blocks_.first(b) + v * kLanes;
      const int64_t n = std::min(width, blocks_.first(b) + blocks_.size(b) - first);
      Unit* to = packed_ + (blocks_.column(b) + v * kLanes) * units_;
      for (int64_t u = 0; u < units_; ++u, to += width) {
        if constexpr (kPair == 1) {
          copy_row<S>(weights_ + u * blocks_.units + first, n, to);
          for (int64_t i = n; i < width; ++i) to[i] = Unit(0);
        } else {
          Operand* pairs = reinterpret_cast<Operand*>(to);
          for (int64_t i = 0; i < width; ++i)
            for (int p = 0; p < kPair; ++p) {
              const int64_t k = u * kPair + p;
              pairs[i * kPair + p] = i < n && k < k_ ? weights_[k * blocks_.units + first + i] : Operand{};
            }
        }
      }
    }
  }

  // out[r][column - column(b)] = init + rows[r] . W for the columns of block b; init may be null or out itself.
  void multiply(int64_t b, const Unit* const* rows, int64_t count, const Acc* init, Acc* out, int64_t ld_out) const {
    const int64_t vectors = blocks_.vectors(b);
    for (int64_t v = 0; v < vectors; v += kMaxVectors) {
      const int nv = int(std::min<int64_t>(kMaxVectors, vectors - v));
      const Unit* panel = packed_ ? packed_ + (blocks_.column(b) + v * kLanes) * units_
                                  : reinterpret_cast<const Unit*>(weights_) + blocks_.first(b) + v * kLanes;
      const int64_t ldw = packed_ ? nv * kLanes : blocks_.units;
      for_chunks(0, count, kMaxRows[nv], [&](int64_t r, int64_t n) {
        pick_row_tile<S>(int(n), nv)(rows + r, panel, ldw, units_, init ? init + r * ld_out + v * kLanes : nullptr,
                                     ld_out, out + r * ld_out + v * kLanes, ld_out);
      });
    }
  }

 private:
  UnitBlocks blocks_;
  const S* weights_;
  int64_t k_, units_;
  Unit* packed_;
};

// The rows that one go adds to a sum over all rows.
struct Stretch {
  int64_t first = 0, rows = 0;
  bool begins = true, ends = true;  // the sum
};

// C [M, N] = sum over rows of A[row]^T B[row], the gradient of a weight matrix: A [rows, M] are the gate gradients of
// a stretch (operands, contiguous, leading dimension lda), B [rows, N] are storage rows anywhere in memory, null for
// zero. One slice of M at a time, so that threads share nothing and the sum has one order.
template <class S>
class WeightGradient {
 public:
  using Unit = typename Product<S>::Unit;
  using Operand = typename Product<S>::Operand;
  using Acc = acc_t<S>;
  static constexpr int kLanes = Vec<Acc>::kLanes;
  static constexpr int kDepth = 256;  // rows a pass, of which the packed B stays in the second-level cache

  static int64_t panel_units(int64_t n) { return kDepth * round_up(n, kLanes) + kDepth * kTileRows; }
  static int64_t sum_elements(int64_t m, int64_t n) { return m * round_up(n, kLanes); }
  static bool sums_in_place(int64_t n) { return std::is_same_v<S, Acc> && n % kLanes == 0; }

  // source(first, count, S** pointers) names the rows of B. panels: panel_units(n); sums: [M, round_up(n)], or null
  // when sums_in_place.
  template <class RowSource>
  static void run(const Operand* a, int64_t lda, int64_t m_begin, int64_t m_end, int64_t n, const Stretch& of,
                  const RowSource& source, Unit* panels, Acc* sums, S* out) {
    if (m_begin >= m_end) return;
    const int64_t vectors = divide_up(n, kLanes), ldc = sums ? vectors * kLanes : n;
    Acc* c = sums;
    if constexpr (std::is_same_v<S, Acc>) {
      if (!sums) c = out;
    }
    Unit* packed_a = panels + kDepth * vectors * kLanes;
    for (int64_t first = 0; first < of.rows; first += kDepth) {
      const int64_t depth = std::min<int64_t>(kDepth, of.rows - first);
      const int64_t units = units_of<S>(depth);
      const bool accumulate = !of.begins || first > 0;
      const S* b[kDepth];
      source(of.first + first, depth, b);
      for (int64_t v = 0; v < vectors; v += kMaxVectors)
        pack_b(b, depth, n, v * kLanes, std::min<int64_t>(kMaxVectors, vectors - v) * kLanes,
               panels + v * kLanes * units);
      for_chunks(m_begin, m_end, kMaxRows[std::min<int64_t>(kMaxVectors, vectors)], [&](int64_t m, int64_t mr) {
        pack_a(a + first * lda + m, lda, depth, int(mr), packed_a);
        for (int64_t v = 0; v < vectors; v += kMaxVectors) {
          const int nv = int(std::min<int64_t>(kMaxVectors, vectors - v));
          pick_outer_tile<S>(int(mr), nv)(packed_a, panels + v * kLanes * units, nv * kLanes, units, accumulate,
                                          c + m * ldc + v * kLanes, ldc);
        }
      });
    }
    if (sums && of.ends) {
      for (int64_t m = m_begin; m < m_end; ++m)
        for (int64_t i = 0; i < n; i += kLanes) store(out + m * n + i, Vec<Acc>::load(sums + m * ldc + i), n - i);
    }
  }

  // out[m] = sum over rows of A[row][m], for m in [m_begin, m_end). sums: [M].
  static void column_sums(const Operand* a, int64_t lda, int64_t m_begin, int64_t m_end, const Stretch& of, Acc* sums,
                          S* out) {
    // Several neighbouring vectors at once, so that each row is read as a stretch of memory.
    constexpr int kVectors = 8, kSumRows = 32;
    for (int64_t first = m_begin; first < m_end; first += kVectors * kLanes) {
      const int64_t n = std::min<int64_t>(kVectors * kLanes, m_end - first);
      Vec<Acc> sum[kVectors];
      for (auto& s : sum) s = Vec<Acc>(Acc(0));
      if (!of.begins)
        for (int v = 0; v * kLanes < n; ++v) sum[v] = Vec<Acc>::load(sums + first + v * kLanes);
      // Sums of a few rows first: the rounding error of one long sum would show in a float32 bias gradient.
      for (int64_t row = 0; row < of.rows; row += kSumRows) {
        Vec<Acc> part[kVectors];
        for (auto& p : part) p = Vec<Acc>(Acc(0));
        for (int64_t r = row; r < std::min(of.rows, row + kSumRows); ++r) {
          const Operand* from = a + r * lda + first;
          if (n == kVectors * kLanes) {
            for (int v = 0; v < kVectors; ++v) part[v] = part[v] + load(from + v * kLanes);
          } else {
            for (int v = 0; v * kLanes < n; ++v) part[v] = part[v] + load(from + v * kLanes, n - v * kLanes);
          }
        }
        for (int v = 0; v < kVectors; ++v) sum[v] = sum[v] + part[v];
      }
      for (int v = 0; v * kLanes < n; ++v) {
        if (of.ends) {
          store(out + first + v * kLanes, sum[v], n - v * kLanes);
        } else {
          sum[v].store(sums + first + v * kLanes);
        }
      }
    }
  }

 private:
  static void pack_b(const S* const* b, int64_t depth, int64_t n, int64_t column, int64_t width, Unit* to) {
    constexpr int kPair = Product<S>::kPair;
    const int64_t valid = std::min(width, n - column);
    for (int64_t u = 0; u < units_of<S>(depth); ++u, to += width) {
      if constexpr (kPair == 1) {
        if (!b[u]) {
          memset(to, 0, width * sizeof(Unit));
          continue;
        }
        copy_row<S>(b[u] + column, valid, to);
        for (int64_t i = valid; i < width; ++i) to[i] = Unit(0);
      } else {
        const S* low = b[2 * u];
        const S* high = 2 * u + 1 < depth ? b[2 * u + 1] : nullptr;
        for (int64_t i = 0; i < width; ++i) {
          const uint32_t l = low && i < valid ? low[column + i].bits : 0;
          const uint32_t h = high && i < valid ? high[column + i].bits : 0;
          to[i] = Unit(l | h << 16);
        }
      }
    }
  }

  static void pack_a(const Operand* a, int64_t lda, int64_t depth, int mr, Unit* to) {
    constexpr int kPair = Product<S>::kPair;
    for (int64_t u = 0; u < units_of<S>(depth); ++u, to += mr) {
      if constexpr (kPair == 1) {
        // Whole vectors: what a store writes past its row, the next row's store overwrites.
        for (int r = 0; r < mr; r += kLanes) Vec<Unit>::load(a + u * lda + r).store(to + r);
      } else {
        for (int r = 0; r < mr; ++r) {
          const uint32_t l = a[2 * u * lda + r].bits;
          const uint32_t h = 2 * u + 1 < depth ? a[(2 * u + 1) * lda + r].bits : 0;
          to[r] = Unit(l | h << 16);
        }
      }
    }
  }
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
