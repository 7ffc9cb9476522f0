// The CUDA kernel of affine_step, without PyTorch.
#pragma once

#include "cuda_device.h"
#include "philox.h"

namespace fastinvdpo {

constexpr int kMaxOutputs = 4;

struct StepArguments {
  Work work;
  const void* sample;
  const void* output[kMaxOutputs];
  void* result;
  Storage sample_storage, output_storage[kMaxOutputs];
  int outputs;
  const float* coefficients;  // (rows, 1 + outputs)
  const bool* active;         // (rows,), or null
  const float* noise_scale;   // (rows,)
  const int64_t* noise_index; // (rows,), or null: the row
  uint64_t seed;
  uint32_t offset;
};

// The normal numbers of one Philox block: elements 4·block … 4·block + 3 of the stream (fastinvdpo/ops/philox.py).
__device__ __forceinline__ void normal_block(uint64_t seed, uint32_t offset, uint64_t index, uint32_t block, float* out) {
  const PhiloxBlock bits = philox(seed, offset, index, block);
  constexpr float kStep = 1.0f / 8388608.0f;
#pragma unroll
  for (int half = 0; half < 4; half += 2) {
    const float u = (static_cast<float>(bits.word[half] >> 9) + 0.5f) * kStep;
    const float turn = (static_cast<float>(bits.word[half + 1] >> 9) + 0.5f) * kStep;
    const float radius = sqrtf(-2.0f * logf(u));
    float sine, cosine;
    sincospif(2.0f * turn, &sine, &cosine);
    out[half] = radius * cosine;
    out[half + 1] = radius * sine;
  }
}

// Bounds the number of outputs at compile time; groups that a thread has in flight for each tensor.
__host__ __device__ constexpr int groups_at_once(int most_outputs, bool noise) {
  return noise ? 1 : most_outputs == 1 ? 4 : most_outputs == 2 ? 2 : 1;
}

template <class T, int kMost, bool kNoise>
struct Step {
  static constexpr int kGroup = Row<T>::kGroup;
  const StepArguments& a;
  Row<T> sample, result;
  float coefficient[1 + kMost], noise_scale;
  uint64_t stream;
  int64_t first;

  __device__ Step(const StepArguments& arguments, int64_t row)
      : a(arguments),
        sample(a.sample, a.sample_storage, row * a.work.n),
        result(a.result, a.sample_storage, row * a.work.n),
        noise_scale(0),
        stream(0),
        first(row * a.work.n) {
    const float* table = a.coefficients + row * (1 + a.outputs);
    coefficient[0] = table[0];
#pragma unroll
    for (int j = 0; j < kMost; ++j) coefficient[1 + j] = j < a.outputs ? table[1 + j] : 0.0f;
    if (kNoise) {
      noise_scale = a.noise_scale[row];
      stream = static_cast<uint64_t>(a.noise_index != nullptr ? a.noise_index[row] : row);
    }
  }

  __device__ Row<T> output(int j) const { return Row<T>(a.output[j], a.output_storage[j], first); }

  // Elements in front of the groups; −1 when the tensors' groups, or the noise's, do not start together.
  __device__ int64_t head() const {
    const int64_t head = elements_to_boundary(sample);
    bool grouped = on_boundary(sample, head) && on_boundary(result, head) && !(kNoise && head % 4 != 0);
#pragma unroll
    for (int j = 0; j < kMost; ++j) {
      if (j < a.outputs) grouped = grouped && on_boundary(output(j), head);
    }
    return grouped ? head : -1;
  }

  __device__ float at(int64_t element) const {
    float sum = coefficient[0] * sample.at(element);
#pragma unroll
    for (int j = 0; j < kMost; ++j) {
      if (j < a.outputs) sum += coefficient[1 + j] * output(j).at(element);
    }
    if (kNoise) {
      float noise[4];
      normal_block(a.seed, a.offset, stream, static_cast<uint32_t>(element / 4), noise);
      const int lane = static_cast<int>(element % 4);
      sum += noise_scale * (lane == 0 ? noise[0] : lane == 1 ? noise[1] : lane == 2 ? noise[2] : noise[3]);
    }
    return sum;
  }

  // kCount groups, kThreads groups apart; all loads come first.
  template <int kCount>
  __device__ void groups_at(int64_t element) const {
    uint4 x[kCount], o[kMost][kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      x[u] = sample.load(element + u * kThreads * kGroup);
#pragma unroll
      for (int j = 0; j < kMost; ++j) {
        o[j][u] = make_uint4(0, 0, 0, 0);
        if (j < a.outputs) o[j][u] = output(j).load(element + u * kThreads * kGroup);
      }
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      float sum[kGroup];
      sample.unpack(x[u], sum);
#pragma unroll
      for (int e = 0; e < kGroup; ++e) sum[e] *= coefficient[0];
#pragma unroll
      for (int j = 0; j < kMost; ++j) {
        if (j >= a.outputs) break;
        float value[kGroup];
        output(j).unpack(o[j][u], value);
#pragma unroll
        for (int e = 0; e < kGroup; ++e) sum[e] += coefficient[1 + j] * value[e];
      }
      if (kNoise) {
        const uint32_t block = static_cast<uint32_t>((element + u * kThreads * kGroup) / 4);
#pragma unroll
        for (int quarter = 0; quarter < kGroup / 4; ++quarter) {
          float noise[4];
          normal_block(a.seed, a.offset, stream, block + quarter, noise);
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[4 * quarter + e] += noise_scale * noise[e];
        }
      }
      result.store(element + u * kThreads * kGroup, sum);
    }
  }
};

// A row that is not active, bit for bit.
template <class T>
__device__ __forceinline__ void copy_range(const Row<T>& from, const Row<T>& to, Range range) {
  const int64_t bytes = from.bytes(), size = (range.end - range.begin) * bytes;
  const char* source = from.data + range.begin * bytes;
  char* target = to.data + range.begin * bytes;
  int64_t done = 0;
  if ((reinterpret_cast<uint64_t>(source) | reinterpret_cast<uint64_t>(target)) % 16 == 0) {
    done = size / 16 * 16;
    for (int64_t i = threadIdx.x * 16; i < done; i += kThreads * 16) {
      __stcs(reinterpret_cast<uint4*>(target + i), __ldg(reinterpret_cast<const uint4*>(source + i)));
    }
  }
  for (int64_t i = done + threadIdx.x * 2; i < size; i += kThreads * 2) {
    *reinterpret_cast<uint16_t*>(target + i) = *reinterpret_cast<const uint16_t*>(source + i);
  }
}

template <class T, int kMost, bool kNoise>
__global__ void __launch_bounds__(kThreads, 4) affine_step_kernel(const StepArguments a) {
  constexpr int kGroup = Row<T>::kGroup, kAtOnce = groups_at_once(kMost, kNoise);
  for (int64_t task = blockIdx.x; task < a.work.tasks(); task += gridDim.x) {
    const int64_t row = task / a.work.spans, span = task % a.work.spans;
    const Step<T, kMost, kNoise> step(a, row);
    if (a.active != nullptr && !a.active[row]) {
      copy_range(step.sample, step.result, chunk_range(a.work, span, 0, 0));
      continue;
    }
    const int64_t head = step.head();
    const Range range = chunk_range(a.work, span, 0, head > 0 ? head : 0);
    const auto scalar = [&](int64_t begin, int64_t end) {
#pragma unroll 1
      for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) step.result.put(i, step.at(i));
    };
    if (head < 0) {
      scalar(range.begin, range.end);
      continue;
    }
    int64_t begin = range.begin;
    if (begin == 0) {
      begin = head < range.end ? head : range.end;
      scalar(0, begin);
    }
    const int groups = static_cast<int>((range.end - begin) / kGroup);
    int group = threadIdx.x;
#pragma unroll 1
    for (; group + (kAtOnce - 1) * kThreads < groups; group += kAtOnce * kThreads) {
      step.template groups_at<kAtOnce>(begin + static_cast<int64_t>(group) * kGroup);
    }
#pragma unroll 1
    for (; group < groups; group += kThreads) step.template groups_at<1>(begin + static_cast<int64_t>(group) * kGroup);
    scalar(begin + static_cast<int64_t>(groups) * kGroup, range.end);
  }
}

}  // namespace fastinvdpo
