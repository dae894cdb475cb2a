// What every kernel file needs of torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

// Before a function that kernels on a GPU call as well.
#ifdef __CUDACC__
#define SEGOPS_HOST_DEVICE __host__ __device__
#else
#define SEGOPS_HOST_DEVICE
#endif

namespace segops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
inline int64_t round_up(int64_t count, int64_t multiple) {
  return ceil_div(count, multiple) * multiple;
}

// A tensor's elements, to be read if T is const. Null if there is no tensor.
template <typename T>
T* data_of(const Tensor& tensor) {
  if constexpr (std::is_const_v<T>)
    return static_cast<T*>(tensor.const_data_ptr());
  else
    return static_cast<T*>(tensor.mutable_data_ptr());
}
template <typename T>
T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? data_of<T>(*tensor) : nullptr;
}

// A tensor (N, C, H, W) with any strides, as kernels take it. Index can number all its elements.
template <typename T, typename Index = int64_t>
struct View {
  T* data;
  Index image, channel, row, pixel;  // strides

  View() = default;
  explicit View(const Tensor& tensor)
      : data(data_of<T>(tensor)),
        image(Index(tensor.stride(0))),
        channel(Index(tensor.stride(1))),
        row(Index(tensor.stride(2))),
        pixel(Index(tensor.stride(3))) {}
  SEGOPS_HOST_DEVICE Index offset(Index n, Index c, Index y, Index x) const {
    return n * image + c * channel + y * row + x * pixel;
  }
  SEGOPS_HOST_DEVICE T* at(Index n, Index c, Index y, Index x) const { return data + offset(n, c, y, x); }
};

}  // namespace segops
