// map_grad on the CPU: the gradient from the coefficients of pixels.

#include "gradient_cpu.h"

namespace segops::bal {
namespace {

constexpr int64_t kRows = 8;  // label rows that a gradient is summed over before it goes to memory

template <typename T>
struct GradInput {
  const T* grad;
  int64_t grad_stride;  // 0 for one number
  const T* coefficients;
};

// The coefficients of label rows, times the gradient that comes in.
template <typename T>
struct Coefficients {
  std::vector<T> max_logit, grad_scale, target_grad, smoothing;
  std::vector<Integer<T>> classes;

  Coefficients(const Problem<T>& p, int64_t rows)
      : max_logit(rows * p.padded()),
        grad_scale(max_logit),
        target_grad(max_logit),
        smoothing(max_logit),
        classes(max_logit.size(), kIgnored) {}

  // Those of label row y go to [at, at + width).
  SEGOPS_INLINE void read(const Problem<T>& p, const GradInput<T>& in, int64_t image, int64_t y, int64_t at) {
    const int64_t row = (image * p.s.height + y) * p.s.width;
    read_classes(p.labels, row, p.s.width, &classes[at]);
    const T *from = in.coefficients + row, *grad = in.grad + row * in.grad_stride;
    std::copy(from, from + p.s.width, &max_logit[at]);
    // Not a product with 0 where ignored: what comes in there, NaN perhaps, goes nowhere.
    const auto scale = [&](const T* map, T* __restrict out) __attribute__((always_inline)) {
      for (int64_t x = 0; x < p.s.width; ++x) out[x] = classes[at + x] == kIgnored ? T(0) : grad[x * in.grad_stride] * map[x];
    };
    scale(from + p.s.pixels(), &grad_scale[at]);
    scale(from + 2 * p.s.pixels(), &target_grad[at]);
    if (p.smoothed) scale(from + 3 * p.s.pixels(), &smoothing[at]);
  }

  // The gradient for the logits z of class c at pixels at .. at + lanes.
  template <int lanes>
  SEGOPS_INLINE auto gradient(const Problem<T>& p, bool smoothed, typename Vec<T, lanes>::type z, int64_t c, int64_t at) const {
    using V = Vec<T, lanes>;
    const auto target_class = Vec<Integer<T>, lanes>::load(&classes[at]);
    auto result = V::load(&grad_scale[at]) * exp(z - V::load(&max_logit[at]), T{});
    result = target_class == Integer<T>(c) ? V::load(&target_grad[at]) : result;
    if (smoothed) result -= V::load(&smoothing[at]) * (p.class_weight ? p.class_weight[c] : T(1));
    return result;
  }
};

// The rows of the logits' gradient in one strip.
template <typename T, int bytes>
SEGOPS_INLINE void grad_strip(const Problem<T>& p, const GradInput<T>& in, int64_t item, Gradient<T>& gradient) {
  constexpr int lanes = kLanes<T, bytes>;
  using V = Vec<T, lanes>;
  const LossShape& s = p.s;
  const int64_t image = item / p.strips(), begin = item % p.strips() * p.strip, end = std::min(begin + p.strip, s.h);
  const int64_t padded = p.padded();
  Reader<T> reader(p, image);
  const bool smoothed = p.smoothed;

  if (!s.resized()) {
    Coefficients<T> coefficients(p, 1);
    std::vector<T> block(s.classes * kBlock<T>);
    for (int64_t y = begin; y < end; ++y) {
      coefficients.read(p, in, image, y, 0);
      const auto softmax = [&](auto vectors, int64_t x) __attribute__((always_inline)) {
        constexpr int pixels = vectors * lanes;
        reader.template read<lanes, vectors>(y, x, block.data());
        for (int64_t c = 0; c < s.classes; ++c) {
          T* z = &block[c * pixels];
#pragma GCC unroll 4
          for (int v = 0; v < pixels; v += lanes)
            V::store(z + v, coefficients.template gradient<lanes>(p, smoothed, V::load(z + v), c, x + v));
        }
        gradient.template store<pixels>(p, image, y, x, block.data());
      };
      int64_t x = 0;
      for (; x + 4 * lanes <= s.width; x += 4 * lanes) softmax(constant<4>, x);
      for (; x < s.width; x += lanes) softmax(constant<1>, x);
    }
    return;
  }

  Coefficients<T> coefficients(p, kRows);
  RowSums<T> sums(p, &gradient, item);
  for (int64_t k = begin; k < end; ++k) {
    for (int64_t from = p.rows.first[k]; from < p.rows.first[k + 1]; from += kRows) {
      const int64_t rows = std::min(kRows, p.rows.first[k + 1] - from);
      reader.seek(k);
      for (int64_t r = 0; r < rows; ++r) coefficients.read(p, in, image, from + r, r * padded);
      const T* high = &p.rows.weight[from];
      for (int64_t x = 0; x < s.width; x += 2 * lanes) {
        for (int64_t c = 0; c < s.classes; ++c) {
          const int64_t at = c * padded + x;
          const T *upper = reader.expanded(0) + at, *lower = reader.expanded(1) + at;
          typename V::type sum[2], next_sum[2];
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) sum[v] = next_sum[v] = typename V::type{};
          for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
              const int64_t i = v * lanes;
              const auto z = V::load(upper + i) * (1 - high[r]) + V::load(lower + i) * high[r];
              const auto grad = coefficients.template gradient<lanes>(p, smoothed, z, c, r * padded + x + i);
              sum[v] += (1 - high[r]) * grad;
              next_sum[v] += high[r] * grad;
            }
          }
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) sums.add(at + v * lanes, sum[v], next_sum[v]);
        }
      }
    }
    sums.template finish<lanes>(k);
  }
  sums.template finish_strip<lanes>();
}

#define SEGOPS_GRAD_STRIP(target, bytes, T)                                                                        \
  target void write_grad_strip(const Problem<T>& p, const GradInput<T>& in, int64_t item, Gradient<T>& gradient) { \
    grad_strip<T, bytes>(p, in, item, gradient);                                                                   \
  }
#define SEGOPS_GRAD_STRIP_OF_ALL(target, bytes) SEGOPS_GRAD_STRIP(target, bytes, float) SEGOPS_GRAD_STRIP(target, bytes, double)
SEGOPS_WIDTHS(SEGOPS_GRAD_STRIP_OF_ALL)
#undef SEGOPS_GRAD_STRIP_OF_ALL
#undef SEGOPS_GRAD_STRIP

}  // namespace

void map_grad(const LossInput& in, const Tensor& grad, const Tensor& divisor, const Tensor& coefficients, const Tensor& out) {
  dispatch<float, double>(in.logits, "bal_cross_entropy_map_grad", [&](auto type) {
    using T = decltype(type);
    const Problem<T> p(in, "bal_cross_entropy_map_grad");
    const T *grads = data_of<const T>(grad), *maps = data_of<const T>(coefficients);
    const bool per_pixel = grad.dim() > 0;
    const T whole = per_pixel ? T(0) : *grads / *data_of<const T>(divisor);
    const GradInput<T> from{per_pixel ? grads : &whole, per_pixel, maps};
    Gradient<T> gradient(p, out);
    parallel_for(0, p.items(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) write_grad_strip(p, from, item, gradient);
    });
    gradient.join(p);
  });
}

}  // namespace segops::bal
