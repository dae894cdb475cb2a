// The permutohedral filter on the CPU: a lattice per image, for all channels, block by block.

#include "../common/cpu.h"
#include "blocks_cpu.h"

namespace segops::crf {
namespace {

// The filter of ones has blocks of one lane.
template <typename F>
SEGOPS_INLINE void with_these_lanes(const Block& block, const F& fn) {
  if (block.lanes == 1)
    fn(constant<1>);
  else
    with_lanes(block, fn);
}

// Positions begin .. end of a block of the result, from z (vertices, lanes).
template <typename T>
struct Slice {
  const Lattice<T>& lattice;
  Block block;
  const T *z, *scale;  // scale: null for ones
  T beyond;            // where a position has no simplex
  T* out;              // (channels of the block, positions)
  int64_t channels;
};

template <typename T, int bytes>
SEGOPS_INLINE void slice_positions(const Slice<T>& s, int64_t begin, int64_t end) {
  with_these_lanes(s.block, [&](auto lanes) __attribute__((always_inline)) {
    T row[lanes];
    for (int64_t p = begin; p < end; ++p) {
      if (s.lattice.index[p * s.lattice.corners()] < 0)
        std::fill_n(row, int(lanes), s.beyond);
      else
        (slice<T, lanes, bytes>(s.lattice, s.z, p) * (s.scale ? s.scale[p] : T(1))).store(row);
      for (int64_t c = 0; c < s.channels; ++c) s.out[c * s.lattice.positions + p] = row[c];
    }
  });
}

// Vertices begin .. end of a block.
template <typename T>
struct Splat {
  const Lattice<T>& lattice;
  Block block;
  const T *shares, *x;
  T* z;
};

template <typename T, int bytes>
SEGOPS_INLINE void splat_vertices(const Splat<T>& s, int64_t begin, int64_t end) {
  with_these_lanes(s.block, [&](auto lanes) __attribute__((always_inline)) {
    splat<T, lanes, bytes>(s.lattice, s.shares, s.x, s.z, begin, end);
  });
}

// Entries begin .. end of runs, whole ones.
template <typename T>
struct Blur {
  const int32_t* runs;
  Block block;
  T* z;
};

template <typename T, int bytes>
SEGOPS_INLINE void blur_entries(const Blur<T>& b, int64_t begin, int64_t end) {
  with_these_lanes(
      b.block, [&](auto lanes) __attribute__((always_inline)) { blur<T, lanes, bytes>(b.runs + begin, end - begin, b.z); });
}

#define SEGOPS_LATTICE(target, bytes, T)                             \
  target void run(const Splat<T>& job, int64_t begin, int64_t end) { \
    splat_vertices<T, bytes>(job, begin, end);                       \
  }                                                                  \
  target void run(const Blur<T>& job, int64_t begin, int64_t end) {  \
    blur_entries<T, bytes>(job, begin, end);                         \
  }                                                                  \
  target void run(const Slice<T>& job, int64_t begin, int64_t end) { \
    slice_positions<T, bytes>(job, begin, end);                      \
  }
#define SEGOPS_LATTICE_OF_ALL(target, bytes) SEGOPS_LATTICE(target, bytes, float) SEGOPS_LATTICE(target, bytes, double)
SEGOPS_WIDTHS(SEGOPS_LATTICE_OF_ALL)
#undef SEGOPS_LATTICE_OF_ALL
#undef SEGOPS_LATTICE

// Calls fn(begin, end) for a range, or, together, for parts of it from all threads.
template <typename F>
void in_parts(bool together, int64_t begin, int64_t end, const F& fn) {
  if (together)
    parallel_for(begin, end, kGrain, fn);
  else
    fn(begin, end);
}

// Blurs group `group`, of colours or places, along its axes.
template <typename T>
void blur_group(const Lattice<T>& lattice, const Block& block, bool places, int64_t group, bool together, bool adjoint, T* z) {
  const int64_t axes = places ? lattice.far() : lattice.near();
  const int64_t first = (places ? lattice.colours * lattice.near() : 0) + group * axes;
  for (int64_t i = 0; i < axes; ++i) {
    const int64_t r = first + (adjoint ? axes - 1 - i : i), last = lattice.runs_last[r];
    const auto next_run = [&](int64_t at) {
      while (at < last && lattice.runs[at] >= 0) ++at;
      return at;
    };
    in_parts(together, r > 0 ? lattice.runs_last[r - 1] : 0, last, [&](int64_t begin, int64_t end) {
      run(Blur<T>{lattice.runs, block, z}, next_run(begin), next_run(end));
    });
  }
}

// Positions begin .. end of a block of values, of whose channels `used` exist.
template <typename T>
void read_block(
    const View<const T>& values, int64_t image, const Block& block, int64_t used, int64_t begin, int64_t end, T* rows) {
  for (int64_t c = 0; c < block.lanes; ++c) {
    T* to = rows + c;
    const T* channel = c < used ? values.at(image, block.begin + c, 0, 0) : nullptr;
    for (int64_t p = begin; p < end; ++p) to[p * block.lanes] = channel ? channel[p * values.pixel] : T(0);
  }
}

// Those of an image, (dims, positions).
template <typename F>
Features read_features(const Tensor& features, int64_t image) {
  const int64_t dims = features.size(1), of_dim = features.stride(1), of_position = features.stride(2);
  const F* from = data_of<const F>(features) + image * features.stride(0);
  return [=](int64_t begin, int64_t count, double* to) {
    for (int64_t i = 0; i < dims; ++i)
      for (int64_t t = 0; t < count; ++t) to[i * kTile + t] = double(from[i * of_dim + (begin + t) * of_position]);
  };
}

template <typename T>
void filter_image(const FilterInput& in, int64_t image, T* out) {
  const int64_t channels = in.values.size(1), positions = in.values.size(2), dims = in.features.size(1);
  Features features;
  dispatch<float, double>(
      in.features, "permutohedral_filter", [&](auto type) { features = read_features<decltype(type)>(in.features, image); });
  const auto lattice = build_lattice<T>(features, positions, dims);
  const Memory<T> total = in.normalization == Normalization::kNone ? nullptr : memory<T>(positions);
  if (total) filter_ones(lattice, total.get());
  const Scales<T> scales(
      lattice, total.get(), in.normalization, in.adjoint, lattice.own_weights.get() + positions * (dims + 1));
  View<const T> values;
  values.data = data_of<const T>(in.values);
  values.image = in.values.stride(0);
  values.channel = in.values.stride(1);
  values.pixel = in.values.stride(2);
  values.row = 0;
  // Block by block: what memory it takes does not depend on how many there are.
  for (const Block& block : blocks_of(channels)) {
    const int64_t used = std::min(block.lanes, channels - block.begin);
    const Memory<T> x = memory<T>(positions * block.lanes), z = memory<T>(lattice.vertices * block.lanes);
    parallel_for(
        0, positions, kGrain, [&](int64_t begin, int64_t end) { read_block(values, image, block, used, begin, end, x.get()); });
    splat_and_blur(lattice, scales.shares, block, in.adjoint, x.get(), z.get());
    const T beyond = in.adjoint ? T(0) : std::numeric_limits<T>::quiet_NaN();
    const Slice<T> job{lattice, block, z.get(), scales.after.get(), beyond, out + block.begin * positions, used};
    parallel_for(0, positions, kGrain, [&](int64_t begin, int64_t end) { run(job, begin, end); });
  }
}

}  // namespace

template <typename T>
void filter_ones(const Lattice<T>& lattice, T* total) {
  const Block block{0, 1};
  const Memory<T> z = memory<T>(lattice.vertices);
  splat_and_blur<T>(lattice, lattice.shares, block, false, nullptr, z.get());
  const Slice<T> job{lattice, block, z.get(), nullptr, T(1), total, 1};
  parallel_for(0, lattice.positions, kGrain, [&](int64_t begin, int64_t end) { run(job, begin, end); });
}
template void filter_ones(const Lattice<float>&, float*);
template void filter_ones(const Lattice<double>&, double*);

template <typename T>
void splat_and_blur(const Lattice<T>& lattice, const T* shares, const Block& block, bool adjoint, const T* x, T* z) {
  const Splat<T> job{lattice, block, shares, x, z};
  const auto splat = [&](int64_t colour, bool together) {
    in_parts(together, colour > 0 ? lattice.last[colour - 1] : 0, lattice.last[colour], [&](int64_t begin, int64_t end) {
      run(job, begin, end);
    });
  };
  const auto blur = [&](bool places) {
    return [&, places](int64_t group, bool together) { blur_group(lattice, block, places, group, together, adjoint, z); };
  };
  if (adjoint) {
    for_each_group(lattice.colours, splat);
    for_each_group(lattice.places, blur(true));
    for_each_group(lattice.colours, blur(false));
    return;
  }
  for_each_group(lattice.colours, [&](int64_t colour, bool together) {
    splat(colour, together);
    blur(false)(colour, together);
  });
  for_each_group(lattice.places, blur(true));
}
template void splat_and_blur(const Lattice<float>&, const float*, const Block&, bool, const float*, float*);
template void splat_and_blur(const Lattice<double>&, const double*, const Block&, bool, const double*, double*);

void filter(const FilterInput& in, const Tensor& out) {
  dispatch<float, double>(in.values, "permutohedral_filter", [&](auto type) {
    using T = decltype(type);
    T* to = data_of<T>(out);
    for_each_image(
        in.values.size(0), in.values.size(2), [&](int64_t image) { filter_image<T>(in, image, to + image * out.stride(0)); });
  });
}

}  // namespace segops::crf
