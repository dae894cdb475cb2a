// The ops: memory, the checks of what comes in, and the kernels of bal.h.

#include "bal.h"

#include "../common/op.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <tuple>

namespace segops::bal {
namespace {

// Whether labels are looked at on CUDA too, where that stalls the stream.
const bool kCheckLabels = [] {
  const char* value = std::getenv("SEGOPS_CHECK_LABELS");
  return value != nullptr && std::string(value) == "1";
}();

// Raises an IndexError in Python for the first label that is wrong.
void check_labels(const Tensor& labels, int64_t classes, int64_t ignore_index, bool wrong) {
  if (!wrong && (kOnCpu || !kCheckLabels)) return;
  using torch::headeronly::DeviceType;
  const Tensor here = kOnCpu ? labels : torch::stable::to(labels, torch::stable::Device(DeviceType::CPU));
  const Labels values(here, classes, ignore_index, "bal");
  for (int64_t i = 0; i < here.numel(); ++i)
    if (values.at(i) == kWrong)
      throw std::out_of_range(
          "labels must be in [0, " + std::to_string(classes) + ") or ignore_index (" + std::to_string(ignore_index) +
          "); got " + std::to_string(values.value(i)));
}

LossShape check_loss(
    const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& pixel_weight,
    const std::optional<Tensor>& class_weight) {
  STD_TORCH_CHECK(logits.dim() == 4 && labels.dim() == 3, "bal_cross_entropy: needs logits (N, C, h, w) and labels (N, H, W)");
  LossShape s{logits.size(0), logits.size(1), logits.size(2), logits.size(3), labels.size(1), labels.size(2), 0, 0};
  STD_TORCH_CHECK(
      s.classes > 0 && s.h > 0 && s.w > 0 && s.height > 0 && s.width > 0 && labels.size(0) == s.images,
      "bal_cross_entropy: logits and labels must have one batch, classes, heights and widths");
  if (pixel_weight) {
    STD_TORCH_CHECK(
        pixel_weight->dim() == 3 && pixel_weight->size(0) == s.images, "bal_cross_entropy: pixel_weight must be (N, h', w')");
    s.weight_h = pixel_weight->size(1);
    s.weight_w = pixel_weight->size(2);
    // Here, as torch.export would make guards of these comparisons. A ValueError in Python.
    if (s.weight_h < 1 || s.weight_h > s.height || s.weight_w < 1 || s.weight_w > s.width)
      throw std::invalid_argument(
          "pixel_weight must have at most the labels' size " + text_of({s.height, s.width}) + " and no empty side; got shape " +
          text_of(sizes_of(*pixel_weight)));
  }
  STD_TORCH_CHECK(
      !class_weight || (class_weight->dim() == 1 && class_weight->numel() == s.classes),
      "bal_cross_entropy: class_weight must be (C)");
  check_devices("bal_cross_entropy", logits, {&labels, some(pixel_weight), some(class_weight)});
  return s;
}

// As the kernels take it.
LossInput loss_input(
    const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& pixel_weight,
    const std::optional<Tensor>& class_weight, double label_smoothing, int64_t ignore_index) {
  const ScalarType dtype = wide(logits.scalar_type());
  const auto readable = [&](const std::optional<Tensor>& weight) -> std::optional<Tensor> {
    if (!weight) return weight;
    const ScalarType type = weight->scalar_type();
    const bool as_it_is = !kOnCpu && (type == ScalarType::Half || type == ScalarType::BFloat16);
    return packed(as_it_is ? *weight : converted(*weight, dtype));
  };
  return {
      check_loss(logits, labels, pixel_weight, class_weight),
      kOnCpu ? converted(logits, dtype) : logits,
      packed(labels),
      readable(pixel_weight),
      readable(class_weight),
      label_smoothing,
      ignore_index};
}

// PyTorch's bilinear upsampling of a packed map (N, h, w) to the labels' size.
Tensor upsampled(const Tensor& map, const Tensor& labels) {
  const int64_t n = map.size(0), h = map.size(1), w = map.size(2), height = labels.size(1), width = labels.size(2);
  // The size goes by factors: below autograd, the dispatcher takes no list of SymInts.
  const auto factor = [](int64_t in, int64_t out) {
    const double exact = double(out) / double(in);
    return double(in) * exact < double(out) ? std::nextafter(exact, double(out)) : exact;
  };
  const std::optional<std::vector<double>> factors{{factor(h, height), factor(w, width)}};
  const Tensor planes = reinterpret(map, {n, 1, h, w}, {h * w, h * w, w, 1});
  const Tensor out = aten("upsample_bilinear2d", "vec", planes, std::optional<Sizes>(), false, factors);
  return reinterpret(out, {n, height, width}, {height * width, width, 1});
}

struct EdgeSettings {
  std::string kernel;
  int64_t kernel_size;
  double sigma, beta;
  int64_t downsample;
  std::optional<std::string> normalize;
};

// E_G before its last upsampling, (N, ceil(H / downsample), ceil(W / downsample)). Upsampling keeps
// beta, and the mean is of what is upsampled.
Tensor small_edge(const Tensor& labels, int64_t classes, const EdgeSettings& settings, int64_t ignore_index) {
  STD_TORCH_CHECK(
      labels.dim() == 3 && labels.size(1) > 0 && labels.size(2) > 0 && classes > 0 && classes <= 0x7fffffff,
      "bal_edge: needs labels (N, H, W), and from 1 to 2^31 - 1 classes");
  STD_TORCH_CHECK(
      settings.kernel_size % 2 == 1 && settings.kernel_size > 0 && settings.downsample > 0 &&
          (settings.kernel == "gaussian" || settings.kernel == "linear") &&
          (!settings.normalize || settings.normalize == "max" || settings.normalize == "mean"),
      "bal_edge: needs an odd kernel_size, a positive downsample, a kernel and a normalize that it knows");
  // What is larger than the map leaves one row or column, as its own size does.
  const int64_t downsample = std::min(settings.downsample, std::max(labels.size(1), labels.size(2)));
  const int64_t h = ceil_div(labels.size(1), downsample), w = ceil_div(labels.size(2), downsample);
  Tensor edge = empty({labels.size(0), h, w}, ScalarType::Float, labels);
  if (labels.size(0) == 0) return edge;
  const bool by_mean = settings.normalize == "mean", by_max = settings.normalize == "max";
  const double beta = by_max ? 0 : settings.beta;  // which comes last
  const bool blurred = settings.kernel_size > 1;
  const bool wrong = count_edges(labels, edge, classes, ignore_index, blurred ? 0 : beta);
  check_labels(labels, classes, ignore_index, wrong);
  if (blurred) {
    const BlurKernel kernel(settings.kernel == "gaussian", settings.kernel_size, settings.sigma, std::max(h, w));
    blur(edge, kernel, beta, empty({2 * edge.numel() + 4 * kernel.size}, ScalarType::Float, labels));
  }
  if (by_max) normalise(edge, torch::stable::amax(edge, {1, 2}), false, settings.beta);
  if (by_mean) {
    const Tensor full = settings.downsample == 1 ? edge : upsampled(edge, labels);
    const std::optional<Sizes> dims{{1, 2}};
    normalise(edge, aten("mean", "dim", full, dims, false, std::optional<ScalarType>()), true, 0);
  }
  return edge;
}

Tensor edge(
    Tensor labels, int64_t classes, std::string kernel, int64_t kernel_size, double sigma, double beta, int64_t downsample,
    std::optional<std::string> normalize, int64_t ignore_index) {
  labels = packed(labels);
  const Tensor map = small_edge(labels, classes, {kernel, kernel_size, sigma, beta, downsample, normalize}, ignore_index);
  if (labels.size(0) == 0) return empty(sizes_of(labels), ScalarType::Float, labels);
  return downsample == 1 ? map : upsampled(map, labels);
}

// The loss; what the gradient goes by, "nothing", "coefficients" or, of a sum, "gradient"; and the
// divisor.
std::tuple<Tensor, Tensor, Tensor> cross_entropy(
    Tensor logits, Tensor labels, std::optional<Tensor> pixel_weight, std::optional<Tensor> class_weight,
    double label_smoothing, int64_t ignore_index, std::string reduction, std::string saves) {
  const LossInput in = loss_input(logits, labels, pixel_weight, class_weight, label_smoothing, ignore_index);
  const LossShape& s = in.s;
  STD_TORCH_CHECK(
      reduction == "mean" || reduction == "sum" || reduction == "none", "bal_cross_entropy: no reduction '", reduction, "'");
  const ScalarType dtype = wide(logits.scalar_type());
  const bool per_pixel = reduction == "none";
  Tensor loss = empty(per_pixel ? Sizes{s.images, s.height, s.width} : Sizes{}, dtype, logits);
  Tensor divisor = empty(per_pixel ? Sizes{0} : Sizes{}, dtype, logits);
  const bool by_maps = saves == "coefficients", by_gradient = saves == "gradient" && !per_pixel;
  STD_TORCH_CHECK(by_maps || by_gradient || saves == "nothing", "bal_cross_entropy: cannot save '", saves, "'");
  Tensor saved = by_maps       ? empty({in.maps(), s.images, s.height, s.width}, dtype, logits)
                 : by_gradient ? empty_map(sizes_of(logits), dtype, logits, is_channels_last(logits))
                               : empty({0}, dtype, logits);
  if (s.images == 0) {
    torch::stable::fill_(divisor, 1);
    torch::stable::fill_(loss, 0);
    return {loss, saved, divisor};
  }
  const auto coefficients = by_maps ? std::optional(saved) : std::nullopt;
  const auto gradient = by_gradient ? std::optional(saved) : std::nullopt;
  const bool wrong =
      per_pixel ? loss_map(in, loss, coefficients) : loss_sum(in, reduction == "mean", loss, divisor, coefficients, gradient);
  check_labels(in.labels, s.classes, ignore_index, wrong);
  return {loss, saved, divisor};
}

// The same with the edge map for weights. One op, for its downsampled size must stay out of what
// export traces.
std::tuple<Tensor, Tensor, Tensor> boundary_loss(
    Tensor logits, Tensor labels, std::optional<Tensor> class_weight, std::string kernel, int64_t kernel_size, double sigma,
    double beta, int64_t downsample, std::optional<std::string> normalize, double label_smoothing, int64_t ignore_index,
    std::string reduction, std::string saves) {
  check_loss(logits, labels, std::nullopt, class_weight);
  labels = packed(labels);
  const EdgeSettings settings{kernel, kernel_size, sigma, beta, downsample, normalize};
  const Tensor edge = small_edge(labels, logits.size(1), settings, ignore_index);
  return cross_entropy(logits, labels, edge, class_weight, label_smoothing, ignore_index, reduction, saves);
}

// The gradient by coefficients.
Tensor cross_entropy_map_grad(
    Tensor grad, Tensor logits, Tensor labels, std::optional<Tensor> class_weight, Tensor coefficients, Tensor divisor,
    double label_smoothing, int64_t ignore_index) {
  const LossInput in = loss_input(logits, labels, std::nullopt, class_weight, label_smoothing, ignore_index);
  const LossShape& s = in.s;
  const ScalarType dtype = wide(logits.scalar_type());
  STD_TORCH_CHECK(
      sizes_of(coefficients) == (Sizes{in.maps(), s.images, s.height, s.width}) && coefficients.is_contiguous() &&
          coefficients.scalar_type() == dtype && divisor.scalar_type() == dtype &&
          (grad.dim() == 0 ? divisor.numel() == 1 : sizes_of(grad) == sizes_of(labels)),
      "bal_cross_entropy_map_grad: needs what bal_cross_entropy saved of these logits and labels, and a gradient of its loss");
  check_devices("bal_cross_entropy_map_grad", logits, {&grad, &coefficients, &divisor});
  const Sizes sizes = sizes_of(logits);
  const bool channels_last = is_channels_last(logits);
  Tensor out = empty_map(sizes, logits.scalar_type(), logits, channels_last);
  if (s.images == 0) return out;
  const bool narrowed = kOnCpu && logits.scalar_type() != dtype;
  const Tensor written = narrowed ? empty_map(sizes, dtype, logits, channels_last) : out;
  map_grad(in, packed(converted(grad, dtype)), divisor, coefficients, written);
  if (narrowed) copy(written, out);
  return out;
}

// The gradient that was saved, times grad / divisor.
Tensor cross_entropy_grad(Tensor grad, Tensor logits, Tensor saved, Tensor divisor) {
  const ScalarType dtype = wide(logits.scalar_type());
  STD_TORCH_CHECK(
      logits.dim() == 4 && sizes_of(saved) == sizes_of(logits) && grad.numel() == 1 && divisor.numel() == 1 &&
          saved.scalar_type() == dtype && divisor.scalar_type() == dtype,
      "bal_cross_entropy_grad: needs what bal_cross_entropy saved of these logits, and a gradient of its loss");
  check_devices("bal_cross_entropy_grad", logits, {&grad, &saved, &divisor});
  const bool channels_last = is_channels_last(logits);
  const Tensor out = empty_map(sizes_of(logits), logits.scalar_type(), logits, channels_last);
  if (out.numel() > 0) scale(dense(saved, channels_last), converted(grad, dtype), divisor, out);
  return out;
}

}  // namespace

#define SEGOPS_EDGE_SETTINGS "str kernel, int kernel_size, float sigma, float beta, int downsample, str? normalize"
#define SEGOPS_LOSS_SETTINGS "float label_smoothing, int ignore_index, str reduction, str saves"

SEGOPS_OPS(op) {
  op("bal_edge(Tensor labels, SymInt num_classes, " SEGOPS_EDGE_SETTINGS ", int ignore_index) -> Tensor", TORCH_BOX(&edge));
  op("bal_cross_entropy(Tensor logits, Tensor labels, Tensor? pixel_weight, Tensor? class_weight, " SEGOPS_LOSS_SETTINGS
     ") -> (Tensor, Tensor, Tensor)",
     TORCH_BOX(&cross_entropy));
  op("bal_boundary_loss(Tensor logits, Tensor labels, Tensor? class_weight, " SEGOPS_EDGE_SETTINGS ", " SEGOPS_LOSS_SETTINGS
     ") -> (Tensor, Tensor, Tensor)",
     TORCH_BOX(&boundary_loss));
  op("bal_cross_entropy_grad(Tensor grad, Tensor logits, Tensor saved, Tensor divisor) -> Tensor",
     TORCH_BOX(&cross_entropy_grad));
  op("bal_cross_entropy_map_grad(Tensor grad, Tensor logits, Tensor labels, Tensor? class_weight, Tensor coefficients, Tensor "
     "divisor, float label_smoothing, int ignore_index) -> Tensor",
     TORCH_BOX(&cross_entropy_map_grad));
}

}  // namespace segops::bal
