// What pooling and scattering share on the CPU: vectors of elements with the offsets beside them,
// where results go, and how threads share the work.
//
// With channels_last, a vector is channels of one pixel, otherwise neighbouring windows of a row.
#pragma once

#include "../common/cpu.h"
#include "pag.h"

#include <algorithm>

namespace segops::pag {

// Elements of T in the narrowest register that is used.
template <typename T>
constexpr int kMinLanes = kLanes<T, 16>;

constexpr int64_t kPadding = 16;  // what a whole vector may read or write beyond a row of totals

// Calls fn with the lanes of a register, its half and its quarter, as far as there are such.
template <typename T, int bytes, typename F>
SEGOPS_INLINE void each_width(const F& fn) {
  fn(constant<kLanes<T, bytes>>);
  if constexpr (bytes >= 32) fn(constant<kLanes<T, bytes / 2>>);
  if constexpr (bytes >= 64) fn(constant<kLanes<T, bytes / 4>>);
}

// Vectors of T's accumulators, of integers beside them, and their parts.
template <typename T, int lanes>
struct Lanes {
  using V = Vec<T, lanes>;
  using Value = typename V::type;
  using Int = typename vector_of<Integer<T>, lanes>::type;
  // Bytes widen by way of these: at once, GCC does it lane by lane.
  using Short = typename vector_of<uint16_t, lanes>::type;

  static SEGOPS_INLINE Value load(const T* p, int64_t n) {  // the first n
    if (n >= lanes) return V::load(p);
    T part[lanes] = {};
    for (int64_t i = 0; i < n; ++i) part[i] = p[i];
    return V::load(part);
  }
  static SEGOPS_INLINE void store(T* p, Value v, int64_t n, bool non_temporal) {
    if (n >= lanes) return non_temporal ? store_non_temporal(p, V::narrow(v)) : V::store(p, v);
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

// Division of numbers below 2^16 by one of them.
struct Divisor {
  uint64_t reciprocal;

  static SEGOPS_INLINE Divisor of(int32_t divisor) { return {(uint64_t(1) << 32) / divisor + 1}; }
  SEGOPS_INLINE int32_t quotient(uint32_t n) const { return int32_t(n * reciprocal >> 32); }
};

// Where results go: to a map, or added to a row of totals, which is padded to whole vectors.
template <typename T>
struct Target {
  T* out;
  bool non_temporal;
  accumulator<T>* total = nullptr;

  // The first n of `lanes` results from the i-th on.
  template <int lanes>
  SEGOPS_INLINE void put(int64_t i, typename Lanes<T, lanes>::Value value, int64_t n = lanes) const {
    using A = Vec<accumulator<T>, lanes>;
    if (total)
      A::store(total + i, A::load(total + i) + value);
    else
      Lanes<T, lanes>::store(out + i, value, n, non_temporal);
  }
};

// Narrows a row of totals.
template <typename T, int bytes>
SEGOPS_INLINE void round_row(const accumulator<T>* total, int64_t n, const Target<T>& target) {
  constexpr int lanes = kLanes<T, bytes>;
  for (int64_t i = 0; i < n; i += lanes) target.template put<lanes>(i, Vec<accumulator<T>, lanes>::load(total + i), n - i);
}

// Elements that are worth handing out by themselves. A thread takes at least two such pieces.
constexpr int64_t kPiece = 16384;

// Whether results leave the caches before anyone reads them: they are then stored round these.
inline bool leaves_caches(const Tensor& out) {
  return out.numel() * int64_t(out.element_size()) > 4 << 20;
}

template <typename F>
void parallel(int64_t pieces, int64_t grain, const F& fn) {
  parallel_for(0, pieces, grain, [&](int64_t begin, int64_t end) {
    fn(begin, end);
    fence_non_temporal();
  });
}

// fn(begin, end) over ranges of `rows` rows, in parallel where there are enough of their elements.
template <typename F>
void share(int64_t rows, int64_t elements, const F& fn) {
  parallel(rows, std::max<int64_t>(1, 2 * kPiece / std::max<int64_t>(1, elements)), fn);
}

}  // namespace segops::pag
