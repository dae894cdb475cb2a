// The ops: dense products and the shift kernels of pac.h.
//
// The filter is shared, so with t over its taps and r over the rates
//
//   sum_r conv_r(x) = sum_t sum_r shift(W_t x, r t)     project, then gather     Cout * taps planes
//                   = sum_t W_t sum_r shift(x, r t)     scatter, then project    Cin * taps planes
//
// The input gradient is the same computation on the output's gradient, the weight gradient one
// scatter and one product. The side with fewer channels is the one that is shifted. Contiguous maps
// are copied to the kernels' layout, (N, H, W, C), and back. On two CPU cores the copies cost 8 to
// 20 % of a forward pass, and the same products on contiguous maps would cost 13 to 80 % more.
//
// The planes are made in blocks of about kWorkspace bytes, which on a CPU stay in cache; the least
// block is 16 channels of an image. They have the products' dtype: float16 sums of shifted inputs
// overflow where rates * |input| passes 65504.

#include "pac.h"

#include "../common/op.h"

#include <algorithm>
#include <array>

namespace segops::pac {
namespace {

#ifdef SEGOPS_EMULATION  // whose maps are small
constexpr int64_t kWorkspace = 64 << 10, kLargestWorkspace = 256 << 10;
#else
constexpr int64_t kWorkspace = kOnCpu ? 4 << 20 : 256 << 20, kLargestWorkspace = kOnCpu ? 32 << 20 : 1 << 30;
#endif

// A map (N, H, W, G, C) without gaps: G groups of C channels.
struct Pixels {
  Tensor data;
  int64_t n, h, w, groups, channels;

  int64_t rows() const { return n * h; }
  int64_t pixels() const { return n * h * w; }
  // The pixels from this one on, as a matrix.
  Tensor matrix(int64_t first, int64_t count) const {
    const int64_t width = groups * channels;
    return reinterpret(data, {count, width}, {width, 1}, first * width);
  }
};

// The taps of a weight (C, K, k, k) that can touch the map: one that even the smallest rate leads
// outside is skipped.
struct Filter {
  Tensor weight;
  int64_t out_channels, in_channels, kh, kw;
  int64_t out_stride, in_stride, row, column, first;  // strides, and the first element

  Filter(const Tensor& weight, const Sizes& rates, int64_t h, int64_t w) : weight(weight) {
    const int64_t smallest = *std::min_element(rates.begin(), rates.end());
    const auto live = [&](int64_t dim, int64_t size) { return 2 * std::min(weight.size(dim) / 2, (size - 1) / smallest) + 1; };
    out_channels = weight.size(0), in_channels = weight.size(1), kh = live(2, h), kw = live(3, w);
    out_stride = weight.stride(0), in_stride = weight.stride(1), row = weight.stride(2), column = weight.stride(3);
    first = (weight.size(2) - kh) / 2 * row + (weight.size(3) - kw) / 2 * column;
  }
  Filter transposed() const {
    Filter other = *this;
    std::swap(other.out_channels, other.in_channels);
    std::swap(other.out_stride, other.in_stride);
    return other;
  }
  Sizes kernel_size() const { return {kh, kw}; }
  int64_t taps() const { return kh * kw; }
  // (C, taps * K): a scatter's result is projected by it.
  Tensor after_scatter(ScalarType dtype) const {
    const Tensor flat = packed(weight, {out_channels, kh, kw, in_channels}, {out_stride, row, column, in_stride}, first, dtype);
    return reinterpret(flat, {out_channels, taps() * in_channels}, {taps() * in_channels, 1});
  }
  // (taps * C, K) of some of the channels: a projection by it is gathered.
  Tensor before_gather(int64_t channel, int64_t channels, ScalarType dtype) const {
    const Tensor flat = packed(
        weight, {kh, kw, channels, in_channels}, {row, column, out_stride, in_stride}, first + channel * out_stride, dtype);
    return reinterpret(flat, {taps() * channels, in_channels}, {in_channels, 1});
  }
};

// What the products are computed in: a CPU without the instructions for half precision is faster,
// and more accurate, in float32.
ScalarType compute_dtype(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  if (!kOnCpu || (dtype != ScalarType::Half && dtype != ScalarType::BFloat16)) return dtype;
  static const bool has_bfloat16 = [] {
    std::array<StableIValue, 1> stack{};
    return torch_call_dispatcher("mkldnn::_is_mkldnn_bf16_supported", "", stack.data(), TORCH_ABI_VERSION) == 0 &&
           torch::stable::detail::to<bool>(stack[0]);
  }();
  return dtype == ScalarType::BFloat16 && has_bfloat16 ? dtype : ScalarType::Float;
}

Pixels pixels_of(const Tensor& map, int64_t groups, ScalarType dtype) {
  const int64_t n = map.size(0), c = map.size(1), h = map.size(2), w = map.size(3);
  return {dense(converted(map, dtype), true), n, h, w, groups, c / groups};
}

// Room for `out` in that layout, its own memory where it has it; `deliver` copies it there if not.
Pixels buffer_for(const Tensor& out, int64_t groups, ScalarType dtype) {
  const int64_t n = out.size(0), c = out.size(1), h = out.size(2), w = out.size(3);
  const Sizes sizes{n, h, w, c}, strides{out.stride(0), out.stride(2), out.stride(3), out.stride(1)};
  const bool own = out.scalar_type() == dtype && has_no_gaps(sizes, strides);
  return {own ? out : empty(sizes, dtype, out), n, h, w, groups, c / groups};
}

void deliver(const Pixels& buffer, Tensor& out) {
  if (buffer.data.data_ptr() == out.data_ptr()) return;
  const int64_t h = buffer.h, w = buffer.w, c = buffer.groups * buffer.channels;
  copy(reinterpret(buffer.data, {buffer.n, c, h, w}, {h * w * c, 1, w * c, c}), out);
}

// Rates beyond the map read nothing but the centre: as large as the map is as large as any, and no
// offset overflows.
Sizes clamped(Sizes rates, const Tensor& map) {
  for (int64_t& rate : rates) rate = std::min(rate, std::max(map.size(2), map.size(3)));
  return rates;
}

Tensor transposed(const Tensor& matrix) {
  return reinterpret(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  SEGOPS_ATEN(mm_out, out.get(), a.get(), b.get());
}

// out (M, O) = x (M, K) @ weight (O, K).T + bias; all without gaps.
void linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, Tensor out) {
  const int64_t m = x.size(0), k = x.size(1), o = weight.size(0);
  const bool large = m >= 256 && m * weight.numel() >= 1 << 22;
  if (kOnCpu && large && x.scalar_type() != ScalarType::Double) {
    // As a 1x1 convolution it runs on oneDNN, 5-25 % faster than the BLAS once its 30 us of
    // overhead do not count.
    const Tensor pixels = reinterpret(x, {1, k, m, 1}, {m * k, 1, k, k});
    const Tensor filter = reinterpret(weight, {o, k, 1, 1}, {k, 1, 1, 1});
    AtenTensorHandle shift = bias ? bias->get() : nullptr, result;
    const int64_t ones[] = {1, 1}, zeros[] = {0, 0};
    SEGOPS_ATEN(
        convolution, pixels.get(), filter.get(), bias ? &shift : nullptr, ones, 2, zeros, 2, ones, 2, 0, zeros, 2, 1, &result);
    const Tensor product(result);
    return copy(reinterpret(product, {m, o}, {product.stride(2), product.stride(1)}), out);
  }
  if (bias)
    SEGOPS_ATEN(addmm_out, out.get(), bias->get(), x.get(), transposed(weight).get(), 1., 1.);
  else
    multiply(x, transposed(weight), out);
}

// Calls use(first pixel, planes) for the scatter of a map as matrices (pixels, taps * C), strip
// after strip.
template <typename Use>
void scattered(const Pixels& source, const Sizes& kernel_size, const Sizes& rates, int64_t sign, const Use& use) {
  const int64_t width = kernel_size[0] * kernel_size[1] * source.channels;
  const int64_t pixels = std::max<int64_t>(2048, kWorkspace / (width * source.data.element_size()));
  int64_t rows = std::min(source.rows(), ceil_div(pixels, source.w));
  rows = ceil_div(source.rows(), ceil_div(source.rows(), rows));  // the same number of strips, of even size
  const Sizes strides{source.w * width, width, source.channels, 1};
  const Tensor groups = reinterpret(
      source.data, {source.n, source.h, source.w, source.groups, source.channels},
      {source.h * source.w * source.groups * source.channels, source.w * source.groups * source.channels,
       source.groups * source.channels, source.channels, 1});
  const Tensor buffer = empty({rows * source.w, width}, source.data.scalar_type(), source.data);
  for (int64_t first = 0; first < source.rows(); first += rows) {
    const int64_t count = std::min(rows, source.rows() - first);
    const Sizes sizes{count, source.w, kernel_size[0] * kernel_size[1], source.channels};
    shift_scatter(groups, reinterpret(buffer, sizes, strides), first, kernel_size, rates, sign);
    use(first * source.w, reinterpret(buffer, {count * source.w, width}, {width, 1}));
  }
}

// out = bias + the shifts, by sign, of source under the filter. At most one of the two has groups:
// one per rate on the side that is concatenated.
void convolve(
    const Pixels& source, const Filter& filter, const std::optional<Tensor>& bias, const Sizes& rates, int64_t sign,
    const Pixels& out) {
  const ScalarType dtype = source.data.scalar_type();
  const int64_t channels = out.channels, taps = filter.taps();
  const int64_t plane = source.h * source.w * taps * source.data.element_size();  // bytes, per image and channel
  const int64_t least = std::min<int64_t>(channels, 16);                          // channels that make a product worth its call
  const bool fewer = source.channels <= channels || (least * plane > kLargestWorkspace && source.channels <= 4 * channels);
  if (source.groups > 1 || (out.groups == 1 && fewer)) {
    std::optional<Tensor> shift;
    if (bias) {
      AtenTensorHandle product;
      SEGOPS_ATEN(mul_Scalar, bias->get(), double(rates.size()), &product);
      shift = Tensor(product);
    }
    const Tensor flat = filter.after_scatter(dtype);
    return scattered(source, filter.kernel_size(), rates, sign, [&](int64_t first, const Tensor& planes) {
      linear(planes, flat, shift, out.matrix(first, planes.size(0)));
    });
  }

  const int64_t images = std::min(source.n, std::max<int64_t>(1, kWorkspace / (least * plane)));
  const int64_t block = std::min(channels, std::max(least, kWorkspace / (images * plane) / 16 * 16));
  const int64_t pixels = source.h * source.w, width = out.groups * channels;
  const Tensor buffer = empty({images * pixels, taps * block}, dtype, source.data);
  for (int64_t c = 0; c < channels; c += block) {
    const int64_t part = std::min(block, channels - c);
    const Tensor flat = filter.before_gather(c, part, dtype);
    std::optional<Tensor> shift;
    if (bias) shift = reinterpret(*bias, {part}, {1}, c);
    for (int64_t i = 0; i < source.n; i += images) {
      const int64_t count = std::min(images, source.n - i);
      linear(
          source.matrix(i * pixels, count * pixels), flat, std::nullopt,
          reinterpret(buffer, {count * pixels, taps * part}, {taps * part, 1}));
      const Tensor planes = reinterpret(
          buffer, {count, source.h, source.w, taps, part},
          {pixels * taps * part, source.w * taps * part, taps * part, part, 1});
      const Tensor to = reinterpret(
          out.data, {count, source.h, source.w, out.groups, part}, {pixels * width, source.w * width, width, channels, 1},
          i * pixels * width + c);
      shift_gather(planes, shift, to, filter.kernel_size(), rates, sign);
    }
  }
}

// total + a.T @ b, summed in float32 at least; there is no total at first.
Tensor accumulate(const std::optional<Tensor>& total, const Tensor& a, const Tensor& b) {
  const ScalarType sums = wide(a.scalar_type());
  const int64_t rows = a.size(0), m = a.size(1), n = b.size(1);
  const auto product = [&](int64_t first, int64_t count) {
    Tensor out = empty({m, n}, a.scalar_type(), a);
    multiply(reinterpret(a, {m, count}, {1, m}, first * m), reinterpret(b, {count, n}, {n, 1}, first * n), out);
    return converted(out, sums);
  };
  const auto plus = [](const std::optional<Tensor>& one, const Tensor& other) {
    if (!one) return other;
    AtenTensorHandle sum;
    SEGOPS_ATEN(add_Tensor, one->get(), other.get(), 1., &sum);
    return Tensor(sum);
  };
  if (kOnCpu && m * n < 1 << 14) {
    // The BLAS sums so small a product in one long sequence, and loses a digit to rounding: in
    // pieces it keeps it.
    std::optional<Tensor> sum;
    for (int64_t i = 0; i < rows; i += 512) sum = plus(sum, product(i, std::min<int64_t>(512, rows - i)));
    return plus(total, *sum);
  }
  if (total && sums == a.scalar_type()) {
    SEGOPS_ATEN(addmm_out, total->get(), total->get(), transposed(a).get(), b.get(), 1., 1.);
    return *total;
  }
  return plus(total, product(0, rows));
}

int64_t groups_of(const Sizes& rates, const std::string& merge) {
  return merge == "concat" ? int64_t(rates.size()) : 1;
}

// Whether there is nothing to sum up; then `out` is filled with zeros.
bool is_zero(Tensor& out, const Tensor& one, const Tensor& other) {
  if (out.numel() == 0) return true;
  if (one.numel() && other.numel()) return false;
  torch::stable::zero_(out);
  return true;
}

void check(const char* op, const Tensor& map, const Tensor& other, const Sizes& rates, const std::string& merge) {
  STD_TORCH_CHECK(map.dim() == 4 && other.dim() == 4, op, ": needs tensors of four dimensions");
  STD_TORCH_CHECK(map.scalar_type() == other.scalar_type(), op, ": tensors differ in dtype");
  check_devices(op, map, {&other});
  STD_TORCH_CHECK(!rates.empty() && *std::min_element(rates.begin(), rates.end()) > 0, op, ": rates must hold positive ints");
  STD_TORCH_CHECK(merge == "sum" || merge == "concat", op, ": merge must be 'sum' or 'concat'");
}

void check_kernel(const char* op, int64_t height, int64_t width) {
  STD_TORCH_CHECK(height == width && height % 2 == 1, op, ": the kernel must be square and odd");
}

Tensor pac(Tensor input, Tensor weight, std::optional<Tensor> bias, std::vector<int64_t> rates, std::string merge) {
  check("pac", input, weight, rates, merge);
  check_kernel("pac", weight.size(2), weight.size(3));
  STD_TORCH_CHECK(weight.size(1) == input.size(1), "pac: weight must have input's channels");
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "pac: bias must be (C), of weight's filters");
    check_devices("pac", input, {&*bias});
  }
  const int64_t groups = groups_of(rates, merge);
  Tensor out = empty_map(
      {input.size(0), weight.size(0) * groups, input.size(2), input.size(3)}, input.scalar_type(), input,
      is_channels_last(input));
  if (is_zero(out, input, weight)) return out;
  const ScalarType dtype = compute_dtype(input);
  rates = clamped(rates, input);
  if (bias) bias = packed(converted(*bias, dtype));
  const Pixels to = buffer_for(out, groups, dtype);
  convolve(pixels_of(input, 1, dtype), Filter(weight, rates, to.h, to.w), bias, rates, 1, to);
  deliver(to, out);
  return out;
}

// The adjoint of pac in the input.
Tensor pac_input_grad(Tensor grad, Tensor weight, bool channels_last, std::vector<int64_t> rates, std::string merge) {
  check("pac_input_grad", grad, weight, rates, merge);
  check_kernel("pac_input_grad", weight.size(2), weight.size(3));
  const int64_t groups = groups_of(rates, merge);
  STD_TORCH_CHECK(grad.size(1) == weight.size(0) * groups, "pac_input_grad: grad must have the channels of pac's output");
  Tensor out = empty_map({grad.size(0), weight.size(1), grad.size(2), grad.size(3)}, grad.scalar_type(), grad, channels_last);
  if (is_zero(out, grad, weight)) return out;
  const ScalarType dtype = compute_dtype(grad);
  rates = clamped(rates, grad);
  const Pixels to = buffer_for(out, 1, dtype);
  convolve(pixels_of(grad, groups, dtype), Filter(weight, rates, to.h, to.w).transposed(), std::nullopt, rates, -1, to);
  deliver(to, out);
  return out;
}

// The adjoint of pac in the weight.
Tensor pac_weight_grad(
    Tensor grad, Tensor input, int64_t kernel_size, bool channels_last, std::vector<int64_t> rates, std::string merge) {
  check("pac_weight_grad", grad, input, rates, merge);
  check_kernel("pac_weight_grad", kernel_size, kernel_size);
  const int64_t groups = groups_of(rates, merge), c_out = grad.size(1) / groups, c_in = input.size(1);
  STD_TORCH_CHECK(
      grad.size(0) == input.size(0) && grad.size(2) == input.size(2) && grad.size(3) == input.size(3) &&
          grad.size(1) == c_out * groups,
      "pac_weight_grad: grad must have input's batch and size, and the channels of pac's output");
  Tensor out = empty_map({c_out, c_in, kernel_size, kernel_size}, grad.scalar_type(), grad, channels_last);
  if (is_zero(out, grad, input)) return out;
  const ScalarType dtype = compute_dtype(input);
  rates = clamped(rates, input);
  const Filter live(out, rates, input.size(2), input.size(3));
  if (live.taps() < kernel_size * kernel_size) torch::stable::zero_(out);
  const Pixels dy = pixels_of(grad, groups, dtype), x = pixels_of(input, 1, dtype);
  std::optional<Tensor> total;
  Sizes strides;  // of (C_out, C_in, kh, kw) in the total
  if (groups > 1 || merge == "concat" || c_out <= c_in) {
    scattered(dy, live.kernel_size(), rates, -1, [&](int64_t first, const Tensor& planes) {
      total = accumulate(total, planes, x.matrix(first, planes.size(0)));
    });
    strides = {c_in, 1, live.kw * c_out * c_in, c_out * c_in};
  } else {
    scattered(x, live.kernel_size(), rates, 1, [&](int64_t first, const Tensor& planes) {
      total = accumulate(total, dy.matrix(first, planes.size(0)), planes);
    });
    strides = {live.taps() * c_in, 1, live.kw * c_in, c_in};
  }
  const Sizes sizes{c_out, c_in, live.kh, live.kw};
  Tensor to = reinterpret(out, sizes, {live.out_stride, live.in_stride, live.row, live.column}, live.first);
  copy(reinterpret(*total, sizes, strides), to);
  return out;
}

}  // namespace

SEGOPS_OPS(op) {
  op("pac(Tensor input, Tensor weight, Tensor? bias, int[] rates, str merge) -> Tensor", TORCH_BOX(&pac));
  op("pac_input_grad(Tensor grad, Tensor weight, bool channels_last, int[] rates, str merge) -> Tensor",
     TORCH_BOX(&pac_input_grad));
  op("pac_weight_grad(Tensor grad, Tensor input, int kernel_size, bool channels_last, int[] rates, str merge) -> Tensor",
     TORCH_BOX(&pac_weight_grad));
}

}  // namespace segops::pac
