// map_grad on the CPU: for logits that are resized, the gradient for the resized logits
// (softmax_cpu.h) is summed over label rows, along y, before it is resized back along x. Strips add
// to a row of logits that they share one after the other, at the end.

#include "softmax_cpu.h"

namespace segops::bal {
namespace {

constexpr int64_t kRows = 8;  // label rows that a gradient is summed over before it goes to memory

template <typename T>
struct GradOutput {
  const T* grad;
  const T* coefficients;
  View<T> out;
  T* shared;  // (items, classes, w): what a strip adds to the first row of the next
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
  SEGOPS_INLINE void read(const Problem<T>& p, const GradOutput<T>& g, int64_t image, int64_t y, int64_t at) {
    const int64_t row = (image * p.s.height + y) * p.s.width;
    read_classes(p.labels, row, p.s.width, &classes[at]);
    const T *from = g.coefficients + row, *grad = g.grad + row;
    std::copy(from, from + p.s.width, &max_logit[at]);
    // Not a product with 0 where ignored: what comes in there, NaN perhaps, goes nowhere.
    const auto scale = [&](const T* map, T* __restrict out) __attribute__((always_inline)) {
      for (int64_t x = 0; x < p.s.width; ++x) out[x] = classes[at + x] == kIgnored ? T(0) : grad[x] * map[x];
    };
    scale(from + p.s.pixels(), &grad_scale[at]);
    scale(from + 2 * p.s.pixels(), &target_grad[at]);
    if (p.smoothed) scale(from + 3 * p.s.pixels(), &smoothing[at]);
  }

  // The gradient for the logits z of class c at pixels at .. at + kLanes.
  SEGOPS_INLINE auto gradient(
      const Problem<T>& p, bool smoothed, typename Vec<T, kLanes<T>>::type z, int64_t c, int64_t at) const {
    using V = Vec<T, kLanes<T>>;
    const auto target_class = Vec<Integer<T>, kLanes<T>>::load(&classes[at]);
    auto result = V::load(&grad_scale[at]) * exp(z - V::load(&max_logit[at]), T{});
    result = target_class == Integer<T>(c) ? V::load(&target_grad[at]) : result;
    if (smoothed) result -= V::load(&smoothing[at]) * (p.class_weight ? p.class_weight[c] : T(1));
    return result;
  }
};

// How the outputs of a resize along x add up to its sources: for source j, windows of the outputs
// that have it for their `high`, from first[j - 1], and for their `low`, from first[j], with what
// they weigh; 0 beyond.
template <typename T>
struct Windows {
  int64_t size = 0;  // of a window, whole vectors
  std::vector<T> high, low;

  explicit Windows(const ResizeAxis<T>& axis) {
    const int64_t sources = int64_t(axis.first.size()) - 1;
    for (int64_t j = 0; j < sources; ++j) size = std::max(size, round_up(axis.first[j + 1] - axis.first[j], kLanes<T>));
    high.resize(sources * size);
    low.resize(sources * size);
    for (int64_t j = 0; j < sources; ++j) {
      for (int64_t x = axis.first[j]; x < axis.first[j + 1]; ++x) {
        low[j * size + x - axis.first[j]] = 1 - axis.weight[x];
        if (j + 1 < sources) high[(j + 1) * size + x - axis.first[j]] = axis.weight[x];
      }
    }
  }
};

// A row of the logits' gradient from `sums` (classes, padded), the gradient for the resized row.
template <typename T>
SEGOPS_INLINE void resize_back(
    const Problem<T>& p, const Windows<T>& windows, const T* sums, T* out, int64_t class_stride, int64_t stride) {
  using V = Vec<T, kLanes<T>>;
  const int64_t* first = p.columns.first.data();
  for (int64_t c = 0; c < p.s.classes; ++c, sums += p.padded()) {
    for (int64_t j = 0; j < p.s.w; ++j) {
      typename V::type sum{};
      const auto add = [&](const T* from, const T* weights) __attribute__((always_inline)) {
        for (int64_t x = 0; x < windows.size; x += kLanes<T>) {
          const auto weight = V::load(weights + x), part = V::load(from + x) * weight;
          sum += weight != 0 ? part : typename V::type{};  // what is beyond may be NaN
        }
      };
      if (j > 0) add(sums + first[j - 1], &windows.high[j * windows.size]);
      add(sums + first[j], &windows.low[j * windows.size]);
      out[c * class_stride + j * stride] = sum_lanes<T, kLanes<T>>(sum);
    }
  }
}

// The rows of the logits' gradient in one strip.
template <typename T>
SEGOPS_INLINE void grad_strip(const Problem<T>& p, const Windows<T>& windows, int64_t item, const GradOutput<T>& g) {
  using V = Vec<T, kLanes<T>>;
  const LossShape& s = p.s;
  const int64_t image = item / p.strips(), begin = item % p.strips() * p.strip, end = std::min(begin + p.strip, s.h);
  const int64_t padded = p.padded();
  Reader<T> reader(p, image);
  T* out = g.out.at(image, 0, 0, 0);
  const bool smoothed = p.smoothed;

  if (!s.resized()) {
    Coefficients<T> coefficients(p, 1);
    std::vector<T> block(s.classes * kBlock<T>);
    for (int64_t y = begin; y < end; ++y) {
      coefficients.read(p, g, image, y, 0);
      const auto softmax = [&](auto vectors, int64_t x) __attribute__((always_inline)) {
        constexpr int pixels = vectors * kLanes<T>;
        reader.template read<pixels>(y, x, block.data());
        const int64_t count = std::min<int64_t>(pixels, s.width - x);
        for (int64_t c = 0; c < s.classes; ++c) {
          T* z = &block[c * pixels];
#pragma GCC unroll 4
          for (int v = 0; v < pixels; v += kLanes<T>)
            V::store(z + v, coefficients.gradient(p, smoothed, V::load(z + v), c, x + v));
          T* to = out + c * g.out.channel + y * g.out.row + x * g.out.pixel;
          if (g.out.pixel == 1 && count == pixels)
            std::memcpy(to, z, pixels * sizeof(T));
          else
            for (int64_t i = 0; i < count; ++i) to[i * g.out.pixel] = z[i];
        }
      };
      int64_t x = 0;
      for (; x + kBlock<T> <= s.width; x += kBlock<T>) softmax(constant<4>, x);
      for (; x < s.width; x += kLanes<T>) softmax(constant<1>, x);
    }
    return;
  }

  Coefficients<T> coefficients(p, kRows);
  std::vector<T> sums(s.classes * padded + windows.size, T(0)), next_sums(sums);  // for rows k and k + 1, resized along x
  for (int64_t k = begin; k < end; ++k) {
    for (int64_t from = p.rows.first[k]; from < p.rows.first[k + 1]; from += kRows) {
      const int64_t rows = std::min(kRows, p.rows.first[k + 1] - from);
      reader.seek(k);
      for (int64_t r = 0; r < rows; ++r) coefficients.read(p, g, image, from + r, r * padded);
      const T* high = &p.rows.weight[from];
      for (int64_t x = 0; x < s.width; x += 2 * kLanes<T>) {
        for (int64_t c = 0; c < s.classes; ++c) {
          const int64_t at = c * padded + x;
          const T *upper = reader.expanded(0) + at, *lower = reader.expanded(1) + at;
          typename V::type sum[2], next_sum[2];
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) sum[v] = next_sum[v] = typename V::type{};
          for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
              const int64_t i = v * kLanes<T>;
              const auto z = V::load(upper + i) * (1 - high[r]) + V::load(lower + i) * high[r];
              const auto gradient = coefficients.gradient(p, smoothed, z, c, r * padded + x + i);
              sum[v] += (1 - high[r]) * gradient;
              next_sum[v] += high[r] * gradient;
            }
          }
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            T *to = &sums[at + v * kLanes<T>], *next = &next_sums[at + v * kLanes<T>];
            V::store(to, V::load(to) + sum[v]);
            V::store(next, V::load(next) + next_sum[v]);
          }
        }
      }
    }
    resize_back(p, windows, sums.data(), out + k * g.out.row, g.out.channel, g.out.pixel);
    std::swap(sums, next_sums);
    std::fill(next_sums.begin(), next_sums.end(), T(0));
  }
  resize_back(p, windows, sums.data(), g.shared + item * s.classes * s.w, s.w, 1);
}

#define SEGOPS_GRAD_STRIP(T)                                                                  \
  SEGOPS_MULTIVERSION void grad_strip_multiversion(                                           \
      const Problem<T>& p, const Windows<T>& windows, int64_t item, const GradOutput<T>& g) { \
    grad_strip(p, windows, item, g);                                                          \
  }
SEGOPS_GRAD_STRIP(float)
SEGOPS_GRAD_STRIP(double)
#undef SEGOPS_GRAD_STRIP

}  // namespace

void map_grad(const LossInput& in, const Tensor& grad, const Tensor& coefficients, const Tensor& out) {
  const LossShape& s = in.s;
  dispatch<float, double>(in.logits, "bal_cross_entropy_map_grad", [&](auto type) {
    using T = decltype(type);
    const Problem<T> p(in, "bal_cross_entropy_map_grad");
    const Windows<T> windows(p.columns);
    const int64_t items = s.images * p.strips();
    std::vector<T> shared(s.resized() ? items * s.classes * s.w : 0);
    const GradOutput<T> g{data_of<const T>(grad), data_of<const T>(coefficients), View<T>(out), shared.data()};
    torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) grad_strip_multiversion(p, windows, item, g);
    });
    if (!s.resized()) return;
    for (int64_t item = 0; item < items; ++item) {
      const int64_t row = (item % p.strips() + 1) * p.strip;
      if (row >= s.h) continue;
      T* to = g.out.at(item / p.strips(), 0, row, 0);
      const T* from = g.shared + item * s.classes * s.w;
      for (int64_t c = 0; c < s.classes; ++c)
        for (int64_t x = 0; x < s.w; ++x) to[c * g.out.channel + x * g.out.pixel] += from[c * s.w + x];
    }
  });
}

}  // namespace segops::bal
