// The op: memory, and the kernels of argmax.h.

#include "argmax.h"

#include "../common/op.h"

namespace segops::argmax {
namespace {

Tensor upsample_argmax(Tensor logits, std::vector<int64_t> size) {
  STD_TORCH_CHECK(logits.dim() == 4 && size.size() == 2, "upsample_argmax: needs logits (N, C, h, w) and a size (H, W)");
  const int64_t n = logits.size(0);
  Tensor out = empty({n, size[0], size[1]}, ScalarType::Long, logits);
  if (n == 0) return out;
  // The kernels of the CPU compute in the dtype of what they are given.
  if (kOnCpu) logits = converted(logits, wide(logits.scalar_type()));
  upsample(logits, empty({n, logits.size(2), logits.size(3)}, ScalarType::Int, logits), out);
  return out;
}

}  // namespace

SEGOPS_OPS(op) {
  op("upsample_argmax(Tensor logits, SymInt[] size) -> Tensor", TORCH_BOX(&upsample_argmax));
}

}  // namespace segops::argmax
