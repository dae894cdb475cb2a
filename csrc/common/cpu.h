// What every CPU kernel needs beside vectors: a type for the elements of a tensor.
#pragma once

#include "tensor.h"
#include "vec.h"

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

}  // namespace segops
