// Filters on the CPU. Channels lie in blocks of at most 32, of each of which a pixel has a row, a few
// vectors. What is beyond the last channel is padding.
#pragma once

#include "lattice_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace segops::crf {

// Images one after the other, each by all threads: what one takes is in the cache once. Or each by a
// thread, where they are enough, and too small for all.
template <typename F>
void for_each_image(int64_t count, int64_t positions, const F& fn) {
  const auto threads = int64_t(torch::stable::get_num_threads());
  if (count < threads || positions >= threads * 16384) {
    for (int64_t image = 0; image < count; ++image) fn(image);
    return;
  }
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) fn(image);
  });
}

// Channels from `begin` on. In memory of P pixels a block lies at begin * P.
struct Block {
  int64_t begin, lanes;
};

inline std::vector<Block> blocks_of(int64_t channels) {
  std::vector<Block> blocks;
  for (int64_t begin = 0; begin < channels; begin += 32) {
    const int64_t left = std::min<int64_t>(channels - begin, 32);
    blocks.push_back({begin, left > 4 ? round_up(left, 8) : 4});
  }
  return blocks;
}
inline int64_t padded(const std::vector<Block>& blocks) {
  return blocks.back().begin + blocks.back().lanes;
}

constexpr int64_t kAheadPositions = 5;  // how far ahead their vertices are fetched
// Items of work that are worth a thread.
constexpr int64_t kGrain = 4096;
// Fetches a row: all lines of the cache that it lies in.
template <int lanes, typename T>
SEGOPS_INLINE void prefetch(const T* row) {
  constexpr int line = 64 / int(sizeof(T));
  for (int i = 0; i < lanes; i += line) __builtin_prefetch(row + i);
  if (lanes > line && lanes % line != 0) __builtin_prefetch(row + lanes - 1);
}

// Calls fn with the block's lanes as a constant.
template <typename F>
SEGOPS_INLINE void with_lanes(const Block& block, const F& fn) {
  switch (block.lanes) {
    case 4:
      return fn(constant<4>);
    case 8:
      return fn(constant<8>);
    case 16:
      return fn(constant<16>);
    case 24:
      return fn(constant<24>);
    default:
      return fn(constant<32>);
  }
}

// A row of a block, in registers of at most so many bytes.
template <typename T, int lanes, int bytes>
struct Row {
  static constexpr int kWidest = bytes / int(sizeof(T)), kWhole = lanes == 24 ? 8 : lanes;
  static constexpr int kWidth = kWhole < kWidest ? kWhole : kWidest, kCount = lanes / kWidth;
  using V = Vec<T, kWidth>;
  typename V::type v[kCount];

  // Vector by vector: GCC copies arrays through memory.
  Row() = default;
  SEGOPS_INLINE Row(const Row& other) { *this = other; }
  SEGOPS_INLINE Row& operator=(const Row& other) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) v[i] = other.v[i];
    return *this;
  }

  static SEGOPS_INLINE Row zero() {
    Row row;
    for (int i = 0; i < kCount; ++i) row.v[i] = typename V::type{};
    return row;
  }
  static SEGOPS_INLINE Row load(const T* p) {
    Row row;
    for (int i = 0; i < kCount; ++i) row.v[i] = V::load(p + i * kWidth);
    return row;
  }
  static SEGOPS_INLINE Row filled(T value) {
    Row row;
    for (int i = 0; i < kCount; ++i) row.v[i] = typename V::type{} + value;
    return row;
  }
  SEGOPS_INLINE void store(T* p) const {
    for (int i = 0; i < kCount; ++i) V::store(p + i * kWidth, v[i]);
  }
  // A function of each vector, and of those of other rows.
  template <typename F, typename... Rows>
  static SEGOPS_INLINE Row map(const F& fn, const Rows&... rows) {
    Row result;
    for (int i = 0; i < kCount; ++i) result.v[i] = fn(rows.v[i]...);
    return result;
  }
  friend SEGOPS_INLINE Row operator+(const Row& a, const Row& b) {
    return map([](auto x, auto y) __attribute__((always_inline)) { return x + y; }, a, b);
  }
  friend SEGOPS_INLINE Row operator*(const Row& a, const Row& b) {
    return map([](auto x, auto y) __attribute__((always_inline)) { return x * y; }, a, b);
  }
  friend SEGOPS_INLINE Row operator*(const Row& a, T b) {
    return map([b](auto x) __attribute__((always_inline)) { return x * b; }, a);
  }
  SEGOPS_INLINE void add(const Row& a, T b) {
    for (int i = 0; i < kCount; ++i) v[i] += a.v[i] * b;
  }
  // This row, or zeros, where all bits of the mask are 1, or 0.
  SEGOPS_INLINE Row where(Integer<T> mask) const {
    using I = typename vector_of<Integer<T>, kWidth>::type;
    return map([&](auto x) __attribute__((always_inline)) { return (decltype(x))((I)x & (I{} + mask)); }, *this);
  }
  SEGOPS_INLINE T sum() const {
    auto total = v[0];
    for (int i = 1; i < kCount; ++i) total += v[i];
    return sum_lanes<T, kWidth>(total);
  }
  SEGOPS_INLINE T max() const {
    auto most = v[0];
    for (int i = 1; i < kCount; ++i) most = v[i] > most ? v[i] : most;
    return max_lanes<kWidth>(most);
  }

 private:
  template <int width>
  static SEGOPS_INLINE T max_lanes(typename vector_of<T, width>::type x) {
    if constexpr (width == 1) {
      return x[0];
    } else {
      typename vector_of<T, width / 2>::type half[2];
      std::memcpy(half, &x, sizeof x);
      return max_lanes<width / 2>(half[1] > half[0] ? half[1] : half[0]);
    }
  }
};

// Vertices begin .. end of z (vertices, lanes): the sums of their positions' rows of x, each times
// its share. Rows of one lane are ones.
template <typename T, int lanes, int bytes>
SEGOPS_INLINE void splat(const Lattice<T>& lattice, const T* shares, const T* x, T* z, int64_t begin, int64_t end) {
  using R = Row<T, lanes, bytes>;
  constexpr int64_t kMany = 512;
  const auto sum_of = [&](int64_t e, int64_t last) __attribute__((always_inline)) {
    R sum = R::zero();
    for (; e < last; ++e) {
      if constexpr (lanes == 1) {
        sum.add(R::filled(1), shares[e]);
      } else {
        prefetch<lanes>(x + lattice.sources[e + kAhead] * int64_t(lanes));
        sum.add(R::load(x + lattice.sources[e] * int64_t(lanes)), shares[e]);
      }
    }
    return sum;
  };
  for (int64_t v = begin; v < end; ++v) {
    int64_t e = lattice.offsets[v];
    const int64_t last = lattice.offsets[v + 1];
    if (last - e <= kMany) {
      sum_of(e, last).store(z + v * lanes);
      continue;
    }
    // Float loses what is added to a large sum.
    double total[lanes] = {};
    for (; e < last; e += kMany) {
      T part[lanes];
      sum_of(e, std::min(e + kMany, last)).store(part);
      for (int i = 0; i < lanes; ++i) total[i] += double(part[i]);
    }
    for (int i = 0; i < lanes; ++i) z[v * lanes + i] = T(total[i]);
  }
}

// Blurs z (vertices, lanes) along one axis, by `size` entries of its runs, whole ones.
template <typename T, int lanes, int bytes>
SEGOPS_INLINE void blur(const int32_t* run, int64_t size, T* z) {
  using R = Row<T, lanes, bytes>;
  if (size == 0) return;
  // The vertex of an entry, and whether it goes on with a run: without branches, which would be
  // taken at random.
  const auto row = [&](int32_t entry) { return z + (entry ^ (entry >> 31)) * int64_t(lanes); };
  const auto goes_on = [](int32_t entry) { return Integer<T>(~(entry >> 31)); };
  T* at = row(run[0]);
  R before = R::zero(), here = R::load(at);
  const auto step = [&](int32_t entry) __attribute__((always_inline)) {
    T* next = row(entry);
    const R after = R::load(next);
    const Integer<T> mask = goes_on(entry);
    (here + (before + after.where(mask)) * T(0.5)).store(at);
    before = here.where(mask);
    here = after;
    at = next;
  };
  int64_t i = 1;
  for (; i + kAhead < size; ++i) {
    prefetch<lanes>(row(run[i + kAhead]));
    step(run[i]);
  }
  for (; i < size; ++i) step(run[i]);
  (here + before * T(0.5)).store(at);
}

// The slice at a position.
template <typename T, int lanes, int bytes>
SEGOPS_INLINE Row<T, lanes, bytes> slice(const Lattice<T>& lattice, const T* z, int64_t p) {
  using R = Row<T, lanes, bytes>;
  const int64_t corners = lattice.corners();
  const int32_t* index = lattice.index + p * corners;
  if (p + kAheadPositions < lattice.positions)
    for (int64_t k = kAheadPositions * corners; k < (kAheadPositions + 1) * corners; ++k)
      prefetch<lanes>(z + std::max(index[k], 0) * int64_t(lanes));
  const T* weight = lattice.weight + p * corners;
  R sum = R::load(z + index[0] * int64_t(lanes)) * weight[0];
  for (int64_t k = 1; k < corners; ++k) sum.add(R::load(z + index[k] * int64_t(lanes)), weight[k]);
  return sum;
}

// What normalisation makes of the lattice: shares, times what input is multiplied by; and what output
// is multiplied by, at each position.
template <typename T>
struct Scales {
  const T* shares;
  Memory<T> after;

  // total: the filter of ones, but for the factor 1 / (1 + 2^-d), which cancels out; null if nothing
  // is normalised. The shares go to `scaled`, which may be where they are; null if they are scaled.
  Scales(const Lattice<T>& lattice, const T* total, Normalization normalization, bool adjoint, T* scaled)
      : shares(lattice.shares), after(memory<T>(lattice.positions)) {
    const bool symmetric = normalization == Normalization::kSymmetric, one_sided = normalization == Normalization::kAfter;
    const Memory<T> scale = memory<T>(lattice.positions);
    const T factor = total ? T(1) : T(1 / (1 + std::exp2(-double(lattice.dims))));
    parallel_for(0, lattice.positions, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        if (total) scale[p] = 1 / (symmetric ? std::sqrt(total[p]) : total[p]);
        after[p] = symmetric || (one_sided && !adjoint) ? scale[p] : factor;
      }
    });
    if (!scaled || !(symmetric || (one_sided && adjoint))) return;
    parallel_for(0, lattice.offsets[lattice.vertices], kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) scaled[e] = lattice.shares[e] * scale[lattice.sources[e]];
    });
    shares = scaled;
  }
};

// The Gaussian along an axis of an image: taps 0 .. reach, and what inputs and outputs are
// multiplied by.
template <typename T>
struct SpatialAxis {
  int64_t side, reach;
  std::vector<T> taps, before, after;

  SpatialAxis(int64_t side, double sigma, Normalization normalization, bool adjoint)
      : side(side), before(side, T(1)), after(side) {
    // Taps below 2^-24 (2^-53) of the centre's are left out.
    const double digits = std::is_same_v<T, double> ? 53 : 24;
    reach = int64_t(std::min(double(side - 1), sigma * std::sqrt(2 * digits * std::log(2.0))));
    std::vector<double> sums(reach + 1);  // of the taps 1 .. k
    taps.push_back(T(1));
    for (int64_t k = 1; k <= reach; ++k) {
      const double tap = std::exp(-0.5 * (double(k) / sigma) * (double(k) / sigma));
      taps.push_back(T(tap));
      sums[k] = sums[k - 1] + tap;
    }
    for (int64_t i = 0; i < side; ++i) {
      const double total = 1 + sums[std::min(i, reach)] + sums[std::min(side - 1 - i, reach)];
      after[i] = T(normalization == Normalization::kAfter ? 1 / total : 1 / std::sqrt(total));
    }
    if (normalization == Normalization::kSymmetric) before = after;
    if (adjoint) std::swap(before, after);
  }
};

template <typename T>
struct Spatial {
  SpatialAxis<T> rows, columns;
};

constexpr int64_t kRows = 4;  // that are filtered together

// Of rows y .. y + kRows (those beyond the last are 0) of a block x (height, width, lanes), columns
// begin .. begin + count, filtered along the columns: out (kRows, reach + count + reach, lanes), with
// as many more at both ends as the filter along the rows takes; zeros beyond the image.
template <typename T, int lanes, int bytes>
SEGOPS_INLINE void filter_rows(
    const Spatial<T>& spatial, const T* x, int64_t y, int64_t begin, int64_t count, std::vector<T>& weights, T* out) {
  // A vector of two columns at a time: the sums of all rows stay in registers.
  constexpr int kWidth = Row<T, lanes, bytes>::kWidth;
  using R = Row<T, kWidth, bytes>;
  const SpatialAxis<T>& axis = spatial.rows;
  const int64_t width = spatial.columns.side, reach = spatial.columns.reach, step = (count + 2 * reach) * lanes;
  const int64_t first = std::max<int64_t>(0, y - axis.reach), end = std::min(axis.side, y + kRows + axis.reach);
  weights.assign((end - first) * kRows, T(0));
  for (int64_t r = 0; r < std::min(kRows, axis.side - y); ++r)
    for (int64_t j = std::max<int64_t>(0, y + r - axis.reach); j < std::min(axis.side, y + r + axis.reach + 1); ++j)
      weights[(j - first) * kRows + r] = axis.taps[std::abs(j - y - r)] * axis.before[j] * axis.after[y + r];
  T* const origin = out + (reach - begin) * lanes;  // of column 0
  const auto columns = [&](auto pixels, int64_t column) __attribute__((always_inline)) {
    for (int64_t at = column * lanes; at < (column + 1) * lanes; at += kWidth) {
      R sum[kRows][pixels];
      for (auto& row : sum)
        for (auto& each : row) each = R::zero();
      for (int64_t j = first; j < end; ++j) {
        const T *from = x + j * width * lanes + at, *w = &weights[(j - first) * kRows];
        for (int i = 0; i < pixels; ++i) {
          const R row = R::load(from + i * lanes);
          for (int64_t r = 0; r < kRows; ++r) sum[r][i].add(row, w[r]);
        }
      }
      for (int64_t r = 0; r < kRows; ++r)
        for (int i = 0; i < pixels; ++i)
          (sum[r][i] * spatial.columns.before[column + i]).store(origin + r * step + at + i * lanes);
    }
  };
  const int64_t left = std::max<int64_t>(0, begin - reach), right = std::min(width, begin + count + reach);
  for (int64_t r = 0; r < kRows; ++r) {
    std::fill(out + r * step, origin + r * step + left * lanes, T(0));
    std::fill(origin + r * step + right * lanes, out + (r + 1) * step, T(0));
  }
  int64_t column = left;
  for (; column + 2 <= right; column += 2) columns(constant<2>, column);
  for (; column < right; ++column) columns(constant<1>, column);
}

// A row of those, filtered along itself: out (count, lanes), from column `begin` on.
template <typename T, int lanes, int bytes>
SEGOPS_INLINE void filter_columns(const SpatialAxis<T>& axis, const T* x, int64_t begin, int64_t count, T* out) {
  using R = Row<T, lanes, bytes>;
  const T* centre = x + axis.reach * lanes;
  for (int64_t i = 0; i < count; ++i, centre += lanes) {
    R sum = R::load(centre);
    for (int64_t k = 1; k <= axis.reach; ++k) sum.add(R::load(centre - k * lanes) + R::load(centre + k * lanes), axis.taps[k]);
    (sum * axis.after[begin + i]).store(out + i * lanes);
  }
}

// Written by filter_cpu.cpp.

// The filter of ones, but for the factor 1 / (1 + 2^-d).
template <typename T>
void filter_ones(const Lattice<T>& lattice, T* total);
// Splats a block of x (positions, lanes) to z (vertices, lanes), and blurs it.
template <typename T>
void splat_and_blur(const Lattice<T>& lattice, const T* shares, const Block& block, bool adjoint, const T* x, T* z);

}  // namespace segops::crf
