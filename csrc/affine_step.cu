// affine_step and its backward on CUDA: one launch each, with the arguments and results of affine_step.cpp.

#include "affine_step_check.h"
#include "affine_step_cuda.h"
#include "cuda_launch.h"
#include "results.h"

namespace fastinvdpo {
namespace {

template <class T, int kMost>
void launch_step(const StepLaunch& a, int device, cudaStream_t stream) {
  if (a.step.noise_scale != nullptr) {
    launch<affine_step_kernel<T, kMost, true>>(a, device, stream);
  } else {
    launch<affine_step_kernel<T, kMost, false>>(a, device, stream);
  }
}

template <class T>
void launch_step(const StepLaunch& a, int device, cudaStream_t stream) {
  if (a.step.outputs <= 1) {
    launch_step<T, 1>(a, device, stream);
  } else if (a.step.outputs == 2) {
    launch_step<T, 2>(a, device, stream);
  } else {
    launch_step<T, kMaxOutputs>(a, device, stream);
  }
}

void step_out(Tensor sample, std::vector<Tensor> outputs, Tensor coefficients, std::optional<Tensor> active, std::optional<Tensor> noise_scale,
              std::optional<Tensor> noise_index, int64_t seed, int64_t offset, Tensor out, std::optional<Tensor> trajectory) {
  StepLaunch a{};
  a.step = step_arguments(sample, outputs, coefficients, active, noise_scale, noise_index, seed, offset, out, trajectory);
  if (sample.numel() == 0) return;
  a.work = elementwise_work(a.step.samples, a.step.n);
  const int device = sample.get_device_index();
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  if (!same_storage(a.step)) {
    launch_step<Any, kMaxOutputs>(a, device, stream);
  } else if (a.step.sample.storage == Storage::kFloat32) {
    launch_step<float>(a, device, stream);
  } else if (a.step.sample.storage == Storage::kBFloat16) {
    launch_step<BFloat16>(a, device, stream);
  } else {
    launch_step<Float16>(a, device, stream);
  }
}

Tensor step(Tensor sample, std::vector<Tensor> outputs, Tensor coefficients, std::optional<Tensor> active,
            std::optional<Tensor> noise_scale, std::optional<Tensor> noise_index, int64_t seed, int64_t offset) {
  const DeviceGuard guard(sample.get_device_index());
  Tensor result = new_like(sample);
  step_out(sample, outputs, coefficients, active, noise_scale, noise_index, seed, offset, result, std::nullopt);
  return result;
}

void step_backward(Tensor grad, Tensor coefficients, std::optional<Tensor> active, std::vector<int64_t> columns,
                   std::vector<Tensor> gradients) {
  StepBackwardLaunch a{};
  a.step = step_backward_arguments(grad, coefficients, active, columns, gradients);
  if (gradients[0].numel() == 0) return;
  a.work = elementwise_work(a.step.samples, a.step.n);
  const int device = grad.get_device_index();
  const DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  if (!same_storage(a.step)) {
    launch<affine_step_backward_kernel<Any>>(a, device, stream);
  } else if (a.step.grad.storage == Storage::kFloat32) {
    launch<affine_step_backward_kernel<float>>(a, device, stream);
  } else if (a.step.grad.storage == Storage::kBFloat16) {
    launch<affine_step_backward_kernel<BFloat16>>(a, device, stream);
  } else {
    launch<affine_step_backward_kernel<Float16>>(a, device, stream);
  }
}

}  // namespace
}  // namespace fastinvdpo

STABLE_TORCH_LIBRARY_IMPL(fastinvdpo_native, CUDA, m) {
  m.impl("affine_step", TORCH_BOX(&fastinvdpo::step));
  m.impl("affine_step_out", TORCH_BOX(&fastinvdpo::step_out));
  m.impl("affine_step_backward", TORCH_BOX(&fastinvdpo::step_backward));
}
