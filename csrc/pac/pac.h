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

  // Of `pixels` (N, H, W, G, C): the output of a gather, the source of a scatter.
  Shape(const Tensor& pixels, const std::vector<int64_t>& kernel_size, int64_t sign)
      : images(pixels.size(0)),
        height(pixels.size(1)),
        width(pixels.size(2)),
        groups(pixels.size(3)),
        channels(pixels.size(4)),
        kernel_h(kernel_size[0]),
        kernel_w(kernel_size[1]),
        sign(sign) {}
  int64_t taps() const { return kernel_h * kernel_w; }
};

// What a device implements.
//   gather:  planes (N, H, W, kh*kw, C) contiguous, bias (C) or none, contiguous,
//            out (N, H, W, G, C) with dense images, rows and channels
//   scatter: source (N, H, W, G, C) contiguous,
//            out (rows, W, kh*kw, C) contiguous: image rows first_row .. first_row + rows
void shift_gather(
    const Tensor& planes, const std::optional<Tensor>& bias, const Tensor& out, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& rates, int64_t sign);
void shift_scatter(
    const Tensor& source, const Tensor& out, int64_t first_row, const std::vector<int64_t>& kernel_size,
    const std::vector<int64_t>& rates, int64_t sign);

// What a GPU implements beside.
//   transpose:          to (images, columns, rows) = from (images, rows, columns), both contiguous,
//                       of elements of two or four bytes
//   multiplies_into_32: whether PyTorch's products of such factors come in float32, not rounded
bool multiplies_into_32(const Tensor& factor);
void transpose(const Tensor& from, const Tensor& to, int64_t images, int64_t rows, int64_t columns);

}  // namespace segops::pac
