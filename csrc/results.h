// New tensors for results. They do not go through the dispatcher's boxed calls, as torch::stable::new_empty and empty_like do, which take
// longer than all of a small launch's other work on the host.
#pragma once

#include "common.h"
//
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

namespace fastinvdpo {

inline Tensor new_strided(const Tensor& beside, int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(beside.get(), &device_type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, beside.get_device_index(), &handle));
  return Tensor(handle);
}

// A contiguous tensor of at most two dimensions on the device of `beside`.
inline Tensor new_contiguous(const Tensor& beside, int dims, const int64_t* sizes, int32_t dtype) {
  const int64_t strides[2] = {dims == 2 ? sizes[1] : 1, 1};
  return new_strided(beside, dims, sizes, strides, dtype);
}

// torch.empty_like(model).
inline Tensor new_like(const Tensor& model) {
  if (!model.is_contiguous()) return torch::stable::empty_like(model);
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(model.get(), &dtype));
  return new_strided(model, model.dim(), model.sizes().data(), model.strides().data(), dtype);
}

}  // namespace fastinvdpo
