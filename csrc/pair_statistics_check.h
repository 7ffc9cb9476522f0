// The arguments of pair_statistics as shapes, checked: the same for the CPU and the GPU.
#pragma once

#include <array>
#include <tuple>

#include "pair_statistics.h"
#include "results.h"

namespace fastinvdpo {

using StatisticsTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// The batch as units, pairs or single samples, whose rows of n elements have `parts` parts of m elements: a mask's row is one of them long,
// and holds for each. The rows of a mask repeat, one after the other.
struct StatisticsShape {
  int64_t samples, sides, units, n, parts, m, masks, pair_masks;

  StatisticsShape(const Tensor& policy, const std::optional<Tensor>& reference, const Tensor& target, const std::optional<Tensor>& mask,
                  const std::optional<Tensor>& pair_mask, bool paired)
      : samples(policy.size(0)),
        sides(paired ? 2 : 1),
        units(samples / sides),
        n(samples > 0 ? policy.numel() / samples : 0),
        parts(1),
        m(n),
        masks(mask ? mask->size(0) : 1),
        pair_masks(pair_mask ? pair_mask->size(0) : 1) {
    STD_TORCH_CHECK(n > 0 && samples % sides == 0, "policy: at least one element, and a loser for each winner expected");
    STD_TORCH_CHECK(target.numel() == policy.numel() && (!reference || reference->numel() == policy.numel()), "shapes differ");
    if (!mask) return;
    STD_TORCH_CHECK(masks > 0 && samples % masks == 0 && mask->scalar_type() == ScalarType::Float, "mask: float32 rows expected");
    m = mask->numel() / masks;
    STD_TORCH_CHECK(m > 0 && n % m == 0, "mask: rows that divide a sample expected");
    parts = n / m;
    if (!paired) return;
    STD_TORCH_CHECK(pair_mask && pair_mask->scalar_type() == ScalarType::Float && pair_masks > 0 && units % pair_masks == 0 &&
                        pair_mask->numel() == pair_masks * m,
                    "pair_mask: float32 rows of the mask's length expected");
  }
};

inline const float* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

inline void check_gradients(const StatisticsShape& s, const std::array<std::optional<Tensor>, 4>& grads) {
  for (int which = 0; which < 4; ++which) {
    const std::optional<Tensor>& grad = grads[static_cast<size_t>(which)];
    STD_TORCH_CHECK(!grad || is_float32_vector(*grad, which == 3 ? s.units : s.samples), "incoming gradient: float32, one a sum, expected");
  }
}

}  // namespace fastinvdpo
