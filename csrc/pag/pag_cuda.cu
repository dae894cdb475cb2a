// Pooling, scatter and gather on CUDA (pag.h says what they compute).
//
// A thread owns 16 bytes of pooled elements where alignment allows, else one element: channels of
// one pixel with channels_last, else neighbouring windows of a row, whose 1, 2, 4 or 8 elements
// along x it loads 16 bytes at a time as well. It loads several of those before it compares the
// first. Threads are numbered in memory's order, and three divisions, which are multiplications,
// say where one is: a row has too few packs for blocks of its own.
//
// One launch pools all maps. Side by side, each has blocks of its own, and maps of out's size,
// which are most of what is moved, are plain copies. Scatter goes by windows in the same way, each
// reading its maximum once and writing all of its elements; where windows overlap, or are of
// another width, it goes by elements, each summing over the windows that hold it. No atomics: every
// output is written once.

#include "../common/cuda.h"
#include "pag.h"

#include <algorithm>

namespace segops::pag {
namespace {

constexpr int kMaxMaps = 32;
constexpr int kCopies = 4;  // packs that a thread copies
// Blocks of pooling kernels that a multiprocessor has registers for, at least. (Left to itself,
// nvcc spills one of them to make room for another block.)
constexpr int kBlocks = 3;

bool aligned(const void* memory, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(memory) % bytes == 0;
}

// Whether packs of V elements of T may be accessed, along the channels or along x. (A stride along
// an axis of one does not count.)
template <typename T, int V>
bool packable(const Tensor& tensor, bool channels_last) {
  const int inner = channels_last ? 1 : 3;
  if (!aligned(tensor.const_data_ptr(), V * sizeof(T)) || tensor.size(inner) % V) return false;
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

// Divisors of (n, c, y, x), whose inner axis, the channels or x, counts packs.
struct Grid {
  Divisor channels, height, width;
};

Grid make_grid(int64_t channels, int64_t height, int64_t width, int pack, bool channels_last) {
  return {Divisor(channels_last ? channels / pack : channels), Divisor(height), Divisor(channels_last ? width : width / pack)};
}

// The elements of a thread: V of them from (n, c, y, x), along the channels or along x; `first` is
// the number of the first in the order of the offsets.
template <typename Index>
struct Position {
  Index n, c, y, x, first;
};

template <int V, bool channels_last, typename Index>
__device__ inline Position<Index> locate(Index index, const Grid& grid) {
  Position<Index> p;
  p.first = index * V;
  if constexpr (channels_last) {
    p.n = grid.height.divide(grid.width.divide(grid.channels.divide(index, p.c), p.x), p.y);
    p.c *= V;
  } else {
    p.n = grid.channels.divide(grid.height.divide(grid.width.divide(index, p.x), p.y), p.c);
    p.x *= V;
  }
  return p;
}

template <typename Index>
struct Range {
  Index begin, end;
};

// Window j of an axis, by the reciprocal of its count.
template <typename Index>
__device__ inline Range<Index> window(const Axis& axis, Index j, const Divisor& count) {
  if (axis.kernel) return {j * axis.kernel, min((j + 1) * axis.kernel, Index(axis.size))};
  return {count.divide(j * axis.size), count.divide((j + 1) * axis.size + axis.count - 1)};
}
// The windows that hold element i, by the reciprocal of the kernel or, without one, of the size.
template <typename Index>
__device__ inline Range<Index> holders(const Axis& axis, Index i, const Divisor& kernel_or_size) {
  if (axis.kernel) {
    const Index j = kernel_or_size.divide(i);
    return {j, j + 1};
  }
  return {kernel_or_size.divide(i * axis.count), kernel_or_size.divide((i + 1) * axis.count + axis.size - 1)};
}
// What both divide reaches.
int64_t largest_dividend(const Windows& w) {
  const auto of = [](const Axis& axis) { return axis.kernel ? 0 : int64_t(axis.size) * (axis.count + 1); };
  return std::max(of(w.y), of(w.x));
}

template <int V, typename Index>
__device__ inline void store_offsets(void* offsets, bool two_bytes, Index first, const int (&at)[V]) {
  const auto store_as = [&](auto* p) {
    Pack<std::remove_pointer_t<decltype(p)>, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.value[v] = at[v];
    *reinterpret_cast<decltype(pack)*>(p + first) = pack;
  };
  two_bytes ? store_as(static_cast<uint16_t*>(offsets)) : store_as(static_cast<uint8_t*>(offsets));
}

template <int V, typename Index>
__device__ inline void load_offsets(const void* offsets, bool two_bytes, Index first, int (&at)[V]) {
  const auto load_as = [&](const auto* p) {
    const auto pack = load<std::decay_t<decltype(*p)>, V>(p + first);
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

// The elements of a window, or of V windows that are neighbours along the channels. ROWS * COLUMNS
// packs are loaded before any is compared; behind the last row or column it comes again, which
// changes nothing. More than one row at once must hold all columns, or the order were not
// row-major.
template <typename T, int V, int ROWS, int COLUMNS, typename Index>
__device__ inline void take_window(const T* from, Index row, Index pixel, int rows, int columns, int width, Largest<V>& best) {
#pragma unroll 1
  for (int dy = 0; dy < rows; dy += ROWS) {
#pragma unroll 1
    for (int dx = 0; dx < columns; dx += COLUMNS) {
      Pack<T, V> packs[ROWS][COLUMNS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int k = 0; k < COLUMNS; ++k)
          packs[r][k] = load<T, V>(from + (min(dy + r, rows - 1) * row + min(dx + k, columns - 1) * pixel));
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int k = 0; k < COLUMNS; ++k)
#pragma unroll
          for (int v = 0; v < V; ++v)
            best.take(v, widen(packs[r][k].value[v]), min(dy + r, rows - 1) * width + min(dx + k, columns - 1));
    }
  }
}

// Those of V windows that are neighbours along x and W wide.
template <typename T, int V, int W, typename Index>
__device__ inline void take_neighbours(const T* from, Index row, int rows, Largest<V>& best) {
  constexpr int ROWS = W < 4 ? 4 / W : 1;
  for (int dy = 0; dy < rows; dy += ROWS) {
    Pack<T, V> packs[ROWS][W];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int k = 0; k < W; ++k) packs[r][k] = load<T, V>(from + (min(dy + r, rows - 1) * row + k * V));
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int dx = 0; dx < W; ++dx)
          best.take(v, widen(packs[r][(v * W + dx) / V].value[(v * W + dx) % V]), min(dy + r, rows - 1) * W + dx);
  }
}

// A map as the pooling kernels see it.
template <typename T, typename Index>
struct Map {
  View<const T, Index> in;  // of a copy, dense images or pixels that are `image` apart
  Windows windows;
  char* offsets;         // or null
  Index work;            // packs of out, or elements
  Index first_channel;   // in out
  Divisor channels;      // that of a Grid; of a copy, packs of an image or a pixel
  unsigned first_block;  // where each has its own
  uint8_t width;         // pack_width; 0: element by element
  uint8_t gap;           // bytes behind the offsets that are zero
  bool copied;
};

template <typename T, typename Index>
struct Maps {
  int count;
  Map<T, Index> map[kMaxMaps];
};

// What maps are pooled to; `packs` of a row is the divisor of those that go by packs along x.
template <typename T, typename Index>
struct Output {
  View<T, Index> view;
  Divisor height, width, packs;
};

template <typename T, int V, bool channels_last, typename Index>
__device__ inline Position<Index> locate(Index index, const Map<T, Index>& m, const Output<T, Index>& out) {
  const bool packs = V > 1 && !channels_last;
  return locate<V, channels_last>(index, Grid{m.channels, out.height, packs ? out.packs : out.width});
}

// V windows of a map, from p on, with their offsets.
template <typename T, int V, bool channels_last, typename Index>
__device__ inline void pool_windows(
    const Map<T, Index>& m, const Output<T, Index>& out, const Position<Index>& p, Largest<V>& best) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    best.value[v] = -INFINITY;
    best.at[v] = 0;
  }
  const Windows& w = m.windows;
  const Range<Index> y = window(w.y, p.y, out.height), x = window(w.x, p.x, out.width);
  const T* from = m.in.at(p.n, p.c, y.begin, x.begin);
  const Index row = m.in.row, pixel = m.in.pixel;
  const int rows = int(y.end - y.begin), columns = int(x.end - x.begin);
  if (w.identity()) {
    const Pack<T, V> pack = load<T, V>(from);
#pragma unroll
    for (int v = 0; v < V; ++v) best.value[v] = widen(pack.value[v]);
  } else if (!channels_last && V > 1) {
    if (m.width == 1) take_neighbours<T, V, 1>(from, row, rows, best);
    if (m.width == 2) take_neighbours<T, V, 2>(from, row, rows, best);
    if (m.width == 4) take_neighbours<T, V, 4>(from, row, rows, best);
    if (m.width == 8) take_neighbours<T, V, 8>(from, row, rows, best);
  } else if (w.row <= 2) {
    take_window<T, V, 2, 2>(from, row, pixel, rows, columns, w.row, best);
  } else {
    take_window<T, V, 1, 4>(from, row, pixel, rows, columns, w.row, best);
  }
  if (m.offsets) store_offsets<V>(m.offsets, w.two_bytes, p.first, best.at);
}

template <int V, typename T, typename Index>
__device__ inline void clear_gap(const Map<T, Index>& m) {
  if (threadIdx.x < m.gap) m.offsets[int64_t(m.work) * V * (m.windows.two_bytes ? 2 : 1) + threadIdx.x] = 0;
}

template <typename T, int V, bool channels_last, typename Index>
__device__ inline void pool_map(const Map<T, Index>& m, const Output<T, Index>& out, Index block) {
  if (block == 0) clear_gap<V>(m);
  const Index index = block * kThreads + Index(threadIdx.x);
  if (index >= m.work) return;
  const Position<Index> p = locate<T, V, channels_last>(index, m, out);
  T* to = out.view.at(p.n, m.first_channel + p.c, p.y, p.x);
  Largest<V> best;
  pool_windows<T, V, channels_last>(m, out, p, best);
  store<T, V>(to, best.value);
}

template <typename T, int V, bool channels_last, typename Index>
__device__ inline void copy_map(const Map<T, Index>& m, const Output<T, Index>& out, Index block) {
  const T* from = m.in.data;
  T* to = out.view.data + m.first_channel * out.view.channel;
  const Divisor length = m.channels;
  const Index work = m.work, step = m.in.image, out_step = channels_last ? out.view.pixel : out.view.image;
  const Index first = block * (kCopies * kThreads) + Index(threadIdx.x);
  Pack<T, V> packs[kCopies];
  Index at[kCopies];
#pragma unroll
  for (int k = 0; k < kCopies; ++k) {
    Index inside;
    const Index outside = length.divide(min(first + k * kThreads, work - 1), inside);
    at[k] = outside * out_step + inside * V;
    packs[k] = load<T, V>(from + (outside * step + inside * V));
  }
#pragma unroll
  for (int k = 0; k < kCopies; ++k)
    if (first + k * kThreads < work) *reinterpret_cast<Pack<T, V>*>(to + at[k]) = packs[k];
}

// Pools maps side by side.
template <typename T, bool channels_last, typename Index>
__global__ void __launch_bounds__(kThreads, kBlocks) concat_kernel(const Maps<T, Index> maps, const Output<T, Index> out) {
  constexpr int V = 16 / sizeof(T);
  int i = 0;
  while (i + 1 < maps.count && blockIdx.x >= maps.map[i + 1].first_block) ++i;
  const Map<T, Index>& m = maps.map[i];
  const Index block = Index(blockIdx.x - m.first_block);
  if (m.copied)
    m.width ? copy_map<T, V, channels_last>(m, out, block) : copy_map<T, 1, channels_last>(m, out, block);
  else
    m.width ? pool_map<T, V, channels_last>(m, out, block) : pool_map<T, 1, channels_last>(m, out, block);
}

// Pools maps and adds them up.
template <typename T, int V, bool channels_last, typename Index>
__global__ void __launch_bounds__(kThreads, kBlocks)
    sum_kernel(const Maps<T, Index> maps, const Output<T, Index> out, Index work) {
  if (blockIdx.x == 0)
#pragma unroll 1
    for (int i = 0; i < maps.count; ++i) clear_gap<V>(maps.map[i]);
  const Index index = Index(blockIdx.x) * kThreads + Index(threadIdx.x);
  if (index >= work) return;
  const Position<Index> p = locate<T, V, channels_last>(index, maps.map[0], out);
  float sum[V];
  for (int i = 0; i < maps.count; ++i) {
    Largest<V> best;
    pool_windows<T, V, channels_last>(maps.map[i], out, p, best);
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = i == 0 ? best.value[v] : sum[v] + best.value[v];
  }
  store<T, V>(out.view.at(p.n, p.c, p.y, p.x), sum);
}

// What scatter and gather go by.
template <typename P, typename M, typename Index>
struct Pooled {
  View<P, Index> pooled;
  View<M, Index> map;
  Windows windows;
  const char* offsets;
};

// The elements of V windows that do not overlap. Along x a window has W; 0, any number, is
// channels_last.
template <typename T, int V, int W, typename Index>
__global__ void __launch_bounds__(kThreads) scatter_windows(const Pooled<const T, T, Index> s, const Grid grid, Index work) {
  const Index index = Index(blockIdx.x) * kThreads + Index(threadIdx.x);
  if (index >= work) return;
  const Windows& w = s.windows;
  const Position<Index> p = locate<V, W == 0>(index, grid);
  int at[V];
  load_offsets<V>(s.offsets, w.two_bytes, p.first, at);
  const Pack<T, V> values = load<T, V>(s.pooled.at(p.n, p.c, p.y, p.x));
  T zero;
  narrow(0.f, zero);
  const Index top = p.y * w.y.kernel, left = p.x * w.x.kernel;
  const int rows = int(min(Index(w.y.size) - top, Index(w.y.kernel)));
  T* to = s.map.at(p.n, p.c, top, left);
  if constexpr (W > 0) {
    for (int dy = 0; dy < rows; ++dy) {
#pragma unroll
      for (int k = 0; k < W; ++k) {
        Pack<T, V> pack;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int window = (k * V + v) / W, dx = (k * V + v) % W;
          pack.value[v] = at[window] == dy * W + dx ? values.value[window] : zero;
        }
        reinterpret_cast<Pack<T, V>*>(to + dy * s.map.row)[k] = pack;
      }
    }
  } else {
    const int columns = int(min(Index(w.x.size) - left, Index(w.x.kernel)));
    for (int dy = 0; dy < rows; ++dy) {
      for (int dx = 0; dx < columns; ++dx) {
        Pack<T, V> pack;
#pragma unroll
        for (int v = 0; v < V; ++v) pack.value[v] = at[v] == dy * w.row + dx ? values.value[v] : zero;
        *reinterpret_cast<Pack<T, V>*>(to + (dy * s.map.row + dx * s.map.pixel)) = pack;
      }
    }
  }
}

// V channels of one element of the map, or one: the sum over the windows that hold it.
template <typename T, int V, bool channels_last, typename Index>
__global__ void __launch_bounds__(kThreads) scatter_elements(
    const Pooled<const T, T, Index> s, const Grid grid, const Divisor windows_y, const Divisor windows_x,
    const Divisor elements_y, const Divisor elements_x, Index channels, Index work) {
  const Index index = Index(blockIdx.x) * kThreads + Index(threadIdx.x);
  if (index >= work) return;
  const Windows& w = s.windows;
  const Position<Index> p = locate<V, channels_last>(index, grid);
  float sum[V] = {};
  const Range<Index> rows = holders(w.y, p.y, elements_y), columns = holders(w.x, p.x, elements_x);
#pragma unroll 1  // one or two, each way
  for (Index j = rows.begin; j < rows.end; ++j) {
#pragma unroll 1
    for (Index i = columns.begin; i < columns.end; ++i) {
      const Index first = channels_last ? ((p.n * w.y.count + j) * w.x.count + i) * channels + p.c
                                        : ((p.n * channels + p.c) * w.y.count + j) * w.x.count + i;
      int at[V];
      load_offsets<V>(s.offsets, w.two_bytes, first, at);
      const Pack<T, V> values = load<T, V>(s.pooled.at(p.n, p.c, j, i));
      const Index wanted = (p.y - window(w.y, j, windows_y).begin) * w.row + p.x - window(w.x, i, windows_x).begin;
#pragma unroll
      for (int v = 0; v < V; ++v)
        if (at[v] == wanted) sum[v] += widen(values.value[v]);
    }
  }
  store<T, V>(s.map.at(p.n, p.c, p.y, p.x), sum);
}

// V windows of a kernel, each of which reads one element of the map.
template <typename T, int V, bool channels_last, typename Index>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const Pooled<T, const T, Index> s, const Grid grid, const Divisor row, Index work) {
  const Index index = Index(blockIdx.x) * kThreads + Index(threadIdx.x);
  if (index >= work) return;
  const Windows& w = s.windows;
  const Position<Index> p = locate<V, channels_last>(index, grid);
  int at[V];
  load_offsets<V>(s.offsets, w.two_bytes, p.first, at);
  Pack<T, V> values;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    int dx;
    const int dy = row.divide(at[v], dx);
    const Index c = channels_last ? p.c + v : p.c, column = channels_last ? p.x : p.x + v;
    const Index y = p.y * w.y.kernel + dy, x = column * w.x.kernel + dx;
    narrow(0.f, values.value[v]);
    if (dy < w.y.kernel && y < w.y.size && x < w.x.size) values.value[v] = *s.map.at(p.n, c, y, x);
  }
  *reinterpret_cast<Pack<T, V>*>(s.pooled.at(p.n, p.c, p.y, p.x)) = values;
}

// The stride that goes through these axes, the innermost first, as if they were one; -1 if none
// does.
int64_t joint_stride(const Tensor& map, std::initializer_list<int> dims) {
  int64_t stride = -1, next = -1;
  for (const int dim : dims) {
    if (map.size(dim) == 1) continue;
    if (stride < 0) stride = next = map.stride(dim);
    if (map.stride(dim) != next) return -1;
    next *= map.size(dim);
  }
  return stride < 0 ? 1 : stride;
}

template <typename T, typename Index>
Map<T, Index> describe(const Tensor& map, const Part& part, char* offsets, const Tensor& out, int pack, bool channels_last) {
  Map<T, Index> result;
  result.in = View<const T, Index>(map);
  result.windows = part.windows;
  result.offsets = part.offsets < 0 ? nullptr : offsets + part.offsets;
  result.work = Index(out.size(0) * part.channels * out.size(2) * out.size(3) / pack);
  result.first_channel = Index(part.first_channel);
  result.channels = Divisor(channels_last ? part.channels / pack : part.channels);
  result.first_block = 0;
  result.width = uint8_t(pack > 1 ? (channels_last ? 1 : pack_width(part.windows)) : 0);
  result.gap = uint8_t(part.next - part.end);
  result.copied = false;
  return result;
}

// Describes a copy instead, where a map of out's size consists of images, or with channels_last of
// pixels, without gaps.
template <typename T, typename Index>
void copy_if_possible(Map<T, Index>& map, const Tensor& from, const Tensor& out, bool channels_last) {
  constexpr int V = 16 / sizeof(T);
  if (!map.windows.identity() || map.offsets) return;
  const int64_t inner = channels_last ? joint_stride(from, {1}) : joint_stride(from, {3, 2, 1});
  const int64_t step = channels_last ? joint_stride(from, {3, 2, 0}) : joint_stride(from, {0});
  if (inner != 1 || step < 0) return;
  const int64_t count = from.size(0) * (channels_last ? from.size(2) * from.size(3) : 1), length = from.numel() / count;
  const int64_t out_step = channels_last ? out.size(1) : out.size(1) * out.size(2) * out.size(3);
  const int64_t begin = map.first_channel * out.stride(1);
  const bool packs = aligned(from.const_data_ptr(), 16) && aligned(out.const_data_ptr(), 16) && begin % V == 0 &&
                     length % V == 0 && (count == 1 || (step % V == 0 && out_step % V == 0));
  map.copied = true;
  map.width = packs;
  map.in.image = Index(step);
  map.channels = Divisor(length / (packs ? V : 1));
  map.work = Index(from.numel() / (packs ? V : 1));
}

}  // namespace

void pool(
    const std::vector<Tensor>& maps, const std::vector<Part>& parts, const Tensor& out, char* offsets, bool concat,
    bool channels_last) {
  STD_TORCH_CHECK(maps.size() <= kMaxMaps, "pag_pool: at most ", kMaxMaps, " maps");
  const CurrentStream stream(out);
  int64_t elements = out.numel();
  for (size_t i = 0; i < maps.size(); ++i) elements = std::max({elements, extent(maps[i]), largest_dividend(parts[i].windows)});
  dispatch_cuda(out, "pag_pool", [&](auto type) {
    using T = decltype(type);
    constexpr int V = 16 / sizeof(T);
    const bool out_packs = packable<T, V>(out, channels_last);
    const auto packs = [&](size_t i) {
      return out_packs && packable<T, V>(maps[i], channels_last) && (parts[i].offsets < 0 || aligned(offsets, 16)) &&
             (channels_last ? parts[i].first_channel % V == 0 : pack_width(parts[i].windows) > 0);
    };
    bool all_packs = true;
    for (size_t i = 0; i < maps.size(); ++i) all_packs = all_packs && packs(i);
    with_index(elements, [&](auto zero) {
      using Index = decltype(zero);
      const Output<T, Index> to{
          View<T, Index>(out), Divisor(out.size(2)), Divisor(out.size(3)), Divisor(std::max<int64_t>(1, out.size(3) / V))};
      Maps<T, Index> packed{};
      static_assert(sizeof packed + sizeof to + sizeof(Index) <= 4096, "what a launch takes");
      unsigned blocks = 0;
      for (size_t i = 0; i < maps.size(); ++i) {
        if (maps[i].numel() == 0) continue;
        Map<T, Index>& map = packed.map[packed.count++];
        map = describe<T, Index>(maps[i], parts[i], offsets, out, (concat ? packs(i) : all_packs) ? V : 1, channels_last);
        if (concat) copy_if_possible(map, maps[i], out, channels_last);
        map.first_block = blocks;
        blocks += blocks_for(ceil_div(map.work, map.copied ? kCopies : 1));
      }
      const auto run = [&](auto last) {
        constexpr bool kLast = decltype(last)::value;
        if (concat)
          launch(concat_kernel<T, kLast, Index>, blocks, kThreads, 0, stream, packed, to);
        else
          launch(
              all_packs ? &sum_kernel<T, V, kLast, Index> : &sum_kernel<T, 1, kLast, Index>, blocks_for(packed.map[0].work),
              kThreads, 0, stream, packed, to, packed.map[0].work);
      };
      channels_last ? run(std::true_type{}) : run(std::false_type{});
    });
  });
}

void scatter(const Windows& w, const Tensor& pooled, const char* offsets, const Tensor& out, bool channels_last) {
  const CurrentStream stream(out);
  const int64_t channels = out.size(1), windows = pooled.numel(), elements = out.numel();
  dispatch_cuda(out, "pag_scatter", [&](auto type) {
    using T = decltype(type);
    constexpr int V = 16 / sizeof(T);
    const bool packs = packable<T, V>(pooled, channels_last) && packable<T, V>(out, channels_last) && aligned(offsets, 16);
    with_index(std::max({elements, extent(pooled), largest_dividend(w)}), [&](auto zero) {
      using Index = decltype(zero);
      const Pooled<const T, T, Index> s{View<const T, Index>(pooled), View<T, Index>(out), w, offsets};
      const auto by_windows = [&](auto kernel, int pack) {
        const Grid grid = make_grid(channels, w.y.count, w.x.count, pack, channels_last);
        launch(kernel, blocks_for(windows / pack), kThreads, 0, stream, s, grid, Index(windows / pack));
      };
      const auto by_elements = [&](auto kernel, int pack) {
        const Grid grid = make_grid(channels, w.y.size, w.x.size, pack, channels_last);
        const auto holder = [](const Axis& axis) { return Divisor(axis.kernel ? axis.kernel : axis.size); };
        launch(
            kernel, blocks_for(elements / pack), kThreads, 0, stream, s, grid, Divisor(w.y.count), Divisor(w.x.count),
            holder(w.y), holder(w.x), Index(channels), Index(elements / pack));
      };
      if (channels_last && w.overlap())
        packs ? by_elements(scatter_elements<T, V, true, Index>, V) : by_elements(scatter_elements<T, 1, true, Index>, 1);
      else if (channels_last)
        packs ? by_windows(scatter_windows<T, V, 0, Index>, V) : by_windows(scatter_windows<T, 1, 0, Index>, 1);
      else if (w.overlap() || !packs || pack_width(w) == 0)
        by_elements(scatter_elements<T, 1, false, Index>, 1);
      else if (pack_width(w) == 1)
        by_windows(scatter_windows<T, V, 1, Index>, V);
      else if (pack_width(w) == 2)
        by_windows(scatter_windows<T, V, 2, Index>, V);
      else if (pack_width(w) == 4)
        by_windows(scatter_windows<T, V, 4, Index>, V);
      else
        by_windows(scatter_windows<T, V, 8, Index>, V);
    });
  });
}

void gather(const Windows& w, const Tensor& input, const char* offsets, const Tensor& out, bool channels_last) {
  const CurrentStream stream(out);
  dispatch_cuda(out, "pag_gather", [&](auto type) {
    using T = decltype(type);
    constexpr int V = 16 / sizeof(T);
    const int pack = packable<T, V>(out, channels_last) && aligned(offsets, 16) ? V : 1;
    with_index(std::max(out.numel(), extent(input)), [&](auto zero) {
      using Index = decltype(zero);
      const Pooled<T, const T, Index> s{View<T, Index>(out), View<const T, Index>(input), w, offsets};
      const Index work = Index(out.numel() / pack);
      const auto run = [&](auto kernel) {
        launch(
            kernel, blocks_for(work), kThreads, 0, stream, s, make_grid(out.size(1), w.y.count, w.x.count, pack, channels_last),
            Divisor(w.x.kernel), work);
      };
      if (channels_last)
        run(pack > 1 ? &gather_kernel<T, V, true, Index> : &gather_kernel<T, 1, true, Index>);
      else
        run(pack > 1 ? &gather_kernel<T, V, false, Index> : &gather_kernel<T, 1, false, Index>);
    });
  });
}

}  // namespace segops::pag
