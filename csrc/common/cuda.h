// What every .cu file needs: conversions, 16-byte loads and stores, the launch.
#pragma once

#include "tensor.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace segops {

constexpr int kThreads = 256;

__device__ inline float widen(float x) {
  return x;
}
__device__ inline float widen(__half x) {
  return __half2float(x);
}
__device__ inline float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

__device__ inline void narrow(float x, float& y) {
  y = x;
}
__device__ inline void narrow(float x, __half& y) {
  y = __float2half(x);
}
__device__ inline void narrow(float x, __nv_bfloat16& y) {
  y = __float2bfloat16(x);
}

// V elements that are loaded and stored at once; V * sizeof(T) is the alignment that the addresses must have.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

// acc += weight * the V elements at p
template <typename T, int V>
__device__ inline void add(float (&acc)[V], const T* p, float weight = 1.f) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(p);
#pragma unroll
  for (int v = 0; v < V; ++v) acc[v] += weight * widen(pack.value[v]);
}

template <typename T, int V>
__device__ inline void store(T* p, const float (&acc)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) narrow(acc[v], pack.value[v]);
  *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// Makes the tensor's device current for a scope and holds the stream that PyTorch has current there.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

  // Blocks of kThreads threads for so many threads of work.
  static unsigned blocks(int64_t threads) {
    const int64_t count = (threads + kThreads - 1) / kThreads;
    STD_TORCH_CHECK(count <= 0x7fffffff, "segops: the map is too large for one CUDA launch");
    return unsigned(count);
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Calls fn with a value of the tensor's element type.
template <typename F>
void dispatch_cuda(const Tensor& tensor, const char* op, const F& fn) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return fn(float{});
    case ScalarType::Half:
      return fn(__half{});
    case ScalarType::BFloat16:
      return fn(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": the CUDA kernel takes float32, float16 or bfloat16");
  }
}

}  // namespace segops
