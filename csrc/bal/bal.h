// The boundary-aware loss: the edge map of the labels, its blur, and a cross entropy that upsamples
// logits as it reads them.
//
// Resizing is bilinear: common/resize.h. A label is a class in [0, classes), `ignore_index`, or
// wrong. Sums are taken in float32 at least, in a fixed order. Outputs are written in full.
//
//   count_edges   E[n, y, x] = distinct classes among the pixel and its right and lower neighbours,
//                 0 where all three agree; the last row and column repeat. Resized with
//                 antialiasing (a triangle of half width in / out) to out's size, plus beta. A
//                 wrong label makes NaN on the CPU; on CUDA it counts as ignored.
//   blur          E = E convolved with u1 v1^T + u2 v2^T, zero padding, plus beta.
//   normalise     E = E / by + beta, where `by`, the maximum of each image, counts as 1 unless it
//                 is positive. For the mean: E / by, 1 where that is 0.
//   loss          with z the logits of the classes at a label pixel (resized unless sizes agree), t
//                 its label, a_c the class weights (1 without), s the label smoothing, w the
//                 pixel's weight (resized likewise):
//                     max_logit = max_c z_c, rest = sum_{c != t} exp(z_c - max_logit),
//                     total     = rest + exp(z_t - max_logit)
//                     l_c  = log(total) + (max_logit - z_c), the cross entropy of class c
//                     loss = w ((1 - s) a_t l_t + s / classes * sum_c a_c l_c)
//                 0 where ignored, NaN where wrong. Its derivative:
//                     d loss / d z_c = (c == t ? target_grad : grad_scale exp(z_c - max_logit))
//                                      - smoothing a_c
//                     grad_scale  = w ((1 - s) a_t + s / classes * sum_c a_c) / total
//                     target_grad = grad_scale exp(z_t - max_logit) - w (1 - s) a_t, computed from
//                                   `rest`, as the two cancel where z_t is by far the largest
//                     smoothing   = w s / classes
//
// The gradient of a sum is known but for a factor: it is made in the same pass as the loss. Of a
// map of losses, what comes in is known later; and logits of the labels' size are as large as their
// gradient, so that reading them twice moves less than keeping that. Then two passes share maps.
//
//   loss_map      loss, and what the gradient needs of each pixel: maps of max_logit, grad_scale,
//                 target_grad and, with s > 0, smoothing, one after the other; all but max_logit
//                 are 0 where ignored, NaN where wrong
//   loss_sum      the sum of the losses over divisor, which for the mean is max(1, number of pixels
//                 not ignored), else 1; and either the same maps or the gradient of the sum for the
//                 logits, not divided: in float16 one of a mean would vanish before a loss scale
//                 comes in
//   scale         gradient * grad / divisor
//   map_grad      from the maps, the gradient for the logits of sum(grad * loss), or where grad is
//                 one number, of that times the sum over divisor
#pragma once

#include "../common/tensor.h"

#include <cmath>

namespace segops::bal {

enum : int { kIgnored = -1, kWrong = -2 };

// The class of a label.
template <typename Label>
SEGOPS_HOST_DEVICE inline int class_of(Label label, int64_t classes, int64_t ignore_index) {
  if (int64_t(label) == ignore_index) return kIgnored;
  return int64_t(label) >= 0 && int64_t(label) < classes ? int(label) : kWrong;
}

struct Labels {
  const void* data;
  int bytes;  // of one label
  int64_t classes, ignore_index;

  Labels(const Tensor& labels, int64_t classes, int64_t ignore_index, const char* op)
      : data(labels.const_data_ptr()), classes(classes), ignore_index(ignore_index) {
    const ScalarType type = labels.scalar_type();
    bytes = type == ScalarType::Long ? 8 : type == ScalarType::Int ? 4 : 1;
    STD_TORCH_CHECK(bytes > 1 || type == ScalarType::Byte, op, ": labels must be int64, int32 or uint8");
  }
  SEGOPS_HOST_DEVICE int64_t value(int64_t i) const {
    if (bytes == 8) return static_cast<const int64_t*>(data)[i];
    if (bytes == 4) return static_cast<const int32_t*>(data)[i];
    return static_cast<const uint8_t*>(data)[i];
  }
  SEGOPS_HOST_DEVICE int at(int64_t i) const { return class_of(value(i), classes, ignore_index); }
};

// What the blur multiplies with, of rank two: u1 v1^T + u2 v2^T.
//
// No factor of the gaussian is negative, so that the two separable passes lose nothing to
// cancellation. With g the gaussian on an axis, q its least value and p = g - q, the product g g'
// less its own least value q^2 is p g' + q p'.
struct BlurKernel {
  bool gaussian;
  int64_t size;                               // of what is kept: taps that can touch the map
  double steps;                               // of the linear one, from end to end
  double spread, least, least_less_1, range;  // of the gaussian: kernel_size sigma, q, q - 1, 1 - q^2

  BlurKernel(bool gaussian, int64_t kernel_size, double sigma, int64_t longest_side)
      : gaussian(gaussian),
        size(2 * (kernel_size / 2 < longest_side ? kernel_size / 2 : longest_side) + 1),
        steps(double(kernel_size - 1)),
        spread(double(kernel_size) * sigma),
        least(std::exp(exponent(kernel_size / 2))),
        least_less_1(std::expm1(exponent(kernel_size / 2))),
        range(-std::expm1(2 * exponent(kernel_size / 2))) {}

  double exponent(int64_t distance) const { return -(double(distance) * double(distance)) / spread; }
  // factors (u1, v1, u2, v2), each of `size`: those of k <= size / 2, and of its mirror image.
  void write(int64_t k, float* factors) const {
    const int64_t distance = size / 2 - k;
    const double linear = 0.5 - double(distance) / steps;
    double values[4] = {linear, 1, 1, linear};
    if (gaussian) {
      const double g = std::exp(exponent(distance)), p = std::expm1(exponent(distance)) - least_less_1;
      values[0] = p / range;
      values[1] = g;
      values[2] = least / range;
      values[3] = p;
    }
    for (int i = 0; i < 4; ++i) factors[i * size + k] = factors[(i + 1) * size - 1 - k] = float(values[i]);
  }
};

SEGOPS_HOST_DEVICE inline float normalised(float edge, float by, bool mean, float beta) {
  if (mean) return by != 0 ? edge / by : 1;
  return edge / (by > 0 ? by : 1) + beta;
}

struct LossShape {
  int64_t images, classes, h, w;  // of the logits
  int64_t height, width;          // of the labels
  int64_t weight_h, weight_w;     // of the pixel weights

  bool resized() const { return h != height || w != width; }
  int64_t pixels() const { return images * height * width; }
};

// What the losses are of. On the CPU all have the dtype that is computed in; on CUDA logits and
// weights may also be float16 and bfloat16, each as it comes.
struct LossInput {
  LossShape s;
  Tensor logits, labels;  // (N, C, h, w) with any strides, (N, H, W) without gaps
  std::optional<Tensor> pixel_weight, class_weight;
  double label_smoothing;
  int64_t ignore_index;

  bool smoothed() const { return label_smoothing > 0; }
  int64_t maps() const { return smoothed() ? 4 : 3; }
};

// What a device implements. Losses, coefficients and gradients have the dtype that is computed in,
// but for what `map_grad` writes on CUDA and what `scale` writes: these have the logits'. Results
// say whether a label was wrong: the CPU knows, a GPU would have to be waited for.
bool count_edges(const Tensor& labels, const Tensor& out, int64_t classes, int64_t ignore_index, double beta);
// edges is overwritten; scratch is for 2 * edges.numel() + 4 * kernel.size float32.
void blur(const Tensor& edges, const BlurKernel& kernel, double beta, const Tensor& scratch);
void normalise(const Tensor& edges, const Tensor& by, bool mean, double beta);
bool loss_map(const LossInput& in, const Tensor& loss, const std::optional<Tensor>& coefficients);
bool loss_sum(
    const LossInput& in, bool mean, const Tensor& loss, const Tensor& divisor, const std::optional<Tensor>& coefficients,
    const std::optional<Tensor>& gradient);
void map_grad(const LossInput& in, const Tensor& grad, const Tensor& divisor, const Tensor& coefficients, const Tensor& out);
// gradient and out lie in memory alike.
void scale(const Tensor& gradient, const Tensor& grad, const Tensor& divisor, const Tensor& out);

}  // namespace segops::bal
