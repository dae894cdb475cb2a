// scatter on the CPU. Rows of windows are independent, so threads share them; but where windows
// overlap and rows lie as planes do, threads share planes.

#include "lanes.h"

namespace segops::pag {
namespace {

// A row of the gradient of a map whose windows do not overlap: each pooled value where its offset
// says, else 0. `width` is that of the windows, lanes * width the elements written at a time.
// Returns the first window that is left.
template <typename T, int width, int lanes, typename Offset>
SEGOPS_INLINE int64_t scatter_blocks(
    int64_t i, int64_t whole, const T* pooled, const Offset* offsets, const Target<T>& target, int64_t stride, int64_t rows) {
  using L = Lanes<T, lanes>;
  using Int = typename L::Int;
  for (; i + lanes <= whole; i += lanes) {
    const typename L::Value v = L::V::load(pooled + i);
    const Int at = L::load_offsets(offsets + i, lanes);
    typename L::Value spread[width];
    Int wanted[width];
#pragma GCC unroll 8
    for (int k = 0; k < width; ++k) {  // window of element k * lanes + lane of the block, and its column there
      const Int window = (L::counting() + k * lanes) / width, column = (L::counting() + k * lanes) % width;
      spread[k] = pick(v, window);
      wanted[k] = pick(at, window) - column;
    }
    for (int64_t dy = 0; dy < rows; ++dy) {
#pragma GCC unroll 8
      for (int k = 0; k < width; ++k) {
        const typename L::Value here = wanted[k] == Int{} + Integer<T>(dy * width) ? spread[k] : typename L::Value{};
        target.template put<lanes>(dy * stride + i * width + k * lanes, here);
      }
    }
  }
  return i;
}

template <typename T, int bytes, typename Offset>
SEGOPS_INLINE void scatter_row(
    const Axis& x, const T* pooled, const Offset* offsets, const Target<T>& target, int64_t stride, int64_t rows) {
  int64_t i = 0;
  const auto blocks = [&](auto width) __attribute__((always_inline)) {
    const int64_t whole = x.size / width;
    each_width<T, bytes>([&](auto lanes) __attribute__((always_inline)) {
      i = scatter_blocks<T, width, lanes>(i, whole, pooled, offsets, target, stride, rows);
    });
  };
  if (x.kernel == 1) blocks(constant<1>);
  if (x.kernel == 2) blocks(constant<2>);
  if (x.kernel == 4) blocks(constant<4>);
  if (x.kernel == 8) blocks(constant<8>);
  if (i == x.count) return;
  const int64_t left = x.begin(int32_t(i));
  for (int64_t dy = 0; dy < rows; ++dy) std::memset(target.out + dy * stride + left, 0, (x.size - left) * sizeof(T));
  const Divisor row = Divisor::of(x.kernel);
  for (; i < x.count; ++i) {
    const int32_t dy = row.quotient(offsets[i]), column = x.begin(int32_t(i)) + offsets[i] - dy * x.kernel;
    if (dy < rows && column < x.size) target.out[dy * stride + column] = pooled[i];
  }
}

// Adds a row of pooled values to the rows of their windows, `sums` (rows, x.size).
template <typename T, typename Offset>
SEGOPS_INLINE void add_row(const Axis& x, const T* pooled, const Offset* offsets, accumulator<T>* sums, int64_t rows) {
  const Divisor row = Divisor::of(x.longest());
  for (int32_t i = 0; i < x.count; ++i) {
    const int32_t dy = row.quotient(offsets[i]), column = x.begin(i) + offsets[i] - dy * x.longest();
    if (dy >= rows || column >= x.end(i)) continue;
    if constexpr (sizeof(T) >= 4) {
      sums[dy * x.size + column] += pooled[i];
    } else {
      T value[4] = {pooled[i]};
      sums[dy * x.size + column] += Vec<T, 4>::load(value)[0];
    }
  }
}

// Part y of the gradient of a map. With channels_last: its row y. Else, of channel c: the rows of
// window row y; or where windows overlap all of the plane, in `sums` (longest, width).
template <typename T>
struct Scatter {
  const Windows& windows;
  View<const T> pooled;
  Offsets offsets;
  int64_t channels;
  bool channels_last;
  int64_t n, c, y;
  View<T> out;
  bool non_temporal;
  accumulator<T>* sums;
};

// Row after row of windows; `sums` keeps what the next one shares.
template <typename T, int bytes, typename Offset>
SEGOPS_INLINE void scatter_plane(const Scatter<T>& s, const T* pooled, const Offset* offsets, Target<T> target) {
  const Axis &y = s.windows.y, &x = s.windows.x;
  int64_t shared = 0;  // rows of sums that already hold something
  for (int32_t j = 0; j < y.count; ++j) {
    const int32_t top = y.begin(j), bottom = y.end(j), next = j + 1 < y.count ? y.begin(j + 1) : bottom;
    std::fill(s.sums + shared * x.size, s.sums + int64_t(bottom - top) * x.size, accumulator<T>(0));
    add_row(x, pooled + j * s.pooled.row, offsets + int64_t(j) * x.count, s.sums, bottom - top);
    for (int32_t i = top; i < next; ++i, target.out += s.out.row)
      round_row<T, bytes>(s.sums + int64_t(i - top) * x.size, x.size, target);
    shared = bottom - next;
    std::copy_n(s.sums + int64_t(next - top) * x.size, shared * x.size, s.sums);
  }
}

// A window that holds a pixel: its values, its offsets, and the one that means the pixel.
template <typename T, typename Offset>
struct Holder {
  const T* pooled;
  const Offset* offsets;
  int32_t wanted;
};

// `lanes` channels of one pixel: the sum over the windows that hold it.
template <typename T, int lanes, typename Offset>
SEGOPS_INLINE void scatter_channels(
    int64_t c, int64_t n, const Holder<T, Offset>* holders, int count, const Target<T>& target) {
  using L = Lanes<T, lanes>;
  typename L::Value sum{};
  for (int i = 0; i < count; ++i) {
    const typename L::Int at = L::load_offsets(holders[i].offsets + c, n);
    const typename L::Value v = L::load(holders[i].pooled + c, n);
    sum = at == typename L::Int{} + holders[i].wanted ? sum + v : sum;
  }
  target.template put<lanes>(c, sum, n);
}

// `lanes` channels of the pixels in one row of a window that shares none with others.
template <typename T, int lanes, typename Offset>
SEGOPS_INLINE void scatter_window(
    int64_t c, int64_t n, const T* pooled, const Offset* offsets, int32_t wanted, int32_t columns, const Target<T>& target,
    int64_t pixel) {
  using L = Lanes<T, lanes>;
  const typename L::Int at = L::load_offsets(offsets + c, n);
  const typename L::Value v = L::load(pooled + c, n);
  for (int32_t dx = 0; dx < columns; ++dx) {
    const typename L::Value here = at == typename L::Int{} + (wanted + dx) ? v : typename L::Value{};
    target.template put<lanes>(dx * pixel + c, here, n);
  }
}

template <typename T, int bytes, typename Offset>
SEGOPS_INLINE void scatter_windows(const Scatter<T>& s, const T* pooled, const Offset* offsets, Target<T> target) {
  const Axis &y = s.windows.y, &x = s.windows.x;
  const int32_t j = int32_t(s.y) / y.kernel, wanted = int32_t(s.y) % y.kernel * x.kernel;
  pooled += j * s.pooled.row;
  offsets += int64_t(j) * x.count * s.channels;
  for (int32_t i = 0; i < x.count; ++i) {
    const int32_t columns = x.end(i) - x.begin(i);
    int64_t c = 0;
    const auto blocks = [&](auto lanes) __attribute__((always_inline)) {
      for (; c + lanes <= s.channels; c += lanes)
        scatter_window<T, lanes>(c, lanes, pooled, offsets, wanted, columns, target, s.out.pixel);
    };
    blocks(constant<kLanes<T, bytes>>);
    blocks(constant<kMinLanes<T>>);
    if (c < s.channels)
      scatter_window<T, kMinLanes<T>>(c, s.channels - c, pooled, offsets, wanted, columns, target, s.out.pixel);
    pooled += s.pooled.pixel;
    offsets += s.channels;
    target.out += x.kernel * s.out.pixel;
  }
}

template <typename T, int bytes, typename Offset>
SEGOPS_INLINE void scatter_pixels(const Scatter<T>& s, const T* pooled, const Offset* offsets, Target<T> target) {
  const Axis &y_axis = s.windows.y, &x_axis = s.windows.x;
  const int32_t y = int32_t(s.y), row = s.windows.row;
  const int32_t first = y_axis.first(y), last = y_axis.last(y);
  for (int32_t x = 0; x < x_axis.size; ++x, target.out += s.out.pixel) {
    Holder<T, Offset> holders[4];  // at most two windows along an axis share an element
    int count = 0;
    for (int32_t j = first; j <= last; ++j) {
      for (int32_t i = x_axis.first(x); i <= x_axis.last(x); ++i) {
        holders[count++] = {
            pooled + j * s.pooled.row + i * s.pooled.pixel, offsets + (int64_t(j) * x_axis.count + i) * s.channels,
            (y - y_axis.begin(j)) * row + x - x_axis.begin(i)};
      }
    }
    int64_t c = 0;
    const auto blocks = [&](auto lanes) __attribute__((always_inline)) {
      for (; c + lanes <= s.channels; c += lanes) scatter_channels<T, lanes>(c, lanes, holders, count, target);
    };
    blocks(constant<kLanes<T, bytes>>);
    blocks(constant<kMinLanes<T>>);
    if (c < s.channels) scatter_channels<T, kMinLanes<T>>(c, s.channels - c, holders, count, target);
  }
}

template <typename T, int bytes, typename Offset>
SEGOPS_INLINE void scatter_offsets(const Scatter<T>& s, const Offset* offsets) {
  const Windows& w = s.windows;
  const int64_t windows = int64_t(w.y.count) * w.x.count;
  const T* pooled = s.pooled.at(s.n, s.c, 0, 0);
  Target<T> target{s.out.at(s.n, s.c, 0, 0), s.non_temporal};
  if (s.channels_last) {
    offsets += s.n * windows * s.channels;
    target.out += s.y * s.out.row;
    return w.overlap() ? scatter_pixels<T, bytes>(s, pooled, offsets, target)
                       : scatter_windows<T, bytes>(s, pooled, offsets, target);
  }
  offsets += (s.n * s.channels + s.c) * windows;
  if (w.overlap()) return scatter_plane<T, bytes>(s, pooled, offsets, target);
  const int32_t top = w.y.begin(int32_t(s.y)), rows = w.y.end(int32_t(s.y)) - top;
  target.out += top * s.out.row;
  scatter_row<T, bytes>(w.x, pooled + s.y * s.pooled.row, offsets + s.y * w.x.count, target, s.out.row, rows);
}

#define SEGOPS_SCATTER(target, bytes, T)                                               \
  target void scatter_part(const Scatter<T>& s) {                                      \
    if (s.offsets.two_bytes)                                                           \
      scatter_offsets<T, bytes>(s, reinterpret_cast<const uint16_t*>(s.offsets.data)); \
    else                                                                               \
      scatter_offsets<T, bytes>(s, reinterpret_cast<const uint8_t*>(s.offsets.data));  \
  }
#define SEGOPS_SCATTER_OF_ALL(target, bytes) \
  SEGOPS_SCATTER(target, bytes, float)       \
  SEGOPS_SCATTER(target, bytes, double)      \
  SEGOPS_SCATTER(target, bytes, bf16)        \
  SEGOPS_SCATTER(target, bytes, fp16)
SEGOPS_WIDTHS(SEGOPS_SCATTER_OF_ALL)
#undef SEGOPS_SCATTER_OF_ALL
#undef SEGOPS_SCATTER

}  // namespace

void scatter(const Windows& w, const Tensor& pooled, const char* offsets, const Tensor& out, bool channels_last) {
  const Offsets at{const_cast<char*>(offsets), w.two_bytes};
  const bool by_plane = !channels_last && w.overlap();
  const int64_t channels = out.size(1), planes = channels_last ? 1 : channels;
  const int64_t parts = by_plane ? 1 : channels_last ? w.y.size : w.y.count;
  dispatch<float, double, bf16, fp16>(out, "pag_scatter", [&](auto type) {
    using T = decltype(type);
    const View<const T> from(pooled);
    const View<T> to(out);
    const bool non_temporal = leaves_caches(out);
    share(out.size(0) * planes * parts, out.numel() / (out.size(0) * planes * parts), [&](int64_t begin, int64_t end) {
      std::vector<accumulator<T>> sums(by_plane ? int64_t(w.y.longest()) * w.x.size + kPadding : 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / parts / planes, c = i / parts % planes, y = i % parts;
        scatter_part({w, from, at, channels, channels_last, n, c, y, to, non_temporal, sums.data()});
      }
    });
  });
}

}  // namespace segops::pag
