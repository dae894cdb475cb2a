// Pooling, scatter and gather on CUDA (pag.h says what they compute).
//
// A thread owns 16 bytes of pooled elements where alignment allows, else one element: channels of
// one pixel with channels_last, else neighbouring windows of a row, whose 1, 2, 4 or 8 elements
// along x it loads 16 bytes at a time as well. One launch pools all maps. Scatter goes by windows
// in the same way, each reading its maximum once and writing all of its elements; where windows
// overlap, or are of another width, it goes by elements, each summing over the windows that hold
// it. No atomics: every output is written once.

#include "../common/cuda.h"
#include "pag.h"

namespace segops::pag {
namespace {

constexpr int kMaxMaps = 32;

// Whether packs of V elements of T may be accessed, along the channels or along x. (A stride along
// an axis of one does not count.)
template <typename T, int V>
bool packable(const Tensor& tensor, bool channels_last) {
  const int inner = channels_last ? 1 : 3;
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % (V * sizeof(T)) || tensor.size(inner) % V) return false;
  for (int dim = 0; dim < 4; ++dim)
    if (dim != inner && tensor.size(dim) > 1 && tensor.stride(dim) % V) return false;
  return true;
}

// The windows' width, if kernels can read windows of that width in packs; else 0.
int pack_width(const Windows& w) {
  const int32_t kernel = w.x.kernel;
  const bool whole = kernel && w.x.size % kernel == 0;
  return whole && (kernel == 1 || kernel == 2 || kernel == 4 || kernel == 8) ? kernel : 0;
}

// index / divisor, and what is left over.
__device__ inline int64_t divide(int64_t index, int64_t divisor, int32_t& rest) {
  if (index >> 31 == 0 && divisor >> 31 == 0) {  // 64-bit division costs several times as much
    const uint32_t quotient = uint32_t(index) / uint32_t(divisor);
    rest = int32_t(uint32_t(index) - quotient * uint32_t(divisor));
    return quotient;
  }
  const int64_t quotient = index / divisor;
  rest = int32_t(index - quotient * divisor);
  return quotient;
}

// The pooled elements of a thread: V of them from (n, c, y, x), along the channels or along x;
// `first` is the number of the first in the order of the offsets.
struct Position {
  int64_t n, first;
  int32_t c, y, x;
};

__device__ inline Position locate(
    int64_t index, int pack, int64_t channels, int64_t height, int64_t width, bool channels_last) {
  Position p;
  p.first = index * pack;
  int32_t inner;
  if (channels_last) {
    index = divide(index, channels / pack, inner);
    p.c = inner * pack;
    index = divide(index, width, p.x);
    p.n = divide(index, height, p.y);
  } else {
    index = divide(index, width / pack, inner);
    p.x = inner * pack;
    index = divide(index, height, p.y);
    p.n = divide(index, channels, p.c);
  }
  return p;
}

template <int V>
__device__ inline void store_offsets(void* offsets, bool two_bytes, int64_t first, const int (&at)[V]) {
  const auto store_as = [&](auto* p) {
    Pack<std::remove_pointer_t<decltype(p)>, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.value[v] = at[v];
    *reinterpret_cast<decltype(pack)*>(p + first) = pack;
  };
  two_bytes ? store_as(static_cast<uint16_t*>(offsets)) : store_as(static_cast<uint8_t*>(offsets));
}

template <int V>
__device__ inline void load_offsets(const void* offsets, bool two_bytes, int64_t first, int (&at)[V]) {
  const auto load_as = [&](const auto* p) {
    const auto pack = *reinterpret_cast<const Pack<std::decay_t<decltype(*p)>, V>*>(p + first);
#pragma unroll
    for (int v = 0; v < V; ++v) at[v] = pack.value[v];
  };
  two_bytes ? load_as(static_cast<const uint16_t*>(offsets)) : load_as(static_cast<const uint8_t*>(offsets));
}

template <int V>
struct Largest {
  float value[V];
  int at[V];

  __device__ void take(int v, float x, int offset) {
    if (x > value[v] || x != x) {
      value[v] = x;
      at[v] = offset;
    }
  }
};

// A map as the pooling kernel sees it.
template <typename T>
struct Map {
  View<const T> in;
  Windows windows;
  int width;      // pack_width
  int gap;        // bytes behind the offsets that are zero
  void* offsets;  // or null
  int64_t channels, first_channel;
  int64_t begin;  // the first thread of this map, where each has its own
};

template <typename T>
struct Maps {
  int count;
  Map<T> map[kMaxMaps];
};

// V neighbouring windows of W elements along x.
template <typename T, int V, int W>
__device__ inline void pool_row(const Map<T>& m, const Position& p, int32_t top, int32_t rows, Largest<V>& best) {
  for (int32_t dy = 0; dy < rows; ++dy) {
    const T* row = m.in.at(p.n, p.c, top + dy, int64_t(p.x) * W);
    Pack<T, V> pack[W];
#pragma unroll
    for (int k = 0; k < W; ++k) pack[k] = reinterpret_cast<const Pack<T, V>*>(row)[k];
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int dx = 0; dx < W; ++dx) best.take(v, widen(pack[(v * W + dx) / V].value[(v * W + dx) % V]), dy * W + dx);
    }
  }
}

template <typename T, int V>
__device__ inline void pool_windows(const Map<T>& m, const Position& p, bool channels_last, Largest<V>& best) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    best.value[v] = -INFINITY;
    best.at[v] = 0;
  }
  const Windows& w = m.windows;
  const int32_t top = w.y.begin(p.y), rows = w.y.end(p.y) - top;
  if (!channels_last && V > 1) {  // which only maps with a width have
    if (m.width == 1) pool_row<T, V, 1>(m, p, top, rows, best);
    if (m.width == 2) pool_row<T, V, 2>(m, p, top, rows, best);
    if (m.width == 4) pool_row<T, V, 4>(m, p, top, rows, best);
    if (m.width == 8) pool_row<T, V, 8>(m, p, top, rows, best);
    return;
  }
  const int32_t left = w.x.begin(p.x), columns = w.x.end(p.x) - left, row = w.row;
  for (int32_t dy = 0; dy < rows; ++dy) {
    for (int32_t dx = 0; dx < columns; ++dx) {
      const auto pack = *reinterpret_cast<const Pack<T, V>*>(m.in.at(p.n, p.c, top + dy, left + dx));
#pragma unroll
      for (int v = 0; v < V; ++v) best.take(v, widen(pack.value[v]), dy * row + dx);
    }
  }
}

// Pools all maps: side by side (concat), where a thread belongs to one, or summed.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads)
    pool_kernel(const Maps<T> maps, View<T> out, int32_t height, int32_t width, bool concat, bool channels_last, int64_t work) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= work) return;
  int first = 0;
  if (concat)
    while (first + 1 < maps.count && index >= maps.map[first + 1].begin) ++first;
  const int last = concat ? first + 1 : maps.count;
  const Map<T>& own = maps.map[first];
  const int64_t end = last < maps.count ? maps.map[last].begin : work;
  const Position p = locate(index - own.begin, V, own.channels, height, width, channels_last);

  float sum[V];
  for (int i = first; i < last; ++i) {
    const Map<T>& m = maps.map[i];
    Largest<V> best;
    pool_windows<T, V>(m, p, channels_last, best);
    if (m.offsets) store_offsets<V>(m.offsets, m.windows.two_bytes, p.first, best.at);
    if (m.gap && index + 1 == end) {
      char* gap = static_cast<char*>(m.offsets) + (p.first + V) * (m.windows.two_bytes ? 2 : 1);
      for (int k = 0; k < m.gap; ++k) gap[k] = 0;
    }
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = i == first ? best.value[v] : sum[v] + best.value[v];
  }
  store<T, V>(out.at(p.n, own.first_channel + p.c, p.y, p.x), sum);
}

// What scatter and gather go by.
template <typename P, typename M>
struct Pooled {
  View<P> pooled;
  View<M> map;
  Windows windows;
  const void* offsets;
  int64_t channels;
  bool channels_last;
};

// The elements of V windows that do not overlap. Along x a window has W, 0 meaning any number.
template <typename T, int V, int W>
__global__ void __launch_bounds__(kThreads) scatter_windows(const Pooled<const T, T> s, int64_t work) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= work) return;
  const Windows& w = s.windows;
  const Position p = locate(index, V, s.channels, w.y.count, w.x.count, s.channels_last);
  int at[V];
  load_offsets<V>(s.offsets, w.two_bytes, p.first, at);
  const auto values = *reinterpret_cast<const Pack<T, V>*>(s.pooled.at(p.n, p.c, p.y, p.x));
  T zero;
  narrow(0.f, zero);
  const int32_t top = w.y.begin(p.y), rows = w.y.end(p.y) - top, left = w.x.begin(p.x);
  if constexpr (W > 0) {
    for (int32_t dy = 0; dy < rows; ++dy) {
      T* row = s.map.at(p.n, p.c, top + dy, left);
#pragma unroll
      for (int k = 0; k < W; ++k) {
        Pack<T, V> pack;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int window = (k * V + v) / W, dx = (k * V + v) % W;
          pack.value[v] = at[window] == dy * W + dx ? values.value[window] : zero;
        }
        reinterpret_cast<Pack<T, V>*>(row)[k] = pack;
      }
    }
  } else {
    const int32_t columns = w.x.end(p.x) - left, row = w.row;
    for (int32_t dy = 0; dy < rows; ++dy) {
      for (int32_t dx = 0; dx < columns; ++dx) {
        Pack<T, V> pack;
#pragma unroll
        for (int v = 0; v < V; ++v) pack.value[v] = at[v] == dy * row + dx ? values.value[v] : zero;
        *reinterpret_cast<Pack<T, V>*>(s.map.at(p.n, p.c, top + dy, left + dx)) = pack;
      }
    }
  }
}

// V channels of one element of the map, or one: the sum over the windows that hold it.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads) scatter_elements(const Pooled<const T, T> s, int64_t work) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= work) return;
  const Windows& w = s.windows;
  const Position p = locate(index, V, s.channels, w.y.size, w.x.size, s.channels_last);
  const int32_t row = w.row;
  float sum[V] = {};
  const int32_t last_y = w.y.last(p.y), first_x = w.x.first(p.x), last_x = w.x.last(p.x);
  for (int32_t j = w.y.first(p.y); j <= last_y; ++j) {
    for (int32_t i = first_x; i <= last_x; ++i) {
      const int64_t window = s.channels_last ? ((p.n * w.y.count + j) * w.x.count + i) * s.channels + p.c
                                             : ((p.n * s.channels + p.c) * w.y.count + j) * w.x.count + i;
      int at[V];
      load_offsets<V>(s.offsets, w.two_bytes, window, at);
      const int wanted = (p.y - w.y.begin(j)) * row + p.x - w.x.begin(i);
      const auto values = *reinterpret_cast<const Pack<T, V>*>(s.pooled.at(p.n, p.c, j, i));
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (at[v] == wanted) sum[v] += widen(values.value[v]);
    }
  }
  store<T, V>(s.map.at(p.n, p.c, p.y, p.x), sum);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) gather_kernel(const Pooled<T, const T> s, int64_t work) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= work) return;
  const Windows& w = s.windows;
  const Position p = locate(index, 1, s.channels, w.y.count, w.x.count, s.channels_last);
  int at[1];
  load_offsets<1>(s.offsets, w.two_bytes, p.first, at);
  const int32_t y = w.y.begin(p.y) + at[0] / w.row, x = w.x.begin(p.x) + at[0] % w.row;
  T value;
  narrow(0.f, value);
  if (y < w.y.end(p.y) && x < w.x.end(p.x)) value = *s.map.at(p.n, p.c, y, x);
  *s.pooled.at(p.n, p.c, p.y, p.x) = value;
}

}  // namespace

void pool(
    const std::vector<Tensor>& maps, const std::vector<Part>& parts, const Tensor& out, char* offsets, bool concat,
    bool channels_last) {
  STD_TORCH_CHECK(maps.size() <= kMaxMaps, "pag_pool: at most ", kMaxMaps, " maps");
  const CurrentStream stream(out);
  const int64_t pixels = out.size(0) * out.size(2) * out.size(3);
  dispatch_cuda(out, "pag_pool", [&](auto type) {
    using T = decltype(type);
    constexpr int V = 16 / sizeof(T);
    // What a thread owns is the same for all maps: packs, if all of them allow it.
    bool packs = packable<T, V>(out, channels_last);
    for (size_t m = 0; m < maps.size(); ++m) {
      packs = packs && packable<T, V>(maps[m], channels_last) && (channels_last || pack_width(parts[m].windows));
      if (parts[m].offsets >= 0) packs = packs && reinterpret_cast<uintptr_t>(offsets) % 16 == 0;
    }
    Maps<T> packed{int(maps.size()), {}};
    int64_t work = 0;
    for (size_t m = 0; m < maps.size(); ++m) {
      const Part& part = parts[m];
      void* at = part.offsets < 0 ? nullptr : offsets + part.offsets;
      packed.map[m] = {View<const T>(maps[m]), part.windows,       pack_width(part.windows), int(part.next - part.end), at,
                       part.channels,          part.first_channel, concat ? work : 0};
      work = (concat ? work : 0) + pixels * part.channels / (packs ? V : 1);
    }
    launch(
        packs ? &pool_kernel<T, V> : &pool_kernel<T, 1>, blocks_for(work), kThreads, 0, stream, packed, View<T>(out),
        int32_t(out.size(2)), int32_t(out.size(3)), concat, channels_last, work);
  });
}

void scatter(const Windows& w, const Tensor& pooled, const char* offsets, const Tensor& out, bool channels_last) {
  const CurrentStream stream(out);
  const int64_t windows = pooled.numel(), elements = out.numel();
  dispatch_cuda(out, "pag_scatter", [&](auto type) {
    using T = decltype(type);
    constexpr int V = 16 / sizeof(T);
    const Pooled<const T, T> s{View<const T>(pooled), View<T>(out), w, offsets, out.size(1), channels_last};
    const bool packs = packable<T, V>(pooled, channels_last) && packable<T, V>(out, channels_last) &&
                       reinterpret_cast<uintptr_t>(s.offsets) % 16 == 0;
    const int width = packs ? pack_width(w) : 0;
    const auto run = [&](auto kernel, int64_t work) { launch(kernel, blocks_for(work), kThreads, 0, stream, s, work); };
    if (channels_last) {
      if (w.overlap())
        packs ? run(scatter_elements<T, V>, elements / V) : run(scatter_elements<T, 1>, elements);
      else
        packs ? run(scatter_windows<T, V, 0>, windows / V) : run(scatter_windows<T, 1, 0>, windows);
    } else if (w.overlap() || width == 0) {
      run(scatter_elements<T, 1>, elements);
    } else if (width == 1) {
      run(scatter_windows<T, V, 1>, windows / V);
    } else if (width == 2) {
      run(scatter_windows<T, V, 2>, windows / V);
    } else if (width == 4) {
      run(scatter_windows<T, V, 4>, windows / V);
    } else {
      run(scatter_windows<T, V, 8>, windows / V);
    }
  });
}

void gather(const Windows& w, const Tensor& input, const char* offsets, const Tensor& out, bool channels_last) {
  const CurrentStream stream(out);
  dispatch_cuda(out, "pag_gather", [&](auto type) {
    using T = decltype(type);
    const Pooled<T, const T> s{View<T>(out), View<const T>(input), w, offsets, out.size(1), channels_last};
    launch(gather_kernel<T>, blocks_for(out.numel()), kThreads, 0, stream, s, out.numel());
  });
}

}  // namespace segops::pag
