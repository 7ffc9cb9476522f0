// How the CUDA kernels cut the batch into work: plain arithmetic for host and device, which tests run without a GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FID_WORK_INLINE __host__ __device__ __forceinline__
#else
#define FID_WORK_INLINE inline
#endif

namespace fastinvdpo {

constexpr int kThreads = 256;        // of every block
constexpr int kMaxCluster = 8;       // the largest thread-block cluster that every GPU with clusters takes
constexpr int64_t kMinChunk = 2048;  // elements: one 16-byte load of half precision for every thread of a block
constexpr int64_t kMaxReductionChunk = 65536;
constexpr int64_t kMaxElementwiseChunk = 16384;
constexpr int64_t kEnoughChunks = 1024;  // fill every GPU of today; a constant, so that sums do not depend on the GPU's size

// The batch as rows of n elements (one row per sample and timestep), every row cut into spans, every span into one chunk for each of
// the `team` blocks that work on it together: a single block, or a cluster.
struct Work {
  int64_t rows, n;
  int64_t chunk;  // elements; a multiple of kMinChunk
  int64_t spans;  // per row
  int team;

  FID_WORK_INLINE int64_t tasks() const { return rows * spans; }
};

struct Range {
  int64_t begin, end;  // elements of a row
};

FID_WORK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

FID_WORK_INLINE int64_t chunk_for(int64_t elements, int64_t largest) {
  const int64_t chunk = ceil_div(ceil_div(elements, kEnoughChunks), kMinChunk) * kMinChunk;
  return chunk < kMinChunk ? kMinChunk : chunk > largest ? largest : chunk;
}

// Work of a reduction by teams of 1, 2, 4 or 8 blocks, at most `largest_team`.
FID_WORK_INLINE Work reduction_work(int64_t rows, int64_t n, int largest_team) {
  Work work{rows, n, chunk_for(rows * n, kMaxReductionChunk), 0, 1};
  while (work.team < largest_team && work.team * work.chunk < n) work.team *= 2;
  work.spans = ceil_div(n, work.team * work.chunk);
  return work;
}

FID_WORK_INLINE Work elementwise_work(int64_t rows, int64_t n) {
  const int64_t chunk = chunk_for(rows * n, kMaxElementwiseChunk);
  return {rows, n, chunk, ceil_div(n, chunk), 1};
}

// The elements of block `rank` in span `span`. `head` elements in front of the first 16-byte boundary go to the first chunk, and all
// later chunks start that much later, so that every chunk but the first starts on a boundary.
FID_WORK_INLINE Range chunk_range(const Work& work, int64_t span, int rank, int64_t head) {
  const int64_t index = span * work.team + rank;
  const int64_t begin = index == 0 ? 0 : index * work.chunk + head, end = (index + 1) * work.chunk + head;
  return {begin < work.n ? begin : work.n, end < work.n ? end : work.n};
}

// Elements of `bytes` bytes from `address` to the next boundary of a group of `group` elements.
FID_WORK_INLINE int64_t elements_to_boundary(uint64_t address, int bytes, int group) {
  const int64_t past = static_cast<int64_t>(address / bytes % group);
  return past == 0 ? 0 : group - past;
}

// Whether groups that start `head` elements after `address` start on a boundary of their own size.
FID_WORK_INLINE bool on_boundary(uint64_t address, int bytes, int group, int64_t head) {
  return (address + static_cast<uint64_t>(head) * bytes) % (static_cast<uint64_t>(group) * bytes) == 0;
}

}  // namespace fastinvdpo
