// preference_loss on the CPU: one pass over the inputs forward, one backward.

#include <torch/headeronly/util/Half.h>

#include <tuple>
#include <vector>

#include "isa.h"
#include "kept_memory.h"
#include "preference_loss_check.h"
#include "rows_cpu.h"
#include "utilities.h"

namespace fastinvdpo {
namespace {

struct ForwardRow {
  const void *policy, *reference, *target;  // target: null when it is the reference
  Storage policy_storage, reference_storage, target_storage;
};

struct BackwardRow {
  const void *policy, *target;
  void* gradient;
  Storage policy_storage, target_storage;
  float scale;
  bool past_caches;  // whether the gradient is written past the caches
};

#define FID_LOOPS "preference_loss_cpu.h"
#include "each_isa.h"

// The batch as rows of n elements: one row per sample and timestep.
struct Shape {
  int64_t pairs, timesteps, rows, n, chunks;

  Shape(const Tensor& policy, const std::optional<Tensor>& timestep_weight)
      : pairs(policy.size(0) / 2),
        timesteps(timestep_weight ? policy.size(1) : 1),
        rows(2 * pairs * timesteps),
        n(policy.numel() / rows),
        chunks(chunks_of(n)) {}
};

// −(β/2)·ρ_i·w_ik
struct Weights {
  const float *pair, *timestep;
  int64_t pitch;
  double beta;

  Weights(const Shape& s, const std::optional<Tensor>& pair_weight, const std::optional<Tensor>& timestep_weight, double strength)
      : pair(data_or_null(pair_weight)), timestep(data_or_null(timestep_weight)), pitch(weight_pitch(timestep_weight)), beta(strength) {
    check_weights(s.pairs, s.timesteps, pair_weight, timestep_weight);
  }

  double scale(int64_t i, int64_t k) const {
    double scale = -0.5 * beta;
    if (pair != nullptr) scale *= pair[i];
    if (timestep != nullptr) scale *= timestep[i * pitch + k];
    return scale;
  }
};

// The inputs share one dense layout in which samples (and timesteps) come first; the caller has seen to that.
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    Tensor policy, Tensor reference, std::optional<Tensor> target, std::optional<Tensor> pair_weight,
    std::optional<Tensor> timestep_weight, double beta, int64_t utility, double label_smoothing) {
  const Shape s(policy, timestep_weight);
  const Weights weights(s, pair_weight, timestep_weight, beta);
  STD_TORCH_CHECK(reference.numel() == policy.numel() && (!target || target->numel() == policy.numel()), "shapes differ");
  const Storage policy_storage = storage_of(policy, "policy"), reference_storage = storage_of(reference, "reference");
  const Storage target_storage = target ? storage_of(*target, "target") : reference_storage;
  std::vector<double> partial(static_cast<size_t>(s.rows * s.chunks * 3), 0.0);
  const auto kernel = FID_FOR_THIS_CPU(forward_chunk);
  for_each_chunk(s.rows, s.n, [&](int64_t row, int64_t chunk, int64_t begin, int64_t end) {
    const ForwardRow pointers{elements_from(policy, policy_storage, row * s.n),
                              elements_from(reference, reference_storage, row * s.n),
                              target ? elements_from(*target, target_storage, row * s.n) : nullptr,
                              policy_storage,
                              reference_storage,
                              target_storage};
    kernel(pointers, begin, end, &partial[static_cast<size_t>((row * s.chunks + chunk) * 3)]);
  });

  const int64_t errors[2] = {2 * s.pairs, s.timesteps};
  const int error_dims = timestep_weight ? 2 : 1;
  Tensor loss = nan_float32(policy, nullptr, 0), margin = nan_float32(policy, &s.pairs, 1);
  Tensor policy_mse = nan_float32(policy, errors, error_dims), reference_mse = nan_float32(policy, errors, error_dims);
  float* z = static_cast<float*>(margin.mutable_data_ptr());
  float* pe = static_cast<float*>(policy_mse.mutable_data_ptr());
  float* re = static_cast<float*>(reference_mse.mutable_data_ptr());
  const double inverse = 1.0 / static_cast<double>(s.n);
  std::vector<double> delta(static_cast<size_t>(s.rows));
  for (int64_t row = 0; row < s.rows; ++row) {
    double sums[3] = {};
    for (int64_t chunk = 0; chunk < s.chunks; ++chunk) {
      for (int j = 0; j < 3; ++j) sums[j] += partial[static_cast<size_t>((row * s.chunks + chunk) * 3 + j)];
    }
    delta[static_cast<size_t>(row)] = sums[0] * inverse;
    pe[row] = static_cast<float>(sums[1] * inverse);
    re[row] = static_cast<float>(sums[2] * inverse);
  }
  double total = 0;
  for (int64_t i = 0; i < s.pairs; ++i) {
    double sum = 0;
    for (int64_t k = 0; k < s.timesteps; ++k) {
      const double gap = delta[static_cast<size_t>(i * s.timesteps + k)] - delta[static_cast<size_t>((s.pairs + i) * s.timesteps + k)];
      sum += weights.scale(i, k) * gap;
    }
    z[i] = static_cast<float>(sum);
    total += utility_value(static_cast<Utility>(utility), sum, beta, label_smoothing);
  }
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total / static_cast<double>(s.pairs));
  return {loss, margin, policy_mse, reference_mse};
}

Tensor backward(std::optional<Tensor> grad_loss, std::optional<Tensor> grad_margin, std::optional<Tensor> grad_policy_mse,
                Tensor policy, Tensor target, Tensor margin, std::optional<Tensor> pair_weight,
                std::optional<Tensor> timestep_weight, double beta, int64_t utility, double label_smoothing) {
  const Shape s(policy, timestep_weight);
  const Weights weights(s, pair_weight, timestep_weight, beta);
  STD_TORCH_CHECK(!grad_loss || is_float32_vector(*grad_loss, 1), "grad_loss: float32 scalar expected");
  STD_TORCH_CHECK(!grad_margin || is_float32_vector(*grad_margin, s.pairs), "grad_margin: float32 (B,) expected");
  STD_TORCH_CHECK(!grad_policy_mse || is_float32_vector(*grad_policy_mse, s.rows), "grad_policy_mse: float32 expected");
  const Storage policy_storage = storage_of(policy, "policy"), target_storage = storage_of(target, "target");
  const int64_t bytes = policy.numel() * bytes_of(policy_storage);
  Tensor gradient = empty_result(policy, bytes);
  const float *z = static_cast<const float*>(margin.const_data_ptr());
  const float *from_loss = data_or_null(grad_loss), *from_margin = data_or_null(grad_margin);
  const float* from_mse = data_or_null(grad_policy_mse);
  std::vector<float> scale(static_cast<size_t>(s.rows));
  for (int64_t i = 0; i < s.pairs; ++i) {
    double grad_z = 0;
    if (from_loss != nullptr) {
      const double slope = utility_slope(static_cast<Utility>(utility), static_cast<double>(z[i]), beta, label_smoothing);
      grad_z = *from_loss * slope / static_cast<double>(s.pairs);
    }
    if (from_margin != nullptr) grad_z += from_margin[i];
    for (int64_t k = 0; k < s.timesteps; ++k) {
      const double winner = grad_z * weights.scale(i, k);
      const int64_t rows[2] = {i * s.timesteps + k, (s.pairs + i) * s.timesteps + k};
      for (int side = 0; side < 2; ++side) {
        const double sum = (side == 0 ? winner : -winner) + (from_mse != nullptr ? from_mse[rows[side]] : 0.0);
        scale[static_cast<size_t>(rows[side])] = static_cast<float>(sum * (2.0 / static_cast<double>(s.n)));
      }
    }
  }
  char* out = static_cast<char*>(gradient.mutable_data_ptr());
  const bool past_caches = bytes >= kPastCaches;
  const auto kernel = FID_FOR_THIS_CPU(backward_chunk);
  for_each_chunk(s.rows, s.n, [&](int64_t row, int64_t, int64_t begin, int64_t end) {
    const BackwardRow pointers{elements_from(policy, policy_storage, row * s.n), elements_from(target, target_storage, row * s.n),
                               out + row * s.n * bytes_of(policy_storage), policy_storage, target_storage,
                               scale[static_cast<size_t>(row)], past_caches};
    kernel(pointers, begin, end);
  });
  return gradient;
}

}  // namespace
}  // namespace fastinvdpo

STABLE_TORCH_LIBRARY_FRAGMENT(fastinvdpo_native, m) {
  m.def(
      "preference_loss(Tensor policy, Tensor reference, Tensor? target, Tensor? pair_weight, Tensor? timestep_weight, "
      "float beta, int utility, float label_smoothing) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "preference_loss_backward(Tensor? grad_loss, Tensor? grad_margin, Tensor? grad_policy_mse, Tensor policy, Tensor target, "
      "Tensor margin, Tensor? pair_weight, Tensor? timestep_weight, float beta, int utility, float label_smoothing) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastinvdpo_native, CPU, m) {
  m.impl("preference_loss", TORCH_BOX(&fastinvdpo::forward));
  m.impl("preference_loss_backward", TORCH_BOX(&fastinvdpo::backward));
}
