// Owns: layer normalisation in the CPU engine: the statistics of a row, the gradients of its weights.
// Must not know: cells, products, tensors.
//
// Included once per instruction set, after layer.h.

namespace rnnfast::cpu::RNNFAST_ISA {

// The sums over the lanes of N vectors, N a power of two: that of x[i] in the lanes from i * kLanes / N on. Each is
// summed in the same order, whatever N and wherever it stands.
template <int N, class T, int kPiece = Vec<T>::kLanes / 2>
RNNFAST_INLINE Vec<T> sum_lanes(const Vec<T>* x) {
  if constexpr (kPiece == 0) {
    return x[0];
  } else {
    constexpr int kLanes = Vec<T>::kLanes, kPairs = std::max(1, N / 2);
    Vec<T> sums[kPairs];
    for (int i = 0; i < kPairs; ++i) {
      const Vec<T> a = x[i], b = x[i + N / 2];  // the same where there is but one
      sums[i] = shuffle<Interleave<kLanes, 2 * kPiece, kPiece, 0>>(a, b) +
                shuffle<Interleave<kLanes, 2 * kPiece, kPiece, 1>>(a, b);
    }
    return sum_lanes<kPairs, T, kPiece / 2>(sums);
  }
}

// Lane i of the result is the first of the lanes of sum i of N.
template <int kLanes, int N>
struct Gathered {
  static constexpr int source(int i) { return i % N * (kLanes / N); }
};

// Rows that are summed at once: each of their sums waits for its own additions, and one root serves all.
template <class Acc>
constexpr int kNormRows = Vec<Acc>::kLanes;

// A number for each of these rows.
template <class Acc>
struct PerRow {
  alignas(Vec<Acc>) Acc lanes[kNormRows<Acc>];

  RNNFAST_INLINE Vec<Acc> operator[](int64_t row) const { return Vec<Acc>(lanes[row]); }
};

// Sums over the elements of each of these rows, still apart in lanes.
template <class Acc>
struct RowSums {
  using V = Vec<Acc>;
  static constexpr int kRows = kNormRows<Acc>;
  V of[kRows];

  RNNFAST_INLINE V& operator[](int64_t row) { return of[row]; }
  // The means of the first `count` rows, of n elements each, by lane. The sums are lost. Divided, for a product might
  // be fused with what the caller adds, in one copy of this function and not in another.
  RNNFAST_INLINE V means(int64_t count, int64_t n) {
    const V elements{Acc(n)};
    if (count == 1) return sum_lanes<1>(of) / elements;
    if (count <= kRows / 4) return means_of<std::max(1, kRows / 4)>(count, elements);
    if (count <= kRows / 2) return means_of<kRows / 2>(count, elements);
    return means_of<kRows>(count, elements);
  }

 private:
  template <int N>
  RNNFAST_INLINE V means_of(int64_t count, V elements) {
    for (int64_t row = count; row < N; ++row) of[row] = V(Acc(0));
    const V means = sum_lanes<N>(of) / elements;
    return shuffle<Gathered<kRows, N>>(means, means);
  }
};

// What the elements of rows are normalised by.
template <class Acc>
struct Statistics {
  PerRow<Acc> mean, scale;

  RNNFAST_INLINE Vec<Acc> normal(Vec<Acc> x, int64_t row) const { return normalised(x, mean[row], scale[row]); }
};

// The sum over n numbers at x, still apart in lanes, in one order. add(sum, element): what is summed.
template <class S, class F>
RNNFAST_INLINE Vec<acc_t<S>> sum_vectors(const S* x, int64_t n, const F& add) {
  using Acc = acc_t<S>;
  using V = Vec<Acc>;
  constexpr int kLanes = V::kLanes, kSums = 4;  // an addition takes as long as four that follow each other
  static constexpr auto kOnes = [] {
    std::array<Acc, kLanes> ones{};
    for (Acc& one : ones) one = 1;
    return ones;
  }();
  V sums[kSums];
  for (V& sum : sums) sum = V(Acc(0));
  int64_t e = 0;
  for (; e + kSums * kLanes <= n; e += kSums * kLanes)
    for (int k = 0; k < kSums; ++k) sums[k] = add(sums[k], load(x + e + k * kLanes));
  for (; e + kLanes <= n; e += kLanes) sums[0] = add(sums[0], load(x + e));
  if (e < n) sums[1] = sums[1] + add(V(Acc(0)), load(x + e, n - e)) * load(kOnes.data(), n - e);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}
// The sum of a few whole vectors, one after the other.
template <class S, class F, int64_t kElements>
RNNFAST_INLINE Vec<acc_t<S>> sum_vectors(const S* x, std::integral_constant<int64_t, kElements>, const F& add) {
  using V = Vec<acc_t<S>>;
  V sum(acc_t<S>(0));
  for (int64_t e = 0; e < kElements; e += V::kLanes) sum = add(sum, load(x + e));
  return sum;
}

// Of `count` rows of n numbers, `stride` apart.
template <class S, class Count, class N>
RNNFAST_INLINE void take_statistics(const S* rows, int64_t stride, Count count, N n, Statistics<acc_t<S>>& of) {
  using V = Vec<acc_t<S>>;
  RowSums<acc_t<S>> sums;
  for (int64_t r = 0; r < count; ++r) sums[r] = sum_vectors(rows + r * stride, n, [](V sum, V x) { return sum + x; });
  sums.means(count, n).store(of.mean.lanes);
  for (int64_t r = 0; r < count; ++r)
    sums[r] = sum_vectors(rows + r * stride, n, [mean = of.mean[r]](V sum, V x) {
      const V distance = x - mean;
      return fused(distance, distance, sum);
    });
  norm_scale(sums.means(count, n)).store(of.scale.lanes);
}
template <class S>
Statistics<acc_t<S>> statistics(const S* rows, int64_t stride, int64_t count, int64_t n) {
  using Acc = acc_t<S>;
  constexpr int64_t kLanes = Vec<Acc>::kLanes;
  Statistics<Acc> of;
  // Of few vectors, the gates of a layer with a vector of units, the loops over them, and the sums on their way through
  // memory, take longer than the additions.
  const auto take = [&](auto n) {
    constexpr int64_t kAll = kNormRows<Acc>, kHalf = kAll / 2;  // half: two threads' shares of a batch of kAll rows
    if (count == kAll) {
      take_statistics(rows, stride, std::integral_constant<int64_t, kAll>(), n, of);
    } else if (count == kHalf) {
      take_statistics(rows, stride, std::integral_constant<int64_t, kHalf>(), n, of);
    } else {
      take_statistics(rows, stride, count, n, of);
    }
  };
  if (n == kLanes) {
    take(std::integral_constant<int64_t, kLanes>());
  } else if (n == 3 * kLanes) {
    take(std::integral_constant<int64_t, 3 * kLanes>());
  } else if (n == 4 * kLanes) {
    take(std::integral_constant<int64_t, 4 * kLanes>());
  } else {
    take_statistics(rows, stride, count, n, of);
  }
  return of;
}

// [kNormNumbers, rows] by what forward scaled the halves of the gates of each row, behind the `width` elements of every
// row in `saved`.
template <class S>
auto* scales_behind(S* saved, int64_t rows, int64_t width) {
  static_assert(kNormNumbers == 2);  // as there are halves
  using Acc = acc_t<std::remove_const_t<S>>;
  return reinterpret_cast<std::conditional_t<std::is_const_v<S>, const Acc, Acc>*>(saved + rows * width);
}

// Of a half of the gates [G*H]; the bias may be null.
template <class S>
const S* norm_weights(const DirectionWeights& of, int half) {
  return static_cast<const S*>(half == 0 ? of.norm_ih : of.norm_hh);
}
template <class S>
const S* norm_bias(const DirectionWeights& of, int half) {
  return static_cast<const S*>(half == 0 ? of.b_ih : of.b_hh);
}

// The gates of a row by vectors: f(where in [G*H], column, how many).
template <class F>
RNNFAST_INLINE void for_gates(const UnitBlocks& blocks, const F& f) {
  for (int64_t b = 0; b < blocks.count(); ++b)
    for (int64_t g = 0, size = blocks.size(b); g < blocks.gates; ++g)
      for (int64_t u = 0; u < size; u += blocks.lanes)
        f(g * blocks.units + blocks.first(b) + u, blocks.column(b) + g * size + u,
          std::min<int64_t>(blocks.lanes, size - u));
}

// The gradients of a direction's norms and biases, of a thread's rows: `lines` sums for each unit, of few rows first,
// since the rounding error of one long sum would show.
template <class Acc>
class NormSums {
 public:
  using V = Vec<Acc>;
  NormSums() = default;
  // ld: units, rounded up to vectors. buffer: elements(), null: not wanted.
  NormSums(int lines, int64_t ld, Acc* buffer) : lines_(lines), ld_(ld), total_(buffer) {}
  static int64_t elements(int lines, int64_t ld) { return 2 * lines * ld; }

  bool wanted() const { return total_ != nullptr; }
  void clear() { memset(total_, 0, elements(lines_, ld_) * sizeof(Acc)); }
  RNNFAST_INLINE void add(int line, int64_t unit, V x) const {
    Acc* sum = total_ + (lines_ + line) * ld_ + unit;
    (V::load(sum) + x).store(sum);
  }
  void end_rows(int64_t count) {
    if ((rows_ += count) >= kRows) flush();
  }
  void flush() {
    Acc* part = total_ + lines_ * ld_;
    for (int64_t e = 0; e < lines_ * ld_; e += V::kLanes) (V::load(total_ + e) + V::load(part + e)).store(total_ + e);
    memset(part, 0, lines_ * ld_ * sizeof(Acc));
    rows_ = 0;
  }
  V total(int line, int64_t unit) const { return V::load(total_ + line * ld_ + unit); }

 private:
  static constexpr int kRows = 32;
  int lines_ = 0;
  int64_t ld_ = 0, rows_ = 0;
  Acc* total_ = nullptr;  // [lines, ld], then the sums of the last rows
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
