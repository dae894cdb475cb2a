// The kernels of the boundary-aware loss on the CPU (bal.h says what they compute).
//
// Logits are resized in two steps: along x once per row of logits, along y per row of labels, as it is needed. The softmax then
// runs over blocks of pixels, a class at a time, so that its exponentials are vectors of pixels. Work is cut into strips of
// logit rows by sizes alone: results do not depend on the number of threads.

#include "../common/vec.h"
#include "bal.h"

#include <algorithm>
#include <limits>

namespace segops {
namespace {

template <typename T>
constexpr int kLanes = 64 / sizeof(T);
template <typename T>
constexpr int kBlock = 4 * kLanes<T>;  // pixels of a softmax, but for the last of a row
constexpr int64_t kRows = 8;           // label rows that a gradient is summed over before it goes to memory

template <int n>
constexpr std::integral_constant<int, n> vectors_of;

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Calls fn with a pointer of the labels' type.
template <typename F>
void dispatch_labels(const Tensor& labels, const char* op, const F& fn) {
  switch (labels.scalar_type()) {
    case ScalarType::Long:
      return fn(static_cast<const int64_t*>(labels.const_data_ptr()));
    case ScalarType::Int:
      return fn(static_cast<const int32_t*>(labels.const_data_ptr()));
    case ScalarType::Byte:
      return fn(static_cast<const uint8_t*>(labels.const_data_ptr()));
    default:
      STD_TORCH_CHECK(false, op, ": labels must be int64, int32 or uint8");
  }
}

template <typename Label, typename Int>
SEGOPS_INLINE void read_classes(const Label* labels, int64_t count, int64_t classes, int64_t ignore_index, Int* out) {
  for (int64_t x = 0; x < count; ++x) out[x] = class_of(labels[x], classes, ignore_index);
}

// ---- edges ----------------------------------------------------------------------------------------------------------

// out[x] = distinct classes among a row's pixel x, its right neighbour and its lower one; 0 where they agree.
SEGOPS_INLINE void count_row(const int32_t* row, const int32_t* lower, int64_t width, float* out) {
  const auto count = [](int32_t a, int32_t b, int32_t c) __attribute__((always_inline)) {
    const int32_t distinct = (a >= 0) + ((b >= 0) & (b != a)) + ((c >= 0) & (c != a) & (c != b));
    return (a == b) & (a == c) ? 0.f : float(distinct);
  };
  for (int64_t x = 0; x + 1 < width; ++x) out[x] = count(row[x], row[x + 1], lower[x]);
  out[width - 1] = count(row[width - 1], row[width - 1], lower[width - 1]);
}

// One axis of an antialiased resize: output i is the sum of weight[offset[i] + k] * in[first[i] + k].
struct Taps {
  std::vector<int64_t> first, offset;
  std::vector<float> weight;

  Taps(int64_t in, int64_t out) {
    for (int64_t i = 0; i < out; ++i) {
      const Antialias a(i, in, out);
      double sum = 0;
      for (int64_t k = 0; k < a.count; ++k) sum += a.triangle(k);
      first.push_back(a.first);
      offset.push_back(int64_t(weight.size()));
      for (int64_t k = 0; k < a.count; ++k) weight.push_back(float(a.triangle(k) / sum));
    }
    offset.push_back(int64_t(weight.size()));
  }
  int64_t count(int64_t i) const { return offset[i + 1] - offset[i]; }
};

struct EdgeProblem {
  int64_t height, width, h, w, classes, ignore_index;
  Taps rows, columns;
};

// Rows [begin, end) of one image's edge counts, resized: along y first, whose sums are vectors. Without a resize each output
// has one tap, which weighs 1.
template <typename Label>
SEGOPS_INLINE void edge_rows(const Label* labels, const EdgeProblem& p, int64_t begin, int64_t end, float* out) {
  const int64_t first = p.rows.first[begin], last = p.rows.first[end - 1] + p.rows.count(end - 1), width = p.width;
  std::vector<int32_t> row(width), lower(width);
  std::vector<float> counts((last - first) * width), column(width);
  const auto read = [&](int64_t y, std::vector<int32_t>& to) __attribute__((always_inline)) {
    read_classes(labels + std::min(y, p.height - 1) * width, width, p.classes, p.ignore_index, to.data());
  };
  read(first, row);
  for (int64_t y = first; y < last; ++y) {
    read(y + 1, lower);
    float* to = &counts[(y - first) * width];
    count_row(row.data(), lower.data(), width, to);
    int32_t least = 0;
    for (int64_t x = 0; x < width; ++x) least = std::min(least, row[x]);
    if (least == kWrong) std::fill(to, to + width, std::numeric_limits<float>::quiet_NaN());
    std::swap(row, lower);
  }
  for (int64_t i = begin; i < end; ++i) {
    std::fill(column.begin(), column.end(), 0.f);
    for (int64_t k = 0; k < p.rows.count(i); ++k) {
      const float* from = &counts[(p.rows.first[i] + k - first) * width];
      const float weight = p.rows.weight[p.rows.offset[i] + k];
      for (int64_t x = 0; x < width; ++x) column[x] += weight * from[x];
    }
    for (int64_t j = 0; j < p.w; ++j) {
      const float* weight = &p.columns.weight[p.columns.offset[j]];
      const float* from = &column[p.columns.first[j]];
      float sum = 0;
      for (int64_t k = 0; k < p.columns.count(j); ++k) sum += weight[k] * from[k];
      out[i * p.w + j] = sum;
    }
  }
}

// One compiled version per instruction set needs plain overloads: templates cannot be multiversioned.
#define SEGOPS_EDGE_ROWS(Label)                                                            \
  SEGOPS_MULTIVERSION void edge_rows_multiversion(                                         \
      const Label* labels, const EdgeProblem& p, int64_t begin, int64_t end, float* out) { \
    edge_rows<Label>(labels, p, begin, end, out);                                          \
  }
SEGOPS_EDGE_ROWS(int64_t)
SEGOPS_EDGE_ROWS(int32_t)
SEGOPS_EDGE_ROWS(uint8_t)
#undef SEGOPS_EDGE_ROWS

// out[x] += sum_k filter[k] * row[x + k - size / 2], zero outside.
SEGOPS_MULTIVERSION void blur_row(const float* row, int64_t width, const float* filter, int64_t size, float* out) {
  for (int64_t k = 0; k < size; ++k) {
    const int64_t shift = k - size / 2;
    const int64_t begin = std::max<int64_t>(0, -shift), end = std::min(width, width - shift);
    const float weight = filter[k];
    for (int64_t x = begin; x < end; ++x) out[x] += weight * row[x + shift];
  }
}

// out[x] += weight * row[x]
SEGOPS_MULTIVERSION void add_row(const float* row, int64_t width, float weight, float* out) {
  for (int64_t x = 0; x < width; ++x) out[x] += weight * row[x];
}

// ---- softmax --------------------------------------------------------------------------------------------------------

// Integers as wide as T, so that comparing them makes masks for vectors of T.
template <typename T>
using Class = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// One axis of a bilinear resize, and back: output i is (1 - weight[i]) * in[low[i]] + weight[i] * in[high[i]], and the outputs
// with low == j are first[j] .. first[j + 1]. Padded to whole blocks with the last output.
template <typename T>
struct Axis {
  std::vector<Class<T>> low, high;
  std::vector<T> weight;
  std::vector<int64_t> first;

  Axis(int64_t in, int64_t out) : low(padded(out)), high(low), weight(low.size()), first(in + 1, out) {
    for (int64_t i = int64_t(low.size()) - 1; i >= 0; --i) {
      const Source source = bilinear_source(std::min(i, out - 1), in, double(in) / double(out));
      low[i] = Class<T>(source.low);
      high[i] = Class<T>(source.high);
      weight[i] = T(source.weight);
      if (i < out) first[source.low] = i;
    }
    for (int64_t j = in - 1; j >= 0; --j) first[j] = std::min(first[j], first[j + 1]);  // a source that no output has as low
  }
  static int64_t padded(int64_t width) { return ceil_div(width, kBlock<T>) * kBlock<T>; }
};

template <typename T>
constexpr int kWindow = 32 / sizeof(T);  // lanes that AVX2 can pick from

// Resizes a row to the axis's outputs, of which `out` must hold whole windows; beyond the row a window must be readable.
template <typename T>
SEGOPS_INLINE void resize_row(const T* row, const Axis<T>& axis, int64_t count, T* out) {
  using V = Vec<T, kWindow<T>>;
  using I = Vec<Class<T>, kWindow<T>>;
  const Class<T>*low = axis.low.data(), *high = axis.high.data();
  const T* weight = axis.weight.data();
  for (int64_t x = 0; x < count; x += kWindow<T>) {
    const Class<T> first = low[x];
    typename V::type a, b;
    if (high[x + kWindow<T> - 1] - first < kWindow<T>) {  // upsampling: neighbours read the same few
      const auto window = V::load(row + first);
      a = pick(window, I::load(low + x) - first);
      b = pick(window, I::load(high + x) - first);
    } else {
      for (int i = 0; i < kWindow<T>; ++i) {
        a[i] = row[low[x + i]];
        b[i] = row[high[x + i]];
      }
    }
    const auto right = V::load(weight + x);
    V::store(out + x, (1 - right) * a + right * b);
  }
}

template <typename T>
struct Problem {
  LossShape s;
  bool smoothed;  // the coefficients hold `each`
  const T* logits;
  int64_t stride[4];
  const T* pixel_weight;
  const T* class_weight;
  T keep, share, class_weight_sum;  // the loss is w (keep a_t l_t + share sum_c a_c l_c)
  int64_t ignore_index;
  Axis<T> rows, columns;
  Axis<T> weight_rows, weight_columns;
  int64_t strip;  // rows of logits that one item of work covers

  Problem(
      const LossShape& s, const Tensor& logits, const std::optional<Tensor>& pixel_weight,
      const std::optional<Tensor>& class_weight, const Tensor& coefficients, double label_smoothing, int64_t ignore_index)
      : s(s),
        smoothed(coefficients.size(0) == 4),
        logits(static_cast<const T*>(logits.const_data_ptr())),
        stride{logits.stride(0), logits.stride(1), logits.stride(2), logits.stride(3)},
        pixel_weight(pixel_weight ? static_cast<const T*>(pixel_weight->const_data_ptr()) : nullptr),
        class_weight(class_weight ? static_cast<const T*>(class_weight->const_data_ptr()) : nullptr),
        keep(T(1 - label_smoothing)),
        share(T(label_smoothing / double(s.classes))),
        class_weight_sum(T(s.classes)),
        ignore_index(ignore_index),
        rows(s.h, s.height),
        columns(s.w, s.width),
        weight_rows(std::max<int64_t>(s.weight_h, 1), s.height),
        weight_columns(std::max<int64_t>(s.weight_w, 1), s.width),
        strip(s.resized() ? std::max<int64_t>(1, 32 * s.h / s.height) : 8) {
    STD_TORCH_CHECK(s.w <= std::numeric_limits<int32_t>::max() / 2, "bal: the logits are too wide");
    if (this->class_weight) {
      double sum = 0;
      for (int64_t c = 0; c < s.classes; ++c) sum += double(this->class_weight[c]);
      class_weight_sum = T(sum);
    }
  }
  int64_t padded() const { return int64_t(columns.low.size()); }
  int64_t strips() const { return ceil_div(s.h, strip); }
};

// The logits of one strip of one image, read a row of labels at a time.
template <typename T>
class Reader {
 public:
  Reader(const Problem<T>& p, int64_t image)
      : p_(p), logits_(p.logits + image * p.stride[0]), resized_(p.s.resized()), row_(p.s.w + kWindow<T>) {
    if (resized_)
      for (auto& row : expanded_) row.resize(p.s.classes * p.padded());
  }

  // Makes the rows of logits around label rows with rows.low == k ready: along x they are resized here.
  SEGOPS_INLINE void seek(int64_t k) {
    if (!resized_) return;
    if (held_[1] == k) {
      std::swap(expanded_[0], expanded_[1]);
      std::swap(held_[0], held_[1]);
    }
    if (held_[0] != k) expand(k, 0);
    const int64_t next = std::min(k + 1, p_.s.h - 1);
    if (held_[1] != next) expand(next, 1);
  }

  // block (classes, pixels) = the logits of label row y at x .. x + pixels; those beyond the row hold any finite number.
  template <int pixels>
  SEGOPS_INLINE void read(int64_t y, int64_t x, T* block) const {
    using V = Vec<T, kLanes<T>>;
    if (resized_) {
      const T high = p_.rows.weight[y], low = 1 - high;
      const int64_t step = p_.padded();
      const T *a = expanded_[0].data() + x, *b = expanded_[1].data() + x;
      for (int64_t c = 0; c < p_.s.classes; ++c, a += step, b += step, block += pixels) {
#pragma GCC unroll 4
        for (int v = 0; v < pixels; v += kLanes<T>) V::store(block + v, V::load(a + v) * low + V::load(b + v) * high);
      }
      return;
    }
    const T* from = logits_ + y * p_.stride[2] + x * p_.stride[3];
    const int64_t count = std::min<int64_t>(pixels, p_.s.width - x);
    for (int64_t c = 0; c < p_.s.classes; ++c, from += p_.stride[1], block += pixels) {
      if (p_.stride[3] == 1 && count == pixels) {
        std::memcpy(block, from, pixels * sizeof(T));
        continue;
      }
      for (int64_t i = 0; i < pixels; ++i) block[i] = i < count ? from[i * p_.stride[3]] : T(0);
    }
  }

  const T* expanded(int side) const { return expanded_[side].data(); }

 private:
  SEGOPS_INLINE void expand(int64_t k, int side) {
    const int64_t padded = p_.padded();
    for (int64_t c = 0; c < p_.s.classes; ++c) {
      const T* from = logits_ + c * p_.stride[1] + k * p_.stride[2];
      T* row = row_.data();
      for (int64_t x = 0; x < p_.s.w; ++x) row[x] = from[x * p_.stride[3]];
      resize_row(row, p_.columns, padded, expanded_[side].data() + c * padded);
    }
    held_[side] = k;
  }

  const Problem<T>& p_;
  const T* logits_;
  const bool resized_;
  std::vector<T> row_;
  std::vector<T> expanded_[2];  // rows k and k + 1 of the logits, (classes, padded)
  int64_t held_[2] = {-1, -1};
};

// The pixels' weights along label row y; `row` is room for a row of them before they are resized along x.
template <typename T>
SEGOPS_INLINE void read_weights(const Problem<T>& p, int64_t image, int64_t y, T* row, T* out) {
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
  T* coefficients;
  T* loss;         // or null
  double* totals;  // per label row: sum of losses, pixels not ignored
};

// The label rows of one strip, forward.
template <typename T, typename Label>
SEGOPS_INLINE void loss_strip(const Problem<T>& p, const Label* labels, int64_t item, const LossOutput<T>& out) {
  using V = Vec<T, kLanes<T>>;
  using I = Vec<Class<T>, kLanes<T>>;
  const LossShape& s = p.s;
  const int64_t image = item / p.strips(), begin = item % p.strips() * p.strip, end = std::min(begin + p.strip, s.h);
  const int64_t padded = p.padded();
  Reader<T> reader(p, image);
  std::vector<T> block(s.classes * kBlock<T>), weights(padded), weight_row(s.weight_w + kWindow<T>),
      target_weights(padded, T(1));
  std::vector<Class<T>> targets(padded, kIgnored);

  for (int64_t y = p.rows.first[begin]; y < p.rows.first[end]; ++y) {
    reader.seek(p.rows.low[y]);
    const int64_t row = (image * s.height + y) * s.width;
    read_classes(labels + row, s.width, s.classes, p.ignore_index, targets.data());
    read_weights(p, image, y, weight_row.data(), weights.data());
    if (p.class_weight)
      for (int64_t x = 0; x < s.width; ++x) target_weights[x] = targets[x] < 0 ? T(0) : p.class_weight[targets[x]];

    typename V::type sum{};
    typename I::type ignored{};
    const auto softmax = [&](auto constant, int64_t x) __attribute__((always_inline)) {
      constexpr int vectors = decltype(constant)::value, pixels = vectors * kLanes<T>;
      reader.template read<pixels>(y, x, block.data());
      typename V::type most[vectors], rest[vectors], at_target[vectors], smooth[vectors];
      typename I::type target[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        most[v] = V::load(&block[v * kLanes<T>]);
        rest[v] = smooth[v] = typename V::type{};
        at_target[v] = rest[v] - std::numeric_limits<T>::infinity();  // for pixels that have no target
        target[v] = I::load(&targets[x + v * kLanes<T>]);
      }
      for (int64_t c = 1; c < s.classes; ++c) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          const auto z = V::load(&block[c * pixels + v * kLanes<T>]);
          most[v] = z > most[v] ? z : most[v];
        }
      }
      for (int64_t c = 0; c < s.classes; ++c) {
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) {
          const auto z = V::load(&block[c * pixels + v * kLanes<T>]);
          const auto e = exp(z - most[v], T{});
          rest[v] = target[v] == Class<T>(c) ? rest[v] : rest[v] + e;
          at_target[v] = target[v] == Class<T>(c) ? z : at_target[v];
        }
      }
      if (p.smoothed)
        for (int64_t c = 0; c < s.classes; ++c) {
          const T weight = p.class_weight ? p.class_weight[c] : T(1);
          for (int v = 0; v < vectors; ++v) smooth[v] += weight * (most[v] - V::load(&block[c * pixels + v * kLanes<T>]));
        }
      T results[5][pixels];  // loss, then the coefficients
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = x + v * kLanes<T>;
        const auto total = rest[v] + exp(at_target[v] - most[v], T{});
        const auto log_total = log(total, T{});
        const auto weight = V::load(&weights[at]), own = p.keep * V::load(&target_weights[at]);
        const T all_smooth = p.share * p.class_weight_sum;
        auto loss = own * (log_total + (most[v] - at_target[v]));
        if (p.smoothed) loss += all_smooth * log_total + p.share * smooth[v];
        const typename V::type none{}, nan = none + std::numeric_limits<T>::quiet_NaN();
        const typename V::type values[] = {
            weight * loss, weight * (own + all_smooth) / total,
            weight * ((all_smooth * (total - rest[v]) - own * rest[v]) / total), none + weight * p.share};
        V::store(results[1] + v * kLanes<T>, most[v]);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          auto value = target[v] == Class<T>(kIgnored) ? none : values[i];
          value = target[v] == Class<T>(kWrong) ? nan : value;
          V::store(results[i == 0 ? 0 : i + 1] + v * kLanes<T>, value);
        }
        sum += V::load(results[0] + v * kLanes<T>);
        ignored -= target[v] == Class<T>(kIgnored);  // a true lane is -1
      }
      const int64_t count = std::min<int64_t>(pixels, s.width - x);
      if (out.loss) std::memcpy(out.loss + row + x, results[0], count * sizeof(T));
      for (int map = 0; map < (p.smoothed ? 4 : 3); ++map)
        std::memcpy(out.coefficients + map * s.pixels() + row + x, results[map + 1], count * sizeof(T));
    };
    int64_t x = 0;
    for (; x + kBlock<T> <= s.width; x += kBlock<T>) softmax(vectors_of<4>, x);
    for (; x < s.width; x += kLanes<T>) softmax(vectors_of<1>, x);
    double losses = 0;
    int64_t valid = x;  // lanes: those beyond the row are ignored
    for (int i = 0; i < kLanes<T>; ++i) {
      losses += double(sum[i]);
      valid -= ignored[i];
    }
    out.totals[2 * (image * s.height + y)] = losses;
    out.totals[2 * (image * s.height + y) + 1] = double(valid);
  }
}

template <typename T>
struct GradOutput {
  const T* grad;
  int64_t grad_stride;  // 0 for one number
  const T* coefficients;
  T* out;
  int64_t stride[4];
  T* shared;  // (items, classes, w): what a strip adds to the first row of the next
};

// The coefficients of label rows, times the gradient that comes in.
template <typename T>
struct Coefficients {
  std::vector<T> most, all, target, each;
  std::vector<Class<T>> classes;

  Coefficients(const Problem<T>& p, int64_t rows)
      : most(rows * p.padded()), all(most), target(most), each(most), classes(most.size(), kIgnored) {}

  // Those of label row y go to [at, at + width).
  template <typename Label>
  SEGOPS_INLINE void read(
      const Problem<T>& p, const Label* labels, const GradOutput<T>& g, int64_t image, int64_t y, int64_t at) {
    const int64_t row = (image * p.s.height + y) * p.s.width;
    read_classes(labels + row, p.s.width, p.s.classes, p.ignore_index, &classes[at]);
    const T *from = g.coefficients + row, *grad = g.grad + row * g.grad_stride;
    std::copy(from, from + p.s.width, &most[at]);
    // Not a product with 0 where ignored: whatever comes in there, NaN perhaps, goes nowhere.
    const auto scale = [&](const T* map, T* __restrict out) __attribute__((always_inline)) {
      for (int64_t x = 0; x < p.s.width; ++x) out[x] = classes[at + x] == kIgnored ? T(0) : grad[x * g.grad_stride] * map[x];
    };
    scale(from + p.s.pixels(), &all[at]);
    scale(from + 2 * p.s.pixels(), &target[at]);
    if (p.smoothed) scale(from + 3 * p.s.pixels(), &each[at]);
  }

  // The gradient for the logits z of class c at pixels at .. at + kLanes.
  SEGOPS_INLINE auto gradient(
      const Problem<T>& p, bool smoothed, typename Vec<T, kLanes<T>>::type z, int64_t c, int64_t at) const {
    using V = Vec<T, kLanes<T>>;
    const auto target_class = Vec<Class<T>, kLanes<T>>::load(&classes[at]);
    auto result = V::load(&all[at]) * exp(z - V::load(&most[at]), T{});
    result = target_class == Class<T>(c) ? V::load(&target[at]) : result;
    if (smoothed) result -= V::load(&each[at]) * (p.class_weight ? p.class_weight[c] : T(1));
    return result;
  }
};

// How the outputs of a resize along x add up to its sources: for source j, windows of the outputs that have it for their
// `high`, from first[j - 1], and for their `low`, from first[j], with what they weigh; 0 beyond.
template <typename T>
struct Windows {
  int64_t size = 0;  // of a window, whole vectors
  std::vector<T> high, low;

  explicit Windows(const Axis<T>& axis) {
    const int64_t sources = int64_t(axis.first.size()) - 1;
    for (int64_t j = 0; j < sources; ++j)
      size = std::max(size, ceil_div(axis.first[j + 1] - axis.first[j], kLanes<T>) * kLanes<T>);
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

// Row k of the logits' gradient from `sums` (classes, padded), the gradient for that row resized along x.
template <typename T>
SEGOPS_INLINE void deliver(
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
template <typename T, typename Label>
SEGOPS_INLINE void grad_strip(
    const Problem<T>& p, const Windows<T>& windows, const Label* labels, int64_t item, const GradOutput<T>& g) {
  using V = Vec<T, kLanes<T>>;
  const LossShape& s = p.s;
  const int64_t image = item / p.strips(), begin = item % p.strips() * p.strip, end = std::min(begin + p.strip, s.h);
  const int64_t padded = p.padded();
  Reader<T> reader(p, image);
  T* out = g.out + image * g.stride[0];
  const bool smoothed = p.smoothed;

  if (!s.resized()) {
    Coefficients<T> coefficients(p, 1);
    std::vector<T> block(s.classes * kBlock<T>);
    for (int64_t y = begin; y < end; ++y) {
      coefficients.read(p, labels, g, image, y, 0);
      const auto softmax = [&](auto constant, int64_t x) __attribute__((always_inline)) {
        constexpr int pixels = decltype(constant)::value * kLanes<T>;
        reader.template read<pixels>(y, x, block.data());
        const int64_t count = std::min<int64_t>(pixels, s.width - x);
        for (int64_t c = 0; c < s.classes; ++c) {
          T* z = &block[c * pixels];
#pragma GCC unroll 4
          for (int v = 0; v < pixels; v += kLanes<T>)
            V::store(z + v, coefficients.gradient(p, smoothed, V::load(z + v), c, x + v));
          T* to = out + c * g.stride[1] + y * g.stride[2] + x * g.stride[3];
          if (g.stride[3] == 1 && count == pixels)
            std::memcpy(to, z, pixels * sizeof(T));
          else
            for (int64_t i = 0; i < count; ++i) to[i * g.stride[3]] = z[i];
        }
      };
      int64_t x = 0;
      for (; x + kBlock<T> <= s.width; x += kBlock<T>) softmax(vectors_of<4>, x);
      for (; x < s.width; x += kLanes<T>) softmax(vectors_of<1>, x);
    }
    return;
  }

  Coefficients<T> coefficients(p, kRows);
  std::vector<T> sums(s.classes * padded + windows.size, T(0)), next_sums(sums);  // for rows k and k + 1, resized along x
  for (int64_t k = begin; k < end; ++k) {
    for (int64_t from = p.rows.first[k]; from < p.rows.first[k + 1]; from += kRows) {
      const int64_t rows = std::min(kRows, p.rows.first[k + 1] - from);
      reader.seek(k);
      for (int64_t r = 0; r < rows; ++r) coefficients.read(p, labels, g, image, from + r, r * padded);
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
    deliver(p, windows, sums.data(), out + k * g.stride[2], g.stride[1], g.stride[3]);
    std::swap(sums, next_sums);
    std::fill(next_sums.begin(), next_sums.end(), T(0));
  }
  deliver(p, windows, sums.data(), g.shared + item * s.classes * s.w, s.w, 1);
}

#define SEGOPS_STRIPS(T, Label)                                                                                      \
  SEGOPS_MULTIVERSION void loss_strip_multiversion(                                                                  \
      const Problem<T>& p, const Label* labels, int64_t item, const LossOutput<T>& out) {                            \
    loss_strip<T, Label>(p, labels, item, out);                                                                      \
  }                                                                                                                  \
  SEGOPS_MULTIVERSION void grad_strip_multiversion(                                                                  \
      const Problem<T>& p, const Windows<T>& windows, const Label* labels, int64_t item, const GradOutput<T>& out) { \
    grad_strip<T, Label>(p, windows, labels, item, out);                                                             \
  }
SEGOPS_STRIPS(float, int64_t)
SEGOPS_STRIPS(float, int32_t)
SEGOPS_STRIPS(float, uint8_t)
SEGOPS_STRIPS(double, int64_t)
SEGOPS_STRIPS(double, int32_t)
SEGOPS_STRIPS(double, uint8_t)
#undef SEGOPS_STRIPS

// Calls fn with a value of the type that is computed in.
template <typename F>
void dispatch(const Tensor& logits, const Tensor& coefficients, const char* op, const F& fn) {
  STD_TORCH_CHECK(
      logits.scalar_type() == coefficients.scalar_type(), op, ": logits and coefficients must have one dtype on the CPU");
  if (logits.scalar_type() == ScalarType::Float) return fn(float{});
  STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Double, op, ": the CPU kernel takes float32 or float64");
  fn(double{});
}

}  // namespace

void bal_count_edges_cpu(Tensor labels, Tensor out, int64_t classes, int64_t ignore_index) {
  check_count_edges(labels, out);
  const int64_t height = labels.size(1), width = labels.size(2), h = out.size(1), w = out.size(2);
  const EdgeProblem p{height, width, h, w, classes, ignore_index, Taps(height, h), Taps(width, w)};
  const int64_t strip = 8, strips = ceil_div(h, strip);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  dispatch_labels(labels, "bal_count_edges", [&](const auto* from) {
    torch::stable::parallel_for(0, labels.size(0) * strips, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t image = item / strips, first = item % strips * strip;
        edge_rows_multiversion(from + image * height * width, p, first, std::min(first + strip, h), to + image * h * w);
      }
    });
  });
}

void bal_blur_cpu(Tensor edges, Tensor factors, Tensor rows, Tensor out) {
  check_blur(edges, factors, rows, out);
  const int64_t h = edges.size(1), w = edges.size(2), count = edges.size(0) * h, size = factors.size(1);
  if (edges.numel() == 0) return;
  const float* from = static_cast<const float*>(edges.const_data_ptr());
  const float* factor = static_cast<const float*>(factors.const_data_ptr());
  float* along_x = static_cast<float*>(rows.mutable_data_ptr());
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 100000 / (w * size));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t pair = 0; pair < 2; ++pair) {
        float* filtered = along_x + (pair * count + row) * w;
        std::fill(filtered, filtered + w, 0.f);
        blur_row(from + row * w, w, factor + (2 * pair + 1) * size, size, filtered);
      }
    }
  });
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      std::fill(to + row * w, to + (row + 1) * w, 0.f);
      const int64_t y = row % h;
      for (int64_t pair = 0; pair < 2; ++pair)
        for (int64_t k = std::max<int64_t>(0, size / 2 - y); k < std::min(size, h - y + size / 2); ++k)
          add_row(along_x + (pair * count + row + k - size / 2) * w, w, factor[2 * pair * size + k], to + row * w);
    }
  });
}

void bal_softmax_loss_cpu(
    Tensor logits, Tensor labels, std::optional<Tensor> pixel_weight, std::optional<Tensor> class_weight, Tensor coefficients,
    std::optional<Tensor> loss, Tensor totals, double label_smoothing, int64_t ignore_index) {
  const LossShape s = check_loss("bal_softmax_loss", logits, labels, pixel_weight, class_weight, coefficients);
  check_loss_outputs(labels, totals, loss, coefficients, label_smoothing);
  std::vector<double> row_totals(2 * s.images * s.height);
  dispatch(logits, coefficients, "bal_softmax_loss", [&](auto type) {
    using T = decltype(type);
    const Problem<T> p(s, logits, pixel_weight, class_weight, coefficients, label_smoothing, ignore_index);
    const LossOutput<T> out{
        static_cast<T*>(coefficients.mutable_data_ptr()), loss ? static_cast<T*>(loss->mutable_data_ptr()) : nullptr,
        row_totals.data()};
    dispatch_labels(labels, "bal_softmax_loss", [&](const auto* from) {
      torch::stable::parallel_for(0, s.images * p.strips(), 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) loss_strip_multiversion(p, from, item, out);
      });
    });
  });
  double* to = static_cast<double*>(totals.mutable_data_ptr());
  to[0] = to[1] = 0;
  for (size_t i = 0; i < row_totals.size(); ++i) to[i % 2] += row_totals[i];
}

void bal_softmax_grad_cpu(
    Tensor grad, Tensor logits, Tensor labels, std::optional<Tensor> class_weight, Tensor coefficients, Tensor out,
    int64_t ignore_index) {
  const LossShape s = check_loss("bal_softmax_grad", logits, labels, std::nullopt, class_weight, coefficients);
  check_grad(grad, logits, labels, out, coefficients);
  dispatch(logits, coefficients, "bal_softmax_grad", [&](auto type) {
    using T = decltype(type);
    const Problem<T> p(s, logits, std::nullopt, class_weight, coefficients, 0, ignore_index);
    const Windows<T> windows(p.columns);
    const int64_t items = s.images * p.strips();
    std::vector<T> shared(s.resized() ? items * s.classes * s.w : 0);
    const GradOutput<T> g{
        static_cast<const T*>(grad.const_data_ptr()),
        grad.numel() > 1,
        static_cast<const T*>(coefficients.const_data_ptr()),
        static_cast<T*>(out.mutable_data_ptr()),
        {out.stride(0), out.stride(1), out.stride(2), out.stride(3)},
        shared.data()};
    dispatch_labels(labels, "bal_softmax_grad", [&](const auto* from) {
      torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) grad_strip_multiversion(p, windows, from, item, g);
      });
    });
    if (!s.resized()) return;
    for (int64_t item = 0; item < items; ++item) {
      const int64_t row = (item % p.strips() + 1) * p.strip;
      if (row >= s.h) continue;
      T* to = g.out + item / p.strips() * g.stride[0] + row * g.stride[2];
      const T* from = g.shared + item * s.classes * s.w;
      for (int64_t c = 0; c < s.classes; ++c)
        for (int64_t x = 0; x < s.w; ++x) to[c * g.stride[1] + x * g.stride[3]] += from[c * s.w + x];
    }
  });
}

STABLE_TORCH_LIBRARY_IMPL(segops, CPU, m) {
  m.impl("bal_count_edges", TORCH_BOX(&bal_count_edges_cpu));
  m.impl("bal_blur", TORCH_BOX(&bal_blur_cpu));
  m.impl("bal_softmax_loss", TORCH_BOX(&bal_softmax_loss_cpu));
  m.impl("bal_softmax_grad", TORCH_BOX(&bal_softmax_grad_cpu));
}

}  // namespace segops
