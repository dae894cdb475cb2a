// Sorting on CUDA. Apart from cuda.h, since CUB takes long to compile.
#pragma once

#include "cuda.h"

#ifdef SEGOPS_EMULATION
#include <algorithm>
#include <numeric>
#else
#include <cub/device/device_radix_sort.cuh>
#endif

namespace segops {

// Writes the pairs in ascending order of their keys, integers; those of equal keys keep their
// order. Scratch memory is taken from PyTorch on `like`'s device. Nothing is synchronised.
template <typename Key, typename Value>
void sort_pairs(
    const Key* keys, Key* sorted_keys, const Value* values, Value* sorted_values, int64_t count, const Tensor& like,
    cudaStream_t stream) {
#ifdef SEGOPS_EMULATION
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] < keys[b]; });
  for (int64_t i = 0; i < count; ++i) {
    sorted_keys[i] = keys[order[i]];
    sorted_values[i] = values[order[i]];
  }
#else
  size_t bytes = 0;
  const auto sort = [&](void* scratch) {
    STD_CUDA_CHECK(
        cub::DeviceRadixSort::SortPairs(
            scratch, bytes, keys, sorted_keys, values, sorted_values, count, 0, int(8 * sizeof(Key)), stream));
  };
  sort(nullptr);  // says how many bytes it takes
  Tensor scratch = torch::stable::new_empty(like, {int64_t(bytes)}, ScalarType::Byte);
  sort(scratch.mutable_data_ptr());
#endif
}

}  // namespace segops
