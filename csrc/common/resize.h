// Bilinear resizing: output i lies at source (i + 0.5) * in / out - 0.5, at least 0; or with
// align_corners=True at i * (in - 1) / (out - 1).
#pragma once

#include "tensor.h"

namespace segops {

// Where output i of a bilinear resize lies: (1 - weight) * source[low] + weight * source[high].
struct Source {
  int64_t low, high;
  double weight;
};
inline Source source_at(double at, int64_t in) {
  const int64_t low = at <= 0 ? 0 : (int64_t(at) < in - 1 ? int64_t(at) : in - 1);
  if (at <= 0 || low == in - 1) return {low, low + 1 < in ? low + 1 : low, 0.0};
  return {low, low + 1, at - double(low)};
}
inline Source bilinear_source(int64_t i, int64_t in, double in_over_out) {
  return source_at((double(i) + 0.5) * in_over_out - 0.5, in);
}
inline Source aligned_source(int64_t i, int64_t in, int64_t out) {
  return source_at(double(i) * (double(in - 1) / double(out > 1 ? out - 1 : 1)), in);
}

}  // namespace segops
