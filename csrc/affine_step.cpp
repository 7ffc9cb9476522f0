// affine_step and its backward on the CPU: one pass over the tensors, noise included.

#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>

#include "affine_step_check.h"
#include "isa.h"
#include "kept_memory.h"

namespace fastinvdpo {
namespace {

constexpr int64_t kBlock = 1024;  // floats converted at a time; a multiple of the normal numbers drawn at a time
constexpr int64_t kChunk = 16384;
constexpr int64_t kGrain = 2;

inline char* sample_of(const Samples& tensor, int64_t i) { return tensor.data + i * tensor.pitch * bytes_of(tensor.storage); }

#define FID_LOOPS "affine_step_cpu.h"
#include "each_isa.h"

// Calls kernel(arguments, sample, begin, end) for every chunk of every sample.
template <class Arguments>
void for_chunks(const Arguments& a, void (*kernel)(const Arguments&, int64_t, int64_t, int64_t)) {
  const int64_t chunks = (a.n + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, a.samples * chunks, kGrain, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const int64_t begin = task % chunks * kChunk;
      kernel(a, task / chunks, begin, std::min(begin + kChunk, a.n));
    }
  });
}

void step_out(Tensor sample, std::vector<Tensor> outputs, Tensor coefficients, std::optional<Tensor> active, std::optional<Tensor> noise_scale,
              std::optional<Tensor> noise_index, int64_t seed, int64_t offset, Tensor out, std::optional<Tensor> trajectory) {
  for_chunks(step_arguments(sample, outputs, coefficients, active, noise_scale, noise_index, seed, offset, out, trajectory),
             FID_FOR_THIS_CPU(step_chunk));
}

Tensor step(Tensor sample, std::vector<Tensor> outputs, Tensor coefficients, std::optional<Tensor> active,
            std::optional<Tensor> noise_scale, std::optional<Tensor> noise_index, int64_t seed, int64_t offset) {
  Tensor result = empty_result(sample, sample.numel() * bytes_of(storage_of(sample, "sample")));
  step_out(sample, outputs, coefficients, active, noise_scale, noise_index, seed, offset, result, std::nullopt);
  return result;
}

void step_backward(Tensor grad, Tensor coefficients, std::optional<Tensor> active, std::vector<int64_t> columns,
                   std::vector<Tensor> gradients) {
  const StepBackwardArguments a = step_backward_arguments(grad, coefficients, active, columns, gradients);
  for (int k = 0; k < a.gradients; ++k) prefer_huge_pages(a.gradient[k].data, a.samples * a.n * bytes_of(a.gradient[k].storage));
  for_chunks(a, FID_FOR_THIS_CPU(step_backward_chunk));
}

}  // namespace
}  // namespace fastinvdpo

STABLE_TORCH_LIBRARY_FRAGMENT(fastinvdpo_native, m) {
  m.def(
      "affine_step(Tensor sample, Tensor[] outputs, Tensor coefficients, Tensor? active, Tensor? noise_scale, "
      "Tensor? noise_index, int seed, int offset) -> Tensor");
  m.def(
      "affine_step_out(Tensor sample, Tensor[] outputs, Tensor coefficients, Tensor? active, Tensor? noise_scale, "
      "Tensor? noise_index, int seed, int offset, Tensor(a!) out, Tensor(b!)? trajectory) -> ()");
  m.def(
      "affine_step_backward(Tensor grad, Tensor coefficients, Tensor? active, int[] columns, Tensor(a!)[] gradients) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastinvdpo_native, CPU, m) {
  m.impl("affine_step", TORCH_BOX(&fastinvdpo::step));
  m.impl("affine_step_out", TORCH_BOX(&fastinvdpo::step_out));
  m.impl("affine_step_backward", TORCH_BOX(&fastinvdpo::step_backward));
}
