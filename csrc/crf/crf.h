// Mean field in the dense CRF, and the permutohedral filter that it takes.
//
// The lattice approximates y_p = sum_q exp(-|f_p - f_q|^2 / 2) x_q for features f of d numbers. Its
// vertices are points of d + 1 integers that add up to 0; each position lies in a simplex of d + 1
// of them, with barycentric weights b:
//
//   splat     z_v = sum_p b_pv x_p
//   blur      for axis j = 0 .. d:  z_v += (z_(v + u) + z_(v - u)) / 2,  u = (1, .., 1) - (d + 1) e_j;
//             a vertex exists if it is one of some position's d + 1; what does not exist is 0
//   slice     y_p = sum_v b_pv z_v / (1 + 2^-d)
//
// The adjoint is the same with the axes in reverse order. With n the filter of ones, a normalised
// filter is y_p / n_p ("after"), or n_p^-1/2 filter(n^-1/2 x)_p ("symmetric").
//
// Mean field, of logits L (N, C, h, w), resized bilinearly to the images' (H, W), with `spatial` and `bilateral` (C, C) that
// filtered probabilities are multiplied by, or null where there is no such kernel:
//
//   L' = L;  `iterations` times:
//     Q  = softmax(L'), 0 below 2^-100
//     L' = L + spatial @ spatial filter(Q) + bilateral @ bilateral filter(Q)
//   out = log_softmax(L')
//
// The spatial filter is the Gaussian itself, an axis after the other, without the taps below 2^-24
// of its centre (2^-53 for double), normalised in the same way.
//
// The gradient takes Q of every iteration and the lattice, from the last iteration to the first:
//
//   G_T   = grad - exp(out) sum_c grad
//   for k = T - 1 .. 0, with S' and B' the adjoint filters of G_(k+1):
//     grad of spatial += S' Q_k^T, of bilateral += B' Q_k^T       sums over pixels
//     R     = spatial^T S' + bilateral^T B'
//     G_k   = Q_k (R - sum_c Q_k R)
//   grad of L = sum of all G
#pragma once

#include "../common/op.h"

namespace segops::crf {

constexpr int kMaxDim = 16;          // of features
constexpr double kMaxFeature = 1e7;  // what is beyond is taken for it: coordinates have 32 bits
constexpr double kTiny = 0x1p-100;

enum class Normalization { kNone, kAfter, kSymmetric };

inline Normalization normalization_of(const std::string& name) {
  STD_TORCH_CHECK(name == "None" || name == "after" || name == "symmetric", "crf: unknown normalization ", name);
  return name == "None" ? Normalization::kNone : name == "after" ? Normalization::kAfter : Normalization::kSymmetric;
}

// How many numbers are enough to keep the lattice of an image in, with the filter of ones.
constexpr int kMaxGroups = 128;
inline int64_t kept_indices(int64_t positions, int64_t dims) {
  return positions * (dims + 1) * (dims + 4) + kMaxGroups * (dims + 2) + 36;
}
inline int64_t kept_weights(int64_t positions, int64_t dims) {
  return positions * (2 * dims + 3);
}

struct FilterInput {
  Tensor values;    // (N, C, P), any strides
  Tensor features;  // (N, d, P), any strides, float or double
  Normalization normalization;
  bool adjoint;
};

struct MeanField {
  Tensor logits;                      // (N, C, h, w), any strides, float or double
  const Tensor *spatial, *bilateral;  // (C, C) without gaps, of the same dtype
  Tensor images;                      // (N, K, H, W), any strides, uint8, float or double
  bool align_corners;                 // of resizing logits to (H, W)
  int64_t iterations;                 // at least one
  double spatial_sigma, position_sigma, intensity_sigma;
  Normalization normalization;
};

// What the gradient takes; all without gaps.
struct Kept {
  Tensor q;        // (N, iterations, H W, C)
  Tensor indices;  // (N, kept_indices) int32
  Tensor weights;  // (N, kept_weights)
};

struct MeanFieldGrad {
  Tensor grad, out;  // (N, C, H, W), any strides
  Kept kept;
  const Tensor *spatial, *bilateral;
  int64_t dims;  // of features
  double spatial_sigma;
  Normalization normalization;
};

// What a device implements. Outputs are written in full; null are those that are not wanted.
void filter(const FilterInput& input, const Tensor& out);                      // out (N, C, P) without gaps
void mean_field(const MeanField& input, const Tensor& out, const Kept* kept);  // out (N, C, H, W), any strides
void mean_field_grad(const MeanFieldGrad& input, const Tensor& logits, const Tensor* spatial, const Tensor* bilateral);

}  // namespace segops::crf
