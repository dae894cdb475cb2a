// What an op needs beside its kernels: memory, copies, products, and its registration.
//
// A file OP.cpp is compiled for each device, into that device's library: allocation and the order
// of calls are the same, the kernels are those of OP_cpu.cpp or OP_cuda.cu. All of PyTorch that is
// called here knows neither autograd nor autocast.
#pragma once

#include "tensor.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#if defined(USE_CUDA)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#endif

#include <string>

// At the foot of an op's file: SEGOPS_OPS(op) { op("name(Tensor x) -> Tensor", TORCH_BOX(&name)); }
// Schemas are defined by the library for the CPU alone, the others implement them; each holds their
// texts, which tell whether a library was built for the Python files that load it.
#if defined(SEGOPS_EMULATION)
#define SEGOPS_DEFINE(register_ops)
#define SEGOPS_IMPLEMENT STABLE_TORCH_LIBRARY_IMPL(segops_emulated, CPU, m)
#define SEGOPS_ATEN_PREFIX(name) aoti_torch_cpu_##name
#elif defined(USE_CUDA)
#define SEGOPS_DEFINE(register_ops)
#define SEGOPS_IMPLEMENT STABLE_TORCH_LIBRARY_IMPL(segops, CUDA, m)
#define SEGOPS_ATEN_PREFIX(name) aoti_torch_cuda_##name
#else
#define SEGOPS_DEFINE(register_ops)                                 \
  STABLE_TORCH_LIBRARY_FRAGMENT(segops, m) {                        \
    register_ops([&](const char* schema, auto) { m.def(schema); }); \
  }
#define SEGOPS_IMPLEMENT STABLE_TORCH_LIBRARY_IMPL(segops, CPU, m)
#define SEGOPS_ATEN_PREFIX(name) aoti_torch_cpu_##name
#endif
#define SEGOPS_OPS(op)                                                                     \
  template <typename Op>                                                                   \
  void register_ops(const Op& op);                                                         \
  SEGOPS_DEFINE(register_ops)                                                              \
  SEGOPS_IMPLEMENT {                                                                       \
    register_ops([&](const char* schema, auto function) {                                  \
      const char* volatile whole = schema; /* or the compiler would keep the name alone */ \
      const std::string text = whole;                                                      \
      m.impl(text.substr(0, text.find('(')).c_str(), function);                            \
    });                                                                                    \
  }                                                                                        \
  template <typename Op>                                                                   \
  void register_ops(const Op& op)

namespace segops {

#if defined(USE_CUDA) || defined(SEGOPS_EMULATION)
constexpr bool kOnCpu = false;
#else
constexpr bool kOnCpu = true;
#endif

// PyTorch's own kernel for the device that this file is compiled for.
#define SEGOPS_ATEN(name, ...)                                     \
  do {                                                             \
    TORCH_ERROR_CODE_CHECK(SEGOPS_ATEN_PREFIX(name)(__VA_ARGS__)); \
  } while (false)

#ifdef SEGOPS_EMULATION
void poison(void* memory, size_t bytes, bool floating);  // what is not written after it shows
#endif

// An op of PyTorch's that has no such form, through the dispatcher: of arguments of its schema's
// types, optional ones too, which must not be Scalar or SymInt[].
template <typename... Arguments>
Tensor aten(const char* name, const char* overload, const Arguments&... arguments) {
  StableIValue stack[] = {torch::stable::detail::from(arguments)...};
  const std::string qualified = std::string("aten::") + name;
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(qualified.c_str(), overload, stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Null if there is none.
inline const Tensor* some(const std::optional<Tensor>& tensor) {
  return tensor ? &*tensor : nullptr;
}

// Raises unless the others lie where the first does.
inline void check_devices(const char* op, const Tensor& first, const std::vector<const Tensor*>& others) {
  for (const Tensor* other : others)
    STD_TORCH_CHECK(
        !other || (other->is_cpu() == first.is_cpu() && other->get_device_index() == first.get_device_index()), op,
        ": tensors lie on different devices");
}

using Sizes = std::vector<int64_t>;

inline std::string text_of(const Sizes& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "(" : ", ") + std::to_string(size);
  return text + ")";
}

inline Tensor empty_strided(const Sizes& sizes, const Sizes& strides, ScalarType dtype, const Tensor& like) {
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle;
  const auto error = aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device, like.get_device_index(), &handle);
  // Which PyTorch has explained on stderr. By these words programs know that memory was short.
  STD_TORCH_CHECK(
      error == AOTI_TORCH_SUCCESS, like.is_cpu() ? "" : "CUDA ", "out of memory. segops asked for a tensor of shape ",
      text_of(sizes));
  Tensor tensor(handle);
#ifdef SEGOPS_EMULATION
  const bool integer = dtype == ScalarType::Byte || dtype == ScalarType::Int || dtype == ScalarType::Long;
  poison(tensor.mutable_data_ptr(), size_t(tensor.numel() * tensor.element_size()), !integer);
#endif
  return tensor;
}

// Memory without gaps on the device of `like`, not filled.
inline Tensor empty(const Sizes& sizes, ScalarType dtype, const Tensor& like) {
  Sizes strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
  return empty_strided(sizes, strides, dtype, like);
}

// The same for a map (N, C, H, W), which lies as (N, H, W, C) if channels_last.
inline Tensor empty_map(const Sizes& s, ScalarType dtype, const Tensor& like, bool channels_last) {
  if (!channels_last) return empty(s, dtype, like);
  return empty_strided(s, {s[1] * s[2] * s[3], 1, s[1] * s[3], s[1]}, dtype, like);
}

inline Sizes sizes_of(const Tensor& tensor) {
  Sizes sizes(tensor.dim());
  for (size_t i = 0; i < sizes.size(); ++i) sizes[i] = tensor.size(int64_t(i));
  return sizes;
}

// The same memory from element `offset` of the tensor's on, read otherwise.
inline Tensor reinterpret(const Tensor& tensor, const Sizes& sizes, const Sizes& strides, int64_t offset = 0) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), int64_t(sizes.size()), sizes.data(), strides.data(), offset, &handle));
  return Tensor(handle);
}

// The memory format that the strides of a map suggest, by PyTorch's rule.
inline bool is_channels_last(const Tensor& map) {
  if (map.stride(1) == 0) return false;
  int64_t least = 0;
  for (const int64_t dim : {1, 3, 2, 0}) {
    const int64_t size = map.size(dim), stride = map.stride(dim);
    if (size == 0 || stride < least || (dim == 0 && least == map.stride(1))) return false;
    least = size > 1 ? stride * size : stride;
  }
  return true;
}

inline Tensor converted(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

inline void copy(const Tensor& from, Tensor& to) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(to.get(), from.get(), 0));
}

inline bool has_no_gaps(const Sizes& sizes, const Sizes& strides) {
  int64_t expected = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    if (sizes[i] != 1 && strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

// A tensor read with these sizes and strides, without gaps and in this dtype; the memory is its own
// where that is how it lies.
inline Tensor packed(const Tensor& tensor, const Sizes& sizes, const Sizes& strides, int64_t offset, ScalarType dtype) {
  const Tensor read = reinterpret(tensor, sizes, strides, offset);
  if (tensor.scalar_type() == dtype && has_no_gaps(sizes, strides)) return read;
  Tensor result = empty(sizes, dtype, tensor);
  copy(read, result);
  return result;
}

inline Tensor packed(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  Tensor result = empty(sizes_of(tensor), tensor.scalar_type(), tensor);
  copy(tensor, result);
  return result;
}

// A map without gaps in this order; itself if it is that already.
inline Tensor dense(const Tensor& map, bool channels_last) {
  if (!channels_last) return packed(map);
  const Sizes sizes = sizes_of(map);
  if (has_no_gaps({sizes[0], sizes[2], sizes[3], sizes[1]}, {map.stride(0), map.stride(2), map.stride(3), map.stride(1)}))
    return map;
  Tensor result = empty_map(sizes, map.scalar_type(), map, true);
  copy(map, result);
  return result;
}

// What sums of this dtype are taken in.
inline ScalarType wide(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

}  // namespace segops
