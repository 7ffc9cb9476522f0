// What every native op needs: element types, argument checks, and the shape of the work.
#pragma once

#include "stable_abi.h"  // before PyTorch's
//
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>

#include "storage.h"

namespace fastinvdpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int32_t kNoDeviceIndex = -1;  // of the CPU

inline Storage storage_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat32;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    case ScalarType::Half:
      return Storage::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": native kernels take float32, bfloat16 or float16");
  }
}

inline bool is_float32_vector(const Tensor& tensor, int64_t length) {
  return tensor.scalar_type() == ScalarType::Float && tensor.numel() == length && tensor.is_contiguous();
}

}  // namespace fastinvdpo
