// The kernels of the boundary-aware loss on CUDA (bal.h says what they compute).
//
// The loss gives a thread a column of four label pixels, which mostly lie between the same four
// logits of a class: these are read once. The gradient gathers: a block owns a row of logits, a few
// columns of it and a few classes, its threads walk down the label columns that the row reaches,
// and their sums are then resized along x in shared memory. A pixel's softmax is computed twice,
// once for each row of logits it lies between, and nothing is added to memory: no atomics.

#include "../common/cuda.h"
#include "../common/op.h"
#include "bal.h"

#include <algorithm>
#include <cfloat>

namespace segops::bal {
namespace {

constexpr int kRows = 4;     // label rows of a thread in the loss
constexpr int kClasses = 8;  // classes of a block in the gradient

// ---- edges --------------------------------------------------------------------------------------

__device__ inline float distinct(int a, int b, int c) {
  if (a == b && a == c) return 0;
  return float((a >= 0) + (b >= 0 && b != a) + (c >= 0 && c != a && c != b));
}

__global__ void __launch_bounds__(kThreads) count_edges_kernel(
    Labels labels, int64_t height, int64_t width, float* __restrict__ out, int64_t h, int64_t w, float beta, int64_t work) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= work) return;
  const int64_t image = index / w / h * height * width;
  const Antialias rows(index / w % h, height, h), columns(index % w, width, w);
  // In float from here on: the distances are small.
  const float top = float(rows.start), left = float(columns.start);
  const float inverse_y = float(1 / rows.scale), inverse_x = float(1 / columns.scale);
  float sum = 0, weight_y = 0, weight_x = 0;
  for (int64_t i = 0; i < rows.count; ++i) {
    const int64_t y = rows.first + i;
    const int64_t row = image + y * width, lower = image + (y + 1 < height ? y + 1 : y) * width;
    float row_sum = 0;
    weight_x = 0;
    int here = labels.at(row + columns.first);
    for (int64_t j = 0; j < columns.count; ++j) {
      const int64_t x = columns.first + j;
      const int right = labels.at(row + (x + 1 < width ? x + 1 : x));
      const float weight = fmaxf(0.f, 1 - fabsf(left + j) * inverse_x);
      row_sum += weight * distinct(here, right, labels.at(lower + x));
      weight_x += weight;
      here = right;
    }
    const float weight = fmaxf(0.f, 1 - fabsf(top + i) * inverse_y);
    sum += weight * row_sum;
    weight_y += weight;
  }
  out[index] = sum / (weight_x * weight_y) + beta;
}

__global__ void __launch_bounds__(kThreads) factors_kernel(const BlurKernel kernel, float* __restrict__ factors) {
  const int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (k <= kernel.size / 2) kernel.write(k, factors);
}

// rows[pair] = edges convolved along x with v_pair.
__global__ void __launch_bounds__(kThreads) blur_x_kernel(
    const float* __restrict__ edges, const float* __restrict__ factors, int64_t size, float* __restrict__ rows, int64_t w,
    int64_t work) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= work) return;
  const int64_t x = index % w;
  const float *v1 = factors + size, *v2 = factors + 3 * size;
  float sum1 = 0, sum2 = 0;
  for (int64_t k = 0; k < size; ++k) {
    const int64_t shift = k - size / 2;
    if (x + shift < 0 || x + shift >= w) continue;
    const float edge = edges[index + shift];
    sum1 += v1[k] * edge;
    sum2 += v2[k] * edge;
  }
  rows[index] = sum1;
  rows[work + index] = sum2;
}

// out = the two maps of rows convolved along y with u1 and u2, added up, plus beta.
__global__ void __launch_bounds__(kThreads) blur_y_kernel(
    const float* __restrict__ rows, const float* __restrict__ factors, int64_t size, float* __restrict__ out, int64_t h,
    int64_t w, float beta, int64_t work) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= work) return;
  const int64_t y = index / w % h;
  const float *u1 = factors, *u2 = factors + 2 * size;
  float sum = 0;
  for (int64_t k = 0; k < size; ++k) {
    const int64_t shift = k - size / 2;
    if (y + shift < 0 || y + shift >= h) continue;
    sum += u1[k] * rows[index + shift * w] + u2[k] * rows[work + index + shift * w];
  }
  out[index] = sum + beta;
}

__global__ void __launch_bounds__(kThreads) normalise_kernel(
    float* __restrict__ edges, const float* __restrict__ by, bool mean, float beta, int64_t plane, int64_t work) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index < work) edges[index] = normalised(edges[index], by[index / plane], mean, beta);
}

// ---- softmax ------------------------------------------------------------------------------------

template <typename T>
struct Problem {
  LossShape s;
  View<const T> logits;
  Labels labels;
  const float* __restrict__ pixel_weight;
  const float* __restrict__ class_weight;
  bool smoothed;
  float keep, share;  // the loss is w (keep a_t l_t + share sum_c a_c l_c)
  double scale_y, scale_x, weight_scale_y, weight_scale_x;

  Problem(const LossInput& in, const char* op)
      : s(in.s),
        logits(in.logits),
        labels(in.labels, s.classes, in.ignore_index, op),
        pixel_weight(data_of<const float>(in.pixel_weight)),
        class_weight(data_of<const float>(in.class_weight)),
        smoothed(in.smoothed()),
        keep(float(1 - in.label_smoothing)),
        share(float(in.label_smoothing / double(s.classes))),
        scale_y(double(s.h) / double(s.height)),
        scale_x(double(s.w) / double(s.width)),
        weight_scale_y(double(s.weight_h) / double(s.height)),
        weight_scale_x(double(s.weight_w) / double(s.width)) {}

  __device__ float logit(int64_t image, int64_t c, int64_t y, int64_t x) const { return widen(*logits.at(image, c, y, x)); }
  __device__ float weight_of_class(int64_t c) const { return class_weight ? class_weight[c] : 1.f; }
  __device__ float weight_of_pixel(int64_t image, int64_t y, int64_t x) const {
    if (!pixel_weight) return 1;
    const float* map = pixel_weight + image * s.weight_h * s.weight_w;
    if (s.weight_h == s.height && s.weight_w == s.width) return map[y * s.width + x];
    const Source row = bilinear_source(y, s.weight_h, weight_scale_y), column = bilinear_source(x, s.weight_w, weight_scale_x);
    const float *upper = map + row.low * s.weight_w, *lower = map + row.high * s.weight_w;
    const float wx = float(column.weight), wy = float(row.weight);
    return (1 - wy) * ((1 - wx) * upper[column.low] + wx * upper[column.high]) +
           wy * ((1 - wx) * lower[column.low] + wx * lower[column.high]);
  }
};

template <typename T, bool resized>
__global__ void __launch_bounds__(kThreads) loss_kernel(
    const Problem<T> p, float* __restrict__ coefficients, float* __restrict__ loss, double* __restrict__ partial,
    int64_t work) {
  const LossShape& s = p.s;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  float sum = 0;
  int valid = 0;
  if (index < work) {
    const int64_t x = index % s.width, groups = ceil_div(s.height, kRows);
    const int64_t first = index / s.width % groups * kRows, image = index / s.width / groups;
    const int rows = int(s.height - first < kRows ? s.height - first : kRows);

    Source column{x, x, 0.0};
    if (resized) column = bilinear_source(x, s.w, p.scale_x);
    const float right = float(column.weight), left = 1 - right;
    int64_t low[kRows], high[kRows];
    float lower[kRows], max_logit[kRows], rest[kRows], at_target[kRows];
    float smooth[kRows];  // sum_c a_c (max_logit - z_c), so far
    int target[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t y = first + (r < rows ? r : rows - 1);  // rows beyond the map repeat the last, and are not written
      const Source row = resized ? bilinear_source(y, s.h, p.scale_y) : Source{y, y, 0.0};
      low[r] = row.low;
      high[r] = row.high;
      lower[r] = float(row.weight);
      target[r] = p.labels.at((image * s.height + y) * s.width + x);
      max_logit[r] = -FLT_MAX;
      at_target[r] = -INFINITY;  // for pixels that have no target
      rest[r] = smooth[r] = 0;
    }
    float class_weight_sum = 0;
    for (int64_t c = 0; c < s.classes; ++c) {
      const float weight = p.smoothed ? p.weight_of_class(c) : 0.f;
      float above = 0, below = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r == 0 || low[r] != low[r - 1]) {
          above = p.logit(image, c, low[r], column.low);
          if (resized) {
            above = left * above + right * p.logit(image, c, low[r], column.high);
            below = left * p.logit(image, c, high[r], column.low) + right * p.logit(image, c, high[r], column.high);
          }
        }
        const float z = resized ? (1 - lower[r]) * above + lower[r] * below : above;
        const float e = __expf(-fabsf(z - max_logit[r]));
        const float counted = target[r] == c ? 0.f : 1.f;
        rest[r] = z > max_logit[r] ? rest[r] * e + counted : rest[r] + counted * e;
        const float previous = max_logit[r];
        max_logit[r] = fmaxf(previous, z);
        if (target[r] == c) at_target[r] = z;
        if (p.smoothed) smooth[r] += weight * (max_logit[r] - z) + (c > 0 ? class_weight_sum * (max_logit[r] - previous) : 0.f);
      }
      class_weight_sum += weight;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) continue;
      const int64_t y = first + r, at = (image * s.height + y) * s.width + x;
      const float total = rest[r] + __expf(at_target[r] - max_logit[r]), log_total = logf(total);
      float value = 0, grad_scale = 0, target_grad = 0, smoothing = 0;
      if (target[r] == kWrong) {
        value = grad_scale = target_grad = smoothing = NAN;
      } else if (target[r] != kIgnored) {
        const float own = p.keep * p.weight_of_class(target[r]), smooth_weight = p.share * class_weight_sum;
        const float weight = p.weight_of_pixel(image, y, x);
        value = own * (log_total + (max_logit[r] - at_target[r]));
        if (p.smoothed) value += smooth_weight * log_total + p.share * smooth[r];
        value *= weight;
        grad_scale = weight * (own + smooth_weight) / total;
        target_grad = weight * ((smooth_weight * (total - rest[r]) - own * rest[r]) / total);
        smoothing = weight * p.share;
      }
      if (coefficients) {
        coefficients[at] = max_logit[r];
        coefficients[s.pixels() + at] = grad_scale;
        coefficients[2 * s.pixels() + at] = target_grad;
        if (p.smoothed) coefficients[3 * s.pixels() + at] = smoothing;
      }
      if (loss) loss[at] = value;
      sum += value;
      valid += target[r] != kIgnored;
    }
  }
  const double block_losses = block_sum(sum), block_valid = block_sum(valid);
  if (threadIdx.x == 0) {
    partial[2 * int64_t(blockIdx.x)] = block_losses;
    partial[2 * int64_t(blockIdx.x) + 1] = block_valid;
  }
}

// The sums of `count` pairs, by one block: the divisor, and the loss.
__global__ void __launch_bounds__(kThreads)
    total_kernel(const double* __restrict__ partial, int64_t count, bool mean, float* divisor, float* loss) {
  double losses = 0, valid = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    losses += partial[2 * i];
    valid += partial[2 * i + 1];
  }
  const double total_losses = block_sum(losses), total_valid = block_sum(valid);
  if (threadIdx.x == 0) {
    *divisor = mean ? fmaxf(float(total_valid), 1) : 1;
    *loss = float(total_losses) / *divisor;
  }
}

template <typename T>
struct Gradient {
  const float* __restrict__ grad;  // of each pixel's loss
  const float* __restrict__ coefficients;
  View<T> out;
};

// The coefficients of a label pixel, times the gradient that comes in.
struct Pixel {
  float max_logit, grad_scale, target_grad, smoothing;
  int label;

  // The gradient for the logit z of class c.
  __device__ float gradient(float z, int64_t c, float class_weight) const {
    return (label == c ? target_grad : grad_scale * __expf(z - max_logit)) - smoothing * class_weight;
  }
};

template <typename T, typename G>
__device__ inline Pixel read_pixel(const Problem<T>& p, const Gradient<G>& g, int64_t at) {
  Pixel pixel{0, 0, 0, 0, p.labels.at(at)};
  if (pixel.label == kIgnored) return pixel;  // what comes in there, NaN perhaps, goes nowhere
  const float grad = g.grad[at];
  const float *grad_scale = g.coefficients + p.s.pixels(), *target_grad = grad_scale + p.s.pixels();
  pixel.max_logit = g.coefficients[at];
  pixel.grad_scale = grad * grad_scale[at];
  pixel.target_grad = grad * target_grad[at];
  if (p.smoothed) pixel.smoothing = grad * target_grad[p.s.pixels() + at];
  return pixel;
}

// The gradient for logits of the labels' size: a thread per pixel.
template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads) grad_kernel(const Problem<T> p, const Gradient<Out> g, int64_t work) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= work) return;
  const LossShape& s = p.s;
  const int64_t x = index % s.width, y = index / s.width % s.height, image = index / s.width / s.height;
  const Pixel pixel = read_pixel(p, g, index);
  Out* out = g.out.at(image, 0, y, x);
  for (int64_t c = 0; c < s.classes; ++c) {
    const float z = p.logit(image, c, y, x);
    const float value = pixel.label == kIgnored ? 0.f : pixel.gradient(z, c, p.smoothed ? p.weight_of_class(c) : 0.f);
    narrow(value, out[c * g.out.channel]);
  }
}

// The first output of a bilinear resize whose `low` is at least j.
__device__ inline int64_t first_output(int64_t j, int64_t in, int64_t out, double in_over_out) {
  if (j <= 0) return 0;
  if (j >= in) return out;
  int64_t i = int64_t((double(j) + 0.5) / in_over_out - 0.5);
  i = i < 0 ? 0 : (i > out ? out : i);
  while (i > 0 && bilinear_source(i - 1, in, in_over_out).low >= j) --i;
  while (i < out && bilinear_source(i, in, in_over_out).low < j) ++i;
  return i;
}

// How much of output i of a bilinear resize comes from source j.
__device__ inline float share_of(int64_t j, const Source& source) {
  return (source.low == j ? 1 - float(source.weight) : 0.f) +
         (source.high == j && source.high != source.low ? float(source.weight) : 0.f);
}

// The gradient for resized logits: a block owns row k, `columns` columns and kClasses classes.
template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads)
    resized_grad_kernel(const Problem<T> p, const Gradient<Out> g, int columns, int64_t column_tiles, int64_t class_tiles) {
  __shared__ float sums[kClasses][kThreads];
  const LossShape& s = p.s;
  int64_t index = blockIdx.x;
  const int64_t first_column = index % column_tiles * columns;
  index /= column_tiles;
  const int64_t k = index % s.h;
  index /= s.h;
  const int64_t first_class = index % class_tiles * kClasses, image = index / class_tiles;

  const int64_t above = k > 0 ? k - 1 : 0, below = k + 1 < s.h ? k + 1 : k;
  const int64_t y_begin = first_output(k - 1, s.h, s.height, p.scale_y), y_end = first_output(k + 1, s.h, s.height, p.scale_y);
  const int64_t x_begin = first_output(first_column - 1, s.w, s.width, p.scale_x);
  const int64_t x_end = first_output(first_column + columns, s.w, s.width, p.scale_x);

  // The logit whose gradient this thread adds up in the end, and the label columns that reach it.
  const int own_class = threadIdx.x / columns;
  const int64_t own_column = first_column + threadIdx.x % columns;
  const bool owner = own_class < kClasses && own_column < s.w && first_class + own_class < s.classes;
  const int64_t own_begin = first_output(own_column - 1, s.w, s.width, p.scale_x);
  const int64_t own_end = first_output(own_column + 1, s.w, s.width, p.scale_x);
  double gradient = 0;

  for (int64_t start = x_begin; start < x_end; start += kThreads) {
    const int64_t x = start + threadIdx.x;
    float sum[kClasses] = {};
    if (x < x_end) {
      const Source column = bilinear_source(x, s.w, p.scale_x);
      const float right = float(column.weight), left = 1 - right;
      float upper[kClasses], middle[kClasses], lower[kClasses];
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        const int64_t c = first_class + i < s.classes ? first_class + i : s.classes - 1;  // what is too much is not delivered
        upper[i] = left * p.logit(image, c, above, column.low) + right * p.logit(image, c, above, column.high);
        middle[i] = left * p.logit(image, c, k, column.low) + right * p.logit(image, c, k, column.high);
        lower[i] = left * p.logit(image, c, below, column.low) + right * p.logit(image, c, below, column.high);
      }
      for (int64_t y = y_begin; y < y_end; ++y) {
        const Pixel pixel = read_pixel(p, g, (image * s.height + y) * s.width + x);
        if (pixel.label == kIgnored) continue;
        const Source row = bilinear_source(y, s.h, p.scale_y);
        const float down = float(row.weight), share = share_of(k, row);
        const bool own = row.low == k;
#pragma unroll
        for (int i = 0; i < kClasses; ++i) {
          const float z = (1 - down) * (own ? middle[i] : upper[i]) + down * (own ? lower[i] : middle[i]);
          const int64_t c = first_class + i;
          const float class_weight = p.smoothed && c < s.classes ? p.weight_of_class(c) : 0.f;
          sum[i] += share * pixel.gradient(z, c, class_weight);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kClasses; ++i) sums[i][threadIdx.x] = sum[i];
    __syncthreads();
    if (owner) {
      const int64_t begin = own_begin > start ? own_begin : start;
      const int64_t end = own_end < start + kThreads ? own_end : start + kThreads;
      for (int64_t i = begin; i < end; ++i)
        gradient += double(share_of(own_column, bilinear_source(i, s.w, p.scale_x)) * sums[own_class][i - start]);
    }
    __syncthreads();
  }
  if (owner) narrow(float(gradient), *g.out.at(image, first_class + own_class, k, own_column));
}

}  // namespace

bool count_edges(const Tensor& labels, const Tensor& out, int64_t classes, int64_t ignore_index, double beta) {
  const CurrentStream stream(out);
  const Labels values(labels, classes, ignore_index, "bal_edge");
  const int64_t work = out.numel();
  float* to = data_of<float>(out);
  launch(
      count_edges_kernel, blocks_for(work), kThreads, 0, stream, values, labels.size(1), labels.size(2), to, out.size(1),
      out.size(2), float(beta), work);
  return false;
}

void blur(const Tensor& edges, const BlurKernel& kernel, double beta, const Tensor& scratch) {
  const int64_t h = edges.size(1), w = edges.size(2), size = kernel.size, work = edges.numel();
  const CurrentStream stream(edges);
  float* map = data_of<float>(edges);
  float* along_x = data_of<float>(scratch);
  float* factors = along_x + 2 * work;
  launch(factors_kernel, blocks_for(size / 2 + 1), kThreads, 0, stream, kernel, factors);
  launch(blur_x_kernel, blocks_for(work), kThreads, 0, stream, map, factors, size, along_x, w, work);
  launch(blur_y_kernel, blocks_for(work), kThreads, 0, stream, along_x, factors, size, map, h, w, float(beta), work);
}

void normalise(const Tensor& edges, const Tensor& by, bool mean, double beta) {
  const CurrentStream stream(edges);
  const int64_t plane = edges.size(1) * edges.size(2), work = edges.numel();
  float* map = data_of<float>(edges);
  const float* divisors = data_of<const float>(by);
  launch(normalise_kernel, blocks_for(work), kThreads, 0, stream, map, divisors, mean, float(beta), plane, work);
}

namespace {

// loss is a map or one number.
void run_loss(
    const LossInput& in, bool mean, float* loss_map, float* loss, float* divisor, const std::optional<Tensor>& coefficients) {
  const LossShape& s = in.s;
  const CurrentStream stream(in.logits);
  const int64_t work = s.images * ceil_div(s.height, kRows) * s.width;
  const unsigned blocks = blocks_for(work);
  const Tensor partial = empty({2 * int64_t(blocks)}, ScalarType::Double, in.logits);
  double* pairs = data_of<double>(partial);
  float* maps = data_of<float>(coefficients);
  dispatch_cuda(in.logits, "bal_cross_entropy", [&](auto type) {
    using T = decltype(type);
    const Problem<T> p(in, "bal_cross_entropy");
    const auto kernel = s.resized() ? &loss_kernel<T, true> : &loss_kernel<T, false>;
    launch(kernel, blocks, kThreads, 0, stream, p, maps, loss_map, pairs, work);
  });
  if (loss) launch(total_kernel, 1, kThreads, 0, stream, pairs, int64_t(blocks), mean, divisor, loss);
}

template <typename Out>
void run_grad(const LossInput& in, const float* grad, const float* maps, const View<Out>& out) {
  const LossShape& s = in.s;
  const CurrentStream stream(in.logits);
  dispatch_cuda(in.logits, "bal_cross_entropy_map_grad", [&](auto type) {
    using T = decltype(type);
    const Problem<T> p(in, "bal_cross_entropy_map_grad");
    const Gradient<Out> g{grad, maps, out};
    if (s.resized()) {
      // As many columns as there are threads for the label columns that they reach, and for their
      // logits in all the classes.
      const int64_t reached = kThreads * s.w / s.width - 1;
      const int columns = int(std::max<int64_t>(1, std::min<int64_t>(reached, kThreads / kClasses)));
      const int64_t column_tiles = ceil_div(s.w, columns), class_tiles = ceil_div(s.classes, kClasses);
      const unsigned blocks = blocks_for(s.images * class_tiles * s.h * column_tiles * kThreads);
      launch(resized_grad_kernel<T, Out>, blocks, kThreads, 0, stream, p, g, columns, column_tiles, class_tiles);
    } else {
      const int64_t work = in.labels.numel();
      launch(grad_kernel<T, Out>, blocks_for(work), kThreads, 0, stream, p, g, work);
    }
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads) scale_kernel(
    const float* __restrict__ gradient, const float* __restrict__ grad, const float* __restrict__ divisor, T* __restrict__ out,
    int64_t work) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index < work) narrow(gradient[index] * (*grad / *divisor), out[index]);
}

}  // namespace

bool loss_map(const LossInput& in, const Tensor& loss, const std::optional<Tensor>& coefficients) {
  run_loss(in, false, data_of<float>(loss), nullptr, nullptr, coefficients);
  return false;
}

void map_grad(const LossInput& in, const Tensor& grad, const Tensor& coefficients, const Tensor& out) {
  dispatch_cuda(out, "bal_cross_entropy_map_grad", [&](auto type) {
    run_grad(in, data_of<const float>(grad), data_of<const float>(coefficients), View<decltype(type)>(out));
  });
}

bool loss_sum(
    const LossInput& in, bool mean, const Tensor& loss, const Tensor& divisor, const std::optional<Tensor>& gradient) {
  std::optional<Tensor> coefficients;
  if (gradient) coefficients = empty({in.maps(), in.s.images, in.s.height, in.s.width}, ScalarType::Float, loss);
  run_loss(in, mean, nullptr, data_of<float>(loss), data_of<float>(divisor), coefficients);
  if (gradient) {
    Tensor one = empty(sizes_of(in.labels), ScalarType::Float, loss);
    torch::stable::fill_(one, 1);
    run_grad(in, data_of<const float>(one), data_of<const float>(*coefficients), View<float>(*gradient));
  }
  return false;
}

void scale(const Tensor& gradient, const Tensor& grad, const Tensor& divisor, const Tensor& out) {
  const CurrentStream stream(out);
  const int64_t work = out.numel();
  dispatch_cuda(out, "bal_cross_entropy_grad", [&](auto type) {
    launch(
        scale_kernel<decltype(type)>, blocks_for(work), kThreads, 0, stream, data_of<const float>(gradient),
        data_of<const float>(grad), data_of<const float>(divisor), data_of<decltype(type)>(out), work);
  });
}

}  // namespace segops::bal
