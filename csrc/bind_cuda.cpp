// The CUDA operators: decode the flat arguments of python/flashpair/backend_cuda.py into a Pass and start a kernel on a
// stream. Through LibTorch's stable ABI; everything written is allocated by the caller, and nothing here waits.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <type_traits>
#include <vector>

#include "engine_cuda.h"

namespace flashpair {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;
using torch::headeronly::ScalarType;

// Fields of the flat pass, in the order of `_HEADER`, `_ITEM` and `_TERM` in backend_cuda.py.
enum Header {
  kFirstB,
  kEndB,
  kFirstN,
  kEndN,
  kTilesB,
  kTilesN,
  kPaddedB,
  kPaddedN,
  kColumns,
  kSimilarity,
  kScaled,
  kExcludeSelf,
  kSymmetric,
  kTriangle,
  kMirrorSums,
  kSameOnly,
  kItems,
  kTerms,
  kHeader
};
enum ItemField { kItemRow, kItemColumn, kItemShared, kItem };
enum TermField {
  kReduction,
  kScore,
  kMask,
  kLogaddexp,
  kDetach,
  kGuide,
  kHasAbove,
  kHasBelow,
  kLargest,
  kOwnsColumns,
  kScale,
  kOffset,
  kAbove,
  kBelow,
  kOtherOffset,
  kWeight,
  kCotangent,
  kLse,
  kMean,
  kSlot,
  kScaleSlot,
  kOffsetSlot,
  kOtherSlot,
  kWeightSlot,
  kValueSlot,
  kTerm
};
enum Operand { kX, kY, kXNorms, kYNorms, kXLabels, kYLabels, kExclude, kPairMask, kGuidePanel, kOperands };

template <class T>
T* data(const Tensor& tensor) {
  return tensor.numel() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

void check(Status status, const char* what) {
  const char* message = describe(status);
  STD_TORCH_CHECK(message == nullptr, "flashpair: ", what, " could not start: ", message ? message : "",
                  "; `python -m flashpair` says for which GPUs the CUDA part was built");
}

template <class T>
Value<T> value(const Tensors& vectors, int64_t index, double number) {
  if (index < 0) return {nullptr, T(number), 0};
  const Tensor& tensor = vectors[size_t(index)];
  return {data<T>(tensor), T(0), tensor.numel() == 1 ? 0 : 1};
}

template <class T>
Pass<T> decode(const Tensors& operands, const Tensors& vectors, const Ints& codes, const Floats& numbers) {
  Pass<T> pass{};
  pass.x_norms = data<T>(operands[kXNorms]), pass.y_norms = data<T>(operands[kYNorms]);
  pass.x_labels = data<int32_t>(operands[kXLabels]), pass.y_labels = data<int32_t>(operands[kYLabels]);
  pass.exclude = data<int32_t>(operands[kExclude]), pass.pair_mask = data<uint8_t>(operands[kPairMask]);
  if (operands[kGuidePanel].numel())
    pass.guide = data<T>(operands[kGuidePanel]), pass.guide_stride = int32_t(operands[kGuidePanel].stride(0));
  pass.padded_b = codes[kPaddedB], pass.padded_n = codes[kPaddedN], pass.columns = codes[kColumns];
  pass.first_b = int32_t(codes[kFirstB]), pass.end_b = int32_t(codes[kEndB]);
  pass.first_n = int32_t(codes[kFirstN]), pass.end_n = int32_t(codes[kEndN]);
  pass.tiles_b = int32_t(codes[kTilesB]), pass.tiles_n = int32_t(codes[kTilesN]);
  pass.similarity = Similarity(codes[kSimilarity]);
  pass.scaled = codes[kScaled], pass.exclude_self = codes[kExcludeSelf], pass.symmetric = codes[kSymmetric];
  pass.triangle = codes[kTriangle], pass.mirror_sums = codes[kMirrorSums], pass.same_only = codes[kSameOnly];
  pass.item_count = int8_t(codes[kItems]), pass.term_count = int8_t(codes[kTerms]);
  const int64_t* field = codes.data() + kHeader;
  for (int n = 0; n < pass.item_count; ++n, field += kItem)
    pass.items[n] = {int8_t(field[kItemRow]), int8_t(field[kItemColumn]), bool(field[kItemShared])};
  for (int t = 0; t < pass.term_count; ++t, field += kTerm) {
    const double* number = numbers.data() + 5 * t;
    TermCode<T>& term = pass.terms[t];
    term.reduction = Reduction(field[kReduction]), term.score = Score(field[kScore]), term.mask = Mask(field[kMask]);
    term.guide = Guide(field[kGuide]);
    term.logaddexp = field[kLogaddexp], term.detach = field[kDetach], term.largest = field[kLargest];
    term.owns_columns = field[kOwnsColumns];
    term.has_above = field[kHasAbove], term.has_below = field[kHasBelow];
    term.scale = value<T>(vectors, field[kScale], number[0]);
    term.offset = value<T>(vectors, field[kOffset], number[1]);
    term.above = value<T>(vectors, field[kAbove], number[2]);
    term.below = value<T>(vectors, field[kBelow], number[3]);
    term.constant = T(number[4]);
    auto vector = [&](TermField at) { return field[at] < 0 ? nullptr : data<T>(vectors[size_t(field[at])]); };
    term.other_offset = vector(kOtherOffset), term.weight = vector(kWeight);
    term.cotangent = vector(kCotangent), term.lse = vector(kLse), term.mean = vector(kMean);
    term.slot = int16_t(field[kSlot]);
    term.scale_slot = int16_t(field[kScaleSlot]), term.offset_slot = int16_t(field[kOffsetSlot]);
    term.other_slot = int16_t(field[kOtherSlot]), term.weight_slot = int16_t(field[kWeightSlot]);
    term.value_slot = int16_t(field[kValueSlot]);
  }
  return pass;
}

template <class Input>
EmbeddingSource<Input> embeddings(const Tensors& operands) {
  const Tensor &x = operands[kX], &y = operands[kY];
  return {data<const Input>(x), data<const Input>(y), x.stride(0), y.stride(0), int32_t(x.size(1))};
}

// Calls f(source) with the panel of similarities if there is one, else with the embeddings that it is computed from.
template <class F>
Status with_source(const Tensors& operands, const Tensor& panel, F f) {
  if (panel.numel()) {
    if (panel.scalar_type() == ScalarType::Double)
      return f(PanelSource<double>{data<double>(panel), int32_t(panel.stride(0))}, double{});
    return f(PanelSource<float>{data<float>(panel), int32_t(panel.stride(0))}, float{});
  }
  if (operands[kX].scalar_type() == ScalarType::Half) return f(embeddings<Half>(operands), float{});
  return f(embeddings<BFloat16>(operands), float{});
}

Stream stream_of(int64_t handle) { return reinterpret_cast<Stream>(handle); }

void stats(Tensors operands, Tensor panel, Tensors vectors, Ints codes, Floats numbers, int64_t stream,
           Tensor row_partials, Tensor column_partials) {
  check(with_source(operands, panel,
                    [&](auto source, auto t) {
                      using T = decltype(t);
                      return start_stats(decode<T>(operands, vectors, codes, numbers), source,
                                         Partials<T>{data<T>(row_partials), data<T>(column_partials)},
                                         stream_of(stream));
                    }),
        "the statistics kernel");
}

// `slots`: partial vectors per side, then the slots of the row and column sums of the weights.
void weights(Tensors operands, Tensor panel, Tensors vectors, Ints codes, Floats numbers, int64_t stream,
             Tensor row_partials, Tensor column_partials, Tensor w, Tensor factor, Ints slots) {
  auto start = [&](auto source, auto t) {
    using T = decltype(t);
    auto to = [&](auto out) {
      using Out = decltype(out);
      const WeightsOutput<Out> output{data<Out>(w), w.numel() ? w.stride(0) : 0, data<float>(factor), int(slots[2]),
                                      int(slots[3])};
      return start_weights(decode<T>(operands, vectors, codes, numbers), source,
                           Partials<T>{data<T>(row_partials), data<T>(column_partials)}, output, int(slots[0]),
                           int(slots[1]), stream_of(stream));
    };
    using Source = decltype(source);
    if constexpr (std::is_same_v<Source, EmbeddingSource<Half>>) return to(Half{});
    if constexpr (std::is_same_v<Source, EmbeddingSource<BFloat16>>) return to(BFloat16{});
    if constexpr (std::is_same_v<Source, PanelSource<double>>) return to(double{});
    if constexpr (std::is_same_v<Source, PanelSource<float>>) {
      if (w.scalar_type() == ScalarType::Half) return to(Half{});
      if (w.scalar_type() == ScalarType::BFloat16) return to(BFloat16{});
      return to(float{});
    }
  };
  check(with_source(operands, panel, start), "the pair weights kernel");
}

void extremes(Tensors operands, Tensor panel, Tensors vectors, Ints codes, Floats numbers, int64_t stream,
              Tensors partials) {
  check(with_source(operands, panel,
                    [&](auto source, auto t) {
                      using T = decltype(t);
                      return start_extremes(decode<T>(operands, vectors, codes, numbers), source,
                                            Partials<T>{data<T>(partials[0]), data<T>(partials[2])},
                                            Partials<int32_t>{data<int32_t>(partials[1]), data<int32_t>(partials[3])},
                                            stream_of(stream));
                    }),
        "the extremes kernel");
}

template <class T>
Best<T> best(const Tensor& values, const Tensor& places) {
  return {data<T>(values), data<int32_t>(places)};
}

void top_k(Tensors operands, Tensor panel, Tensors vectors, Ints codes, Floats numbers, int64_t stream, int64_t k,
           int64_t stripes, Tensor values, Tensor places) {
  auto start = [&](auto t) {
    using T = decltype(t);
    return start_top_k(decode<T>(operands, vectors, codes, numbers),
                       PanelSource<T>{data<T>(panel), int32_t(panel.stride(0))}, best<T>(values, places), int(k),
                       int(stripes), stream_of(stream));
  };
  check(panel.scalar_type() == ScalarType::Double ? start(double{}) : start(float{}), "the top-k kernel");
}

// `from`: (lists, rows, k) values and places, `into`: (rows, k).
void merge_best(Tensor from_values, Tensor from_places, Tensor values, Tensor places, int64_t lists, int64_t rows,
                int64_t k, bool largest, int64_t stream) {
  auto start = [&](auto t) {
    using T = decltype(t);
    return start_merge_best(best<T>(from_values, from_places), int(lists), best<T>(values, places), int(rows), int(k),
                            largest, stream_of(stream));
  };
  check(values.scalar_type() == ScalarType::Double ? start(double{}) : start(float{}), "the merging kernel");
}

// `entries`: (reduction, first partial, first of the state) each.
void fold(Tensor partials, Tensor state, int64_t tiles, int64_t length, int64_t first, Ints entries, int64_t stream) {
  FoldEntries list{};
  STD_TORCH_CHECK(entries.size() / 3 <= size_t(kMaxEntries), "flashpair: at most ", kMaxEntries, " statistics a pass");
  for (size_t n = 0; n + 2 < entries.size(); n += 3)
    list.entries[list.count++] = {int8_t(entries[n]), int16_t(entries[n + 1]), int16_t(entries[n + 2])};
  auto start = [&](auto t) {
    using T = decltype(t);
    return start_fold(data<T>(partials), data<double>(state), int(tiles), int(length), first, state.size(1), list,
                      stream_of(stream));
  };
  check(partials.scalar_type() == ScalarType::Double ? start(double{}) : start(float{}), "the folding kernel");
}

// Lengths of the flat pass, so that a build of other sources is noticed.
Ints layout() { return {kHeader, kItem, kTerm, kOperands, kMaxTerms}; }

// CUDA that the kernels were built with and that the driver serves, such as 13000; none where they run on the host.
Ints versions() {
#if defined(FP_EMULATED)
  return {};
#else
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  return {CUDART_VERSION, driver};
#endif
}

}  // namespace
}  // namespace flashpair

#define FP_PASS "Tensor[] operands, Tensor panel, Tensor[] vectors, int[] codes, float[] numbers, int stream, "

STABLE_TORCH_LIBRARY(flashpair_cuda, m) {
  m.def("stats(" FP_PASS "Tensor(a!) row_partials, Tensor(b!) column_partials) -> ()");
  m.def("weights(" FP_PASS
        "Tensor(a!) row_partials, Tensor(b!) column_partials, Tensor(c!) w, Tensor factor, int[] slots) -> ()");
  m.def("extremes(" FP_PASS "Tensor(a!)[] partials) -> ()");
  m.def("top_k(" FP_PASS "int k, int stripes, Tensor(a!) values, Tensor(b!) places) -> ()");
  m.def(
      "merge_best(Tensor from_values, Tensor from_places, Tensor(a!) values, Tensor(b!) places, int lists, int rows, "
      "int k, bool largest, int stream) -> ()");
  m.def("fold(Tensor partials, Tensor(a!) state, int tiles, int length, int first, int[] entries, int stream) -> ()");
  m.def("layout() -> int[]");
  m.def("versions() -> int[]");
}

// The device of the tensors is the caller's affair, so that the emulated kernels serve CPU tensors.
STABLE_TORCH_LIBRARY_IMPL(flashpair_cuda, CompositeExplicitAutograd, m) {
  m.impl("stats", TORCH_BOX(&flashpair::stats));
  m.impl("weights", TORCH_BOX(&flashpair::weights));
  m.impl("extremes", TORCH_BOX(&flashpair::extremes));
  m.impl("top_k", TORCH_BOX(&flashpair::top_k));
  m.impl("merge_best", TORCH_BOX(&flashpair::merge_best));
  m.impl("fold", TORCH_BOX(&flashpair::fold));
  m.impl("layout", TORCH_BOX(&flashpair::layout));
  m.impl("versions", TORCH_BOX(&flashpair::versions));
}
