// count_edges, blur and normalise on the CPU: the edges of the rows that a strip of outputs needs,
// resized along y and then along x; the blur as two sums of rows, along x and then along y.

#include "../common/cpu.h"
#include "labels_cpu.h"

#include <algorithm>
#include <atomic>
#include <limits>

namespace segops::bal {
namespace {

// out[x] = distinct classes among a row's pixel x and its right and lower neighbours; 0 if all
// agree.
SEGOPS_INLINE void count_row(const int32_t* row, const int32_t* lower, int64_t width, float* out) {
  const auto count = [](int32_t a, int32_t b, int32_t c) __attribute__((always_inline)) {
    const int32_t distinct = (a >= 0) + ((b >= 0) & (b != a)) + ((c >= 0) & (c != a) & (c != b));
    return (a == b) & (a == c) ? 0.f : float(distinct);
  };
  for (int64_t x = 0; x + 1 < width; ++x) out[x] = count(row[x], row[x + 1], lower[x]);
  out[width - 1] = count(row[width - 1], row[width - 1], lower[width - 1]);
}

// The taps of one output of an antialiased resize: source[first + k], k < count, weighs
// triangle(k), over their sum.
struct Antialias {
  double scale, start;  // source pixels per output, and from the output's centre to the first tap's
  int64_t first, count;

  Antialias(int64_t i, int64_t in, int64_t out) : scale(double(in) / double(out)) {
    const double centre = (double(i) + 0.5) * scale;
    const int64_t begin = int64_t(centre - scale + 0.5), end = int64_t(centre + scale + 0.5);
    first = begin > 0 ? begin : 0;
    count = (end < in ? end : in) - first;
    start = double(first) + 0.5 - centre;
  }
  double triangle(int64_t k) const {
    const double distance = fabs(start + double(k)) / scale;
    return distance < 1 ? 1 - distance : 0;
  }
};

// One axis of an antialiased resize: output i sums weight[offset[i] + k] * in[first[i] + k].
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
  Labels labels;
  int64_t height, width, h, w;
  Taps rows, columns;
  float beta;
};

// Rows [begin, end) of one image's edge counts, resized, to `out` (h, w): along y first, whose sums
// are vectors. Without a resize each output has one tap, which weighs 1. Returns whether a label
// was wrong.
SEGOPS_MULTIVERSION bool edge_rows(const EdgeProblem& p, int64_t image, int64_t begin, int64_t end, float* out) {
  const int64_t first = p.rows.first[begin], last = p.rows.first[end - 1] + p.rows.count(end - 1), width = p.width;
  std::vector<int32_t> row(width), lower(width);
  std::vector<float> counts((last - first) * width), column(width);
  bool wrong = false;
  const auto read = [&](int64_t y, std::vector<int32_t>& to) __attribute__((always_inline)) {
    read_classes(p.labels, (image * p.height + std::min(y, p.height - 1)) * width, width, to.data());
  };
  read(first, row);
  for (int64_t y = first; y < last; ++y) {
    read(y + 1, lower);
    float* to = &counts[(y - first) * width];
    count_row(row.data(), lower.data(), width, to);
    int32_t lowest = 0;
    for (int64_t x = 0; x < width; ++x) lowest = std::min(lowest, row[x]);
    if (lowest == kWrong) {
      std::fill(to, to + width, std::numeric_limits<float>::quiet_NaN());
      wrong = true;
    }
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
      out[i * p.w + j] = sum + p.beta;
    }
  }
  return wrong;
}

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

}  // namespace

bool count_edges(const Tensor& labels, const Tensor& out, int64_t classes, int64_t ignore_index, double beta) {
  const int64_t height = labels.size(1), width = labels.size(2), h = out.size(1), w = out.size(2);
  const Labels values(labels, classes, ignore_index, "bal_edge");
  const EdgeProblem p{values, height, width, h, w, Taps(height, h), Taps(width, w), float(beta)};
  const int64_t strip = 8, strips = ceil_div(h, strip);
  float* to = data_of<float>(out);
  std::atomic<bool> wrong{false};
  parallel_for(0, labels.size(0) * strips, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % strips * strip;
      if (edge_rows(p, item / strips, first, std::min(first + strip, h), to + item / strips * h * w)) wrong = true;
    }
  });
  return wrong;
}

void blur(const Tensor& edges, const BlurKernel& kernel, double beta, const Tensor& scratch) {
  const int64_t h = edges.size(1), w = edges.size(2), count = edges.size(0) * h, size = kernel.size;
  float* map = data_of<float>(edges);
  float* along_x = data_of<float>(scratch);
  float* factor = along_x + 2 * edges.numel();
  for (int64_t k = 0; k <= size / 2; ++k) kernel.write(k, factor);
  const int64_t grain = std::max<int64_t>(1, 100000 / (w * size));
  parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t pair = 0; pair < 2; ++pair) {
        float* filtered = along_x + (pair * count + row) * w;
        std::fill(filtered, filtered + w, 0.f);
        blur_row(map + row * w, w, factor + (2 * pair + 1) * size, size, filtered);
      }
    }
  });
  parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* to = map + row * w;
      std::fill(to, to + w, 0.f);
      const int64_t y = row % h;
      for (int64_t pair = 0; pair < 2; ++pair)
        for (int64_t k = std::max<int64_t>(0, size / 2 - y); k < std::min(size, h - y + size / 2); ++k)
          add_row(along_x + (pair * count + row + k - size / 2) * w, w, factor[2 * pair * size + k], to);
      for (int64_t x = 0; x < w; ++x) to[x] += float(beta);
    }
  });
}

void normalise(const Tensor& edges, const Tensor& by, bool mean, double beta) {
  const int64_t images = edges.size(0), plane = edges.size(1) * edges.size(2);
  const float* divisors = data_of<const float>(by);
  float* map = data_of<float>(edges);
  for (int64_t image = 0; image < images; ++image, map += plane)
    for (int64_t i = 0; i < plane; ++i) map[i] = normalised(map[i], divisors[image], mean, float(beta));
}

}  // namespace segops::bal
