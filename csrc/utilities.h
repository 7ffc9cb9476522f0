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

constexpr double kLinearKappa = 0.4;
constexpr double kLinearEta = 0.01;

// The arithmetic is that of the arguments: float on the device, double on the host, where it costs nothing.
template <class Real>
FID_HOST_DEVICE Real sigmoid(Real z) {
  // exp of a negative number only: no overflow.
  const Real e = std::exp(-std::fabs(z));
  return (z >= Real(0) ? Real(1) : e) / (Real(1) + e);
}

// -log sigmoid(z)
template <class Real>
FID_HOST_DEVICE Real softplus_neg(Real z) {
  return (z < Real(0) ? -z : Real(0)) + std::log1p(std::exp(-std::fabs(z)));
}

template <class Real>
FID_HOST_DEVICE Real utility_value(Utility utility, Real z, Real beta, Real eps) {
  switch (utility) {
    case Utility::kSigmoid:
      return softplus_neg(z);
    case Utility::kCdpo:
      return (Real(1) - eps) * softplus_neg(z) + eps * softplus_neg(-z);
    case Utility::kRobust:
      return ((Real(1) - eps) * softplus_neg(z) - eps * softplus_neg(-z)) / (Real(1) - Real(2) * eps);
    case Utility::kHinge:
      // Written so that a margin that is not a number stays one.
      return z >= Real(1) ? Real(0) : Real(1) - z;
    case Utility::kIpo: {
      const Real gap = z / beta - Real(0.5) / beta;
      return gap * gap;
    }
    default: {
      const Real kappa = kLinearKappa, eta = kLinearEta, edge = (Real(0.5) - eta) / kappa;
      const Real at_edge = edge * (Real(0.5) * kappa * edge - Real(0.5));
      if (z > edge) return at_edge - (z - edge) * eta;
      if (z < -edge) return at_edge + edge - (z + edge) * (Real(1) - eta);
      return z * (Real(0.5) * kappa * z - Real(0.5));
    }
  }
}

template <class Real>
FID_HOST_DEVICE Real utility_slope(Utility utility, Real z, Real beta, Real eps) {
  switch (utility) {
    case Utility::kSigmoid:
      return -sigmoid(-z);
    case Utility::kCdpo:
      return eps - sigmoid(-z);
    case Utility::kRobust:
      return (-(Real(1) - eps) * sigmoid(-z) - eps * sigmoid(z)) / (Real(1) - Real(2) * eps);
    case Utility::kHinge:
      return z < Real(1) ? Real(-1) : Real(0);
    case Utility::kIpo:
      return Real(2) * (z / beta - Real(0.5) / beta) / beta;
    default: {
      const Real kappa = kLinearKappa, eta = kLinearEta, slope = Real(0.5) - kappa * z;
      return slope < eta ? -eta : slope > Real(1) - eta ? eta - Real(1) : -slope;
    }
  }
}

}  // namespace fastinvdpo
