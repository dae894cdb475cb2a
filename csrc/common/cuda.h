// What every .cu file needs: the launch, conversions, 16-byte loads and stores, sums of a block.
//
// Kernels use the functions of this file for what C++ does not have: launches, shared memory whose
// size the launch gives, asynchronous copies. tests/emulation/cuda_on_cpu.h defines them, and what
// kernels use of CUDA itself, for a C++ compiler, so that tests can run the kernels on a CPU.
#pragma once

#include "tensor.h"

#ifdef SEGOPS_EMULATION
#include "cuda_on_cpu.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

namespace segops {

// Makes the tensor's device current for a scope; converts to PyTorch's current stream there.
class CurrentStream {
 public:
  explicit CurrentStream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  operator cudaStream_t() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// The major number of that of the tensor's GPU.
inline int compute_capability(const Tensor& tensor) {
  int major = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, tensor.get_device_index()));
  return major;
}

// Calls the kernel with `arguments`; `shared` is the bytes that dynamic_shared() points to.
template <typename... Parameters, typename... Arguments>
void launch(
    void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared, cudaStream_t stream,
    const Arguments&... arguments) {
  if (shared > 16 << 10)  // more than 48 KB needs asking for; up to 32 KB of a kernel's memory may be static
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  cudaLaunchConfig_t configuration{};
  configuration.gridDim = blocks;
  configuration.blockDim = threads;
  configuration.dynamicSmemBytes = shared;
  configuration.stream = stream;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&configuration, kernel, arguments...));
}

// The block's shared memory whose size the launch gave, from a multiple of 16 bytes on.
template <typename T>
__device__ inline T* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<T*>(memory);
}

// Begins to copy 4, 8 or 16 bytes, both ends aligned to as many, into shared memory.
template <int bytes>
__device__ inline void copy_async(void* shared, const void* global) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
#if __CUDA_ARCH__ >= 800
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(bytes) : "memory");
#else  // which has no such instruction
  for (int i = 0; i < bytes / 4; ++i) static_cast<float*>(shared)[i] = static_cast<const float*>(global)[i];
#endif
}
// Makes a group of the copies that this thread has begun since the last one.
__device__ inline void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most the last `pending` groups of this thread are under way. Other threads see a
// copy after a barrier.
template <int pending>
__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// 2^x to about 2 units in the last place, in one instruction; 0 where it is below the normal
// numbers.
__device__ inline float fast_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

}  // namespace segops

#endif

namespace segops {

constexpr int kThreads = 256;

// Threads of the last block go beyond it, and must not reach 2^31.
#ifdef SEGOPS_EMULATION  // whose maps are small: both kinds are to be run
constexpr int64_t kLargestIndex = 1 << 13;
#else
constexpr int64_t kLargestIndex = INT32_MAX - (1 << 12);
#endif

// Blocks of kThreads threads for so many threads of work.
inline unsigned blocks_for(int64_t threads) {
  const int64_t count = ceil_div(threads, kThreads);
  STD_TORCH_CHECK(count <= 0x7fffffff, "segops: the map is too large for one CUDA launch");
  return unsigned(count);
}

// Division by what a launch knows, as a multiplication: 64-bit division costs a GPU about a hundred
// instructions, 32-bit division twenty.
struct Divisor {
  uint32_t divisor = 1, multiplier = (1u << 31) + 1;
  int shift = 31;

  Divisor() = default;
  explicit Divisor(int64_t by) : divisor(uint32_t(by)) {
    STD_TORCH_CHECK(by > 0 && by <= INT32_MAX, "segops: cannot divide by ", by);
    while ((int64_t(1) << (shift - 31)) < by) ++shift;
    // At most 1 / divisor too large, and exact below 2^31. (By one it is 2^31 + 1: shifted, the
    // rest vanishes.)
    multiplier = uint32_t((uint64_t(1) << shift) / divisor + 1);
  }
  // n / divisor for n >= 0; 64 bits are divided.
  __device__ int32_t divide(int32_t n) const { return int32_t(uint64_t(uint32_t(n)) * multiplier >> shift); }
  __device__ int64_t divide(int64_t n) const { return n / divisor; }
  template <typename Index>
  __device__ Index divide(Index n, Index& rest) const {
    const Index quotient = divide(n);
    rest = n - quotient * Index(divisor);
    return quotient;
  }
};

// Calls fn with a value of the type that kernels number elements with: 32 bits cost half of 64, and
// `elements` says how many there are, of the largest tensor and of its gaps.
template <typename F>
void with_index(int64_t elements, const F& fn) {
  elements <= kLargestIndex ? fn(int32_t{}) : fn(int64_t{});
}

// Elements from a tensor's first to its last, the gaps between them included.
inline int64_t extent(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  return last + 1;
}

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

// V elements that are loaded and stored at once, at addresses that are multiples of their size.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

// The same in words where that goes: nvcc takes a pack of half words apart.
template <typename T, int V>
using Words = std::conditional_t<sizeof(T) * V % 4 == 0, Pack<uint32_t, sizeof(T) * V / 4>, Pack<T, V>>;

template <typename T, int V>
__device__ inline Pack<T, V> load(const T* p, bool wanted = true) {  // else zeros
  Words<T, V> words{};
  if (wanted) words = *reinterpret_cast<const Words<T, V>*>(p);
  Pack<T, V> pack;
  std::memcpy(&pack, &words, sizeof pack);
  return pack;
}

template <typename T, int V>
__device__ inline void widen(const Pack<T, V>& pack, float (&wide)[V]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && V % 2 == 0) {  // two instructions for two, by halves it is three
    uint32_t words[V / 2];
    std::memcpy(words, &pack, sizeof words);
#pragma unroll
    for (int v = 0; v < V; ++v) wide[v] = __uint_as_float(v % 2 ? words[v / 2] & 0xffff0000 : words[v / 2] << 16);
  } else {
#pragma unroll
    for (int v = 0; v < V; ++v) wide[v] = widen(pack.value[v]);
  }
}

// acc += weight * pack
template <typename T, int V>
__device__ inline void add(float (&acc)[V], const Pack<T, V>& pack, float weight = 1.f) {
  float wide[V];
  widen(pack, wide);
#pragma unroll
  for (int v = 0; v < V; ++v) acc[v] += weight * wide[v];
}

// acc += weight * the V elements at p
template <typename T, int V>
__device__ inline void add(float (&acc)[V], const T* p, float weight = 1.f) {
  add(acc, load<T, V>(p), weight);
}

__device__ inline __half2 narrow(float x, float y, __half) {
  return __floats2half2_rn(x, y);
}
__device__ inline __nv_bfloat162 narrow(float x, float y, __nv_bfloat16) {
  return __floats2bfloat162_rn(x, y);
}

template <typename T, int V>
__device__ inline void store(T* p, const float (&acc)[V]) {
  Words<T, V> words;
  if constexpr (sizeof(T) == 2 && V % 2 == 0) {
#pragma unroll
    for (int v = 0; v < V; v += 2) {
      const auto pair = narrow(acc[v], acc[v + 1], T{});
      std::memcpy(&words.value[v / 2], &pair, sizeof pair);
    }
  } else {
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) narrow(acc[v], pack.value[v]);
    std::memcpy(&words, &pack, sizeof words);
  }
  *reinterpret_cast<Words<T, V>*>(p) = words;
}

// The sum of the values of a block of kThreads threads, in a fixed order; every thread gets it.
template <typename T>
__device__ inline T block_sum(T value) {
  __shared__ T values[kThreads];
  values[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
    __syncthreads();
  }
  const T sum = values[0];
  __syncthreads();  // the next sum takes the same memory
  return sum;
}

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
