// affine_step on the CPU: one pass over the sample and the network's outputs, noise included.

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common.h"
#include "isa.h"

namespace fastinvdpo {
namespace {

constexpr int kMaxOutputs = 4;
constexpr int64_t kBlock = 1024;  // floats converted at a time; a multiple of the normal numbers drawn at a time
constexpr int64_t kChunk = 16384;
constexpr int64_t kGrain = 2;

struct StepRow {
  const void* sample;
  const void* output[kMaxOutputs];
  void* result;
  Storage sample_storage, output_storage[kMaxOutputs];
  float coefficient[1 + kMaxOutputs];
  int outputs;
  bool noisy;
  float noise_scale;
  uint64_t seed, index;
  uint32_t offset;
};

namespace baseline {
#define FID_VECTOR 16
#include "affine_step_cpu.h"
#undef FID_VECTOR
}  // namespace baseline

#if defined(__x86_64__)
#define FID_VECTOR 32
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include "affine_step_cpu.h"
}
#pragma GCC pop_options
#undef FID_VECTOR
#define FID_VECTOR 64
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#include "affine_step_cpu.h"
}
#pragma GCC pop_options
#undef FID_VECTOR
#endif

// All tensors share one dense layout in which samples come first; with noise, the contiguous one. The caller has seen to that.
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
  StepRow common{};
  common.sample_storage = storage_of(sample, "sample");
  common.outputs = static_cast<int>(outputs.size());
  for (int j = 0; j < common.outputs; ++j) {
    STD_TORCH_CHECK(outputs[static_cast<size_t>(j)].numel() == sample.numel(), "outputs: shapes differ");
    common.output_storage[j] = storage_of(outputs[static_cast<size_t>(j)], "outputs");
  }
  common.noisy = noise_scale.has_value();
  common.seed = static_cast<uint64_t>(seed);
  common.offset = static_cast<uint32_t>(offset);
  Tensor result = torch::stable::empty_like(sample);
  const int64_t width = bytes_of(common.sample_storage);
  const char* x = static_cast<const char*>(sample.const_data_ptr());
  char* y = static_cast<char*>(result.mutable_data_ptr());
  const float* table = static_cast<const float*>(coefficients.const_data_ptr());
  const bool* mask = active ? static_cast<const bool*>(active->const_data_ptr()) : nullptr;
  const float* scale = noise_scale ? static_cast<const float*>(noise_scale->const_data_ptr()) : nullptr;
  const int64_t* index = noise_index ? static_cast<const int64_t*>(noise_index->const_data_ptr()) : nullptr;
  std::vector<const char*> o(outputs.size());
  for (size_t j = 0; j < outputs.size(); ++j) o[j] = static_cast<const char*>(outputs[j].const_data_ptr());

  const int64_t chunks = (n + kChunk - 1) / kChunk;
  const auto kernel = FID_FOR_THIS_CPU(step_chunk);
  torch::stable::parallel_for(0, rows * chunks, kGrain, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const int64_t i = task / chunks, begin = task % chunks * kChunk, end = std::min(begin + kChunk, n);
      if (mask != nullptr && !mask[i]) {
        std::memcpy(y + (i * n + begin) * width, x + (i * n + begin) * width, static_cast<size_t>((end - begin) * width));
        continue;
      }
      StepRow row = common;
      row.sample = x + i * n * width;
      row.result = y + i * n * width;
      for (int j = 0; j < row.outputs; ++j) row.output[j] = o[static_cast<size_t>(j)] + i * n * bytes_of(row.output_storage[j]);
      std::memcpy(row.coefficient, table + i * columns, static_cast<size_t>(columns) * sizeof(float));
      row.noise_scale = scale != nullptr ? scale[i] : 0.0f;
      row.index = static_cast<uint64_t>(index != nullptr ? index[i] : i);
      kernel(row, begin, end);
    }
  });
  return result;
}

}  // namespace
}  // namespace fastinvdpo

STABLE_TORCH_LIBRARY_FRAGMENT(fastinvdpo_native, m) {
  m.def(
      "affine_step(Tensor sample, Tensor[] outputs, Tensor coefficients, Tensor? active, Tensor? noise_scale, "
      "Tensor? noise_index, int seed, int offset) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastinvdpo_native, CPU, m) { m.impl("affine_step", TORCH_BOX(&fastinvdpo::step)); }
