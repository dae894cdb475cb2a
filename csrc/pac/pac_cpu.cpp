// The shift kernels on the CPU (pac.h says what they compute).
//
// Per image row, the reads of each sum are listed once, as offsets from the current pixel. Pixels
// far enough from the left and right border use the list as it stands, the others drop the reads
// that fall outside. Channels are then summed in registers, 64 at a time.

#include "../common/cpu.h"
#include "pac.h"

#include <algorithm>
#include <cstdlib>

namespace segops::pac {
namespace {

struct Read {
  int64_t offset;  // elements from the current pixel's first
  int64_t dx;      // columns from the current pixel
};

// out[0 .. channels) = bias_weight * bias + centre_weight * source[centre] + the sum of the reads
struct Sum {
  int64_t out;     // elements from the current output pixel's first
  int64_t centre;  // elements from the current source pixel's first
  int64_t centre_weight = 0;
  std::vector<Read> reads;
};

// `vectors` * `lanes` channels of one pixel.
template <typename T, int lanes, int vectors = 1>
SEGOPS_INLINE void sum_channels(
    const T* source, T* out, const T* bias, int64_t bias_weight, const Sum& sum, const int64_t* offsets, int64_t count) {
  using V = Vec<T, lanes>;
  using scalar = accumulator<T>;
  typename V::type acc[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    acc[v] = typename V::type{};
    if (sum.centre_weight) acc[v] = V::load(source + sum.centre + v * lanes) * scalar(sum.centre_weight);
  }
  for (int64_t i = 0; i < count; ++i) {
    const T* p = source + offsets[i];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) acc[v] += V::load(p + v * lanes);
  }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    if (bias) acc[v] += V::load(bias + v * lanes) * scalar(bias_weight);
    V::store(out + v * lanes, acc[v]);
  }
}

template <typename T>
SEGOPS_INLINE void sum_pixel(
    const T* source, T* out, const T* bias, int64_t bias_weight, const Sum& sum, const int64_t* offsets, int64_t count,
    int64_t channels) {
  constexpr int lanes = kLanes<T>;
  int64_t c = 0;
  const auto add = [&](auto width, auto vectors) __attribute__((always_inline)) {
    for (; c + width * vectors <= channels; c += width * vectors)
      sum_channels<T, width, vectors>(source + c, out + c, bias ? bias + c : nullptr, bias_weight, sum, offsets, count);
  };
  add(constant<lanes>, constant<4>);
  add(constant<lanes>, constant<1>);
  add(constant<lanes / 2>, constant<1>);
  add(constant<lanes / 4>, constant<1>);
  add(constant<1>, constant<1>);
}

template <typename T>
SEGOPS_INLINE void sum_row(
    const T* source, int64_t source_stride, T* out, int64_t out_stride, const T* bias, int64_t bias_weight,
    const std::vector<Sum>& sums, int64_t reach, int64_t width, int64_t channels, int64_t* offsets) {
  bool listed = false;  // `offsets` holds every read of every sum, as interior pixels want it
  for (int64_t x = 0; x < width; ++x) {
    const bool interior = x >= reach && x < width - reach;
    int64_t* next = offsets;
    for (const Sum& sum : sums) {
      int64_t* first = next;
      if (interior && listed) {
        next += sum.reads.size();
      } else {
        for (const Read& read : sum.reads)
          if (interior || (x + read.dx >= 0 && x + read.dx < width)) *next++ = read.offset;
      }
      sum_pixel<T>(
          source + x * source_stride, out + x * out_stride + sum.out, bias, bias_weight, sum, first, next - first, channels);
    }
    listed = interior;
  }
}

#define SEGOPS_SUM_ROW(T)                                                                                         \
  SEGOPS_MULTIVERSION void sum_row_multiversion(                                                                  \
      const T* source, int64_t source_stride, T* out, int64_t out_stride, const T* bias, int64_t bias_weight,     \
      const std::vector<Sum>& sums, int64_t reach, int64_t width, int64_t channels, int64_t* offsets) {           \
    sum_row<T>(source, source_stride, out, out_stride, bias, bias_weight, sums, reach, width, channels, offsets); \
  }
SEGOPS_SUM_ROW(float)
SEGOPS_SUM_ROW(double)
SEGOPS_SUM_ROW(bf16)
#undef SEGOPS_SUM_ROW

// Adds to `sum` the reads of a tap at `rate` from image row y; `offset` leads to the channels of
// the tap or the group.
void add_read(Sum& sum, const Shape& s, int64_t y, int64_t tap, int64_t rate, int64_t source_stride, int64_t offset) {
  const int64_t shift_y = s.sign * rate * (tap / s.kernel_w - s.kernel_h / 2);
  const int64_t shift_x = s.sign * rate * (tap % s.kernel_w - s.kernel_w / 2);
  if (y + shift_y < 0 || y + shift_y >= s.height || std::abs(shift_x) >= s.width) return;
  sum.reads.push_back({(shift_y * s.width + shift_x) * source_stride + offset, shift_x});
}

// Runs the sums that list(y) returns over `rows` image rows from `first_row`, in parallel.
template <typename T, typename List>
void sum_rows(
    const T* source, int64_t source_stride, T* out, int64_t out_stride, const T* bias, int64_t bias_weight, const Shape& s,
    const std::vector<int64_t>& rates, int64_t first_row, int64_t rows, const List& list) {
  const int64_t reach = *std::max_element(rates.begin(), rates.end()) * (s.kernel_w / 2);
  const int64_t max_reads = s.taps() * int64_t(rates.size());
  const int64_t grain = std::max<int64_t>(1, 100000 / std::max<int64_t>(1, s.width * s.channels * max_reads));
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> offsets(max_reads);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first_pixel = (first_row + row) * s.width;
      sum_row_multiversion(
          source + first_pixel * source_stride, source_stride, out + row * s.width * out_stride, out_stride, bias, bias_weight,
          list((first_row + row) % s.height), reach, s.width, s.channels, offsets.data());
    }
  });
}

}  // namespace

void shift_gather(
    const Tensor& planes, const std::optional<Tensor>& bias, const Tensor& out, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& rates, int64_t sign) {
  const Shape s(out, kernel_size, sign);
  const int64_t source_stride = s.taps() * s.channels, group_stride = out.stride(3);
  const int64_t rates_per_group = int64_t(rates.size()) / s.groups;

  // One sum per group: every tap of the group's rates.
  const auto list = [&](int64_t y) {
    std::vector<Sum> sums;
    for (int64_t g = 0; g < s.groups; ++g) {
      Sum sum{g * group_stride, s.taps() / 2 * s.channels, rates_per_group, {}};
      for (int64_t t = 0; t < s.taps(); ++t) {
        if (t == s.taps() / 2) continue;
        for (int64_t r = g * rates_per_group; r < (g + 1) * rates_per_group; ++r)
          add_read(sum, s, y, t, rates[r], source_stride, t * s.channels);
      }
      sums.push_back(std::move(sum));
    }
    return sums;
  };
  dispatch<float, double, bf16>(out, "pac", [&](auto type) {
    using T = decltype(type);
    sum_rows(
        data_of<const T>(planes), source_stride, data_of<T>(out), out.stride(2), data_of<const T>(bias), rates_per_group, s,
        rates, 0, s.images * s.height, list);
  });
}

void shift_scatter(
    const Tensor& source, const Tensor& out, int64_t first_row, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& rates, int64_t sign) {
  const Shape s(source, kernel_size, sign);
  const int64_t source_stride = s.groups * s.channels;
  const int64_t rates_per_group = int64_t(rates.size()) / s.groups;

  // One sum per tap: every rate, each from its group.
  const auto list = [&](int64_t y) {
    std::vector<Sum> sums;
    for (int64_t t = 0; t < s.taps(); ++t) {
      const bool centre = t == s.taps() / 2;
      Sum sum{t * s.channels, 0, centre ? rates_per_group : 0, {}};
      for (int64_t r = 0; r < int64_t(rates.size()); ++r) {
        const int64_t group = r / rates_per_group;
        if (centre && group == 0) continue;  // counted by the centre's weight
        add_read(sum, s, y, t, rates[r], source_stride, group * s.channels);
      }
      sums.push_back(std::move(sum));
    }
    return sums;
  };
  dispatch<float, double, bf16>(out, "pac", [&](auto type) {
    using T = decltype(type);
    sum_rows<T>(
        data_of<const T>(source), source_stride, data_of<T>(out), s.taps() * s.channels, nullptr, 0, s, rates, first_row,
        out.size(0), list);
  });
}

}  // namespace segops::pac
