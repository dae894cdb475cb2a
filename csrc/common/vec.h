// Vectors of float or double accumulators, with loads and stores that convert from the storage
// type. Written with the compiler's vector extension, so that one source serves SSE2, AVX2, AVX-512
// and NEON; SEGOPS_MULTIVERSION picks the widest of them when the library is loaded.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define SEGOPS_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SEGOPS_MULTIVERSION
#endif
// A function marked SEGOPS_MULTIVERSION is compiled once per instruction set; what it calls must be
// inlined into it. It must not be a template, which GCC compiles once: hence overloads, one per
// dtype. SEGOPS_WIDTHS(function) defines, through the macro `function(target, bytes)`, one version
// per instruction set that knows the width of its registers: GCC takes comparisons of wider vectors
// apart, lane by lane.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define SEGOPS_WIDTHS(function)                                                                          \
  function(__attribute__((target("avx512f,fma"))), 64) function(__attribute__((target("avx2,fma"))), 32) \
      function(__attribute__((target("default"))), 16)
#else
#define SEGOPS_WIDTHS(function) function(, 16)
#endif
#define SEGOPS_INLINE inline __attribute__((always_inline))

namespace segops {

// The bits of a bfloat16.
struct bf16 {
  uint16_t bits;
};

// The bits of a float16.
struct fp16 {
  uint16_t bits;
};

// What sums of T are taken in.
template <typename T>
using accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Integers as wide as these, so that comparing them makes masks for vectors of accumulators.
template <typename T>
using Integer = std::conditional_t<std::is_same_v<accumulator<T>, double>, int64_t, int32_t>;

// Accumulators in a register of so many bytes, by default the widest there is.
template <typename T, int bytes = 64>
constexpr int kLanes = bytes / sizeof(accumulator<T>);

// An argument that a lambda can take as a template takes a number.
template <int n>
constexpr std::integral_constant<int, n> constant;

template <typename T, int lanes>
struct vector_of {  // a template of its own: GCC drops the attribute where only the size depends on a parameter
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};

// `lanes` accumulators (or integers) of T, and the conversions from and to memory.
template <typename T, int lanes>
struct Vec {
  static_assert(sizeof(T) >= 4);
  using type = typename vector_of<T, lanes>::type;

  static SEGOPS_INLINE type load(const T* p) {
    type v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static SEGOPS_INLINE type narrow(type v) { return v; }
  static SEGOPS_INLINE void store(T* p, type v) { std::memcpy(p, &v, sizeof v); }
};

template <int lanes>
struct Vec<bf16, lanes> {
  using type = typename vector_of<float, lanes>::type;
  using word = typename vector_of<uint32_t, lanes>::type;
  using half = typename vector_of<uint16_t, lanes>::type;

  static SEGOPS_INLINE type load(const bf16* p) {
    half h;
    std::memcpy(&h, p, sizeof h);
    return (type)(__builtin_convertvector(h, word) << 16);
  }
  // Round to nearest even; a NaN stays a NaN, whose payload must not round to infinity.
  static SEGOPS_INLINE half narrow(type v) {
    const word w = (word)v;
    const word nan = (word)((w & 0x7fffffffu) > 0x7f800000u);
    const word rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
    return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), half);
  }
  static SEGOPS_INLINE void store(bf16* p, type v) {
    const half h = narrow(v);
    std::memcpy(p, &h, sizeof h);
  }
};

template <int lanes>
struct Vec<fp16, lanes> {
  using type = typename vector_of<float, lanes>::type;
  using word = typename vector_of<uint32_t, lanes>::type;
  using half = typename vector_of<uint16_t, lanes>::type;

  static SEGOPS_INLINE type load(const fp16* p) {
    half h;
    std::memcpy(&h, p, sizeof h);
    const word w = __builtin_convertvector(h, word), magnitude = w & 0x7fffu;
    const word tiny = (word)(__builtin_convertvector(magnitude, type) * 0x1p-24f);  // below the normal numbers
    const word normal = (magnitude << 13) + (112u << 23);
    const word special = (magnitude << 13) | 0x7f800000u;  // infinity and NaN
    word result = magnitude < 0x400u ? tiny : normal;
    result = magnitude >= 0x7c00u ? special : result;
    return (type)(result | ((w & 0x8000u) << 16));
  }
  // Round to nearest even.
  static SEGOPS_INLINE half narrow(type v) {
    const word w = (word)v, magnitude = w & 0x7fffffffu;
    const word tiny = (word)((type)magnitude + 0.5f) - (126u << 23);  // 0.5 has its last bit where that of a tiny half is
    const word normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const word infinity = word{} + 0x7c00u, nan = word{} + 0x7e00u;
    word result = magnitude < (113u << 23) ? tiny : normal;
    result = magnitude >= (143u << 23) ? infinity : result;
    result = magnitude > 0x7f800000u ? nan : result;
    return __builtin_convertvector(result | ((w >> 16) & 0x8000u), half);
  }
  static SEGOPS_INLINE void store(fp16* p, type v) {
    const half h = narrow(v);
    std::memcpy(p, &h, sizeof h);
  }
};

// One lane of bfloat16 is a scalar: vectors of a single 16-bit element are not portable.
template <>
struct Vec<bf16, 1> {
  using type = float;

  static SEGOPS_INLINE type load(const bf16* p) {
    const uint32_t w = uint32_t(p->bits) << 16;
    type v;
    std::memcpy(&v, &w, sizeof v);
    return v;
  }
  static SEGOPS_INLINE void store(bf16* p, type v) {
    uint32_t w;
    std::memcpy(&w, &v, sizeof w);
    const bool nan = (w & 0x7fffffffu) > 0x7f800000u;
    p->bits = nan ? 0x7fc0 : uint16_t((w + 0x7fffu + ((w >> 16) & 1u)) >> 16);
  }
};

// Stores v without the caches, which would read the memory first; an ordinary store where memory is
// not aligned to v. Before other threads look, call fence_non_temporal().
template <typename V>
SEGOPS_INLINE void store_non_temporal(void* p, V v) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof v == 0) {
#if defined(__clang__)
    __builtin_nontemporal_store(v, static_cast<V*>(p));
    return;
#elif defined(__x86_64__) && defined(__GNUC__)  // which has no such builtin
    if constexpr (sizeof(V) == 64) {
      asm volatile("vmovntps %1, %0" : "=m"(*static_cast<V*>(p)) : "v"(v));
      return;
    } else if constexpr (sizeof(V) == 32) {
      asm volatile("vmovntps %1, %0" : "=m"(*static_cast<V*>(p)) : "x"(v));
      return;
    } else if constexpr (sizeof(V) == 16) {
      asm volatile("%vmovntps %1, %0" : "=m"(*static_cast<V*>(p)) : "x"(v));
      return;
    }
#endif
  }
  std::memcpy(p, &v, sizeof v);
}

SEGOPS_INLINE void fence_non_temporal() {
#if defined(__x86_64__) && defined(__GNUC__)
  asm volatile("sfence" ::: "memory");
#endif
}

// The sum of v's lanes, halves first.
template <typename T, int lanes>
SEGOPS_INLINE T sum_lanes(typename vector_of<T, lanes>::type v) {
  if constexpr (lanes == 2) {
    return v[0] + v[1];
  } else {
    typename vector_of<T, lanes / 2>::type half[2];
    std::memcpy(half, &v, sizeof v);
    return sum_lanes<T, lanes / 2>(half[0] + half[1]);
  }
}

// The lanes of v that `index` names.
template <typename V, typename I>
SEGOPS_INLINE V pick(V v, I index) {
#ifdef __clang__  // which shuffles by constants only
  V result;
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) result[i] = v[index[i]];
  return result;
#else
  return __builtin_shuffle(v, index);
#endif
}

// The elements that `index` names of those of a and then of b.
template <typename V, typename I>
SEGOPS_INLINE V pick(V a, V b, I index) {
#ifdef __clang__
  constexpr unsigned lanes = sizeof(V) / sizeof(a[0]);
  V result;
  for (unsigned i = 0; i < lanes; ++i) result[i] = index[i] < int(lanes) ? a[index[i]] : b[index[i] - lanes];
  return result;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// exp and log of vectors. For float, polynomials (Cephes) good to about 1e-7; arguments of exp must
// be below 88, of log normal and positive. NaN stays NaN. For double, the library's, lane by lane.
template <typename V>
SEGOPS_INLINE V exp(V x, float) {
  typedef int32_t Int __attribute__((vector_size(sizeof(V))));
  constexpr float round = 12582912.f;  // 1.5 * 2^23: what is added to it is rounded to an integer
  const V shifted = x * 1.44269504f + round;
  const V n = shifted - round;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.f;
  const V power = (V)(((Int)shifted + 127) << 23);  // the low bits of `shifted` are n
  return x < -87.f ? V{} : p * power;
}

template <typename V>
SEGOPS_INLINE V log(V x, float) {
  typedef int32_t Int __attribute__((vector_size(sizeof(V))));
  const Int bits = (Int)x;
  Int exponent = (bits >> 23) - 126;
  V m = (V)((bits & 0x007fffff) | 0x3f000000);  // in [0.5, 1)
  const Int low = m < 0.707106781f;
  exponent += low;  // a true lane is -1
  m = (low ? m + m : m) - 1.f;
  const V e = __builtin_convertvector(exponent, V), square = m * m;
  V p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * square - e * 2.12194440e-4f - square * 0.5f;
  const V result = m + p + e * 0.693359375f;
  return x == x ? result : x;
}

template <typename V>
SEGOPS_INLINE V exp(V x, double) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(double); ++i) x[i] = std::exp(x[i]);
  return x;
}

template <typename V>
SEGOPS_INLINE V log(V x, double) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(double); ++i) x[i] = std::log(x[i]);
  return x;
}

}  // namespace segops
