// CUDA for a compiler of C++: what kernels and csrc/common/cuda.h use of it, run by the CPU.
//
// Blocks run one after the other. The threads of a block are fibers: each runs until it meets a barrier or waits for its warp,
// then the next has its turn. Whatever a GPU would answer with wrong numbers, a hang or nothing at all ends the launch with an
// exception that names it: see `fail` in scheduler.cpp. What CUDA leaves open is done in two ways, forwards and in reverse: see
// scheduler.cpp. Masks and barriers count threads that have ended as missing, which is stricter than CUDA. Barriers and votes
// are told apart by their line in the source.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#ifdef __SANITIZE_ADDRESS__  // which guards the bounds of variables that are not of a thread
#define __shared__ static
#else  // together, where they can be found and filled before each block
#define __shared__ static thread_local
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

using cudaStream_t = void*;
using __half = torch::headeronly::Half;
using __nv_bfloat16 = torch::headeronly::BFloat16;

using std::max;
using std::min;
inline float __half2float(__half x) {
  return x;
}
inline __half __float2half(float x) {
  return x;
}
inline float __bfloat162float(__nv_bfloat16 x) {
  return x;
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  return x;
}
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __half2 __floats2half2_rn(float x, float y) {
  return {x, y};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {x, y};
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __fdividef(float x, float y) {
  return x / y;
}

namespace segops::emulation {

// A place in the source: calls that threads must make together are told apart by it.
struct Site {
  const char* file;
  int line;
};
#define SEGOPS_SITE segops::emulation::Site site = {__builtin_FILE(), __builtin_LINE()}

struct Lanes {
  uint64_t value[warpSize];
};

// Ends the launch with an error.
[[noreturn]] void fail(const std::string& message);
// Waits until all threads of the block have come to the same place.
void barrier(Site site);
// Waits until all lanes of `mask` have come to the same place with the same mask; returns what each brought.
const Lanes& meet(unsigned mask, uint64_t value, Site site);
unsigned lane();
void* dynamic_shared();
void begin_copy(void* shared, const void* global, int bytes);
void commit_copies();
void wait_for_copies(int pending);
void run(dim3 blocks, dim3 threads, size_t shared, const std::function<void()>& kernel);

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

// The value of lane `source` of those that met; a lane that did not come has none.
template <typename T>
T of_lane(unsigned mask, const Lanes& lanes, unsigned source) {
  if (source >= unsigned(warpSize) || !(mask >> source & 1)) fail("a shuffle reads a lane that its mask does not name");
  T value;
  std::memcpy(&value, &lanes.value[source], sizeof value);
  return value;
}

}  // namespace segops::emulation

inline void __syncthreads(SEGOPS_SITE) {
  segops::emulation::barrier(site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SEGOPS_SITE) {
  segops::emulation::meet(mask, 0, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SEGOPS_SITE) {
  const auto& lanes = segops::emulation::meet(mask, predicate != 0, site);
  unsigned result = 0;
  for (int i = 0; i < warpSize; ++i) result |= unsigned(mask >> i & 1 && lanes.value[i]) << i;
  return result;
}
inline int __any_sync(unsigned mask, int predicate, SEGOPS_SITE) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SEGOPS_SITE) {
  return __ballot_sync(mask, predicate, site) == mask;
}
// `width` divides a warp into groups of so many lanes, a power of two.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, SEGOPS_SITE) {
  using namespace segops::emulation;
  const auto& lanes = meet(mask, to_bits(value), site);
  return of_lane<T>(mask, lanes, (lane() & ~unsigned(width - 1)) + unsigned(source & (width - 1)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SEGOPS_SITE) {
  using namespace segops::emulation;
  const auto& lanes = meet(mask, to_bits(value), site);
  return (lane() & unsigned(width - 1)) < delta ? value : of_lane<T>(mask, lanes, lane() - delta);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, SEGOPS_SITE) {
  using namespace segops::emulation;
  const auto& lanes = meet(mask, to_bits(value), site);
  return (lane() & unsigned(width - 1)) + delta >= unsigned(width) ? value : of_lane<T>(mask, lanes, lane() + delta);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, SEGOPS_SITE) {
  using namespace segops::emulation;
  const auto& lanes = meet(mask, to_bits(value), site);
  const unsigned source = lane() ^ unsigned(lane_mask), end = (lane() & ~unsigned(width - 1)) + unsigned(width);
  return source >= end ? value : of_lane<T>(mask, lanes, source);
}

// The names of csrc/common/cuda.h.

namespace segops {

struct CurrentStream {
  explicit CurrentStream(const Tensor&) {}
  operator cudaStream_t() const { return nullptr; }
};

inline int compute_capability(const Tensor&) {
  return 0;  // products are the CPU's
}

template <typename... Parameters, typename... Arguments>
void launch(
    void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared, cudaStream_t, const Arguments&... arguments) {
  emulation::run(blocks, threads, shared, [&] { kernel(arguments...); });
}

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(emulation::dynamic_shared());
}

template <int bytes>
void copy_async(void* shared, const void* global) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  emulation::begin_copy(shared, global, bytes);
}
inline void commit_copies() {
  emulation::commit_copies();
}
template <int pending>
void wait_for_copies() {
  emulation::wait_for_copies(pending);
}

inline float fast_exp2(float x) {
  const float power = exp2f(x);
  return power < 0x1p-126f ? 0.f : power;
}

}  // namespace segops
