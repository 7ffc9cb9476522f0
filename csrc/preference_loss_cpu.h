// The inner loops of preference_loss. Included once per instruction set, inside its namespace and target region (see simd.h).

#include "simd.h"

// sums += { Σ (p − r)·((p − τ) + (r − τ)),  Σ (p − τ)²,  Σ (r − τ)² } over the elements [begin, end).
template <Storage kPolicy, Storage kReference, Storage kTarget, bool kTargetIsReference>
static void accumulate(const ForwardRow& row, int64_t begin, int64_t end, double* sums) {
  constexpr bool kAlternate = kPolicy == Storage::kBFloat16 && kReference == kPolicy && kTarget == kPolicy;
  // Two chains per sum hide the latency of the additions.
  vf difference[2] = {}, policy[2] = {}, reference[2] = {};
  Totals totals[3];
  const auto add = [&](vf p, vf r, vf t, int chain) __attribute__((always_inline)) {
    if (kTargetIsReference) {
      const vf gap = p - r;
      policy[chain] += gap * gap;
    } else {
      const vf pe = p - t, re = r - t;
      difference[chain] += (p - r) * (pe + re);
      policy[chain] += pe * pe;
      reference[chain] += re * re;
    }
  };
  const auto widen_sums = [&]() __attribute__((always_inline)) {
    totals[1].add(policy[0] + policy[1]);
    policy[0] = policy[1] = vf{};
    if (!kTargetIsReference) {
      totals[0].add(difference[0] + difference[1]);
      totals[2].add(reference[0] + reference[1]);
      difference[0] = difference[1] = reference[0] = reference[1] = vf{};
    }
  };
  int64_t at = begin;
  while (at + 2 * kLanes <= end) {
    const int64_t run = std::min(end, at + 2 * kLanes * kFloatRun);
    for (; at + 2 * kLanes <= run; at += 2 * kLanes) {
      vf p[2], r[2], t[2];
      load_two<kPolicy, kAlternate>(row.policy, at, p);
      load_two<kReference, kAlternate>(row.reference, at, r);
      if (!kTargetIsReference) load_two<kTarget, kAlternate>(row.target, at, t);
      add(p[0], r[0], kTargetIsReference ? r[0] : t[0], 0);
      add(p[1], r[1], kTargetIsReference ? r[1] : t[1], 1);
    }
    widen_sums();
  }
  for (; at < end; at += kLanes) {
    const int64_t left = std::min<int64_t>(end - at, kLanes);
    const vf r = load_tail<kReference>(row.reference, at, left);
    add(load_tail<kPolicy>(row.policy, at, left), r, kTargetIsReference ? r : load_tail<kTarget>(row.target, at, left), 0);
  }
  widen_sums();
  sums[1] += totals[1].sum();
  sums[0] = kTargetIsReference ? sums[1] : sums[0] + totals[0].sum();
  sums[2] += totals[2].sum();
}

static void forward_chunk(const ForwardRow& row, int64_t begin, int64_t end, double* sums) {
  with_storage(row.policy_storage, [&](auto policy) {
    with_storage(row.reference_storage, [&](auto reference) {
      if (row.target == nullptr) return accumulate<policy(), reference(), reference(), true>(row, begin, end, sums);
      with_storage(row.target_storage, [&](auto target) {
        accumulate<policy(), reference(), target(), false>(row, begin, end, sums);
      });
    });
  });
}

template <Storage kPolicy, Storage kTarget, bool kStream>
static void scale_errors(const BackwardRow& row, int64_t begin, int64_t end) {
  constexpr bool kAlternate = kPolicy == Storage::kBFloat16 && kTarget == kPolicy;
  int64_t at = begin;
  for (; at + 2 * kLanes <= end; at += 2 * kLanes) {
    vf p[2], t[2];
    load_two<kPolicy, kAlternate>(row.policy, at, p);
    load_two<kTarget, kAlternate>(row.target, at, t);
    const vf gradient[2] = {row.scale * (p[0] - t[0]), row.scale * (p[1] - t[1])};
    if (kStream) {
      stream_two<kPolicy, kAlternate>(row.gradient, at, gradient);
    } else {
      store_two<kPolicy, kAlternate>(row.gradient, at, gradient);
    }
  }
  if (kStream) streamed();
  for (; at < end; at += kLanes) {
    const int64_t left = std::min<int64_t>(end - at, kLanes);
    const vf gap = load_tail<kPolicy>(row.policy, at, left) - load_tail<kTarget>(row.target, at, left);
    store_tail<kPolicy>(row.gradient, at, left, row.scale * gap);
  }
}

static void backward_chunk(const BackwardRow& row, int64_t begin, int64_t end) {
  const bool stream = row.past_caches && can_stream(static_cast<const char*>(row.gradient) + begin * bytes_of(row.policy_storage));
  with_storage(row.policy_storage, [&](auto policy) {
    with_storage(row.target_storage, [&](auto target) {
      if (stream) return scale_errors<policy(), target(), true>(row, begin, end);
      scale_errors<policy(), target(), false>(row, begin, end);
    });
  });
}
