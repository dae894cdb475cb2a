// Labels as classes, a row at a time.
#pragma once

#include "../common/vec.h"
#include "bal.h"

namespace segops::bal {

// Writes the classes of `count` labels from number `first` on.
template <typename Int>
SEGOPS_INLINE void read_classes(const Labels& labels, int64_t first, int64_t count, Int* out) {
  const int64_t classes = labels.classes, ignore_index = labels.ignore_index;
  const auto read = [&](const auto* data) __attribute__((always_inline)) {
    for (int64_t x = 0; x < count; ++x) out[x] = class_of(data[first + x], classes, ignore_index);
  };
  if (labels.bytes == 8) return read(static_cast<const int64_t*>(labels.data));
  if (labels.bytes == 4) return read(static_cast<const int32_t*>(labels.data));
  read(static_cast<const uint8_t*>(labels.data));
}

}  // namespace segops::bal
