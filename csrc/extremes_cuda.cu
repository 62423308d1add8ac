// Mining: the most extreme similarities of each row and where they are.

#include "best_cuda.h"
#include "engine_cuda.h"
#include "terms_cuda.h"
#include "tile_cuda.h"

namespace flashpair {
namespace {

template <class T, int R>
FP_DEVICE Entry<T> entry_of(const Strip<T, R>& strip, unsigned bits, int r, int v, int place, bool largest) {
  return has_bit(bits, r, v) ? Entry<T>{strip.s[r][v], place} : no_entry<T>(largest);
}

// k = 1: all extremes of a pass share each tile of S. In a self-similarity the tile's columns are rows too.
template <class T, class Source>
FP_KERNEL(sizeof(T) == 4 ? 2 : 1)
extremes_kernel(const FP_GRID_CONSTANT Pass<T> pass, const Source source, const Partials<T> values,
                const Partials<int32_t> places) {
  constexpr int R = kStripRows<T>;
  FP_DYNAMIC_SHARED(memory);
  Tile<T, R, Source> tile;
  int tile_b, tile_n;
  tile_of_block(block_index(), pass.tiles_b, pass.tiles_n, tile_b, tile_n);
  const int row = pass.first_b + tile_b * tile.kRows, column = pass.first_n + tile_n * kTileColumns;
  T* shared_values = reinterpret_cast<T*>(memory + tile.kSharedBytes);  // (kWarps, kTileColumns)
  int32_t* shared_places = reinterpret_cast<int32_t*>(shared_values + kWarps * kTileColumns);
  const Collector<T> to{pass, values, tile_b, tile_n, shared_values, column};
  const Collector<T, int32_t> at{pass, places, tile_b, tile_n, shared_places, column};
  const int column_slots = pass.triangle ? pass.item_count : 0;
  if (!tile_wanted(pass, row, tile.kRows, column, kTileColumns))
    return at.neutral(pass.item_count, column_slots, row, tile.kRows, -1);
  tile.load(pass, source, row, column, memory);
  const int strips = strips_inside(pass, row, R, tile.kStrips);
  for (int n = 0; n < pass.item_count; ++n) {
    const TermCode<T>& term = pass.terms[n];
    const MoreExtreme more{term.largest};
    Entry<T> by_column[kVector];
    FP_UNROLL
    for (int v = 0; v < kVector; ++v) by_column[v] = no_entry<T>(term.largest);
    for (int k = 0; k < strips; ++k) {
      const Strip<T, R>& strip = tile.strip(pass, source, k);
      const unsigned bits = keep_bits<T, R, true>(pass, term, strip);
      Entry<T> by_row[R];
      FP_UNROLL
      for (int r = 0; r < R; ++r) by_row[r] = no_entry<T>(term.largest);
      FP_EACH_PAIR(R) by_row[r] = more(by_row[r], entry_of(strip, bits, r, v, strip.column + v, term.largest));
      const Entry<T> best = over_columns(by_row, more);
      to.template row<R>(term.slot, strip.row, best.value);
      at.template row<R>(term.slot, strip.row, best.place);
      if (!pass.triangle) continue;
      const unsigned mirrored = keep_bits<T, R, false>(pass, term, strip);
      FP_EACH_PAIR(R)
      by_column[v] = more(by_column[v], entry_of(strip, mirrored, r, v, strip.row + r, term.largest));
    }
    if (!pass.triangle) continue;
    T column_values[kVector];
    int32_t column_places[kVector];
    FP_UNROLL
    for (int v = 0; v < kVector; ++v) column_values[v] = by_column[v].value, column_places[v] = by_column[v].place;
    to.column(0, column_values), at.column(0, column_places);
    sync_block();
    const int j = column + thread_index();
    if (thread_index() < kTileColumns && j < pass.end_n) {
      Entry<T> best = no_entry<T>(term.largest);
      for (int warp = 0; warp < kWarps; ++warp)
        best = more(best, Entry<T>{to.of_warp(0, warp, thread_index()), at.of_warp(0, warp, thread_index())});
      to.column_partial(term.slot, j, best.value), at.column_partial(term.slot, j, best.place);
    }
    sync_block();
  }
}

// Any k: a warp reads one row within one stripe of columns.
template <class T>
FP_KERNEL(2)
top_k_kernel(const FP_GRID_CONSTANT Pass<T> pass, const PanelSource<T> source, const Best<T> best, int k, int stripes) {
  const int rows = pass.end_b - pass.first_b, chunks = (pass.end_n - pass.first_n + kTileColumns - 1) / kTileColumns;
  const int64_t task = int64_t(block_index()) * kWarps + warp_index();
  const int row = int(task / stripes), stripe = int(task % stripes);
  if (row >= rows) return;
  const TermCode<T>& term = pass.terms[0];
  BestList<T> list(k, term.largest);
  Strip<T, 1> strip;
  strip.row = pass.first_b + row;
  for (int chunk = stripe; chunk < chunks; chunk += stripes) {
    const int from = chunk * kTileColumns + lane_index() * kVector;
    strip.column = pass.first_n + from;
    FP_UNROLL
    for (int v = 0; v < kVector; ++v) strip.s[0][v] = 0;
    if (from < source.stride) load4(strip.s[0], source.s + int64_t(row) * source.stride + from);
    similarities(pass, strip);
    const unsigned bits = keep_bits<T, 1, true>(pass, term, strip);
    FP_UNROLL
    for (int v = 0; v < kVector; ++v) list.offer(entry_of(strip, bits, 0, v, strip.column + v, term.largest));
  }
  const int64_t to = (int64_t(stripe) * rows + row) * k;
  list.store(best.values + to, best.places + to);
}

// Merges lists (lists, rows, 1) into one entry a row.
template <class T>
FP_KERNEL(2)
merge_single_kernel(const Best<T> from, int lists, const Best<T> into, int rows, bool largest) {
  const int64_t row = int64_t(block_index()) * kThreads + thread_index();
  if (row >= rows) return;
  const MoreExtreme more{largest};
  Entry<T> best{into.values[row], into.places[row]};
  for (int list = 0; list < lists; ++list) {
    const int64_t at = int64_t(list) * rows + row;
    best = more(best, Entry<T>{from.values[at], from.places[at]});
  }
  into.values[row] = best.value, into.places[row] = best.place;
}

// Merges lists (lists, rows, k) into the k best of each row; a warp a row.
template <class T>
FP_KERNEL(2)
merge_best_kernel(const Best<T> from, int lists, const Best<T> into, int rows, int k, bool largest) {
  const int64_t row = int64_t(block_index()) * kWarps + warp_index();
  if (row >= rows) return;
  BestList<T> best(k, largest);
  for (int list = -1; list < lists; ++list) {
    const int64_t first = ((list < 0 ? 0 : int64_t(list) * rows) + row) * k;
    const T* values = (list < 0 ? into.values : from.values) + first;
    const int32_t* places = (list < 0 ? into.places : from.places) + first;
    for (int at = 0; at < k; at += kLanes) {
      const int rank = at + lane_index();
      best.offer(rank < k ? Entry<T>{values[rank], places[rank]} : no_entry<T>(largest));
    }
  }
  best.store(into.values + row * k, into.places + row * k);
}

}  // namespace

template <class T, class Source>
Status start_extremes(const Pass<T>& pass, const Source& source, const Partials<T>& values,
                      const Partials<int32_t>& places, Stream stream) {
  using Block = Tile<T, kStripRows<T>, Source>;
  const int shared = Block::kSharedBytes + kWarps * kTileColumns * int(sizeof(T) + sizeof(int32_t));
  return launch(extremes_kernel<T, Source>, int64_t(pass.tiles_b) * pass.tiles_n, shared, stream, pass, source, values,
                places);
}

template <class T>
Status start_top_k(const Pass<T>& pass, const PanelSource<T>& source, const Best<T>& best, int k, int stripes,
                   Stream stream) {
  const int64_t tasks = int64_t(pass.end_b - pass.first_b) * stripes;
  return launch(top_k_kernel<T>, (tasks + kWarps - 1) / kWarps, 0, stream, pass, source, best, k, stripes);
}

template <class T>
Status start_merge_best(const Best<T>& from, int lists, const Best<T>& into, int rows, int k, bool largest,
                        Stream stream) {
  if (k == 1)
    return launch(merge_single_kernel<T>, (int64_t(rows) + kThreads - 1) / kThreads, 0, stream, from, lists, into, rows,
                  largest);
  return launch(merge_best_kernel<T>, (int64_t(rows) + kWarps - 1) / kWarps, 0, stream, from, lists, into, rows, k,
                largest);
}

#define FP_INSTANTIATE(T, SOURCE) \
  template Status start_extremes(const Pass<T>&, const SOURCE&, const Partials<T>&, const Partials<int32_t>&, Stream);
FP_INSTANTIATE(float, PanelSource<float>)
FP_INSTANTIATE(double, PanelSource<double>)
FP_INSTANTIATE(float, EmbeddingSource<Half>)
FP_INSTANTIATE(float, EmbeddingSource<BFloat16>)
#undef FP_INSTANTIATE
#define FP_INSTANTIATE(T)                                                                               \
  template Status start_top_k(const Pass<T>&, const PanelSource<T>&, const Best<T>&, int, int, Stream); \
  template Status start_merge_best(const Best<T>&, int, const Best<T>&, int, int, bool, Stream);
FP_INSTANTIATE(float)
FP_INSTANTIATE(double)

}  // namespace flashpair
