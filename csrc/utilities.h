// Utilities u(z) of the pair objective and their derivatives, for host and device: METHODS names as in
// fastinvdpo/ops/preference_loss/utilities.py, whose order the enumeration follows.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define FID_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FID_HOST_DEVICE inline
#endif

namespace fastinvdpo {

enum class Utility : int { kSigmoid = 0, kCdpo, kRobust, kHinge, kIpo, kLinear, kCount };

constexpr float kLinearKappa = 0.4f;
constexpr float kLinearEta = 0.01f;

FID_HOST_DEVICE float sigmoid(float z) {
  // exp of a negative number only: no overflow.
  const float e = expf(-fabsf(z));
  return (z >= 0.0f ? 1.0f : e) / (1.0f + e);
}

// -log sigmoid(z)
FID_HOST_DEVICE float softplus_neg(float z) { return fmaxf(-z, 0.0f) + log1pf(expf(-fabsf(z))); }

FID_HOST_DEVICE float utility_value(Utility utility, float z, float beta, float eps) {
  switch (utility) {
    case Utility::kSigmoid:
      return softplus_neg(z);
    case Utility::kCdpo:
      return (1.0f - eps) * softplus_neg(z) + eps * softplus_neg(-z);
    case Utility::kRobust:
      return ((1.0f - eps) * softplus_neg(z) - eps * softplus_neg(-z)) / (1.0f - 2.0f * eps);
    case Utility::kHinge:
      // Written so that a margin that is not a number stays one.
      return z >= 1.0f ? 0.0f : 1.0f - z;
    case Utility::kIpo: {
      const float gap = z / beta - 0.5f / beta;
      return gap * gap;
    }
    default: {
      const float edge = (0.5f - kLinearEta) / kLinearKappa;
      if (z > edge) return edge * (0.5f * kLinearKappa * edge - 0.5f) - (z - edge) * kLinearEta;
      if (z < -edge) return edge * (0.5f * kLinearKappa * edge + 0.5f) - (z + edge) * (1.0f - kLinearEta);
      return z * (0.5f * kLinearKappa * z - 0.5f);
    }
  }
}

FID_HOST_DEVICE float utility_slope(Utility utility, float z, float beta, float eps) {
  switch (utility) {
    case Utility::kSigmoid:
      return -sigmoid(-z);
    case Utility::kCdpo:
      return eps - sigmoid(-z);
    case Utility::kRobust:
      return (-(1.0f - eps) * sigmoid(-z) - eps * sigmoid(z)) / (1.0f - 2.0f * eps);
    case Utility::kHinge:
      return z < 1.0f ? -1.0f : 0.0f;
    case Utility::kIpo:
      return 2.0f * (z / beta - 0.5f / beta) / beta;
    default: {
      const float slope = 0.5f - kLinearKappa * z;
      return slope < kLinearEta ? -kLinearEta : slope > 1.0f - kLinearEta ? -(1.0f - kLinearEta) : -slope;
    }
  }
}

}  // namespace fastinvdpo
