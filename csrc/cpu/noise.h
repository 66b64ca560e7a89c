// Owns: recurrent dropout and zoneout in the CPU engine: the masks of a thread's rows.
// Must not know: cells, products, tensors.
//
// Included once per instruction set, after layer.h.

namespace rnnfast::cpu::RNNFAST_ISA {

// 32-bit words of neighbouring units, those of even and of odd units apart, as the multiplication takes them: each in
// the lower half of 64 bits. What the upper halves hold has no meaning.
struct Words {
  static constexpr int kLanes = RNNFAST_VECTOR_BYTES / 4;
  typedef uint64_t Half __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
  typedef uint32_t Native __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));

  Half even, odd;

  Words() = default;
  RNNFAST_INLINE Words(uint32_t x) : even(x - Half{}), odd(even) {}
  static RNNFAST_INLINE Words count_from(uint32_t first) {
    Words x(first);
    for (int i = 0; i < kLanes; ++i) (i % 2 == 0 ? x.even : x.odd)[i / 2] += i;
    return x;
  }
  friend RNNFAST_INLINE Words operator^(Words a, Words b) {
    a.even ^= b.even;
    a.odd ^= b.odd;
    return a;
  }
  RNNFAST_INLINE Native in_order() const { return Native((even & 0xffffffffu) | odd << 32); }
};

RNNFAST_INLINE Words::Half multiply_low(Words::Half x, uint32_t by) {
#if defined(RNNFAST_HAS_AVX512)
  return Words::Half(_mm512_mul_epu32(__m512i(x), _mm512_set1_epi64(by)));
#elif RNNFAST_VECTOR_BYTES == 32
  return Words::Half(_mm256_mul_epu32(__m256i(x), _mm256_set1_epi64x(by)));
#else
  return (x & 0xffffffffu) * uint64_t(by);
#endif
}
RNNFAST_INLINE void multiply_wide(Words x, uint32_t by, Words& high, Words& low) {
  low.even = multiply_low(x.even, by);
  low.odd = multiply_low(x.odd, by);
  high.even = low.even >> 32;
  high.odd = low.odd >> 32;
}

// Writes for the units [first, last), which masks count from `first_unit` on, and each of the steps of one call,
// `stride` apart, `below` where the number lies below the threshold and `otherwise` elsewhere; up to a vector beyond
// `last`.
template <class Acc>
inline void draw(int64_t seed, int64_t step, uint32_t purpose, uint32_t threshold, Acc below, Acc otherwise, int steps,
                 int64_t first_unit, int64_t first, int64_t last, Acc* to, int64_t stride) {
  typedef Acc Factors __attribute__((vector_size(Words::kLanes * sizeof(Acc))));
  typedef typename Vec<Acc>::Bits Mask __attribute__((vector_size(Words::kLanes * sizeof(Acc))));
  for (int64_t u = first; u < last; u += Words::kLanes) {
    Words words[kPhiloxWords];
    philox(Words::count_from(uint32_t(first_unit + u)), philox_step(step), purpose, seed, words);
    for (int w = 0; w < steps; ++w) {
      const Mask is_below = __builtin_convertvector(words[w].in_order() < threshold, Mask);
      const Factors factors = is_below ? below - Factors{} : otherwise - Factors{};
      memcpy(to + w * stride + u, &factors, sizeof factors);
    }
  }
}

// Elements of a row that `draw` fills.
inline int64_t ld_draw(int64_t units) { return round_up(units, Words::kLanes) + Words::kLanes; }

// The mask of recurrent dropout of one row: 0 or 1 / (1 - p).
template <class Acc>
inline void draw_dropout(const Noise& noise, bool reverse, int64_t row, int64_t units, Acc* mask) {
  draw<Acc>(noise.seeds[row], 0, philox_purpose(Draw::recurrent_dropout, reverse),
            philox_threshold(noise.recurrent_dropout), 0, Acc(1 / (1 - noise.recurrent_dropout)), 1, noise.first_unit,
            0, units, mask, 0);
}

// m h as a product reads it.
template <class S>
inline void store_masked(const S* h, const acc_t<S>* mask, int64_t units, typename Product<S>::Unit* to) {
  using V = Vec<acc_t<S>>;
  zero_units<S>(to, units);
  auto* operands = reinterpret_cast<typename Product<S>::Operand*>(to);
  for (int64_t u = 0; u < units; u += V::kLanes)
    store_operand<S>(operands + u, load(h + u, units - u) * V::load(mask + u), units - u);
}

// The k of zoneout, of a thread's rows and units: those of the steps of one call at once.
template <class Acc>
class Zoneout {
 public:
  Zoneout() = default;
  // p = 0: off, without a buffer. rows: slots; units: those that are read.
  Zoneout(const Noise& noise, double p, Draw draw, const Sequence& sequence, bool reverse, Share rows, int64_t first,
          int64_t last, int64_t units, Acc* buffer)
      : sequence_(&sequence),
        seeds_(noise.seeds),
        purpose_(philox_purpose(draw, reverse)),
        threshold_(philox_threshold(p)),
        rows_(rows),
        first_unit_(noise.first_unit),
        first_(first),
        last_(last),
        ld_(noise.seeds ? ld_draw(units) : 0),
        stride_(noise.seeds ? ld_ * (rows.end - rows.begin) : 0),
        buffer_(p > 0 ? buffer : nullptr) {
    if (!buffer_ || seeds_) return;
    for (int64_t u = 0; u < ld_draw(units); ++u) buffer_[u] = Acc(p);
  }
  // The buffers of all threads: elements in all, and where a thread's begins.
  static int64_t elements(const Noise& noise, const RowRoom& room, int threads, int64_t units) {
    return ld_draw(units) * (noise.seeds ? kPhiloxWords * room.rows(threads) : threads);
  }
  static int64_t first(const Noise& noise, const RowRoom& room, const Member& m, const Share& slots, int64_t units) {
    return ld_draw(units) * (noise.seeds ? kPhiloxWords * room.first(m, slots) : m.rank);
  }

  // Goes to step t.
  void reach(int64_t t) {
    at_ = t % kPhiloxWords;
    if (!buffer_ || !seeds_ || t / kPhiloxWords == drawn_) return;
    drawn_ = t / kPhiloxWords;
    const int64_t first_step = drawn_ * kPhiloxWords;  // has the most living rows
    for (int64_t slot = rows_.begin; slot < std::min(rows_.end, sequence_->batch_size(first_step)); ++slot)
      draw<Acc>(seeds_[sequence_->batch_row(slot)], first_step, purpose_, threshold_, 1, 0, kPhiloxWords, first_unit_,
                first_, last_, buffer_ + (slot - rows_.begin) * ld_, stride_);
  }
  // The k of a slot at the step that was reached, by unit; null: off.
  const Acc* row(int64_t slot) const {
    return buffer_ ? buffer_ + at_ * stride_ + (slot - rows_.begin) * ld_ : nullptr;
  }
  bool on() const { return buffer_ != nullptr; }

 private:
  const Sequence* sequence_ = nullptr;
  const int64_t* seeds_ = nullptr;
  uint32_t purpose_ = 0, threshold_ = 0;
  Share rows_;
  int64_t first_unit_ = 0, first_ = 0, last_ = 0, ld_ = 0, stride_ = 0, at_ = 0, drawn_ = -1;
  Acc* buffer_ = nullptr;
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
