#include "oracle.h"

#include <algorithm>
#include <cmath>

namespace oracle {
namespace {

Wide positive(Wide z) { return z < 0 ? Wide(0) : z; }

Wide log_cosh(Wide z) {
  if (std::fabs(z) < 1) return std::log1p(std::sinh(z) * std::sinh(z)) / 2;
  return std::fabs(z) + std::log1p(std::exp(-2 * std::fabs(z))) - std::log(Wide(2));
}

struct ScoreAt {
  Wide value, slope;
};

ScoreAt score_at(Score score, Wide z, Wide c) {
  switch (score) {
    case Score::identity: return {z, 1};
    case Score::hinge: return {positive(z), Wide(z > 0)};
    case Score::softplus: return {positive(z) + std::log1p(std::exp(-std::fabs(z))), 1 / (1 + std::exp(-z))};
    case Score::square: return {z * z, 2 * z};
    case Score::squared_hinge: return {positive(z) * positive(z), 2 * positive(z)};
    case Score::circle: return {positive(z + c) * (z - c), positive(z + c)};
    case Score::softcap: return {c * std::tanh(z / c), 1 / std::pow(std::cosh(z / c), 2)};
    case Score::log_cosh: return {log_cosh(z), std::tanh(z)};
  }
  return {};
}

// One pair as a term sees it.
struct View {
  bool kept = false;
  Wide s = 0, f = 0, slope = 0, share = 1, weight = 1;  // share: of the owner's offset in the combined one
};

template <class T>
View view(const Pairs<T>& pairs, const Term<T>& term, int64_t owner, int64_t other) {
  const bool rows = term.axis == Axis::rows;
  const int64_t i = rows ? owner : other, j = rows ? other : owner;
  View v;
  v.s = pairs.s[i * pairs.problem.columns + j];
  v.kept = pairs.keeps(term.mask, i, j);
  v.kept &= !(term.has_above && v.s <= Wide(term.above.at(owner)));
  v.kept &= !(term.has_below && v.s >= Wide(term.below.at(owner)));
  if (term.weight) v.weight = term.weight[other];
  const bool softmax = term.reduction == Reduction::logsumexp || term.reduction == Reduction::softmax_mean;
  if (softmax && v.weight == 0) v.kept = false;
  Wide offset = term.offset.at(owner);
  if (term.other_offset) {
    const Wide q = term.other_offset[other];
    if (term.combine == Combine::add) {
      offset += q;
    } else {
      const Wide top = std::max(offset, q), sum = std::exp(offset - top) + std::exp(q - top);
      v.share = std::exp(offset - top) / sum;
      offset = top + std::log(sum);
    }
  }
  const ScoreAt at = score_at(term.score, Wide(term.scale.at(owner)) * v.s + offset, term.constant);
  v.f = at.value, v.slope = at.slope;
  return v;
}

}  // namespace

template <class T>
Pairs<T>::Pairs(const Problem<T>& p) : problem(p) {
  prepare(p.x, p.rows, x, norm_x);
  prepare(p.self ? p.x : p.y, p.columns, y, norm_y);
  s.resize(p.rows * p.columns);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.columns; ++j) s[i * p.columns + j] = similarity(i, j);
}

template <class T>
bool Pairs<T>::keeps(Mask mask, int64_t i, int64_t j) const {
  const Problem<T>& p = problem;
  if (p.exclude_self && i == j) return false;
  if (p.exclude && p.exclude[i] == j) return false;
  const int64_t* others = p.self ? p.labels : p.ref_labels;
  switch (mask) {
    case Mask::all: return true;
    case Mask::same: return p.labels[i] == others[j];
    case Mask::different: return p.labels[i] != others[j];
    case Mask::given: return p.pair_mask[i * p.columns + j];
    case Mask::not_given: return !p.pair_mask[i * p.columns + j];
  }
  return false;
}

template <class T>
void Pairs<T>::prepare(const T* input, int64_t count, Values& out, Values& norms) const {
  const int64_t depth = problem.features;
  out.assign(input, input + count * depth);
  norms.assign(count, 1);
  if (!problem.normalize) return;
  for (int64_t i = 0; i < count; ++i) {
    Wide square = 0;
    for (int64_t d = 0; d < depth; ++d) square += out[i * depth + d] * out[i * depth + d];
    norms[i] = std::max(std::sqrt(square), Wide(1e-12));
    for (int64_t d = 0; d < depth; ++d) out[i * depth + d] /= norms[i];
  }
}

template <class T>
Wide Pairs<T>::similarity(int64_t i, int64_t j) const {
  const int64_t depth = problem.features;
  Wide dot = 0, square = 0;
  for (int64_t d = 0; d < depth; ++d) {
    const Wide a = x[i * depth + d], b = y[j * depth + d];
    dot += a * b, square += (a - b) * (a - b);
  }
  if (problem.similarity == Similarity::dot) return dot;
  return problem.similarity == Similarity::euclidean ? std::sqrt(square) : square;
}

template <class T>
Values statistics(const Pairs<T>& pairs, const Term<T>& term) {
  const int64_t count = owners(pairs.problem, term), length = others(pairs.problem, term);
  Values out(slots(term.reduction) * count);
  for (int64_t i = 0; i < count; ++i) {
    std::vector<View> kept;
    for (int64_t j = 0; j < length; ++j) {
      const View v = view(pairs, term, i, j);
      if (v.kept) kept.push_back(v);
    }
    Wide sum = 0, number = 0, top = -INFINITY, total = 0, mean = 0, plain = 0, squares = 0, low = INFINITY,
         high = -INFINITY;
    for (const View& v : kept) {
      sum += v.weight * v.f, number += !(v.f <= 0), plain += v.s;
      top = std::max(top, v.f), low = std::min(low, v.s), high = std::max(high, v.s);
    }
    const Wide n = Wide(kept.size()), average = kept.empty() ? 0 : plain / n;
    for (const View& v : kept) {
      const Wide e = v.weight * std::exp(v.f - top);
      total += e, mean += e * v.s, squares += (v.s - average) * (v.s - average);
    }
    const Wide lse = kept.empty() ? -Wide(INFINITY) : top + std::log(total);
    auto put = [&](int slot, Wide value) { out[slot * count + i] = value; };
    switch (term.reduction) {
      case Reduction::sum: put(0, sum); break;
      case Reduction::count: put(0, number); break;
      case Reduction::logsumexp: put(0, lse); break;
      case Reduction::softmax_mean: put(0, kept.empty() ? 0 : mean / total), put(1, lse); break;
      case Reduction::moments:
        put(0, n), put(1, average), put(2, kept.empty() ? 0 : squares / n), put(3, low), put(4, high);
        break;
      case Reduction::max: put(0, top); break;
    }
  }
  return out;
}

template <class T>
Gradients gradients(const Pairs<T>& pairs, const std::vector<Values>& known, const std::vector<Values>& cotangents) {
  const Problem<T>& p = pairs.problem;
  const int64_t depth = p.features;
  Gradients out;
  Values w(p.rows * p.columns);
  for (size_t t = 0; t < p.terms.size(); ++t) {
    const Term<T>& term = p.terms[t];
    const int64_t count = owners(p, term), length = others(p, term);
    Values dscale(count), doffset(count), dother(length), dweight(length);
    const bool mean = term.reduction == Reduction::softmax_mean,
               softmax = mean || term.reduction == Reduction::logsumexp;
    const bool differentiable = softmax || term.reduction == Reduction::sum;
    for (int64_t i = 0; i < count && differentiable; ++i)
      for (int64_t j = 0; j < length; ++j) {
        const View v = view(pairs, term, i, j);
        if (!v.kept) continue;
        const Wide g = cotangents[t][i];
        const Wide share = softmax ? std::exp(v.f - known[t][mean ? count + i : i]) : 1;  // without the weight
        const Wide part = !mean ? 1 : term.detach_weights ? 0 : v.s - known[t][i];
        const Wide dz = g * v.weight * share * part * v.slope;
        const int64_t at = term.axis == Axis::rows ? i * p.columns + j : j * p.columns + i;
        w[at] += dz * Wide(term.scale.at(i)) + (mean ? g * v.weight * share : 0);
        dscale[i] += dz * v.s, doffset[i] += dz * v.share, dother[j] += dz * (1 - v.share);
        if (term.combine == Combine::add) dother[j] += dz * v.share;
        dweight[j] += g * (softmax ? share * part : v.f);
        out.total += v.weight * v.f;
      }
    out.dscale.push_back(dscale), out.doffset.push_back(doffset);
    out.dother.push_back(dother), out.dweight.push_back(dweight);
  }
  Values dx(p.rows * depth), dy(p.columns * depth);
  for (int64_t i = 0; i < p.rows; ++i)
    for (int64_t j = 0; j < p.columns; ++j) {
      Wide g = w[i * p.columns + j];
      const Wide s = pairs.s[i * p.columns + j];
      if (p.similarity == Similarity::euclidean) g = s == 0 ? 0 : g / (2 * s);
      for (int64_t d = 0; d < depth; ++d) {
        const Wide a = pairs.x[i * depth + d], b = pairs.y[j * depth + d];
        if (p.similarity == Similarity::dot)
          dx[i * depth + d] += g * b, dy[j * depth + d] += g * a;
        else
          dx[i * depth + d] += 2 * g * (a - b), dy[j * depth + d] += 2 * g * (b - a);
      }
    }
  if (p.self)
    for (size_t k = 0; k < dx.size(); ++k) dx[k] += dy[k];
  auto through_norm = [&](Values& g, const Values& unit, const Values& norms) {
    if (!p.normalize) return;
    for (size_t i = 0; i < norms.size(); ++i) {
      Wide along = 0;
      for (int64_t d = 0; d < depth; ++d) along += g[i * depth + d] * unit[i * depth + d];
      for (int64_t d = 0; d < depth; ++d)
        g[i * depth + d] = (g[i * depth + d] - along * unit[i * depth + d]) / norms[i];
    }
  };
  through_norm(dx, pairs.x, pairs.norm_x);
  through_norm(dy, pairs.y, pairs.norm_y);
  out.dx = dx, out.dy = dy;
  return out;
}

template <class T>
Found extremes(const Pairs<T>& pairs, const Extreme<T>& extreme) {
  const Problem<T>& p = pairs.problem;
  Found out;
  for (int64_t i = 0; i < p.rows; ++i) {
    std::vector<int64_t> kept;
    for (int64_t j = 0; j < p.columns; ++j) {
      const Wide s = pairs.s[i * p.columns + j];
      if (pairs.keeps(extreme.mask, i, j) && !(extreme.has_above && s <= Wide(extreme.above.at(i))) &&
          !(extreme.has_below && s >= Wide(extreme.below.at(i))))
        kept.push_back(j);
    }
    std::stable_sort(kept.begin(), kept.end(), [&](int64_t a, int64_t b) {
      const Wide left = pairs.s[i * p.columns + a], right = pairs.s[i * p.columns + b];
      return extreme.largest ? left > right : left < right;
    });
    for (int q = 0; q < extreme.k; ++q) {
      const bool there = q < int(kept.size());
      out.indices.push_back(there ? kept[q] : -1);
      out.values.push_back(there ? pairs.s[i * p.columns + kept[q]] : Wide(extreme.largest ? -INFINITY : INFINITY));
    }
  }
  return out;
}

#define FP_INSTANCE(T)                                                                                   \
  template struct Pairs<T>;                                                                              \
  template Values statistics(const Pairs<T>&, const Term<T>&);                                           \
  template Gradients gradients(const Pairs<T>&, const std::vector<Values>&, const std::vector<Values>&); \
  template Found extremes(const Pairs<T>&, const Extreme<T>&);
FP_INSTANCE(float)
FP_INSTANCE(double)
#undef FP_INSTANCE

}  // namespace oracle
