// The native operators of listed pairs: what python/flashpair/pairs.py asks of a CPU.

#include <cstring>
#include <stdexcept>
#include <tuple>

#include "bind.h"
#include "listed_cpu.h"

namespace flashpair {
namespace {

// Multiply-adds that one of a listed pair is taken for: its rows come from anywhere.
constexpr double kWork = 4;
// Features that one thread adds up at least: a line of memory.
constexpr int64_t kFeatures = 16;

template <class Work>
void in_threads(int64_t count, int64_t at_least, double products, const Work& work) {
  const int64_t threads = threads_for(products * kWork), share = (count + threads - 1) / threads;
  const int64_t even = (share + at_least - 1) / at_least * at_least;
  if (count) torch::stable::parallel_for(0, count, even, work);
}

// Of all indices, whether they are in [0, count).
bool in_range(const Tensor& index, int64_t count) {
  const int64_t* at = data<int64_t>(index);
  bool good = true;
  for (int64_t p = 0; p < index.numel(); ++p) good &= uint64_t(at[p]) < uint64_t(count);
  return good;
}

void check(const Tensor& x, const MaybeTensor& y, const Tensor& rows, const Tensor& columns, int64_t similarity) {
  using torch::headeronly::ScalarType;
  const Tensor& other = y ? *y : x;
  if (x.dim() != 2 || other.dim() != 2 || x.size(1) != other.size(1) || x.scalar_type() != other.scalar_type())
    throw std::runtime_error("listed pairs: x and y must be matrices of one width and type");
  if (x.scalar_type() != ScalarType::Float && x.scalar_type() != ScalarType::Double)
    throw std::runtime_error("listed pairs: x must be float32 or float64");
  if (similarity < 0 || similarity > int64_t(Similarity::euclidean))
    throw std::runtime_error("listed pairs: there is no such similarity");
  for (const Tensor* tensor : {&x, &other, &rows, &columns})
    if (!tensor->is_contiguous()) throw std::runtime_error("listed pairs: arguments must be contiguous");
  if (rows.dim() != 1 || columns.dim() != 1 || rows.numel() != columns.numel())
    throw std::runtime_error("listed pairs: rows and columns must be vectors of one length");
  for (const Tensor* index : {&rows, &columns})
    if (index->scalar_type() != ScalarType::Long)
      throw std::runtime_error("listed pairs: rows and columns must be int64");
}

template <class T>
ListedRows<T> side(const Tensor& x, bool normalize) {
  ListedRows<T> found(data<T>(x), x.size(0), x.size(1));
  if (!normalize) return found;
  found.prepare();
  in_threads(x.size(0), 1, double(x.numel()), [&](int64_t first, int64_t end) { found.measure(first, end); });
  return found;
}

template <class T>
void run_similarity(const Tensor& x, const MaybeTensor& y, const int64_t* rows, const int64_t* columns,
                    Similarity similarity, bool normalize, Tensor& out) {
  const ListedRows<T> own = side<T>(x, normalize), given = y ? side<T>(*y, normalize) : ListedRows<T>(nullptr, 0, 0);
  const ListedRows<T>& other = y ? given : own;
  in_threads(out.numel(), 1, double(out.numel()) * double(x.size(1)), [&](int64_t first, int64_t end) {
    for (int64_t p = first; p < end; ++p)
      data<T>(out)[p] = listed_similarity(own.row(rows[p]), own.norm(rows[p]), other.row(columns[p]),
                                          other.norm(columns[p]), x.size(1), similarity);
  });
}

// (P,); nothing where an index is out of range.
Tensor listed_similarities(Tensor x, MaybeTensor y, Tensor rows, Tensor columns, int64_t similarity, bool normalize) {
  check(x, y, rows, columns, similarity);
  if (!in_range(rows, x.size(0)) || !in_range(columns, (y ? *y : x).size(0))) return torch::stable::new_empty(x, {0});
  Tensor out = torch::stable::new_empty(x, {rows.numel()});
  (is_double(x) ? run_similarity<double> : run_similarity<float>)(x, y, data<int64_t>(rows), data<int64_t>(columns),
                                                                  Similarity(similarity), normalize, out);
  return out;
}

template <class T>
void run_gradients(const Tensor& slopes, const Tensor& found, const Tensor& x, const MaybeTensor& y,
                   const int64_t* rows, const int64_t* columns, Similarity similarity, bool normalize, Tensor& dx,
                   Tensor& dy) {
  const ListedRows<T> own = side<T>(x, normalize), given = y ? side<T>(*y, normalize) : ListedRows<T>(nullptr, 0, 0);
  const ListedRows<T>& other = y ? given : own;
  const int64_t features = x.size(1), pairs = found.numel();
  T *of_x = data<T>(dx), *of_y = y ? data<T>(dy) : of_x;
  memset(of_x, 0, size_t(dx.numel()) * sizeof(T));
  if (y) memset(of_y, 0, size_t(dy.numel()) * sizeof(T));
  // Each thread takes some features of all pairs: the order of a sum is that of the list, however many there are.
  in_threads(features, kFeatures, double(pairs) * double(features), [&](int64_t first, int64_t end) {
    for (int64_t p = 0; p < pairs; ++p)
      add_listed_gradient(own.row(rows[p]), own.norm(rows[p]), other.row(columns[p]), other.norm(columns[p]),
                          of_x + rows[p] * features, of_y + columns[p] * features, first, end, similarity,
                          data<T>(slopes)[p], data<T>(found)[p]);
  });
  if (!normalize) return;
  auto through = [&](const ListedRows<T>& of, T* gradient) {
    in_threads(of.count(), 1, double(of.count()) * double(features),
               [&](int64_t first, int64_t end) { of.through_norms(gradient, first, end); });
  };
  through(own, of_x);
  if (y) through(given, of_y);
}

// dx and, where y is given, dy; `slopes` in the similarities `found`, whose indices are known to be in range.
std::tuple<Tensor, Tensor> listed_gradients(Tensor slopes, Tensor found, Tensor x, MaybeTensor y, Tensor rows,
                                            Tensor columns, int64_t similarity, bool normalize) {
  check(x, y, rows, columns, similarity);
  if (found.numel() != rows.numel() || slopes.numel() != rows.numel())
    throw std::runtime_error("listed pairs: a similarity and a slope per pair");
  for (const Tensor* tensor : {&found, &slopes})
    if (tensor->scalar_type() != x.scalar_type() || !tensor->is_contiguous())
      throw std::runtime_error("listed pairs: similarities and slopes must be contiguous, of the type of x");
  if (!in_range(rows, x.size(0)) || !in_range(columns, (y ? *y : x).size(0)))
    throw std::runtime_error("listed pairs: an index is out of range");
  Tensor dx = torch::stable::empty_like(x);
  Tensor dy = y ? torch::stable::empty_like(*y) : torch::stable::new_empty(x, {0});
  (is_double(x) ? run_gradients<double> : run_gradients<float>)(slopes, found, x, y, data<int64_t>(rows),
                                                                data<int64_t>(columns), Similarity(similarity),
                                                                normalize, dx, dy);
  return {dx, dy};
}

}  // namespace
}  // namespace flashpair

STABLE_TORCH_LIBRARY_FRAGMENT(flashpair_cpu, m) {
  m.def(
      "listed_similarities(Tensor x, Tensor? y, Tensor rows, Tensor columns, int similarity, bool normalize) -> "
      "Tensor");
  m.def(
      "listed_gradients(Tensor slopes, Tensor found, Tensor x, Tensor? y, Tensor rows, Tensor columns, int similarity, "
      "bool normalize) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(flashpair_cpu, CPU, m) {
  m.impl("listed_similarities", TORCH_BOX(&flashpair::listed_similarities));
  m.impl("listed_gradients", TORCH_BOX(&flashpair::listed_gradients));
}
