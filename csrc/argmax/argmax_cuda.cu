// argmax.h on CUDA: a thread per logit position finds its largest class; then a thread owns a
// column of pixels of a cell between four positions, up to eight rows of it. Where the corners
// disagree, it reads their logits once for all of these pixels, which share the means between left
// and right.
//
// Threads of a warp own neighbouring columns, so that they write whole stretches of a row. (Pairs
// of classes would be 16 bytes, but every other row of an odd width is not aligned to them.)

#include "argmax.h"

#include "../common/cuda.h"

#include <algorithm>

namespace segops::argmax {
namespace {

// The largest so far and its class; a NaN is larger than any number, and the first stays. Seeing
// the same again changes nothing.
struct Largest {
  float value = -INFINITY;
  int index = 0;

  __device__ void see(float other, int c) {
    if (!(other <= value) && value == value) {
      value = other;
      index = c;
    }
  }
};

// One axis of the resize, in integers, which are exact. Cell c is what lies between sources c - 1
// and c: there are in + 1 cells, of which the first and the last lie half outside of the map, where
// the source at its border is all that counts. A cell holds at most ceil(out / in) outputs.
template <typename Index>
struct Axis {
  Index in, out;
  Divisor twice_in, twice_out;

  Axis(int64_t in, int64_t out) : in(Index(in)), out(Index(out)), twice_in(2 * in), twice_out(2 * out) {}
  // What the numbers below reach.
  static int64_t largest(int64_t in, int64_t out) { return 2 * in * out + in + 2 * out; }

  // The cell of output i, which lies rest / (2 * out) behind source cell - 1.
  __device__ Index cell(Index i, Index& rest) const { return twice_out.divide((2 * i + 1) * in + out, rest); }
  // The first output that lies in this cell or behind it.
  __device__ Index first(Index cell) const {
    const Index i = cell > 0 ? twice_in.divide((2 * cell - 1) * out + in - 1) : 0;
    return i < out ? i : out;
  }
  __device__ Index low(Index cell) const { return cell > 0 ? cell - 1 : 0; }
  __device__ Index high(Index cell) const { return cell < in ? cell : in - 1; }
  __device__ bool outside(Index cell) const { return cell == 0 || cell == in; }
  // Of the source at `high`.
  __device__ float weight(Index cell, Index rest) const { return outside(cell) ? 0.f : float(rest) / float(2 * out); }
};

// Classes that are loaded before any of them is looked at. Behind the last one it comes again.
constexpr int kPositionBatch = 8, kCellBatch = 2;

// Writes what argmax.h calls best or, where that is the result, the class.
template <typename T, bool is_result, typename Index>
__global__ void __launch_bounds__(kThreads) best_kernel(
    const View<const T, Index> logits, int classes, const Divisor height, const Divisor width,
    std::conditional_t<is_result, int64_t, int>* __restrict__ best, Index work) {
  const Index index = Index(blockIdx.x) * kThreads + Index(threadIdx.x);
  if (index >= work) return;
  Index y, x;
  const Index n = height.divide(width.divide(index, x), y);
  const Index at = logits.offset(n, 0, y, x);
  Largest largest;
  for (int first = 0; first < classes; first += kPositionBatch) {
    T batch[kPositionBatch];
#pragma unroll
    for (int k = 0; k < kPositionBatch; ++k) batch[k] = logits.data[at + logits.channel * min(first + k, classes - 1)];
#pragma unroll
    for (int k = 0; k < kPositionBatch; ++k) largest.see(widen(batch[k]), first + k);
  }
  best[index] = is_result || largest.value < INFINITY ? largest.index : ~largest.index;
}

// Both axes, and what divides the number of a thread: columns, then chunks of the rows of a cell,
// then cells, then images.
template <typename Index>
struct Cells {
  Axis<Index> rows, columns;
  Divisor width, chunks, chunks_of_image;
};

// A chunk: R rows of a cell, or what is left of them, in one column.
template <typename T, int R, typename Index>
__global__ void __launch_bounds__(kThreads) upsample_kernel(
    const View<const T, Index> logits, int classes, const Cells<Index> cells, const int* __restrict__ best,
    int64_t* __restrict__ out, Index work) {
  const Index index = Index(blockIdx.x) * kThreads + Index(threadIdx.x);
  if (index >= work) return;
  const Axis<Index>&rows = cells.rows, &columns = cells.columns;
  Index x, chunk;
  const Index n = cells.chunks_of_image.divide(cells.width.divide(index, x), chunk);
  const Index cell = cells.chunks.divide(chunk, chunk), y = rows.first(cell) + chunk * R;
  const Index count = rows.first(cell + 1) - y;
  if (count <= 0) return;
  int64_t* to = out + ((n * rows.out + y) * columns.out + x);

  Index rest;
  const Index column = columns.cell(x, rest), left = columns.low(column), right = columns.high(column);
  const Index above = rows.low(cell), below = rows.high(cell);
  const int* bests = best + n * rows.in * columns.in;
  const int same = bests[above * columns.in + left],
            others[] = {bests[above * columns.in + right], bests[below * columns.in + left], bests[below * columns.in + right]};
  if (same >= 0 && same == others[0] && same == others[1] && same == others[2]) {
#pragma unroll
    for (int r = 0; r < R; ++r)
      if (r < count) to[r * columns.out] = same;
    return;
  }

  // A logit that weighs nothing is not looked at: zero times infinity is no number. Those below
  // weigh nothing in the first row of a cell alone, or in all.
  const float wx = columns.weight(column, rest);
  float wy[R];
  rows.cell(y, rest);
#pragma unroll
  for (int r = 0; r < R; ++r) wy[r] = rows.weight(cell, rest + r * 2 * rows.in);
  const bool right_counts = wx != 0, first_counts = wy[0] != 0, others_count = !rows.outside(cell);
  const auto mean = [](float low, float high, float weight, bool high_counts) {
    const float part = (1 - weight) * low;
    return high_counts ? part + weight * high : part;
  };
  const Index at[] = {
      logits.offset(n, 0, above, left), logits.offset(n, 0, above, right), logits.offset(n, 0, below, left),
      logits.offset(n, 0, below, right)};
  Largest largest[R];
  for (int first = 0; first < classes; first += kCellBatch) {
    T corners[kCellBatch][4];
#pragma unroll
    for (int k = 0; k < kCellBatch; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) corners[k][i] = logits.data[at[i] + logits.channel * min(first + k, classes - 1)];
#pragma unroll
    for (int k = 0; k < kCellBatch; ++k) {
      const float top = mean(widen(corners[k][0]), widen(corners[k][1]), wx, right_counts);
      const float bottom = mean(widen(corners[k][2]), widen(corners[k][3]), wx, right_counts);
#pragma unroll
      for (int r = 0; r < R; ++r) largest[r].see(mean(top, bottom, wy[r], r == 0 ? first_counts : others_count), first + k);
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r)
    if (r < count) to[r * columns.out] = largest[r].index;
}

}  // namespace

void upsample(const Tensor& logits, const Tensor& best, const Tensor& out) {
  const Shape s = check(logits, best, out);
  const CurrentStream stream(logits);
  int* bests = data_of<int>(best);
  int64_t* to = data_of<int64_t>(out);
  const int64_t rows = ceil_div(s.height, s.h);  // of a cell, at most
  const int64_t chunk = rows > 4 ? 8 : rows > 2 ? 4 : 2, chunks = ceil_div(rows, chunk);
  const int64_t positions = best.numel(), work = s.images * (s.h + 1) * chunks * s.width;
  const int64_t elements = std::max(
      {extent(logits), positions, out.numel(), work, Axis<int64_t>::largest(s.h, s.height),
       Axis<int64_t>::largest(s.w, s.width)});
  dispatch_cuda(logits, "upsample_argmax", [&](auto type) {
    using T = decltype(type);
    with_index(elements, [&](auto index) {
      using Index = decltype(index);
      const View<const T, Index> from(logits);
      const auto find_best = [&](auto kernel, auto* result) {
        launch(
            kernel, blocks_for(positions), kThreads, 0, stream, from, int(s.classes), Divisor(s.h), Divisor(s.w), result,
            Index(positions));
      };
      if (!s.resized()) return find_best(&best_kernel<T, true, Index>, to);
      find_best(&best_kernel<T, false, Index>, bests);
      const Cells<Index> cells{{s.h, s.height}, {s.w, s.width}, Divisor(s.width), Divisor(chunks), Divisor((s.h + 1) * chunks)};
      launch(
          chunk == 8   ? &upsample_kernel<T, 8, Index>
          : chunk == 4 ? &upsample_kernel<T, 4, Index>
                       : &upsample_kernel<T, 2, Index>,
          blocks_for(work), kThreads, 0, stream, from, int(s.classes), cells, bests, to, Index(work));
    });
  });
}

}  // namespace segops::argmax
