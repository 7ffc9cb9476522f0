// What ops that sum rows on the CPU share: how rows are cut into chunks, whose sums are added in a fixed order, so that the result has the
// same bits for any number of threads.
#pragma once

#include <algorithm>
#include <limits>

#include "results.h"

namespace fastinvdpo {

constexpr int64_t kChunk = 16384;  // elements whose sums are added up before they meet those of other chunks
constexpr int64_t kGrain = 2;      // chunks that are worth a thread

constexpr int64_t kPastCaches = 8 << 20;  // bytes of a gradient that is written past the caches, as it would fill them

inline int64_t chunks_of(int64_t n) { return (n + kChunk - 1) / kChunk; }

// Calls body(row, chunk, begin, end) for every chunk of every row of n elements, on all threads.
template <class Body>
void for_each_chunk(int64_t rows, int64_t n, const Body& body) {
  const int64_t chunks = chunks_of(n);
  torch::stable::parallel_for(0, rows * chunks, kGrain, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const int64_t row = task / chunks, chunk = task % chunks;
      body(row, chunk, chunk * kChunk, std::min((chunk + 1) * kChunk, n));
    }
  });
}

// The elements from `first` on.
inline const char* elements_from(const Tensor& tensor, Storage storage, int64_t first) {
  return static_cast<const char*>(tensor.const_data_ptr()) + first * bytes_of(storage);
}

// A contiguous tensor of NaN, so that a number that is not written shows.
inline Tensor nan_float32(const Tensor& beside, const int64_t* sizes, int dims) {
  Tensor result = new_contiguous(beside, dims, sizes, aoti_torch_dtype_float32());
  std::fill_n(static_cast<float*>(result.mutable_data_ptr()), result.numel(), std::numeric_limits<float>::quiet_NaN());
  return result;
}

}  // namespace fastinvdpo
