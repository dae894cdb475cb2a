// The ops: memory, and the kernels of pag.h. `channels_last` is how an op reads and writes its
// maps, and its offsets: backward must know without looking at strides.

#include "pag.h"

#include "../common/op.h"

namespace segops::pag {
namespace {

void check_map(const Tensor& map, const Tensor& like, const char* op) {
  check_devices(op, like, {&map});
  STD_TORCH_CHECK(map.dim() == 4 && map.size(0) == like.size(0), op, ": maps must be (N, C, H, W) of one batch");
  STD_TORCH_CHECK(map.scalar_type() == like.scalar_type(), op, ": maps differ in dtype");
}

// The map with neighbours side by side along x, or along the channels: a kernel does with any other
// strides.
Tensor readable(const Tensor& map, bool channels_last) {
  const int64_t dim = channels_last ? 1 : 3;
  return map.stride(dim) == 1 || map.size(dim) == 1 ? map : dense(map, channels_last);
}

// The merged maps, of which the first is as large as they, and the offsets of all pooled ones.
std::tuple<Tensor, Tensor> pag(std::vector<Tensor> maps, std::string merge, bool channels_last) {
  const char* op = "pag";
  const Tensor decoder = maps[0];
  check_map(decoder, decoder, op);
  const bool concat = merge == "concat";
  STD_TORCH_CHECK(concat || merge == "sum", op, ": merge must be 'concat' or 'sum'");
  const int64_t images = decoder.size(0), height = decoder.size(2), width = decoder.size(3);
  std::vector<Part> parts;
  int64_t channels = 0, bytes = 0;
  for (Tensor& map : maps) {
    check_map(map, decoder, op);
    Part part{windows(map, height, width, {}, op), map.size(1), concat ? channels : 0, -1, -1, -1};
    if (!part.windows.identity()) {
      part.offsets = bytes;
      part.end = bytes + images * part.channels * height * width * (part.windows.two_bytes ? 2 : 1);
      bytes = part.next = round_up(part.end, 16);
    }
    channels = part.first_channel + part.channels;
    STD_TORCH_CHECK(concat || channels == decoder.size(1), op, ": channels of a sum differ");
    parts.push_back(part);
    map = readable(map, channels_last);
  }
  const Tensor out = empty_map({images, channels, height, width}, decoder.scalar_type(), decoder, channels_last);
  const Tensor offsets = empty({bytes}, ScalarType::Byte, decoder);
  if (out.numel() > 0) pool(maps, parts, out, data_of<char>(offsets), concat, channels_last);
  return {out, offsets};
}

// The gradient of a map of this size: of `grad` its channels, by the offsets from `first_byte` on.
Tensor pag_grad(
    Tensor grad, Tensor offsets, int64_t first_channel, int64_t channels, int64_t first_byte, int64_t out_height,
    int64_t out_width, bool channels_last) {
  const char* op = "pag_grad";
  STD_TORCH_CHECK(grad.dim() == 4, op, ": needs grad (N, C, h, w)");
  STD_TORCH_CHECK(
      first_channel >= 0 && channels >= 0 && channels <= grad.size(1) - first_channel, op, ": grad has not these channels");
  check_devices(op, grad, {&offsets});
  const int64_t images = grad.size(0), height = grad.size(2), width = grad.size(3);
  if (channels < grad.size(1))
    grad = reinterpret(
        grad, {images, channels, height, width}, {grad.stride(0), grad.stride(1), grad.stride(2), grad.stride(3)},
        first_channel * grad.stride(1));
  grad = readable(grad, channels_last);
  const Tensor out = empty_map({images, channels, out_height, out_width}, grad.scalar_type(), grad, channels_last);
  const Windows w = windows(out, height, width, {}, op);
  const int64_t bytes = grad.numel() * (w.two_bytes ? 2 : 1);
  STD_TORCH_CHECK(
      offsets.scalar_type() == ScalarType::Byte && offsets.is_contiguous() && first_byte >= 0 &&
          first_byte <= offsets.numel() - bytes,
      op, ": offsets must have ", bytes, " bytes from ", first_byte, " on");
  if (out.numel() > 0) scatter(w, grad, data_of<const char>(offsets) + first_byte, out, channels_last);
  return out;
}

// The other three are linear, once where the maxima lie is known: unpool and gather are each
// other's derivative.

Windows byte_windows(const Tensor& map, int64_t height, int64_t width, int64_t kernel_h, int64_t kernel_w, const char* op) {
  const Windows w = windows(map, height, width, {kernel_h, kernel_w}, op);
  STD_TORCH_CHECK(!w.two_bytes, op, ": a byte does not number windows of more than 256 elements");
  return w;
}

void check_offsets(const Tensor& offsets, const Tensor& map, const char* op) {
  check_devices(op, map, {&offsets});
  STD_TORCH_CHECK(map.dim() == 4 && offsets.dim() == 4, op, ": map and offsets must be (N, C, H, W)");
  STD_TORCH_CHECK(
      offsets.scalar_type() == ScalarType::Byte && offsets.size(0) == map.size(0) && offsets.size(1) == map.size(1), op,
      ": offsets must be bytes, of the map's images and channels");
}

std::tuple<Tensor, Tensor> pag_max_pool(Tensor input, int64_t kernel_h, int64_t kernel_w, bool channels_last) {
  const char* op = "pag_max_pool";
  STD_TORCH_CHECK(input.dim() == 4 && kernel_h > 0 && kernel_w > 0, op, ": needs input (N, C, H, W) and a positive kernel");
  const Sizes sizes{input.size(0), input.size(1), ceil_div(input.size(2), kernel_h), ceil_div(input.size(3), kernel_w)};
  const Windows w = byte_windows(input, sizes[2], sizes[3], kernel_h, kernel_w, op);
  const Tensor pooled = empty_map(sizes, input.scalar_type(), input, channels_last);
  const Tensor offsets = empty_map(sizes, ScalarType::Byte, input, channels_last);
  const int64_t bytes = pooled.numel();
  if (bytes > 0)
    pool(
        {readable(input, channels_last)}, {{w, sizes[1], 0, 0, bytes, bytes}}, pooled, data_of<char>(offsets), true,
        channels_last);
  return {pooled, offsets};
}

Tensor pag_max_unpool(
    Tensor pooled, Tensor offsets, int64_t kernel_h, int64_t kernel_w, int64_t height, int64_t width, bool channels_last) {
  const char* op = "pag_max_unpool";
  check_offsets(offsets, pooled, op);
  STD_TORCH_CHECK(
      offsets.size(2) == pooled.size(2) && offsets.size(3) == pooled.size(3), op, ": needs offsets of pooled's shape");
  const Tensor out = empty_map({pooled.size(0), pooled.size(1), height, width}, pooled.scalar_type(), pooled, channels_last);
  const Windows w = byte_windows(out, pooled.size(2), pooled.size(3), kernel_h, kernel_w, op);
  offsets = dense(offsets, channels_last);
  if (out.numel() > 0) scatter(w, readable(pooled, channels_last), data_of<const char>(offsets), out, channels_last);
  return out;
}

Tensor pag_max_gather(Tensor input, Tensor offsets, int64_t kernel_h, int64_t kernel_w, bool channels_last) {
  const char* op = "pag_max_gather";
  check_offsets(offsets, input, op);
  const Windows w = byte_windows(input, offsets.size(2), offsets.size(3), kernel_h, kernel_w, op);
  const Tensor out = empty_map(sizes_of(offsets), input.scalar_type(), input, channels_last);
  offsets = dense(offsets, channels_last);
  if (out.numel() > 0) gather(w, readable(input, channels_last), data_of<const char>(offsets), out, channels_last);
  return out;
}

}  // namespace

SEGOPS_OPS(op) {
  op("pag(Tensor[] maps, str merge, bool channels_last) -> (Tensor, Tensor)", TORCH_BOX(&pag));
  op("pag_grad(Tensor grad, Tensor offsets, SymInt first_channel, SymInt channels, SymInt first_byte, "
     "SymInt height, SymInt width, bool channels_last) -> Tensor",
     TORCH_BOX(&pag_grad));
  op("pag_max_pool(Tensor input, int kernel_h, int kernel_w, bool channels_last) -> (Tensor, Tensor)",
     TORCH_BOX(&pag_max_pool));
  op("pag_max_unpool(Tensor pooled, Tensor offsets, int kernel_h, int kernel_w, SymInt height, SymInt width, "
     "bool channels_last) -> Tensor",
     TORCH_BOX(&pag_max_unpool));
  op("pag_max_gather(Tensor input, Tensor offsets, int kernel_h, int kernel_w, bool channels_last) -> Tensor",
     TORCH_BOX(&pag_max_gather));
}

}  // namespace segops::pag
