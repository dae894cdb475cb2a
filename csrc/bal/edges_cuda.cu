// The edge map on CUDA (bal.h says what it is).
//
// A block counts the edges of the label columns that its outputs reach, a thread for each of them,
// which walks down a row's taps and keeps the weighted sum; these sums are then weighted along x in
// shared memory. The blur is two passes, whose blocks compute the kernel's factors themselves.

#include "../common/cuda.h"
#include "bal.h"

#include <algorithm>
#include <cfloat>

namespace segops::bal {
namespace {

constexpr int kOutputRows = 4;  // of a block that counts edges: what their taps share is read from the cache
constexpr int kLoads = 4;       // label rows that a thread loads at once

template <typename Label, typename Index>
struct Map {
  const Label* __restrict__ labels;
  int64_t classes, ignore_index;
  Index height, width;

  // The distinct classes of a pixel and its right and lower neighbours, which are not all alike.
  __device__ float distinct(Label here, Label right, Label lower) const {
    const int a = class_of(here, classes, ignore_index), b = class_of(right, classes, ignore_index);
    const int c = class_of(lower, classes, ignore_index);
    return float((a >= 0) + (b >= 0 && b != a) + (c >= 0 && c != a && c != b));
  }
};

// An axis of an antialiased resize: output i is the mean of source[first(i)] .. source[end(i)],
// weighted with weight(i, s), which are integers here.
template <typename Index>
struct Taps {
  Index in, out;

  __device__ Index first(Index i) const {
    const Index steps = (2 * i - 1) * in - out;
    return steps < 0 ? 0 : steps / (2 * out) + 1;
  }
  __device__ Index end(Index i) const {
    const Index s = ((2 * i + 3) * in + out - 1) / (2 * out);
    return s < in ? s : in;
  }
  __device__ float weight(Index i, Index s) const {
    const Index distance = (2 * s + 1) * out - (2 * i + 1) * in;
    return float(2 * in - (distance < 0 ? -distance : distance));
  }
};

// The sum of the edges of label column x of an image, weighted as output row i wants them.
template <typename Label, typename Index>
__device__ inline float sum_of_column(const Map<Label, Index>& map, const Taps<Index>& rows, Index image, Index i, Index x) {
  const Label* column = map.labels + image * map.height * map.width + x;
  const Index right = x + 1 < map.width ? 1 : 0, last = map.height - 1, end = rows.end(i);
  Index y = rows.first(i);
  Label here = column[y * map.width], beside = column[y * map.width + right];
  float sum = 0;
  for (; y < end; y += kLoads) {
    Label lower[kLoads], lower_beside[kLoads];
#pragma unroll
    for (int v = 0; v < kLoads; ++v) {
      const Index at = (y + v < last ? y + v + 1 : last) * map.width;
      lower[v] = column[at];
      lower_beside[v] = column[at + right];
    }
#pragma unroll
    for (int v = 0; v < kLoads; ++v) {
      if (y + v < end && (here != beside || here != lower[v]))
        sum += rows.weight(i, y + v) * map.distinct(here, beside, lower[v]);
      here = lower[v];
      beside = lower_beside[v];
    }
  }
  return sum;
}

template <typename Label, typename Index>
__global__ void __launch_bounds__(kThreads, sizeof(Index) == 4 ? 4 : 2) count_edges_kernel(
    const Map<Label, Index> map, const Taps<Index> rows, const Taps<Index> columns, int outputs, int column_tiles,
    int row_tiles, float beta, float* __restrict__ out) {
  __shared__ float sums[kThreads];
  const Index first_column = Index(blockIdx.x % column_tiles) * outputs;
  const Index first_output = Index(blockIdx.x / column_tiles % row_tiles) * kOutputRows;
  const Index image = blockIdx.x / column_tiles / row_tiles;
  const Index last_column = (first_column + outputs < columns.out ? first_column + outputs : columns.out) - 1;
  const Index begin = columns.first(first_column), end = columns.end(last_column);

  // The output that this thread writes, if it is one of those that do.
  const bool owner = Index(threadIdx.x) <= last_column - first_column;
  const Index column = owner ? first_column + int(threadIdx.x) : last_column;
  const Index own_begin = columns.first(column), own_end = columns.end(column);

  for (Index i = first_output; i < first_output + kOutputRows && i < rows.out; ++i) {
    float sum = 0, weights = 0;
    for (Index start = begin; start < end; start += kThreads) {
      const Index x = start + int(threadIdx.x);
      if (x < end) sums[threadIdx.x] = sum_of_column(map, rows, image, i, x);
      __syncthreads();
      if (owner) {
        const Index last = own_end < start + kThreads ? own_end : start + kThreads;
        for (Index s = own_begin > start ? own_begin : start; s < last; ++s) {
          const float weight = columns.weight(column, s);
          sum += weight * sums[s - start];
          weights += weight;
        }
      }
      __syncthreads();
    }
    if (!owner) continue;
    float row_weights = 0;
    for (Index y = rows.first(i); y < rows.end(i); ++y) row_weights += rows.weight(i, y);
    out[(image * rows.out + i) * columns.out + column] = sum / (weights * row_weights) + beta;
  }
}

// BlurKernel in float32.
struct Factors {
  bool gaussian;
  int64_t size;
  float reach, per_step, per_spread, least_over_range, per_range;  // reach: of the whole kernel

  explicit Factors(const BlurKernel& kernel)
      : gaussian(kernel.gaussian),
        size(kernel.size),
        reach(float(kernel.steps / 2)),
        per_step(float(1 / kernel.steps)),
        per_spread(float(std::min(1 / kernel.spread, double(FLT_MAX)))),
        least_over_range(float(kernel.least / kernel.range)),
        per_range(float(1 / kernel.range)) {}

  // (u1, u2), or (v1, v2).
  __device__ Pack<float, 2> at(int64_t k, bool along_x) const {
    const float distance = fabsf(float(size / 2 - k));
    if (!gaussian) {
      const float linear = 0.5f - distance * per_step;
      return along_x ? Pack<float, 2>{{1, linear}} : Pack<float, 2>{{linear, 1}};
    }
    // p = g - q = g (1 - q / g)
    const float g = expf(-(distance * distance) * per_spread);
    const float p = -g * expm1f(-(reach - distance) * (reach + distance) * per_spread);
    return along_x ? Pack<float, 2>{{g, p}} : Pack<float, 2>{{p * per_range, least_over_range}};
  }
};

// Calls tap(k, factors) for the taps at which position `at` of `length` meets the map. All threads
// of a block have to come.
template <typename Index, typename Tap>
__device__ inline void for_taps(const Factors& factors, bool along_x, Index at, Index length, const Tap& tap) {
  __shared__ Pack<float, 2> some[kThreads];
  const Index size = Index(factors.size), reach = size / 2;
  for (Index start = 0; start < size; start += kThreads) {
    const Index own = start + int(threadIdx.x);
    if (own < size) some[threadIdx.x] = factors.at(own, along_x);
    __syncthreads();
    const Index begin = reach - at > start ? reach - at : start;
    const Index last = length - at + reach < size ? length - at + reach : size;
    const Index end = last < start + kThreads ? last : start + kThreads;
#pragma unroll 8
    for (Index k = begin; k < end; ++k) tap(k - reach, some[k - start]);
    __syncthreads();
  }
}

// rows[pair] = edges convolved along x with v_pair.
template <typename Index>
__global__ void __launch_bounds__(kThreads)
    blur_x_kernel(const float* __restrict__ edges, const Factors factors, float* __restrict__ rows, Index w, Index work) {
  const Index thread = Index(blockIdx.x) * kThreads + int(threadIdx.x), index = thread < work ? thread : work - 1;
  float sum1 = 0, sum2 = 0;
  for_taps(factors, true, index % w, w, [&](Index shift, const Pack<float, 2>& v) {
    const float edge = edges[index + shift];
    sum1 += v.value[0] * edge;
    sum2 += v.value[1] * edge;
  });
  if (thread >= work) return;
  rows[index] = sum1;
  rows[work + index] = sum2;
}

// out = the two maps of rows convolved along y with u1 and u2, added up, plus beta.
template <typename Index>
__global__ void __launch_bounds__(kThreads) blur_y_kernel(
    const float* __restrict__ rows, const Factors factors, float* __restrict__ out, Index h, Index w, float beta, Index work) {
  const Index thread = Index(blockIdx.x) * kThreads + int(threadIdx.x), index = thread < work ? thread : work - 1;
  float sum = 0;
  for_taps(factors, false, index / w % h, h, [&](Index shift, const Pack<float, 2>& u) {
    const float* at = rows + (index + shift * w);
    sum += u.value[0] * at[0] + u.value[1] * at[work];
  });
  if (thread < work) out[index] = sum + beta;
}

template <typename Index>
__global__ void __launch_bounds__(kThreads)
    normalise_kernel(float* __restrict__ edges, const float* __restrict__ by, bool mean, float beta, Index plane, Index work) {
  const Index index = Index(blockIdx.x) * kThreads + int(threadIdx.x);
  if (index < work) edges[index] = normalised(edges[index], by[index / plane], mean, beta);
}

// Calls fn with a value of the labels' type.
template <typename F>
void dispatch_labels(const Labels& labels, const F& fn) {
  labels.bytes == 8 ? fn(int64_t{}) : labels.bytes == 4 ? fn(int32_t{}) : fn(uint8_t{});
}

}  // namespace

bool count_edges(const Tensor& labels, const Tensor& out, int64_t classes, int64_t ignore_index, double beta) {
  const CurrentStream stream(out);
  const int64_t height = labels.size(1), width = labels.size(2), h = out.size(1), w = out.size(2);
  // Outputs whose label columns a block has threads for.
  const int outputs = int(std::max<int64_t>(1, kThreads * w / width - 1));
  const int64_t column_tiles = ceil_div(w, outputs), row_tiles = ceil_div(h, kOutputRows);
  const unsigned blocks = blocks_for(labels.size(0) * row_tiles * column_tiles * kThreads);
  with_index(std::max({labels.numel(), 2 * height * (h + 2), 2 * width * (w + 2)}), [&](auto index) {
    using Index = decltype(index);
    const Taps<Index> rows{Index(height), Index(h)}, columns{Index(width), Index(w)};
    dispatch_labels(Labels(labels, classes, ignore_index, "bal_edge"), [&](auto label) {
      using Label = decltype(label);
      const Map<Label, Index> map{data_of<const Label>(labels), classes, ignore_index, Index(height), Index(width)};
      launch(
          count_edges_kernel<Label, Index>, blocks, kThreads, 0, stream, map, rows, columns, outputs, int(column_tiles),
          int(row_tiles), float(beta), data_of<float>(out));
    });
  });
  return false;
}

void blur(const Tensor& edges, const BlurKernel& kernel, double beta, const Tensor& scratch) {
  const CurrentStream stream(edges);
  const int64_t h = edges.size(1), w = edges.size(2), work = edges.numel();
  float *map = data_of<float>(edges), *along_x = data_of<float>(scratch);
  const Factors factors(kernel);
  with_index(std::max(2 * work, 2 * kernel.size), [&](auto index) {
    using Index = decltype(index);
    launch(blur_x_kernel<Index>, blocks_for(work), kThreads, 0, stream, map, factors, along_x, Index(w), Index(work));
    launch(
        blur_y_kernel<Index>, blocks_for(work), kThreads, 0, stream, along_x, factors, map, Index(h), Index(w), float(beta),
        Index(work));
  });
}

void normalise(const Tensor& edges, const Tensor& by, bool mean, double beta) {
  const CurrentStream stream(edges);
  const int64_t plane = edges.size(1) * edges.size(2), work = edges.numel();
  float* map = data_of<float>(edges);
  const float* divisors = data_of<const float>(by);
  with_index(work + kThreads, [&](auto index) {
    using Index = decltype(index);
    launch(
        normalise_kernel<Index>, blocks_for(work), kThreads, 0, stream, map, divisors, mean, float(beta), Index(plane),
        Index(work));
  });
}

}  // namespace segops::bal
