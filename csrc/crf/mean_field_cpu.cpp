// Mean field on the CPU. An iteration is two passes: Q is splat and blurred, block by block; then
// four rows of pixels after the other are filtered along both axes, sliced, and put through the
// softmax, which makes the next Q. The gradient goes the same way, with the adjoint filters of G.

#include "../common/cpu.h"
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

// Of an image, what all iterations take.
template <typename T>
struct Problem {
  int64_t classes, height, width;
  std::vector<Block> blocks;
  const Lattice<T>* lattice;  // null where there is no such kernel
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
        lattice(lattice),
        scales(scales),
        diagonal(is_diagonal<T>(in.spatial, classes) && is_diagonal<T>(in.bilateral, classes)),
        adjoint(adjoint),
        of_spatial(in.spatial, classes, padded(), diagonal, adjoint),
        of_bilateral(in.bilateral, classes, padded(), diagonal, adjoint) {
    const auto axis = [&](int64_t side) { return SpatialAxis<T>(side, in.spatial_sigma, in.normalization, adjoint); };
    if (in.spatial) spatial.emplace(Spatial<T>{axis(height), axis(width)});
  }

  int64_t pixels() const { return height * width; }
  int64_t padded() const { return crf::padded(blocks); }
};

// A row of pixels lies as (block, width, lanes).
template <typename T>
struct Scratch {
  std::vector<T> weights, vertical, spatial, bilateral, row, q;

  explicit Scratch(const Problem<T>& p)
      : vertical(p.spatial ? kRows * (p.width + 2 * p.spatial->columns.reach) * p.padded() : 0),
        spatial(p.width * p.padded()),
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

// Filters rows y .. y + kRows by the spatial kernel, if there is one, and calls fn(row) for each: then
// s.spatial is that row's.
template <typename T, int bytes, typename F>
SEGOPS_INLINE void for_each_row(const Problem<T>& p, const T* x, int64_t y, Scratch<T>& s, const F& fn) {
  const int64_t step = p.spatial ? p.width + 2 * p.spatial->columns.reach : 0;
  if (p.spatial)
    for_each_block(p, [&](const Block& block, auto lanes) __attribute__((always_inline)) {
      T* to = &s.vertical[kRows * step * block.begin];
      filter_rows<T, lanes, bytes>(*p.spatial, x + block.begin * p.pixels(), y, s.weights, to);
    });
  for (int64_t r = 0; r < std::min(kRows, p.height - y); ++r) {
    if (p.spatial)
      for_each_block(p, [&](const Block& block, auto lanes) __attribute__((always_inline)) {
        const T* rows = &s.vertical[kRows * step * block.begin + r * step * lanes];
        filter_columns<T, lanes, bytes>(p.spatial->columns, rows, &s.spatial[block.begin * p.width]);
      });
    fn(y + r);
  }
}

// s.bilateral = a row of the bilateral filter's result, if there is such a kernel.
template <typename T, int bytes>
SEGOPS_INLINE void slice_row(const Problem<T>& p, const Filtered<T>& from, int64_t y, Scratch<T>& s) {
  if (!p.lattice) return;
  const int64_t begin = y * p.width;
  for_each_block(p, [&](const Block& block, auto lanes) __attribute__((always_inline)) {
    T* to = &s.bilateral[block.begin * p.width];
    if (block.begin < p.blocks.back().begin)
      std::copy_n(from.sliced + block.begin * p.pixels() + begin * lanes, p.width * lanes, to);
    else
      for (int64_t i = 0; i < p.width; ++i) sliced<T, lanes, bytes>(p, from.z, begin + i).store(to + i * lanes);
  });
}

// s.row = base + spatial matrix @ s.spatial + bilateral matrix @ s.bilateral; base is row y of memory
// of whole images, or null for zeros.
template <typename T, int bytes>
SEGOPS_INLINE void combine(const Problem<T>& p, const T* base, int64_t y, Scratch<T>& s) {
  for_each_block(p, [&](const Block& block, auto lanes) __attribute__((always_inline)) {
    using R = Row<T, lanes, bytes>;
    const T* from = base ? base + block.begin * p.pixels() + y * p.width * lanes : nullptr;
    T* row = &s.row[block.begin * p.width];
    if (p.diagonal) {
      const T *near = &s.spatial[block.begin * p.width], *alike = &s.bilateral[block.begin * p.width];
      const R of_near = R::load(&p.of_spatial.values[block.begin]), of_alike = R::load(&p.of_bilateral.values[block.begin]);
      for (int64_t i = 0; i < p.width * lanes; i += lanes) {
        const R sum = R::load(near + i) * of_near + R::load(alike + i) * of_alike;
        (from ? R::load(from + i) + sum : sum).store(row + i);
      }
      return;
    }
    const auto pixels = [&](auto count, int64_t i) __attribute__((always_inline)) {
      R sum[count];
      for (int k = 0; k < count; ++k) sum[k] = from ? R::load(from + (i + k) * lanes) : R::zero();
      const auto add = [&](const Matrix<T>& matrix, const std::vector<T>& filtered) __attribute__((always_inline)) {
        for (const Block& other : p.blocks)
          for (int64_t m = other.begin; m < std::min(other.begin + other.lanes, p.classes); ++m) {
            const R column = R::load(&matrix.values[m * p.padded() + block.begin]);
            const T* x = &filtered[other.begin * p.width + i * other.lanes + m - other.begin];
            for (int k = 0; k < count; ++k) sum[k].add(column, x[k * other.lanes]);
          }
      };
      if (p.spatial) add(p.of_spatial, s.spatial);
      if (p.lattice) add(p.of_bilateral, s.bilateral);
      for (int k = 0; k < count; ++k) sum[k].store(row + (i + k) * lanes);
    };
    int64_t i = 0;
    for (; i + 4 <= p.width; i += 4) pixels(constant<4>, i);
    for (; i < p.width; ++i) pixels(constant<1>, i);
  });
}

// Calls fn(pixel, each) for the pixels of a row; each(f) calls f(offset, lanes, channel) for the blocks
// of the pixel, which lie at these offsets: all but the last have 32 lanes.
template <typename T, typename F>
SEGOPS_INLINE void for_each_pixel(const Problem<T>& p, const F& fn) {
  const auto full = int64_t(p.blocks.size()) - 1;
  with_lanes(p.blocks[full], [&](auto lanes) __attribute__((always_inline)) {
    for (int64_t i = 0; i < p.width; ++i)
      fn(i, [&](const auto& f) __attribute__((always_inline)) {
        for (int64_t b = 0; b < full; ++b) f(b * 32 * p.width + i * 32, constant<32>, b * 32);
        f(full * 32 * p.width + i * lanes, lanes, full * 32);
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

// A row of Q, from the logits in s.row, to memory of whole images, and to kept (width, classes).
template <typename T, int bytes>
SEGOPS_INLINE void write_probabilities(const Problem<T>& p, int64_t y, Scratch<T>& s, T* q, T* kept) {
  for_each_pixel(p, [&](int64_t i, const auto& each) __attribute__((always_inline)) {
    exponentials<T, bytes>(each, s.row.data(), s.q.data(), [&](T, T sum) __attribute__((always_inline)) {
      const T scale = 1 / sum;
      each([&](int64_t at, auto lanes, int64_t channel) __attribute__((always_inline)) {
        using R = Row<T, lanes, bytes>;
        T* to = q + channel * p.pixels() + (y * p.width + i) * lanes;
        const R e = R::load(&s.q[at]);
        R::map([&](auto x) __attribute__((always_inline)) { return flushed(x * scale, T{}); }, e).store(to);
        if (kept) std::copy_n(to, std::min<int64_t>(lanes, p.classes - channel), kept + i * p.classes + channel);
      });
    });
  });
}

// log softmax of s.row, in place.
template <typename T, int bytes>
SEGOPS_INLINE void log_probabilities(const Problem<T>& p, Scratch<T>& s) {
  for_each_pixel(p, [&](int64_t, const auto& each) __attribute__((always_inline)) {
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

// A row of a map to and from the blocks of a row.
template <typename T>
void read_row(const Problem<T>& p, const View<const T>& map, int64_t image, int64_t y, T padding, T* row) {
  for (const Block& block : p.blocks)
    for (int64_t c = block.begin; c < block.begin + block.lanes; ++c) {
      T* to = row + block.begin * p.width + c - block.begin;
      const T* from = c < p.classes ? map.at(image, c, y, 0) : &padding;
      const int64_t step = c < p.classes ? map.pixel : 0;
      for (int64_t i = 0; i < p.width; ++i) to[i * block.lanes] = from[i * step];
    }
}
template <typename T>
void write_row(const Problem<T>& p, const View<T>& map, int64_t image, int64_t y, const T* row) {
  for (const Block& block : p.blocks)
    for (int64_t c = block.begin; c < std::min(block.begin + block.lanes, p.classes); ++c) {
      const T* from = row + block.begin * p.width + c - block.begin;
      T* to = map.at(image, c, y, 0);
      for (int64_t i = 0; i < p.width; ++i) to[i * map.pixel] = from[i * block.lanes];
    }
}

// A row of memory of whole images, whose blocks lie at begin * pixels, as one whose blocks lie at
// begin * width.
template <typename T>
void copy_row(const Problem<T>& p, const T* from, int64_t y, T* row) {
  for (const Block& block : p.blocks)
    std::copy_n(
        from + block.begin * p.pixels() + y * p.width * block.lanes, p.width * block.lanes, row + block.begin * p.width);
}

// The passes over rows. `image` numbers it in the maps.

template <typename T>
struct Start {
  View<const T> logits;
  int64_t image;
  T *unary, *q, *kept;  // kept: (pixels, classes), or null
};

template <typename T, int bytes>
SEGOPS_INLINE void start_rows(const Problem<T>& p, const Start<T>& job, int64_t begin, int64_t end) {
  Scratch<T> s(p);
  for (int64_t y = begin; y < end; ++y) {
    read_row(p, job.logits, job.image, y, -std::numeric_limits<T>::infinity(), s.row.data());
    for (const Block& block : p.blocks)
      std::copy_n(
          &s.row[block.begin * p.width], p.width * block.lanes,
          job.unary + block.begin * p.pixels() + y * p.width * block.lanes);
    write_probabilities<T, bytes>(p, y, s, job.q, job.kept ? job.kept + y * p.width * p.classes : nullptr);
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
  const T* unary;
  Filtered<T> from;  // the next Q may take the place of the sliced results
  T *next, *kept;    // null after the last iteration
  View<T> out;
  int64_t image;
};

// A row by diagonal matrices and a single block: nothing between the filters and Q leaves registers.
template <typename T, int lanes, int bytes>
SEGOPS_INLINE void update_pixels(const Problem<T>& p, const Update<T>& job, int64_t y, Scratch<T>& s) {
  using R = Row<T, lanes, bytes>;
  const R of_near = R::load(p.of_spatial.values.data()), of_alike = R::load(p.of_bilateral.values.data());
  for (int64_t i = 0, at = y * p.width; i < p.width; ++i, ++at) {
    R logits = R::load(job.unary + at * lanes) + R::load(&s.spatial[i * lanes]) * of_near;
    if (p.lattice) logits = logits + sliced<T, lanes, bytes>(p, job.from.z, at) * of_alike;
    const T most = logits.max();
    const R e = R::map([&](auto x) __attribute__((always_inline)) { return exp(x - most, T{}); }, logits);
    const T sum = e.sum();
    if (job.next) {
      const T scale = 1 / sum;
      T* to = job.next + at * lanes;
      R::map([&](auto x) __attribute__((always_inline)) { return flushed(x * scale, T{}); }, e).store(to);
      if (job.kept) std::copy_n(to, p.classes, job.kept + at * p.classes);
    } else {
      const T log_sum = std::log(sum);
      R::map([&](auto x) __attribute__((always_inline)) { return (x - most) - log_sum; }, logits).store(&s.row[i * lanes]);
    }
  }
}

template <typename T, int bytes>
SEGOPS_INLINE void update_rows(const Problem<T>& p, const Update<T>& job, int64_t begin, int64_t end) {
  Scratch<T> s(p);
  for (int64_t group = begin; group < end; ++group)
    for_each_row<T, bytes>(p, job.from.x, group * kRows, s, [&](int64_t y) __attribute__((always_inline)) {
      if (p.blocks.size() == 1 && p.diagonal) {
        with_lanes(
            p.blocks[0], [&](auto lanes) __attribute__((always_inline)) { update_pixels<T, lanes, bytes>(p, job, y, s); });
      } else {
        slice_row<T, bytes>(p, job.from, y, s);
        combine<T, bytes>(p, job.unary, y, s);
        if (job.next)
          write_probabilities<T, bytes>(p, y, s, job.next, job.kept ? job.kept + y * p.width * p.classes : nullptr);
        else
          log_probabilities<T, bytes>(p, s);
      }
      if (!job.next) write_row(p, job.out, job.image, y, s.row.data());
    });
}

// G = q (r - sum_c q r), of a row, in place of r.
template <typename T, int bytes>
SEGOPS_INLINE void through_softmax(const Problem<T>& p, const T* q, T* r) {
  for_each_pixel(p, [&](int64_t, const auto& each) __attribute__((always_inline)) {
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
  Scratch<T> s(p);
  for (int64_t y = begin; y < end; ++y) {
    read_row(p, job.grad, job.image, y, T(0), s.row.data());
    read_row(p, job.out, job.image, y, -std::numeric_limits<T>::infinity(), s.q.data());
    for_each_pixel(p, [&](int64_t i, const auto& each) __attribute__((always_inline)) {
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

// sums (classes, padded) += sum over the pixels of a row of a b^T.
template <typename T, int bytes>
SEGOPS_INLINE void add_outer_product(const Problem<T>& p, const T* a, const T* b, double* sums) {
  for_each_block(p, [&](const Block& block, auto lanes) __attribute__((always_inline)) {
    using R = Row<T, lanes, bytes>;
    const T* row = b + block.begin * p.width;
    for (const Block& other : p.blocks)
      for (int64_t l = other.begin; l < std::min(other.begin + other.lanes, p.classes); ++l) {
        const T* x = a + other.begin * p.width + l - other.begin;
        R sum[4] = {R::zero(), R::zero(), R::zero(), R::zero()};
        int64_t i = 0;
        for (; i + 4 <= p.width; i += 4)
          for (int k = 0; k < 4; ++k) sum[k].add(R::load(row + (i + k) * lanes), x[(i + k) * other.lanes]);
        for (; i < p.width; ++i) sum[0].add(R::load(row + i * lanes), x[i * other.lanes]);
        T total[lanes];
        ((sum[0] + sum[1]) + (sum[2] + sum[3])).store(total);
        for (int k = 0; k < lanes; ++k) sums[l * p.padded() + block.begin + k] += double(total[k]);
      }
  });
}

template <typename T, int bytes>
SEGOPS_INLINE void update_grad_rows(const Problem<T>& p, const UpdateGrad<T>& job, int64_t begin, int64_t end) {
  Scratch<T> s(p);
  for (int64_t group = begin; group < end; ++group)
    for_each_row<T, bytes>(p, job.from.x, group * kRows, s, [&](int64_t y) __attribute__((always_inline)) {
      slice_row<T, bytes>(p, job.from, y, s);
      const T* q = job.q + y * p.width * p.classes;
      for (const Block& block : p.blocks) {
        const int64_t used = std::min(block.lanes, p.classes - block.begin);
        T* to = &s.q[block.begin * p.width];
        for (int64_t i = 0; i < p.width; ++i) std::copy_n(q + i * p.classes + block.begin, used, to + i * block.lanes);
      }
      if (job.spatial) add_outer_product<T, bytes>(p, s.spatial.data(), s.q.data(), job.spatial);
      if (job.bilateral) add_outer_product<T, bytes>(p, s.bilateral.data(), s.q.data(), job.bilateral);
      combine<T, bytes>(p, static_cast<const T*>(nullptr), y, s);
      through_softmax<T, bytes>(p, s.q.data(), s.row.data());
      for_each_block(p, [&](const Block& block, auto lanes) __attribute__((always_inline)) {
        using R = Row<T, lanes, bytes>;
        const int64_t at = block.begin * p.pixels() + y * p.width * lanes;
        for (int64_t i = 0; i < p.width * lanes; i += lanes) {
          const R row = R::load(&s.row[block.begin * p.width + i]);
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
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { run(p, job, begin, end); });
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
    for (int64_t t = 0; t < 2 * kTile; ++t) f[t] /= position;
    for (int64_t t = 2 * kTile; t < (2 + channels) * kTile; ++t) f[t] /= intensity;
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
  const int64_t classes = in.logits.size(1), height = in.logits.size(2), width = in.logits.size(3), pixels = height * width;
  const int64_t dims = in.images.size(1) + 2;
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
  const Problem<T> p(in, in.logits, lattice ? &*lattice : nullptr, scales ? &*scales : nullptr, false);
  const int64_t padded = p.padded();
  const Memory<T> unary = memory<T>(padded * pixels), z = memory<T>(lattice ? p.blocks[0].lanes * lattice->vertices : 0);
  // Rows read their neighbours' Q: the next one goes elsewhere.
  Memory<T> q = memory<T>(padded * pixels), next = memory<T>(padded * pixels);
  T* keep = kept ? data_of<T>(kept->q) + image * in.iterations * pixels * classes : nullptr;
  run_rows(p, Start<T>{View<const T>(in.logits), image, unary.get(), q.get(), keep}, height);
  for (int64_t k = 0; k < in.iterations; ++k) {
    const bool last = k + 1 == in.iterations;
    if (keep) keep += pixels * classes;
    splat_blocks(p, q.get(), z.get(), next.get());
    run_rows(
        p,
        Update<T>{
            unary.get(),
            {q.get(), z.get(), next.get()},
            last ? nullptr : next.get(),
            last ? nullptr : keep,
            View<T>(out),
            image},
        ceil_div(height, kRows));
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
  const int64_t groups = ceil_div(height, kRows), slices = std::min<int64_t>(groups, 16), entries = classes * padded;
  std::vector<double> spatial_sums(of_spatial ? slices * entries : 0), bilateral_sums(of_bilateral ? slices * entries : 0);
  const Memory<T> total = memory<T>(padded * pixels), z = memory<T>(lattice ? p.blocks[0].lanes * lattice->vertices : 0);
  Memory<T> g = memory<T>(padded * pixels), next = memory<T>(padded * pixels);
  run_rows(p, StartGrad<T>{View<const T>(in.grad), View<const T>(in.out), image, g.get(), total.get()}, height);
  for (int64_t k = iterations; k-- > 0;) {
    const T* q = data_of<const T>(in.kept.q) + (image * iterations + k) * pixels * classes;
    splat_blocks(p, g.get(), z.get(), next.get());
    torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s)
        run(p,
            UpdateGrad<T>{
                {g.get(), z.get(), next.get()},
                q,
                next.get(),
                total.get(),
                of_spatial ? &spatial_sums[s * entries] : nullptr,
                of_bilateral ? &bilateral_sums[s * entries] : nullptr},
            s * groups / slices, (s + 1) * groups / slices);
    });
    std::swap(g, next);
  }
  const View<T> to(logits);
  torch::stable::parallel_for(0, height, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> row(padded * width);
    for (int64_t y = begin; y < end; ++y) {
      copy_row(p, total.get(), y, row.data());
      write_row(p, to, image, y, row.data());
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
    for_each_image(in.logits.size(0), [&](int64_t image) { infer<decltype(type)>(in, image, out, kept); });
  });
}

void mean_field_grad(const MeanFieldGrad& in, const Tensor& logits, const Tensor* spatial, const Tensor* bilateral) {
  dispatch<float, double>(in.out, "dense_crf", [&](auto type) {
    using T = decltype(type);
    const int64_t n = in.out.size(0), entries = in.out.size(1) * in.out.size(1);
    // By images, then in their order.
    std::vector<double> sums(2 * n * entries);
    for_each_image(n, [&](int64_t image) {
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
