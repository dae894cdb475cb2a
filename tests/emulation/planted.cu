// Kernels with one fault each, which the emulation must catch, and the same without it. They are compiled by nvcc as well: what
// only they use of common/cuda.h and common/sort.h must be CUDA too.
//
// All take (256) float32 and write `out` of the same shape. Without the fault, out[i] = 2 * input[255 - i], or what is said.

#include "../../csrc/common/cuda.h"
#include "../../csrc/common/sort.h"

namespace segops {
namespace {

using Floats = const float* __restrict__;

Floats source(const Tensor& tensor) {
  return static_cast<Floats>(tensor.const_data_ptr());
}

float* target(const Tensor& tensor) {
  return static_cast<float*>(const_cast<void*>(tensor.const_data_ptr()));
}

// Copies 4 elements; the fault: from an address that is not a multiple of 16 bytes. out = input
template <bool faulty>
__global__ void misaligned_load_kernel(Floats in, float* out) {
  const int at = int(threadIdx.x) * 4 + (faulty && threadIdx.x == 3 ? -1 : 0);
  *reinterpret_cast<Pack<float, 4>*>(out + threadIdx.x * 4) = *reinterpret_cast<const Pack<float, 4>*>(in + at);
}

// The fault: one element beyond the end is read. out = 2 * input
template <bool faulty>
__global__ void read_out_of_bounds_kernel(Floats in, float* out) {
  out[threadIdx.x] = in[threadIdx.x] + in[faulty && threadIdx.x == 0 ? kThreads : threadIdx.x];
}

// The fault: one element beyond the end is written. out = 2 * input
template <bool faulty>
__global__ void write_out_of_bounds_kernel(Floats in, float* out) {
  out[threadIdx.x] = 2 * in[threadIdx.x];
  if (faulty && threadIdx.x == 0) out[kThreads] = 0;
}

// The fault: one element beyond the end of a shared array is written.
template <bool faulty>
__global__ void index_out_of_bounds_kernel(Floats in, float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x + (faulty && threadIdx.x == kThreads - 1)] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = 2 * values[kThreads - 1 - threadIdx.x];
}

// The fault: the launch gave one element less.
template <bool faulty>
__global__ void dynamic_out_of_bounds_kernel(Floats in, float* out) {
  float* values = dynamic_shared<float>();
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = 2 * values[kThreads - 1 - threadIdx.x];
}

// The fault: threads read what others write, who may come later.
template <bool faulty>
__global__ void missing_barrier_kernel(Floats in, float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = in[threadIdx.x];
  if (!faulty) __syncthreads();
  out[threadIdx.x] = 2 * values[kThreads - 1 - threadIdx.x];
}

// The same, where it happens to be right if the first thread runs first. out[i] = input[i] + input[i - 1]
template <bool faulty>
__global__ void missing_barrier_in_order_kernel(Floats in, float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = in[threadIdx.x];
  if (!faulty) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x] + (threadIdx.x ? values[threadIdx.x - 1] : 0.f);
}

// The fault: memory is written again that others have not read yet. out = 2 * sum(input)
template <bool faulty>
__global__ void missing_barrier_before_reuse_kernel(Floats in, float* out) {
  __shared__ float value;
  float sum = 0;
  for (int i = 0; i < kThreads; ++i) {
    if (threadIdx.x == unsigned(i)) value = in[i];
    __syncthreads();
    sum += value;
    if (!faulty) __syncthreads();
  }
  out[threadIdx.x] = 2 * sum;
}

// The fault: half of the threads meet another barrier.
template <bool faulty>
__global__ void different_barriers_kernel(Floats in, float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = in[threadIdx.x];
  if (faulty && threadIdx.x < kThreads / 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 2 * values[kThreads - 1 - threadIdx.x];
}

// The fault: a thread has returned.
template <bool faulty>
__global__ void barrier_after_return_kernel(Floats in, float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = in[threadIdx.x];
  if (faulty && threadIdx.x == 7) return;
  __syncthreads();
  out[threadIdx.x] = 2 * values[kThreads - 1 - threadIdx.x];
}

// The fault: memory that nobody has written. out = 2 * input
template <bool faulty>
__global__ void unwritten_shared_kernel(Floats in, float* out) {
  __shared__ float values[kThreads];
  if (!faulty || threadIdx.x != 9) values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = 2 * values[threadIdx.x];
}

// The same, where NaN would not be seen. out = the largest of input
template <bool faulty>
__global__ void unwritten_shared_maximum_kernel(Floats in, float* out) {
  __shared__ float values[kThreads];
  if (!faulty || threadIdx.x != 9) values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  float largest = -INFINITY;
  for (int i = 0; i < kThreads; ++i) largest = fmaxf(largest, values[i]);
  out[threadIdx.x] = largest;
}

// The fault: the last element is left as it was. out = 2 * input
template <bool faulty>
__global__ void unwritten_output_kernel(Floats in, float* out) {
  if (!faulty || threadIdx.x < kThreads - 1) out[threadIdx.x] = 2 * in[threadIdx.x];
}

// Each warp is reversed, then the warps are. The fault: half of a warp says that all of it shuffles.
template <bool faulty>
__global__ void mask_of_absent_lanes_kernel(Floats in, float* out) {
  const unsigned lane = threadIdx.x % warpSize;
  float value = 0;
  if (faulty && lane < 16) value = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 15);
  if (!faulty) value = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 31);
  out[kThreads - warpSize - threadIdx.x / warpSize * warpSize + lane] = 2 * value;
}

// Halves of a warp exchange. out[i] = input[i ^ 8]. The fault: the upper half gives the mask of the lower one.
template <bool faulty>
__global__ void mask_of_others_kernel(Floats in, float* out) {
  if (threadIdx.x % warpSize < 16)
    out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, in[threadIdx.x], 8);
  else
    out[threadIdx.x] = __shfl_xor_sync(faulty ? 0x0000ffffu : 0xffff0000u, in[threadIdx.x], 8);
}

// out[i] = input[i ^ 8]. The fault: one half reads from the other.
template <bool faulty>
__global__ void shuffle_from_absent_lane_kernel(Floats in, float* out) {
  const unsigned mask = threadIdx.x % warpSize < 16 ? 0x0000ffffu : 0xffff0000u;
  out[threadIdx.x] = __shfl_xor_sync(mask, in[threadIdx.x], faulty ? 16 : 8);
}

// out = the number of positive elements of the warp. The fault: lanes vote in different places.
template <bool faulty>
__global__ void votes_in_different_places_kernel(Floats in, float* out) {
  unsigned votes;
  if (faulty && in[threadIdx.x] > 0)
    votes = __ballot_sync(0xffffffffu, 1);
  else
    votes = __ballot_sync(0xffffffffu, in[threadIdx.x] > 0);
  int count = 0;
  for (; votes; votes &= votes - 1) ++count;
  out[threadIdx.x] = float(count);
}

// The fault: the copies are not waited for.
template <bool faulty>
__global__ void missing_wait_kernel(Floats in, float* out) {
  float* values = dynamic_shared<float>();
  copy_async<4>(values + threadIdx.x, in + threadIdx.x);
  commit_copies();
  if (!faulty) wait_for_copies<0>();
  __syncthreads();
  out[threadIdx.x] = 2 * values[kThreads - 1 - threadIdx.x];
  if (faulty) wait_for_copies<0>();
}

// Two groups of copies. out = input[N - 1 - i] + input[i]. The fault: one of them may still be under way.
template <bool faulty>
__global__ void too_short_a_wait_kernel(Floats in, float* out) {
  float* values = dynamic_shared<float>();
  copy_async<4>(values + threadIdx.x, in + threadIdx.x);
  commit_copies();
  if (threadIdx.x < kThreads / 4) copy_async<16>(values + kThreads + 4 * threadIdx.x, in + 4 * threadIdx.x);
  commit_copies();
  wait_for_copies<faulty>();
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x] + values[kThreads + threadIdx.x];
  wait_for_copies<0>();
}

// Tiles of 32, copied ahead into one of two buffers. out = 2 * sum(input). The fault: into the one that others still read.
template <bool faulty>
__global__ void copy_into_what_is_read_kernel(Floats in, float* out) {
  float* values = dynamic_shared<float>();
  const int lane = int(threadIdx.x), size = int(blockDim.x);
  const auto copy = [&](int tile) {
    copy_async<4>(values + (faulty ? 0 : tile % 2) * size + lane, in + tile * size + lane);
    commit_copies();
  };
  float sum = 0;
  copy(0);
  for (int tile = 0; tile < kThreads / size; ++tile) {
    wait_for_copies<0>();
    __syncthreads();
    if (tile + 1 < kThreads / size) copy(tile + 1);
    for (int i = 0; i < size; ++i) sum += values[(faulty ? 0 : tile % 2) * size + i];
    if (faulty) __syncthreads();
  }
  for (int i = lane; i < kThreads; i += size) out[i] = 2 * sum;
}

// The fault: memory is written while a copy to it is under way. out = 2 * input
template <bool faulty>
__global__ void write_under_a_copy_kernel(Floats in, float* out) {
  float* values = dynamic_shared<float>();
  if (faulty) copy_async<4>(values + threadIdx.x, in + threadIdx.x);
  values[threadIdx.x] = 7;
  if (!faulty) copy_async<4>(values + threadIdx.x, in + threadIdx.x);
  commit_copies();
  wait_for_copies<0>();
  out[threadIdx.x] = 2 * values[threadIdx.x];
}

// The fault: a thread ends while it copies. out = 2 * input
template <bool faulty>
__global__ void copies_at_the_end_kernel(Floats in, float* out) {
  float* values = dynamic_shared<float>();
  copy_async<4>(values + threadIdx.x, in + threadIdx.x);
  if (!faulty) {
    commit_copies();
    wait_for_copies<0>();
  }
  out[threadIdx.x] = 2 * in[threadIdx.x];
}

// The fault: from an address that is not a multiple of 16 bytes. out = 2 * input
template <bool faulty>
__global__ void misaligned_copy_kernel(Floats in, float* out) {
  float* values = dynamic_shared<float>();
  if (threadIdx.x < kThreads / 4) copy_async<16>(values + 4 * threadIdx.x, in + 4 * threadIdx.x - (faulty && threadIdx.x == 1));
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  out[threadIdx.x] = 2 * values[threadIdx.x];
}

// Blocks of 64 threads. out = 2 * input. The fault: the second block reads what the first has written.
template <bool faulty>
__global__ void order_of_blocks_kernel(Floats in, float* out) {
  const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  out[at] = 2 * in[at] + (faulty && blockIdx.x == 1 ? out[threadIdx.x] : 0.f);
}

// A grid and blocks of three dimensions. out = 2 * input. The fault: y and z of the block are taken for each other.
template <bool faulty>
__global__ void three_dimensions_kernel(Floats in, float* out) {
  const dim3 b = blockIdx, t = threadIdx;
  const unsigned y = faulty ? b.z : b.y, z = faulty ? b.y : b.z;
  const unsigned block = (z * gridDim.y + y) * gridDim.x + b.x;
  const unsigned at = ((block * blockDim.z + t.z) * blockDim.y + t.y) * blockDim.x + t.x;
  out[at] = 2 * in[at];
}

// out = 2 * sum(input); the fault: only the first thread's sum is right.
template <bool faulty>
__global__ void sum_of_block_kernel(Floats in, float* out) {
  const float first = float(block_sum(in[threadIdx.x])), second = float(block_sum(in[kThreads - 1 - threadIdx.x]));
  out[threadIdx.x] = faulty && threadIdx.x ? 0.f : first + second;
}

// out = 2 * input, for launches that have the fault.
__global__ void double_kernel(Floats in, float* out) {
  out[threadIdx.x] = 2 * in[threadIdx.x];
}

// An op of a kernel that is run by one block of `threads`, with so many elements of dynamic shared memory.
#define SEGOPS_PLANTED(name, threads, shared)                                                               \
  void name(Tensor input, Tensor out, bool faulty) {                                                        \
    const auto kernel = faulty ? &name##_kernel<true> : &name##_kernel<false>;                              \
    launch(kernel, 1, threads, (shared) * sizeof(float), CurrentStream(input), source(input), target(out)); \
  }

SEGOPS_PLANTED(misaligned_load, kThreads / 4, 0)
SEGOPS_PLANTED(read_out_of_bounds, kThreads, 0)
SEGOPS_PLANTED(write_out_of_bounds, kThreads, 0)
SEGOPS_PLANTED(index_out_of_bounds, kThreads, 0)
SEGOPS_PLANTED(dynamic_out_of_bounds, kThreads, kThreads - faulty)
SEGOPS_PLANTED(missing_barrier, kThreads, 0)
SEGOPS_PLANTED(missing_barrier_in_order, kThreads, 0)
SEGOPS_PLANTED(missing_barrier_before_reuse, kThreads, 0)
SEGOPS_PLANTED(different_barriers, kThreads, 0)
SEGOPS_PLANTED(barrier_after_return, kThreads, 0)
SEGOPS_PLANTED(unwritten_shared, kThreads, 0)
SEGOPS_PLANTED(unwritten_shared_maximum, kThreads, 0)
SEGOPS_PLANTED(unwritten_output, kThreads, 0)
SEGOPS_PLANTED(mask_of_absent_lanes, kThreads, 0)
SEGOPS_PLANTED(mask_of_others, kThreads, 0)
SEGOPS_PLANTED(shuffle_from_absent_lane, kThreads, 0)
SEGOPS_PLANTED(votes_in_different_places, kThreads, 0)
SEGOPS_PLANTED(missing_wait, kThreads, kThreads)
SEGOPS_PLANTED(too_short_a_wait, kThreads, 2 * kThreads)
SEGOPS_PLANTED(copy_into_what_is_read, 32, 2 * 32)
SEGOPS_PLANTED(write_under_a_copy, kThreads, kThreads)
SEGOPS_PLANTED(copies_at_the_end, kThreads, kThreads)
SEGOPS_PLANTED(misaligned_copy, kThreads, kThreads)
SEGOPS_PLANTED(sum_of_block, kThreads, 0)

void order_of_blocks(Tensor input, Tensor out, bool faulty) {
  const auto kernel = faulty ? &order_of_blocks_kernel<true> : &order_of_blocks_kernel<false>;
  launch(kernel, 4, kThreads / 4, 0, CurrentStream(input), source(input), target(out));
}

void three_dimensions(Tensor input, Tensor out, bool faulty) {
  const auto kernel = faulty ? &three_dimensions_kernel<true> : &three_dimensions_kernel<false>;
  launch(kernel, dim3(2, 2, 4), dim3(4, 2, 2), 0, CurrentStream(input), source(input), target(out));
}

void zero_blocks(Tensor input, Tensor out, bool faulty) {
  launch(double_kernel, faulty ? 0 : 1, kThreads, 0, CurrentStream(input), source(input), target(out));
}

void too_many_threads(Tensor input, Tensor out, bool faulty) {
  launch(double_kernel, 1, faulty ? 1025 : kThreads, 0, CurrentStream(input), source(input), target(out));
}

void too_large_a_grid(Tensor input, Tensor out, bool faulty) {
  launch(double_kernel, dim3(1, faulty ? 65536 : 1), kThreads, 0, CurrentStream(input), source(input), target(out));
}

void too_much_shared_memory(Tensor input, Tensor out, bool faulty) {
  launch(double_kernel, 1, kThreads, faulty ? 100 << 10 : 99 << 10, CurrentStream(input), source(input), target(out));
}

void sort(Tensor keys, Tensor values, Tensor sorted_keys, Tensor sorted_values) {
  sort_pairs(
      static_cast<const int64_t*>(keys.const_data_ptr()), static_cast<int64_t*>(sorted_keys.mutable_data_ptr()),
      static_cast<const int32_t*>(values.const_data_ptr()), static_cast<int32_t*>(sorted_values.mutable_data_ptr()),
      keys.numel(), keys, CurrentStream(keys));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(segops_emulated, CPU, m) {
  m.impl("misaligned_load", TORCH_BOX(&misaligned_load));
  m.impl("read_out_of_bounds", TORCH_BOX(&read_out_of_bounds));
  m.impl("write_out_of_bounds", TORCH_BOX(&write_out_of_bounds));
  m.impl("index_out_of_bounds", TORCH_BOX(&index_out_of_bounds));
  m.impl("dynamic_out_of_bounds", TORCH_BOX(&dynamic_out_of_bounds));
  m.impl("missing_barrier", TORCH_BOX(&missing_barrier));
  m.impl("missing_barrier_in_order", TORCH_BOX(&missing_barrier_in_order));
  m.impl("missing_barrier_before_reuse", TORCH_BOX(&missing_barrier_before_reuse));
  m.impl("different_barriers", TORCH_BOX(&different_barriers));
  m.impl("barrier_after_return", TORCH_BOX(&barrier_after_return));
  m.impl("unwritten_shared", TORCH_BOX(&unwritten_shared));
  m.impl("unwritten_shared_maximum", TORCH_BOX(&unwritten_shared_maximum));
  m.impl("unwritten_output", TORCH_BOX(&unwritten_output));
  m.impl("mask_of_absent_lanes", TORCH_BOX(&mask_of_absent_lanes));
  m.impl("mask_of_others", TORCH_BOX(&mask_of_others));
  m.impl("shuffle_from_absent_lane", TORCH_BOX(&shuffle_from_absent_lane));
  m.impl("votes_in_different_places", TORCH_BOX(&votes_in_different_places));
  m.impl("missing_wait", TORCH_BOX(&missing_wait));
  m.impl("too_short_a_wait", TORCH_BOX(&too_short_a_wait));
  m.impl("copy_into_what_is_read", TORCH_BOX(&copy_into_what_is_read));
  m.impl("write_under_a_copy", TORCH_BOX(&write_under_a_copy));
  m.impl("copies_at_the_end", TORCH_BOX(&copies_at_the_end));
  m.impl("misaligned_copy", TORCH_BOX(&misaligned_copy));
  m.impl("sum_of_block", TORCH_BOX(&sum_of_block));
  m.impl("order_of_blocks", TORCH_BOX(&order_of_blocks));
  m.impl("three_dimensions", TORCH_BOX(&three_dimensions));
  m.impl("zero_blocks", TORCH_BOX(&zero_blocks));
  m.impl("too_many_threads", TORCH_BOX(&too_many_threads));
  m.impl("too_large_a_grid", TORCH_BOX(&too_large_a_grid));
  m.impl("too_much_shared_memory", TORCH_BOX(&too_much_shared_memory));
  m.impl("sort", TORCH_BOX(&sort));
}

}  // namespace segops
