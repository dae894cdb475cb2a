// The shift kernels on CUDA (pac.h says what they compute).
//
// A thread owns V adjacent channels of one pixel, 16 bytes wherever alignment allows, and adds up
// its reads in float32 registers. A warp reads whole contiguous stretches of channels; the reuse
// between neighbouring pixels, which read the same planes at other shifts, is left to L2. No
// atomics: every output is written once.

#include "../common/cuda.h"
#include "pac.h"

namespace segops::pac {
namespace {

constexpr int kMaxRates = 64;

struct Rates {
  int count;
  int per_group;
  int64_t value[kMaxRates];
};

Rates pack_rates(const std::vector<int64_t>& rates, int64_t groups, const char* op) {
  STD_TORCH_CHECK(rates.size() <= kMaxRates, op, ": at most 64 rates");
  Rates packed{int(rates.size()), int(rates.size() / groups), {}};
  for (size_t r = 0; r < rates.size(); ++r) packed.value[r] = rates[r];
  return packed;
}

// A thread's work: V channels from `channel` of group or tap `lane`, at `pixel`: (y, x) of an
// image.
struct Position {
  int64_t channel, lane, pixel, x, y;
};

__device__ inline Position locate(int64_t index, int64_t channel_packs, int64_t lanes, int pack, const Shape& s) {
  Position p;
  p.channel = index % channel_packs * pack;
  index /= channel_packs;
  p.lane = index % lanes;
  p.pixel = index / lanes;
  p.x = p.pixel % s.width;
  p.y = p.pixel / s.width % s.height;
  return p;
}

__device__ inline bool inside(int64_t y, int64_t x, const Shape& s) {
  return y >= 0 && y < s.height && x >= 0 && x < s.width;
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads) gather_kernel(
    const T* __restrict__ planes, const T* __restrict__ bias, T* __restrict__ out, int64_t out_pixel_stride,
    int64_t out_group_stride, Shape s, Rates rates, int64_t work) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= work) return;
  const Position p = locate(index, s.channels / V, s.groups, V, s);
  const int64_t taps = s.kernel_h * s.kernel_w, centre = taps / 2;
  const T* here = planes + p.pixel * taps * s.channels + p.channel;

  float acc[V] = {};
  add<T, V>(acc, here + centre * s.channels, float(rates.per_group));
  for (int r = int(p.lane) * rates.per_group; r < int(p.lane + 1) * rates.per_group; ++r) {
    const int64_t step = s.sign * rates.value[r];
    int64_t tap = 0;
    for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
      const int64_t dy = step * (ky - s.kernel_h / 2);
      for (int64_t kx = 0; kx < s.kernel_w; ++kx, ++tap) {
        const int64_t dx = step * (kx - s.kernel_w / 2);
        if (tap != centre && inside(p.y + dy, p.x + dx, s))
          add<T, V>(acc, here + ((dy * s.width + dx) * taps + tap) * s.channels);
      }
    }
  }
  if (bias) add<T, V>(acc, bias + p.channel, float(rates.per_group));
  store<T, V>(out + p.pixel * out_pixel_stride + p.lane * out_group_stride + p.channel, acc);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const T* __restrict__ source, T* __restrict__ out, Shape s, Rates rates, int64_t first_pixel, int64_t work) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= work) return;
  const int64_t taps = s.kernel_h * s.kernel_w;
  // Consecutive threads write consecutive memory: channels first, then taps, then pixels.
  Position p = locate(index + first_pixel * taps * (s.channels / V), s.channels / V, taps, V, s);
  const T* here = source + p.pixel * s.groups * s.channels + p.channel;

  float acc[V] = {};
  if (p.lane == taps / 2) {
    for (int64_t g = 0; g < s.groups; ++g) add<T, V>(acc, here + g * s.channels, float(rates.per_group));
  } else {
    const int64_t ky = p.lane / s.kernel_w - s.kernel_h / 2, kx = p.lane % s.kernel_w - s.kernel_w / 2;
    for (int r = 0; r < rates.count; ++r) {
      const int64_t step = s.sign * rates.value[r];
      if (inside(p.y + step * ky, p.x + step * kx, s))
        add<T, V>(acc, here + (step * (ky * s.width + kx) * s.groups + r / rates.per_group) * s.channels);
    }
  }
  store<T, V>(out + index * V, acc);
}

// Whether V elements of T can be read and written at once through these pointers and strides.
template <typename T, int V>
bool fits(std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides) {
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % (V * sizeof(T))) return false;
  for (int64_t stride : strides)
    if (stride % V) return false;
  return true;
}

}  // namespace

void shift_gather(
    const Tensor& planes, const std::optional<Tensor>& bias, const Tensor& out, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& rates, int64_t sign) {
  const Shape s(out, kernel_size, sign);
  const Rates packed = pack_rates(rates, s.groups, "pac");
  if (out.numel() == 0) return;
  const CurrentStream stream(out);
  dispatch_cuda(out, "pac", [&](auto type) {
    using T = decltype(type);
    constexpr int V = 16 / sizeof(T);
    const T* from = data_of<const T>(planes);
    const T* shift = data_of<const T>(bias);
    T* to = data_of<T>(out);
    const int64_t pixel_stride = out.stride(2), group_stride = out.stride(3);
    const auto run = [&](auto kernel, int pack) {
      const int64_t work = s.images * s.height * s.width * s.groups * (s.channels / pack);
      launch(kernel, blocks_for(work), kThreads, 0, stream, from, shift, to, pixel_stride, group_stride, s, packed, work);
    };
    const bool packs = fits<T, V>({from, shift, to}, {s.channels, pixel_stride, group_stride});
    packs ? run(gather_kernel<T, V>, V) : run(gather_kernel<T, 1>, 1);
  });
}

void shift_scatter(
    const Tensor& source, const Tensor& out, int64_t first_row, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& rates, int64_t sign) {
  const Shape s(source, kernel_size, sign);
  const Rates packed = pack_rates(rates, s.groups, "pac");
  if (out.numel() == 0) return;
  const CurrentStream stream(out);
  dispatch_cuda(out, "pac", [&](auto type) {
    using T = decltype(type);
    constexpr int V = 16 / sizeof(T);
    const T* from = data_of<const T>(source);
    T* to = data_of<T>(out);
    const auto run = [&](auto kernel, int pack) {
      const int64_t work = out.size(0) * s.width * s.taps() * (s.channels / pack);
      launch(kernel, blocks_for(work), kThreads, 0, stream, from, to, s, packed, first_row * s.width, work);
    };
    fits<T, V>({from, to}, {s.channels}) ? run(scatter_kernel<T, V>, V) : run(scatter_kernel<T, 1>, 1);
  });
}

}  // namespace segops::pac
