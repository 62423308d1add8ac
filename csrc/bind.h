// What the files that register the native operators share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace flashpair {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline void parallel(int64_t count, void (*task)(int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) task(i, context);
  });
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// nullptr where there is none, or an empty one.
template <class T>
T* pointer(const MaybeTensor& tensor) {
  return tensor && tensor->numel() ? data<T>(*tensor) : nullptr;
}

inline bool is_double(const Tensor& x) { return x.scalar_type() == torch::headeronly::ScalarType::Double; }

// How many threads so many multiply-adds are worth.
int threads_for(double products);

}  // namespace flashpair
