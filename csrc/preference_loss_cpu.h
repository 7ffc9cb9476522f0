// The inner loops of preference_loss. Included once per instruction set, inside its namespace and target region (see simd.h).

#include "simd.h"

typedef double vd __attribute__((vector_size(128)));

// A float is added to at most this many others before the sum goes on in double.
static constexpr int64_t kFloatRun = 8;

static inline double sum_lanes(vd v) {
  double total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
  return total;
}

// sums += { Σ (p − r)·((p − τ) + (r − τ)),  Σ (p − τ)²,  Σ (r − τ)² } over `count` floats.
template <bool kTargetIsReference>
static void accumulate(const float* p, const float* r, const float* t, int64_t count, double* sums) {
  // Two chains per sum hide the latency of the additions.
  vf difference[2] = {}, policy[2] = {}, reference[2] = {};
  vd totals[3] = {};
  const auto add = [&](vf pv, vf rv, vf tv, int chain) __attribute__((always_inline)) {
    if (kTargetIsReference) {
      const vf gap = pv - rv;
      policy[chain] += gap * gap;
    } else {
      const vf pe = pv - tv, re = rv - tv;
      difference[chain] += (pv - rv) * (pe + re);
      policy[chain] += pe * pe;
      reference[chain] += re * re;
    }
  };
  const auto widen_sums = [&]() __attribute__((always_inline)) {
    totals[1] += __builtin_convertvector(policy[0] + policy[1], vd);
    policy[0] = policy[1] = vf{};
    if (!kTargetIsReference) {
      totals[0] += __builtin_convertvector(difference[0] + difference[1], vd);
      totals[2] += __builtin_convertvector(reference[0] + reference[1], vd);
      difference[0] = difference[1] = reference[0] = reference[1] = vf{};
    }
  };
  int64_t i = 0;
  while (i + 2 * kLanes <= count) {
    const int64_t run = std::min(count, i + 2 * kLanes * kFloatRun);
    for (; i + 2 * kLanes <= run; i += 2 * kLanes) {
      add(load(p + i), load(r + i), load(t + i), 0);
      add(load(p + i + kLanes), load(r + i + kLanes), load(t + i + kLanes), 1);
    }
    widen_sums();
  }
  for (; i < count; i += kLanes) {
    float tail[3][kLanes] = {};
    const int64_t left = count - i < kLanes ? count - i : kLanes;
    __builtin_memcpy(tail[0], p + i, left * sizeof(float));
    __builtin_memcpy(tail[1], r + i, left * sizeof(float));
    __builtin_memcpy(tail[2], t + i, left * sizeof(float));
    add(load(tail[0]), load(tail[1]), load(tail[2]), 0);
  }
  widen_sums();
  sums[1] += sum_lanes(totals[1]);
  sums[0] = kTargetIsReference ? sums[1] : sums[0] + sum_lanes(totals[0]);
  sums[2] += sum_lanes(totals[2]);
}

static void forward_chunk(const ForwardRow& row, int64_t begin, int64_t end, double* sums) {
  float buffers[3][kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    const float* p = widen(row.policy, row.policy_storage, at, count, buffers[0]);
    const float* r = widen(row.reference, row.reference_storage, at, count, buffers[1]);
    if (row.target == nullptr) {
      accumulate<true>(p, r, r, count, sums);
    } else {
      accumulate<false>(p, r, widen(row.target, row.target_storage, at, count, buffers[2]), count, sums);
    }
  }
}

static void backward_chunk(const BackwardRow& row, int64_t begin, int64_t end) {
  float buffers[3][kBlock];
  const bool wide = row.policy_storage == Storage::kFloat32;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    const float* p = widen(row.policy, row.policy_storage, at, count, buffers[0]);
    const float* t = widen(row.target, row.target_storage, at, count, buffers[1]);
    float* out = wide ? static_cast<float*>(row.gradient) + at : buffers[2];
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, row.scale * (load(p + i) - load(t + i)));
    for (; i < count; ++i) out[i] = row.scale * (p[i] - t[i]);
    if (!wide) narrow(row.gradient, row.policy_storage, at, count, out);
  }
}
