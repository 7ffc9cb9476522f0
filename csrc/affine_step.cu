// affine_step on CUDA: one launch, with the arguments and results of affine_step.cpp.

#include <vector>

#include "affine_step_cuda.h"
#include "cuda_launch.h"

namespace fastinvdpo {
namespace {

template <class T, int kMost>
void launch_step(const StepArguments& a, int device, cudaStream_t stream) {
  if (a.noise_scale != nullptr) {
    launch<affine_step_kernel<T, kMost, true>>(a, device, stream);
  } else {
    launch<affine_step_kernel<T, kMost, false>>(a, device, stream);
  }
}

template <class T>
void launch_step(const StepArguments& a, int device, cudaStream_t stream) {
  if (a.outputs <= 1) {
    launch_step<T, 1>(a, device, stream);
  } else if (a.outputs == 2) {
    launch_step<T, 2>(a, device, stream);
  } else {
    launch_step<T, kMaxOutputs>(a, device, stream);
  }
}

Tensor step(Tensor sample, std::vector<Tensor> outputs, Tensor coefficients, std::optional<Tensor> active,
            std::optional<Tensor> noise_scale, std::optional<Tensor> noise_index, int64_t seed, int64_t offset) {
  const int64_t rows = sample.size(0), columns = 1 + static_cast<int64_t>(outputs.size());
  const int64_t n = rows == 0 ? 0 : sample.numel() / rows;
  STD_TORCH_CHECK(columns - 1 <= kMaxOutputs, "at most four outputs");
  STD_TORCH_CHECK(is_float32_vector(coefficients, rows * columns), "coefficients: contiguous float32 (n, 1 + outputs) expected");
  STD_TORCH_CHECK(!noise_scale || is_float32_vector(*noise_scale, rows), "noise_scale: float32 (n,) expected");
  STD_TORCH_CHECK(!noise_index || (noise_index->scalar_type() == ScalarType::Long && noise_index->numel() == rows && noise_index->is_contiguous()),
                  "noise_index: int64 (n,) expected");
  STD_TORCH_CHECK(!active || (active->scalar_type() == ScalarType::Bool && active->numel() == rows && active->is_contiguous()),
                  "active: bool (n,) expected");
  StepArguments a{};
  a.sample_storage = storage_of(sample, "sample");
  a.outputs = static_cast<int>(outputs.size());
  bool same = true;
  for (int j = 0; j < a.outputs; ++j) {
    const Tensor& output = outputs[static_cast<size_t>(j)];
    STD_TORCH_CHECK(output.numel() == sample.numel(), "outputs: shapes differ");
    a.output[j] = output.const_data_ptr();
    a.output_storage[j] = storage_of(output, "outputs");
    same = same && a.output_storage[j] == a.sample_storage;
  }
  const int device = sample.get_device_index();
  const DeviceGuard guard(device);
  Tensor result = torch::stable::empty_like(sample);
  if (sample.numel() == 0) return result;
  a.work = elementwise_work(rows, n);
  a.sample = sample.const_data_ptr();
  a.result = result.mutable_data_ptr();
  a.coefficients = static_cast<const float*>(coefficients.const_data_ptr());
  a.active = active ? static_cast<const bool*>(active->const_data_ptr()) : nullptr;
  a.noise_scale = noise_scale ? static_cast<const float*>(noise_scale->const_data_ptr()) : nullptr;
  a.noise_index = noise_index ? static_cast<const int64_t*>(noise_index->const_data_ptr()) : nullptr;
  a.seed = static_cast<uint64_t>(seed);
  a.offset = static_cast<uint32_t>(offset);

  const cudaStream_t stream = current_stream(device);
  if (!same) {
    launch_step<Any, kMaxOutputs>(a, device, stream);
  } else if (a.sample_storage == Storage::kFloat32) {
    launch_step<float>(a, device, stream);
  } else if (a.sample_storage == Storage::kBFloat16) {
    launch_step<BFloat16>(a, device, stream);
  } else {
    launch_step<Float16>(a, device, stream);
  }
  return result;
}

}  // namespace
}  // namespace fastinvdpo

STABLE_TORCH_LIBRARY_IMPL(fastinvdpo_native, CUDA, m) { m.impl("affine_step", TORCH_BOX(&fastinvdpo::step)); }
