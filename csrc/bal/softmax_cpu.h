// What the loss and its gradient share on the CPU: the work, and the logits of label pixels.
//
// Logits are resized in two steps: along x once per row of logits, along y per row of labels, as it
// is needed. The softmax then runs over blocks of pixels, a class at a time, so that its
// exponentials are vectors of pixels. Work is cut into strips of logit rows by sizes alone: results
// do not depend on the number of threads.
#pragma once

#include "../common/cpu.h"
#include "../common/resize_cpu.h"
#include "labels_cpu.h"

#include <limits>

namespace segops::bal {

template <typename T>
constexpr int kBlock = 4 * kLanes<T>;  // pixels that a softmax takes at once, at most
template <typename T>
constexpr int kWindow = 32 / sizeof(T);  // lanes that AVX2 can pick from

// Resizes a row to the axis's outputs, of which `out` must hold whole windows; beyond the row a
// window must be readable.
template <typename T>
SEGOPS_INLINE void resize_row(const T* row, const ResizeAxis<T>& axis, int64_t count, T* out) {
  using V = Vec<T, kWindow<T>>;
  using I = Vec<Integer<T>, kWindow<T>>;
  const Integer<T>*low = axis.low.data(), *high = axis.high.data();
  const T* weight = axis.weight.data();
  for (int64_t x = 0; x < count; x += kWindow<T>) {
    const Integer<T> first = low[x];
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
  View<const T> logits;
  Labels labels;
  const T* pixel_weight;
  const T* class_weight;
  bool smoothed;
  T keep, share, class_weight_sum;  // the loss is w (keep a_t l_t + share sum_c a_c l_c)
  ResizeAxis<T> rows, columns;
  ResizeAxis<T> weight_rows, weight_columns;
  int64_t strip;  // rows of logits that one item of work covers

  Problem(const LossInput& in, const char* op)
      : s(in.s),
        logits(in.logits),
        labels(in.labels, s.classes, in.ignore_index, op),
        pixel_weight(data_of<const T>(in.pixel_weight)),
        class_weight(data_of<const T>(in.class_weight)),
        smoothed(in.smoothed()),
        keep(T(1 - in.label_smoothing)),
        share(T(in.label_smoothing / double(s.classes))),
        class_weight_sum(T(s.classes)),
        rows(s.h, s.height, s.height),
        columns(s.w, s.width, round_up(s.width, kBlock<T>) + kLanes<T>),
        weight_rows(std::max<int64_t>(s.weight_h, 1), s.height, s.height),
        weight_columns(std::max<int64_t>(s.weight_w, 1), s.width, round_up(s.width, kBlock<T>)),
        strip(s.resized() ? std::max<int64_t>(1, 32 * s.h / s.height) : 8) {
    STD_TORCH_CHECK(s.w <= std::numeric_limits<int32_t>::max() / 2, op, ": the logits are too wide");
    if (this->class_weight) {
      double sum = 0;
      for (int64_t c = 0; c < s.classes; ++c) sum += double(this->class_weight[c]);
      class_weight_sum = T(sum);
    }
  }
  // Between rows of two classes: whole blocks, and an odd number of cache lines. At a power of two
  // all classes would meet in a few sets of a cache.
  int64_t padded() const { return int64_t(columns.low.size()); }
  int64_t strips() const { return ceil_div(s.h, strip); }
  int64_t items() const { return s.images * strips(); }
};

// The logits of one strip of one image, read a row of labels at a time.
template <typename T>
class Reader {
 public:
  Reader(const Problem<T>& p, int64_t image)
      : p_(p), logits_(p.logits.at(image, 0, 0, 0)), resized_(p.s.resized()), row_(p.s.w + kWindow<T>) {
    if (resized_)
      for (auto& row : expanded_) row.resize(p.s.classes * p.padded());
  }

  // Makes the rows of logits around label rows with rows.low == k ready, resized along x.
  SEGOPS_INLINE void seek(int64_t k) {
    if (!resized_) return;
    if (expanded_row_[1] == k) {
      std::swap(expanded_[0], expanded_[1]);
      std::swap(expanded_row_[0], expanded_row_[1]);
    }
    if (expanded_row_[0] != k) expand(k, 0);
    const int64_t next = std::min(k + 1, p_.s.h - 1);
    if (expanded_row_[1] != next) expand(next, 1);
  }

  // block (classes, vectors * lanes) = the logits of label row y from x on; beyond the row, finite
  // numbers.
  template <int lanes, int vectors>
  SEGOPS_INLINE void read(int64_t y, int64_t x, T* block) const {
    constexpr int pixels = vectors * lanes;
    using V = Vec<T, lanes>;
    if (resized_) {
      const T high = p_.rows.weight[y], low = 1 - high;
      const int64_t step = p_.padded();
      const T *a = expanded_[0].data() + x, *b = expanded_[1].data() + x;
      for (int64_t c = 0; c < p_.s.classes; ++c, a += step, b += step, block += pixels) {
#pragma GCC unroll 4
        for (int v = 0; v < pixels; v += lanes) V::store(block + v, V::load(a + v) * low + V::load(b + v) * high);
      }
      return;
    }
    const T* from = logits_ + y * p_.logits.row + x * p_.logits.pixel;
    const int64_t count = std::min<int64_t>(pixels, p_.s.width - x);
    for (int64_t c = 0; c < p_.s.classes; ++c, from += p_.logits.channel, block += pixels) {
      if (p_.logits.pixel == 1 && count == pixels) {
        std::memcpy(block, from, pixels * sizeof(T));
        continue;
      }
      for (int64_t i = 0; i < pixels; ++i) block[i] = i < count ? from[i * p_.logits.pixel] : T(0);
    }
  }

  const T* expanded(int side) const { return expanded_[side].data(); }

 private:
  SEGOPS_INLINE void expand(int64_t k, int side) {
    const int64_t padded = p_.padded();
    for (int64_t c = 0; c < p_.s.classes; ++c) {
      const T* from = logits_ + c * p_.logits.channel + k * p_.logits.row;
      T* row = row_.data();
      for (int64_t x = 0; x < p_.s.w; ++x) row[x] = from[x * p_.logits.pixel];
      resize_row(row, p_.columns, padded, expanded_[side].data() + c * padded);
    }
    expanded_row_[side] = k;
  }

  const Problem<T>& p_;
  const T* logits_;
  const bool resized_;
  std::vector<T> row_;
  std::vector<T> expanded_[2];          // rows k and k + 1 of the logits, (classes, padded)
  int64_t expanded_row_[2] = {-1, -1};  // which these are
};

}  // namespace segops::bal
