// preference_loss on CUDA: one launch forward, one backward, with the arguments and results of preference_loss.cpp.

#include <tuple>

#include "cuda_launch.h"
#include "preference_loss_check.h"
#include "preference_loss_cuda.h"
#include "results.h"

namespace fastinvdpo {
namespace {

Pairs pairs_of(const Tensor& policy, const std::optional<Tensor>& pair_weight, const std::optional<Tensor>& timestep_weight,
               double beta, int64_t utility, double label_smoothing) {
  const int64_t pairs = policy.size(0) / 2, timesteps = timestep_weight ? policy.size(1) : 1;
  STD_TORCH_CHECK(pairs > 0 && policy.numel() > 0, "policy: at least one pair of at least one element expected");
  check_weights(pairs, timesteps, pair_weight, timestep_weight);
  STD_TORCH_CHECK(utility >= 0 && utility < static_cast<int64_t>(Utility::kCount), "utility: not known");
  const float *rho = data_or_null(pair_weight), *weight = data_or_null(timestep_weight);
  const float strength = static_cast<float>(beta), smoothing = static_cast<float>(label_smoothing);
  return {rho, weight, weight_pitch(timestep_weight), pairs, timesteps, strength, smoothing, static_cast<Utility>(utility)};
}

// The kernel for clusters where the device and the build have them and a row is long enough, otherwise the one for single blocks.
template <class T, bool kTarget>
void launch_forward(ForwardArguments& a, int device, cudaStream_t stream) {
  constexpr auto kSingle = preference_loss_forward<T, kTarget, false>;
  constexpr auto kCluster = preference_loss_forward<T, kTarget, true>;
  if (a.work.team > 1) {
    launch<kCluster>(a, device, stream);
  } else {
    launch<kSingle>(a, device, stream);
  }
}

template <class T>
void launch_forward(ForwardArguments& a, int device, cudaStream_t stream) {
  a.target != nullptr ? launch_forward<T, true>(a, device, stream) : launch_forward<T, false>(a, device, stream);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    Tensor policy, Tensor reference, std::optional<Tensor> target, std::optional<Tensor> pair_weight,
    std::optional<Tensor> timestep_weight, double beta, int64_t utility, double label_smoothing) {
  ForwardArguments a{};
  a.pairs = pairs_of(policy, pair_weight, timestep_weight, beta, utility, label_smoothing);
  STD_TORCH_CHECK(reference.numel() == policy.numel() && (!target || target->numel() == policy.numel()), "shapes differ");
  a.policy_storage = storage_of(policy, "policy");
  a.reference_storage = storage_of(reference, "reference");
  a.target_storage = target ? storage_of(*target, "target") : a.reference_storage;

  const int device = policy.get_device_index();
  const DeviceGuard guard(device);
  const int64_t rows = 2 * a.pairs.pairs * a.pairs.timesteps, n = policy.numel() / rows;
  const bool clusters = cached_fit<preference_loss_forward<float, true, true>>(device).clusters;
  a.work = reduction_work(rows, n, clusters ? kMaxCluster : 1);
  a.inverse_n = 1.0 / static_cast<double>(n);

  const int64_t errors[2] = {2 * a.pairs.pairs, a.pairs.timesteps};
  const int error_dims = timestep_weight ? 2 : 1;
  const int32_t float32 = aoti_torch_dtype_float32();
  Tensor loss = new_contiguous(policy, 0, nullptr, float32);
  Tensor margin = new_contiguous(policy, 1, &a.pairs.pairs, float32);
  Tensor policy_mse = new_contiguous(policy, error_dims, errors, float32);
  Tensor reference_mse = new_contiguous(policy, error_dims, errors, float32);
  // Of this call, like the ticket in it. What is kept for the next one may lie in the memory pool of a CUDA graph, which takes it back,
  // and graphs that shared a ticket could not be replayed side by side.
  const int64_t size = 1 + rows + (a.work.spans > 1 ? a.work.tasks() * kSums : 0);
  Tensor workspace = new_contiguous(policy, 1, &size, aoti_torch_dtype_float64());
  a.policy = policy.const_data_ptr();
  a.reference = reference.const_data_ptr();
  a.target = target ? target->const_data_ptr() : nullptr;
  a.loss = static_cast<float*>(loss.mutable_data_ptr());
  a.margin = static_cast<float*>(margin.mutable_data_ptr());
  a.policy_mse = static_cast<float*>(policy_mse.mutable_data_ptr());
  a.reference_mse = static_cast<float*>(reference_mse.mutable_data_ptr());
  a.ticket = static_cast<unsigned*>(workspace.mutable_data_ptr());
  a.delta = static_cast<double*>(workspace.mutable_data_ptr()) + 1;
  a.partial = a.delta + rows;

  const cudaStream_t stream = current_stream(device);
  // Not a launch of a kernel; in a graph it is a node of its own, so that every replay starts from zero.
  FID_CUDA_CHECK(cudaMemsetAsync(a.ticket, 0, sizeof(unsigned), stream));
  if (a.policy_storage != a.reference_storage || a.policy_storage != a.target_storage) {
    launch_forward<Any>(a, device, stream);
  } else if (a.policy_storage == Storage::kFloat32) {
    launch_forward<float>(a, device, stream);
  } else if (a.policy_storage == Storage::kBFloat16) {
    launch_forward<BFloat16>(a, device, stream);
  } else {
    launch_forward<Float16>(a, device, stream);
  }
  return {loss, margin, policy_mse, reference_mse};
}

Tensor backward(std::optional<Tensor> grad_loss, std::optional<Tensor> grad_margin, std::optional<Tensor> grad_policy_mse,
                Tensor policy, Tensor target, Tensor margin, std::optional<Tensor> pair_weight,
                std::optional<Tensor> timestep_weight, double beta, int64_t utility, double label_smoothing) {
  BackwardArguments a{};
  a.pairs = pairs_of(policy, pair_weight, timestep_weight, beta, utility, label_smoothing);
  const int64_t rows = 2 * a.pairs.pairs * a.pairs.timesteps, n = policy.numel() / rows;
  STD_TORCH_CHECK(target.numel() == policy.numel(), "shapes differ");
  STD_TORCH_CHECK(is_float32_vector(margin, a.pairs.pairs), "margin: float32 (B,) expected");
  STD_TORCH_CHECK(!grad_loss || is_float32_vector(*grad_loss, 1), "grad_loss: float32 scalar expected");
  STD_TORCH_CHECK(!grad_margin || is_float32_vector(*grad_margin, a.pairs.pairs), "grad_margin: float32 (B,) expected");
  STD_TORCH_CHECK(!grad_policy_mse || is_float32_vector(*grad_policy_mse, rows), "grad_policy_mse: float32 expected");
  a.policy_storage = storage_of(policy, "policy");
  a.target_storage = storage_of(target, "target");
  a.work = elementwise_work(rows, n);
  a.two_over_n = 2.0 / static_cast<double>(n);

  const int device = policy.get_device_index();
  const DeviceGuard guard(device);
  Tensor gradient = new_like(policy);
  a.policy = policy.const_data_ptr();
  a.target = target.const_data_ptr();
  a.gradient = gradient.mutable_data_ptr();
  a.grad_loss = data_or_null(grad_loss);
  a.grad_margin = data_or_null(grad_margin);
  a.grad_policy_mse = data_or_null(grad_policy_mse);
  a.margin = static_cast<const float*>(margin.const_data_ptr());
  const cudaStream_t stream = current_stream(device);
  if (a.policy_storage != a.target_storage) {
    launch<preference_loss_backward<Any>>(a, device, stream);
  } else if (a.policy_storage == Storage::kFloat32) {
    launch<preference_loss_backward<float>>(a, device, stream);
  } else if (a.policy_storage == Storage::kBFloat16) {
    launch<preference_loss_backward<BFloat16>>(a, device, stream);
  } else {
    launch<preference_loss_backward<Float16>>(a, device, stream);
  }
  return gradient;
}

}  // namespace
}  // namespace fastinvdpo

STABLE_TORCH_LIBRARY_IMPL(fastinvdpo_native, CUDA, m) {
  m.impl("preference_loss", TORCH_BOX(&fastinvdpo::forward));
  m.impl("preference_loss_backward", TORCH_BOX(&fastinvdpo::backward));
}
