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
//   gather    out = for each window the element where its offset says. The derivative of scatter.
//
// Maps are (N, C, H, W) with any strides, but 1 along x or, with channels_last, along the channels.
// The offsets of a map are (N, C, h, w) in the same order without gaps; those of several maps
// follow each other, each from a multiple of 16 bytes on. Sums are taken in float32 (float64 for
// float64) in a fixed order. Offsets that point outside their window are skipped. `out` and
// `offsets` are written in full.
#pragma once

#include "../common/tensor.h"

namespace segops::pag {

// The windows along one axis.
struct Axis {
  int32_t size, count;
  int32_t kernel;  // 0: adaptive windows of different lengths

  SEGOPS_HOST_DEVICE int32_t begin(int32_t j) const { return kernel ? j * kernel : scale(j, size, 0, count); }
  SEGOPS_HOST_DEVICE int32_t end(int32_t j) const {
    if (!kernel) return scale(j + 1, size, count - 1, count);
    return (j + 1) * kernel < size ? (j + 1) * kernel : size;
  }
  // The first and the last window that hold element i.
  SEGOPS_HOST_DEVICE int32_t first(int32_t i) const { return kernel ? i / kernel : scale(i, count, 0, size); }
  SEGOPS_HOST_DEVICE int32_t last(int32_t i) const { return kernel ? i / kernel : scale(i + 1, count, size - 1, size) - 1; }
  // (i * by + plus) / over. 64-bit division costs a GPU several times as much.
  SEGOPS_HOST_DEVICE static int32_t scale(int32_t i, int32_t by, int32_t plus, int32_t over) {
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
  SEGOPS_HOST_DEVICE bool overlap() const { return !y.kernel || !x.kernel; }
};

inline Axis axis(int64_t size, int64_t count, int64_t kernel, const char* op) {
  STD_TORCH_CHECK(size < (int64_t(1) << 30), op, ": height and width must be below 2^30; got ", size);
  STD_TORCH_CHECK(0 < count && count <= size, op, ": ", size, " elements cannot make ", count, " windows");
  if (kernel == 0 && size % count == 0) kernel = size / count;
  STD_TORCH_CHECK(
      kernel == 0 || (kernel <= (1 << 20) && ceil_div(size, kernel) == count), op, ": ", count, " windows do not cover ", size);
  return {int32_t(size), int32_t(count), int32_t(kernel)};
}

inline Windows windows(const Tensor& map, const Tensor& pooled, const std::vector<int64_t>& kernel_size, const char* op) {
  STD_TORCH_CHECK(kernel_size.empty() || kernel_size.size() == 2, op, ": kernel_size must be none or two ints");
  const bool given = !kernel_size.empty();
  if (given) STD_TORCH_CHECK(kernel_size[0] > 0 && kernel_size[1] > 0, op, ": kernel_size must be positive");
  Windows result{
      axis(map.size(2), pooled.size(2), given ? kernel_size[0] : 0, op),
      axis(map.size(3), pooled.size(3), given ? kernel_size[1] : 0, op), 0, false};
  result.row = result.x.longest();
  const int64_t elements = int64_t(result.y.longest()) * result.row;
  STD_TORCH_CHECK(elements <= 65536, op, ": two bytes do not number windows of ", elements, " elements");
  result.two_bytes = elements > 256;
  return result;
}

inline void check_map(const Tensor& map, const Tensor& like, bool channels_last, const char* op) {
  STD_TORCH_CHECK(map.dim() == 4 && map.size(0) == like.size(0), op, ": maps must be (N, C, H, W) of one batch");
  STD_TORCH_CHECK(map.scalar_type() == like.scalar_type(), op, ": maps differ in dtype");
  const int64_t dim = channels_last ? 1 : 3;
  STD_TORCH_CHECK(map.stride(dim) == 1 || map.size(dim) == 1, op, ": neighbours must lie side by side");
}

// Bytes of the offsets of `channels` channels pooled to out's size, without padding.
inline int64_t offset_bytes(const Windows& w, const Tensor& out, int64_t channels) {
  return out.size(0) * channels * out.size(2) * out.size(3) * (w.two_bytes ? 2 : 1);
}

// A map of pool: where its channels go, and its offsets, from this byte on; -1: it has none.
struct Part {
  Windows windows;
  int64_t channels, first_channel, offsets;
};

inline std::vector<Part> check_pool(
    const std::vector<Tensor>& maps, const Tensor& out, const Tensor& offsets, const std::vector<int64_t>& kernel_size,
    bool concat, bool channels_last) {
  const char* op = "pag_pool";
  STD_TORCH_CHECK(!maps.empty() && out.dim() == 4, op, ": needs maps and an out of (N, C, h, w)");
  check_map(out, out, channels_last, op);
  std::vector<Part> parts;
  int64_t channels = 0, bytes = 0, needed = 0;
  for (const Tensor& map : maps) {
    check_map(map, out, channels_last, op);
    const Windows w = windows(map, out, kernel_size, op);
    const bool remembers = !kernel_size.empty() || !w.identity();
    parts.push_back({w, map.size(1), concat ? channels : 0, remembers ? bytes : -1});
    if (remembers) {
      needed = bytes + offset_bytes(w, out, map.size(1));
      bytes = round_up(needed, 16);
    }
    channels = concat ? channels + map.size(1) : map.size(1);
    STD_TORCH_CHECK(channels <= out.size(1) && (concat || channels == out.size(1)), op, ": channels do not fit out's");
  }
  STD_TORCH_CHECK(channels == out.size(1), op, ": channels do not fit out's");
  STD_TORCH_CHECK(
      offsets.scalar_type() == ScalarType::Byte && offsets.numel() >= needed, op, ": offsets must be ", needed, " bytes");
  STD_TORCH_CHECK(kernel_size.empty() || maps.size() == 1, op, ": kernel_size is for one map");
  return parts;
}

// For scatter (small = pooled, large = out) and gather (small = out, large = input).
inline Windows check_offsets(
    const Tensor& small, const Tensor& large, const Tensor& offsets, const std::vector<int64_t>& kernel_size,
    bool channels_last, const char* op) {
  STD_TORCH_CHECK(small.dim() == 4 && small.size(1) == large.size(1), op, ": maps differ in channels");
  check_map(small, large, channels_last, op);
  check_map(large, large, channels_last, op);
  const Windows w = windows(large, small, kernel_size, op);
  STD_TORCH_CHECK(
      offsets.scalar_type() == ScalarType::Byte && offsets.numel() >= offset_bytes(w, small, small.size(1)), op,
      ": offsets must be bytes, ", offset_bytes(w, small, small.size(1)));
  return w;
}

}  // namespace segops::pag
