// The CUDA kernels of pair_statistics, without PyTorch. Blocks sum spans of rows; the last one to finish adds up the spans. How a row is
// cut, and which thread adds which elements in which order, depends on its length alone: a sample's sums have the same bits in any batch.
#pragma once

#include "cuda_sums.h"
#include "pair_statistics.h"

namespace fastinvdpo {

// The batch, as StatisticsShape has it. Null: no reference, no mask.
struct StatisticsInputs {
  const void *policy, *reference, *target;
  Storage policy_storage, reference_storage, target_storage;
  const float *mask, *pair_mask;
  int64_t samples, sides, units, parts, m, masks, pair_masks;
};

struct StatisticsArguments {
  Work work;  // its rows are the parts of units
  StatisticsInputs in;
  float *of_sample[kOfSample], *of_pair;  // null: not defined
  double inverse_n;
  double* partial;   // (tasks, kStatistics)
  unsigned* ticket;  // zero before the launch, and after it
};

struct StatisticsGradientArguments {
  Work work;  // its rows are the parts of samples, those of a winner and its loser in turn
  StatisticsInputs in;
  void* gradient;
  const float *grad_policy_mse, *grad_cross, *grad_shift_mse, *grad_pair_cross;  // or null
  double inverse_n;
};

struct StatisticsShared {
  double warp[kWarps][kStatistics];
  bool last;
};

// Work that does not depend on the size of the batch: as if there were 16 samples.
FID_WORK_INLINE Work statistics_work(int64_t rows, int64_t parts, int64_t m, int64_t largest) {
  const int64_t chunk = chunk_for(16 * parts * m, largest);
  return {rows, m, chunk, ceil_div(m, chunk), 1};
}

// A part of a sample's elements.
template <class T>
struct SampleRow {
  Row<T> policy, reference, target;
  Row<float> mask;
  bool aligned;  // whether groups start on boundaries

  __device__ SampleRow(const StatisticsInputs& in, int64_t sample, int64_t part)
      : policy(in.policy, in.policy_storage, (sample * in.parts + part) * in.m),
        reference(in.reference != nullptr ? in.reference : in.policy, in.reference != nullptr ? in.reference_storage : in.policy_storage,
                  (sample * in.parts + part) * in.m),
        target(in.target, in.target_storage, (sample * in.parts + part) * in.m),
        mask(in.mask, Storage::kFloat32, sample % in.masks * in.m) {
    aligned = on_boundary(policy, 0) && on_boundary(reference, 0) && on_boundary(target, 0) && on_boundary(mask, 0);
  }
};

// A group of a row's elements from `element` on, of which `left` are there: zeros stand for the others.
template <int kGroup, class T>
__device__ __forceinline__ void load_group(const Row<T>& row, int64_t element, int64_t left, bool aligned, float* out) {
  constexpr int kOwn = Row<T>::kGroup;
  if (aligned && left >= kGroup) {
#pragma unroll
    for (int first = 0; first < kGroup; first += kOwn) row.unpack(row.load(element + first), out + first);
  } else {
#pragma unroll
    for (int e = 0; e < kGroup; ++e) out[e] = e < left ? row.at(element + e) : 0.0f;
  }
}

// The elements of a row from the thread's first group in `range` on: body(element, elements left).
template <int kGroup, class Body>
__device__ __forceinline__ void for_groups(Range range, const Body& body) {
  for (int64_t element = range.begin + static_cast<int64_t>(threadIdx.x) * kGroup; element < range.end; element += kThreads * kGroup) {
    body(element, range.end - element);
  }
}

template <class T, bool kPair, bool kMask>
__global__ void __launch_bounds__(kThreads, 2) pair_statistics_forward(const StatisticsArguments a) {
  constexpr int kGroup = Row<T>::kGroup;
  FID_SHARED(StatisticsShared, shared);
  const StatisticsInputs& in = a.in;
  for (int64_t task = blockIdx.x; task < a.work.tasks(); task += gridDim.x) {
    const int64_t row = task / a.work.spans, unit = row / in.parts, part = row % in.parts;
    const SampleRow<T> winner(in, unit, part), loser(in, kPair ? unit + in.units : unit, part);
    const Row<float> both(in.pair_mask, Storage::kFloat32, unit % in.pair_masks * in.m);
    const bool aligned = winner.aligned && loser.aligned && on_boundary(both, 0);
    double sums[kStatistics] = {};
    for_groups<kGroup>(chunk_range(a.work, task % a.work.spans, 0, 0), [&](int64_t element, int64_t left) {
      float error[2][kGroup], s[kStatistics] = {};
      const auto add_sample = [&](const SampleRow<T>& sample, float* e, float* sum) {
        float p[kGroup], r[kGroup], t[kGroup], k[kGroup];
        load_group<kGroup>(sample.policy, element, left, aligned, p);
        load_group<kGroup>(sample.target, element, left, aligned, t);
        if (in.reference != nullptr) load_group<kGroup>(sample.reference, element, left, aligned, r);
        if (kMask) load_group<kGroup>(sample.mask, element, left, aligned, k);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          e[i] = p[i] - t[i];
          const float weighted = kMask ? k[i] * e[i] : e[i];
          sum[kPolicyMse] += weighted * e[i];
          if (kMask) sum[kMaskMean] += k[i];
          if (in.reference == nullptr) continue;
          const float d = p[i] - r[i];
          sum[kCross] += weighted * d;
          sum[kShiftMse] += (kMask ? k[i] * d : d) * d;
        }
      };
      add_sample(winner, error[0], s);
      if (kPair) {
        add_sample(loser, error[1], s + kOfSample);
        float k[kGroup];
        if (kMask) load_group<kGroup>(both, element, left, aligned, k);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) s[kPairCross] += (kMask ? k[i] * error[0][i] : error[0][i]) * error[1][i];
      }
#pragma unroll
      for (int which = 0; which < kStatistics; ++which) sums[which] += s[which];
    });
    const double sum = block_sum(sums, shared.warp);
    if (threadIdx.x < kStatistics) a.partial[task * kStatistics + threadIdx.x] = sum;
  }

  __threadfence();  // the sums, before the ticket says so
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.last = atomicAdd(a.ticket, 1u) == gridDim.x - 1;
    if (shared.last) *a.ticket = 0;
  }
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  const int64_t pieces = in.parts * a.work.spans;
  sum_each(
      in.units * kStatistics, pieces,
      [&](int64_t item, int64_t piece) { return __ldcg(&a.partial[(item / kStatistics * pieces + piece) * kStatistics + item % kStatistics]); },
      [&](int64_t item, double sum) {
        const int64_t unit = item / kStatistics, which = item % kStatistics, side = which / kOfSample;
        const float mean = static_cast<float>(sum * a.inverse_n);
        if (which == kPairCross) {
          if (a.of_pair != nullptr) a.of_pair[unit] = mean;
        } else if (side < in.sides && a.of_sample[which % kOfSample] != nullptr) {
          a.of_sample[which % kOfSample][side * in.units + unit] = mean;
        }
      });
}

template <class T, bool kMask>
__global__ void __launch_bounds__(kThreads, 2) pair_statistics_backward(const StatisticsGradientArguments a) {
  constexpr int kGroup = Row<T>::kGroup;
  const StatisticsInputs& in = a.in;
  const auto scaled = [&](const float* grad, int64_t row, double factor) { return grad != nullptr ? factor * a.inverse_n * grad[row] : 0.0; };
  for (int64_t task = blockIdx.x; task < a.work.tasks(); task += gridDim.x) {
    const int64_t row = task / (a.work.spans * in.sides), unit = row / in.parts, part = row % in.parts;
    const int64_t side = task % in.sides, sample = side * in.units + unit;
    const float of_error = static_cast<float>(scaled(a.grad_policy_mse, sample, 2) + scaled(a.grad_cross, sample, 1));
    const float of_shift = static_cast<float>(scaled(a.grad_cross, sample, 1) + scaled(a.grad_shift_mse, sample, 2));
    const float of_partner = static_cast<float>(scaled(a.grad_pair_cross, unit, 1));
    // The gradient of 2X − Q does not depend on the reference.
    const bool shifted = in.reference != nullptr && of_shift != 0.0f, together = of_partner != 0.0f;
    const SampleRow<T> own(in, sample, part), other(in, together ? unit + (in.units - side * in.units) : sample, part);
    const Row<T> gradient(a.gradient, in.policy_storage, (sample * in.parts + part) * in.m);
    const Row<float> both(in.pair_mask, Storage::kFloat32, unit % in.pair_masks * in.m);
    const bool aligned = own.aligned && other.aligned && on_boundary(gradient, 0) && on_boundary(both, 0);
    for_groups<kGroup>(chunk_range(a.work, task / in.sides % a.work.spans, 0, 0), [&](int64_t element, int64_t left) {
      float g[kGroup], p[kGroup], t[kGroup], k[kGroup];
      load_group<kGroup>(own.policy, element, left, aligned, p);
      load_group<kGroup>(own.target, element, left, aligned, t);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) g[i] = of_error * (p[i] - t[i]);
      if (shifted) {
        load_group<kGroup>(own.reference, element, left, aligned, t);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) g[i] += of_shift * (p[i] - t[i]);
      }
      if (kMask) {
        load_group<kGroup>(own.mask, element, left, aligned, k);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) g[i] *= k[i];
      }
      if (together) {
        load_group<kGroup>(other.policy, element, left, aligned, p);
        load_group<kGroup>(other.target, element, left, aligned, t);
        if (kMask) load_group<kGroup>(both, element, left, aligned, k);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) g[i] += (kMask ? of_partner * k[i] : of_partner) * (p[i] - t[i]);
      }
      if (aligned && left >= kGroup) return gradient.store(element, g);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        if (i < left) gradient.put(element + i, g[i]);
      }
    });
  }
}

}  // namespace fastinvdpo
