// First pass: row and column statistics of a panel, one partial per tile.

#include "collect_cuda.h"
#include "engine_cuda.h"
#include "terms_cuda.h"
#include "tile_cuda.h"

namespace flashpair {
namespace {

using common::state_merge;

// Widest range of exponents that may share one offset: what is then flushed is below exp(-43) of every kept sum.
constexpr float kSharedRange = 44;

template <class T>
FP_DEVICE T finite_or_zero(T m) {
  return absolute(m) == infinity<T>() ? T(0) : m;
}

// The smaller or larger where NaN wins.
struct LowestOrNan {
  template <class T>
  FP_DEVICE T operator()(T a, T b) const {
    return b >= a || is_nan(a) ? a : b;
  }
};
struct HighestOrNan {
  template <class T>
  FP_DEVICE T operator()(T a, T b) const {
    return b <= a || is_nan(a) ? a : b;
  }
};

// Reduces entry(r, v) of the kept pairs over the other side within a lane.
template <class T, int R, bool ROWS, class Entry, class Op>
FP_DEVICE void within_lane(Entry entry, unsigned bits, T neutral, Op op, T (&out)[Side<R, ROWS>::kCount]) {
  FP_UNROLL
  for (int k = 0; k < Side<R, ROWS>::kCount; ++k) out[k] = neutral;
  FP_EACH_PAIR(R) {
    T& into = out[Side<R, ROWS>::of(r, v)];
    into = op(into, has_bit(bits, r, v) ? entry(r, v) : neutral);
  }
}

// The same over the whole strip; of rows, out[0] is that of this lane's row.
template <class T, int R, bool ROWS, class Entry, class Op>
FP_DEVICE void reduce_pairs(Entry entry, unsigned bits, T neutral, Op op, T (&out)[Side<R, ROWS>::kCount]) {
  within_lane<T, R, ROWS>(entry, bits, neutral, op, out);
  if constexpr (ROWS) out[0] = over_columns(out, op);
}

template <class T, int R, bool ROWS>
FP_DEVICE void collect_reduced(const Collector<T>& to, const Strip<T, R>& strip, int slot, int component,
                               const T (&reduced)[Side<R, ROWS>::kCount]) {
  if constexpr (ROWS)
    to.template row<R>(slot + component, strip.row, reduced[0]);
  else
    to.column(component, reduced);
}

template <class T, int R, bool ROWS, class Entry>
FP_DEVICE void collect_sums(const Collector<T>& to, const Strip<T, R>& strip, int slot, int component, Entry entry,
                            unsigned bits) {
  T sums[Side<R, ROWS>::kCount];
  reduce_pairs<T, R, ROWS>(entry, bits, T(0), Add{}, sums);
  collect_reduced<T, R, ROWS>(to, strip, slot, component, sums);
}

// Sum of w times the score.
template <class T, int R, bool ROWS>
FP_DEVICE void collect_weighted(const Collector<T>& to, const Strip<T, R>& strip, const TermCode<T>& term,
                                const T (&score)[R][kVector], unsigned bits) {
  if (!term.weight)
    return collect_sums<T, R, ROWS>(to, strip, term.slot, 0, [&](int r, int v) { return score[r][v]; }, bits);
  T weight[Side<R, !ROWS>::kCount];
  along<T, R, !ROWS>(term.weight, strip, weight);
  collect_sums<T, R, ROWS>(
      to, strip, term.slot, 0, [&](int r, int v) { return score[r][v] * weight[Side<R, !ROWS>::of(r, v)]; }, bits);
}

// An offset of the exponents and whether it serves all owners of the strip; then p = e^(exponent - shift) is filled in.
template <class T>
struct Shift {
  bool common;
  T value;
};
template <class T, int R>
FP_DEVICE Shift<T> common_shift(const T (&exponent)[R][kVector], unsigned bits, T (&p)[R][kVector]) {
  T top = -infinity<T>(), bottom = infinity<T>();
  FP_EACH_PAIR(R) {
    top = larger(top, has_bit(bits, r, v) ? exponent[r][v] : top);
    bottom = smaller(bottom, has_bit(bits, r, v) ? exponent[r][v] : bottom);
  }
  top = over_lanes(top, Larger{}), bottom = over_lanes(bottom, Smaller{});
  const Shift<T> shift = {top - bottom <= T(kSharedRange), finite_or_zero(top)};
  if (shift.common) FP_EACH_PAIR(R) p[r][v] = exp_of(exponent[r][v] - shift.value);
  return shift;
}

// (shift, mass) and, for a softmax mean, the sum of p s. Without a common shift each owner takes its own maximum.
template <class T, int R, bool ROWS>
FP_DEVICE void collect_exponentials(const Collector<T>& to, const Strip<T, R>& strip, const TermCode<T>& term,
                                    const T (&exponent)[R][kVector], unsigned bits, Shift<T> shift,
                                    T (&p)[R][kVector]) {
  using Own = Side<R, ROWS>;
  T shifts[Own::kCount];
  FP_UNROLL
  for (int k = 0; k < Own::kCount; ++k) shifts[k] = shift.value;
  if (!shift.common) {
    within_lane<T, R, ROWS>([&](int r, int v) { return exponent[r][v]; }, bits, -infinity<T>(), Larger{}, shifts);
    FP_UNROLL
    for (int k = 0; k < Own::kCount; ++k) {
      if (ROWS) shifts[k] = over_lanes(shifts[k], Larger{});
      shifts[k] = finite_or_zero(shifts[k]);
    }
    FP_EACH_PAIR(R) p[r][v] = exp_of(exponent[r][v] - shifts[Own::of(r, v)]);
  }
  if constexpr (ROWS) shifts[0] = over_columns(shifts, Larger{});
  collect_reduced<T, R, ROWS>(to, strip, term.slot, 0, shifts);
  collect_sums<T, R, ROWS>(to, strip, term.slot, 1, [&](int r, int v) { return p[r][v]; }, bits);
  if (term.reduction == Reduction::softmax_mean)
    collect_sums<T, R, ROWS>(to, strip, term.slot, 2, [&](int r, int v) { return p[r][v] * strip.s[r][v]; }, bits);
}

// (count, mean, sum of squared deviations, min, max). The sums are taken about the mean of what the strip keeps, so that
// those of squares do not cancel.
template <class T, int R, bool ROWS>
FP_DEVICE void collect_moments(const Collector<T>& to, const Strip<T, R>& strip, int slot, unsigned bits) {
  constexpr int count = Side<R, ROWS>::kCount;
  T total = 0, kept = 0;
  FP_EACH_PAIR(R) {
    total += has_bit(bits, r, v) ? strip.s[r][v] : T(0);
    kept += has_bit(bits, r, v) ? T(1) : T(0);
  }
  total = over_lanes(total, Add{}), kept = over_lanes(kept, Add{});
  T pivot = kept == 0 ? T(0) : total / kept;
  pivot = is_nan(pivot) ? T(0) : finite_or_zero(pivot);
  T n[count], mean[count], spread[count];
  reduce_pairs<T, R, ROWS>([&](int r, int v) { return strip.s[r][v]; }, bits, infinity<T>(), LowestOrNan{}, mean);
  collect_reduced<T, R, ROWS>(to, strip, slot, 3, mean);
  reduce_pairs<T, R, ROWS>([&](int r, int v) { return strip.s[r][v]; }, bits, -infinity<T>(), HighestOrNan{}, mean);
  collect_reduced<T, R, ROWS>(to, strip, slot, 4, mean);
  reduce_pairs<T, R, ROWS>([&](int, int) { return T(1); }, bits, T(0), Add{}, n);
  collect_reduced<T, R, ROWS>(to, strip, slot, 0, n);
  reduce_pairs<T, R, ROWS>([&](int r, int v) { return strip.s[r][v] - pivot; }, bits, T(0), Add{}, mean);
  reduce_pairs<T, R, ROWS>([&](int r, int v) { return (strip.s[r][v] - pivot) * (strip.s[r][v] - pivot); }, bits, T(0),
                           Add{}, spread);
  FP_UNROLL
  for (int k = 0; k < (ROWS ? 1 : count); ++k) {
    const T offset = n[k] == 0 ? T(0) : mean[k] / n[k], rest = spread[k] - mean[k] * offset;
    mean[k] = n[k] == 0 ? T(0) : pivot + offset, spread[k] = rest < 0 ? T(0) : rest;
  }
  collect_reduced<T, R, ROWS>(to, strip, slot, 1, mean);
  collect_reduced<T, R, ROWS>(to, strip, slot, 2, spread);
}

template <class T>
FP_DEVICE void merge_moments(T (&state)[5], const T (&next)[5]) {
  if (next[0] == 0) return;
  const T n = state[0] + next[0], share = next[0] / n, difference = next[1] - state[1];
  state[2] += next[2] + (state[0] == 0 ? T(0) : difference * difference * state[0] * share);
  state[1] = state[0] == 0 ? next[1] : state[1] + difference * share;
  state[0] = n;
  state[3] = LowestOrNan{}(state[3], next[3]), state[4] = HighestOrNan{}(state[4], next[4]);
}

template <class T, int R, bool ROWS>
FP_DEVICE void collect_max(const Collector<T>& to, const Strip<T, R>& strip, int slot, const T (&score)[R][kVector],
                           unsigned bits) {
  T highest[Side<R, ROWS>::kCount];
  reduce_pairs<T, R, ROWS>([&](int r, int v) { return score[r][v]; }, bits, -infinity<T>(), HighestOrNan{}, highest);
  collect_reduced<T, R, ROWS>(to, strip, slot, 0, highest);
}

// The partials of one side of an item.
template <class T, int R, bool ROWS>
FP_DEVICE void collect_side(const Collector<T>& to, const Strip<T, R>& strip, const TermCode<T>& term,
                            const T (&score)[R][kVector], unsigned bits, Shift<T> shift, T (&p)[R][kVector]) {
  switch (term.reduction) {
    case Reduction::sum: return collect_weighted<T, R, ROWS>(to, strip, term, score, bits);
    case Reduction::count:
      return collect_sums<T, R, ROWS>(
          to, strip, term.slot, 0, [&](int r, int v) { return score[r][v] <= 0 ? T(0) : T(1); }, bits);
    case Reduction::logsumexp:
    case Reduction::softmax_mean: return collect_exponentials<T, R, ROWS>(to, strip, term, score, bits, shift, p);
    case Reduction::moments: return collect_moments<T, R, ROWS>(to, strip, term.slot, bits);
    case Reduction::max: return collect_max<T, R, ROWS>(to, strip, term.slot, score, bits);
  }
}

// The scores of a term, for a softmax the exponents with an offset for the kept pairs.
template <class T, int R, bool ROWS>
FP_DEVICE Shift<T> prepare_side(const Pass<T>& pass, const TermCode<T>& term, const Strip<T, R>& strip, unsigned bits,
                                T (&score)[R][kVector], T (&p)[R][kVector]) {
  if (term.reduction == Reduction::moments) return {};
  evaluate<T, R, ROWS, false>(pass, term, strip, score, p);
  if (!is_softmax(term.reduction)) {
    if (term.reduction == Reduction::sum) weigh(pass, term, strip, score);
    return {};
  }
  add_log_weight<T, R, ROWS>(pass, term, strip, score);
  return common_shift(score, bits, p);
}

// Where rows and columns share z they share its score and, where its range permits, one exponential.
template <class T, int R>
FP_DEVICE void collect_item(const Pass<T>& pass, Item item, const Strip<T, R>& strip, const Collector<T>& to) {
  T score[R][kVector], p[R][kVector];
  Shift<T> shift{};
  unsigned column_bits = 0;
  if (item.column >= 0) column_bits = keep_bits<T, R, false>(pass, pass.terms[item.column], strip);
  if (item.row >= 0) {
    const TermCode<T>& term = pass.terms[item.row];
    const unsigned bits = keep_bits<T, R, true>(pass, term, strip);
    shift = prepare_side<T, R, true>(pass, term, strip, item.shared ? bits | column_bits : bits, score, p);
    collect_side<T, R, true>(to, strip, term, score, bits, shift, p);
  }
  if (item.column >= 0) {
    const TermCode<T>& term = pass.terms[item.column];
    if (!item.shared) shift = prepare_side<T, R, false>(pass, term, strip, column_bits, score, p);
    collect_side<T, R, false>(to, strip, term, score, column_bits, shift, p);
  }
}

// A term's statistics of the tile's columns: `totals` (components, kTileColumns) gathers the strips, each column by one
// thread, and is written after the last.
template <class T>
FP_DEVICE void merge_columns(const Collector<T>& to, const TermCode<T>& term, T* totals, bool first, bool last) {
  constexpr int most = 5;
  sync_block();
  const int column = thread_index(), j = to.tile_column + column, components = partial_components(term.reduction);
  if (column < kTileColumns) {
    T state[most] = {}, next[most] = {};  // the origin of a softmax mean, which `state_merge` knows, is 0 here
    FP_UNROLL
    for (int k = 0; k < most; ++k)
      if (k < components) state[k] = first ? to.of_warp(k, 0, column) : totals[k * kTileColumns + column];
    for (int warp = first; warp < kWarps; ++warp) {
      FP_UNROLL
      for (int k = 0; k < most; ++k)
        if (k < components) next[k] = to.of_warp(k, warp, column);
      if (term.reduction == Reduction::moments)
        merge_moments(state, next);
      else
        state_merge(term.reduction, state, next);
    }
    FP_UNROLL
    for (int k = 0; k < most; ++k)
      if (k < components) {
        totals[k * kTileColumns + column] = state[k];
        if (last && j < to.pass.end_n) to.column_partial(term.slot + k, j, state[k]);
      }
  }
  sync_block();
}

// Partials of a tile without pairs: zeros, of a maximum -inf.
template <class T>
FP_DEVICE void collect_nothing(const Collector<T>& to, int tile_row, int tile_rows) {
  const Pass<T>& pass = to.pass;
  for (int n = 0; n < pass.item_count; ++n)
    for (int side = 0; side < 2; ++side) {
      const int t = side ? pass.items[n].column : pass.items[n].row;
      if (t < 0) continue;
      const TermCode<T>& term = pass.terms[t];
      const T nothing = term.reduction == Reduction::max ? -infinity<T>() : T(0);
      const int first = side ? to.tile_column : tile_row, count = side ? kTileColumns : tile_rows;
      const int end = side ? pass.end_n : pass.end_b, components = partial_components(term.reduction);
      for (int at = first + thread_index(); at < first + count && at < end; at += kThreads)
        for (int k = 0; k < components; ++k)
          if (side)
            to.column_partial(term.slot + k, at, nothing);
          else
            to.row_partial(term.slot + k, at, nothing);
    }
}

template <class T, class Source>
FP_KERNEL(sizeof(T) == 4 ? 2 : 1)
stats_kernel(const FP_GRID_CONSTANT Pass<T> pass, const Source source, const Partials<T> partials, int components) {
  constexpr int R = kStripRows<T>;
  FP_DYNAMIC_SHARED(memory);
  Tile<T, R, Source> tile;
  int tile_b, tile_n;
  tile_of_block(block_index(), pass.tiles_b, pass.tiles_n, tile_b, tile_n);
  const int row = pass.first_b + tile_b * tile.kRows, column = pass.first_n + tile_n * kTileColumns;
  T* shared = reinterpret_cast<T*>(memory + tile.kSharedBytes);
  const Collector<T> to{pass, partials, tile_b, tile_n, shared, column};
  if (!tile_wanted(pass, row, tile.kRows, column, kTileColumns)) return collect_nothing(to, row, tile.kRows);
  tile.load(pass, source, row, column, memory);
  T* totals = shared + components * kWarps * kTileColumns;
  const int strips = strips_inside(pass, row, R, tile.kStrips);
  for (int n = 0; n < pass.item_count; ++n) {
    const Item item = pass.items[n];
    for (int k = 0; k < strips; ++k) {
      collect_item(pass, item, tile.strip(pass, source, k), to);
      if (item.column < 0) continue;
      merge_columns(to, pass.terms[item.column], totals, k == 0, k == strips - 1);
    }
  }
}

}  // namespace

template <class T, class Source>
Status start_stats(const Pass<T>& pass, const Source& source, const Partials<T>& partials, Stream stream) {
  using Block = Tile<T, kStripRows<T>, Source>;
  int components = 0;  // most of a term with columns
  for (int n = 0; n < pass.item_count; ++n) {
    if (pass.items[n].column < 0) continue;
    const int width = partial_components(pass.terms[pass.items[n].column].reduction);
    if (width > components) components = width;
  }
  const int shared = Block::kSharedBytes + components * (kWarps + 1) * kTileColumns * int(sizeof(T));
  return launch(stats_kernel<T, Source>, int64_t(pass.tiles_b) * pass.tiles_n, shared, stream, pass, source, partials,
                components);
}

#define FP_INSTANTIATE(T, SOURCE) \
  template Status start_stats(const Pass<T>&, const SOURCE&, const Partials<T>&, Stream);
FP_INSTANTIATE(float, PanelSource<float>)
FP_INSTANTIATE(double, PanelSource<double>)
FP_INSTANTIATE(float, EmbeddingSource<Half>)
FP_INSTANTIATE(float, EmbeddingSource<BFloat16>)

}  // namespace flashpair
