// Vectors of numbers through the compiler's vector extension, and the few functions on them that the kernels need.
// Included once per instruction set inside a namespace of its own; FP_VECTOR_BYTES says how wide.
// No #pragma once: see isa_*_cpu.cpp.

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(FP_VECTOR_BYTES)));
  typedef int32_t mask __attribute__((vector_size(FP_VECTOR_BYTES)));
  typedef uint32_t bits __attribute__((vector_size(FP_VECTOR_BYTES)));
  using lane = int32_t;
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(FP_VECTOR_BYTES)));
  typedef int64_t mask __attribute__((vector_size(FP_VECTOR_BYTES)));
  typedef uint64_t bits __attribute__((vector_size(FP_VECTOR_BYTES)));
  using lane = int64_t;
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
using MaskVec = typename VectorOf<T>::mask;
template <class T>
using BitsVec = typename VectorOf<T>::bits;  // wraps around
template <class T>
using Lane = typename VectorOf<T>::lane;
template <class T>
constexpr int kWidth = FP_VECTOR_BYTES / int(sizeof(T));

template <class T>
FP_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
FP_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
// The first lanes only where fewer numbers are left; the others are 0.
template <class T>
FP_INLINE Vec<T> load_part(const T* p, int64_t left) {
  if (left >= kWidth<T>) return load(p);
  T lanes[kWidth<T>] = {};
  __builtin_memcpy(lanes, p, left * sizeof(T));
  return load(lanes);
}
template <class T>
FP_INLINE void store_part(T* p, Vec<T> v, int64_t left) {
  if (left >= kWidth<T>)
    store(p, v);
  else
    __builtin_memcpy(p, &v, left * sizeof(T));
}
template <class T>
FP_INLINE MaskVec<T> load_mask(const Lane<T>* p) {
  MaskVec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
FP_INLINE void store_mask(Lane<T>* p, MaskVec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class T>
FP_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // compiled to a copy: what plus 0 would do to -0 and to subnormal numbers, minus 0 does not
}
template <class T>
FP_INLINE MaskVec<T> all_lanes() {
  return MaskVec<T>{} == MaskVec<T>{};
}
template <class T>
FP_INLINE Vec<T> bits_to_vec(MaskVec<T> m) {
  Vec<T> v;
  __builtin_memcpy(&v, &m, sizeof v);
  return v;
}
template <class T>
FP_INLINE MaskVec<T> vec_to_bits(Vec<T> v) {
  MaskVec<T> m;
  __builtin_memcpy(&m, &v, sizeof m);
  return m;
}
// v where the mask holds, else 0.
template <class T>
FP_INLINE Vec<T> keep_lanes(MaskVec<T> m, Vec<T> v) {
  return bits_to_vec<T>(vec_to_bits<T>(v) & m);
}
template <class T>
FP_INLINE T sum_lanes(Vec<T> v) {
  T lanes[kWidth<T>];
  store(lanes, v);
#pragma GCC unroll 4
  for (int half = kWidth<T> / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}
template <class T>
FP_INLINE bool any_lane(MaskVec<T> m) {
#if FP_VECTOR_BYTES == 64
  return _mm512_test_epi64_mask((__m512i)m, (__m512i)m) != 0;
#elif FP_VECTOR_BYTES == 32
  return !_mm256_testz_si256((__m256i)m, (__m256i)m);
#else
  int64_t words[FP_VECTOR_BYTES / 8];
  __builtin_memcpy(words, &m, sizeof m);
  int64_t any = 0;
  for (int64_t word : words) any |= word;
  return any != 0;
#endif
}
// Comparisons with NaN are false, so NaN in `v` stays.
template <class V>
FP_INLINE V at_least(V v, V low) {
  return v < low ? low : v;
}

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float magic = 12582912.0f, lowest = -87.0f;  // 1.5 * 2^23
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f, log2e = 1.44269504088896341f;
  static constexpr int mantissa = 23, bias = 127;
};
template <>
struct ExpConstants<double> {
  static constexpr double magic = 6755399441055744.0, lowest = -708.0;  // 1.5 * 2^52
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
  static constexpr double log2e = 1.4426950408889634073599;
  static constexpr int mantissa = 52, bias = 1023;
};
FP_INLINE Vec<float> exp_polynomial(Vec<float> r) {  // minimax on |r| <= ln(2) / 2 (Cephes expf)
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
}
FP_INLINE Vec<double> exp_polynomial(Vec<double> r) {  // Taylor; the next term is below 5e-18
  Vec<double> p = broadcast(1.0 / 6227020800.0);
  constexpr double inverse_factorials[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
      1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  for (double c : inverse_factorials) p = p * r + c;
  return p;
}
// exp of v <= about 80; 0 below `lowest`, NaN for NaN.
template <class T>
FP_INLINE Vec<T> exp_lanes(Vec<T> v) {
  using C = ExpConstants<T>;
  const Vec<T> x = at_least(v, broadcast(C::lowest));
  const Vec<T> shifted = x * C::log2e + C::magic;
  const Vec<T> n = shifted - C::magic;
  const Vec<T> r = (x - n * C::ln2_high) - n * C::ln2_low;
  const MaskVec<T> power = (vec_to_bits<T>(shifted) + Lane<T>(C::bias)) << C::mantissa;
  const Vec<T> e = exp_polynomial(r) * bits_to_vec<T>(power);
  return bits_to_vec<T>(vec_to_bits<T>(e) & ~MaskVec<T>(v < C::lowest));
}
// log(1 + u), u in [0, 1]: 2 artanh(u / (2 + u)).
template <class T>
FP_INLINE Vec<T> log1p_unit(Vec<T> u) {
  constexpr int terms = sizeof(T) == 4 ? 7 : 17;
  const Vec<T> s = u / (u + T(2));
  const Vec<T> q = s * s;
  Vec<T> p = broadcast(T(1) / T(2 * terms + 1));
  for (int k = terms - 1; k >= 0; --k) p = p * q + T(1) / T(2 * k + 1);
  return (s + s) * p;
}
// tanh(x) for |x| < 0.625 (Cephes), and garbage beyond; q: x * x.
FP_INLINE Vec<float> tanh_polynomial(Vec<float> x, Vec<float> q) {
  Vec<float> p = broadcast(-5.70498872745e-3f);
  p = p * q + 2.06390887954e-2f;
  p = p * q - 5.37397155531e-2f;
  p = p * q + 1.33314422036e-1f;
  p = p * q - 3.33332819422e-1f;
  return x + x * q * p;
}
FP_INLINE Vec<double> tanh_polynomial(Vec<double> x, Vec<double> q) {
  const Vec<double> p = (q * -9.64399179425052238628e-1 - 9.92877231001918586564e1) * q - 1.61468768441708447952e3;
  const Vec<double> r = ((q + 1.12811678491632931402e2) * q + 2.23548839060100448583e3) * q + 4.84406305325125486048e3;
  return x + x * q * p / r;
}
// tanh(x) with full relative accuracy; u: e^(-2 |x|).
template <class T>
FP_INLINE Vec<T> tanh_lanes(Vec<T> x, Vec<T> u) {
  const Vec<T> large = T(1) - (u + u) / (u + T(1));
  return (x < 0 ? -x : x) < T(0.625) ? tanh_polynomial(x, x * x) : x < 0 ? -large : large;
}
template <class T>
FP_INLINE Vec<T> sqrt_lanes(Vec<T> v) {
  for (int l = 0; l < kWidth<T>; ++l) v[l] = __builtin_sqrt(v[l]);
  return v;
}

// What scores.h asks for, on vectors of T.
template <class T>
struct VectorMath {
  using V = Vec<T>;
  static FP_INLINE V positive_part(V z) { return at_least(z, V{}); }
  static FP_INLINE V positive_step(V z) { return z <= 0 ? V{} : broadcast(T(1)); }
  static FP_INLINE ValueSlope<V> softplus_logistic(V z) {
    const V u = exp_lanes<T>(z < 0 ? z : -z);
    const V inverse = T(1) / (u + T(1));
    return {positive_part(z) + log1p_unit<T>(u), z < 0 ? u * inverse : inverse};
  }
  static FP_INLINE ValueSlope<V> tanh_slope(V x) {
    const V u = exp_lanes<T>(T(-2) * (x < 0 ? -x : x)), inverse = T(1) / (u + T(1));
    return {tanh_lanes<T>(x, u), T(4) * u * inverse * inverse};
  }
  static FP_INLINE ValueSlope<V> log_cosh_tanh(V z) {
    const V size = z < 0 ? -z : z, u = exp_lanes<T>(T(-2) * size), t = tanh_lanes<T>(z, u), q = t * t;
    // log(1 + sinh^2) / 2 near 0, where the other form cancels
    const V log = log1p_unit<T>(size < T(0.625) ? q / (T(1) - q) : u);
    return {size < T(0.625) ? T(0.5) * log : (size - T(0.693147180559945309)) + log, t};
  }
};
