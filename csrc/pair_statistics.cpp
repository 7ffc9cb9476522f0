// pair_statistics on the CPU: one pass over the inputs forward, one backward.

#include <array>
#include <tuple>
#include <vector>

#include <torch/headeronly/util/Half.h>

#include "isa.h"
#include "kept_memory.h"
#include "pair_statistics_check.h"
#include "rows_cpu.h"

namespace fastinvdpo {
namespace {

// A part of a sample's row, or of those of a winner and its loser.
struct StatisticsRows {
  int sides;
  bool has_reference, has_mask;
  Storage policy_storage, reference_storage, target_storage;
  const void *policy[2], *reference[2], *target[2];
  const float *mask[2], *pair_mask;
};

struct GradientRows : StatisticsRows {
  void* gradient[2];
  float of_error[2], of_shift[2], of_partner;
  bool past_caches;  // whether the gradient is written past the caches
};

#define FID_LOOPS "pair_statistics_cpu.h"
#include "each_isa.h"

struct Inputs {
  const Tensor &policy, &target;
  const std::optional<Tensor>&reference, &mask, &pair_mask;
  Storage policy_storage, reference_storage, target_storage;

  Inputs(const Tensor& p, const std::optional<Tensor>& r, const Tensor& t, const std::optional<Tensor>& k, const std::optional<Tensor>& k_pair)
      : policy(p),
        target(t),
        reference(r),
        mask(k),
        pair_mask(k_pair),
        policy_storage(storage_of(p, "policy")),
        reference_storage(r ? storage_of(*r, "reference") : policy_storage),
        target_storage(storage_of(t, "target")) {}

  // Part `part` of the rows `first` and, of two sides, `first + s.units`.
  GradientRows rows(const StatisticsShape& s, int64_t first, int64_t part, int sides) const {
    GradientRows rows{};
    rows.sides = sides;
    rows.has_reference = reference.has_value(), rows.has_mask = mask.has_value();
    rows.policy_storage = policy_storage, rows.reference_storage = reference_storage, rows.target_storage = target_storage;
    for (int side = 0; side < sides; ++side) {
      const int64_t row = first + side * s.units, at = row * s.n + part * s.m;
      rows.policy[side] = elements_from(policy, policy_storage, at);
      rows.target[side] = elements_from(target, target_storage, at);
      if (reference) rows.reference[side] = elements_from(*reference, reference_storage, at);
      if (mask) rows.mask[side] = data_of(mask) + row % s.masks * s.m;
    }
    if (pair_mask) rows.pair_mask = data_of(pair_mask) + first % s.units % s.pair_masks * s.m;
    return rows;
  }
};

// The predictions share one dense layout in which samples come first, and the masks have theirs; the caller has seen to that.
StatisticsTensors forward(Tensor policy, std::optional<Tensor> reference, Tensor target, std::optional<Tensor> mask,
                          std::optional<Tensor> pair_mask, bool paired) {
  const StatisticsShape s(policy, reference, target, mask, pair_mask, paired);
  const Inputs inputs(policy, reference, target, mask, pair_mask);
  const int64_t chunks = chunks_of(s.m), pieces = s.parts * chunks;  // of a unit
  std::vector<double> partial(static_cast<size_t>(s.units * pieces * kStatistics));
  const auto kernel = FID_FOR_THIS_CPU(sum_chunk);
  for_each_chunk(s.units * s.parts, s.m, [&](int64_t row, int64_t chunk, int64_t begin, int64_t end) {
    const GradientRows rows = inputs.rows(s, row / s.parts, row % s.parts, static_cast<int>(s.sides));
    kernel(rows, begin, end, &partial[static_cast<size_t>((row * chunks + chunk) * kStatistics)]);
  });

  const auto new_result = [&](int64_t size) { return nan_float32(policy, &size, 1); };
  const int64_t shifts = reference ? s.samples : 0;
  StatisticsTensors results{new_result(s.samples), new_result(shifts), new_result(shifts), new_result(paired ? s.units : 0),
                            new_result(mask ? s.samples : 0)};
  const auto data = [](Tensor& tensor) { return tensor.numel() > 0 ? static_cast<float*>(tensor.mutable_data_ptr()) : nullptr; };
  float* const of_sample[kOfSample] = {data(std::get<0>(results)), data(std::get<1>(results)), data(std::get<2>(results)),
                                       data(std::get<4>(results))};
  float* const of_pair = data(std::get<3>(results));
  for (int64_t unit = 0; unit < s.units; ++unit) {
    for (int which = 0; which < kStatistics; ++which) {
      double sum = 0;
      for (int64_t piece = 0; piece < pieces; ++piece) sum += partial[static_cast<size_t>((unit * pieces + piece) * kStatistics + which)];
      const int64_t side = which / kOfSample;
      float* const result = which == kPairCross ? of_pair : side < s.sides ? of_sample[which % kOfSample] : nullptr;
      if (result != nullptr) result[which == kPairCross ? unit : side * s.units + unit] = static_cast<float>(sum / static_cast<double>(s.n));
    }
  }
  return results;
}

Tensor backward(std::optional<Tensor> grad_policy_mse, std::optional<Tensor> grad_cross, std::optional<Tensor> grad_shift_mse,
                std::optional<Tensor> grad_pair_cross, Tensor policy, std::optional<Tensor> reference, Tensor target,
                std::optional<Tensor> mask, std::optional<Tensor> pair_mask) {
  const bool paired = grad_pair_cross.has_value();
  const StatisticsShape s(policy, reference, target, mask, pair_mask, paired);
  check_gradients(s, {grad_policy_mse, grad_cross, grad_shift_mse, grad_pair_cross});
  const Inputs inputs(policy, reference, target, mask, pair_mask);
  const int64_t bytes = policy.numel() * bytes_of(inputs.policy_storage);
  Tensor gradient = empty_result(policy, bytes);
  char* const out = static_cast<char*>(gradient.mutable_data_ptr());
  const float *of_mse = data_of(grad_policy_mse), *of_cross = data_of(grad_cross), *of_shift = data_of(grad_shift_mse);
  const float* const of_pair = data_of(grad_pair_cross);
  const double inverse = 1.0 / static_cast<double>(s.n);
  const auto scaled = [&](const float* grad, int64_t row, double factor) { return grad != nullptr ? factor * inverse * grad[row] : 0.0; };
  const auto kernel = FID_FOR_THIS_CPU(gradient_chunk);
  for_each_chunk(s.units * s.parts, s.m, [&](int64_t task, int64_t, int64_t begin, int64_t end) {
    const int64_t unit = task / s.parts, part = task % s.parts;
    const float partner = static_cast<float>(scaled(of_pair, unit, 1));
    const bool together = paired && partner != 0;  // otherwise the rows have nothing to do with each other
    for (int64_t first = unit; first < (together ? unit + 1 : s.samples); first += s.units) {
      GradientRows rows = inputs.rows(s, first, part, together ? 2 : 1);
      rows.of_partner = partner;
      rows.past_caches = bytes >= kPastCaches;
      bool shifted = false;
      for (int side = 0; side < rows.sides; ++side) {
        const int64_t row = first + side * s.units;
        rows.of_error[side] = static_cast<float>(scaled(of_mse, row, 2) + scaled(of_cross, row, 1));
        rows.of_shift[side] = static_cast<float>(scaled(of_cross, row, 1) + scaled(of_shift, row, 2));
        rows.gradient[side] = out + (row * s.n + part * s.m) * bytes_of(inputs.policy_storage);
        shifted = shifted || rows.of_shift[side] != 0;
      }
      rows.has_reference = rows.has_reference && shifted;  // the gradient of 2X − Q does not depend on it
      kernel(rows, begin, end);
    }
  });
  return gradient;
}

}  // namespace
}  // namespace fastinvdpo

STABLE_TORCH_LIBRARY_FRAGMENT(fastinvdpo_native, m) {
  m.def(
      "pair_statistics(Tensor policy, Tensor? reference, Tensor target, Tensor? mask, Tensor? pair_mask, bool paired) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "pair_statistics_backward(Tensor? grad_policy_mse, Tensor? grad_cross, Tensor? grad_shift_mse, Tensor? grad_pair_cross, "
      "Tensor policy, Tensor? reference, Tensor target, Tensor? mask, Tensor? pair_mask) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastinvdpo_native, CPU, m) {
  m.impl("pair_statistics", TORCH_BOX(&fastinvdpo::forward));
  m.impl("pair_statistics_backward", TORCH_BOX(&fastinvdpo::backward));
}
