// The arguments of affine_step and of its backward as plain memory, for the CPU and the GPU.
#pragma once

#include <cstdint>

#include "storage.h"

namespace fastinvdpo {

constexpr int kMaxOutputs = 4;

// A tensor as samples of dense memory, `pitch` elements from the beginning of one to that of the next.
struct Samples {
  char* data;  // null: there is no such tensor
  int64_t pitch;
  Storage storage;
};

// y_i = a_i·x_i + Σ_j b_ij·o_ij + s_i·z_i. All tensors have the elements of a sample in one order; with noise, the logical one.
struct StepArguments {
  int64_t samples, n;  // n: elements of a sample
  Samples sample, output[kMaxOutputs];
  Samples result;              // may be the sample or an output
  Samples trajectory;          // receives y too; or null
  int outputs;
  const float* coefficients;   // (samples, 1 + outputs)
  const bool* active;          // (samples,), or null: all
  const float* noise_scale;    // (samples,), or null: no noise
  const int64_t* noise_index;  // (samples,), or null: the position in the batch
  uint64_t seed;
  uint32_t offset;
};

// The gradients of some of the inputs, each the incoming gradient times a column of the table; at rest, that of the sample (column 0) is
// the incoming gradient, and the others are zero.
struct StepBackwardArguments {
  int64_t samples, n;
  Samples grad;
  bool constant;  // grad has one number for each sample
  int gradients;
  Samples gradient[1 + kMaxOutputs];
  int column[1 + kMaxOutputs];
  int columns;                // of the table
  const float* coefficients;  // (samples, columns)
  const bool* active;         // (samples,), or null: all
};

// Whether the sample and the outputs have one storage type; the gradient and those that are computed from it.
inline bool same_storage(const StepArguments& a) {
  bool same = true;
  for (int j = 0; j < a.outputs; ++j) same = same && a.output[j].storage == a.sample.storage;
  return same;
}

inline bool same_storage(const StepBackwardArguments& a) {
  bool same = true;
  for (int k = 0; k < a.gradients; ++k) same = same && a.gradient[k].storage == a.grad.storage;
  return same;
}

}  // namespace fastinvdpo
