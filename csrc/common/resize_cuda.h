// A bilinear resize as CUDA kernels use it: positions in integers, which are exact, weights in
// float32. `Index` has to hold positions(in, out).
#pragma once

#include "cuda.h"

namespace segops {

// The largest number that the positions of a resize are computed with, but for what is added to it.
inline int64_t positions(int64_t in, int64_t out) {
  return 2 * in * out + 2 * in + out;
}

// An output is (1 - weight) * source[low] + weight * source[low + 1]. Where there is no low + 1,
// weight is 0.
struct Position {
  int low;
  float weight;
};

// One axis, and the way back: the outputs with low == j are first(j) .. first(j + 1).
template <typename Index>
struct Resize {
  Index in, out;
  float unit;  // output i lies at ((2 i + 1) in - out) / (2 out), in steps of 1 / (2 out)

  Resize() = default;
  Resize(int64_t in, int64_t out) : in(Index(in)), out(Index(out)), unit(float(0.5 / double(out))) {}

  __device__ Position at(Index i) const {
    const Index steps = (2 * i + 1) * in - out;
    if (steps <= 0) return {0, 0.f};
    const Index low = steps / (2 * out);
    return {int(low), low < in - 1 ? float(steps - low * 2 * out) * unit : 0.f};
  }
  SEGOPS_HOST_DEVICE Index first(Index j) const {
    const Index steps = (2 * j + 1) * out - in;
    if (j <= 0 || steps <= 0) return 0;
    if (j >= in) return out;
    const Index i = (steps + 2 * in - 1) / (2 * in);
    return i < out ? i : out;
  }
};

}  // namespace segops
