// What every kernel file needs of torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
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

}  // namespace segops
