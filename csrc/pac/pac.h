// Pyramid atrous convolution: two adjoint shift kernels that, with one dense product, make the op.
//
// Everything is pixel-major. With t over the kh*kw taps, (dy, dx) the tap's offset from the centre,
// r over the rates, p = (y + sign*r*dy, x + sign*r*dx) and `sign` +1 or -1:
//
//   gather   out[n, y, x, g, c] = bias[c] * (rates in g) + sum_t sum_{r in g} planes[n, p, t, c]
//   scatter  out[n, y, x, t, c] =                          sum_g sum_{r in g} source[n, p, g, c]
//
// Reads outside the map count as zero. There is either one group that holds all rates (merge="sum")
// or one group per rate (merge="concat"). gather(+1) and scatter(-1) are adjoint, and so are
// gather(-1) and scatter(+1): each is the other's derivative. Sums are taken in float32 (float64
// for float64) in a fixed order. `out` is written in full.
#pragma once

#include "../common/tensor.h"

namespace segops::pac {

struct Shape {
  int64_t images, height, width, groups, channels;
  int64_t kernel_h, kernel_w;
  int64_t sign;

  int64_t taps() const { return kernel_h * kernel_w; }
};

// What a device implements.
void shift_gather(
    const Tensor& planes, const std::optional<Tensor>& bias, const Tensor& out, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& rates, int64_t sign);
void shift_scatter(
    const Tensor& source, const Tensor& out, int64_t first_row, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& rates, int64_t sign);

inline void check_settings(const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& rates, int64_t sign) {
  STD_TORCH_CHECK(kernel_size.size() == 2 && (sign == 1 || sign == -1), "pac: kernel_size must be two ints, sign +1 or -1");
  STD_TORCH_CHECK(!rates.empty(), "pac: rates must hold at least one");
  for (int64_t rate : rates) STD_TORCH_CHECK(rate > 0, "pac: rates must be positive; got ", rate);
}

// Raises unless the tensors have the shapes and strides below; returns the shape of the work.
//   gather:  planes (N, H, W, kh*kw, C) contiguous, bias (C) or none,
//            out (N, H, W, G, C) with dense images, rows and channels
inline Shape check_gather(
    const Tensor& planes, const std::optional<Tensor>& bias, const Tensor& out, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& rates, int64_t sign) {
  check_settings(kernel_size, rates, sign);
  const Shape s{out.size(0), out.size(1), out.size(2), out.size(3), out.size(4), kernel_size[0], kernel_size[1], sign};
  STD_TORCH_CHECK(
      planes.dim() == 5 && planes.size(0) == s.images && planes.size(1) == s.height && planes.size(2) == s.width &&
          planes.size(3) == s.taps() && planes.size(4) == s.channels && planes.is_contiguous(),
      "pac: planes must be contiguous (N, H, W, kh*kw, C), matching out");
  STD_TORCH_CHECK(
      out.stride(4) == 1 && out.stride(1) == s.width * out.stride(2) && out.stride(0) == s.height * out.stride(1),
      "pac: out must be pixel-major");
  STD_TORCH_CHECK(s.groups == 1 || s.groups == int64_t(rates.size()), "pac: out must have 1 or len(rates) groups");
  STD_TORCH_CHECK(planes.scalar_type() == out.scalar_type(), "pac: planes and out differ in dtype");
  if (bias.has_value()) {
    STD_TORCH_CHECK(
        bias->numel() == s.channels && bias->is_contiguous() && bias->scalar_type() == out.scalar_type(),
        "pac: bias must be contiguous (C), of out's dtype");
  }
  return s;
}

//   scatter: source (N, H, W, G, C) contiguous,
//            out (rows, W, kh*kw, C) contiguous: image rows first_row .. first_row + rows
inline Shape check_scatter(
    const Tensor& source, const Tensor& out, int64_t first_row, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& rates, int64_t sign) {
  check_settings(kernel_size, rates, sign);
  const Shape s{source.size(0), source.size(1), source.size(2), source.size(3),
                source.size(4), kernel_size[0], kernel_size[1], sign};
  STD_TORCH_CHECK(source.dim() == 5 && source.is_contiguous(), "pac: source must be contiguous (N, H, W, G, C)");
  STD_TORCH_CHECK(
      out.dim() == 4 && out.size(1) == s.width && out.size(2) == s.taps() && out.size(3) == s.channels && out.is_contiguous(),
      "pac: out must be contiguous (rows, W, kh*kw, C), matching source");
  STD_TORCH_CHECK(first_row >= 0 && first_row + out.size(0) <= s.images * s.height, "pac: rows lie outside the map");
  STD_TORCH_CHECK(s.groups == 1 || s.groups == int64_t(rates.size()), "pac: source must have 1 or len(rates) groups");
  STD_TORCH_CHECK(source.scalar_type() == out.scalar_type(), "pac: source and out differ in dtype");
  return s;
}

}  // namespace segops::pac
