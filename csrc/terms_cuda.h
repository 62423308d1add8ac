// z and its score over a strip, and the pairs that a term keeps, with the rows or the columns as owners.
#pragma once

#include "scores.h"
#include "strip_cuda.h"

namespace flashpair {

// What scores.h asks for.
template <class T>
struct DeviceMath {
  static FP_DEVICE T positive_part(T z) { return z < 0 ? T(0) : z; }
  static FP_DEVICE T positive_step(T z) { return z <= 0 ? T(0) : T(1); }
  static FP_DEVICE common::ValueSlope<T> softplus_logistic(T z) {
    const T u = exp_of(z < 0 ? z : -z), inverse = T(1) / (u + T(1));
    return {positive_part(z) + log1p_of(u), z < 0 ? u * inverse : inverse};
  }
  static FP_DEVICE common::ValueSlope<T> tanh_slope(T x) {
    const T u = exp_of(T(-2) * absolute(x)), inverse = T(1) / (u + T(1));
    return {tanh_of(x), T(4) * u * inverse * inverse};
  }
  static FP_DEVICE common::ValueSlope<T> log_cosh_tanh(T z) {
    const T t = tanh_of(z), q = t * t, size = absolute(z);
    // log(1 + sinh^2) / 2 near 0, where the other form cancels
    if (size < T(0.625)) return {T(0.5) * log1p_of(q / (T(1) - q)), t};
    return {(size - T(0.693147180559945309)) + log1p_of(exp_of(T(-2) * size)), t};
  }
};

// Owners along the rows or the columns of a strip: how many values a lane holds and which belongs to a pair.
template <int R, bool ROWS>
struct Side {
  static constexpr int kCount = ROWS ? R : kVector;
  static FP_DEVICE int of(int r, int v) { return ROWS ? r : v; }
};

template <class T, int R, bool ROWS>
FP_DEVICE void along(const T* data, const Strip<T, R>& strip, T (&out)[Side<R, ROWS>::kCount]) {
  if constexpr (ROWS)
    along_rows(data, strip.row, out);
  else
    along_columns(data, strip.column, out);
}

template <class T, int R, bool ROWS>
FP_DEVICE void along(const Value<T>& value, const Strip<T, R>& strip, T (&out)[Side<R, ROWS>::kCount]) {
  if (value.data && value.stride) return along<T, R, ROWS>(value.data, strip, out);
  const T number = value.data ? value.data[0] : value.number;
  FP_UNROLL
  for (int k = 0; k < Side<R, ROWS>::kCount; ++k) out[k] = number;
}

// log(e^p + e^q); infinities pass.
template <class T>
FP_DEVICE T logaddexp(T p, T q) {
  const T e = p == q ? T(1) : exp_of(-absolute(p - q));
  return (p > q ? p : q) + log1p_of(e);
}
// Its derivative by p.
template <class T>
FP_DEVICE T logaddexp_share(T p, T q) {
  return p == q ? T(0.5) : T(1) / (T(1) + exp_of(q - p));
}

// Second products of a strip; rows and columns beyond the panel get any of its numbers.
template <class T, int R>
FP_DEVICE void guide_of(const Pass<T>& pass, const Strip<T, R>& strip, T (&out)[R][kVector]) {
  const int from = strip.column - pass.first_n;
  FP_UNROLL
  for (int r = 0; r < R; ++r) {
    const int i = strip.row + r < pass.end_b ? strip.row + r : pass.end_b - 1;
    if (from < pass.guide_stride)
      load4(out[r], pass.guide + int64_t(i - pass.first_b) * pass.guide_stride + from);
    else
      FP_UNROLL
    for (int v = 0; v < kVector; ++v) out[r][v] = 0;
  }
}

// Times the second product, where that is a weight.
template <class T, int R>
FP_DEVICE void weigh(const Pass<T>& pass, const TermCode<T>& term, const Strip<T, R>& strip, T (&value)[R][kVector]) {
  if (term.guide != Guide::weight) return;
  T t[R][kVector];
  guide_of(pass, strip, t);
  FP_EACH_PAIR(R) value[r][v] *= t[r][v];
}

template <Score S, class T, int R, bool SLOPE>
FP_DEVICE void score_pairs(T constant, T (&value)[R][kVector], T (&slope)[R][kVector]) {
  FP_EACH_PAIR(R) {
    const auto both = common::score_value_slope<S, DeviceMath<T>>(value[r][v], constant);
    value[r][v] = both.value;
    if (SLOPE) slope[r][v] = both.slope;
  }
}

// score(z), and its slope, of every pair.
template <class T, int R, bool ROWS, bool SLOPE>
FP_DEVICE void evaluate(const Pass<T>& pass, const TermCode<T>& term, const Strip<T, R>& strip, T (&value)[R][kVector],
                        T (&slope)[R][kVector]) {
  using Own = Side<R, ROWS>;
  using Other = Side<R, !ROWS>;
  T scale[Own::kCount], offset[Own::kCount];
  along<T, R, ROWS>(term.scale, strip, scale);
  along<T, R, ROWS>(term.offset, strip, offset);
  if (term.guide == Guide::logits)
    guide_of(pass, strip, value);
  else
    FP_EACH_PAIR(R) value[r][v] = strip.s[r][v];
  if (!term.other_offset) {
    FP_EACH_PAIR(R) value[r][v] = scale[Own::of(r, v)] * value[r][v] + offset[Own::of(r, v)];
  } else {
    T other[Other::kCount];
    along<T, R, !ROWS>(term.other_offset, strip, other);
    if (term.logaddexp) {
      FP_EACH_PAIR(R)
      value[r][v] = scale[Own::of(r, v)] * value[r][v] + logaddexp(offset[Own::of(r, v)], other[Other::of(r, v)]);
    } else {
      FP_EACH_PAIR(R)
      value[r][v] = scale[Own::of(r, v)] * value[r][v] + (offset[Own::of(r, v)] + other[Other::of(r, v)]);
    }
  }
#define FP_CASE(NAME) \
  case Score::NAME: return score_pairs<Score::NAME, T, R, SLOPE>(term.constant, value, slope);
  switch (term.score) {
    FP_CASE(identity)
    FP_CASE(hinge)
    FP_CASE(softplus)
    FP_CASE(square)
    FP_CASE(squared_hinge)
    FP_CASE(circle)
    FP_CASE(softcap)
    FP_CASE(log_cosh)
  }
#undef FP_CASE
}

FP_DEVICE bool is_softmax(Reduction reduction) {
  return reduction == Reduction::logsumexp || reduction == Reduction::softmax_mean;
}

// The pairs that a term keeps for its owners. A NaN passes every threshold; weight 0 is no part of a softmax.
template <class T, int R, bool ROWS>
FP_DEVICE unsigned keep_bits(const Pass<T>& pass, const TermCode<T>& term, const Strip<T, R>& strip) {
  using Own = Side<R, ROWS>;
  using Other = Side<R, !ROWS>;
  unsigned bits = mask_bits(pass, strip, term.mask, pass.symmetric && ROWS == term.owns_columns);
  const bool weighed = term.guide == Guide::weight && is_softmax(term.reduction);
  T compared[R][kVector];
  FP_EACH_PAIR(R) compared[r][v] = strip.s[r][v];
  if (term.guide == Guide::threshold || weighed) guide_of(pass, strip, compared);
  if (weighed) {
    FP_EACH_PAIR(R) if (compared[r][v] <= 0) bits &= ~(1u << (r * kVector + v));
    FP_EACH_PAIR(R) compared[r][v] = strip.s[r][v];
  }
  if (term.has_above) {
    T bound[Own::kCount];
    along<T, R, ROWS>(term.above, strip, bound);
    FP_EACH_PAIR(R) if (compared[r][v] <= bound[Own::of(r, v)]) bits &= ~(1u << (r * kVector + v));
  }
  if (term.has_below) {
    T bound[Own::kCount];
    along<T, R, ROWS>(term.below, strip, bound);
    FP_EACH_PAIR(R) if (compared[r][v] >= bound[Own::of(r, v)]) bits &= ~(1u << (r * kVector + v));
  }
  if (term.weight && is_softmax(term.reduction)) {
    T weight[Other::kCount];
    along<T, R, !ROWS>(term.weight, strip, weight);
    FP_EACH_PAIR(R) if (weight[Other::of(r, v)] == 0) bits &= ~(1u << (r * kVector + v));
  }
  return bits;
}

// Exponents of a softmax: log(weight) is added.
template <class T, int R, bool ROWS>
FP_DEVICE void add_log_weight(const Pass<T>& pass, const TermCode<T>& term, const Strip<T, R>& strip,
                              T (&value)[R][kVector]) {
  if (term.guide == Guide::weight) {
    T t[R][kVector];
    guide_of(pass, strip, t);
    FP_EACH_PAIR(R) value[r][v] += log_of(t[r][v]);
  }
  if (!term.weight) return;
  using Other = Side<R, !ROWS>;
  T weight[Other::kCount];
  along<T, R, !ROWS>(term.weight, strip, weight);
  FP_UNROLL
  for (int k = 0; k < Other::kCount; ++k) weight[k] = log_of(weight[k]);
  FP_EACH_PAIR(R) value[r][v] += weight[Other::of(r, v)];
}

}  // namespace flashpair
