// pool and gather on the CPU. They read windows in the same order and differ in what they do with
// an element: `Max` and `Select`. Rows of 1, 2, 4 or 8 elements per window are loaded as they lie
// and deinterleaved; of other windows, first the columns are pooled, then along them. Rows of
// windows are independent, so threads share them.

#include "lanes.h"

#include <limits>

namespace segops::pag {
namespace {

// What becomes of the elements of a window: the largest is found, or the one at a known offset. No
// constructors: clang 14 forgets to emit those that only multiversioned functions call.
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
    // NaN counts as the largest. One comparison in each choice: with more, GCC 12 goes lane by
    // lane.
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
SEGOPS_INLINE void deinterleave(typename L::Value* v) {
  if constexpr (n > 1) {
    constexpr int half = n / 2;
    const typename L::Int even = L::counting() * 2, odd = even + 1;
    typename L::Value e[half], o[half];
#pragma GCC unroll 4
    for (int i = 0; i < half; ++i) {
      e[i] = pick(v[2 * i], v[2 * i + 1], even);
      o[i] = pick(v[2 * i], v[2 * i + 1], odd);
    }
    deinterleave<half, L>(e);
    deinterleave<half, L>(o);
#pragma GCC unroll 4
    for (int i = 0; i < half; ++i) {
      v[2 * i] = e[i];
      v[2 * i + 1] = o[i];
    }
  }
}

// Which elements a vector of windows reads along x, for windows of any length: its lanes' column dx
// and offset dx, the last repeated in shorter windows. Tables of (longest, count + a vector).
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

// Windows i .. of a row, `lanes` at a time, of exactly `width` elements along x. Returns the first
// that is left.
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
      deinterleave<width, L>(v);
#pragma GCC unroll 8
      for (int dx = 0; dx < width; ++dx) op.take(v[dx], Integer<T>(dy * width + dx));
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
  std::vector<Integer<T>> at;

  explicit ColumnMaxima(int64_t columns) : value(columns + kPadding), at(columns + kPadding) {}
};

// Windows i .. of a row, of any width: first down the columns, which lie as vectors do, then along
// the windows.
template <typename T, int bytes>
SEGOPS_INLINE void pool_rest(
    int64_t i, const Axis& x, const Columns& columns, const T* p, int64_t stride, int64_t rows, Offsets offsets,
    const Target<T>& target, ColumnMaxima<T>& maxima) {
  constexpr int lanes = kLanes<T, bytes>;
  using L = Lanes<T, lanes>;
  using Value = typename L::Value;
  using Int = typename L::Int;
  for (int64_t c = x.begin(int32_t(i)); c < x.size; c += lanes) {
    Max<T, lanes> down;
    down.start(offsets, lanes);
    for (int64_t dy = 0; dy < rows; ++dy) down.take(L::load(p + dy * stride + c, x.size - c), Integer<T>(dy));
    std::memcpy(&maxima.value[c], &down.value, sizeof(Value));
    std::memcpy(&maxima.at[c], &down.at, sizeof(Int));
  }
  constexpr auto infinity = std::numeric_limits<accumulator<T>>::infinity();
  const Integer<T> row = x.longest();
  for (; i < x.count; i += lanes) {
    Value value{};
    Int at{};
    for (int64_t dx = 0; dx < row; ++dx) {
      const int32_t *column = &columns.column[dx * columns.padded + i], *offset = &columns.offset[dx * columns.padded + i];
      accumulator<T> values[lanes];
      Integer<T> places[lanes];
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
      // As `Max::take`, but columns do not come in the order of rows: of equals the first counts,
      // of NaN the last.
      const Value u = v == v ? v : Value{} + infinity, w = v == v ? value : Value{} - infinity;
      const Int first = place < at ? place : at, last = place > at ? place : at;
      const Int equal = v == value ? first : at, larger = value == value ? place : last;
      const Int next = u > w ? larger : equal;
      value = next == at ? value : v;
      at = next;
    }
    const int64_t n = std::min<int64_t>(lanes, x.count - i);
    Max<T, lanes> window;
    window.at = at;
    window.finish(offsets.from(i), n);
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
  if (x.kernel == 1) blocks(constant<1>);
  if (x.kernel == 2) blocks(constant<2>);
  if (x.kernel == 4) blocks(constant<4>);
  if (x.kernel == 8) blocks(constant<8>);
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
    for (int64_t dx = 0; dx < columns; ++dx) op.take(L::load(p + dy * stride + dx * pixel + c, n), Integer<T>(dy * row + dx));
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
  blocks(constant<kLanes<T, bytes>>);
  blocks(constant<kMinLanes<T>>);
  if (c < channels)
    reduce_channels<Op, T, kMinLanes<T>>(c, channels - c, p, stride, pixel, rows, columns, row, offsets, target);
}

// A map of out's own size: copied, or added to the total.
template <typename T, int bytes>
SEGOPS_INLINE void copy_row(const T* p, int64_t n, const Target<T>& target) {
  using Raw = typename vector_of<char, bytes>::type;
  constexpr int lanes = kLanes<T, bytes>, step = bytes / sizeof(T);
  int64_t i = 0;
  if (!target.total) {
    for (; target.non_temporal && i + step <= n; i += step) {
      Raw raw;
      std::memcpy(&raw, p + i, bytes);
      store_non_temporal(target.out + i, raw);
    }
    std::memcpy(target.out + i, p + i, (n - i) * sizeof(T));
  } else {
    for (; i < n; i += lanes) target.template put<lanes>(i, Lanes<T, lanes>::load(p + i, n - i));
  }
}

// Row y of the windows of a map: of channel c, or with channels_last of all channels.
template <typename T>
struct Reduction {
  const Windows& windows;
  View<const T> in;
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
  const T* p = r.in.at(r.n, r.c, top, 0);
  if (!r.channels_last) {
    if (copied) return copy_row<T, bytes>(p, w.x.count, r.target);
    const Offsets at = r.offsets.from(((r.n * r.channels + r.c) * w.y.count + r.y) * w.x.count);
    return reduce_row<Op, T, bytes>(w.x, p, r.in.row, rows, at, r.target, r.columns, r.scratch);
  }
  for (int32_t x = 0; x < w.x.count; ++x) {
    const int32_t left = w.x.begin(x), width = w.x.end(x) - left;
    const T* from = p + left * r.in.pixel;
    const Target<T> target{
        r.target.out + x * r.out_pixel, r.target.non_temporal, r.target.total ? r.target.total + x * r.channels : nullptr};
    const Offsets at = r.offsets.from(((r.n * w.y.count + r.y) * w.x.count + x) * r.channels);
    if (copied)
      copy_row<T, bytes>(from, r.channels, target);
    else
      reduce_pixel<Op, T, bytes>(from, r.in.row, r.in.pixel, rows, width, w.row, r.channels, at, target);
  }
}

#define SEGOPS_POOL(target, bytes, T)                                                    \
  target void pool_row(const Reduction<T>& r) {                                          \
    reduce<Max, T, bytes>(r);                                                            \
  }                                                                                      \
  target void gather_row(const Reduction<T>& r) {                                        \
    reduce<Select, T, bytes>(r);                                                         \
  }                                                                                      \
  target void round_total(const accumulator<T>* total, int64_t n, const Target<T>& to) { \
    round_row<T, bytes>(total, n, to);                                                   \
  }
#define SEGOPS_POOL_OF_ALL(target, bytes) \
  SEGOPS_POOL(target, bytes, float)       \
  SEGOPS_POOL(target, bytes, double)      \
  SEGOPS_POOL(target, bytes, bf16)        \
  SEGOPS_POOL(target, bytes, fp16)
SEGOPS_WIDTHS(SEGOPS_POOL_OF_ALL)
#undef SEGOPS_POOL_OF_ALL
#undef SEGOPS_POOL

}  // namespace

void pool(
    const std::vector<Tensor>& maps, const std::vector<Part>& parts, const Tensor& out, char* offsets, bool concat,
    bool channels_last) {
  std::vector<Columns> columns;
  for (const Part& part : parts)
    if (!channels_last) columns.emplace_back(part.windows.x);
  for (const Part& part : parts)
    if (part.next > part.end) std::memset(offsets + part.end, 0, part.next - part.end);
  const int64_t images = out.size(0), channels = out.size(1), height = out.size(2), width = out.size(3);
  dispatch<float, double, bf16, fp16>(out, "pag_pool", [&](auto type) {
    using T = decltype(type);
    using Total = std::vector<accumulator<T>>;
    const View<T> to(out);
    const bool non_temporal = leaves_caches(out);
    std::vector<View<const T>> from;
    int64_t widest = 0;
    for (const Tensor& map : maps) {
      from.emplace_back(map);
      widest = std::max(widest, map.size(3));
    }
    const auto row = [&](size_t m, int64_t n, int64_t c, int64_t y, accumulator<T>* total, ColumnMaxima<T>* scratch) {
      const Part& part = parts[m];
      const Offsets at{part.offsets < 0 ? nullptr : offsets + part.offsets, part.windows.two_bytes};
      // All in place: as locals they cost a nanosecond for each row.
      pool_row(
          {part.windows,
           from[m],
           part.channels,
           at,
           channels_last,
           n,
           c,
           y,
           {to.at(n, part.first_channel + c, y, 0), non_temporal, total},
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
            for (int64_t x = 0; x < width; ++x)
              round_total(total.data() + x * channels, channels, Target<T>{to.at(n, 0, y, x), non_temporal});
          }
        }
      });
    } else if (concat) {
      // Pieces of all maps, of about as many elements each: threads have equal work and meet once.
      std::vector<int64_t> rows, pieces{0};  // rows of windows in a piece of each map, and pieces before it
      for (const Part& part : parts) {
        const int64_t elements = part.windows.y.longest() * int64_t(part.windows.x.size) + width;
        rows.push_back(std::max<int64_t>(1, kPiece / elements));
        pieces.push_back(pieces.back() + ceil_div(images * part.channels * height, rows.back()));
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
          round_total(total.data(), width, Target<T>{to.at(n, c, y, 0), non_temporal});
        }
      });
    }
  });
}

void gather(const Windows& w, const Tensor& input, const char* offsets, const Tensor& out, bool channels_last) {
  const Offsets at{const_cast<char*>(offsets), w.two_bytes};
  const int64_t channels = out.size(1), height = out.size(2), planes = channels_last ? 1 : channels;
  dispatch<float, double, bf16, fp16>(out, "pag_gather", [&](auto type) {
    using T = decltype(type);
    const View<const T> from(input);
    const View<T> to(out);
    const bool non_temporal = leaves_caches(out);
    share(out.size(0) * planes * height, out.size(3) * channels / planes, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t n = r / height / planes, c = r / height % planes, y = r % height;
        gather_row({w, from, channels, at, channels_last, n, c, y, {to.at(n, c, y, 0), non_temporal}, to.pixel});
      }
    });
  });
}

}  // namespace segops::pag
