// argmax.h on the CPU.
//
// An item of work is a row of logits and the output rows between it and the next, cell by cell. A
// cell whose four corners agree is filled. In another, a class is skipped if its largest corner is
// below the largest per-class minimum; the rest are interpolated, a vector of pixels at a time.

#include "argmax.h"

#include "../common/cpu.h"
#include "../common/resize_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace segops::argmax {
namespace {

constexpr int kPadding = 16;  // rows are padded to whole vectors of the widest

// Whether a takes the place of b, which came before it.
template <typename T>
bool larger(T a, T b) {
  return a > b || (a != a && b == b);
}

// best[x] = the largest class of column x of row (classes, step), as argmax.h has it.
template <typename T, int bytes>
SEGOPS_INLINE void best_of_row(const T* row, int64_t classes, int64_t w, int64_t step, int32_t* best) {
  constexpr int lanes = kLanes<T, bytes>;
  using V = Vec<T, lanes>;
  for (int64_t begin = 0; begin < w; begin += lanes) {
    typename V::type largest = V::load(row + begin), zero = largest * 0;  // NaN if a value is not finite
    typename vector_of<Integer<T>, lanes>::type index{};
    for (int64_t c = 1; c < classes; ++c) {
      const typename V::type value = V::load(row + c * step + begin);
      index = value > largest ? index * 0 + Integer<T>(c) : index;
      largest = value > largest ? value : largest;
      zero += value * 0;
    }
    const int64_t end = std::min(begin + lanes, w);
    for (int64_t x = begin; x < end; ++x) {
      best[x] = int32_t(index[x - begin]);
      if (zero[x - begin] == 0) continue;
      int64_t k = 0;
      for (int64_t c = 1; c < classes; ++c)
        if (larger(row[c * step + x], row[k * step + x])) k = c;
      best[x] = int32_t(row[k * step + x] <= std::numeric_limits<T>::max() ? k : ~k);
    }
  }
}

// A row of logits, pixel by pixel; classes are padded with the lowest number.
template <typename T>
struct Pixels {
  int64_t classes, step;
  std::vector<T> values;
  bool finite = true;

  Pixels(int64_t w, int64_t classes)
      : classes(classes), step(round_up(classes, kPadding)), values(w * step, std::numeric_limits<T>::lowest()) {}
  const T* at(int64_t x) const { return values.data() + x * step; }
};

// The classes that can be largest somewhere between four corners, each with its corners.
template <typename T>
struct Candidates {
  struct Corners {
    T upper_left, upper_right, lower_left, lower_right;
  };
  std::vector<Corners> corners;
  std::vector<int32_t> classes;
  std::vector<T> maxima;  // room for the largest corner of every class
  int64_t count = 0;
  bool finite = true;

  explicit Candidates(int64_t count) : corners(count), classes(count), maxima(round_up(count, kPadding)) {}

  // Between columns j and right of two rows.
  template <int bytes>
  SEGOPS_INLINE void find(const Pixels<T>& above, const Pixels<T>& below, int64_t j, int64_t right) {
    constexpr int lanes = kLanes<T, bytes>;
    using V = Vec<T, lanes>;
    const T *a = above.at(j), *b = above.at(right), *c = below.at(j), *d = below.at(right);
    typename V::type floors = typename V::type{} + std::numeric_limits<T>::lowest();
    for (int64_t k = 0; k < above.step; k += lanes) {
      const typename V::type p = V::load(a + k), q = V::load(b + k), r = V::load(c + k), s = V::load(d + k);
      const typename V::type upper = p < q ? p : q, lower = r < s ? r : s, least = upper < lower ? upper : lower;
      floors = least > floors ? least : floors;
      const typename V::type top = p > q ? p : q, bottom = r > s ? r : s;
      V::store(maxima.data() + k, top > bottom ? top : bottom);
    }
    T floor = floors[0];
    for (int i = 1; i < lanes; ++i) floor = std::max(floor, T(floors[i]));
    finite = above.finite && below.finite;
    count = 0;
    for (int64_t k = 0; k < above.classes; ++k) {
      if (finite && maxima[k] < floor) continue;
      corners[count] = {a[k], b[k], c[k], d[k]};
      classes[count++] = int32_t(k);
    }
  }
};

template <typename T>
struct Cell {
  const Candidates<T>& candidates;
  const T* wx;  // of n columns
  int64_t n;
  const T* wy;  // of the rows
  int64_t rows;
  int64_t* out;
  int64_t width;
};

template <typename T, int bytes>
SEGOPS_INLINE void fill_cell(const Cell<T>& cell, T* tops) {
  constexpr int lanes = kLanes<T, bytes>;
  using V = Vec<T, lanes>;
  using Value = typename V::type;
  const Candidates<T>& candidates = cell.candidates;
  for (int64_t x = 0; x < cell.n; x += lanes) {
    const Value right = V::load(cell.wx + x), left = 1 - right;
    for (int64_t k = 0; k < candidates.count; ++k) {
      const auto c = candidates.corners[k];
      V::store(tops + 2 * k * lanes, left * c.upper_left + right * c.upper_right);
      V::store(tops + (2 * k + 1) * lanes, left * c.lower_left + right * c.lower_right);
    }
    const int64_t count = std::min<int64_t>(lanes, cell.n - x);
    for (int64_t y = 0; y < cell.rows; ++y) {
      const T lower = cell.wy[y], upper = 1 - lower;
      Value largest = V::load(tops) * upper + V::load(tops + lanes) * lower;
      auto index = typename vector_of<Integer<T>, lanes>::type{} + Integer<T>(candidates.classes[0]);
      const T* at = tops + 2 * lanes;
      for (int64_t k = 1; k < candidates.count; ++k, at += 2 * lanes) {
        const Value value = V::load(at) * upper + V::load(at + lanes) * lower;
        index = value > largest ? index * 0 + Integer<T>(candidates.classes[k]) : index;
        largest = value > largest ? value : largest;
      }
      int64_t* to = cell.out + y * cell.width + x;
      for (int64_t i = 0; i < count; ++i) to[i] = index[i];
    }
  }
}

// The same where a corner is infinite or NaN, pixel by pixel: what weighs nothing is not looked at,
// as zero times infinity is NaN.
template <typename T>
void fill_special(const Cell<T>& cell) {
  const auto between = [](T low, T high, T weight) { return weight == 0 ? low : (1 - weight) * low + weight * high; };
  for (int64_t y = 0; y < cell.rows; ++y)
    for (int64_t x = 0; x < cell.n; ++x) {
      T largest = 0;
      int64_t index = -1;
      for (int64_t k = 0; k < cell.candidates.count; ++k) {
        const auto c = cell.candidates.corners[k];
        const T top = between(c.upper_left, c.upper_right, cell.wx[x]);
        const T value = between(top, between(c.lower_left, c.lower_right, cell.wx[x]), cell.wy[y]);
        if (index >= 0 && !larger(value, largest)) continue;
        largest = value;
        index = cell.candidates.classes[k];
      }
      cell.out[y * cell.width + x] = index;
    }
}

template <typename T>
struct Rows {
  const Pixels<T>&above, &below;
  const int32_t *best_above, *best_below;  // (w)
  int64_t w;
  const ResizeAxis<T>& columns;
  const T* wy;  // of the output rows
  int64_t rows;
  int64_t* out;
  int64_t width;
};

// The output rows between two rows of logits; `tops` is room for two vectors per class.
template <typename T, int bytes>
SEGOPS_INLINE void fill_rows(const Rows<T>& r, Candidates<T>& candidates, T* tops) {
  for (int64_t j = 0; j < r.w;) {
    const int64_t right = std::min(j + 1, r.w - 1);
    const int32_t same = r.best_above[j];
    if (same >= 0 && same == r.best_above[right] && same == r.best_below[j] && same == r.best_below[right]) {
      // A run of cells that agree is one fill.
      int64_t end = j + 1;
      while (end < r.w) {
        const int64_t next = std::min(end + 1, r.w - 1);
        if (r.best_above[next] != same || r.best_below[next] != same) break;
        ++end;
      }
      const int64_t x = r.columns.first[j], n = r.columns.first[end] - x;
      for (int64_t y = 0; y < r.rows; ++y) std::fill_n(r.out + y * r.width + x, n, int64_t(same));
      j = end;
      continue;
    }
    const int64_t x = r.columns.first[j], n = r.columns.first[j + 1] - x;
    if (n > 0) {
      candidates.template find<bytes>(r.above, r.below, j, right);
      const Cell<T> cell{candidates, r.columns.weight.data() + x, n, r.wy, r.rows, r.out + x, r.width};
      if (candidates.finite)
        fill_cell<T, bytes>(cell, tops);
      else
        fill_special(cell);
    }
    ++j;
  }
}

#define SEGOPS_ARGMAX(target, bytes, T)                                                        \
  target void best_of(const T* row, int64_t classes, int64_t w, int64_t step, int32_t* best) { \
    best_of_row<T, bytes>(row, classes, w, step, best);                                        \
  }                                                                                            \
  target void fill(const Rows<T>& rows, Candidates<T>& candidates, T* tops) {                  \
    fill_rows<T, bytes>(rows, candidates, tops);                                               \
  }
#define SEGOPS_ARGMAX_OF_ALL(target, bytes) SEGOPS_ARGMAX(target, bytes, float) SEGOPS_ARGMAX(target, bytes, double)
SEGOPS_WIDTHS(SEGOPS_ARGMAX_OF_ALL)
#undef SEGOPS_ARGMAX_OF_ALL
#undef SEGOPS_ARGMAX

// Row i of an image's logits as (classes, step); where pixels are contiguous a copy per class.
template <typename T>
void read_row(const View<const T>& logits, const Shape& s, int64_t image, int64_t i, int64_t step, T* row) {
  const T* from = logits.at(image, 0, i, 0);
  const int64_t classes = s.classes, w = s.w, channel = logits.channel, pixel = logits.pixel;
  if (pixel == 1) {
    for (int64_t c = 0; c < classes; ++c) std::copy_n(from + c * channel, w, row + c * step);
  } else {
    for (int64_t x = 0; x < w; ++x)
      for (int64_t c = 0; c < classes; ++c) row[c * step + x] = from[x * pixel + c * channel];
  }
}

template <typename T>
void read_pixels(const View<const T>& logits, int64_t image, int64_t i, int64_t w, Pixels<T>& row) {
  const T* from = logits.at(image, 0, i, 0);
  const int64_t channel = logits.channel, pixel = logits.pixel;
  bool finite = true;
  for (int64_t x = 0; x < w; ++x) {
    T* to = row.values.data() + x * row.step;
    for (int64_t c = 0; c < row.classes; ++c) {
      to[c] = from[x * pixel + c * channel];
      finite &= std::abs(to[c]) <= std::numeric_limits<T>::max();
    }
  }
  row.finite = finite;
}

}  // namespace

void upsample(const Tensor& logits, const Tensor& best, const Tensor& out) {
  const Shape s = check(logits, best, out);
  int32_t* bests = data_of<int32_t>(best);
  int64_t* to = data_of<int64_t>(out);
  dispatch<float, double>(logits, "upsample_argmax", [&](auto type) {
    using T = decltype(type);
    const View<const T> view(logits);
    const int64_t step = round_up(s.w, kPadding), grain = std::max<int64_t>(1, 32768 / (s.classes * s.w));
    parallel_for(0, s.images * s.h, grain, [&](int64_t begin, int64_t end) {
      std::vector<T> row(s.classes * step);
      for (int64_t r = begin; r < end; ++r) {
        read_row(view, s, r / s.h, r % s.h, step, row.data());
        best_of(row.data(), s.classes, s.w, step, bests + r * s.w);
        if (!s.resized()) std::transform(bests + r * s.w, bests + (r + 1) * s.w, to + r * s.w, class_of_best);
      }
    });
    if (!s.resized()) return;

    const ResizeAxis<T> rows(s.h, s.height, s.height), columns(s.w, s.width, s.width + kPadding);
    parallel_for(0, s.images * s.h, 1, [&](int64_t begin, int64_t end) {
      Pixels<T> above(s.w, s.classes), below(s.w, s.classes);
      std::vector<T> tops(2 * s.classes * kPadding);
      Candidates<T> candidates(s.classes);
      int64_t row_below = -1;  // what `below` has been read from
      for (int64_t r = begin; r < end; ++r) {
        const int64_t image = r / s.h, i = r % s.h, next = i + 1 < s.h ? r + 1 : r;
        const int64_t first = rows.first[i], count = rows.first[i + 1] - first;
        if (count == 0) continue;
        if (row_below == r)
          std::swap(above, below);
        else
          read_pixels(view, image, i, s.w, above);
        read_pixels(view, image, next % s.h, s.w, below);
        row_below = next;
        fill(
            {above, below, bests + r * s.w, bests + next * s.w, s.w, columns, rows.weight.data() + first, count,
             to + (image * s.height + first) * s.width, s.width},
            candidates, tops.data());
      }
    });
  });
}

}  // namespace segops::argmax
