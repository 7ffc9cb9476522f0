// Sums over the threads of a block, in a fixed order.
#pragma once

#include "cuda_device.h"

namespace fastinvdpo {

constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

// Adds up the sums of all threads of the block; thread j < kCount returns sum j.
template <int kCount>
__device__ __forceinline__ double block_sum(const double* sums, double (*warp)[kCount]) {
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    double sum = sums[j];
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
    if (threadIdx.x % kWarp == 0) warp[threadIdx.x / kWarp][j] = sum;
  }
  __syncthreads();
  double total = 0;
  if (threadIdx.x < kCount) {
    for (int w = 0; w < kWarps; ++w) total += warp[w][threadIdx.x];
  }
  __syncthreads();  // before the next call writes
  return total;
}

// store(i, Σ_t value(i, t)) for `items` sums of `terms` terms, all threads of the block, up to 32 for each sum.
template <class Value, class Store>
__device__ __forceinline__ void sum_each(int64_t items, int64_t terms, const Value& value, const Store& store) {
  int lanes = 1;
  while (lanes < terms && lanes < kWarp) lanes *= 2;
  const int lane = threadIdx.x % lanes;
  for (int64_t first = 0; first < items; first += kThreads / lanes) {
    const int64_t item = first + threadIdx.x / lanes;
    double sum = 0;
    if (item < items) {
      for (int64_t term = lane; term < terms; term += lanes) sum += value(item, term);
    }
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step, lanes);
    if (item < items && lane == 0) store(item, sum);
  }
}

}  // namespace fastinvdpo
