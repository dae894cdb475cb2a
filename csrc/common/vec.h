// Vectors of float or double accumulators, with loads and stores that convert from the storage type. Written with the
// compiler's vector extension, so that one source serves SSE2, AVX2, AVX-512 and NEON; SEGOPS_MULTIVERSION picks the widest of
// them when the library is loaded.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define SEGOPS_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SEGOPS_MULTIVERSION
#endif
// A function marked SEGOPS_MULTIVERSION is compiled once per instruction set; what it calls must be inlined into it.
#define SEGOPS_INLINE inline __attribute__((always_inline))

namespace segops {

// The bits of a bfloat16.
struct bf16 {
  uint16_t bits;
};

// What sums of T are taken in.
template <typename T>
using accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T, int lanes>
struct vector_of {  // a template of its own: GCC drops the attribute where only the size depends on a parameter
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};

// `lanes` accumulators of T, and the conversions from and to memory.
template <typename T, int lanes>
struct Vec {
  static_assert(std::is_same_v<T, accumulator<T>>);
  using type = typename vector_of<T, lanes>::type;

  static SEGOPS_INLINE type load(const T* p) {
    type v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
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
  static SEGOPS_INLINE void store(bf16* p, type v) {
    const word w = (word)v;
    const word nan = (word)((w & 0x7fffffffu) > 0x7f800000u);
    const word rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
    const half h = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), half);
    std::memcpy(p, &h, sizeof h);
  }
};

// One lane of bfloat16 is converted as a scalar: vectors of a single 16-bit element are not portable.
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

}  // namespace segops
