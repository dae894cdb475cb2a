// loss_map and loss_sum on the CPU: the rows of labels one by one, each in blocks of pixels
// (softmax_cpu.h).

#include "gradient_cpu.h"

namespace segops::bal {
namespace {

// The pixels' weights along label row y; `row` is room for a row of them before they are resized
// along x. It is __restrict, or GCC adds a loop for the case of an overlap, which also runs where
// memory is merely close, and rounds differently.
template <typename T>
SEGOPS_INLINE void read_weights(const Problem<T>& p, int64_t image, int64_t y, T* __restrict row, T* out) {
  if (!p.pixel_weight) {
    std::fill(out, out + p.s.width, T(1));
    return;
  }
  const T* map = p.pixel_weight + image * p.s.weight_h * p.s.weight_w;
  const T *top = map + p.weight_rows.low[y] * p.s.weight_w, *bottom = map + p.weight_rows.high[y] * p.s.weight_w;
  if (p.s.weight_w == p.s.width && p.s.weight_h == p.s.height) {
    std::copy(top, top + p.s.width, out);
    return;
  }
  const T lower = p.weight_rows.weight[y], upper = 1 - lower;
  for (int64_t x = 0; x < p.s.weight_w; ++x) row[x] = upper * top[x] + lower * bottom[x];
  resize_row(row, p.weight_columns, p.s.width, out);
}

template <typename T>
struct LossOutput {
  T* coefficients;        // or null
  T* loss;                // or null
  Gradient<T>* gradient;  // or null
  double* totals;         // per label row: sum of losses, pixels not ignored
};

// The label rows of one strip.
template <typename T, int bytes>
SEGOPS_INLINE void loss_strip(const Problem<T>& p, int64_t item, const LossOutput<T>& out) {
  constexpr int lanes = kLanes<T, bytes>;
  using V = Vec<T, lanes>;
  using I = Vec<Integer<T>, lanes>;
  const LossShape& s = p.s;
  const int64_t image = item / p.strips(), begin = item % p.strips() * p.strip, end = std::min(begin + p.strip, s.h);
  const int64_t padded = p.padded();
  Reader<T> reader(p, image);
  std::vector<T> block(s.classes * kBlock<T>), weights(padded), weight_row(s.weight_w + kWindow<T>),
      target_weights(padded, T(1));
  std::vector<Integer<T>> targets(padded, kIgnored);
  const bool smoothed = p.smoothed, summed = out.gradient && s.resized();
  RowSums<T> sums(p, out.gradient, item);

  for (int64_t k = begin; k < end; ++k) {
    for (int64_t y = p.rows.first[k]; y < p.rows.first[k + 1]; ++y) {
      reader.seek(k);
      const int64_t row = (image * s.height + y) * s.width;
      read_classes(p.labels, row, s.width, targets.data());
      read_weights(p, image, y, weight_row.data(), weights.data());
      if (p.class_weight)
        for (int64_t x = 0; x < s.width; ++x) target_weights[x] = targets[x] < 0 ? T(0) : p.class_weight[targets[x]];

      typename V::type sum{};
      typename I::type ignored{};
      const auto softmax = [&](auto vector_count, int64_t x) __attribute__((always_inline)) {
        constexpr int vectors = vector_count, pixels = vectors * lanes;
        reader.template read<lanes, vectors>(y, x, block.data());
        typename V::type max_logit[vectors], rest[vectors], at_target[vectors], smooth[vectors];
        typename I::type target[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          max_logit[v] = V::load(&block[v * lanes]);
          rest[v] = smooth[v] = typename V::type{};
          at_target[v] = rest[v] - std::numeric_limits<T>::infinity();  // for pixels that have no target
          target[v] = I::load(&targets[x + v * lanes]);
        }
        for (int64_t c = 1; c < s.classes; ++c) {
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            const auto z = V::load(&block[c * pixels + v * lanes]);
            max_logit[v] = z > max_logit[v] ? z : max_logit[v];
          }
        }
        if (smoothed)
          for (int64_t c = 0; c < s.classes; ++c) {
            const T weight = p.class_weight ? p.class_weight[c] : T(1);
            for (int v = 0; v < vectors; ++v) smooth[v] += weight * (max_logit[v] - V::load(&block[c * pixels + v * lanes]));
          }
        // The exponentials take the place of the logits, for the gradient.
        for (int64_t c = 0; c < s.classes; ++c) {
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            T* place = &block[c * pixels + v * lanes];
            const auto z = V::load(place);
            const auto e = exp(z - max_logit[v], T{});
            rest[v] = target[v] == Integer<T>(c) ? rest[v] : rest[v] + e;
            at_target[v] = target[v] == Integer<T>(c) ? z : at_target[v];
            if (out.gradient) V::store(place, e);
          }
        }
        T results[5][pixels];  // loss, then the coefficients
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          const int64_t at = x + v * lanes;
          const auto total = rest[v] + exp(at_target[v] - max_logit[v], T{});
          const auto log_total = log(total, T{});
          const auto weight = V::load(&weights[at]), own = p.keep * V::load(&target_weights[at]);
          const T smooth_weight = p.share * p.class_weight_sum;
          auto loss = own * (log_total + (max_logit[v] - at_target[v]));
          if (smoothed) loss += smooth_weight * log_total + p.share * smooth[v];
          const typename V::type zero{}, nan = zero + std::numeric_limits<T>::quiet_NaN();
          const typename V::type values[] = {
              weight * loss, weight * (own + smooth_weight) / total,
              weight * ((smooth_weight * (total - rest[v]) - own * rest[v]) / total), zero + weight * p.share};
          V::store(results[1] + v * lanes, max_logit[v]);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            auto value = target[v] == Integer<T>(kIgnored) ? zero : values[i];
            value = target[v] == Integer<T>(kWrong) ? nan : value;
            V::store(results[i == 0 ? 0 : i + 1] + v * lanes, value);
          }
          sum += V::load(results[0] + v * lanes);
          ignored -= target[v] == Integer<T>(kIgnored);  // a true lane is -1
        }
        const int64_t count = std::min<int64_t>(pixels, s.width - x);
        if (out.loss) std::memcpy(out.loss + row + x, results[0], count * sizeof(T));
        const int maps = out.coefficients ? smoothed ? 4 : 3 : 0;
        for (int map = 0; map < maps; ++map)
          std::memcpy(out.coefficients + map * s.pixels() + row + x, results[map + 1], count * sizeof(T));
        if (!out.gradient) return;

        const T low = 1 - p.rows.weight[y], high = p.rows.weight[y];
        for (int64_t c = 0; c < s.classes; ++c) {
          const T class_weight = p.class_weight ? p.class_weight[c] : T(1);
#pragma GCC unroll 4
          for (int v = 0; v < vectors; ++v) {
            T* place = &block[c * pixels + v * lanes];
            auto gradient = V::load(results[2] + v * lanes) * V::load(place);
            gradient = target[v] == Integer<T>(c) ? V::load(results[3] + v * lanes) : gradient;
            if (smoothed) gradient -= V::load(results[4] + v * lanes) * class_weight;
            if (summed)
              sums.add(c * padded + x + v * lanes, low * gradient, high * gradient);
            else
              V::store(place, gradient);
          }
        }
        if (!summed) out.gradient->template store<pixels>(p, image, y, x, block.data());
      };
      int64_t x = 0;
      for (; x + 4 * lanes <= s.width; x += 4 * lanes) softmax(constant<4>, x);
      for (; x < s.width; x += lanes) softmax(constant<1>, x);
      double losses = 0;
      int64_t valid = x;  // lanes: those beyond the row are ignored
      for (int i = 0; i < lanes; ++i) {
        losses += double(sum[i]);
        valid -= ignored[i];
      }
      out.totals[2 * (image * s.height + y)] = losses;
      out.totals[2 * (image * s.height + y) + 1] = double(valid);
    }
    if (summed) sums.template finish<lanes>(k);
  }
  if (summed) sums.template finish_strip<lanes>();
}

#define SEGOPS_LOSS_STRIP(target, bytes, T)                                                   \
  target void write_loss_strip(const Problem<T>& p, int64_t item, const LossOutput<T>& out) { \
    loss_strip<T, bytes>(p, item, out);                                                       \
  }
#define SEGOPS_LOSS_STRIP_OF_ALL(target, bytes) SEGOPS_LOSS_STRIP(target, bytes, float) SEGOPS_LOSS_STRIP(target, bytes, double)
SEGOPS_WIDTHS(SEGOPS_LOSS_STRIP_OF_ALL)
#undef SEGOPS_LOSS_STRIP_OF_ALL
#undef SEGOPS_LOSS_STRIP

// Calls deliver(sum of the losses, number of pixels not ignored), in the dtype that is computed in.
// Returns whether a label was wrong.
template <typename Deliver>
bool run(
    const LossInput& in, const std::optional<Tensor>& loss, const std::optional<Tensor>& coefficients,
    const std::optional<Tensor>& grad, const Deliver& deliver) {
  bool wrong = false;
  dispatch<float, double>(in.logits, "bal_cross_entropy", [&](auto type) {
    using T = decltype(type);
    std::vector<double> row_totals(2 * in.s.images * in.s.height);
    const Problem<T> p(in, "bal_cross_entropy");
    std::optional<Gradient<T>> gradient;
    if (grad) gradient.emplace(p, *grad);
    const LossOutput<T> out{data_of<T>(coefficients), data_of<T>(loss), gradient ? &*gradient : nullptr, row_totals.data()};
    parallel_for(0, p.items(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) write_loss_strip(p, item, out);
    });
    if (gradient) gradient->join(p);
    double totals[2] = {};
    for (size_t i = 0; i < row_totals.size(); ++i) totals[i % 2] += row_totals[i];
    wrong = totals[0] != totals[0];
    deliver(T(totals[0]), T(totals[1]));
  });
  return wrong;
}

}  // namespace

bool loss_map(const LossInput& in, const Tensor& loss, const std::optional<Tensor>& coefficients) {
  return run(in, loss, coefficients, std::nullopt, [](auto, auto) {});
}

bool loss_sum(
    const LossInput& in, bool mean, const Tensor& loss, const Tensor& divisor, const std::optional<Tensor>& coefficients,
    const std::optional<Tensor>& gradient) {
  return run(in, std::nullopt, coefficients, gradient, [&](auto sum, auto valid) {
    using T = decltype(sum);
    const T by = mean ? std::max(valid, T(1)) : T(1);
    *data_of<T>(divisor) = by;
    *data_of<T>(loss) = sum / by;
  });
}

void scale(const Tensor& gradient, const Tensor& grad, const Tensor& divisor, const Tensor& out) {
  dispatch<float, double>(gradient, "bal_cross_entropy_grad", [&](auto computed) {
    using T = decltype(computed);
    const T factor = *data_of<const T>(grad) / *data_of<const T>(divisor);
    const T* from = data_of<const T>(gradient);
    const auto write = [&](auto stored) {
      using S = decltype(stored);
      S* to = data_of<S>(out);
      parallel_for(0, out.numel(), 1 << 15, [&](int64_t i, int64_t end) {
        constexpr int lanes = kLanes<T>;
        const auto scale = [&](const T* a, S* b) { Vec<S, lanes>::store(b, Vec<T, lanes>::load(a) * factor); };
        for (; i + lanes <= end; i += lanes) scale(from + i, to + i);
        T rest[lanes] = {};
        S scaled[lanes];
        std::copy(from + i, from + end, rest);
        scale(rest, scaled);
        std::copy(scaled, scaled + (end - i), to + i);
      });
    };
    if constexpr (std::is_same_v<T, double>)
      write(T{});
    else
      dispatch<float, bf16, fp16>(out, "bal_cross_entropy_grad", write);
  });
}

}  // namespace segops::bal
