// The weights that the ops of preference_loss take, checked: the same for the CPU and the GPU.
#pragma once

#include <optional>

#include "common.h"

namespace fastinvdpo {

inline const float* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

// Rows of K are dense. They may lie apart, or be one and the same, of weights (K,) that were expanded.
inline bool is_weight_table(const Tensor& weight, int64_t pairs, int64_t timesteps) {
  return weight.scalar_type() == ScalarType::Float && weight.dim() == 2 && weight.size(0) == pairs && weight.size(1) == timesteps &&
         (timesteps == 1 || weight.stride(1) == 1);
}

inline void check_weights(int64_t pairs, int64_t timesteps, const std::optional<Tensor>& pair_weight,
                          const std::optional<Tensor>& timestep_weight) {
  STD_TORCH_CHECK(!pair_weight || is_float32_vector(*pair_weight, pairs), "pair_weight: float32 (B,) expected");
  STD_TORCH_CHECK(!timestep_weight || is_weight_table(*timestep_weight, pairs, timesteps),
                  "timestep_weight: float32 (B, K) with dense rows expected");
}

// Elements from one pair's weights to the next pair's.
inline int64_t weight_pitch(const std::optional<Tensor>& timestep_weight) { return timestep_weight ? timestep_weight->stride(0) : 0; }

}  // namespace fastinvdpo
