// Mean field on the CPU. An iteration is two passes: Q is splat and blurred, block by block; then
// four rows of pixels after the other are filtered along both axes, sliced, and put through the
// softmax, which makes the next Q. The gradient goes the same way, with the adjoint filters of G.

#include "../common/cpu.h"
#include "../common/resize_cpu.h"
#include "blocks_cpu.h"

namespace segops::crf {
namespace {

// What filtered probabilities are multiplied by: 0 where there is no such kernel.
template <typename T>
struct Matrix {
  std::vector<T> values;  // (padded) if diagonal, else (classes, padded), the columns

  Matrix(const Tensor* matrix, int64_t classes, int64_t padded, bool diagonal, bool transposed)
      : values(diagonal ? padded : classes * padded) {
    const T* from = matrix ? data_of<const T>(*matrix) : nullptr;
    for (int64_t l = 0; from && l < classes; ++l)
      for (int64_t m = 0; m < classes; ++m)
        if (!diagonal)
          values[m * padded + l] = transposed ? from[m * classes + l] : from[l * classes + m];
        else if (l == m)
          values[l] = from[l * classes + l];
  }
};

template <typename T>
bool is_diagonal(const Tensor* matrix, int64_t classes) {
  bool result = true;
  const T* from = matrix ? data_of<const T>(*matrix) : nullptr;
  for (int64_t l = 0; from && l < classes; ++l)
    for (int64_t m = 0; m < classes; ++m) result &= l == m || from[l * classes + m] == 0;
  return result;
}

constexpr int64_t kStripBytes = 1 << 18;  // of the rows that a spatial filter reads at once

// Columns of a row.
struct Span {
  int64_t y, begin, width;
};

// Of an image, what all iterations take.
template <typename T>
struct Problem {
  int64_t classes, height, width;
  std::vector<Block> blocks;
  int64_t groups, strip, strips;  // of rows; of columns
  const Lattice<T>* lattice;      // null where there is no such kernel
  const Scales<T>* scales;
  std::optional<Spatial<T>> spatial;
  bool diagonal;  // both matrices
  bool adjoint;   // whether filters and matrices are
  Matrix<T> of_spatial, of_bilateral;

  // Of maps (N, C, H, W).
  template <typename Input>
  Problem(const Input& in, const Tensor& maps, const Lattice<T>* lattice, const Scales<T>* scales, bool adjoint)
      : classes(maps.size(1)),
        height(maps.size(2)),
        width(maps.size(3)),
        blocks(blocks_of(classes)),
        groups(ceil_div(height, kRows)),
        lattice(lattice),
        scales(scales),
        diagonal(is_diagonal<T>(in.spatial, classes) && is_diagonal<T>(in.bilateral, classes)),
        adjoint(adjoint),
        of_spatial(in.spatial, classes, padded(), diagonal, adjoint),
        of_bilateral(in.bilateral, classes, padded(), diagonal, adjoint) {
    const auto axis = [&](int64_t side) { return SpatialAxis<T>(side, in.spatial_sigma, in.normalization, adjoint); };
    if (in.spatial) spatial.emplace(Spatial<T>{axis(height), axis(width)});
    const int64_t reach = spatial ? spatial->rows.reach : 0, rows = kRows + 2 * reach;
    const int64_t fits = int64_t(kStripBytes) / (rows * padded() * int64_t(sizeof(T)));
    strips = ceil_div(width, std::max(fits, std::max<int64_t>(32, 8 * reach)));
    strip = ceil_div(width, strips);
  }

  int64_t pixels() const { return height * width; }
  int64_t padded() const { return crf::padded(blocks); }
  Span row(int64_t y) const { return {y, 0, width}; }
};

// A span of pixels lies as (block, width, lanes).
template <typename T>
struct Scratch {
  std::vector<T> weights, vertical, spatial, bilateral, row, q;

  Scratch(const Problem<T>& p, int64_t width)
      : vertical(p.spatial ? kRows * (width + 2 * p.spatial->columns.reach) * p.padded() : 0),
        spatial(width * p.padded()),
        bilateral(spatial),
        row(spatial),
        q(spatial) {}
};

// Calls fn(block, lanes) for each, with the lanes a constant.
template <typename T, typename F>
SEGOPS_INLINE void for_each_block(const Problem<T>& p, const F& fn) {
  for (const Block& block : p.blocks) with_lanes(block, [&](auto lanes) __attribute__((always_inline)) { fn(block, lanes); });
}

// The bilateral filter's result at a position, from z (vertices, lanes).
template <typename T, int lanes, int bytes>
SEGOPS_INLINE Row<T, lanes, bytes> sliced(const Problem<T>& p, const T* z, int64_t at) {
  using R = Row<T, lanes, bytes>;
  if (p.lattice->index[at * p.lattice->corners()] < 0) return R::filled(p.adjoint ? T(0) : std::numeric_limits<T>::quiet_NaN());
  return slice<T, lanes, bytes>(*p.lattice, z, at) * p.scales->after[at];
}

// What rows are filtered from: x, and of the bilateral filter z of the last block, and the results of
// the others, which lie as in x.
template <typename T>
struct Filtered {
  const T *x, *z, *sliced;
};

// Filters the rows of a group, in a strip, by the spatial kernel, if there is one, and calls fn(span)
// for each: then s.spatial is that one's. `item` numbers strips, and groups in each.
template <typename T, int bytes, typename F>
SEGOPS_INLINE void for_each_span(const Problem<T>& p, const T* x, int64_t item, Scratch<T>& s, const F& fn) {
  const int64_t y = item % p.groups * kRows, begin = item / p.groups * p.strip, width = std::min(p.strip, p.width - begin);
  const int64_t step = p.spatial ? width + 2 * p.spatial->columns.reach : 0;
  if (p.spatial)
    for_each_block(p, [&](const Block& block, auto lanes) __attribute__((always_inline)) {
      T* to = &s.vertical[kRows * step * block.begin];
      filter_rows<T, lanes, bytes>(*p.spatial, x + block.begin * p.pixels(), y, begin, width, s.weights, to);
    });
  for (int64_t r = 0; r < std::min(kRows, p.height - y); ++r) {
    if (p.spatial)
      for_each_block(p, [&](const Block& block, auto lanes) __attribute__((always_inline)) {
        const T* rows = &s.vertical[kRows * step * block.begin + r * step * lanes];
        filter_columns<T, lanes, bytes>(p.spatial->columns, rows, begin, width, &s.spatial[block.begin * width]);
      });
    fn(Span{y + r, begin, width});
  }
}

// s.bilateral = a span of the bilateral filter's result, if there is such a kernel.
template <typename T, int bytes>
SEGOPS_INLINE void slice_span(const Problem<T>& p, const Filtered<T>& from, const Span& span, Scratch<T>& s) {
  if (!p.lattice) return;
  const int64_t first = span.y * p.width + span.begin;
  for_each_block(p, [&](const Block& block, auto lanes) __attribute__((always_inline)) {
    T* to = &s.bilateral[block.begin * span.width];
    if (block.begin < p.blocks.back().begin)
      std::copy_n(from.sliced + block.begin * p.pixels() + first * lanes, span.width * lanes, to);
    else
      for (int64_t i = 0; i < span.width; ++i) sliced<T, lanes, bytes>(p, from.z, first + i).store(to + i * lanes);
  });
}

// s.row += spatial matrix @ s.spatial + bilateral matrix @ s.bilateral.
template <typename T, int bytes>
SEGOPS_INLINE void combine(const Problem<T>& p, int64_t width, Scratch<T>& s) {
  for_each_block(p, [&](const Block& block, auto lanes) __attribute__((always_inline)) {
    using R = Row<T, lanes, bytes>;
    T* row = &s.row[block.begin * width];
    if (p.diagonal) {
      const T *near = &s.spatial[block.begin * width], *alike = &s.bilateral[block.begin * width];
      const R of_near = R::load(&p.of_spatial.values[block.begin]), of_alike = R::load(&p.of_bilateral.values[block.begin]);
      for (int64_t i = 0; i < width * lanes; i += lanes) {
        const R sum = R::load(near + i) * of_near + R::load(alike + i) * of_alike;
        (R::load(row + i) + sum).store(row + i);
      }
      return;
    }
    const auto pixels = [&](auto count, int64_t i) __attribute__((always_inline)) {
      R sum[count];
      for (int k = 0; k < count; ++k) sum[k] = R::load(row + (i + k) * lanes);
      const auto add = [&](const Matrix<T>& matrix, const std::vector<T>& filtered) __attribute__((always_inline)) {
        for (const Block& other : p.blocks)
          for (int64_t m = other.begin; m < std::min(other.begin + other.lanes, p.classes); ++m) {
            const R column = R::load(&matrix.values[m * p.padded() + block.begin]);
            const T* x = &filtered[other.begin * width + i * other.lanes + m - other.begin];
            for (int k = 0; k < count; ++k) sum[k].add(column, x[k * other.lanes]);
          }
      };
      if (p.spatial) add(p.of_spatial, s.spatial);
      if (p.lattice) add(p.of_bilateral, s.bilateral);
      for (int k = 0; k < count; ++k) sum[k].store(row + (i + k) * lanes);
    };
    int64_t i = 0;
    for (; i + 4 <= width; i += 4) pixels(constant<4>, i);
    for (; i < width; ++i) pixels(constant<1>, i);
  });
}

// Calls fn(pixel, each) for the pixels of a span; each(f) calls f(offset, lanes, channel) for the blocks
// of the pixel, which lie at these offsets: all but the last have 32 lanes.
template <typename T, typename F>
SEGOPS_INLINE void for_each_pixel(const Problem<T>& p, int64_t width, const F& fn) {
  const auto full = int64_t(p.blocks.size()) - 1;
  with_lanes(p.blocks[full], [&](auto lanes) __attribute__((always_inline)) {
    for (int64_t i = 0; i < width; ++i)
      fn(i, [&](const auto& f) __attribute__((always_inline)) {
        for (int64_t b = 0; b < full; ++b) f(b * 32 * width + i * 32, constant<32>, b * 32);
        f(full * 32 * width + i * lanes, lanes, full * 32);
      });
  });
}

// exp(row - its maximum) of a pixel, to `to`; calls fn(maximum, sum).
template <typename T, int bytes, typename Each, typename F>
SEGOPS_INLINE void exponentials(const Each& each, const T* row, T* to, const F& fn) {
  T most = -std::numeric_limits<T>::infinity(), sum = 0;
  each([&](int64_t at, auto lanes, int64_t) __attribute__((always_inline)) {
    const T largest = Row<T, lanes, bytes>::load(row + at).max();
    most = largest > most ? largest : most;
  });
  each([&](int64_t at, auto lanes, int64_t) __attribute__((always_inline)) {
    using R = Row<T, lanes, bytes>;
    const R e = R::map([&](auto x) __attribute__((always_inline)) { return exp(x - most, T{}); }, R::load(row + at));
    e.store(to + at);
    sum += e.sum();
  });
  fn(most, sum);
}

// 0 where a number is tiny: products of such would be denormal, which take long.
template <typename V, typename T>
SEGOPS_INLINE V flushed(V x, T) {
  return x < T(kTiny) && x > -T(kTiny) ? V{} : x;
}

// Q of a span, from the logits in s.row, to memory of whole images, and to kept (pixels, classes).
template <typename T, int bytes>
SEGOPS_INLINE void write_probabilities(const Problem<T>& p, const Span& span, Scratch<T>& s, T* q, T* kept) {
  for_each_pixel(p, span.width, [&](int64_t i, const auto& each) __attribute__((always_inline)) {
    exponentials<T, bytes>(each, s.row.data(), s.q.data(), [&](T, T sum) __attribute__((always_inline)) {
      const int64_t pixel = span.y * p.width + span.begin + i;
      const T scale = 1 / sum;
      each([&](int64_t at, auto lanes, int64_t channel) __attribute__((always_inline)) {
        using R = Row<T, lanes, bytes>;
        T* to = q + channel * p.pixels() + pixel * lanes;
        const R e = R::load(&s.q[at]);
        R::map([&](auto x) __attribute__((always_inline)) { return flushed(x * scale, T{}); }, e).store(to);
        if (kept) std::copy_n(to, std::min<int64_t>(lanes, p.classes - channel), kept + pixel * p.classes + channel);
      });
    });
  });
}

// log softmax of s.row, in place.
template <typename T, int bytes>
SEGOPS_INLINE void log_probabilities(const Problem<T>& p, int64_t width, Scratch<T>& s) {
  for_each_pixel(p, width, [&](int64_t, const auto& each) __attribute__((always_inline)) {
    exponentials<T, bytes>(each, s.row.data(), s.q.data(), [&](T most, T sum) __attribute__((always_inline)) {
      const T log_sum = std::log(sum);
      each([&](int64_t at, auto lanes, int64_t) __attribute__((always_inline)) {
        using R = Row<T, lanes, bytes>;
        const auto log_q = [&](auto x) __attribute__((always_inline)) { return (x - most) - log_sum; };
        R::map(log_q, R::load(&s.row[at])).store(&s.row[at]);
      });
    });
  });
}

// A span of a map to and from the blocks of a row.
template <typename T>
void read_span(const Problem<T>& p, const View<const T>& map, int64_t image, const Span& span, T padding, T* row) {
  for (const Block& block : p.blocks)
    for (int64_t c = block.begin; c < block.begin + block.lanes; ++c) {
      T* to = row + block.begin * span.width + c - block.begin;
      const T* from = c < p.classes ? map.at(image, c, span.y, span.begin) : &padding;
      const int64_t step = c < p.classes ? map.pixel : 0;
      for (int64_t i = 0; i < span.width; ++i) to[i * block.lanes] = from[i * step];
    }
}
template <typename T>
void write_span(const Problem<T>& p, const View<T>& map, int64_t image, const Span& span, const T* row) {
  for (const Block& block : p.blocks)
    for (int64_t c = block.begin; c < std::min(block.begin + block.lanes, p.classes); ++c) {
      const T* from = row + block.begin * span.width + c - block.begin;
      T* to = map.at(image, c, span.y, span.begin);
      for (int64_t i = 0; i < span.width; ++i) to[i * map.pixel] = from[i * block.lanes];
    }
}

// A span of memory of whole images, whose blocks lie at begin * pixels, as one whose blocks lie at
// begin * width.
template <typename T>
void copy_span(const Problem<T>& p, const T* from, const Span& span, T* row) {
  for (const Block& block : p.blocks)
    std::copy_n(
        from + block.begin * p.pixels() + (span.y * p.width + span.begin) * block.lanes, span.width * block.lanes,
        row + block.begin * span.width);
}

// Logits, bilinear from a smaller map or a larger one. A logit that weighs nothing counts for nothing,
// also an infinite one. Not in registers of another instruction set, which might round otherwise.
template <typename T>
struct Logits {
  View<const T> map;
  int64_t image;
  std::optional<ResizeAxis<T>> rows, columns;  // where sizes differ

  Logits(const MeanField& in, int64_t image) : map(in.logits), image(image) {
    const int64_t height = in.images.size(2), width = in.images.size(3);
    if (in.logits.size(2) == height && in.logits.size(3) == width) return;
    rows.emplace(in.logits.size(2), height, height, in.align_corners);
    columns.emplace(in.logits.size(3), width, width, in.align_corners);
  }

  void read(const Problem<T>& p, const Span& span, T* row) const {
    const T padding = -std::numeric_limits<T>::infinity();
    if (rows)
      resize(p, span, padding, row);
    else
      read_span(p, map, image, span, padding, row);
  }

 private:
  static T mix(T a, T b, T weight) { return weight == 0 ? a : weight == 1 ? b : a * (1 - weight) + b * weight; }

  __attribute__((noinline)) void resize(const Problem<T>& p, const Span& span, T padding, T* row) const {
    for (const Block& block : p.blocks)
      for (int64_t c = block.begin; c < block.begin + block.lanes; ++c) {
        T* to = row + block.begin * span.width + c - block.begin;
        if (c >= p.classes) {
          for (int64_t i = 0; i < span.width; ++i) to[i * block.lanes] = padding;
          continue;
        }
        const T *top = map.at(image, c, rows->low[span.y], 0), *bottom = map.at(image, c, rows->high[span.y], 0);
        for (int64_t i = 0; i < span.width; ++i) {
          const int64_t x = span.begin + i, low = columns->low[x] * map.pixel, high = columns->high[x] * map.pixel;
          const T weight = columns->weight[x];
          to[i * block.lanes] =
              mix(mix(top[low], top[high], weight), mix(bottom[low], bottom[high], weight), rows->weight[span.y]);
        }
      }
  }
};

// The passes over rows. `image` numbers it in the maps.

template <typename T>
struct Start {
  const Logits<T>& logits;
  T *unary, *q, *kept;  // unary: of a single block, less each pixel's maximum; kept: (pixels, classes). Or null
};

template <typename T, int bytes>
SEGOPS_INLINE void start_rows(const Problem<T>& p, const Start<T>& job, int64_t begin, int64_t end) {
  Scratch<T> s(p, p.width);
  for (int64_t y = begin; y < end; ++y) {
    job.logits.read(p, p.row(y), s.row.data());
    if (job.unary)
      for_each_pixel(p, p.width, [&](int64_t i, const auto& each) __attribute__((always_inline)) {
        const auto at_zero = [&](auto row) __attribute__((always_inline)) {
          const T most = row.max();
          return decltype(row)::map([&](auto x) __attribute__((always_inline)) { return x - most; }, row);
        };
        each([&](int64_t at, auto lanes, int64_t channel) __attribute__((always_inline)) {
          const auto row = Row<T, lanes, bytes>::load(&s.row[at]);
          (p.blocks.size() == 1 ? at_zero(row) : row).store(job.unary + channel * p.pixels() + (y * p.width + i) * lanes);
        });
      });
    write_probabilities<T, bytes>(p, p.row(y), s, job.q, job.kept);
  }
}

template <typename T>
struct SliceBlock {
  Block block;
  const T* z;
  T* to;
};

template <typename T, int bytes>
SEGOPS_INLINE void slice_rows(const Problem<T>& p, const SliceBlock<T>& job, int64_t begin, int64_t end) {
  with_lanes(job.block, [&](auto lanes) __attribute__((always_inline)) {
    for (int64_t at = begin * p.width; at < end * p.width; ++at)
      sliced<T, lanes, bytes>(p, job.z, at).store(job.to + at * lanes);
  });
}

template <typename T>
struct Update {
  const Logits<T>& logits;
  const T* unary;    // null where logits are as easily read
  Filtered<T> from;  // the next Q may take the place of the sliced results
  T *next, *kept;    // null after the last iteration
  View<T> out;
  int64_t image;
};

// A span by diagonal matrices and a single block: nothing between the filters and Q leaves registers.
template <typename T, int lanes, int bytes>
SEGOPS_INLINE void update_pixels(const Problem<T>& p, const Update<T>& job, const Span& span, Scratch<T>& s) {
  using R = Row<T, lanes, bytes>;
  const R of_near = R::load(p.of_spatial.values.data()), of_alike = R::load(p.of_bilateral.values.data());
  const bool exact = !job.next || p.classes == 1;  // log Q near 0 keeps its digits, and one class is 0
  for (int64_t i = 0, at = span.y * p.width + span.begin; i < span.width; ++i, ++at) {
    R logits = R::load(job.unary + at * lanes) + R::load(&s.spatial[i * lanes]) * of_near;
    if (p.lattice) logits = logits + sliced<T, lanes, bytes>(p, job.from.z, at) * of_alike;
    // Finding the maximum takes longer than its exponentials. The largest of unary is 0, which what is
    // added seldom moves so far that exponentials, or probabilities above kTiny, are out of range.
    T most = 0;
    R e = R::map([](auto x) __attribute__((always_inline)) { return exp(x < T(80) ? x : decltype(x){} + T(80), T{}); }, logits);
    T sum = e.sum();
    if (exact || !(sum > T(1e-7) && sum < T(1e30))) {
      most = logits.max();
      e = R::map([&](auto x) __attribute__((always_inline)) { return exp(x - most, T{}); }, logits);
      sum = e.sum();
    }
    if (job.next) {
      const T scale = 1 / sum;
      T* to = job.next + at * lanes;
      R::map(
          [&](auto x) __attribute__((always_inline)) {
            x *= scale;
            return x < T(kTiny) ? decltype(x){} : x;
          },
          e)
          .store(to);
      if (job.kept) std::copy_n(to, p.classes, job.kept + at * p.classes);
    } else {
      const T log_sum = std::log(sum);
      R::map([&](auto x) __attribute__((always_inline)) { return (x - most) - log_sum; }, logits).store(&s.row[i * lanes]);
    }
  }
}

template <typename T, int bytes>
SEGOPS_INLINE void update_rows(const Problem<T>& p, const Update<T>& job, int64_t begin, int64_t end) {
  Scratch<T> s(p, p.strip);
  for (int64_t item = begin; item < end; ++item)
    for_each_span<T, bytes>(p, job.from.x, item, s, [&](const Span& span) __attribute__((always_inline)) {
      if (p.blocks.size() == 1 && p.diagonal) {
        with_lanes(
            p.blocks[0], [&](auto lanes) __attribute__((always_inline)) { update_pixels<T, lanes, bytes>(p, job, span, s); });
      } else {
        slice_span<T, bytes>(p, job.from, span, s);
        if (job.unary)
          copy_span(p, job.unary, span, s.row.data());
        else
          job.logits.read(p, span, s.row.data());
        combine<T, bytes>(p, span.width, s);
        if (job.next)
          write_probabilities<T, bytes>(p, span, s, job.next, job.kept);
        else
          log_probabilities<T, bytes>(p, span.width, s);
      }
      if (!job.next) write_span(p, job.out, job.image, span, s.row.data());
    });
}

// G = q (r - sum_c q r), of a span, in place of r.
template <typename T, int bytes>
SEGOPS_INLINE void through_softmax(const Problem<T>& p, int64_t width, const T* q, T* r) {
  for_each_pixel(p, width, [&](int64_t, const auto& each) __attribute__((always_inline)) {
    T dot = 0;
    each([&](int64_t at, auto lanes, int64_t) __attribute__((always_inline)) {
      using R = Row<T, lanes, bytes>;
      dot += (R::load(q + at) * R::load(r + at)).sum();
    });
    each([&](int64_t at, auto lanes, int64_t) __attribute__((always_inline)) {
      using R = Row<T, lanes, bytes>;
      const auto grad = [&](auto a, auto b) __attribute__((always_inline)) { return flushed(a * (b - dot), T{}); };
      R::map(grad, R::load(q + at), R::load(r + at)).store(r + at);
    });
  });
}

template <typename T>
struct StartGrad {
  View<const T> grad, out;
  int64_t image;
  T *g, *total;  // G, and the sum of all so far
};

template <typename T, int bytes>
SEGOPS_INLINE void start_grad_rows(const Problem<T>& p, const StartGrad<T>& job, int64_t begin, int64_t end) {
  Scratch<T> s(p, p.width);
  for (int64_t y = begin; y < end; ++y) {
    read_span(p, job.grad, job.image, p.row(y), T(0), s.row.data());
    read_span(p, job.out, job.image, p.row(y), -std::numeric_limits<T>::infinity(), s.q.data());
    for_each_pixel(p, p.width, [&](int64_t i, const auto& each) __attribute__((always_inline)) {
      T sum = 0;
      each([&](int64_t at, auto lanes, int64_t)
               __attribute__((always_inline)) { sum += Row<T, lanes, bytes>::load(&s.row[at]).sum(); });
      each([&](int64_t at, auto lanes, int64_t channel) __attribute__((always_inline)) {
        using R = Row<T, lanes, bytes>;
        const auto grad = [&](auto g, auto log_q)
                              __attribute__((always_inline)) { return flushed(g - exp(log_q, T{}) * sum, T{}); };
        const R row = R::map(grad, R::load(&s.row[at]), R::load(&s.q[at]));
        const int64_t to = channel * p.pixels() + (y * p.width + i) * lanes;
        row.store(job.g + to);
        row.store(job.total + to);
      });
    });
  }
}

template <typename T>
struct UpdateGrad {
  Filtered<T> from;
  const T* q;  // (pixels, classes)
  T *next, *total;
  double *spatial, *bilateral;  // (classes, padded), added to; null what is not wanted
};

// sums (classes, padded) += sum over the pixels of a span of a b^T.
template <typename T, int bytes>
SEGOPS_INLINE void add_outer_product(const Problem<T>& p, int64_t width, const T* a, const T* b, double* sums) {
  for_each_block(p, [&](const Block& block, auto lanes) __attribute__((always_inline)) {
    using R = Row<T, lanes, bytes>;
    const T* row = b + block.begin * width;
    for (const Block& other : p.blocks)
      for (int64_t l = other.begin; l < std::min(other.begin + other.lanes, p.classes); ++l) {
        const T* x = a + other.begin * width + l - other.begin;
        R sum[4] = {R::zero(), R::zero(), R::zero(), R::zero()};
        int64_t i = 0;
        for (; i + 4 <= width; i += 4)
          for (int k = 0; k < 4; ++k) sum[k].add(R::load(row + (i + k) * lanes), x[(i + k) * other.lanes]);
        for (; i < width; ++i) sum[0].add(R::load(row + i * lanes), x[i * other.lanes]);
        T total[lanes];
        ((sum[0] + sum[1]) + (sum[2] + sum[3])).store(total);
        for (int k = 0; k < lanes; ++k) sums[l * p.padded() + block.begin + k] += double(total[k]);
      }
  });
}

template <typename T, int bytes>
SEGOPS_INLINE void update_grad_rows(const Problem<T>& p, const UpdateGrad<T>& job, int64_t begin, int64_t end) {
  Scratch<T> s(p, p.strip);
  for (int64_t item = begin; item < end; ++item)
    for_each_span<T, bytes>(p, job.from.x, item, s, [&](const Span& span) __attribute__((always_inline)) {
      slice_span<T, bytes>(p, job.from, span, s);
      const int64_t first = span.y * p.width + span.begin, width = span.width;
      for (const Block& block : p.blocks) {
        const int64_t used = std::min(block.lanes, p.classes - block.begin);
        const T* q = job.q + first * p.classes + block.begin;
        T* to = &s.q[block.begin * width];
        for (int64_t i = 0; i < width; ++i) std::copy_n(q + i * p.classes, used, to + i * block.lanes);
      }
      if (job.spatial) add_outer_product<T, bytes>(p, width, s.spatial.data(), s.q.data(), job.spatial);
      if (job.bilateral) add_outer_product<T, bytes>(p, width, s.bilateral.data(), s.q.data(), job.bilateral);
      std::fill_n(s.row.data(), width * p.padded(), T(0));
      combine<T, bytes>(p, width, s);
      through_softmax<T, bytes>(p, width, s.q.data(), s.row.data());
      for_each_block(p, [&](const Block& block, auto lanes) __attribute__((always_inline)) {
        using R = Row<T, lanes, bytes>;
        const int64_t at = block.begin * p.pixels() + first * lanes;
        for (int64_t i = 0; i < width * lanes; i += lanes) {
          const R row = R::load(&s.row[block.begin * width + i]);
          row.store(job.next + at + i);
          (R::load(job.total + at + i) + row).store(job.total + at + i);
        }
      });
    });
}

#define SEGOPS_MEAN_FIELD(target, bytes, T)                                                    \
  target void run(const Problem<T>& p, const Start<T>& job, int64_t begin, int64_t end) {      \
    start_rows<T, bytes>(p, job, begin, end);                                                  \
  }                                                                                            \
  target void run(const Problem<T>& p, const SliceBlock<T>& job, int64_t begin, int64_t end) { \
    slice_rows<T, bytes>(p, job, begin, end);                                                  \
  }                                                                                            \
  target void run(const Problem<T>& p, const Update<T>& job, int64_t begin, int64_t end) {     \
    update_rows<T, bytes>(p, job, begin, end);                                                 \
  }                                                                                            \
  target void run(const Problem<T>& p, const StartGrad<T>& job, int64_t begin, int64_t end) {  \
    start_grad_rows<T, bytes>(p, job, begin, end);                                             \
  }                                                                                            \
  target void run(const Problem<T>& p, const UpdateGrad<T>& job, int64_t begin, int64_t end) { \
    update_grad_rows<T, bytes>(p, job, begin, end);                                            \
  }
#define SEGOPS_MEAN_FIELD_OF_ALL(target, bytes) SEGOPS_MEAN_FIELD(target, bytes, float) SEGOPS_MEAN_FIELD(target, bytes, double)
SEGOPS_WIDTHS(SEGOPS_MEAN_FIELD_OF_ALL)
#undef SEGOPS_MEAN_FIELD_OF_ALL
#undef SEGOPS_MEAN_FIELD

// A pass over `count` rows, or groups of rows, by all threads.
template <typename T, typename Job>
void run_rows(const Problem<T>& p, const Job& job, int64_t count) {
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { run(p, job, begin, end); });
}

// The bilateral filter of x, up to the slice of the last block.
template <typename T>
void splat_blocks(const Problem<T>& p, const T* x, T* z, T* sliced) {
  if (!p.lattice) return;
  for (const Block& block : p.blocks) {
    splat_and_blur(*p.lattice, p.scales->shares, block, p.adjoint, x + block.begin * p.pixels(), z);
    if (block.begin < p.blocks.back().begin) run_rows(p, SliceBlock<T>{block, z, sliced + block.begin * p.pixels()}, p.height);
  }
}

// x, y and the levels of an image of K channels in units of their standard deviations.
template <typename L>
Features image_features(const MeanField& in, int64_t image) {
  const View<const L> levels(in.images);
  const int64_t width = in.images.size(3), channels = in.images.size(1);
  const double position = in.position_sigma, intensity = in.intensity_sigma;
  return [=](int64_t begin, int64_t count, double* f) {
    for (int64_t t = 0, x = begin % width, y = begin / width; t < count; ++t) {
      f[t] = double(x);
      f[kTile + t] = double(y);
      const L* from = levels.at(image, 0, y, x);
      for (int64_t c = 0; c < channels; ++c) f[(c + 2) * kTile + t] = double(from[c * levels.channel]);
      if (++x == width) {
        x = 0;
        ++y;
      }
    }
    // Of a small sigma no more than the largest feature; what is not finite stays so.
    const auto divide = [f](int64_t from, int64_t to, double sigma) {
      for (int64_t t = from; t < to; ++t) {
        const bool finite = std::abs(f[t]) <= std::numeric_limits<double>::max();
        const double quotient = f[t] / sigma;
        const double bounded = quotient > kMaxFeature ? kMaxFeature : quotient < -kMaxFeature ? -kMaxFeature : quotient;
        f[t] = finite ? bounded : quotient;
      }
    };
    divide(0, 2 * kTile, position);
    divide(2 * kTile, (2 + channels) * kTile, intensity);
  };
}

Features features_of(const MeanField& in, int64_t image) {
  Features result;
  if (in.images.scalar_type() == ScalarType::Byte)
    result = image_features<uint8_t>(in, image);
  else
    dispatch<float, double>(in.images, "dense_crf", [&](auto type) { result = image_features<decltype(type)>(in, image); });
  return result;
}

template <typename T>
void infer(const MeanField& in, int64_t image, const Tensor& out, const Kept* kept) {
  const int64_t classes = in.logits.size(1), pixels = in.images.size(2) * in.images.size(3), dims = in.images.size(1) + 2;
  std::optional<OwnLattice<T>> lattice;
  std::optional<Scales<T>> scales;
  if (in.bilateral) {
    int32_t* indices = kept ? data_of<int32_t>(kept->indices) + image * kept_indices(pixels, dims) : nullptr;
    T* weights = kept ? data_of<T>(kept->weights) + image * kept_weights(pixels, dims) : nullptr;
    lattice.emplace(build_lattice<T>(features_of(in, image), pixels, dims, indices, weights));
    T *const own = kept ? weights : lattice->own_weights.get(), *const total = own + 2 * pixels * (dims + 1);
    filter_ones(*lattice, total);
    scales.emplace(*lattice, total, in.normalization, false, own + pixels * (dims + 1));
  }
  const Problem<T> p(in, out, lattice ? &*lattice : nullptr, scales ? &*scales : nullptr, false);
  const int64_t padded = p.padded();
  const Logits<T> logits(in, image);
  const Memory<T> z = memory<T>(lattice ? p.blocks[0].lanes * lattice->vertices : 0);
  const Memory<T> unary = p.blocks.size() == 1 || logits.rows ? memory<T>(padded * pixels) : nullptr;
  // Rows read their neighbours' Q: the next one goes elsewhere.
  Memory<T> q = memory<T>(padded * pixels), next = memory<T>(padded * pixels);
  T* keep = kept ? data_of<T>(kept->q) + image * in.iterations * pixels * classes : nullptr;
  run_rows(p, Start<T>{logits, unary.get(), q.get(), keep}, p.height);
  for (int64_t k = 0; k < in.iterations; ++k) {
    const bool last = k + 1 == in.iterations;
    if (keep) keep += pixels * classes;
    splat_blocks(p, q.get(), z.get(), next.get());
    run_rows(
        p,
        Update<T>{
            logits,
            unary.get(),
            {q.get(), z.get(), next.get()},
            last ? nullptr : next.get(),
            last ? nullptr : keep,
            View<T>(out),
            image},
        p.strips * p.groups);
    std::swap(q, next);
  }
}

template <typename T>
void infer_grad(const MeanFieldGrad& in, int64_t image, const Tensor& logits, double* of_spatial, double* of_bilateral) {
  const int64_t classes = in.out.size(1), height = in.out.size(2), width = in.out.size(3), pixels = height * width;
  const int64_t iterations = in.kept.q.size(1);
  std::optional<Lattice<T>> lattice;
  std::optional<Scales<T>> scales;
  Memory<T> shares;
  if (in.bilateral) {
    const T* weights = data_of<const T>(in.kept.weights) + image * kept_weights(pixels, in.dims);
    lattice.emplace(kept_lattice(
        data_of<const int32_t>(in.kept.indices) + image * kept_indices(pixels, in.dims), weights, pixels, in.dims));
    // Those of a symmetric filter were scaled when the lattice was built.
    if (in.normalization == Normalization::kAfter) shares = memory<T>(pixels * (in.dims + 1));
    scales.emplace(*lattice, weights + 2 * pixels * (in.dims + 1), in.normalization, true, shares.get());
  }
  const Problem<T> p(in, in.out, lattice ? &*lattice : nullptr, scales ? &*scales : nullptr, true);
  const int64_t padded = p.padded();

  // The gradients of the matrices are sums over slices of the image, however many threads there are.
  const int64_t items = p.strips * p.groups, slices = std::min<int64_t>(items, 16), entries = classes * padded;
  std::vector<double> spatial_sums(of_spatial ? slices * entries : 0), bilateral_sums(of_bilateral ? slices * entries : 0);
  const Memory<T> total = memory<T>(padded * pixels), z = memory<T>(lattice ? p.blocks[0].lanes * lattice->vertices : 0);
  Memory<T> g = memory<T>(padded * pixels), next = memory<T>(padded * pixels);
  run_rows(p, StartGrad<T>{View<const T>(in.grad), View<const T>(in.out), image, g.get(), total.get()}, height);
  for (int64_t k = iterations; k-- > 0;) {
    const T* q = data_of<const T>(in.kept.q) + (image * iterations + k) * pixels * classes;
    splat_blocks(p, g.get(), z.get(), next.get());
    parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s)
        run(p,
            UpdateGrad<T>{
                {g.get(), z.get(), next.get()},
                q,
                next.get(),
                total.get(),
                of_spatial ? &spatial_sums[s * entries] : nullptr,
                of_bilateral ? &bilateral_sums[s * entries] : nullptr},
            s * items / slices, (s + 1) * items / slices);
    });
    std::swap(g, next);
  }
  const View<T> to(logits);
  parallel_for(0, height, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> row(padded * width);
    for (int64_t y = begin; y < end; ++y) {
      copy_span(p, total.get(), p.row(y), row.data());
      write_span(p, to, image, p.row(y), row.data());
    }
  });
  const auto join = [&](const std::vector<double>& sums, double* matrix) {
    for (int64_t s = 0; matrix && s < slices; ++s)
      for (int64_t l = 0; l < classes; ++l)
        for (int64_t m = 0; m < classes; ++m) matrix[l * classes + m] += sums[s * entries + l * padded + m];
  };
  join(spatial_sums, of_spatial);
  join(bilateral_sums, of_bilateral);
}

}  // namespace

void mean_field(const MeanField& in, const Tensor& out, const Kept* kept) {
  dispatch<float, double>(in.logits, "dense_crf", [&](auto type) {
    for_each_image(out.size(0), out.size(2) * out.size(3), [&](int64_t image) { infer<decltype(type)>(in, image, out, kept); });
  });
}

void mean_field_grad(const MeanFieldGrad& in, const Tensor& logits, const Tensor* spatial, const Tensor* bilateral) {
  dispatch<float, double>(in.out, "dense_crf", [&](auto type) {
    using T = decltype(type);
    const int64_t n = in.out.size(0), entries = in.out.size(1) * in.out.size(1);
    // By images, then in their order.
    std::vector<double> sums(2 * n * entries);
    for_each_image(n, in.out.size(2) * in.out.size(3), [&](int64_t image) {
      double* of = &sums[2 * image * entries];
      infer_grad<T>(in, image, logits, spatial ? of : nullptr, bilateral ? of + entries : nullptr);
    });
    const auto write = [&](const Tensor* matrix, int64_t offset) {
      for (int64_t e = 0; matrix && e < entries; ++e) {
        double sum = 0;
        for (int64_t image = 0; image < n; ++image) sum += sums[2 * image * entries + offset + e];
        data_of<T>(*matrix)[e] = T(sum);
      }
    };
    write(spatial, 0);
    write(bilateral, entries);
  });
}

}  // namespace segops::crf
