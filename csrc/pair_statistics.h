// The sums of pair_statistics, in their order in memory: for the CPU and the GPU.
#pragma once

namespace fastinvdpo {

enum Statistic { kPolicyMse, kCross, kShiftMse, kMaskMean, kOfSample };  // of a winner; then those of its loser
constexpr int kPairCross = 2 * kOfSample, kStatistics = kPairCross + 1;

}  // namespace fastinvdpo
