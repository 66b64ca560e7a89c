// Owns: the vector type of one instruction set: arithmetic, loads and stores with conversion, nonlinearities.
// Must not know: layers, cells, threads.
//
// Included once per instruction set, after the target pragma, with RNNFAST_ISA (the namespace), RNNFAST_VECTOR_BYTES
// and, where the instructions exist, RNNFAST_HAS_AVX512, RNNFAST_HAS_AVX512_BF16 and RNNFAST_HAS_F16C defined.
// Arithmetic uses the compilers' vector extension, so that one text serves every instruction set; a * b + c contracts
// to one fused multiply-add where there is one (-ffp-contract=fast). No include guard: every instruction set needs its
// own copy.

// Everything here is inlined by force: a call would spill every vector register around it.
#define RNNFAST_INLINE inline __attribute__((always_inline))

namespace rnnfast::cpu::RNNFAST_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Vec {
  static constexpr int kLanes = RNNFAST_VECTOR_BYTES / sizeof(T);
  using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Native __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
  typedef Bits NativeBits __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(RNNFAST_VECTOR_BYTES), aligned(sizeof(T)), may_alias));

  Native v;

  Vec() = default;
  RNNFAST_INLINE Vec(T x) : v(x - Native{}) {}
  static RNNFAST_INLINE Vec of(Native native) {
    Vec x;
    x.v = native;
    return x;
  }

  static RNNFAST_INLINE Vec load(const T* p) { return of(Native(*reinterpret_cast<const Unaligned*>(p))); }
  RNNFAST_INLINE void store(T* p) const { *reinterpret_cast<Unaligned*>(p) = v; }

  friend RNNFAST_INLINE Vec operator+(Vec a, Vec b) { return of(a.v + b.v); }
  friend RNNFAST_INLINE Vec operator-(Vec a, Vec b) { return of(a.v - b.v); }
  friend RNNFAST_INLINE Vec operator*(Vec a, Vec b) { return of(a.v * b.v); }
  friend RNNFAST_INLINE Vec operator/(Vec a, Vec b) { return of(a.v / b.v); }
};

using VecF = Vec<float>;
using VecD = Vec<double>;

// a b + c, rounded once where there is an instruction for it. For sums whose first term is a product, too: there a
// compiler may choose which of two products it rounds, and not choose the same in every copy of a function.
template <class T>
RNNFAST_INLINE Vec<T> fused(Vec<T> a, Vec<T> b, Vec<T> c) {
  using V [[maybe_unused]] = Vec<T>;
#if defined(RNNFAST_HAS_AVX512)
  if constexpr (sizeof(T) == 4)
    return V::of(typename V::Native(_mm512_fmadd_ps(__m512(a.v), __m512(b.v), __m512(c.v))));
  if constexpr (sizeof(T) == 8)
    return V::of(typename V::Native(_mm512_fmadd_pd(__m512d(a.v), __m512d(b.v), __m512d(c.v))));
#elif RNNFAST_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4)
    return V::of(typename V::Native(_mm256_fmadd_ps(__m256(a.v), __m256(b.v), __m256(c.v))));
  if constexpr (sizeof(T) == 8)
    return V::of(typename V::Native(_mm256_fmadd_pd(__m256d(a.v), __m256d(b.v), __m256d(c.v))));
#elif defined(__FP_FAST_FMA) && defined(__FP_FAST_FMAF)
  for (int i = 0; i < V::kLanes; ++i) c.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
  return c;
#else
  return a * b + c;
#endif
}

template <class T>
RNNFAST_INLINE Vec<T> relu(Vec<T> x) {
  return Vec<T>::of(x.v < T(0) ? typename Vec<T>::Native{} : x.v);
}
template <class T>
RNNFAST_INLINE Vec<T> relu_mask(Vec<T> y) {
  return Vec<T>::of(y.v > T(0) ? Vec<T>(T(1)).v : typename Vec<T>::Native{});
}

template <class T>
RNNFAST_INLINE Vec<T> sqrt(Vec<T> x) {
  for (int i = 0; i < Vec<T>::kLanes; ++i) x.v[i] = std::sqrt(x.v[i]);
  return x;
}

// NaN stays NaN: the comparisons are false for it, and the instructions return their second operand.
RNNFAST_INLINE VecF clamp(VecF x, float low, float high) {
#if defined(RNNFAST_HAS_AVX512)
  const __m512 above = _mm512_max_ps(__m512(VecF(low).v), __m512(x.v));
  return VecF::of(VecF::Native(_mm512_min_ps(__m512(VecF(high).v), above)));
#else
  x.v = x.v < low ? VecF(low).v : x.v;
  x.v = x.v > high ? VecF(high).v : x.v;
  return x;
#endif
}

// exp(x) = scale * (1 + p) with scale = 2^n, x = n ln 2 + r, |r| <= ln(2) / 2 and p = exp(r) - 1.
// Keeping p apart from the 1 is what makes exp(x) - 1 exact near zero. |x| must be below 88.
RNNFAST_INLINE void exp_parts(VecF x, VecF& scale, VecF& p) {
  // Adding 1.5 * 2^23 leaves round(x / ln 2) in the low bits of the sum.
  const VecF magic(12582912.0f);
  const VecF shifted = x * VecF(1.44269504f) + magic;
  const VecF n = shifted - magic;
  // ln 2 in two parts, the first with few enough bits that n times it is exact.
  const VecF r = (x - n * VecF(0.693359375f)) - n * VecF(-2.12194440e-4f);
  scale.v = reinterpret_cast<VecF::Native>((reinterpret_cast<VecF::NativeBits>(shifted.v) << 23) + 0x3f800000);
  // The minimax polynomial of (exp(r) - 1 - r) / r^2 with weight r^2: exp(r) within 3.2e-9.
  VecF q = r * VecF(1.39506476e-3f) + VecF(8.36895313e-3f);
  q = q * r + VecF(4.16662022e-2f);
  q = q * r + VecF(1.66665182e-1f);
  q = q * r + VecF(0.5f);
  p = q * (r * r) + r;
}

// 1 / x for x in [1, 2^126].
RNNFAST_INLINE VecF reciprocal(VecF x) {
#if defined(RNNFAST_HAS_AVX512)
  // Fourteen bits from the table, doubled by one Newton step; a division would keep the one divider busy.
  const VecF y = VecF::of(VecF::Native(_mm512_rcp14_ps(__m512(x.v))));
  return y + y * (VecF(1.0f) - x * y);
#else
  return VecF(1.0f) / x;
#endif
}

RNNFAST_INLINE VecF sigmoid(VecF x) {
  VecF scale, p;
  exp_parts(clamp(VecF(0.0f) - x, -87.0f, 87.0f), scale, p);
  return reciprocal(VecF(1.0f) + (scale + scale * p));
}

// tanh(x) = e / (e + 2) with e = exp(2 x) - 1; beyond 9.02 the result rounds to 1.
RNNFAST_INLINE VecF tanh(VecF x) {
  VecF scale, p;
  const VecF twice = clamp(x + x, -18.04f, 18.04f);
  exp_parts(twice, scale, p);
  const VecF e = scale * p + (scale - VecF(1.0f));
  return e * reciprocal(e + VecF(2.0f));
}

RNNFAST_INLINE VecD sigmoid(VecD x) {
  for (int i = 0; i < VecD::kLanes; ++i) x.v[i] = rnnfast::sigmoid(double(x.v[i]));
  return x;
}
RNNFAST_INLINE VecD tanh(VecD x) {
  for (int i = 0; i < VecD::kLanes; ++i) x.v[i] = rnnfast::tanh(double(x.v[i]));
  return x;
}

// Several vectors that go through the same equations side by side. A cell's nonlinearities depend on each other, so one
// vector alone would wait for its own results most of the time.
template <class T, int N>
struct Batch {
  Vec<T> part[N];

  Batch() = default;
  Batch(T x) {
    for (auto& p : part) p = Vec<T>(x);
  }
  template <class F>
  static RNNFAST_INLINE Batch map(const F& f) {
    Batch y;
    for (int i = 0; i < N; ++i) y.part[i] = f(i);
    return y;
  }
  friend RNNFAST_INLINE Batch operator+(const Batch& a, const Batch& b) {
    return map([&](int i) { return a.part[i] + b.part[i]; });
  }
  friend RNNFAST_INLINE Batch operator-(const Batch& a, const Batch& b) {
    return map([&](int i) { return a.part[i] - b.part[i]; });
  }
  friend RNNFAST_INLINE Batch operator*(const Batch& a, const Batch& b) {
    return map([&](int i) { return a.part[i] * b.part[i]; });
  }
  friend RNNFAST_INLINE Batch sigmoid(const Batch& x) {
    return map([&](int i) { return sigmoid(x.part[i]); });
  }
  friend RNNFAST_INLINE Batch tanh(const Batch& x) {
    return map([&](int i) { return tanh(x.part[i]); });
  }
  friend RNNFAST_INLINE Batch relu(const Batch& x) {
    return map([&](int i) { return relu(x.part[i]); });
  }
  friend RNNFAST_INLINE Batch relu_mask(const Batch& x) {
    return map([&](int i) { return relu_mask(x.part[i]); });
  }
};

// ------------------------------------------------------------------------------------------- storage <-> arithmetic
// acc_t<S> is the arithmetic type of a storage type S. load<S> and store<S> move kLanes values, or the first n.

template <class S>
using acc_t = std::conditional_t<std::is_same_v<S, double>, double, float>;

RNNFAST_INLINE float to_acc(float x) { return x; }
RNNFAST_INLINE double to_acc(double x) { return x; }
RNNFAST_INLINE float to_acc(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
RNNFAST_INLINE float to_acc(f16 x) {
  _Float16 y;
  memcpy(&y, &x.bits, 2);
  return float(y);
}

template <class S>
RNNFAST_INLINE S from_acc(acc_t<S> x) {
  if constexpr (std::is_same_v<S, bf16>) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t(bits >> 16 | 0x40)};  // NaN: keep it one
    return bf16{uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};                  // to nearest, ties to even
  } else if constexpr (std::is_same_v<S, f16>) {
    const _Float16 y = _Float16(x);
    f16 r;
    memcpy(&r.bits, &y, 2);
    return r;
  } else {
    return x;
  }
}

RNNFAST_INLINE VecF load(const float* p) { return VecF::load(p); }
RNNFAST_INLINE VecD load(const double* p) { return VecD::load(p); }
RNNFAST_INLINE void store(float* p, VecF x) { x.store(p); }
RNNFAST_INLINE void store(double* p, VecD x) { x.store(p); }

typedef uint16_t Half __attribute__((vector_size(RNNFAST_VECTOR_BYTES / 2)));
typedef uint16_t HalfUnaligned __attribute__((vector_size(RNNFAST_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t Wide __attribute__((vector_size(RNNFAST_VECTOR_BYTES)));

RNNFAST_INLINE VecF load(const bf16* p) {
  const Half narrow = *reinterpret_cast<const HalfUnaligned*>(p);
  return VecF::of(reinterpret_cast<VecF::Native>(__builtin_convertvector(narrow, Wide) << 16));
}
RNNFAST_INLINE void store(bf16* p, VecF x) {
  const Wide bits = reinterpret_cast<Wide>(x.v);
  const Wide even = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const Wide rounded = (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16 | 0x40u) : even;
  *reinterpret_cast<HalfUnaligned*>(p) = __builtin_convertvector(rounded, Half);
}

RNNFAST_INLINE VecF load(const f16* p) {
#if defined(RNNFAST_HAS_AVX512)
  return VecF::of(VecF::Native(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))));
#elif defined(RNNFAST_HAS_F16C)
  return VecF::of(VecF::Native(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
#else
  VecF y;
  for (int i = 0; i < VecF::kLanes; ++i) y.v[i] = to_acc(p[i]);
  return y;
#endif
}
RNNFAST_INLINE void store(f16* p, VecF x) {
#if defined(RNNFAST_HAS_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(__m512(x.v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(RNNFAST_HAS_F16C)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(__m256(x.v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < VecF::kLanes; ++i) p[i] = from_acc<f16>(x.v[i]);
#endif
}

// The first n lanes; the others are zero.
template <class S>
RNNFAST_INLINE Vec<acc_t<S>> load(const S* p, int64_t n) {
  using V = Vec<acc_t<S>>;
  if (n >= V::kLanes) return load(p);
#if defined(RNNFAST_HAS_AVX512)
  if constexpr (std::is_same_v<S, float>)
    return V::of(typename V::Native(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)));
#endif
  S part[V::kLanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}

template <class S>
RNNFAST_INLINE void store(S* p, Vec<acc_t<S>> x, int64_t n) {
  using V = Vec<acc_t<S>>;
  if (n >= V::kLanes) return store(p, x);
#if defined(RNNFAST_HAS_AVX512)
  if constexpr (std::is_same_v<S, float>) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), __m512(x.v));
    return;
  }
#endif
  S part[V::kLanes];
  store(part, x);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// ------------------------------------------------------------------------------------------------- products
// What a matrix product of storage type S multiplies. Operand is the element type of the packed matrices; a Unit is
// what one lane of one multiply-add takes: one operand, or two neighbours along the summed dimension where the
// instruction sums pairs.
template <class S>
struct Product {
  using Operand = acc_t<S>;
  using Acc = acc_t<S>;
  using Unit = Operand;
  static constexpr int kPair = 1;
  static RNNFAST_INLINE Vec<Acc> multiply_add(Vec<Acc> sum, Unit a, Vec<Unit> w) { return Vec<Acc>(a) * w + sum; }
};

#if defined(RNNFAST_HAS_AVX512_BF16)
template <>
struct Product<bf16> {
  using Operand = bf16;
  using Acc = float;
  using Unit = int32_t;  // the bits of a pair of bf16
  static constexpr int kPair = 2;
  static RNNFAST_INLINE VecF multiply_add(VecF sum, Unit a, Vec<Unit> w) {
    const __m512bh pair = __m512bh(_mm512_set1_epi32(a));
    return VecF::of(VecF::Native(_mm512_dpbf16_ps(__m512(sum.v), pair, __m512bh(__m512i(w.v)))));
  }
};
#endif

// ------------------------------------------------------------------------------------------------- transpose

// Lane i of the result is lane Pattern::source(i) of a followed by b.
template <class Pattern, class T, int... I>
RNNFAST_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return Vec<T>::of(__builtin_shufflevector(a.v, b.v, Pattern::source(I)...));
#else
  return Vec<T>::of(__builtin_shuffle(a.v, b.v, typename Vec<T>::NativeBits{Pattern::source(I)...}));
#endif
}

// Cuts the lanes into groups of kGroup, and the groups' elements into pieces of kPiece. The result alternates pieces of
// a and of b: those of the groups' lower halves (kHigh = 0) or upper halves (1). Within 16 bytes this is one unpack
// instruction.
template <int kLanes, int kGroup, int kPiece, int kHigh>
struct Interleave {
  static constexpr int source(int i) {
    const int group = i / kGroup, piece = i % kGroup / kPiece;
    return (piece % 2) * kLanes + group * kGroup + kHigh * kGroup / 2 + piece / 2 * kPiece + i % kPiece;
  }
};
// Halves of a and of b, or even and odd pieces of them: moves of whole 16-byte lanes.
template <int kLanes, int kHigh>
struct Halves {
  static constexpr int source(int i) { return i / (kLanes / 2) * kLanes + kHigh * kLanes / 2 + i % (kLanes / 2); }
};
template <int kLanes, int kPiece, int kOdd>
struct Pieces {
  static constexpr int source(int i) {
    const int piece = i / kPiece, half = kLanes / kPiece / 2;
    return piece / half * kLanes + (piece % half * 2 + kOdd) * kPiece + i % kPiece;
  }
};
template <class Pattern, class T>
RNNFAST_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b) {
  return shuffle<Pattern>(a, b, std::make_integer_sequence<int, Vec<T>::kLanes>{});
}

// The transpose of a kLanes x kLanes block held in registers: first within the 16-byte lanes, then of the lanes. Two
// shuffles a vector and stage of those that a processor does fastest.
template <class T>
RNNFAST_INLINE void transpose(Vec<T> (&m)[Vec<T>::kLanes]) {
  constexpr int n = Vec<T>::kLanes, kIn = 16 / sizeof(T), kOf = n / kIn;
  for (int g = 0; g < n; g += kIn) {
    if constexpr (kIn == 4) {
      const Vec<T> a = shuffle<Interleave<n, 4, 1, 0>>(m[g], m[g + 1]),
                   b = shuffle<Interleave<n, 4, 1, 1>>(m[g], m[g + 1]);
      const Vec<T> c = shuffle<Interleave<n, 4, 1, 0>>(m[g + 2], m[g + 3]);
      const Vec<T> d = shuffle<Interleave<n, 4, 1, 1>>(m[g + 2], m[g + 3]);
      m[g] = shuffle<Interleave<n, 4, 2, 0>>(a, c);
      m[g + 1] = shuffle<Interleave<n, 4, 2, 1>>(a, c);
      m[g + 2] = shuffle<Interleave<n, 4, 2, 0>>(b, d);
      m[g + 3] = shuffle<Interleave<n, 4, 2, 1>>(b, d);
    } else {
      const Vec<T> a = m[g], b = m[g + 1];
      m[g] = shuffle<Interleave<n, 2, 1, 0>>(a, b);
      m[g + 1] = shuffle<Interleave<n, 2, 1, 1>>(a, b);
    }
  }
  for (int j = 0; j < kIn; ++j) {
    if constexpr (kOf == 2) {
      const Vec<T> a = m[j], b = m[kIn + j];
      m[j] = shuffle<Halves<n, 0>>(a, b);
      m[kIn + j] = shuffle<Halves<n, 1>>(a, b);
    } else if constexpr (kOf == 4) {
      const Vec<T> a = shuffle<Halves<n, 0>>(m[j], m[kIn + j]), b = shuffle<Halves<n, 1>>(m[j], m[kIn + j]);
      const Vec<T> c = shuffle<Halves<n, 0>>(m[2 * kIn + j], m[3 * kIn + j]);
      const Vec<T> d = shuffle<Halves<n, 1>>(m[2 * kIn + j], m[3 * kIn + j]);
      m[j] = shuffle<Pieces<n, kIn, 0>>(a, c);
      m[kIn + j] = shuffle<Pieces<n, kIn, 1>>(a, c);
      m[2 * kIn + j] = shuffle<Pieces<n, kIn, 0>>(b, d);
      m[3 * kIn + j] = shuffle<Pieces<n, kIn, 1>>(b, d);
    }
  }
}

// ------------------------------------------------------------------------------------------------- denormals
// A state that decays through the denormal range would cost a microcode assist per operation: flush instead. The
// rounding mode and the caller's setting are left as they were.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // flush to zero, denormals are zero
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
#endif
};

}  // namespace rnnfast::cpu::RNNFAST_ISA
