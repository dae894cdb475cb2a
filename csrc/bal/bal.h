// The boundary-aware loss: the edge map of the labels, its blur, and a cross entropy that upsamples
// logits as it reads them.
//
// Resizing is bilinear: common/resize.h. A label is a class in [0, classes), `ignore_index`, or
// wrong. Sums are taken in float32 at least, in a fixed order. Outputs are written in full.
//
//   count_edges   E[n, y, x] = distinct classes among the pixel and its right and lower neighbours,
//                 0 where all three agree; the last row and column repeat. Resized with
//                 antialiasing (a triangle of half width in / out) to out's size. On the CPU a
//                 wrong label makes NaN; on CUDA it counts as ignored.
//   blur          out = E convolved with u1 v1^T + u2 v2^T, zero padding; factors (u1, v1, u2, v2).
//   softmax_loss  with z the logits of the classes at a label pixel (resized unless sizes agree), t
//                 its label, a_c the class weights (1 without), s the label smoothing, w the
//                 pixel's weight (resized likewise):
//                     max_logit = max_c z_c, rest = sum_{c != t} exp(z_c - max_logit),
//                     total     = rest + exp(z_t - max_logit)
//                     l_c  = log(total) + (max_logit - z_c), the cross entropy of class c
//                     loss = w ((1 - s) a_t l_t + s / classes * sum_c a_c l_c)
//                 0 where ignored, NaN where wrong. totals = (sum of the losses, number of pixels
//                 not ignored). And what the gradient needs of each pixel, coefficients =
//                 (max_logit, grad_scale, target_grad) and, with s > 0, smoothing; all but
//                 max_logit are 0 where ignored, NaN where wrong:
//                     grad_scale  = w ((1 - s) a_t + s / classes * sum_c a_c) / total
//                     target_grad = grad_scale exp(z_t - max_logit) - w (1 - s) a_t, computed from
//                                   `rest`, as the two cancel where z_t is by far the largest
//                     smoothing   = w s / classes
//   softmax_grad  the gradient for the logits of sum(grad * loss), grad one number or one per
//                 pixel:
//                     d loss / d z_c = (c == t ? target_grad : grad_scale exp(z_c - max_logit))
//                                      - smoothing a_c
#pragma once

#include "../common/resize.h"

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
  SEGOPS_HOST_DEVICE int at(int64_t i) const {
    if (bytes == 8) return class_of(static_cast<const int64_t*>(data)[i], classes, ignore_index);
    if (bytes == 4) return class_of(static_cast<const int32_t*>(data)[i], classes, ignore_index);
    return class_of(static_cast<const uint8_t*>(data)[i], classes, ignore_index);
  }
};

// The taps of one output of an antialiased resize: source[first + k], k < count, weighs
// triangle(k), over their sum.
struct Antialias {
  double scale, start;  // source pixels per output, and from the output's centre to the first tap's
  int64_t first, count;

  SEGOPS_HOST_DEVICE Antialias(int64_t i, int64_t in, int64_t out) : scale(double(in) / double(out)) {
    const double centre = (double(i) + 0.5) * scale;
    const int64_t begin = int64_t(centre - scale + 0.5), end = int64_t(centre + scale + 0.5);
    first = begin > 0 ? begin : 0;
    count = (end < in ? end : in) - first;
    start = double(first) + 0.5 - centre;
  }
  SEGOPS_HOST_DEVICE double triangle(int64_t k) const {
    const double distance = fabs(start + double(k)) / scale;
    return distance < 1 ? 1 - distance : 0;
  }
};

struct LossShape {
  int64_t images, classes, h, w;  // of the logits
  int64_t height, width;          // of the labels
  int64_t weight_h, weight_w;     // of the pixel weights

  bool resized() const { return h != height || w != width; }
  SEGOPS_HOST_DEVICE int64_t pixels() const { return images * height * width; }
};

inline void check_count_edges(const Tensor& labels, const Tensor& out) {
  STD_TORCH_CHECK(labels.dim() == 3 && labels.is_contiguous(), "bal_count_edges: labels must be contiguous (N, H, W)");
  STD_TORCH_CHECK(
      out.dim() == 3 && out.is_contiguous() && out.scalar_type() == ScalarType::Float && out.size(0) == labels.size(0) &&
          out.size(1) > 0 && out.size(1) <= labels.size(1) && out.size(2) > 0 && out.size(2) <= labels.size(2),
      "bal_count_edges: out must be contiguous float32 (N, h, w), at most the labels' size");
}

inline void check_blur(const Tensor& edges, const Tensor& factors, const Tensor& rows, const Tensor& out) {
  for (const Tensor* tensor : {&edges, &factors, &rows, &out})
    STD_TORCH_CHECK(
        tensor->is_contiguous() && tensor->scalar_type() == ScalarType::Float, "bal_blur: tensors must be contiguous float32");
  STD_TORCH_CHECK(
      edges.dim() == 3 && out.dim() == 3 && out.size(0) == edges.size(0) && out.size(1) == edges.size(1) &&
          out.size(2) == edges.size(2) && rows.numel() == 2 * edges.numel(),
      "bal_blur: edges and out must be (N, h, w), rows (2, N, h, w)");
  STD_TORCH_CHECK(factors.dim() == 2 && factors.size(0) == 4 && factors.size(1) % 2, "bal_blur: factors must be (4, odd)");
}

// The checks that softmax_loss and softmax_grad share. They compute in the coefficients' dtype.
inline LossShape check_loss(
    const char* op, const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& pixel_weight,
    const std::optional<Tensor>& class_weight, const Tensor& coefficients) {
  STD_TORCH_CHECK(logits.dim() == 4 && logits.numel() > 0, op, ": logits must be (N, C, h, w), not empty");
  STD_TORCH_CHECK(
      labels.dim() == 3 && labels.is_contiguous() && labels.numel() > 0 && labels.size(0) == logits.size(0), op,
      ": labels must be contiguous (N, H, W), not empty");
  STD_TORCH_CHECK(
      coefficients.is_contiguous() && coefficients.dim() == 4 && (coefficients.size(0) == 3 || coefficients.size(0) == 4) &&
          coefficients.numel() == coefficients.size(0) * labels.numel(),
      op, ": coefficients must be contiguous (3 or 4, N, H, W)");
  LossShape s{logits.size(0), logits.size(1), logits.size(2), logits.size(3), labels.size(1), labels.size(2), 0, 0};
  if (pixel_weight) {
    STD_TORCH_CHECK(
        pixel_weight->dim() == 3 && pixel_weight->is_contiguous() && pixel_weight->numel() > 0 &&
            pixel_weight->size(0) == s.images && pixel_weight->scalar_type() == coefficients.scalar_type(),
        op, ": pixel_weight must be contiguous (N, h', w'), of coefficients' dtype");
    s.weight_h = pixel_weight->size(1);
    s.weight_w = pixel_weight->size(2);
  }
  if (class_weight)
    STD_TORCH_CHECK(
        class_weight->is_contiguous() && class_weight->numel() == s.classes &&
            class_weight->scalar_type() == coefficients.scalar_type(),
        op, ": class_weight must be contiguous (C), of coefficients' dtype");
  return s;
}

inline void check_loss_outputs(
    const Tensor& labels, const Tensor& totals, const std::optional<Tensor>& loss, const Tensor& coefficients,
    double label_smoothing) {
  STD_TORCH_CHECK(
      coefficients.size(0) == (label_smoothing > 0 ? 4 : 3),
      "bal_softmax_loss: coefficients must be 4 maps with label smoothing, 3 without");
  STD_TORCH_CHECK(
      totals.numel() == 2 && totals.is_contiguous() && totals.scalar_type() == ScalarType::Double,
      "bal_softmax_loss: totals must be two float64");
  if (loss)
    STD_TORCH_CHECK(
        loss->is_contiguous() && loss->numel() == labels.numel() && loss->scalar_type() == coefficients.scalar_type(),
        "bal_softmax_loss: loss must be contiguous (N, H, W), of coefficients' dtype");
}

inline void check_grad(
    const Tensor& grad, const Tensor& logits, const Tensor& labels, const Tensor& out, const Tensor& coefficients) {
  STD_TORCH_CHECK(
      grad.is_contiguous() && (grad.numel() == 1 || grad.numel() == labels.numel()) &&
          grad.scalar_type() == coefficients.scalar_type(),
      "bal_softmax_grad: grad must be one number or contiguous (N, H, W), of coefficients' dtype");
  STD_TORCH_CHECK(
      out.dim() == 4 && out.size(0) == logits.size(0) && out.size(1) == logits.size(1) && out.size(2) == logits.size(2) &&
          out.size(3) == logits.size(3) && out.scalar_type() == logits.scalar_type(),
      "bal_softmax_grad: out must have logits' shape and dtype");
}

}  // namespace segops::bal
