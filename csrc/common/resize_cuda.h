// A bilinear resize as CUDA kernels use it: positions are integers, and exact.
#pragma once

#include "cuda.h"

namespace segops {

// One axis of a resize as resize.h has it. Cell c is what lies between sources c - 1 and c: there
// are in + 1 cells, of which the first and the last lie half outside of the map, where the source
// at its border is all that counts. A cell holds at most ceil(out / in) outputs.
template <typename Index>
struct ResizeAxis {
  Index in, out;
  Divisor twice_in, twice_out;

  ResizeAxis(int64_t in, int64_t out) : in(Index(in)), out(Index(out)), twice_in(2 * in), twice_out(2 * out) {}
  // What the numbers below reach.
  static int64_t largest(int64_t in, int64_t out) { return 2 * in * out + in + 2 * out; }

  // The cell of output i, which lies rest / (2 * out) behind source cell - 1.
  __device__ Index cell(Index i, Index& rest) const { return twice_out.divide((2 * i + 1) * in + out, rest); }
  // The first output that lies in this cell or behind it.
  __device__ Index first(Index cell) const {
    const Index i = cell > 0 ? twice_in.divide((2 * cell - 1) * out + in - 1) : 0;
    return i < out ? i : out;
  }
  __device__ Index low(Index cell) const { return cell > 0 ? cell - 1 : 0; }
  __device__ Index high(Index cell) const { return cell < in ? cell : in - 1; }
  __device__ bool outside(Index cell) const { return cell == 0 || cell == in; }
  // Of the source at `high`.
  __device__ float weight(Index cell, Index rest) const { return outside(cell) ? 0.f : float(rest) / float(2 * out); }
};

}  // namespace segops
