// The inner loops of token_log_probs. Included once per instruction set, inside its namespace and target region (see simd.h).

#include "simd.h"

// exp(x) for x ≤ 0 to about one unit in the last place; 0 below the smallest normal number; NaN stays NaN.
static inline vf exponential(vf x) {
  const vf magic = 12582912.0f - vf{};  // 1.5·2²³: what is added to it is rounded to an integer, in the low bits
  const vf shifted = multiply_add(1.44269504089f, x, magic), n = shifted - magic;
  const vf r = multiply_add(2.12194440e-4f, n, multiply_add(-0.693359375f, n, x));
  vf p = multiply_add(1.9875691500e-4f, r, 1.3981999507e-3f - vf{});
  for (const float coefficient : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = multiply_add(p, r, coefficient - vf{});
  const vf power = (vf)(((vu32)shifted << 23) + 0x3f800000u);
  const vf value = multiply_add(p, r * r, r + 1.0f) * power;
  return (vf)((vu32)value & ~(vu32)(x < -87.0f));
}

// The largest of n > 0 numbers, NaN left out.
static float largest(const float* row, int64_t n) {
  float result = -std::numeric_limits<float>::infinity();
  int64_t at = 0;
  if (n >= kLanes) {
    vf most = load(row);
    for (at = kLanes; at + kLanes <= n; at += kLanes) {
      const vf v = load(row + at);
      most = (vf)(((vu32)v & (vu32)(v > most)) | ((vu32)most & ~(vu32)(v > most)));
    }
    for (int lane = 0; lane < kLanes; ++lane) result = std::max(result, most[lane]);
  }
  for (; at < n; ++at) result = std::max(result, row[at]);
  return result;
}

// row[i] ← factor·exp(row[i] − shift). Returns the sum of the exponentials, without the factor.
static double exponentiate(float* row, int64_t n, float shift, float factor) {
  Totals totals;
  int64_t at = 0;
  while (at + kLanes <= n) {
    vf run = {};
    const int64_t end = std::min(n, at + kLanes * kFloatRun);
    for (; at + kLanes <= end; at += kLanes) {
      const vf e = exponential(load(row + at) - shift);
      run += e;
      store(row + at, factor * e);
    }
    totals.add(run);
  }
  double sum = totals.sum();
  if (at < n) {
    const vf e = exponential(load_tail<Storage::kFloat32>(row, at, n - at) - shift);
    store_tail<Storage::kFloat32>(row, at, n - at, factor * e);
    for (int64_t lane = 0; lane < n - at; ++lane) sum += e[lane];
  }
  return sum;
}

// row[i] ← factor·row[i].
static void multiply(float* row, int64_t n, float factor) {
  for (int64_t at = 0; at < n; ++at) row[at] *= factor;
}
