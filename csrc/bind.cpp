// The native operators: decode the flat arguments of python/flashpair/ops.py into a Problem and run it. Registered through
// LibTorch's stable ABI, so that one binary serves many versions of torch. Everything written is allocated by the caller.

#include <atomic>
#include <iterator>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bind.h"
#include "engine.h"
#include "finite_cpu.h"
#include "formulas_cpu.h"
#include "memory_cpu.h"
#include "order_cpu.h"
#include "panel_cache_cpu.h"
#include "reductions.h"

namespace flashpair {

// Multiply-adds of one matrix product that are worth a thread: with fewer, a second one waits for the first at the end
// of every round as long as it helps (bench/threads.py).
static std::atomic<int64_t> products_per_thread = 1 << 21;

int threads_for(double products) {
  const double worth = products / double(products_per_thread), all = double(torch::stable::get_num_threads());
  return worth < 1 ? 1 : int(worth < all ? worth : all);
}

namespace {

using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;

constexpr size_t kHeader = 7, kPerTerm = 13, kPerConsts = 5, kPerExtreme = 5;
constexpr size_t kGuideRows = 5, kGuideColumns = 6;  // of the header

template <class T>
Parameter<T> parameter(const std::vector<Tensor>& params, int64_t index, double number) {
  if (index < 0) return {nullptr, T(number)};
  const Tensor& tensor = params[size_t(index)];
  const T* data = static_cast<const T*>(tensor.data_ptr());
  return tensor.dim() == 0 ? Parameter<T>{nullptr, data[0]} : Parameter<T>{data, T(0)};
}

int64_t set_products_per_thread(int64_t products) { return products_per_thread.exchange(products); }

template <class T>
Problem<T> problem(const Tensor& x, const MaybeTensor& y, const MaybeTensor& labels, const MaybeTensor& ref_labels,
                   const MaybeTensor& pair_mask, const MaybeTensor& exclude, const Ints& spec, int64_t workspace) {
  Problem<T> p{};
  p.x = static_cast<const T*>(x.data_ptr());
  p.y = pointer<T>(y);
  p.self = !y;
  p.rows = x.size(0), p.columns = y ? y->size(0) : x.size(0), p.features = x.size(1);
  p.labels = pointer<int64_t>(labels), p.ref_labels = pointer<int64_t>(ref_labels);
  p.pair_mask = pointer<bool>(pair_mask), p.exclude = pointer<int64_t>(exclude);
  p.similarity = Similarity(spec[0]);
  p.normalize = spec[1], p.exclude_self = spec[2], p.keep = spec[3];
  p.workspace_bytes = workspace;
  p.threads = threads_for(double(p.rows) * double(p.columns) * double(p.features));
  p.parallel = parallel;
  return p;
}

template <class T>
void add_terms(Problem<T>& p, const std::vector<Tensor>& params, const Ints& spec, const Floats& consts) {
  int slots[2] = {0, 0};
  if (spec[kGuideRows] >= 0) {
    const Tensor& rows = params[size_t(spec[kGuideRows])];
    p.guided = true, p.guide_rows = static_cast<const T*>(rows.data_ptr()), p.guide_features = rows.size(1);
    if (spec[kGuideColumns] >= 0)
      p.guide_columns = static_cast<const T*>(params[size_t(spec[kGuideColumns])].data_ptr());
  }
  for (size_t t = 0; t < (spec.size() - kHeader) / kPerTerm; ++t) {
    const int64_t* f = spec.data() + kHeader + t * kPerTerm;
    const double* c = consts.data() + t * kPerConsts;
    Term<T> term{};
    term.reduction = Reduction(f[0]), term.score = Score(f[1]), term.mask = Mask(f[2]), term.axis = Axis(f[3]);
    term.combine = Combine(f[4]), term.detach_weights = f[5], term.guide = Guide(f[6]);
    term.scale_index = int(f[7]), term.offset_index = int(f[8]), term.other_index = int(f[9]);
    term.weight_index = int(f[10]);
    term.scale = parameter<T>(params, f[7], c[0]), term.offset = parameter<T>(params, f[8], c[1]);
    term.other_offset = parameter<T>(params, f[9], 0).data, term.weight = parameter<T>(params, f[10], 0).data;
    term.above = parameter<T>(params, f[11], c[2]), term.below = parameter<T>(params, f[12], c[3]);
    term.has_above = f[11] >= 0 || c[2] != -INFINITY, term.has_below = f[12] >= 0 || c[3] != INFINITY;
    term.constant = T(c[4]);
    term.slot = slots[int(term.axis)];
    slots[int(term.axis)] += common::reduction_slots(term.reduction);
    p.terms.push_back(term);
  }
}

template <class T>
std::tuple<Tensor, Tensor> run_stats(const EnginePasses<T>& passes, const Tensor& x, const MaybeTensor& y,
                                     const MaybeTensor& labels, const MaybeTensor& ref_labels,
                                     const MaybeTensor& pair_mask, const MaybeTensor& exclude,
                                     const std::vector<Tensor>& params, const Ints& spec, const Floats& consts,
                                     int64_t workspace) {
  Problem<T> p = problem<T>(x, y, labels, ref_labels, pair_mask, exclude, spec, workspace);
  add_terms(p, params, spec, consts);
  int64_t slots[2] = {0, 0};
  for (const Term<T>& term : p.terms) slots[int(term.axis)] += common::reduction_slots(term.reduction);
  Tensor rows = torch::stable::new_empty(x, {slots[0], p.rows});
  Tensor columns = torch::stable::new_empty(x, {slots[1], p.columns});
  passes.stats(p, static_cast<T*>(rows.data_ptr()), static_cast<T*>(columns.data_ptr()));
  return {rows, columns};
}

std::tuple<Tensor, Tensor> stats(Tensor x, MaybeTensor y, MaybeTensor labels, MaybeTensor ref_labels,
                                 MaybeTensor pair_mask, MaybeTensor exclude, std::vector<Tensor> params, Ints spec,
                                 Floats consts, int64_t workspace) {
  if (is_double(x))
    return run_stats(engine().f64, x, y, labels, ref_labels, pair_mask, exclude, params, spec, consts, workspace);
  return run_stats(engine().f32, x, y, labels, ref_labels, pair_mask, exclude, params, spec, consts, workspace);
}

// Gradients of numbers: what each owner says of one is summed in double, over all of its uses, and rounded to T.
template <class T>
class NumberGradients {
 public:
  // Where a pass writes the gradient of a parameter along a side: its own vector, or one that is summed afterwards.
  T* place(const Tensor& gradient, int64_t length) {
    if (!gradient.numel()) return nullptr;
    T* found = static_cast<T*>(gradient.data_ptr());
    if (gradient.dim() != 0) return found;
    uses_.push_back({found, std::vector<T>(size_t(length))});
    return uses_.back().owners.data();
  }

  void add_up() const {
    for (const Use& first : uses_) {
      double total = 0;
      for (const Use& use : uses_)
        if (use.number == first.number)
          for (T value : use.owners) total += double(value);
      *first.number = T(total);
    }
  }

 private:
  struct Use {
    T* number;
    std::vector<T> owners;
  };
  std::vector<Use> uses_;
};

// `gradients`: dx, dy, then (dscale, doffset, dother, dweight) of each term, 0-d for a number that may have several
// uses; empty tensors where not wanted.
// `statistics`: rows, columns, grad_rows, grad_columns; empty for pair_sum, which writes `total` instead.
template <class T>
void run_weights(const EnginePasses<T>& passes, const Tensor& x, const MaybeTensor& y, const MaybeTensor& labels,
                 const MaybeTensor& ref_labels, const MaybeTensor& pair_mask, const MaybeTensor& exclude,
                 const std::vector<Tensor>& params, const Ints& spec, const Floats& consts, int64_t workspace,
                 const std::vector<Tensor>& statistics, const std::vector<Tensor>& gradients,
                 const MaybeTensor& total) {
  Problem<T> p = problem<T>(x, y, labels, ref_labels, pair_mask, exclude, spec, workspace);
  add_terms(p, params, spec, consts);
  Gradients<T> g{};
  auto at = [](const Tensor& tensor) { return tensor.numel() ? static_cast<T*>(tensor.data_ptr()) : nullptr; };
  if (!statistics.empty()) {
    g.rows = at(statistics[0]), g.columns = at(statistics[1]);
    g.grad_rows = at(statistics[2]), g.grad_columns = at(statistics[3]);
  }
  g.dx = at(gradients[0]), g.dy = at(gradients[1]);
  NumberGradients<T> numbers;
  for (size_t t = 0; t < p.terms.size(); ++t) {
    const bool of_rows = p.terms[t].axis == Axis::rows;
    const int64_t owners = of_rows ? p.rows : p.columns, others = of_rows ? p.columns : p.rows;
    g.dscale.push_back(numbers.place(gradients[2 + 4 * t], owners));
    g.doffset.push_back(numbers.place(gradients[3 + 4 * t], owners));
    g.dother.push_back(numbers.place(gradients[4 + 4 * t], others));
    g.dweight.push_back(numbers.place(gradients[5 + 4 * t], others));
  }
  g.total = total ? static_cast<double*>(total->data_ptr()) : nullptr;
  passes.weights(p, g);
  numbers.add_up();
}

void weights(Tensor x, MaybeTensor y, MaybeTensor labels, MaybeTensor ref_labels, MaybeTensor pair_mask,
             MaybeTensor exclude, std::vector<Tensor> params, Ints spec, Floats consts, int64_t workspace,
             std::vector<Tensor> statistics, std::vector<Tensor> gradients, MaybeTensor total) {
  if (is_double(x))
    run_weights(engine().f64, x, y, labels, ref_labels, pair_mask, exclude, params, spec, consts, workspace, statistics,
                gradients, total);
  else
    run_weights(engine().f32, x, y, labels, ref_labels, pair_mask, exclude, params, spec, consts, workspace, statistics,
                gradients, total);
}

template <class T>
void run_extremes(const EnginePasses<T>& passes, const Tensor& x, const MaybeTensor& y, const MaybeTensor& labels,
                  const MaybeTensor& ref_labels, const MaybeTensor& pair_mask, const MaybeTensor& exclude,
                  const std::vector<Tensor>& bounds, const Ints& spec, const Floats& consts, int64_t workspace,
                  const std::vector<Tensor>& found) {
  Problem<T> p = problem<T>(x, y, labels, ref_labels, pair_mask, exclude, spec, workspace);
  std::vector<T*> values;
  std::vector<int64_t*> indices;
  for (size_t e = 0; e < (spec.size() - kHeader) / kPerExtreme; ++e) {
    const int64_t* f = spec.data() + kHeader + e * kPerExtreme;
    Extreme<T> extreme{};
    extreme.mask = Mask(f[0]), extreme.largest = f[1], extreme.k = int(f[2]);
    extreme.above = parameter<T>(bounds, f[3], consts[2 * e]),
    extreme.below = parameter<T>(bounds, f[4], consts[2 * e + 1]);
    extreme.has_above = f[3] >= 0 || consts[2 * e] != -INFINITY;
    extreme.has_below = f[4] >= 0 || consts[2 * e + 1] != INFINITY;
    p.extremes.push_back(extreme);
    values.push_back(static_cast<T*>(found[2 * e].data_ptr()));
    indices.push_back(static_cast<int64_t*>(found[2 * e + 1].data_ptr()));
  }
  passes.extremes(p, values.data(), indices.data());
}

void extremes(Tensor x, MaybeTensor y, MaybeTensor labels, MaybeTensor ref_labels, MaybeTensor pair_mask,
              MaybeTensor exclude, std::vector<Tensor> bounds, Ints spec, Floats consts, int64_t workspace,
              std::vector<Tensor> found) {
  if (is_double(x))
    run_extremes(engine().f64, x, y, labels, ref_labels, pair_mask, exclude, bounds, spec, consts, workspace, found);
  else
    run_extremes(engine().f32, x, y, labels, ref_labels, pair_mask, exclude, bounds, spec, consts, workspace, found);
}

// Whether every entry of contiguous tensors is finite.
bool finite(std::vector<Tensor> tensors) {
  constexpr int64_t kPiece = 1 << 18;  // entries that are worth a thread
  std::atomic<bool> all = true;
  for (const Tensor& tensor : tensors) {
    using torch::headeronly::ScalarType;
    const ScalarType type = tensor.scalar_type();
    const uint64_t exponent = type == ScalarType::Double     ? 0x7FF0000000000000
                              : type == ScalarType::Float    ? 0x7F800000
                              : type == ScalarType::BFloat16 ? 0x7F80
                                                             : 0x7C00;
    const int bytes = int(tensor.element_size());
    const char* data = static_cast<const char*>(tensor.data_ptr());
    torch::stable::parallel_for(0, tensor.numel(), kPiece, [&](int64_t first, int64_t last) {
      if (!all_finite(data + first * bytes, last - first, bytes, exponent)) all = false;
    });
  }
  return all;
}

template <class T>
void run_formula(Formula formula, const Tensor& rows, const Tensor& columns, const MaybeTensor& counts,
                 const Floats& constants, Tensor& loss, Tensor& of_rows, Tensor& of_columns) {
  auto side = [](const Tensor& statistics, Tensor& slopes) {
    return SlopedSide<T>{static_cast<const T*>(statistics.data_ptr()), static_cast<T*>(slopes.data_ptr()),
                         statistics.size(0), statistics.size(1)};
  };
  *static_cast<T*>(loss.data_ptr()) =
      formula_slopes(formula, side(rows, of_rows), side(columns, of_columns), pointer<T>(counts), constants.data());
}

// What a formula reads: statistics of rows, of columns, numbers of pairs, constants; see formulas_cpu.h.
struct Read {
  int64_t rows, columns, counts;
  size_t constants;
};
constexpr Read kRead[] = {{2, 0, 0, 0}, {2, 1, 0, 0}, {2, 0, 2, 2}, {2, 0, 0, 3},
                          {2, 0, 2, 1}, {1, 0, 1, 0}, {2, 0, 2, 0}, {2, 0, 1, 4}};

// The loss, and its derivative in both statistics.
std::tuple<Tensor, Tensor, Tensor> formula(int64_t number, Tensor rows, Tensor columns, MaybeTensor counts,
                                           Floats constants) {
  if (number < 0 || number >= int64_t(std::size(kRead)))
    throw std::runtime_error("formula: there is none of number " + std::to_string(number));
  const Read& read = kRead[number];
  const int64_t owners = rows.size(1);
  using torch::headeronly::ScalarType;
  if ((rows.scalar_type() != ScalarType::Float && rows.scalar_type() != ScalarType::Double) ||
      columns.scalar_type() != rows.scalar_type() || !rows.is_contiguous() || !columns.is_contiguous() ||
      (counts && !counts->is_contiguous()))
    throw std::runtime_error("formula: statistics must be contiguous, of one type, float32 or float64");
  auto refuse = [&](const char* what, int64_t least) {
    throw std::runtime_error("formula: " + std::string(what) + " of formula " + std::to_string(number) + " must be " +
                             std::to_string(least) + " or more vectors of one length");
  };
  if (rows.size(0) < read.rows) refuse("rows", read.rows);
  if (read.columns && (columns.size(0) < read.columns || columns.size(1) != owners)) refuse("columns", read.columns);
  if (read.counts && (!counts || counts->size(0) < read.counts || counts->size(1) != owners ||
                      counts->scalar_type() != rows.scalar_type()))
    refuse("counts", read.counts);
  if (constants.size() < read.constants) throw std::runtime_error("formula: too few constants");
  Tensor loss = torch::stable::new_empty(rows, {});
  Tensor of_rows = torch::stable::empty_like(rows), of_columns = torch::stable::empty_like(columns);
  (is_double(rows) ? run_formula<double> : run_formula<float>)(Formula(number), rows, columns, counts, constants, loss,
                                                               of_rows, of_columns);
  return {loss, of_rows, of_columns};
}

template <class T>
void run_label_counts(const Tensor& labels, const MaybeTensor& ref_labels, const MaybeTensor& exclude, Tensor& counts) {
  const int64_t rows = labels.size(0), columns = ref_labels ? ref_labels->size(0) : rows;
  const int64_t* of_rows = pointer<int64_t>(labels);
  const int64_t* of_columns = ref_labels ? pointer<int64_t>(ref_labels) : of_rows;
  const int64_t* left_out = pointer<int64_t>(exclude);
  const std::vector<int64_t> alike = matches(of_rows, rows, of_columns, columns);
  T *same = static_cast<T*>(counts.data_ptr()), *different = same + rows;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t column = ref_labels ? (left_out ? left_out[i] : -1) : i;  // that the row never meets
    const bool met = column >= 0 && column < columns, is_same = met && of_columns[column] == of_rows[i];
    same[i] = T(alike[i] - is_same), different[i] = T(columns - alike[i] - (met && !is_same));
  }
}

// Positives and negatives of each row, (2, rows).
Tensor label_counts(Tensor labels, MaybeTensor ref_labels, MaybeTensor exclude, bool wide) {
  using torch::headeronly::ScalarType;
  Tensor counts = torch::stable::new_empty(labels, {2, labels.size(0)}, wide ? ScalarType::Double : ScalarType::Float);
  (wide ? run_label_counts<double> : run_label_counts<float>)(labels, ref_labels, exclude, counts);
  return counts;
}

int64_t vector_bytes() { return engine().vector_bytes; }
std::string isa() { return engine().name; }

// Gives what is kept between calls back to the system, the similarity matrix and scratch memory; returns its size.
int64_t release_workspace() {
  int64_t bytes = release_blocks();
  PanelCache& cache = panel_cache();
  if (!cache.try_lock()) return bytes;
  bytes += cache.bytes();
  cache.release();
  cache.unlock();
  return bytes;
}

}  // namespace
}  // namespace flashpair

#define FP_PROBLEM "Tensor x, Tensor? y, Tensor? labels, Tensor? ref_labels, Tensor? pair_mask, Tensor? exclude, "

STABLE_TORCH_LIBRARY(flashpair_cpu, m) {
  m.def("stats(" FP_PROBLEM "Tensor[] params, int[] spec, float[] consts, int workspace) -> (Tensor, Tensor)");
  m.def("weights(" FP_PROBLEM
        "Tensor[] params, int[] spec, float[] consts, int workspace, Tensor[] statistics, Tensor(a!)[] gradients, "
        "Tensor(b!)? total) -> ()");
  m.def("extremes(" FP_PROBLEM "Tensor[] bounds, int[] spec, float[] consts, int workspace, Tensor(a!)[] found) -> ()");
  m.def("finite(Tensor[] tensors) -> bool");
  m.def(
      "formula(int number, Tensor rows, Tensor columns, Tensor? counts, float[] constants) -> (Tensor, Tensor, "
      "Tensor)");
  m.def("label_counts(Tensor labels, Tensor? ref_labels, Tensor? exclude, bool wide) -> Tensor");
  m.def("vector_bytes() -> int");
  m.def("isa() -> str");
  m.def("release_workspace() -> int");
  m.def("set_products_per_thread(int products) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(flashpair_cpu, CPU, m) {
  m.impl("stats", TORCH_BOX(&flashpair::stats));
  m.impl("weights", TORCH_BOX(&flashpair::weights));
  m.impl("extremes", TORCH_BOX(&flashpair::extremes));
  m.impl("finite", TORCH_BOX(&flashpair::finite));
  m.impl("label_counts", TORCH_BOX(&flashpair::label_counts));
  m.impl("formula", TORCH_BOX(&flashpair::formula));
}

STABLE_TORCH_LIBRARY_IMPL(flashpair_cpu, CompositeExplicitAutograd, m) {
  m.impl("vector_bytes", TORCH_BOX(&flashpair::vector_bytes));
  m.impl("isa", TORCH_BOX(&flashpair::isa));
  m.impl("release_workspace", TORCH_BOX(&flashpair::release_workspace));
  m.impl("set_products_per_thread", TORCH_BOX(&flashpair::set_products_per_thread));
}
