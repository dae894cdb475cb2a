// What every CPU kernel needs beside vectors: a type for the elements of a tensor, and threads.
#pragma once

#include "tensor.h"
#include "vec.h"

#include <exception>
#include <mutex>

namespace segops {

template <typename T>
constexpr ScalarType kScalarType = ScalarType::Undefined;
template <>
constexpr ScalarType kScalarType<float> = ScalarType::Float;
template <>
constexpr ScalarType kScalarType<double> = ScalarType::Double;
template <>
constexpr ScalarType kScalarType<bf16> = ScalarType::BFloat16;
template <>
constexpr ScalarType kScalarType<fp16> = ScalarType::Half;

// Calls fn with a value of the tensor's storage type, which must be one of Ts.
template <typename... Ts, typename F>
void dispatch(const Tensor& tensor, const char* op, const F& fn) {
  const auto call = [&](auto type) {
    if (tensor.scalar_type() != kScalarType<decltype(type)>) return false;
    fn(type);
    return true;
  };
  STD_TORCH_CHECK((call(Ts{}) || ...), op, ": the CPU kernel does not take this dtype");
}

// Calls fn(begin, end) for parts of a range, from several threads. An exception reaches the caller as
// it is: PyTorch's own function would make another of it, which says nothing.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& fn) {
  std::exception_ptr first;
  std::mutex mutex;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    try {
      fn(from, to);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!first) first = std::current_exception();
    }
  });
  if (first) std::rethrow_exception(first);
}

}  // namespace segops
