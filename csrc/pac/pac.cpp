// The ops: dense products and the shift kernels of pac.h.
//
// The filter is shared, so with t over its taps and r over the rates
//
//   sum_r conv_r(x) = sum_t sum_r shift(W_t x, r t)     project, then gather     Cout * taps planes
//                   = sum_t W_t sum_r shift(x, r t)     scatter, then project    Cin * taps planes
//
// The input gradient is the same computation on the output's gradient, the weight gradient one
// scatter and one product. The side with fewer channels is the one that is shifted; where that is
// the output's gradient for both, pac_grads scatters it once. Contiguous maps are copied to the
// kernels' layout, (N, H, W, C), and back. On two CPU cores the copies cost 8 to 20 % of a forward
// pass, and the same products on contiguous maps would cost 13 to 80 % more.
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

bool lies_by_pixels(const Tensor& map) {
  return has_no_gaps(
      {map.size(0), map.size(2), map.size(3), map.size(1)}, {map.stride(0), map.stride(2), map.stride(3), map.stride(1)});
}

// Copies a map to another layout: a GPU transposes it, where it has no gaps.
void copy_map(const Tensor& from, Tensor& to) {
  if constexpr (!kOnCpu) {
    const int64_t n = from.size(0), c = from.size(1), pixels = from.size(2) * from.size(3);
    if (from.is_contiguous() && lies_by_pixels(to)) return transpose(from, to, n, c, pixels);
    if (lies_by_pixels(from) && to.is_contiguous()) return transpose(from, to, n, pixels, c);
  }
  copy(from, to);
}

Pixels pixels_of(const Tensor& map, int64_t groups, ScalarType dtype) {
  const int64_t n = map.size(0), c = map.size(1), h = map.size(2), w = map.size(3);
  const Tensor from = converted(map, dtype);
  if (lies_by_pixels(from)) return {from, n, h, w, groups, c / groups};
  Tensor to = empty_map({n, c, h, w}, dtype, from, true);
  copy_map(from, to);
  return {to, n, h, w, groups, c / groups};
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
  copy_map(reinterpret(buffer.data, {buffer.n, c, h, w}, {h * w * c, 1, w * c, c}), out);
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
  if (out.scalar_type() == a.scalar_type())
    SEGOPS_ATEN(mm_out, out.get(), a.get(), b.get());
  else
    aten("mm", "dtype_out", a, b, out.scalar_type(), out);
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

// The least channels that make a product worth its call.
int64_t least_of(const Filter& filter) {
  return std::min<int64_t>(filter.out_channels, 16);
}

// Bytes of planes, per image and channel.
int64_t plane_of(const Pixels& source, const Filter& filter) {
  return source.h * source.w * filter.taps() * source.data.element_size();
}

// Whether `source` is shifted, not its product with the filter. At most one of source and output
// has groups: one per rate on the side that is concatenated.
bool scatters(const Pixels& source, const Filter& filter, int64_t out_groups) {
  const bool fewer =
      source.channels <= filter.out_channels ||
      (least_of(filter) * plane_of(source, filter) > kLargestWorkspace && source.channels <= 4 * filter.out_channels);
  return source.groups > 1 || (out_groups == 1 && fewer);
}

// out = bias + the shifts, by sign, of source under the filter.
void convolve(
    const Pixels& source, const Filter& filter, const std::optional<Tensor>& bias, const Sizes& rates, int64_t sign,
    const Pixels& out) {
  const ScalarType dtype = source.data.scalar_type();
  if (scatters(source, filter, out.groups)) {
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

  const int64_t channels = out.channels, taps = filter.taps(), least = least_of(filter), plane = plane_of(source, filter);
  const int64_t images = std::min(source.n, std::max<int64_t>(1, kWorkspace / (least * plane)));
  int64_t block = std::min(channels, std::max(least, kWorkspace / (images * plane) / 16 * 16));
  block = std::min(block, round_up(ceil_div(channels, ceil_div(channels, block)), 16));  // as many blocks, of even size
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

// The sum of products a.T @ b, strip after strip: in float32 at least if there are several.
class Products {
 public:
  explicit Products(int64_t rows) : rows_(rows) {}  // of all strips

  void add(const Tensor& a, const Tensor& b) {
    const int64_t rows = a.size(0), m = a.size(1), n = b.size(1);
    const ScalarType dtype = a.scalar_type(), sums = rows == rows_ ? dtype : wide(dtype);
    bool into_sums = false;
    if constexpr (!kOnCpu) into_sums = multiplies_into_32(a);
    const auto product = [&](int64_t first, int64_t count, ScalarType sums) {
      Tensor out = empty({m, n}, into_sums ? sums : dtype, a);
      multiply(reinterpret(a, {m, count}, {1, m}, first * m), reinterpret(b, {count, n}, {n, 1}, first * n), out);
      return converted(out, sums);
    };
    if (kOnCpu && m * n < 1 << 14) {
      // The BLAS sums so small a product in one long sequence, and loses a digit to rounding: in
      // pieces it keeps it.
      std::optional<Tensor> pieces;
      for (int64_t i = 0; i < rows; i += 512) pieces = plus(pieces, product(i, std::min<int64_t>(512, rows - i), wide(dtype)));
      total_ = plus(total_, *pieces);
    } else if (total_ && sums == dtype) {
      SEGOPS_ATEN(addmm_out, total_->get(), total_->get(), transposed(a).get(), b.get(), 1., 1.);
    } else {
      total_ = plus(total_, product(0, rows, sums));
    }
  }
  const Tensor& total() const { return *total_; }

 private:
  static Tensor plus(const std::optional<Tensor>& one, const Tensor& other) {
    if (!one) return other;
    AtenTensorHandle sum;
    SEGOPS_ATEN(add_Tensor, one->get(), other.get(), 1., &sum);
    return Tensor(sum);
  }

  const int64_t rows_;
  std::optional<Tensor> total_;
};

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

// The weight gradient's part that maps can touch; the rest is zero.
Filter live_part(Tensor& out, const Sizes& rates, const Pixels& map) {
  const Filter live(out, rates, map.h, map.w);
  if (live.taps() < out.size(2) * out.size(3)) torch::stable::zero_(out);
  return live;
}

// Writes a matrix whose elements lie by these strides of (C_out, C_in, kh, kw).
void deliver(const Tensor& matrix, const Sizes& strides, const Filter& live) {
  const Sizes sizes{live.out_channels, live.in_channels, live.kh, live.kw};
  Tensor to = reinterpret(live.weight, sizes, {live.out_stride, live.in_stride, live.row, live.column}, live.first);
  copy(reinterpret(matrix, sizes, strides), to);
}

// Of a matrix (taps * C_out, C_in): the product of the output's gradient, scattered, and the input.
Sizes scattered_strides(const Filter& live) {
  const int64_t tap = live.out_channels * live.in_channels;
  return {live.in_channels, 1, live.kw * tap, tap};
}

bool scatters_grad(const Pixels& dy, const Pixels& x) {
  return dy.groups > 1 || dy.channels <= x.channels;
}

void input_grad(const Pixels& dy, const Filter& filter, const Sizes& rates, Tensor& out) {
  const Pixels to = buffer_for(out, 1, dy.data.scalar_type());
  convolve(dy, filter.transposed(), std::nullopt, rates, -1, to);
  deliver(to, out);
}

void weight_grad(const Pixels& dy, const Pixels& x, const Filter& live, const Sizes& rates) {
  Products products(x.pixels());
  if (scatters_grad(dy, x)) {
    scattered(dy, live.kernel_size(), rates, -1, [&](int64_t first, const Tensor& planes) {
      products.add(planes, x.matrix(first, planes.size(0)));
    });
    return deliver(products.total(), scattered_strides(live), live);
  }
  scattered(x, live.kernel_size(), rates, 1, [&](int64_t first, const Tensor& planes) {
    products.add(dy.matrix(first, planes.size(0)), planes);
  });
  deliver(products.total(), {live.taps() * x.channels, 1, live.kw * x.channels, x.channels}, live);
}

// The adjoint of pac in the input.
Tensor pac_input_grad(Tensor grad, Tensor weight, bool channels_last, std::vector<int64_t> rates, std::string merge) {
  check("pac_input_grad", grad, weight, rates, merge);
  check_kernel("pac_input_grad", weight.size(2), weight.size(3));
  const int64_t groups = groups_of(rates, merge);
  STD_TORCH_CHECK(grad.size(1) == weight.size(0) * groups, "pac_input_grad: grad must have the channels of pac's output");
  Tensor out = empty_map({grad.size(0), weight.size(1), grad.size(2), grad.size(3)}, grad.scalar_type(), grad, channels_last);
  if (is_zero(out, grad, weight)) return out;
  rates = clamped(rates, grad);
  const Pixels dy = pixels_of(grad, groups, compute_dtype(grad));
  input_grad(dy, Filter(weight, rates, dy.h, dy.w), rates, out);
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
  const Pixels dy = pixels_of(grad, groups, dtype), x = pixels_of(input, 1, dtype);
  weight_grad(dy, x, live_part(out, rates, x), rates);
  return out;
}

// Both, which share the scatter of the output's gradient where that is what both shift.
std::tuple<Tensor, Tensor> pac_grads(
    Tensor grad, Tensor input, Tensor weight, bool input_channels_last, bool weight_channels_last, std::vector<int64_t> rates,
    std::string merge) {
  check("pac_grads", grad, input, rates, merge);
  check("pac_grads", grad, weight, rates, merge);
  check_kernel("pac_grads", weight.size(2), weight.size(3));
  const int64_t groups = groups_of(rates, merge);
  STD_TORCH_CHECK(
      weight.size(1) == input.size(1) && grad.size(0) == input.size(0) && grad.size(2) == input.size(2) &&
          grad.size(3) == input.size(3) && grad.size(1) == weight.size(0) * groups,
      "pac_grads: weight must have input's channels, grad input's batch and size, and the channels of pac's output");
  Tensor by_input = empty_map(sizes_of(input), grad.scalar_type(), grad, input_channels_last);
  Tensor by_weight = empty_map(sizes_of(weight), grad.scalar_type(), grad, weight_channels_last);
  const bool no_input = is_zero(by_input, grad, weight), no_weight = is_zero(by_weight, grad, input);
  if (no_input || no_weight) return {by_input, by_weight};
  const ScalarType dtype = compute_dtype(input);
  rates = clamped(rates, input);
  const Pixels dy = pixels_of(grad, groups, dtype), x = pixels_of(input, 1, dtype);
  const Filter filter(weight, rates, x.h, x.w), live = live_part(by_weight, rates, x);
  if (!scatters(dy, filter.transposed(), 1) || !scatters_grad(dy, x)) {
    input_grad(dy, filter, rates, by_input);
    weight_grad(dy, x, live, rates);
    return {by_input, by_weight};
  }
  const Pixels to = buffer_for(by_input, 1, dtype);
  const Tensor flat = filter.transposed().after_scatter(dtype);
  Products products(x.pixels());
  scattered(dy, live.kernel_size(), rates, -1, [&](int64_t first, const Tensor& planes) {
    linear(planes, flat, std::nullopt, to.matrix(first, planes.size(0)));
    products.add(planes, x.matrix(first, planes.size(0)));
  });
  deliver(to, by_input);
  deliver(products.total(), scattered_strides(live), live);
  return {by_input, by_weight};
}

}  // namespace

SEGOPS_OPS(op) {
  op("pac(Tensor input, Tensor weight, Tensor? bias, int[] rates, str merge) -> Tensor", TORCH_BOX(&pac));
  op("pac_input_grad(Tensor grad, Tensor weight, bool channels_last, int[] rates, str merge) -> Tensor",
     TORCH_BOX(&pac_input_grad));
  op("pac_weight_grad(Tensor grad, Tensor input, int kernel_size, bool channels_last, int[] rates, str merge) -> Tensor",
     TORCH_BOX(&pac_weight_grad));
  op("pac_grads(Tensor grad, Tensor input, Tensor weight, bool input_channels_last, bool weight_channels_last, int[] rates, "
     "str merge) -> (Tensor, Tensor)",
     TORCH_BOX(&pac_grads));
}

}  // namespace segops::pac
