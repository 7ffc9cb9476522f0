// pair_statistics on CUDA: one launch forward, one backward, with the arguments and results of pair_statistics.cpp.

#include "cuda_launch.h"
#include "pair_statistics_check.h"
#include "pair_statistics_cuda.h"

namespace fastinvdpo {
namespace {

StatisticsInputs inputs_of(const StatisticsShape& s, const Tensor& policy, const std::optional<Tensor>& reference, const Tensor& target,
                           const std::optional<Tensor>& mask, const std::optional<Tensor>& pair_mask) {
  StatisticsInputs in{};
  in.policy = policy.const_data_ptr(), in.target = target.const_data_ptr();
  in.reference = reference ? reference->const_data_ptr() : nullptr;
  in.policy_storage = storage_of(policy, "policy"), in.target_storage = storage_of(target, "target");
  in.reference_storage = reference ? storage_of(*reference, "reference") : in.policy_storage;
  in.mask = data_of(mask), in.pair_mask = data_of(pair_mask);
  in.samples = s.samples, in.sides = s.sides, in.units = s.units, in.parts = s.parts, in.m = s.m;
  in.masks = s.masks, in.pair_masks = s.pair_masks;
  return in;
}

// body(a value of the type that all predictions are stored in)
template <class Body>
void with_type(const StatisticsInputs& in, const Body& body) {
  if (in.policy_storage != in.target_storage || in.policy_storage != in.reference_storage) return body(Any());
  if (in.policy_storage == Storage::kFloat32) return body(float());
  if (in.policy_storage == Storage::kBFloat16) return body(BFloat16());
  body(Float16());
}

StatisticsTensors forward(Tensor policy, std::optional<Tensor> reference, Tensor target, std::optional<Tensor> mask,
                          std::optional<Tensor> pair_mask, bool paired) {
  const StatisticsShape s(policy, reference, target, mask, pair_mask, paired);
  StatisticsArguments a{};
  a.in = inputs_of(s, policy, reference, target, mask, pair_mask);
  a.work = statistics_work(s.units * s.parts, s.parts, s.m, kMaxReductionChunk);
  a.inverse_n = 1.0 / static_cast<double>(s.n);

  const int device = policy.get_device_index();
  const DeviceGuard guard(device);
  const auto new_result = [&](int64_t size) { return new_contiguous(policy, 1, &size, aoti_torch_dtype_float32()); };
  const int64_t shifts = reference ? s.samples : 0;
  StatisticsTensors results{new_result(s.samples), new_result(shifts), new_result(shifts), new_result(paired ? s.units : 0),
                            new_result(mask ? s.samples : 0)};
  const auto data = [](Tensor& tensor) { return tensor.numel() > 0 ? static_cast<float*>(tensor.mutable_data_ptr()) : nullptr; };
  a.of_sample[kPolicyMse] = data(std::get<0>(results)), a.of_sample[kCross] = data(std::get<1>(results));
  a.of_sample[kShiftMse] = data(std::get<2>(results)), a.of_sample[kMaskMean] = data(std::get<4>(results));
  a.of_pair = data(std::get<3>(results));
  const int64_t size = 1 + a.work.tasks() * kStatistics;
  Tensor workspace = new_contiguous(policy, 1, &size, aoti_torch_dtype_float64());  // of this call: see preference_loss.cu
  a.ticket = static_cast<unsigned*>(workspace.mutable_data_ptr());
  a.partial = static_cast<double*>(workspace.mutable_data_ptr()) + 1;
  const cudaStream_t stream = current_stream(device);
  FID_CUDA_CHECK(cudaMemsetAsync(a.ticket, 0, sizeof(unsigned), stream));
  with_type(a.in, [&](auto type) {
    using T = decltype(type);
    if (mask) {
      paired ? launch<pair_statistics_forward<T, true, true>>(a, device, stream)
             : launch<pair_statistics_forward<T, false, true>>(a, device, stream);
    } else {
      paired ? launch<pair_statistics_forward<T, true, false>>(a, device, stream)
             : launch<pair_statistics_forward<T, false, false>>(a, device, stream);
    }
  });
  return results;
}

Tensor backward(std::optional<Tensor> grad_policy_mse, std::optional<Tensor> grad_cross, std::optional<Tensor> grad_shift_mse,
                std::optional<Tensor> grad_pair_cross, Tensor policy, std::optional<Tensor> reference, Tensor target,
                std::optional<Tensor> mask, std::optional<Tensor> pair_mask) {
  const StatisticsShape s(policy, reference, target, mask, pair_mask, grad_pair_cross.has_value());
  check_gradients(s, {grad_policy_mse, grad_cross, grad_shift_mse, grad_pair_cross});
  StatisticsGradientArguments a{};
  a.in = inputs_of(s, policy, reference, target, mask, pair_mask);
  a.work = statistics_work(s.samples * s.parts, s.parts, s.m, kMaxElementwiseChunk);
  a.inverse_n = 1.0 / static_cast<double>(s.n);

  const int device = policy.get_device_index();
  const DeviceGuard guard(device);
  Tensor gradient = new_like(policy);
  a.gradient = gradient.mutable_data_ptr();
  a.grad_policy_mse = data_of(grad_policy_mse), a.grad_cross = data_of(grad_cross);
  a.grad_shift_mse = data_of(grad_shift_mse), a.grad_pair_cross = data_of(grad_pair_cross);
  with_type(a.in, [&](auto type) {
    using T = decltype(type);
    const cudaStream_t stream = current_stream(device);
    mask ? launch<pair_statistics_backward<T, true>>(a, device, stream) : launch<pair_statistics_backward<T, false>>(a, device, stream);
  });
  return gradient;
}

}  // namespace
}  // namespace fastinvdpo

STABLE_TORCH_LIBRARY_IMPL(fastinvdpo_native, CUDA, m) {
  m.impl("pair_statistics", TORCH_BOX(&fastinvdpo::forward));
  m.impl("pair_statistics_backward", TORCH_BOX(&fastinvdpo::backward));
}
