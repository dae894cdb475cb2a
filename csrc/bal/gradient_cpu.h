// From the gradient for the resized logits to that for the logits on the CPU: it is summed over
// label rows, along y, before it is resized back along x. Strips add to a row of logits that they
// share one after the other, at the end.
#pragma once

#include "softmax_cpu.h"

namespace segops::bal {

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

// The gradient for the logits, which strips write.
template <typename T>
struct Gradient {
  View<T> out;
  Windows<T> windows;
  std::vector<T> shared;  // (items, classes, w): what a strip adds to the first row of the next

  Gradient(const Problem<T>& p, const Tensor& out)
      : out(out), windows(p.columns), shared(p.s.resized() ? p.items() * p.s.classes * p.s.w : 0) {}

  // Writes a block (classes, pixels) of gradients for logits that are not resized.
  template <int pixels>
  SEGOPS_INLINE void store(const Problem<T>& p, int64_t image, int64_t y, int64_t x, const T* block) const {
    const int64_t count = std::min<int64_t>(pixels, p.s.width - x);
    T* to = out.at(image, 0, y, x);
    for (int64_t c = 0; c < p.s.classes; ++c, to += out.channel, block += pixels) {
      if (out.pixel == 1 && count == pixels)
        std::memcpy(to, block, pixels * sizeof(T));
      else
        for (int64_t i = 0; i < count; ++i) to[i * out.pixel] = block[i];
    }
  }

  // Adds up what strips share.
  void join(const Problem<T>& p) const {
    if (!p.s.resized()) return;
    for (int64_t item = 0; item < p.items(); ++item) {
      const int64_t row = (item % p.strips() + 1) * p.strip;
      if (row >= p.s.h) continue;
      T* to = out.at(item / p.strips(), 0, row, 0);
      const T* from = shared.data() + item * p.s.classes * p.s.w;
      for (int64_t c = 0; c < p.s.classes; ++c)
        for (int64_t x = 0; x < p.s.w; ++x) to[c * out.channel + x * out.pixel] += from[c * p.s.w + x];
    }
  }
};

// What one strip adds up for rows k and k + 1 of the logits, still at the columns of the labels;
// empty where there is no gradient, or nothing is resized.
template <typename T>
class RowSums {
 public:
  RowSums(const Problem<T>& p, Gradient<T>* gradient, int64_t item) : p_(p), gradient_(gradient), item_(item) {
    if (gradient && p.s.resized())
      for (auto& row : rows_) row.resize(p.s.classes * p.padded() + gradient->windows.size);
  }

  // Adds what a label row gives to both rows, (classes, padded), from number `at` on.
  template <typename V>
  SEGOPS_INLINE void add(int64_t at, V to_k, V to_next) {
    using Lanes = Vec<T, sizeof(V) / sizeof(T)>;
    T *k = &rows_[0][at], *next = &rows_[1][at];
    Lanes::store(k, Lanes::load(k) + to_k);
    Lanes::store(next, Lanes::load(next) + to_next);
  }

  // Row k is complete: k + 1 takes its place.
  template <int lanes>
  SEGOPS_INLINE void finish(int64_t k) {
    const View<T>& out = gradient_->out;
    resize_back<lanes>(out.at(item_ / p_.strips(), 0, k, 0), out.channel, out.pixel);
    std::swap(rows_[0], rows_[1]);
    std::fill(rows_[1].begin(), rows_[1].end(), T(0));
  }
  template <int lanes>
  SEGOPS_INLINE void finish_strip() {
    resize_back<lanes>(gradient_->shared.data() + item_ * p_.s.classes * p_.s.w, p_.s.w, 1);
  }

 private:
  template <int lanes>
  SEGOPS_INLINE void resize_back(T* out, int64_t class_stride, int64_t stride) const {
    using V = Vec<T, lanes>;
    const Windows<T>& windows = gradient_->windows;
    const int64_t* first = p_.columns.first.data();
    const T* sums = rows_[0].data();
    for (int64_t c = 0; c < p_.s.classes; ++c, sums += p_.padded()) {
      for (int64_t j = 0; j < p_.s.w; ++j) {
        typename V::type sum{};
        const auto add = [&](const T* from, const T* weights) __attribute__((always_inline)) {
          for (int64_t x = 0; x < windows.size; x += lanes) {
            const auto weight = V::load(weights + x), part = V::load(from + x) * weight;
            sum += weight != 0 ? part : typename V::type{};  // what is beyond may be NaN
          }
        };
        if (j > 0) add(sums + first[j - 1], &windows.high[j * windows.size]);
        add(sums + first[j], &windows.low[j * windows.size]);
        out[c * class_stride + j * stride] = sum_lanes<T, lanes>(sum);
      }
    }
  }

  const Problem<T>& p_;
  Gradient<T>* gradient_;
  const int64_t item_;
  std::vector<T> rows_[2];
};

}  // namespace segops::bal
