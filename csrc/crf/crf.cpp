// The ops: memory, and the kernels of crf.h.

#include "crf.h"

namespace segops::crf {
namespace {

using Optional = std::optional<Tensor>;

void check_positions(const char* op, int64_t positions, int64_t dims) {
  STD_TORCH_CHECK(
      positions < 0x7fffffff / (dims + 1), op, ": an image must have fewer than ", 0x7fffffff / (dims + 1), " positions, with ",
      dims, " features; got ", positions);
}

Tensor crf_filter(Tensor values, Tensor features, std::string normalization, bool adjoint) {
  STD_TORCH_CHECK(
      values.dim() == 3 && features.dim() == 3 && values.size(0) == features.size(0) && values.size(2) == features.size(2) &&
          values.size(1) > 0 && values.size(2) > 0 && features.size(1) > 0 && features.size(1) <= kMaxDim,
      "permutohedral_filter: needs values (N, C, P) and features (N, d, P), d at most 16, not empty");
  check_devices("permutohedral_filter", values, {&features});
  check_positions("permutohedral_filter", values.size(2), features.size(1));
  const ScalarType dtype = values.scalar_type(), sums = wide(dtype);
  Tensor out = empty(sizes_of(values), sums, values);
  if (values.size(0) > 0)
    filter(
        {converted(values, sums), converted(features, wide(features.scalar_type())), normalization_of(normalization), adjoint},
        out);
  return converted(out, dtype);
}

// Without normalisation there is no mean field.
Normalization of_mean_field(const std::string& name) {
  const Normalization normalization = normalization_of(name);
  STD_TORCH_CHECK(normalization != Normalization::kNone, "dense_crf: needs a normalization");
  return normalization;
}

void check_matrix(const Optional& matrix, const Tensor& logits) {
  const int64_t classes = logits.size(1);
  STD_TORCH_CHECK(
      !matrix || (matrix->dim() == 2 && matrix->size(0) == classes && matrix->size(1) == classes &&
                  matrix->scalar_type() == logits.scalar_type()),
      "dense_crf: spatial and bilateral must be (C, C) in the logits' dtype");
}

Optional packed_matrix(const Optional& matrix) {
  return matrix ? Optional(packed(*matrix)) : matrix;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> crf_mean_field(
    Tensor logits, Optional spatial, Optional bilateral, Tensor images, bool align_corners, int64_t iterations,
    double spatial_sigma, double position_sigma, double intensity_sigma, std::string normalization, bool saves) {
  STD_TORCH_CHECK(
      logits.dim() == 4 && images.dim() == 4 && logits.size(0) == images.size(0) && images.size(1) <= kMaxDim - 2 &&
          iterations > 0,
      "dense_crf: needs logits (N, C, h, w), images (N, K, H, W), K at most 14, and an iteration");
  for (int64_t i = 1; i < 4; ++i)
    STD_TORCH_CHECK(logits.size(i) > 0 && images.size(i) > 0, "dense_crf: needs logits and images that are not empty");
  STD_TORCH_CHECK(
      !saves || (logits.size(2) == images.size(2) && logits.size(3) == images.size(3)),
      "dense_crf: saves nothing where logits are resized");
  STD_TORCH_CHECK(
      logits.scalar_type() == wide(logits.scalar_type()) && spatial_sigma > 0 && position_sigma > 0 && intensity_sigma > 0,
      "dense_crf: needs float or double logits, and positive sigmas");
  check_matrix(spatial, logits);
  check_matrix(bilateral, logits);
  check_devices("dense_crf", logits, {some(spatial), some(bilateral), &images});
  const int64_t n = logits.size(0), height = images.size(2), width = images.size(3);
  const int64_t positions = height * width, dims = images.size(1) + 2;
  check_positions("dense_crf", positions, dims);
  const ScalarType dtype = logits.scalar_type();
  const bool keeps_lattice = saves && bilateral;
  Tensor out = empty_map({n, logits.size(1), height, width}, dtype, logits, is_channels_last(logits));
  const Kept kept{
      empty({n, saves ? iterations : 0, positions, logits.size(1)}, dtype, logits),
      empty({n, keeps_lattice ? kept_indices(positions, dims) : 0}, ScalarType::Int, logits),
      empty({n, keeps_lattice ? kept_weights(positions, dims) : 0}, dtype, logits)};
  if (n > 0) {
    const Optional s = packed_matrix(spatial), b = packed_matrix(bilateral);
    const ScalarType of_images = images.scalar_type();
    const Tensor levels = of_images == ScalarType::Byte ? images : converted(images, wide(of_images));
    mean_field(
        {logits, some(s), some(b), levels, align_corners, iterations, spatial_sigma, position_sigma, intensity_sigma,
         of_mean_field(normalization)},
        out, saves ? &kept : nullptr);
  }
  return {out, kept.q, kept.indices, kept.weights};
}

std::tuple<Tensor, Tensor, Tensor> crf_mean_field_grad(
    Tensor grad, Tensor out, Tensor q, Tensor index, Tensor weight, Optional spatial, Optional bilateral, int64_t channels,
    double spatial_sigma, std::string normalization, bool matrices) {
  STD_TORCH_CHECK(
      out.dim() == 4 && sizes_of(grad) == sizes_of(out) && grad.scalar_type() == out.scalar_type(),
      "dense_crf: a gradient must be like the result, and what was saved as it was");
  const int64_t n = out.size(0), positions = out.size(2) * out.size(3), dims = channels + 2;
  const auto is = [&](const Tensor& kept, const Sizes& sizes, ScalarType dtype) {
    return sizes_of(kept) == sizes && kept.is_contiguous() && kept.scalar_type() == dtype;
  };
  STD_TORCH_CHECK(
      channels > 0 && dims <= kMaxDim && q.dim() == 4 && is(q, {n, q.size(1), positions, out.size(1)}, out.scalar_type()) &&
          is(index, {n, bilateral ? kept_indices(positions, dims) : 0}, ScalarType::Int) &&
          is(weight, {n, bilateral ? kept_weights(positions, dims) : 0}, out.scalar_type()),
      "dense_crf: a gradient must be like the result, and what was saved as it was");
  check_matrix(spatial, out);
  check_matrix(bilateral, out);
  check_devices("dense_crf", out, {&grad, &q, &index, &weight, some(spatial), some(bilateral)});
  const ScalarType dtype = out.scalar_type();
  const auto matrix = [&](const Optional& of) { return empty(matrices && of ? sizes_of(*of) : Sizes{0}, dtype, out); };
  Tensor of_logits = empty_map(sizes_of(out), dtype, out, is_channels_last(out));
  Tensor of_spatial = matrix(spatial), of_bilateral = matrix(bilateral);
  const Optional s = packed_matrix(spatial), b = packed_matrix(bilateral);
  mean_field_grad(
      {grad, out, {q, index, weight}, some(s), some(b), dims, spatial_sigma, of_mean_field(normalization)}, of_logits,
      matrices && spatial ? &of_spatial : nullptr, matrices && bilateral ? &of_bilateral : nullptr);
  return {of_logits, of_spatial, of_bilateral};
}

}  // namespace

SEGOPS_OPS(op) {
  op("crf_filter(Tensor values, Tensor features, str normalization, bool adjoint) -> Tensor", TORCH_BOX(&crf_filter));
  op("crf_mean_field(Tensor logits, Tensor? spatial, Tensor? bilateral, Tensor images, bool align_corners, "
     "int iterations, float spatial_sigma, float position_sigma, float intensity_sigma, str normalization, bool saves) -> "
     "(Tensor, Tensor, Tensor, Tensor)",
     TORCH_BOX(&crf_mean_field));
  op("crf_mean_field_grad(Tensor grad, Tensor out, Tensor q, Tensor index, Tensor weight, Tensor? spatial, "
     "Tensor? bilateral, int channels, float spatial_sigma, str normalization, bool matrices) -> (Tensor, Tensor, Tensor)",
     TORCH_BOX(&crf_mean_field_grad));
}

}  // namespace segops::crf
