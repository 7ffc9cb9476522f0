// The CUDA kernels of preference_loss, without PyTorch. Teams of blocks (single ones, or clusters) sum spans of rows; the last team to
// finish completes all rows and pairs. Every sum has a fixed order, so the same inputs give the same bits on every run.
#pragma once

#include "cuda_sums.h"
#include "utilities.h"

namespace fastinvdpo {

constexpr int kSums = 3;         // Σ (p − r)·((p − τ) + (r − τ)),  Σ (p − τ)²,  Σ (r − τ)²
constexpr int kGroupsAtOnce = 2; // groups of each tensor that a thread has in flight: enough to cover the latency of memory

struct Pairs {
  const float *pair_weight, *timestep_weight;  // (B,) and (B, K), or null
  int64_t pitch;                               // elements from one pair's timestep weights to the next pair's: 0 for weights (K,)
  int64_t pairs, timesteps;
  float beta, label_smoothing;
  Utility utility;

  // −(β/2)·ρ_i·w_ik
  __device__ float scale(int64_t i, int64_t k) const {
    float scale = -0.5f * beta;
    if (pair_weight != nullptr) scale *= pair_weight[i];
    if (timestep_weight != nullptr) scale *= timestep_weight[i * pitch + k];
    return scale;
  }
};

struct ForwardArguments {
  Work work;
  Pairs pairs;
  const void *policy, *reference, *target;  // target: null when it is the reference
  Storage policy_storage, reference_storage, target_storage;
  float *loss, *margin, *policy_mse, *reference_mse;
  double inverse_n;
  double* delta;     // (rows,)
  double* partial;   // (rows, spans, kSums); unused when a row is one span
  unsigned* ticket;  // zero before the launch, and after it
};

struct BackwardArguments {
  Work work;
  Pairs pairs;
  const void *policy, *target;
  void* gradient;
  Storage policy_storage, target_storage;
  const float *grad_loss, *grad_margin, *grad_policy_mse;  // or null
  const float* margin;
  double two_over_n;
};

struct ForwardShared {
  double warp[kWarps][kSums];
  double block[2][kMaxCluster][kSums];  // used in turn, so that one cluster_sync() a span is enough
  bool last;
};

// The three inputs of a row; target repeats the reference when there is none.
template <class T, bool kTarget>
struct Inputs {
  Row<T> policy, reference, target;
  int64_t head;  // elements in front of the groups
  bool grouped;  // whether groups of all inputs start on boundaries

  __device__ Inputs(const ForwardArguments& a, int64_t row)
      : policy(a.policy, a.policy_storage, row * a.work.n),
        reference(a.reference, a.reference_storage, row * a.work.n),
        target(kTarget ? a.target : a.reference, kTarget ? a.target_storage : a.reference_storage, row * a.work.n) {
    head = elements_to_boundary(policy);
    grouped = on_boundary(policy, head) && on_boundary(reference, head) && on_boundary(target, head);
    if (!grouped) head = 0;
  }
};

template <bool kTarget>
__device__ __forceinline__ void add_element(float p, float r, float t, float* sums) {
  if (kTarget) {
    const float pe = p - t, re = r - t;
    sums[0] += (p - r) * (pe + re);
    sums[1] += pe * pe;
    sums[2] += re * re;
  } else {
    sums[1] += (p - r) * (p - r);
  }
}

// This thread's share of the sums over `range`. A float32 sum runs over a few groups only, before it is added to one in double.
template <class T, bool kTarget>
__device__ __forceinline__ void sum_range(const Inputs<T, kTarget>& in, Range range, double* sums) {
  constexpr int kGroup = Row<T>::kGroup;
  const auto scalar = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      float s[kSums] = {};
      add_element<kTarget>(in.policy.at(i), in.reference.at(i), kTarget ? in.target.at(i) : 0.0f, s);
      for (int j = 0; j < kSums; ++j) sums[j] += s[j];
    }
  };
  if (!in.grouped) return scalar(range.begin, range.end);

  int64_t begin = range.begin;
  if (begin == 0) {
    begin = in.head < range.end ? in.head : range.end;
    scalar(0, begin);
  }
  const int groups = static_cast<int>((range.end - begin) / kGroup);
  const auto add_groups = [&](auto count, int first) {
    constexpr int kCount = decltype(count)::value;
    uint4 p[kCount], r[kCount], t[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int64_t element = begin + static_cast<int64_t>(first + u * kThreads) * kGroup;
      p[u] = in.policy.load(element);
      r[u] = in.reference.load(element);
      if (kTarget) t[u] = in.target.load(element);
    }
    float s[kSums] = {};
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      float pv[kGroup], rv[kGroup], tv[kGroup] = {};
      in.policy.unpack(p[u], pv);
      in.reference.unpack(r[u], rv);
      if (kTarget) in.target.unpack(t[u], tv);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) add_element<kTarget>(pv[e], rv[e], tv[e], s);
    }
#pragma unroll
    for (int j = 0; j < kSums; ++j) sums[j] += s[j];
  };
  int group = threadIdx.x;
#pragma unroll 1
  for (; group + (kGroupsAtOnce - 1) * kThreads < groups; group += kGroupsAtOnce * kThreads) {
    add_groups(Constant<kGroupsAtOnce>(), group);
  }
#pragma unroll 1
  for (; group < groups; group += kThreads) add_groups(Constant<1>(), group);
  scalar(begin + static_cast<int64_t>(groups) * kGroup, range.end);
}

__device__ __forceinline__ void finish_row_sum(const ForwardArguments& a, int64_t row, int which, double sum) {
  const double mean = sum * a.inverse_n;
  if (which == 0) {
    a.delta[row] = mean;
  } else {
    (which == 1 ? a.policy_mse : a.reference_mse)[row] = static_cast<float>(mean);
  }
}

// What is left when all spans have been summed, by one block: rows, pairs, loss.
__device__ __forceinline__ void finish(const ForwardArguments& a, ForwardShared& shared) {
  const Work& work = a.work;
  if (work.spans > 1) {
    sum_each(
        work.rows * kSums, work.spans,
        [&](int64_t item, int64_t span) { return __ldcg(&a.partial[(item / kSums * work.spans + span) * kSums + item % kSums]); },
        [&](int64_t item, double sum) { finish_row_sum(a, item / kSums, static_cast<int>(item % kSums), sum); });
    __syncthreads();
  }
  const Pairs& pairs = a.pairs;
  double loss[kSums] = {};
  sum_each(
      pairs.pairs, pairs.timesteps,
      [&](int64_t i, int64_t k) {
        const int64_t row = i * pairs.timesteps + k;
        const double gap = __ldcg(&a.delta[row]) - __ldcg(&a.delta[pairs.pairs * pairs.timesteps + row]);
        return pairs.scale(i, k) * gap;
      },
      [&](int64_t i, double sum) {
        const float z = static_cast<float>(sum);
        a.margin[i] = z;
        loss[0] += utility_value(pairs.utility, z, pairs.beta, pairs.label_smoothing);
      });
  const double total = block_sum(loss, shared.warp);
  if (threadIdx.x == 0) *a.loss = static_cast<float>(total / static_cast<double>(pairs.pairs));
}

template <class T, bool kTarget, bool kCluster>
__global__ void __launch_bounds__(kThreads, 4) preference_loss_forward(const ForwardArguments a) {
  if (kCluster && !kHasClusters) return;
  FID_SHARED(ForwardShared, shared);
  const int team = kCluster ? a.work.team : 1, rank = kCluster ? cluster_rank() : 0;
  const int64_t teams = gridDim.x / team, first = blockIdx.x / team;
  int turn = 0;
  // A block's shared memory may be written from outside only once the block runs.
  if (kCluster) cluster_sync();
  for (int64_t task = first; task < a.work.tasks(); task += teams, turn ^= 1) {
    const int64_t row = task / a.work.spans, span = task % a.work.spans;
    const Inputs<T, kTarget> in(a, row);
    double sums[kSums] = {};
    sum_range(in, chunk_range(a.work, span, rank, in.head), sums);
    if (!kTarget) sums[0] = sums[1];
    double sum = block_sum(sums, shared.warp);
    if (kCluster) {
      if (threadIdx.x < kSums) in_block(&shared, 0)->block[turn][rank][threadIdx.x] = sum;
      cluster_sync();
      if (rank != 0) continue;
      if (threadIdx.x < kSums) {
        sum = 0;
        for (int block = 0; block < team; ++block) sum += shared.block[turn][block][threadIdx.x];
      }
    }
    if (threadIdx.x < kSums) {
      if (a.work.spans == 1) {
        finish_row_sum(a, row, threadIdx.x, sum);
      } else {
        a.partial[task * kSums + threadIdx.x] = sum;
      }
    }
  }
  if (rank != 0) return;

  __threadfence();  // the sums, before the ticket says so
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.last = atomicAdd(a.ticket, 1u) == static_cast<unsigned>(teams - 1);
    if (shared.last) *a.ticket = 0;
  }
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  finish(a, shared);
}

// ∂/∂p of a row is this times p − τ.
__device__ __forceinline__ float gradient_scale(const BackwardArguments& a, int64_t row) {
  const Pairs& pairs = a.pairs;
  const int64_t per_side = pairs.pairs * pairs.timesteps;
  const bool loser = row >= per_side;
  const int64_t within = loser ? row - per_side : row;
  const int64_t i = within / pairs.timesteps, k = within % pairs.timesteps;
  float grad_z = 0;
  if (a.grad_loss != nullptr) {
    const float slope = utility_slope(pairs.utility, a.margin[i], pairs.beta, pairs.label_smoothing);
    grad_z = *a.grad_loss * slope / static_cast<float>(pairs.pairs);
  }
  if (a.grad_margin != nullptr) grad_z += a.grad_margin[i];
  const float winner = grad_z * pairs.scale(i, k);
  const float sum = (loser ? -winner : winner) + (a.grad_policy_mse != nullptr ? a.grad_policy_mse[row] : 0.0f);
  return static_cast<float>(sum * a.two_over_n);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) preference_loss_backward(const BackwardArguments a) {
  constexpr int kGroup = Row<T>::kGroup;
  for (int64_t task = blockIdx.x; task < a.work.tasks(); task += gridDim.x) {
    const int64_t row = task / a.work.spans, first = row * a.work.n;
    const Row<T> policy(a.policy, a.policy_storage, first), target(a.target, a.target_storage, first);
    const Row<T> gradient(a.gradient, a.policy_storage, first);
    int64_t head = elements_to_boundary(policy);
    const bool grouped = on_boundary(policy, head) && on_boundary(target, head) && on_boundary(gradient, head);
    if (!grouped) head = 0;
    const float scale = gradient_scale(a, row);
    const auto scalar = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) gradient.put(i, scale * (policy.at(i) - target.at(i)));
    };
    const Range range = chunk_range(a.work, task % a.work.spans, 0, head);
    if (!grouped) {
      scalar(range.begin, range.end);
      continue;
    }
    int64_t begin = range.begin;
    if (begin == 0) {
      begin = head < range.end ? head : range.end;
      scalar(0, begin);
    }
    const int groups = static_cast<int>((range.end - begin) / kGroup);
#pragma unroll kGroupsAtOnce
    for (int group = threadIdx.x; group < groups; group += kThreads) {
      const int64_t element = begin + static_cast<int64_t>(group) * kGroup;
      const uint4 p = policy.load(element), t = target.load(element);
      float pv[kGroup], tv[kGroup];
      policy.unpack(p, pv);
      target.unpack(t, tv);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) pv[e] = scale * (pv[e] - tv[e]);
      gradient.store(element, pv);
    }
    scalar(begin + static_cast<int64_t>(groups) * kGroup, range.end);
  }
}

}  // namespace fastinvdpo
