// The tensors that the ops of affine_step take, checked and turned into plain memory: the same for the CPU and the GPU. Their layout is
// the caller's business (fastinvdpo/ops/layout.py).
#pragma once

#include <vector>

#include "affine_step.h"
#include "common.h"

namespace fastinvdpo {

inline bool is_vector(const Tensor& tensor, ScalarType type, int64_t length) {
  return tensor.scalar_type() == type && tensor.numel() == length && tensor.is_contiguous();
}

inline Samples samples_of(const Tensor& tensor, const char* name, int64_t samples, int64_t n) {
  STD_TORCH_CHECK(tensor.numel() == samples * n, name, ": another number of elements expected");
  const int64_t pitch = samples > 1 ? tensor.stride(0) : n;
  return {static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())), pitch, storage_of(tensor, name)};
}

inline Samples written_samples_of(Tensor& tensor, const char* name, int64_t samples, int64_t n) {
  const Samples found = samples_of(tensor, name, samples, n);
  STD_TORCH_CHECK(samples <= 1 || found.pitch >= n, name, ": samples share memory");
  return {static_cast<char*>(tensor.mutable_data_ptr()), found.pitch, found.storage};
}

inline const bool* active_of(const std::optional<Tensor>& active, int64_t samples) {
  if (!active) return nullptr;
  STD_TORCH_CHECK(is_vector(*active, ScalarType::Bool, samples), "active: bool (n,) expected");
  return static_cast<const bool*>(active->const_data_ptr());
}

inline const float* table_of(const Tensor& table, int64_t samples, int64_t columns) {
  STD_TORCH_CHECK(is_float32_vector(table, samples * columns), "coefficients: contiguous float32 (n, 1 + outputs) expected");
  return static_cast<const float*>(table.const_data_ptr());
}

inline StepArguments step_arguments(const Tensor& sample, const std::vector<Tensor>& outputs, const Tensor& coefficients,
                                    const std::optional<Tensor>& active, const std::optional<Tensor>& noise_scale,
                                    const std::optional<Tensor>& noise_index, int64_t seed, int64_t offset, Tensor& out,
                                    std::optional<Tensor>& trajectory) {
  StepArguments a{};
  a.samples = sample.size(0);
  a.n = a.samples == 0 ? 0 : sample.numel() / a.samples;
  STD_TORCH_CHECK(outputs.size() <= kMaxOutputs, "at most four outputs");
  a.outputs = static_cast<int>(outputs.size());
  a.sample = samples_of(sample, "sample", a.samples, a.n);
  for (size_t j = 0; j < outputs.size(); ++j) a.output[j] = samples_of(outputs[j], "outputs", a.samples, a.n);
  a.result = written_samples_of(out, "out", a.samples, a.n);
  STD_TORCH_CHECK(a.result.storage == a.sample.storage, "out: the dtype of the sample expected");
  if (trajectory) a.trajectory = written_samples_of(*trajectory, "trajectory", a.samples, a.n);
  a.coefficients = table_of(coefficients, a.samples, 1 + a.outputs);
  a.active = active_of(active, a.samples);
  if (noise_scale) {
    STD_TORCH_CHECK(is_float32_vector(*noise_scale, a.samples), "noise_scale: float32 (n,) expected");
    a.noise_scale = static_cast<const float*>(noise_scale->const_data_ptr());
  }
  if (noise_index) {
    STD_TORCH_CHECK(is_vector(*noise_index, ScalarType::Long, a.samples), "noise_index: int64 (n,) expected");
    a.noise_index = static_cast<const int64_t*>(noise_index->const_data_ptr());
  }
  a.seed = static_cast<uint64_t>(seed);
  a.offset = static_cast<uint32_t>(offset);
  return a;
}

inline StepBackwardArguments step_backward_arguments(const Tensor& grad, const Tensor& coefficients, const std::optional<Tensor>& active,
                                                     const std::vector<int64_t>& columns, std::vector<Tensor>& gradients) {
  StepBackwardArguments a{};
  STD_TORCH_CHECK(!gradients.empty() && gradients.size() <= 1 + kMaxOutputs && gradients.size() == columns.size(),
                  "one gradient for each of at most five columns expected");
  a.samples = grad.size(0);
  a.n = a.samples == 0 ? 0 : gradients[0].numel() / a.samples;
  a.constant = grad.numel() == a.samples;
  a.grad = samples_of(grad, "grad", a.samples, a.constant ? (a.samples == 0 ? 0 : 1) : a.n);
  a.gradients = static_cast<int>(gradients.size());
  a.columns = static_cast<int>(coefficients.size(1));
  for (size_t k = 0; k < gradients.size(); ++k) {
    STD_TORCH_CHECK(0 <= columns[k] && columns[k] < a.columns, "columns: not in the table");
    a.column[k] = static_cast<int>(columns[k]);
    a.gradient[k] = written_samples_of(gradients[k], "gradients", a.samples, a.n);
  }
  a.coefficients = table_of(coefficients, a.samples, a.columns);
  a.active = active_of(active, a.samples);
  return a;
}

}  // namespace fastinvdpo
