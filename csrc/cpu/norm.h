// Owns: layer normalisation in the CPU engine: the statistics of a row, the gradients of its weights.
// Must not know: cells, products, tensors.
//
// Included once per instruction set, after layer.h.

namespace rnnfast::cpu::RNNFAST_ISA {

template <int kLanes, int kBy>
struct Rotated {
  static constexpr int source(int i) { return (i + kBy) % kLanes; }
};
// The sum of all lanes, in every lane.
template <class T, int kBy = Vec<T>::kLanes / 2>
RNNFAST_INLINE Vec<T> sum_lanes(Vec<T> x) {
  if constexpr (kBy == 0) {
    return x;
  } else {
    return sum_lanes<T, kBy / 2>(x + shuffle<Rotated<Vec<T>::kLanes, kBy>>(x, x));
  }
}

// What the elements of a row are normalised by, in every lane.
template <class Acc>
struct Statistics {
  Vec<Acc> mean, scale;
};

// Of the n numbers at x, summed in one order.
template <class S>
inline Statistics<acc_t<S>> statistics(const S* x, int64_t n) {
  using Acc = acc_t<S>;
  using V = Vec<Acc>;
  constexpr int kLanes = V::kLanes, kSums = 4;  // an addition takes as long as four that follow each other
  static constexpr auto kOnes = [] {
    std::array<Acc, kLanes> ones{};
    for (Acc& one : ones) one = 1;
    return ones;
  }();
  const V share(Acc(1) / Acc(n));
  const auto mean = [&](const auto& f) {
    V sums[kSums];
    for (V& sum : sums) sum = V(Acc(0));
    int64_t e = 0;
    for (; e + kSums * kLanes <= n; e += kSums * kLanes)
      for (int k = 0; k < kSums; ++k) sums[k] = sums[k] + f(load(x + e + k * kLanes));
    for (; e + kLanes <= n; e += kLanes) sums[0] = sums[0] + f(load(x + e));
    if (e < n) sums[1] = sums[1] + f(load(x + e, n - e)) * load(kOnes.data(), n - e);
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) * share;
  };
  const V centre = mean([](V element) { return element; });
  const V variance = mean([&](V element) {
    const V distance = element - centre;
    return distance * distance;
  });
  return {centre, V(norm_scale(Acc(variance.v[0])))};
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
  RNNFAST_INLINE void add(int line, int64_t unit, V x) {
    Acc* sum = total_ + (lines_ + line) * ld_ + unit;
    (V::load(sum) + x).store(sum);
  }
  void end_row() {
    if (++rows_ == kRows) flush();
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
  int lines_ = 0, rows_ = 0;
  int64_t ld_ = 0;
  Acc* total_ = nullptr;  // [lines, ld], then the sums of the last rows
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
