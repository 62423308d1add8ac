// The native operators of formulas over whole rows: what python/flashpair/rows.py and losses/ranks.py ask of a panel.
// Arguments are contiguous; results that are not wanted are empty.

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "bind.h"
#include "distances_cpu.h"
#include "engine.h"
#include "panel_formulas.h"
#include "ranks_cpu.h"

namespace flashpair {
namespace {

constexpr double kWork = 64;  // multiply-adds that what a formula does to an entry of a panel is taken for

template <class T>
const EnginePasses<T>& passes() {
  if constexpr (sizeof(T) == 4)
    return engine().f32;
  else
    return engine().f64;
}

// Calls work(T()) with the type of a tensor.
template <class Work>
auto of_type(const Tensor& x, const Work& work) {
  return is_double(x) ? work(double()) : work(float());
}

void check(bool good, const char* text) {
  if (!good) throw std::runtime_error(text);
}

void check_types(const Tensor& s, std::initializer_list<Tensor> others) {
  for (const Tensor& other : others) check(other.scalar_type() == s.scalar_type(), "all numbers need the type of s");
}

void check_integers(std::initializer_list<Tensor> tensors) {
  for (const Tensor& tensor : tensors)
    check(tensor.scalar_type() == torch::headeronly::ScalarType::Long, "places in rows must be int64");
}

void check_like(const Tensor& a, const Tensor& b, const char* text) {
  check(a.dim() == 2 && b.dim() == 2 && a.size(0) == b.size(0) && a.size(1) == b.size(1), text);
}

// work(first, end) for all rows of a tensor, in as many threads as pay.
template <class Work>
void by_rows(const Tensor& panel, const Work& work) {
  const int64_t rows = panel.size(0), threads = threads_for(double(panel.numel()) * kWork);
  if (rows) torch::stable::parallel_for(0, rows, (rows + threads - 1) / threads, work);
}

Tensor like(const Tensor& x, bool wanted) {
  return wanted ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
}

template <class T>
SPanel<T> panel_of(const Tensor& s, const MaybeTensor& left_out, const Tensor& of_s) {
  return {data<T>(s), pointer<int64_t>(left_out), s.size(0),
          s.size(1),  pointer<T>(of_s),           threads_for(double(s.numel()) * kWork),
          parallel};
}

// Products, in place, to distances.
void distances(Tensor s, Tensor row_squares, Tensor column_squares, bool unit, bool root) {
  check(s.dim() == 2 && row_squares.numel() == s.size(0) && column_squares.numel() == s.size(1),
        "distances: s needs a square per row and column");
  check_types(s, {row_squares, column_squares});
  of_type(s, [&](auto type) {
    using T = decltype(type);
    by_rows(s, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i)
        to_distances(data<T>(s) + i * s.size(1), s.size(1), data<T>(row_squares)[i], data<T>(column_squares), unit,
                     root);
    });
  });
}

// Slopes in distances to slopes in their squares.
Tensor through_roots(Tensor slopes, Tensor s) {
  check_like(slopes, s, "through_roots: slopes must have the shape of the distances");
  check_types(s, {slopes});
  Tensor of_squares = like(s, true);
  of_type(s, [&](auto type) {
    using T = decltype(type);
    by_rows(s, [&](int64_t first, int64_t end) {
      const int64_t from = first * s.size(1);
      slopes_of_squares(data<T>(slopes) + from, data<T>(s) + from, (end - first) * s.size(1),
                        data<T>(of_squares) + from);
    });
  });
  return of_squares;
}

// Slopes of s where cotangents are given; 0 where these are of nothing, which no kernel takes for cotangents.
Tensor slopes_from(const MaybeTensor& cotangent, const Tensor& s) {
  Tensor of_s = like(s, bool(cotangent));
  if (cotangent && !cotangent->numel() && s.numel())
    memset(of_s.data_ptr(), 0, size_t(s.numel()) * size_t(s.element_size()));
  return of_s;
}

// Total, its slopes in s and in the scale.
std::tuple<Tensor, Tensor, Tensor> ordered_log_sums(Tensor s, double scale, Tensor own, Tensor targets, Tensor order,
                                                    Tensor left_out, bool slopes) {
  check(own.numel() == s.size(0) && left_out.numel() == s.size(0) && targets.numel() == s.size(1) &&
            order.numel() == s.size(1),
        "ordered_log_sums: own and left_out need an entry per row, targets and order one per column");
  check_types(targets, {own});
  check_integers({order, left_out});
  Tensor total = torch::stable::new_empty(s, {}), of_scale = torch::stable::new_empty(s, {}), of_s = like(s, slopes);
  of_type(s, [&](auto type) {
    using T = decltype(type);
    const PanelTotal found = passes<T>().ordered({panel_of<T>(s, left_out, of_s), T(scale), own.data_ptr(),
                                                  targets.data_ptr(), !is_double(targets), data<int64_t>(order)});
    *data<T>(total) = T(found.value), *data<T>(of_scale) = T(found.of_scale);
  });
  return {total, of_s, of_scale};
}

// Total, its slopes in the table's values and slopes, and in s.
std::tuple<Tensor, Tensor, Tensor, Tensor> tabulated(Tensor values, Tensor slopes, Tensor s, Tensor left_out,
                                                     int64_t margin, bool of_s_wanted) {
  check(margin >= 4 && values.numel() >= 2 * margin + 2 && slopes.numel() == values.numel() &&
            left_out.numel() == s.size(0),
        "tabulated: two knots inside of margins of 4 or more, as many slopes as values, an entry of left_out per row");
  check_types(s, {values, slopes});
  check_integers({left_out});
  Tensor total = torch::stable::new_empty(s, {}), of_s = like(s, of_s_wanted);
  Tensor of_values = like(values, true), of_slopes = like(slopes, true);
  of_type(s, [&](auto type) {
    using T = decltype(type);
    *data<T>(total) = T(passes<T>().tabulated({panel_of<T>(s, left_out, of_s), data<T>(values), data<T>(slopes),
                                               values.numel(), margin, data<T>(of_values), data<T>(of_slopes)}));
  });
  return {total, of_values, of_slopes, of_s};
}

// Total, its slopes in s and in the scale; with a weight the mean instead, which has no scale.
std::tuple<Tensor, Tensor, Tensor> hardest(Tensor s, Tensor own, int64_t kept, double scale,
                                           std::optional<double> weight, bool slopes) {
  check(s.dim() == 2 && own.numel() == s.size(0) && kept >= 1 && kept < s.size(1),
        "hardest: an entry of own per row of s, and as many other columns as are kept");
  check_integers({own});
  const int64_t* first = data<int64_t>(own);
  check(std::all_of(first, first + own.numel(), [&](int64_t column) { return column >= 0 && column < s.size(1); }),
        "hardest: own must be a column of each row");
  Tensor total = torch::stable::new_empty(s, {}), of_scale = torch::stable::new_empty(s, {}), of_s = like(s, slopes);
  of_type(s, [&](auto type) {
    using T = decltype(type);
    const PanelTotal found =
        passes<T>().hardest({panel_of<T>(s, own, of_s), kept, T(scale), weight.has_value(), weight ? *weight : 0.0});
    *data<T>(total) = T(found.value), *data<T>(of_scale) = T(found.of_scale);
  });
  return {total, of_s, of_scale};
}

// The gate of each pair of the hidden values p (units, rows) and q (units, columns); with cotangents what these say of p,
// q and v instead.
std::tuple<Tensor, Tensor, Tensor> pair_gate(Tensor p, Tensor q, Tensor v, MaybeTensor cotangent) {
  check(p.dim() == 2 && q.dim() == 2 && p.size(0) == v.numel() && q.size(0) == v.numel(),
        "pair_gate: p and q need a row per entry of v");
  check_types(p, {q, v});
  if (cotangent) check_types(p, {*cotangent});
  const int64_t rows = p.size(1), columns = q.size(1);
  check(!cotangent || (cotangent->dim() == 2 && cotangent->size(0) == rows && cotangent->size(1) == columns),
        "pair_gate: cotangents must be (rows, columns)");
  Tensor values = torch::stable::new_empty(p, {cotangent ? 0 : rows, columns});
  Tensor of_p = cotangent ? slopes_from(cotangent, p) : values;
  Tensor of_q = slopes_from(cotangent, q), of_v = slopes_from(cotangent, v);
  of_type(p, [&](auto type) {
    using T = decltype(type);
    PairGatePanel<T> panel{};
    panel.p = data<T>(p), panel.q = data<T>(q), panel.v = data<T>(v);
    panel.units = p.size(0), panel.rows = rows, panel.columns = columns;
    panel.values = data<T>(values), panel.cotangent = pointer<T>(cotangent);
    panel.of_p = data<T>(of_p), panel.of_q = data<T>(of_q), panel.of_v = data<T>(of_v);
    panel.threads = threads_for(double(rows) * double(columns) * double(p.size(0)) * kWork), panel.parallel = parallel;
    passes<T>().pair_gate(panel);
  });
  return {of_p, of_q, of_v};
}

// A panel's rows and where their classes are, as the operators take them.
struct Rows {
  const Tensor &s, &start, &length, &own;
  bool with_own;

  template <class T>
  RowColumns<T> columns() const {
    return {data<T>(s), data<int64_t>(start), data<int64_t>(length), data<int64_t>(own), s.size(0), s.size(1),
            with_own};
  }
};

void check_rows(const Tensor& s, const Tensor& start, const Tensor& length, const Tensor& own) {
  check(s.dim() == 2 && start.numel() == s.size(0) && length.numel() == s.size(0) && own.numel() == s.size(0),
        "start, length and own need an entry per row of s");
  check_integers({start, length, own});
}

void check_points(const Tensor& s, const Tensor& points, const MaybeTensor& cotangent) {
  check(points.dim() == 2 && points.size(0) == s.size(0), "points and limits need the rows of s");
  check_types(s, {points});
  if (cotangent) check_like(points, *cotangent, "cotangents must have the shape of the results");
  if (cotangent) check_types(s, {*cotangent});
}

// The ranks; with their cotangents what these say of s and of the points.
std::tuple<Tensor, Tensor> soft_ranks(Tensor s, Tensor start, Tensor length, Tensor own, bool with_own, int64_t mask,
                                      double sign, Tensor points, double scale, int64_t step, MaybeTensor cotangent) {
  check_rows(s, start, length, own), check_points(s, points, cotangent);
  Tensor of_s = slopes_from(cotangent, s), found = like(points, true);
  of_type(s, [&](auto type) {
    using T = decltype(type);
    SoftRanksPanel<T> p{};
    p.panel = Rows{s, start, length, own, with_own}.columns<T>();
    p.mask = Mask(mask), p.sign = T(sign), p.points = data<T>(points), p.places = points.size(1);
    p.scale = T(scale), p.step = Step(step), p.cotangent = pointer<T>(cotangent);
    (p.cotangent ? p.of_points : p.ranks) = data<T>(found), p.of_s = pointer<T>(of_s);
    p.threads = threads_for(double(s.numel()) * double(p.places) * kWork), p.parallel = parallel;
    passes<T>().soft_ranks(p);
  });
  return {found, of_s};
}

// Number and sum of each row's triplets, slopes of the sums.
std::tuple<Tensor, Tensor, Tensor> triplet_sums(Tensor s, Tensor start, Tensor length, Tensor own, double sign,
                                                double low, double high, bool closed, bool slopes) {
  check_rows(s, start, length, own);
  Tensor counts = torch::stable::new_empty(s, {s.size(0)}), sums = torch::stable::new_empty(s, {s.size(0)});
  Tensor of_s = like(s, slopes);
  of_type(s, [&](auto type) {
    using T = decltype(type);
    const ranks::TripletSums<T> p{Rows{s, start, length, own, false}.columns<T>(),
                                  T(sign),
                                  T(low),
                                  T(high),
                                  closed,
                                  data<T>(counts),
                                  data<T>(sums),
                                  pointer<T>(of_s)};
    by_rows(s, [&](int64_t first, int64_t end) { ranks::triplet_sums(passes<T>(), p, first, end); });
  });
  return {counts, sums, of_s};
}

// How many columns are below each limit, and their sums; with cotangents of the sums what these say of s.
std::tuple<Tensor, Tensor, Tensor> sums_below(Tensor s, Tensor start, Tensor length, Tensor own, int64_t mask,
                                              double sign, Tensor limits, bool closed, bool with_sums,
                                              MaybeTensor cotangent) {
  using torch::headeronly::ScalarType;
  check_rows(s, start, length, own), check_points(s, limits, cotangent);
  Tensor counts = torch::stable::new_empty(limits, {limits.size(0), limits.size(1)}, ScalarType::Long);
  Tensor sums = like(limits, with_sums), of_s = slopes_from(cotangent, s);
  of_type(s, [&](auto type) {
    using T = decltype(type);
    ranks::SumsBelow<T> p{};
    p.panel = Rows{s, start, length, own, false}.columns<T>(), p.mask = Mask(mask), p.sign = T(sign);
    p.limits = data<T>(limits), p.places = limits.size(1), p.closed = closed, p.counts = data<int64_t>(counts);
    p.sums = pointer<T>(sums), p.cotangent = pointer<T>(cotangent), p.of_s = pointer<T>(of_s);
    by_rows(s, [&](int64_t first, int64_t end) { ranks::sums_below(passes<T>(), p, first, end); });
  });
  return {counts, sums, of_s};
}

// The column of another class that is the next above each point, else the largest.
Tensor next_above(Tensor s, Tensor start, Tensor length, Tensor own, double sign, Tensor points) {
  using torch::headeronly::ScalarType;
  check_rows(s, start, length, own), check_points(s, points, {});
  Tensor found = torch::stable::new_empty(points, {points.size(0), points.size(1)}, ScalarType::Long);
  of_type(s, [&](auto type) {
    using T = decltype(type);
    const ranks::NextAbove<T> p{Rows{s, start, length, own, false}.columns<T>(), T(sign), data<T>(points),
                                points.size(1), data<int64_t>(found)};
    by_rows(s, [&](int64_t first, int64_t end) { ranks::next_above(passes<T>(), p, first, end); });
  });
  return found;
}

// Nodes of each row; with their cotangents what these say of s.
std::tuple<Tensor, Tensor> soft_histogram(Tensor s, Tensor start, Tensor length, Tensor own, int64_t mask,
                                          MaybeTensor weights, double low, double high, int64_t bins,
                                          MaybeTensor cotangent) {
  check_rows(s, start, length, own);
  check(bins > 0 && (!weights || weights->numel() == s.size(1)),
        "soft_histogram: a weight per column, one bin or more");
  Tensor nodes = torch::stable::new_empty(s, {s.size(0), bins + 1}), of_s = slopes_from(cotangent, s);
  if (cotangent) check_like(nodes, *cotangent, "cotangents must have the shape of the nodes");
  if (cotangent) check_types(s, {*cotangent});
  if (weights) check_types(s, {*weights});
  of_type(s, [&](auto type) {
    using T = decltype(type);
    ranks::SoftHistogram<T> p{};
    p.panel = Rows{s, start, length, own, false}.columns<T>(), p.mask = Mask(mask), p.weights = pointer<T>(weights);
    p.low = T(low), p.high = T(high), p.bins = bins, p.nodes = data<T>(nodes);
    p.cotangent = pointer<T>(cotangent), p.of_s = pointer<T>(of_s);
    by_rows(s, [&](int64_t first, int64_t end) { ranks::soft_histogram(p, first, end); });
  });
  return {nodes, of_s};
}

}  // namespace
}  // namespace flashpair

STABLE_TORCH_LIBRARY_FRAGMENT(flashpair_cpu, m) {
  m.def("distances(Tensor(a!) s, Tensor row_squares, Tensor column_squares, bool unit, bool root) -> ()");
  m.def("through_roots(Tensor slopes, Tensor s) -> Tensor");
  m.def("pair_gate(Tensor p, Tensor q, Tensor v, Tensor? cotangent) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ordered_log_sums(Tensor s, float scale, Tensor own, Tensor targets, Tensor order, Tensor left_out, bool slopes) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "tabulated(Tensor values, Tensor slopes, Tensor s, Tensor left_out, int margin, bool of_s) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("hardest(Tensor s, Tensor own, int kept, float scale, float? weight, bool slopes) -> (Tensor, Tensor, Tensor)");
#define FP_ROWS "Tensor s, Tensor start, Tensor length, Tensor own, "
  m.def("soft_ranks(" FP_ROWS
        "bool with_own, int mask, float sign, Tensor points, float scale, int step, Tensor? cotangent) "
        "-> (Tensor, Tensor)");
  m.def("triplet_sums(" FP_ROWS
        "float sign, float low, float high, bool closed, bool slopes) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("sums_below(" FP_ROWS
        "int mask, float sign, Tensor limits, bool closed, bool with_sums, Tensor? cotangent) "
        "-> (Tensor, Tensor, Tensor)");
  m.def("next_above(" FP_ROWS "float sign, Tensor points) -> Tensor");
  m.def("soft_histogram(" FP_ROWS
        "int mask, Tensor? weights, float low, float high, int bins, Tensor? cotangent) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(flashpair_cpu, CPU, m) {
  m.impl("distances", TORCH_BOX(&flashpair::distances));
  m.impl("through_roots", TORCH_BOX(&flashpair::through_roots));
  m.impl("pair_gate", TORCH_BOX(&flashpair::pair_gate));
  m.impl("ordered_log_sums", TORCH_BOX(&flashpair::ordered_log_sums));
  m.impl("tabulated", TORCH_BOX(&flashpair::tabulated));
  m.impl("hardest", TORCH_BOX(&flashpair::hardest));
  m.impl("soft_ranks", TORCH_BOX(&flashpair::soft_ranks));
  m.impl("triplet_sums", TORCH_BOX(&flashpair::triplet_sums));
  m.impl("sums_below", TORCH_BOX(&flashpair::sums_below));
  m.impl("next_above", TORCH_BOX(&flashpair::next_above));
  m.impl("soft_histogram", TORCH_BOX(&flashpair::soft_histogram));
}
