// argmax.h on CUDA: a thread per logit position, then a thread per pixel, which looks at classes
// only where its four corners disagree.

#include "argmax.h"

#include "../common/cuda.h"

namespace segops::argmax {
namespace {

// The largest so far and its class; a NaN is larger than any number, and the first stays.
struct Largest {
  float value;
  int index;

  __device__ void see(float other, int c) {
    if (other > value || (isnan(other) && !isnan(value))) {
      value = other;
      index = c;
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    best_kernel(const View<const T> logits, int classes, int64_t h, int64_t w, int* __restrict__ best, int64_t work) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= work) return;
  const T* at = logits.at(index / w / h, 0, index / w % h, index % w);
  Largest largest{widen(*at), 0};
  for (int c = 1; c < classes; ++c) largest.see(widen(at[c * logits.channel]), c);
  best[index] = largest.value < INFINITY ? largest.index : ~largest.index;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) upsample_kernel(
    const View<const T> logits, const Shape s, double scale_y, double scale_x, const int* __restrict__ best,
    int64_t* __restrict__ out, int64_t work) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= work) return;
  const int64_t n = index / s.width / s.height;
  const Source y = bilinear_source(index / s.width % s.height, s.h, scale_y),
               x = bilinear_source(index % s.width, s.w, scale_x);
  const int *upper = best + (n * s.h + y.low) * s.w, *lower = best + (n * s.h + y.high) * s.w;
  const int same = upper[x.low];
  if (same >= 0 && same == upper[x.high] && same == lower[x.low] && same == lower[x.high]) {
    out[index] = same;
    return;
  }
  const float wy = float(y.weight), wx = float(x.weight);
  const T *a = logits.at(n, 0, y.low, x.low), *b = logits.at(n, 0, y.low, x.high);
  const T *c = logits.at(n, 0, y.high, x.low), *d = logits.at(n, 0, y.high, x.high);
  // A logit that weighs nothing is not looked at: zero times infinity is no number.
  const auto between = [](float low, float high, float weight) {
    return weight == 0 ? low : (1 - weight) * low + weight * high;
  };
  const auto value = [&](int k) {
    const int64_t at = k * logits.channel;
    return between(between(widen(a[at]), widen(b[at]), wx), between(widen(c[at]), widen(d[at]), wx), wy);
  };
  Largest largest{value(0), 0};
  for (int k = 1; k < s.classes; ++k) largest.see(value(k), k);
  out[index] = largest.index;
}

// At their own size, best is the result.
__global__ void __launch_bounds__(kThreads)
    widen_kernel(const int* __restrict__ best, int64_t* __restrict__ out, int64_t work) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index < work) out[index] = class_of_best(best[index]);
}

}  // namespace

void upsample(const Tensor& logits, const Tensor& best, const Tensor& out) {
  const Shape s = check(logits, best, out);
  const CurrentStream stream(logits);
  int* bests = data_of<int>(best);
  int64_t* to = data_of<int64_t>(out);
  const int64_t positions = best.numel(), pixels = out.numel();
  dispatch_cuda(logits, "upsample_argmax", [&](auto type) {
    using T = decltype(type);
    const View<const T> from(logits);
    launch(best_kernel<T>, blocks_for(positions), kThreads, 0, stream, from, int(s.classes), s.h, s.w, bests, positions);
    if (s.resized())
      launch(
          upsample_kernel<T>, blocks_for(pixels), kThreads, 0, stream, from, s, double(s.h) / double(s.height),
          double(s.w) / double(s.width), bests, to, pixels);
    else
      launch(widen_kernel, blocks_for(pixels), kThreads, 0, stream, bests, to, pixels);
  });
}

}  // namespace segops::argmax
