// The whole CPU engine, without torch, against a double loop over pairs: statistics, gradients, extremes.
//
// Embeddings are multiples of 1/4, so similarities are exact and no rounding carries a pair over a threshold.

#define FP_TEST_MAIN
#include <algorithm>
#include <functional>
#include <limits>

#include "check.h"
#include "oracle.h"
#include "panel_cache_cpu.h"
#include "tested.h"

namespace {

using namespace flashpair;
using oracle::Values;
using oracle::Wide;
using tested::parallel;
using tested::passes;

// A problem and what its pointers point to.
template <class T>
struct Case {
  std::vector<T> x, y, owner_scale, owner_offset, other_offset, other_weight, above, below;
  std::vector<int64_t> labels, ref_labels, exclude;
  std::vector<uint8_t> pair_mask;
  Problem<T> problem{};
  check::Random random{7};

  Case(int64_t rows, int64_t columns, int64_t features, bool self) {
    Problem<T>& p = problem;
    p.rows = rows, p.columns = self ? rows : columns, p.features = features, p.self = self;
    x = quarters(rows * features), y = quarters(p.columns * features);
    labels = classes(rows), ref_labels = classes(p.columns);
    pair_mask.resize(rows * p.columns + 1);
    for (uint8_t& one : pair_mask) one = random.below(5) < 2;
    exclude.resize(rows + 1);
    for (int64_t& one : exclude) one = int64_t(random.below(p.columns + 1)) - 1;
    const int64_t longest = std::max(rows, p.columns);
    owner_scale = numbers(longest, 0.5, 2), owner_offset = numbers(longest, -1, 1);
    other_offset = numbers(longest, -1, 1), other_weight = numbers(longest, 0.1, 1);
    above = numbers(longest, -0.9, 0.1), below = numbers(longest, 0.2, 0.9);
    if (longest > 3) other_weight[3] = 0;
    p.x = x.data(), p.y = self ? nullptr : y.data();
    p.labels = labels.data(), p.ref_labels = self ? nullptr : ref_labels.data();
    p.similarity = Similarity::dot;
    p.workspace_bytes = int64_t(1) << 30, p.keep = true;
    p.threads = 1, p.parallel = parallel;
  }

  // Bounds that no similarity, a multiple of 1/16, meets.
  std::vector<T> numbers(int64_t count, double low, double high) {
    std::vector<T> values(count + 1);
    for (T& value : values) value = T(std::floor(random.uniform(low, high) * 512) * 2 + 1) / 1024;
    return values;
  }
  std::vector<T> quarters(int64_t count) {
    std::vector<T> values(count + 1);
    for (T& value : values) value = T(int64_t(random.below(7)) - 3) / 4;
    return values;
  }
  std::vector<int64_t> classes(int64_t count) {
    std::vector<int64_t> values(count + 1);
    for (int64_t& value : values) value = int64_t(random.below(5)) * 1'000'003 - 2;
    return values;
  }

  Term<T>& add(Reduction reduction, Score score, Mask mask, Axis axis = Axis::rows) {
    Problem<T>& p = problem;
    int slot = 0;
    for (const Term<T>& term : p.terms)
      if (term.axis == axis) slot += oracle::slots(term.reduction);
    Term<T> term{};
    term.reduction = reduction, term.score = score, term.mask = mask, term.axis = axis;
    term.scale.number = 1, term.slot = slot;
    term.scale_index = term.offset_index = term.other_index = term.weight_index = -1;
    p.terms.push_back(term);
    return p.terms.back();
  }
  Case& rich(Term<T>& term, Combine combine) {
    term.scale.data = owner_scale.data(), term.offset.data = owner_offset.data();
    term.other_offset = other_offset.data(), term.weight = other_weight.data();
    term.scale_index = 0, term.offset_index = 1, term.other_index = 2, term.weight_index = 3;
    term.combine = combine;
    return *this;
  }
};

template <class T>
Wide unit() {
  return 64 * Wide(std::numeric_limits<T>::epsilon());
}

Wide largest(const Values& values) {
  Wide size = 0;
  for (Wide v : values)
    if (std::isfinite(v)) size = std::max(size, std::fabs(v));
  return size;
}

template <class T>
void check_all(const char* what, const T* got, const Values& want, Wide bound) {
  for (size_t k = 0; k < want.size(); ++k)
    if (!check::close(got[k], want[k], bound)) {
      check::report_close(got[k], want[k], bound, __FILE__, __LINE__,
                          (std::string(what) + " " + std::to_string(k)).c_str());
      return;
    }
  CHECK(true);
}

// Runs statistics and gradients and compares them; `sums`: in one pass, with the total.
template <class T>
void check_case(Case<T>& c, bool sums = false) {
  Problem<T>& p = c.problem;
  const oracle::Pairs<T> pairs(p);
  int slots[2] = {0, 0};
  for (const Term<T>& term : p.terms) slots[int(term.axis)] += oracle::slots(term.reduction);
  // Poisoned: all of it must be written.
  std::vector<T> rows(slots[0] * p.rows + 1, T(NAN)), columns(slots[1] * p.columns + 1, T(NAN));
  if (!sums) passes<T>().stats(p, rows.data(), columns.data());
  std::vector<Values> cotangents, statistics;
  std::vector<T> grad_rows(rows.size()), grad_columns(columns.size());
  for (Term<T>& term : p.terms) {
    const int64_t count = oracle::owners(p, term);
    const bool of_rows = term.axis == Axis::rows;
    statistics.push_back(oracle::statistics(pairs, term));
    if (!sums)
      check_all("statistic", (of_rows ? rows : columns).data() + term.slot * count, statistics.back(),
                unit<T>() * (1 + largest(statistics.back())));
    cotangents.push_back(Values(count));
    for (int64_t i = 0; i < count; ++i) {
      const T g = sums ? T(1) : T(c.random.uniform(-1, 1));
      (of_rows ? grad_rows : grad_columns)[term.slot * count + i] = g;
      cotangents.back()[i] = g;
    }
  }
  const oracle::Gradients want = oracle::gradients(pairs, statistics, cotangents);
  std::vector<T> dx(p.rows * p.features + 1, T(NAN)), dy(p.columns * p.features + 1, T(NAN));
  Gradients<T> g{};
  double total = NAN;
  if (sums)
    g.total = &total;
  else
    g.rows = rows.data(), g.columns = columns.data(), g.grad_rows = grad_rows.data(),
    g.grad_columns = grad_columns.data();
  g.dx = dx.data(), g.dy = p.self ? nullptr : dy.data();
  std::vector<std::vector<T>> made;
  for (const Term<T>& term : p.terms) {
    auto room = [&](std::vector<T*>& list, int index, int64_t count) {
      made.push_back(std::vector<T>(index < 0 ? 0 : count + 1, T(NAN)));
      list.push_back(index < 0 ? nullptr : made.back().data());
    };
    room(g.dscale, term.scale_index, oracle::owners(p, term)),
        room(g.doffset, term.offset_index, oracle::owners(p, term));
    room(g.dother, term.other_index, oracle::others(p, term)),
        room(g.dweight, term.weight_index, oracle::others(p, term));
  }
  passes<T>().weights(p, g);
  const Wide bound = 4 * unit<T>();
  check_all("dx", dx.data(), want.dx, bound * (1 + largest(want.dx)));
  if (!p.self) check_all("dy", dy.data(), want.dy, bound * (1 + largest(want.dy)));
  // Of a parameter that is one number for all owners, and perhaps for several terms, the sum over these counts.
  struct {
    Wide got = 0, want = 0, size = 1;
  } shared[4];
  for (size_t t = 0; t < p.terms.size(); ++t) {
    const Term<T>& term = p.terms[t];
    auto compare = [&](const char* what, const T* got, const Values& values, int index, bool uniform) {
      if (!got) return;
      if (!uniform) return check_all(what, got, values, bound * (1 + largest(values)));
      for (size_t k = 0; k < values.size(); ++k)
        shared[index].got += got[k], shared[index].want += values[k], shared[index].size += std::fabs(values[k]);
    };
    compare("dscale", g.dscale[t], want.dscale[t], term.scale_index, term.scale.uniform());
    compare("doffset", g.doffset[t], want.doffset[t], term.offset_index, term.offset.uniform());
    compare("dother", g.dother[t], want.dother[t], term.other_index, false);
    compare("dweight", g.dweight[t], want.dweight[t], term.weight_index, false);
  }
  for (const auto& one : shared) CHECK_CLOSE(one.got, one.want, bound * one.size);
  if (sums) CHECK_CLOSE(total, want.total, bound * (1 + std::fabs(want.total) + p.rows));
}

// --- the programs ----------------------------------------------------------------------------------------------------

struct Program {
  const char* name;
  enum Kind { any, rectangle_only, one_pass } kind;
  std::function<void(Case<float>&)> f32;
  std::function<void(Case<double>&)> f64;
};
template <class F>
Program program(const char* name, Program::Kind kind, F build) {
  return {name, kind, [build](Case<float>& c) { build(c); }, [build](Case<double>& c) { build(c); }};
}

template <class C>
auto& bounded(C& c, decltype(c.problem.terms[0])& term) {
  term.has_above = term.has_below = true;
  term.above.data = c.above.data(), term.below.data = c.below.data();
  return term;
}

const std::vector<Program>& programs() {
  using R = Reduction;
  static const std::vector<Program> all = {
      program("clip", Program::rectangle_only,
              [](auto& c) {
                for (Axis axis : {Axis::rows, Axis::columns}) {
                  auto& term = c.add(R::logsumexp, Score::identity, Mask::all, axis);
                  term.scale.number = 4, term.scale_index = 0;
                }
              }),
      program("supervised", Program::any,
              [](auto& c) {
                c.problem.exclude_self = c.problem.self;
                c.add(R::logsumexp, Score::identity, Mask::all).scale.number = 3;
                c.add(R::sum, Score::identity, Mask::same);
                c.add(R::moments, Score::identity, Mask::different);
              }),
      program("bounded", Program::any,
              [](auto& c) {
                auto& first = bounded(c, c.add(R::logsumexp, Score::identity, Mask::same));
                first.scale.number = -2, first.offset.number = 1, first.scale_index = 0, first.offset_index = 1;
                bounded(c, c.add(R::sum, Score::squared_hinge, Mask::different)).offset.number = 0.5;
                auto& last = c.add(R::count, Score::hinge, Mask::different);
                last.has_above = true, last.above.number = 0.03125;
              }),
      program("circle", Program::any,
              [](auto& c) {
                c.problem.exclude_self = c.problem.self, c.problem.normalize = true;
                for (Mask mask : {Mask::same, Mask::different}) {
                  auto& term = c.add(R::logsumexp, Score::circle, mask);
                  term.scale.number = mask == Mask::same ? -6 : 6, term.constant = 0.25;
                }
              }),
      program("capped", Program::any,
              [](auto& c) {
                c.problem.exclude_self = c.problem.self;
                for (R reduction : {R::sum, R::logsumexp, R::softmax_mean, R::count, R::max}) {
                  auto& term = c.add(reduction, Score::softcap, Mask::all);
                  term.scale.number = 3, term.scale_index = 0, term.constant = 0.75;
                }
                c.rich(c.add(R::logsumexp, Score::log_cosh, Mask::different), Combine::add);
              }),
      program("capped on both axes", Program::rectangle_only,
              [](auto& c) {
                for (Axis axis : {Axis::rows, Axis::columns})
                  for (Score score : {Score::softcap, Score::log_cosh}) {
                    for (R reduction : {R::sum, R::logsumexp, R::softmax_mean}) {
                      auto& term = c.add(reduction, score, Mask::all, axis);
                      c.rich(term, Combine::add), term.constant = 1.5;
                    }
                    c.add(R::logsumexp, score, Mask::all, axis).constant = 1.5;
                  }
              }),
      program("both axes", Program::rectangle_only,
              [](auto& c) {
                for (Axis axis : {Axis::rows, Axis::columns})
                  for (R reduction : {R::sum, R::count, R::logsumexp, R::softmax_mean, R::moments, R::max})
                    c.add(reduction, Score::softplus, axis == Axis::rows ? Mask::all : Mask::different, axis);
              }),
      program("parameters added", Program::any,
              [](auto& c) {
                for (R reduction : {R::sum, R::logsumexp, R::softmax_mean})
                  c.rich(c.add(reduction, Score::softplus, Mask::all), Combine::add);
                c.add(R::softmax_mean, Score::identity, Mask::different).detach_weights = true;
              }),
      program("parameters in log", Program::rectangle_only,
              [](auto& c) {
                for (Axis axis : {Axis::rows, Axis::columns})
                  for (R reduction : {R::sum, R::logsumexp, R::softmax_mean})
                    c.rich(c.add(reduction, Score::square, Mask::all, axis), Combine::logaddexp);
              }),
      program("offset of owners", Program::any,
              [](auto& c) {
                auto& term = c.add(R::logsumexp, Score::identity, Mask::all);
                term.offset.data = c.owner_offset.data(), term.offset_index = 0;
              }),
      program("squared distance", Program::any,
              [](auto& c) {
                c.problem.similarity = Similarity::squared_euclidean;
                c.add(R::sum, Score::hinge, Mask::same).offset.number = -0.53125;
                c.add(R::logsumexp, Score::identity, Mask::different).scale.number = -1;
              }),
      program("distance", Program::any,
              [](auto& c) {
                c.problem.similarity = Similarity::euclidean, c.problem.exclude_self = c.problem.self;
                c.add(R::sum, Score::softplus, Mask::all);
                c.add(R::softmax_mean, Score::identity, Mask::same);
              }),
      program("given pairs", Program::rectangle_only,
              [](auto& c) {
                c.problem.pair_mask = reinterpret_cast<const bool*>(c.pair_mask.data());
                c.problem.exclude = c.exclude.data();
                c.add(R::sum, Score::softplus, Mask::given);
                c.add(R::logsumexp, Score::identity, Mask::not_given, Axis::columns);
                c.add(R::moments, Score::identity, Mask::given, Axis::columns);
                c.add(R::max, Score::softplus, Mask::given);
                c.add(R::max, Score::identity, Mask::not_given, Axis::columns);
              }),
      program("maxima", Program::any,
              [](auto& c) {
                c.problem.exclude_self = c.problem.self;
                c.rich(c.add(R::max, Score::softplus, Mask::different), Combine::add);
                bounded(c, c.add(R::max, Score::identity, Mask::same)).scale.number = -1;
                c.add(R::max, Score::identity, Mask::same).scale.number = -1;
                c.add(R::logsumexp, Score::identity, Mask::all);
              }),
      program("maxima on both axes", Program::rectangle_only,
              [](auto& c) {
                c.problem.exclude = c.exclude.data();
                for (Axis axis : {Axis::rows, Axis::columns}) {
                  auto& term = c.add(R::max, Score::identity, Mask::all, axis);
                  term.scale.number = -3, term.offset.number = -4;
                  c.add(R::max, Score::squared_hinge, Mask::different, axis).scale.number = -1;
                  c.rich(bounded(c, c.add(R::max, Score::log_cosh, Mask::same, axis)), Combine::logaddexp);
                }
              }),
      program("one pass", Program::one_pass,
              [](auto& c) {
                c.problem.normalize = true;
                auto& term = c.add(R::sum, Score::softplus, Mask::same);
                term.scale.number = -5, term.offset.number = 1, term.scale_index = 0, term.offset_index = 1;
                c.add(R::sum, Score::softplus, Mask::different).scale.number = 5;
                c.rich(c.add(R::sum, Score::square, Mask::all), Combine::add);
              }),
  };
  return all;
}

struct Size {
  int64_t rows, columns, features;
};
const std::vector<Size> kRectangles = {{1, 1, 1},    {1, 193, 5},   {193, 2, 16}, {2, 47, 33}, {47, 49, 7}, {48, 48, 4},
                                       {49, 47, 17}, {193, 193, 8}, {0, 5, 3},    {5, 0, 3},   {0, 0, 2}};
const std::vector<Size> kSquares = {{1, 1, 3},    {2, 2, 1},     {47, 47, 5}, {48, 48, 16},
                                    {49, 49, 17}, {193, 193, 9}, {0, 0, 4}};

template <class T>
void run(const Program& program, const Size& size, bool self, int threads, bool keep) {
  check::context() = std::string(program.name) + (self ? " self " : " ") + std::to_string(size.rows) + "x" +
                     std::to_string(size.columns) + "x" + std::to_string(size.features) + ", " +
                     std::to_string(threads) + " threads, " + std::to_string(sizeof(T) * 8) + " bit";
  Case<T> c(size.rows, size.columns, size.features, self);
  c.problem.threads = threads, c.problem.keep = keep;
  if constexpr (sizeof(T) == 4)
    program.f32(c);
  else
    program.f64(c);
  check_case(c, program.kind == Program::one_pass);
}

template <class T>
void run_all() {
  for (const Program& program : programs())
    for (bool self : {false, true}) {
      if (self && program.kind == Program::rectangle_only) continue;
      for (const Size& size : self ? kSquares : kRectangles) {
        const bool large = size.rows + size.columns > 300;
        run<T>(program, size, self, large ? 3 : 1, true);
        // The same embeddings cut into other tiles, while S of the first run is still kept.
        if (!large && size.rows + size.columns > 96) run<T>(program, size, self, 3, false);
      }
    }
  CHECK(panel_cache().try_lock());
  panel_cache().release();
  panel_cache().unlock();
}

TEST(engine_of_float_is_the_double_loop) { run_all<float>(); }
TEST(engine_of_double_is_the_double_loop) { run_all<double>(); }

// --- extremes --------------------------------------------------------------------------------------------------------

template <class T>
void check_extremes(const Size& size, bool self, int threads) {
  check::context() = "extremes of " + std::to_string(size.rows) + "x" + std::to_string(size.columns);
  Case<T> c(size.rows, size.columns, size.features, self);
  Problem<T>& p = c.problem;
  p.threads = threads, p.exclude_self = self;
  for (int k : {1, 5, 64})
    for (bool of_largest : {false, true}) {
      Extreme<T> extreme{};
      extreme.mask = of_largest ? Mask::different : Mask::same, extreme.largest = of_largest, extreme.k = k;
      if (k == 5) extreme.has_above = true, extreme.above.data = c.above.data();
      if (k == 64) extreme.mask = Mask::all, extreme.has_below = true, extreme.below.number = T(0.53125);
      p.extremes.push_back(extreme);
    }
  std::vector<std::vector<T>> values;
  std::vector<std::vector<int64_t>> indices;
  for (const Extreme<T>& extreme : p.extremes) {
    values.push_back(std::vector<T>(p.rows * extreme.k + 1, T(NAN)));
    indices.push_back(std::vector<int64_t>(p.rows * extreme.k + 1, -7));
  }
  std::vector<T*> value_pointers;
  std::vector<int64_t*> index_pointers;
  for (auto& one : values) value_pointers.push_back(one.data());
  for (auto& one : indices) index_pointers.push_back(one.data());
  passes<T>().extremes(p, value_pointers.data(), index_pointers.data());
  const oracle::Pairs<T> pairs(p);
  for (size_t e = 0; e < p.extremes.size(); ++e) {
    const oracle::Found want = oracle::extremes(pairs, p.extremes[e]);
    check_all("value", values[e].data(), want.values, 0);
    for (size_t k = 0; k < want.indices.size(); ++k) CHECK(indices[e][k] == want.indices[k]);
  }
}

TEST(extremes_are_the_sorted_rows) {
  for (int threads : {1, 3}) {
    for (const Size& size : kRectangles)
      check_extremes<float>(size, false, threads), check_extremes<double>(size, false, threads);
    for (const Size& size : kSquares)
      check_extremes<float>(size, true, threads), check_extremes<double>(size, true, threads);
  }
}

// --- what is not finite ----------------------------------------------------------------------------------------------

template <class T>
void check_nan(Reduction reduction, int slot) {
  check::context() = "reduction " + std::to_string(int(reduction));
  Case<T> c(49, 50, 5, false);
  c.x[7 * 5 + 2] = T(NAN);
  c.add(reduction, Score::identity, Mask::all);
  c.add(reduction, Score::identity, Mask::all, Axis::columns);
  const int slots = oracle::slots(reduction);
  std::vector<T> rows(slots * 49), columns(slots * 50);
  passes<T>().stats(c.problem, rows.data(), columns.data());
  for (int64_t i = 0; i < 49; ++i) CHECK(std::isnan(rows[slot * 49 + i]) == (i == 7));
  for (int64_t j = 0; j < 50; ++j) CHECK(std::isnan(columns[slot * 50 + j]));
}

TEST(nan_shows_in_its_row_and_in_every_column) {
  for (Reduction reduction : {Reduction::sum, Reduction::logsumexp, Reduction::softmax_mean, Reduction::max})
    check_nan<float>(reduction, 0), check_nan<double>(reduction, 0);
  for (int slot : {1, 2, 3, 4}) check_nan<float>(Reduction::moments, slot), check_nan<double>(Reduction::moments, slot);
}

TEST(large_scores_do_not_overflow) {
  for (double scale : {1e4, -1e4}) {
    check::context() = "scale " + check::number(scale);
    for (bool self : {false, true}) {
      Case<float> c(49, 60, 6, self);
      c.add(Reduction::logsumexp, Score::identity, Mask::all).scale.number = float(scale);
      c.add(Reduction::sum, Score::softplus, Mask::different).scale.number = float(scale);
      check_case(c);
    }
  }
}

}  // namespace
