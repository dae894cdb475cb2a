// Pooling, scatter and gather on the CPU (pag.h says what they compute).
//
// Pool and gather read windows in the same order and differ in what they do with an element: `Max` and `Select`.
// With channels_last, a vector is channels of one pixel. Otherwise it is neighbouring windows of one row: rows of 1, 2, 4 or 8
// elements per window are loaded as they lie and dealt out; of other windows, first the columns are pooled, then along them.
// Rows of windows are independent, so threads share them; but where windows overlap, threads share planes.

#include "../common/cpu.h"
#include "pag.h"

#include <limits>

namespace segops {
namespace {

template <int n>
constexpr std::integral_constant<int, n> size;

// Elements of T in a register of so many bytes, and in the narrowest that is used.
template <typename T, int bytes>
constexpr int kLanes = bytes / sizeof(accumulator<T>);
template <typename T>
constexpr int kLeast = kLanes<T, 16>;

constexpr int64_t kPadding = 16;  // what a whole vector may read or write beyond a row of totals

// Calls fn with the lanes of a register, of its half and its quarter, as far as there are such.
template <typename T, int bytes, typename F>
SEGOPS_INLINE void each_width(const F& fn) {
  fn(size<kLanes<T, bytes>>);
  if constexpr (bytes >= 32) fn(size<kLanes<T, bytes / 2>>);
  if constexpr (bytes >= 64) fn(size<kLanes<T, bytes / 4>>);
}

// Vectors of T's accumulators, of integers beside them, and their parts.
template <typename T, int lanes>
struct Lanes {
  using V = Vec<T, lanes>;
  using Value = typename V::type;
  using Integer = std::conditional_t<std::is_same_v<accumulator<T>, double>, int64_t, int32_t>;
  using Int = typename vector_of<Integer, lanes>::type;
  using Short = typename vector_of<uint16_t, lanes>::type;  // bytes widen by way of these: at once, GCC does it lane by lane

  static SEGOPS_INLINE Value load(const T* p, int64_t n) {  // the first n
    if (n >= lanes) return V::load(p);
    T part[lanes] = {};
    for (int64_t i = 0; i < n; ++i) part[i] = p[i];
    return V::load(part);
  }
  static SEGOPS_INLINE void store(T* p, Value v, int64_t n, bool streamed) {
    if (n >= lanes) return streamed ? stream(p, V::narrow(v)) : V::store(p, v);
    T part[lanes];
    V::store(part, v);
    for (int64_t i = 0; i < n; ++i) p[i] = part[i];
  }

  template <typename Offset>
  static SEGOPS_INLINE Int load_offsets(const Offset* p, int64_t n) {
    using Part = typename vector_of<Offset, lanes>::type;
    Part part{};
    std::memcpy(&part, p, (n >= lanes ? lanes : n) * sizeof(Offset));
    return __builtin_convertvector(__builtin_convertvector(part, Short), Int);
  }
  template <typename Offset>
  static SEGOPS_INLINE void store_offsets(Offset* p, Int v, int64_t n) {
    const auto part = __builtin_convertvector(__builtin_convertvector(v, Short), typename vector_of<Offset, lanes>::type);
    std::memcpy(p, &part, (n >= lanes ? lanes : n) * sizeof(Offset));
  }
  static SEGOPS_INLINE Int counting() {
    Int v;
    for (int i = 0; i < lanes; ++i) v[i] = i;
    return v;
  }
};

// A map's offsets, one or two bytes each; none, if null.
struct Offsets {
  char* data;
  bool two_bytes;

  Offsets from(int64_t i) const { return {data ? data + i * (two_bytes ? 2 : 1) : nullptr, two_bytes}; }
};

// What becomes of the elements of a window: the largest is found, or the one at a known offset. Without constructors, which
// clang 14 forgets to emit where only multiversioned functions call them.
template <typename T, int lanes>
struct Max {
  using L = Lanes<T, lanes>;
  typename L::Value value;
  typename L::Int at;

  SEGOPS_INLINE void start(Offsets, int64_t) {
    value = typename L::Value{} - std::numeric_limits<accumulator<T>>::infinity();
    at = typename L::Int{};
  }
  template <typename At>
  SEGOPS_INLINE void take(typename L::Value v, At offset) {
    // NaN counts as larger than anything. One comparison in each choice: several, and GCC 12 chooses lane by lane.
    constexpr auto infinity = std::numeric_limits<accumulator<T>>::infinity();
    const typename L::Value u = v == v ? v : typename L::Value{} + infinity;
    const typename L::Value w = v == v ? value : typename L::Value{} - infinity;
    value = u > w ? v : value;
    at = u > w ? typename L::Int{} + offset : at;
  }
  SEGOPS_INLINE void finish(Offsets offsets, int64_t n) const {
    if (!offsets.data) return;
    if (offsets.two_bytes)
      L::store_offsets(reinterpret_cast<uint16_t*>(offsets.data), at, n);
    else
      L::store_offsets(reinterpret_cast<uint8_t*>(offsets.data), at, n);
  }
};

template <typename T, int lanes>
struct Select {
  using L = Lanes<T, lanes>;
  typename L::Value value;
  typename L::Int at;

  SEGOPS_INLINE void start(Offsets offsets, int64_t n) {
    value = typename L::Value{};
    at = offsets.two_bytes ? L::load_offsets(reinterpret_cast<const uint16_t*>(offsets.data), n)
                           : L::load_offsets(reinterpret_cast<const uint8_t*>(offsets.data), n);
  }
  template <typename At>
  SEGOPS_INLINE void take(typename L::Value v, At offset) {
    value = at == typename L::Int{} + offset ? v : value;
  }
  SEGOPS_INLINE void finish(Offsets, int64_t) const {}
};

// v holds n * lanes consecutive elements; afterwards v[i] holds elements i, i + n, i + 2n, ...
template <int n, typename L>
SEGOPS_INLINE void deal(typename L::Value* v) {
  if constexpr (n > 1) {
    constexpr int half = n / 2;
    const typename L::Int even = L::counting() * 2, odd = even + 1;
    typename L::Value e[half], o[half];
#pragma GCC unroll 4
    for (int i = 0; i < half; ++i) {
      e[i] = pick(v[2 * i], v[2 * i + 1], even);
      o[i] = pick(v[2 * i], v[2 * i + 1], odd);
    }
    deal<half, L>(e);
    deal<half, L>(o);
#pragma GCC unroll 4
    for (int i = 0; i < half; ++i) {
      v[2 * i] = e[i];
      v[2 * i + 1] = o[i];
    }
  }
}

// A map or its gradient, for kernels: element (n, c, y, x) is data[n * image + c * channel + y * row + x * pixel].
template <typename T>
struct View {
  T* data;
  int64_t image, channel, row, pixel;
};

template <typename T>
View<T> view(const Tensor& tensor) {
  T* data = static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
  return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

// Division of numbers below 2^16 by one of them.
struct Divisor {
  uint64_t reciprocal;

  static SEGOPS_INLINE Divisor of(int32_t divisor) { return {(uint64_t(1) << 32) / divisor + 1}; }
  SEGOPS_INLINE int32_t quotient(uint32_t n) const { return int32_t(n * reciprocal >> 32); }
};

// Which elements a vector of windows reads along x, for windows of any length: its lanes' column dx and offset dx, the last one
// repeated where a window is shorter. Tables of (longest, count, padded by a vector).
struct Columns {
  int64_t padded;
  std::vector<int32_t> column, offset;

  explicit Columns(const Axis& x) : padded(x.count + kPadding), column(padded * x.longest()), offset(column.size()) {
    for (int32_t dx = 0; dx < x.longest(); ++dx) {
      for (int64_t lane = 0; lane < padded; ++lane) {
        const int32_t i = int32_t(std::min<int64_t>(lane, x.count - 1));
        const int32_t c = std::min(x.begin(i) + dx, x.end(i) - 1);
        column[dx * padded + lane] = c;
        offset[dx * padded + lane] = c - x.begin(i);
      }
    }
  }
};

// Where results go: to a map, past the caches if it is large; or added to a row of totals, which is padded to whole vectors.
template <typename T>
struct Target {
  T* out;
  bool streamed;
  accumulator<T>* total = nullptr;

  // The first n of `lanes` results from the i-th on.
  template <int lanes>
  SEGOPS_INLINE void put(int64_t i, typename Lanes<T, lanes>::Value value, int64_t n = lanes) const {
    using A = Vec<accumulator<T>, lanes>;
    if (total)
      A::store(total + i, A::load(total + i) + value);
    else
      Lanes<T, lanes>::store(out + i, value, n, streamed);
  }
};

// Windows i .. of a row, `lanes` at a time, of exactly `width` elements along x. Returns the first that is left.
template <template <typename, int> class Op, typename T, int width, int lanes>
SEGOPS_INLINE int64_t
reduce_blocks(int64_t i, int64_t whole, const T* p, int64_t stride, int64_t rows, Offsets offsets, const Target<T>& target) {
  using L = Lanes<T, lanes>;
  for (; i + lanes <= whole; i += lanes) {
    Op<T, lanes> op;
    op.start(offsets.from(i), lanes);
    for (int64_t dy = 0; dy < rows; ++dy) {
      typename L::Value v[width];
#pragma GCC unroll 8
      for (int k = 0; k < width; ++k) v[k] = L::V::load(p + dy * stride + i * width + k * lanes);
      deal<width, L>(v);
#pragma GCC unroll 8
      for (int dx = 0; dx < width; ++dx) op.take(v[dx], typename L::Integer(dy * width + dx));
    }
    op.finish(offsets.from(i), lanes);
    target.template put<lanes>(i, op.value);
  }
  return i;
}

// The maxima of columns, padded to whole vectors, and where in the column they lie.
template <typename T>
struct ColumnMaxima {
  std::vector<accumulator<T>> value;
  std::vector<typename Lanes<T, 4>::Integer> at;

  explicit ColumnMaxima(int64_t columns) : value(columns + kPadding), at(columns + kPadding) {}
};

// Windows i .. of a row, of any width: first down the columns, which lie as vectors do, then along the windows.
template <typename T, int bytes>
SEGOPS_INLINE void pool_rest(
    int64_t i, const Axis& x, const Columns& columns, const T* p, int64_t stride, int64_t rows, Offsets offsets,
    const Target<T>& target, ColumnMaxima<T>& maxima) {
  constexpr int lanes = kLanes<T, bytes>;
  using L = Lanes<T, lanes>;
  using Value = typename L::Value;
  using Int = typename L::Int;
  for (int64_t c = x.begin(int32_t(i)); c < x.size; c += lanes) {
    Max<T, lanes> max;
    max.start(offsets, lanes);
    for (int64_t dy = 0; dy < rows; ++dy) max.take(L::load(p + dy * stride + c, x.size - c), typename L::Integer(dy));
    std::memcpy(&maxima.value[c], &max.value, sizeof(Value));
    std::memcpy(&maxima.at[c], &max.at, sizeof(Int));
  }
  constexpr auto infinity = std::numeric_limits<accumulator<T>>::infinity();
  const typename L::Integer row = x.longest();
  for (; i < x.count; i += lanes) {
    Value value{};
    Int at{};
    for (int64_t dx = 0; dx < row; ++dx) {
      const int32_t *column = &columns.column[dx * columns.padded + i], *offset = &columns.offset[dx * columns.padded + i];
      accumulator<T> values[lanes];
      typename L::Integer places[lanes];
      for (int k = 0; k < lanes; ++k) {
        values[k] = maxima.value[column[k]];
        places[k] = maxima.at[column[k]] * row + offset[k];
      }
      Value v;
      Int place;
      std::memcpy(&v, values, sizeof v);
      std::memcpy(&place, places, sizeof place);
      if (dx == 0) {
        value = v;
        at = place;
        continue;
      }
      // As `Max::take`, but columns do not come in the order of rows: of equals the first counts, of NaN the last.
      const Value u = v == v ? v : Value{} + infinity, w = v == v ? value : Value{} - infinity;
      const Int first = place < at ? place : at, last = place > at ? place : at;
      const Int equal = v == value ? first : at, larger = value == value ? place : last;
      const Int next = u > w ? larger : equal;
      value = next == at ? value : v;
      at = next;
    }
    const int64_t n = std::min<int64_t>(lanes, x.count - i);
    Max<T, lanes> max;
    max.at = at;
    max.finish(offsets.from(i), n);
    target.template put<lanes>(i, value, n);
  }
}

// Windows i .. of a row, of any width, one by one.
template <typename T, typename Offset>
SEGOPS_INLINE void gather_rest(
    int64_t i, const Axis& x, const T* p, int64_t stride, int64_t rows, const Offset* offsets, T* out) {
  const Divisor row = Divisor::of(x.longest());
  for (; i < x.count; ++i) {
    const int32_t dy = row.quotient(offsets[i]), column = x.begin(int32_t(i)) + offsets[i] - dy * x.longest();
    out[i] = dy < rows && column < x.end(int32_t(i)) ? p[dy * stride + column] : T{};
  }
}

// A row of windows of one plane, whose first row begins at p.
template <template <typename, int> class Op, typename T, int bytes>
SEGOPS_INLINE void reduce_row(
    const Axis& x, const T* p, int64_t stride, int64_t rows, Offsets offsets, const Target<T>& target, const Columns* columns,
    ColumnMaxima<T>* scratch) {
  int64_t i = 0;
  const auto blocks = [&](auto width) __attribute__((always_inline)) {
    const int64_t whole = x.size / width;
    each_width<T, bytes>([&](auto lanes) __attribute__((always_inline)) {
      i = reduce_blocks<Op, T, width, lanes>(i, whole, p, stride, rows, offsets, target);
    });
  };
  if (x.kernel == 1) blocks(size<1>);
  if (x.kernel == 2) blocks(size<2>);
  if (x.kernel == 4) blocks(size<4>);
  if (x.kernel == 8) blocks(size<8>);
  if (i == x.count) return;
  if constexpr (std::is_same_v<Op<T, 4>, Max<T, 4>>)
    pool_rest<T, bytes>(i, x, *columns, p, stride, rows, offsets, target, *scratch);
  else if (offsets.two_bytes)
    gather_rest(i, x, p, stride, rows, reinterpret_cast<const uint16_t*>(offsets.data), target.out);
  else
    gather_rest(i, x, p, stride, rows, reinterpret_cast<const uint8_t*>(offsets.data), target.out);
}

// Channels c .. of one window, `lanes` at a time; p points to its first pixel.
template <template <typename, int> class Op, typename T, int lanes>
SEGOPS_INLINE void reduce_channels(
    int64_t c, int64_t n, const T* p, int64_t stride, int64_t pixel, int64_t rows, int64_t columns, int64_t row,
    Offsets offsets, const Target<T>& target) {
  using L = Lanes<T, lanes>;
  Op<T, lanes> op;
  op.start(offsets.from(c), n);
  for (int64_t dy = 0; dy < rows; ++dy)
    for (int64_t dx = 0; dx < columns; ++dx)
      op.take(L::load(p + dy * stride + dx * pixel + c, n), typename L::Integer(dy * row + dx));
  op.finish(offsets.from(c), n);
  target.template put<lanes>(c, op.value, n);
}

template <template <typename, int> class Op, typename T, int bytes>
SEGOPS_INLINE void reduce_pixel(
    const T* p, int64_t stride, int64_t pixel, int64_t rows, int64_t columns, int64_t row, int64_t channels, Offsets offsets,
    const Target<T>& target) {
  int64_t c = 0;
  const auto blocks = [&](auto lanes) __attribute__((always_inline)) {
    for (; c + lanes <= channels; c += lanes)
      reduce_channels<Op, T, lanes>(c, lanes, p, stride, pixel, rows, columns, row, offsets, target);
  };
  blocks(size<kLanes<T, bytes>>);
  blocks(size<kLeast<T>>);
  if (c < channels) reduce_channels<Op, T, kLeast<T>>(c, channels - c, p, stride, pixel, rows, columns, row, offsets, target);
}

// A map of out's own size: copied, or added to the total.
template <typename T, int bytes>
SEGOPS_INLINE void copy(const T* p, int64_t n, const Target<T>& target) {
  using Raw = typename vector_of<char, bytes>::type;
  constexpr int lanes = kLanes<T, bytes>, step = bytes / sizeof(T);
  int64_t i = 0;
  if (!target.total) {
    for (; target.streamed && i + step <= n; i += step) {
      Raw raw;
      std::memcpy(&raw, p + i, bytes);
      stream(target.out + i, raw);
    }
    std::memcpy(target.out + i, p + i, (n - i) * sizeof(T));
  } else {
    for (; i < n; i += lanes) target.template put<lanes>(i, Lanes<T, lanes>::load(p + i, n - i));
  }
}

// Row y of the windows of a map: of channel c, or with channels_last of all channels. To out, or added to total.
template <typename T>
struct Reduction {
  const Windows& windows;
  View<T> in;
  int64_t channels;
  Offsets offsets;
  bool channels_last;
  int64_t n, c, y;
  Target<T> target;
  int64_t out_pixel;
  const Columns* columns = nullptr;  // these two for pooling planes
  ColumnMaxima<T>* scratch = nullptr;
};

template <template <typename, int> class Op, typename T, int bytes>
SEGOPS_INLINE void reduce(const Reduction<T>& r) {
  const Windows& w = r.windows;
  const int32_t top = w.y.begin(int32_t(r.y)), rows = w.y.end(int32_t(r.y)) - top;
  const bool copied = !r.offsets.data && w.identity();
  const T* p = r.in.data + r.n * r.in.image + r.c * r.in.channel + top * r.in.row;
  if (!r.channels_last) {
    if (copied) return copy<T, bytes>(p, w.x.count, r.target);
    const Offsets at = r.offsets.from(((r.n * r.channels + r.c) * w.y.count + r.y) * w.x.count);
    return reduce_row<Op, T, bytes>(w.x, p, r.in.row, rows, at, r.target, r.columns, r.scratch);
  }
  for (int32_t x = 0; x < w.x.count; ++x) {
    const int32_t left = w.x.begin(x), width = w.x.end(x) - left;
    const T* from = p + left * r.in.pixel;
    const Target<T> target{
        r.target.out + x * r.out_pixel, r.target.streamed, r.target.total ? r.target.total + x * r.channels : nullptr};
    const Offsets at = r.offsets.from(((r.n * w.y.count + r.y) * w.x.count + x) * r.channels);
    if (copied)
      copy<T, bytes>(from, r.channels, target);
    else
      reduce_pixel<Op, T, bytes>(from, r.in.row, r.in.pixel, rows, width, w.row, r.channels, at, target);
  }
}

// Narrows a row of totals.
template <typename T, int bytes>
SEGOPS_INLINE void round_row(const accumulator<T>* total, int64_t n, const Target<T>& target) {
  constexpr int lanes = kLanes<T, bytes>;
  for (int64_t i = 0; i < n; i += lanes) target.template put<lanes>(i, Vec<accumulator<T>, lanes>::load(total + i), n - i);
}

// A row of the gradient of a map whose windows do not overlap: each pooled value where its offset says, else 0.
// `width` is that of the windows, lanes * width the elements written at a time. Returns the first window that is left.
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
        const typename L::Value here = wanted[k] == Int{} + typename L::Integer(dy * width) ? spread[k] : typename L::Value{};
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
  if (x.kernel == 1) blocks(size<1>);
  if (x.kernel == 2) blocks(size<2>);
  if (x.kernel == 4) blocks(size<4>);
  if (x.kernel == 8) blocks(size<8>);
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

// Part y of the gradient of a map. With channels_last: its row y. Else, of channel c: the rows of window row y; or
// where windows overlap all of the plane, `sums` being (longest, width) to work in.
template <typename T>
struct Scatter {
  const Windows& windows;
  View<T> pooled;
  Offsets offsets;
  int64_t channels;
  bool channels_last;
  int64_t n, c, y;
  View<T> out;
  bool streamed;
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
    blocks(size<kLanes<T, bytes>>);
    blocks(size<kLeast<T>>);
    if (c < s.channels) scatter_window<T, kLeast<T>>(c, s.channels - c, pooled, offsets, wanted, columns, target, s.out.pixel);
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
    blocks(size<kLanes<T, bytes>>);
    blocks(size<kLeast<T>>);
    if (c < s.channels) scatter_channels<T, kLeast<T>>(c, s.channels - c, holders, count, target);
  }
}

template <typename T, int bytes, typename Offset>
SEGOPS_INLINE void scatter(const Scatter<T>& s, const Offset* offsets) {
  const Windows& w = s.windows;
  const int64_t windows = int64_t(w.y.count) * w.x.count;
  const T* pooled = s.pooled.data + s.n * s.pooled.image + s.c * s.pooled.channel;
  Target<T> target{s.out.data + s.n * s.out.image + s.c * s.out.channel, s.streamed};
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

template <typename T, int bytes>
SEGOPS_INLINE void scatter(const Scatter<T>& s) {
  if (s.offsets.two_bytes)
    scatter<T, bytes>(s, reinterpret_cast<const uint16_t*>(s.offsets.data));
  else
    scatter<T, bytes>(s, reinterpret_cast<const uint8_t*>(s.offsets.data));
}

#define SEGOPS_ROWS(target, bytes, T)                                                    \
  target void pool_row(const Reduction<T>& r) {                                          \
    reduce<Max, T, bytes>(r);                                                            \
  }                                                                                      \
  target void gather_row(const Reduction<T>& r) {                                        \
    reduce<Select, T, bytes>(r);                                                         \
  }                                                                                      \
  target void scatter_part(const Scatter<T>& s) {                                        \
    scatter<T, bytes>(s);                                                                \
  }                                                                                      \
  target void round_total(const accumulator<T>* total, int64_t n, const Target<T>& to) { \
    round_row<T, bytes>(total, n, to);                                                   \
  }
#define SEGOPS_ROWS_OF_ALL(target, bytes) \
  SEGOPS_ROWS(target, bytes, float)       \
  SEGOPS_ROWS(target, bytes, double)      \
  SEGOPS_ROWS(target, bytes, bf16)        \
  SEGOPS_ROWS(target, bytes, fp16)
SEGOPS_WIDTHS(SEGOPS_ROWS_OF_ALL)
#undef SEGOPS_ROWS_OF_ALL
#undef SEGOPS_ROWS

// Elements that are worth to be handed out by themselves. A thread takes two such pieces at least.
constexpr int64_t kPiece = 16384;

// Results of more bytes than that leave the caches before anyone reads them: they are written past them.
constexpr int64_t kStreamed = 4 << 20;

bool streamed(const Tensor& out) {
  return out.numel() * int64_t(out.element_size()) > kStreamed;
}

template <typename F>
void parallel(int64_t pieces, int64_t grain, const F& fn) {
  torch::stable::parallel_for(0, pieces, grain, [&](int64_t begin, int64_t end) {
    fn(begin, end);
    end_stream();
  });
}

// fn(begin, end) over ranges of `rows` rows, in parallel where there are enough of their elements.
template <typename F>
void share(int64_t rows, int64_t elements, const F& fn) {
  parallel(rows, std::max<int64_t>(1, 2 * kPiece / std::max<int64_t>(1, elements)), fn);
}

}  // namespace

void pag_pool_cpu(
    std::vector<Tensor> maps, Tensor out, Tensor offsets, std::vector<int64_t> kernel_size, bool concat, bool channels_last) {
  const std::vector<Part> parts = check_pool(maps, out, offsets, kernel_size, concat, channels_last);
  std::vector<Columns> columns;
  for (const Part& part : parts)
    if (!channels_last) columns.emplace_back(part.windows.x);
  char* held = static_cast<char*>(offsets.mutable_data_ptr());
  const int64_t images = out.size(0), channels = out.size(1), height = out.size(2), width = out.size(3);
  dispatch<float, double, bf16, fp16>(out, "pag_pool", [&](auto type) {
    using T = decltype(type);
    using Total = std::vector<accumulator<T>>;
    const View<T> to = view<T>(out);
    const bool past = streamed(out);
    std::vector<View<T>> from;
    int64_t widest = 0;
    for (const Tensor& map : maps) {
      from.push_back(view<T>(map));
      widest = std::max(widest, map.size(3));
    }
    const auto row = [&](size_t m, int64_t n, int64_t c, int64_t y, accumulator<T>* total, ColumnMaxima<T>* scratch) {
      const Part& part = parts[m];
      const Offsets at{part.offsets < 0 ? nullptr : held + part.offsets, part.windows.two_bytes};
      T* p = to.data + n * to.image + (part.first_channel + c) * to.channel + y * to.row;
      pool_row(
          {part.windows,
           from[m],
           part.channels,
           at,
           channels_last,
           n,
           c,
           y,
           {p, past, total},
           to.pixel,
           channels_last ? nullptr : &columns[m],
           scratch});
    };
    const auto sum = [&](int64_t n, int64_t c, int64_t y, Total& total, ColumnMaxima<T>* scratch) {
      std::fill(total.begin(), total.end(), accumulator<T>(-0.));  // to which -0 may be added and stay
      for (size_t m = 0; m < maps.size(); ++m) row(m, n, c, y, total.data(), scratch);
    };
    if (channels_last) {
      share(images * height, width * channels, [&](int64_t begin, int64_t end) {
        Total total(concat ? 0 : width * channels + kPadding);
        for (int64_t r = begin; r < end; ++r) {
          const int64_t n = r / height, y = r % height;
          if (concat) {
            for (size_t m = 0; m < maps.size(); ++m) row(m, n, 0, y, nullptr, nullptr);
          } else {
            sum(n, 0, y, total, nullptr);
            T* p = to.data + n * to.image + y * to.row;
            for (int64_t x = 0; x < width; ++x)
              round_total(total.data() + x * channels, channels, Target<T>{p + x * to.pixel, past});
          }
        }
      });
    } else if (concat) {
      // Pieces of all maps, of about as many elements each, so that threads have equal work and meet once.
      std::vector<int64_t> rows, pieces{0};  // rows of windows in a piece of each map, and pieces before it
      for (const Part& part : parts) {
        const int64_t elements = part.windows.y.longest() * int64_t(part.windows.x.size) + width;
        rows.push_back(std::max<int64_t>(1, kPiece / elements));
        pieces.push_back(pieces.back() + (images * part.channels * height + rows.back() - 1) / rows.back());
      }
      parallel(pieces.back(), 2, [&](int64_t begin, int64_t end) {
        ColumnMaxima<T> scratch(widest);
        size_t m = 0;
        for (int64_t piece = begin; piece < end; ++piece) {
          while (piece >= pieces[m + 1]) ++m;
          const int64_t planes = parts[m].channels, first = (piece - pieces[m]) * rows[m];
          for (int64_t r = first; r < std::min(first + rows[m], images * planes * height); ++r)
            row(m, r / height / planes, r / height % planes, r % height, nullptr, &scratch);
        }
      });
    } else {
      share(images * channels * height, width, [&](int64_t begin, int64_t end) {
        ColumnMaxima<T> scratch(widest);
        Total total(width + kPadding);
        for (int64_t r = begin; r < end; ++r) {
          const int64_t n = r / height / channels, c = r / height % channels, y = r % height;
          sum(n, c, y, total, &scratch);
          round_total(total.data(), width, Target<T>{to.data + n * to.image + c * to.channel + y * to.row, past});
        }
      });
    }
  });
}

void pag_scatter_cpu(Tensor pooled, Tensor offsets, Tensor out, std::vector<int64_t> kernel_size, bool channels_last) {
  const Windows w = check_offsets(pooled, out, offsets, kernel_size, channels_last, "pag_scatter");
  const Offsets at{static_cast<char*>(const_cast<void*>(offsets.const_data_ptr())), w.two_bytes};
  const bool by_plane = !channels_last && w.overlap();
  if (out.numel() == 0) return;
  const int64_t channels = out.size(1), planes = channels_last ? 1 : channels;
  const int64_t parts = by_plane ? 1 : channels_last ? w.y.size : w.y.count;
  dispatch<float, double, bf16, fp16>(out, "pag_scatter", [&](auto type) {
    using T = decltype(type);
    const View<T> from = view<T>(pooled), to = view<T>(out);
    const bool past = streamed(out);
    share(out.size(0) * planes * parts, out.numel() / (out.size(0) * planes * parts), [&](int64_t begin, int64_t end) {
      std::vector<accumulator<T>> sums(by_plane ? int64_t(w.y.longest()) * w.x.size + kPadding : 0);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / parts / planes, c = i / parts % planes, y = i % parts;
        scatter_part({w, from, at, channels, channels_last, n, c, y, to, past, sums.data()});
      }
    });
  });
}

void pag_gather_cpu(Tensor input, Tensor offsets, Tensor out, std::vector<int64_t> kernel_size, bool channels_last) {
  const Windows w = check_offsets(out, input, offsets, kernel_size, channels_last, "pag_gather");
  const Offsets at{static_cast<char*>(const_cast<void*>(offsets.const_data_ptr())), w.two_bytes};
  const int64_t channels = out.size(1), height = out.size(2), planes = channels_last ? 1 : channels;
  dispatch<float, double, bf16, fp16>(out, "pag_gather", [&](auto type) {
    using T = decltype(type);
    const View<T> from = view<T>(input), to = view<T>(out);
    const bool past = streamed(out);
    share(out.size(0) * planes * height, out.size(3) * channels / planes, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t n = r / height / planes, c = r / height % planes, y = r % height;
        T* p = to.data + n * to.image + c * to.channel + y * to.row;
        gather_row({w, from, channels, at, channels_last, n, c, y, {p, past}, to.pixel});
      }
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(segops, CPU, m) {
  m.impl("pag_pool", TORCH_BOX(&pag_pool_cpu));
  m.impl("pag_scatter", TORCH_BOX(&pag_scatter_cpu));
  m.impl("pag_gather", TORCH_BOX(&pag_gather_cpu));
}

}  // namespace segops
