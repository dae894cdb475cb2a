// Memory for what is read here and there: in huge pages, where there are any, since looking up small
// ones would take longer than reading.
#pragma once

#include "../common/tensor.h"

#include <cstdlib>
#include <memory>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace segops::crf {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <typename T>
using Memory = std::unique_ptr<T[], Free>;

// Not filled.
template <typename T>
Memory<T> memory(int64_t count) {
  constexpr size_t line = 64, huge = size_t(1) << 21;
  const size_t bytes = size_t(count) * sizeof(T), whole = bytes / huge * huge;
  void* result = nullptr;
  const int error = posix_memalign(&result, whole ? huge : line, bytes ? bytes : 1);
  STD_TORCH_CHECK(error == 0, "out of memory. segops asked for ", bytes, " bytes");
#ifdef MADV_HUGEPAGE
  if (whole) madvise(result, whole, MADV_HUGEPAGE);
#endif
  return Memory<T>(static_cast<T*>(result));
}

}  // namespace segops::crf
