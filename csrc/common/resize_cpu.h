// A bilinear resize as the CPU kernels use it: positions and weights in tables, one for each axis.
#pragma once

#include "resize.h"
#include "vec.h"

#include <algorithm>
#include <vector>

namespace segops {

// One axis, and the way back: output i is (1 - weight[i]) * in[low[i]] + weight[i] * in[high[i]],
// and the outputs with low == j are first[j] .. first[j + 1]. Tables of outputs have `entries`, so
// that whole vectors can be read; those beyond the last output repeat it.
template <typename T>
struct ResizeAxis {
  std::vector<Integer<T>> low, high;
  std::vector<T> weight;
  std::vector<int64_t> first;

  ResizeAxis(int64_t in, int64_t out, int64_t entries, bool align_corners = false)
      : low(entries), high(entries), weight(entries), first(in + 1, out) {
    for (int64_t i = entries - 1; i >= 0; --i) {
      const int64_t j = std::min(i, out - 1);
      const Source source = align_corners ? aligned_source(j, in, out) : bilinear_source(j, in, double(in) / double(out));
      low[i] = Integer<T>(source.low);
      high[i] = Integer<T>(source.high);
      weight[i] = T(source.weight);
      if (i < out) first[source.low] = i;
    }
    // A source that no output has for its `low`.
    for (int64_t j = in - 1; j >= 0; --j) first[j] = std::min(first[j], first[j + 1]);
  }
};

}  // namespace segops
