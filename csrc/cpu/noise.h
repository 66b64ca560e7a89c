// Owns: recurrent dropout and zoneout in the CPU engine: the masks of a thread's rows.
// Must not know: cells, products, tensors.
//
// Included once per instruction set, after layer.h.

namespace rnnfast::cpu::RNNFAST_ISA {

// 32-bit words of neighbouring units.
struct Words {
  static constexpr int kLanes = RNNFAST_VECTOR_BYTES / 4;
  typedef uint32_t Native __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));

  Native v;

  Words() = default;
  RNNFAST_INLINE Words(uint32_t x) : v(x - Native{}) {}
  static RNNFAST_INLINE Words count_from(uint32_t first) {
    Words x(first);
    for (int i = 0; i < kLanes; ++i) x.v[i] += i;
    return x;
  }
  friend RNNFAST_INLINE Words operator^(Words a, Words b) {
    a.v ^= b.v;
    return a;
  }
};

// The products of even and of odd lanes, 64 bits each, then their halves side by side.
RNNFAST_INLINE void multiply_wide(Words x, uint32_t by, Words& high, Words& low) {
#if defined(RNNFAST_HAS_AVX512)
  const __m512i lanes = __m512i(x.v), factor = _mm512_set1_epi64(by);
  const __m512i even = _mm512_mul_epu32(lanes, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(lanes, 32), factor);
  low.v = Words::Native(_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32)));
  high.v = Words::Native(_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd));
#elif RNNFAST_VECTOR_BYTES == 32
  const __m256i lanes = __m256i(x.v), factor = _mm256_set1_epi64x(by);
  const __m256i even = _mm256_mul_epu32(lanes, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(lanes, 32), factor);
  low.v = Words::Native(_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa));
  high.v = Words::Native(_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa));
#else
  for (int i = 0; i < Words::kLanes; ++i) {
    uint32_t upper, lower;
    rnnfast::multiply_wide(x.v[i], by, upper, lower);
    high.v[i] = upper;
    low.v[i] = lower;
  }
#endif
}

// Writes for the units [first, last) and each of the steps of one call, `stride` apart, `below` where the number lies
// below the threshold and `otherwise` elsewhere; up to a vector beyond `last`.
template <class Acc>
inline void draw(int64_t seed, int64_t step, uint32_t purpose, uint32_t threshold, Acc below, Acc otherwise, int steps,
                 int64_t first, int64_t last, Acc* to, int64_t stride) {
  typedef int32_t Bits __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
  typedef Acc Factors __attribute__((vector_size(Words::kLanes * sizeof(Acc))));
  for (int64_t u = first; u < last; u += Words::kLanes) {
    Words words[kPhiloxWords];
    philox(Words::count_from(uint32_t(u)), philox_step(step), purpose, seed, words);
    for (int w = 0; w < steps; ++w) {
      const Bits is_below = Bits(words[w].v < Words(threshold).v) & 1;
      const Factors factors = otherwise + __builtin_convertvector(is_below, Factors) * (below - otherwise);
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
            philox_threshold(noise.recurrent_dropout), 0, Acc(1 / (1 - noise.recurrent_dropout)), 1, 0, units, mask, 0);
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
        first_(first),
        last_(last),
        ld_(noise.seeds ? ld_draw(units) : 0),
        stride_(noise.seeds ? ld_ * (rows.end - rows.begin) : 0),
        buffer_(p > 0 ? buffer : nullptr) {
    if (!buffer_ || seeds_) return;
    for (int64_t u = 0; u < ld_draw(units); ++u) buffer_[u] = Acc(p);
  }
  // What the buffer of `rows` rows holds.
  static int64_t elements(const Noise& noise, double p, int64_t rows, int64_t units) {
    return p > 0 ? ld_draw(units) * (noise.seeds ? kPhiloxWords * rows : 1) : 0;
  }

  // Goes to step t.
  void reach(int64_t t) {
    at_ = t % kPhiloxWords;
    if (!buffer_ || !seeds_ || t / kPhiloxWords == drawn_) return;
    drawn_ = t / kPhiloxWords;
    const int64_t first_step = drawn_ * kPhiloxWords;  // has the most living rows
    for (int64_t slot = rows_.begin; slot < std::min(rows_.end, sequence_->batch_size(first_step)); ++slot)
      draw<Acc>(seeds_[sequence_->batch_row(slot)], first_step, purpose_, threshold_, 1, 0, kPhiloxWords, first_, last_,
                buffer_ + (slot - rows_.begin) * ld_, stride_);
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
  int64_t first_ = 0, last_ = 0, ld_ = 0, stride_ = 0, at_ = 0, drawn_ = -1;
  Acc* buffer_ = nullptr;
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
