// Max pooling over windows that cover a map, remembering where each maximum lay; the scatter and
// the gather that go by that.
//
// Along an axis of `size` elements, `count` windows:
//   [j * kernel, min((j + 1) * kernel, size))                 with kernel_size
//   [floor(j * size / count), ceil((j + 1) * size / count))   without, adaptive: may overlap by one
// The offset of an element in its window is dy * row + dx, row being the kernel's width, or the
// longest window's. Offsets take one byte, two where the largest window has more than 256 elements.
//
//   pool      out = max over each window of each map, into the maps' own channels of out (concat)
//             or summed (then adaptive). In row-major order an element takes over if it is larger,
//             or NaN: ties go to the first, the last NaN stays. Maps of out's own size are not
//             pooled, but copied or added; without kernel_size they have no offsets.
//   scatter   out = 0, and each value of `pooled` added where its offset says. The derivative of
//             pool, and unpooling.
//   gather    out = for each window of a kernel the element where its offset says. The derivative
//             of scatter.
//
// Maps are (N, C, H, W) with any strides, but 1 along x or, with channels_last, along the channels.
// The offsets of a map are (N, C, h, w) in the same order without gaps; those of several maps
// follow each other, each from a multiple of 16 bytes on, with zeros in the gaps. Sums are taken in
// float32 (float64 for float64) in a fixed order. Offsets that point outside their window are
// skipped. `out` and `offsets` are written in full.
#pragma once

#include "../common/tensor.h"

namespace segops::pag {

// The windows along one axis.
struct Axis {
  int32_t size, count;
  int32_t kernel;  // 0: adaptive windows of different lengths

  int32_t begin(int32_t j) const { return kernel ? j * kernel : scale(j, size, 0, count); }
  int32_t end(int32_t j) const {
    if (!kernel) return scale(j + 1, size, count - 1, count);
    return (j + 1) * kernel < size ? (j + 1) * kernel : size;
  }
  // The first and the last window that hold element i.
  int32_t first(int32_t i) const { return kernel ? i / kernel : scale(i, count, 0, size); }
  int32_t last(int32_t i) const { return kernel ? i / kernel : scale(i + 1, count, size - 1, size) - 1; }
  // (i * by + plus) / over, in 32 bits if possible.
  static int32_t scale(int32_t i, int32_t by, int32_t plus, int32_t over) {
    const uint64_t product = uint64_t(i) * uint32_t(by) + uint32_t(plus);
    return int32_t(product >> 32 ? product / uint32_t(over) : uint32_t(product) / uint32_t(over));
  }
  int32_t longest() const {
    if (kernel) return kernel;
    return size / count + (count % (size % count) == 0 ? 1 : 2);
  }
};

struct Windows {
  Axis y, x;
  int32_t row;     // elements that an offset counts to a row
  bool two_bytes;  // an offset takes two

  SEGOPS_HOST_DEVICE bool identity() const { return y.kernel == 1 && x.kernel == 1; }
  bool overlap() const { return !y.kernel || !x.kernel; }
};

inline Axis axis(int64_t size, int64_t count, int64_t kernel, const char* op) {
  STD_TORCH_CHECK(size < (int64_t(1) << 30), op, ": height and width must be below 2^30; got ", size);
  STD_TORCH_CHECK(0 < count && count <= size, op, ": ", size, " elements cannot make ", count, " windows");
  if (kernel == 0 && size % count == 0) kernel = size / count;
  STD_TORCH_CHECK(
      kernel == 0 || (kernel <= (1 << 20) && ceil_div(size, kernel) == count), op, ": ", count, " windows do not cover ", size);
  return {int32_t(size), int32_t(count), int32_t(kernel)};
}

// Of a map that is pooled to height * width.
inline Windows windows(
    const Tensor& map, int64_t height, int64_t width, const std::vector<int64_t>& kernel_size, const char* op) {
  const bool given = !kernel_size.empty();
  if (given) STD_TORCH_CHECK(kernel_size[0] > 0 && kernel_size[1] > 0, op, ": the kernel must be positive");
  Windows result{
      axis(map.size(2), height, given ? kernel_size[0] : 0, op), axis(map.size(3), width, given ? kernel_size[1] : 0, op), 0,
      false};
  result.row = result.x.longest();
  const int64_t elements = int64_t(result.y.longest()) * result.row;
  STD_TORCH_CHECK(elements <= 65536, op, ": two bytes do not number windows of ", elements, " elements");
  result.two_bytes = elements > 256;
  return result;
}

// A map of pool: where its channels go, and the bytes of its offsets, up to `end`, and of the gap
// behind them, up to `next`. Without offsets all three are -1.
struct Part {
  Windows windows;
  int64_t channels, first_channel, offsets, end, next;
};

// What a device implements. Offsets are given by where they begin.
void pool(
    const std::vector<Tensor>& maps, const std::vector<Part>& parts, const Tensor& out, char* offsets, bool concat,
    bool channels_last);
void scatter(const Windows& windows, const Tensor& pooled, const char* offsets, const Tensor& out, bool channels_last);
void gather(const Windows& windows, const Tensor& input, const char* offsets, const Tensor& out, bool channels_last);

}  // namespace segops::pag
