// The shift kernels on CUDA (pac.h says what they compute), and a transpose.
//
// A thread owns V adjacent channels of one pixel, 16 bytes wherever alignment allows, and adds up
// its reads in float32 registers; a scatter's thread writes all taps of them. A warp reads whole
// contiguous stretches of channels; the reuse between neighbouring pixels, which read the same
// planes at other shifts, is left to L2. No atomics: every output is written once.
//
// The filter of three by three has kernels of its own, which load what they read at a rate, eight
// packs, before they add any of it.

#include "../common/cuda.h"
#include "pac.h"

#include <algorithm>

namespace segops::pac {
namespace {

constexpr int kMaxRates = 64;

// How a rate leads from a tap to the next one, by pixels and by elements. A rate beyond the map is
// as large as the map is.
template <typename Index>
struct alignas(4 * sizeof(Index)) Step {
  Index dy, dx, row, column;
};

template <typename Index>
struct Rates {
  int count, per_group;
  Step<Index> steps[kMaxRates];

  // In a map whose pixels are `stride` elements apart.
  Rates(const std::vector<int64_t>& rates, const Shape& s, int64_t stride)
      : count(int(rates.size())), per_group(int(count / s.groups)), steps{} {
    for (int r = 0; r < count; ++r) {
      const int64_t dy = s.sign * std::min(rates[r], s.height), dx = s.sign * std::min(rates[r], s.width);
      steps[r] = {Index(dy), Index(dx), Index(dy * s.width * stride), Index(dx * stride)};
    }
  }
};

// Pixels (H, W) as kernels take them. Threads are numbered by packs of channels first.
template <typename Index>
struct Map {
  using Unsigned = std::make_unsigned_t<Index>;

  Divisor packs, groups, width, height;
  Index channels;
  int kernel_h, kernel_w;

  Map(const Shape& s, int pack)
      : packs(s.channels / pack),
        groups(s.groups),
        width(s.width),
        height(s.height),
        channels(Index(s.channels)),
        kernel_h(int(s.kernel_h)),
        kernel_w(int(s.kernel_w)) {}
  __device__ int taps() const { return kernel_h * kernel_w; }
  __device__ bool has_row(Index y) const { return Unsigned(y) < height.divisor; }
  __device__ bool has_column(Index x) const { return Unsigned(x) < width.divisor; }
};

// The tap of number i around the centre of three by three.
__device__ constexpr int around(int i) {
  return i < 4 ? i : i + 1;
}

// Loads the packs around element `at` of a pixel at a rate, zeros outside of the map; `tap`
// elements lie between those of a tap and the next.
template <typename T, int V, typename Index>
__device__ inline void load_around(
    Pack<T, V> (&packs)[8], const T* source, Index at, Index y, Index x, const Map<Index>& map, const Step<Index>& step,
    Index tap) {
  const bool rows[] = {map.has_row(y - step.dy), true, map.has_row(y + step.dy)};
  const bool columns[] = {map.has_column(x - step.dx), true, map.has_column(x + step.dx)};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int ky = around(i) / 3, kx = around(i) % 3;
    const Index away = (ky - 1) * step.row + (kx - 1) * step.column + around(i) * tap;
    packs[i] = load<T, V>(source + (at + away), rows[ky] && columns[kx]);
  }
}

template <typename T, int V, bool three_by_three, typename Index>
__global__ void __launch_bounds__(kThreads, 4) gather_kernel(
    const T* __restrict__ planes, const T* __restrict__ bias, T* __restrict__ out, Index out_pixel_stride,
    Index out_group_stride, const Map<Index> map, const Rates<Index> rates, Index work) {
  const Index index = Index(blockIdx.x) * kThreads + Index(threadIdx.x);
  if (index >= work) return;
  Index channel, group, y, x;
  const Index pixel = map.groups.divide(map.packs.divide(index, channel), group);
  map.height.divide(map.width.divide(pixel, x), y);
  channel *= V;
  const Index at = pixel * map.taps() * map.channels + channel;

  float acc[V] = {};
  add<T, V>(acc, planes + at + map.taps() / 2 * map.channels, float(rates.per_group));
  const int first = int(group) * rates.per_group;
#pragma unroll 1
  for (int r = first; r < first + rates.per_group; ++r) {
    const Step<Index> step = rates.steps[r];
    if constexpr (three_by_three) {
      Pack<T, V> packs[8];
      load_around(packs, planes, at, y, x, map, step, map.channels);
#pragma unroll
      for (int i = 0; i < 8; ++i) add(acc, packs[i]);
    } else {
      Index tap = at;
      for (int ky = -(map.kernel_h / 2); ky <= map.kernel_h / 2; ++ky) {
        const bool has_row = map.has_row(y + step.dy * ky);
#pragma unroll 1
        for (int kx = -(map.kernel_w / 2); kx <= map.kernel_w / 2; ++kx, tap += map.channels)
          if ((ky || kx) && has_row && map.has_column(x + step.dx * kx))
            add<T, V>(acc, planes + (tap + ky * step.row + kx * step.column));
      }
    }
  }
  if (bias) add<T, V>(acc, bias + channel, float(rates.per_group));
  store<T, V>(out + (pixel * out_pixel_stride + group * out_group_stride + channel), acc);
}

// From first_pixel on. With groups there is one for each rate.
template <typename T, int V, bool three_by_three, typename Index>
__global__ void __launch_bounds__(kThreads, 2) scatter_kernel(
    const T* __restrict__ source, T* __restrict__ out, const Map<Index> map, const Rates<Index> rates, Index first_pixel,
    Index work) {
  const Index index = Index(blockIdx.x) * kThreads + Index(threadIdx.x);
  if (index >= work) return;
  Index channel, y, x;
  const Index strip_pixel = map.packs.divide(index, channel), pixel = first_pixel + strip_pixel;
  map.height.divide(map.width.divide(pixel, x), y);
  channel *= V;
  const int groups = int(map.groups.divisor);
  const Index group = groups > 1 ? map.channels : 0;
  Index at = pixel * groups * map.channels + channel;
  T* to = out + strip_pixel * map.taps() * map.channels + channel;

  float centre[V] = {};
#pragma unroll 1
  for (int g = 0; g < groups; ++g) add<T, V>(centre, source + at + g * map.channels, float(rates.per_group));
  store<T, V>(to + map.taps() / 2 * map.channels, centre);

  if constexpr (three_by_three) {
    float acc[8][V] = {};
#pragma unroll 1
    for (int r = 0; r < rates.count; ++r, at += group) {
      Pack<T, V> packs[8];
      load_around(packs, source, at, y, x, map, rates.steps[r], Index(0));
#pragma unroll
      for (int i = 0; i < 8; ++i) add(acc[i], packs[i]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) store<T, V>(to + around(i) * map.channels, acc[i]);
  } else {
    for (int ky = -(map.kernel_h / 2); ky <= map.kernel_h / 2; ++ky) {
      for (int kx = -(map.kernel_w / 2); kx <= map.kernel_w / 2; ++kx, to += map.channels) {
        if (ky == 0 && kx == 0) continue;
        float acc[V] = {};
#pragma unroll 1
        for (int r = 0; r < rates.count; ++r) {
          const Step<Index> step = rates.steps[r];
          if (map.has_row(y + step.dy * ky) && map.has_column(x + step.dx * kx))
            add<T, V>(acc, source + (at + ky * step.row + kx * step.column + r * group));
        }
        store<T, V>(to, acc);
      }
    }
  }
}

// to (images, columns, rows) = from (images, rows, columns), in square tiles of eight packs each
// way. In shared memory a tile lies by columns of 32 words, which are the packs of `to`; those of a
// column are swapped by its place, so that neither words written nor packs read share a bank.
template <typename T>
__global__ void __launch_bounds__(kThreads) transpose_kernel(
    const T* __restrict__ from, T* __restrict__ to, int64_t rows, int64_t columns, const Divisor tiles_down,
    const Divisor tiles_across, bool packs_in, bool packs_out) {
  constexpr int kPack = 16 / sizeof(T), kSide = 8 * kPack, kPerWord = 4 / sizeof(T);
  __shared__ Pack<uint32_t, 4> tile[kSide][8];
  int32_t across, down;
  const int32_t image = tiles_down.divide(tiles_across.divide(int32_t(blockIdx.x), across), down);
  const int64_t first_row = int64_t(down) * kSide, first_column = int64_t(across) * kSide;
  from += (image * rows + first_row) * columns + first_column;
  to += (image * columns + first_column) * rows + first_row;
  const int height = int(rows - first_row < kSide ? rows - first_row : kSide);
  const int width = int(columns - first_column < kSide ? columns - first_column : kSide);

  const int pack = int(threadIdx.x) % 8, word = int(threadIdx.x) / 8;
  Pack<T, kPack> read[kPerWord];
#pragma unroll
  for (int i = 0; i < kPerWord; ++i) {
    const int y = word * kPerWord + i, x = pack * kPack;
    const T* here = from + y * columns + x;
    if (packs_in) {
      read[i] = load<T, kPack>(here, y < height && x < width);
    } else {
#pragma unroll
      for (int v = 0; v < kPack; ++v) read[i].value[v] = y < height && x + v < width ? here[v] : T{};
    }
  }
#pragma unroll
  for (int v = 0; v < kPack; ++v) {
    uint32_t both = 0;
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) both |= uint32_t(read[i].value[v]) << (16 * i);
    tile[pack * kPack + v][word / 4 ^ pack].value[word % 4] = both;
  }
  __syncthreads();

  if (packs_out) {
    for (int i = int(threadIdx.x); i < kSide * 8; i += kThreads) {
      const int x = i / 8, y = i % 8 * kPack;
      if (x < width && y < height) *reinterpret_cast<Pack<uint32_t, 4>*>(to + x * rows + y) = tile[x][i % 8 ^ x / kPack];
    }
  } else {  // neighbouring threads write neighbouring elements
    for (int i = int(threadIdx.x); i < kSide * kSide; i += kThreads) {
      const int x = i / kSide, y = i % kSide;
      const uint32_t both = tile[x][y / kPack ^ x / kPack].value[y % kPack / kPerWord];
      if (x < width && y < height) to[x * rows + y] = T(both >> (16 * (y % kPerWord)));
    }
  }
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

// Calls fn with the type of indices for so many elements, and whether the kernel for three by three
// serves.
template <typename F>
void with_form(const Shape& s, int64_t elements, const F& fn) {
  with_index(elements, [&](auto index) {
    if constexpr (sizeof index == 4) {
      if (s.kernel_h == 3 && s.kernel_w == 3) return fn(index, std::true_type{});
    }
    fn(index, std::false_type{});
  });
}

// Calls fn with V if that fits, with 1 if not.
template <int V, typename F>
void with_pack(bool fits, const F& fn) {
  fits ? fn(std::integral_constant<int, V>{}) : fn(std::integral_constant<int, 1>{});
}

}  // namespace

void shift_gather(
    const Tensor& planes, const std::optional<Tensor>& bias, const Tensor& out, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& rates, int64_t sign) {
  STD_TORCH_CHECK(rates.size() <= kMaxRates, "pac: at most 64 rates");
  const Shape s(out, kernel_size, sign);
  if (out.numel() == 0) return;
  const CurrentStream stream(out);
  dispatch_cuda(out, "pac", [&](auto type) {
    using T = decltype(type);
    constexpr int kPack = 16 / sizeof(T);
    const T* from = data_of<const T>(planes);
    const T* shift = data_of<const T>(bias);
    T* to = data_of<T>(out);
    const int64_t pixel_stride = out.stride(2), group_stride = out.stride(3);
    with_pack<kPack>(fits<T, kPack>({from, shift, to}, {s.channels, pixel_stride, group_stride}), [&](auto pack) {
      with_form(s, std::max(planes.numel(), extent(out)), [&](auto index, auto three_by_three) {
        using Index = decltype(index);
        const int64_t work = out.numel() / pack;
        launch(
            gather_kernel<T, decltype(pack)::value, decltype(three_by_three)::value, Index>, blocks_for(work), kThreads, 0,
            stream, from, shift, to, Index(pixel_stride), Index(group_stride), Map<Index>(s, pack),
            Rates<Index>(rates, s, s.taps() * s.channels), Index(work));
      });
    });
  });
}

void shift_scatter(
    const Tensor& source, const Tensor& out, int64_t first_row, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& rates, int64_t sign) {
  STD_TORCH_CHECK(rates.size() <= kMaxRates, "pac: at most 64 rates");
  const Shape s(source, kernel_size, sign);
  if (out.numel() == 0) return;
  const CurrentStream stream(out);
  dispatch_cuda(out, "pac", [&](auto type) {
    using T = decltype(type);
    constexpr int kPack = 16 / sizeof(T);
    const T* from = data_of<const T>(source);
    T* to = data_of<T>(out);
    with_pack<kPack>(fits<T, kPack>({from, to}, {s.channels}), [&](auto pack) {
      with_form(s, std::max(source.numel(), out.numel()), [&](auto index, auto three_by_three) {
        using Index = decltype(index);
        const int64_t work = out.numel() / s.taps() / pack;
        launch(
            scatter_kernel<T, decltype(pack)::value, decltype(three_by_three)::value, Index>, blocks_for(work), kThreads, 0,
            stream, from, to, Map<Index>(s, pack), Rates<Index>(rates, s, s.groups * s.channels), Index(first_row * s.width),
            Index(work));
      });
    });
  });
}

bool multiplies_into_32(const Tensor& factor) {
  return compute_capability(factor) >= 8;
}

void transpose(const Tensor& from, const Tensor& to, int64_t images, int64_t rows, int64_t columns) {
  if (to.numel() == 0) return;
  const CurrentStream stream(to);
  const auto run = [&](auto type) {
    using T = decltype(type);  // of the elements' bits
    constexpr int kPack = 16 / sizeof(T), kSide = 8 * kPack;
    const T* source = static_cast<const T*>(from.const_data_ptr());
    T* target = static_cast<T*>(to.mutable_data_ptr());
    const int64_t down = ceil_div(rows, kSide), across = ceil_div(columns, kSide);
    launch(
        transpose_kernel<T>, blocks_for(images * down * across * kThreads), kThreads, 0, stream, source, target, rows, columns,
        Divisor(down), Divisor(across), fits<T, kPack>({source}, {columns}), fits<T, kPack>({target}, {rows}));
  };
  from.element_size() == 2 ? run(uint16_t{}) : run(uint32_t{});
}

}  // namespace segops::pac
