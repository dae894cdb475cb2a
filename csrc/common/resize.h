// Bilinear resizing with align_corners=False: output i lies at source (i + 0.5) * in / out - 0.5,
// at least 0.
#pragma once

#include "tensor.h"

namespace segops {

// Where output i of a bilinear resize lies: (1 - weight) * source[low] + weight * source[high].
struct Source {
  int64_t low, high;
  double weight;
};
inline Source bilinear_source(int64_t i, int64_t in, double in_over_out) {
  const double at = (double(i) + 0.5) * in_over_out - 0.5;
  const int64_t low = at <= 0 ? 0 : (int64_t(at) < in - 1 ? int64_t(at) : in - 1);
  if (at <= 0 || low == in - 1) return {low, low + 1 < in ? low + 1 : low, 0.0};
  return {low, low + 1, at - double(low)};
}

}  // namespace segops
