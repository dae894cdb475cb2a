// The largest class of logits that are resized bilinearly as they are read (common/resize.h).
//
//   best[n, i, j] = argmax_c logits[n, c, i, j], the lowest class on ties; a NaN is larger than any
//                   number. Where the largest is +infinity or NaN, ~argmax: a negative number.
//   out[n, y, x]  = the same of the means of the four logits that pixel (y, x) lies between; one
//                   that weighs nothing is not looked at
//
// An interpolated logit is a mean of its four corners with weights that all classes share: where
// one class is the largest at all four, it is the largest everywhere between them, and no other
// class is looked at. Only the cells that a boundary crosses are computed; and those with a
// negative best, where a class that is infinite with both signs is NaN in between. `out` is written
// in full; `best` is memory for what is between.
#pragma once

#include "../common/tensor.h"

namespace segops::argmax {

struct Shape {
  int64_t images, classes, h, w;  // of the logits
  int64_t height, width;          // of out

  bool resized() const { return h != height || w != width; }
};

inline Shape check(const Tensor& logits, const Tensor& best, const Tensor& out) {
  STD_TORCH_CHECK(logits.dim() == 4 && logits.numel() > 0, "upsample_argmax: logits must be (N, C, h, w), not empty");
  STD_TORCH_CHECK(logits.size(1) <= 0x7fffffff, "upsample_argmax: too many classes");
  STD_TORCH_CHECK(
      best.dim() == 3 && best.is_contiguous() && best.scalar_type() == ScalarType::Int && best.size(0) == logits.size(0) &&
          best.size(1) == logits.size(2) && best.size(2) == logits.size(3),
      "upsample_argmax: best must be contiguous int32 (N, h, w)");
  STD_TORCH_CHECK(
      out.dim() == 3 && out.is_contiguous() && out.scalar_type() == ScalarType::Long && out.size(0) == logits.size(0) &&
          out.numel() > 0,
      "upsample_argmax: out must be contiguous int64 (N, H, W), not empty");
  return {logits.size(0), logits.size(1), logits.size(2), logits.size(3), out.size(1), out.size(2)};
}

// What a device implements.
void upsample(const Tensor& logits, const Tensor& best, const Tensor& out);

inline int32_t class_of_best(int32_t best) {
  return best < 0 ? ~best : best;
}

}  // namespace segops::argmax
