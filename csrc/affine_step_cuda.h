// The CUDA kernels of affine_step and of its backward, without PyTorch.
#pragma once

#include "affine_step.h"
#include "cuda_device.h"
#include "philox.h"

namespace fastinvdpo {

struct StepLaunch {
  Work work;
  StepArguments step;
};

struct StepBackwardLaunch {
  Work work;
  StepBackwardArguments step;
};

template <class R>
__device__ __forceinline__ R row_of(const Samples& tensor, int64_t row) {
  return R(tensor.data, tensor.storage, row * tensor.pitch);
}

// A row of another storage type than the kernel's, written in groups of kGroup elements.
template <int kGroup>
struct OtherRow {
  Row<Any> row;

  __device__ bool on_boundary(int64_t head) const {
    const int group = kGroup == 8 && row.wide() ? 4 : kGroup;
    return fastinvdpo::on_boundary(reinterpret_cast<uint64_t>(row.data), row.bytes(), group, head);
  }
  __device__ void store(int64_t element, const float* v) const {
    if (kGroup == 4 || row.wide()) {
#pragma unroll
      for (int e = 0; e < kGroup; e += 4) row.store(element + e, v + e);
    } else if (row.storage == Storage::kBFloat16) {
      Row<BFloat16>(row.data, row.storage, 0).store(element, v);
    } else {
      Row<Float16>(row.data, row.storage, 0).store(element, v);
    }
  }
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
  using Input = Row<T, true>;  // the result may be its memory
  const StepArguments& a;
  int64_t row;
  Input sample;
  Row<T> result;
  float coefficient[1 + kMost], noise_scale;
  uint64_t stream;

  __device__ Step(const StepArguments& arguments, int64_t index)
      : a(arguments), row(index), sample(row_of<Input>(a.sample, row)), result(row_of<Row<T>>(a.result, row)), noise_scale(0), stream(0) {
    const float* table = a.coefficients + row * (1 + a.outputs);
    coefficient[0] = table[0];
#pragma unroll
    for (int j = 0; j < kMost; ++j) coefficient[1 + j] = j < a.outputs ? table[1 + j] : 0.0f;
    if (kNoise) {
      noise_scale = a.noise_scale[row];
      stream = static_cast<uint64_t>(a.noise_index != nullptr ? a.noise_index[row] : row);
    }
  }

  __device__ Input output(int j) const { return row_of<Input>(a.output[j], row); }
  __device__ bool stored() const { return a.trajectory.data != nullptr; }
  __device__ OtherRow<kGroup> trajectory() const { return {row_of<Row<Any>>(a.trajectory, row)}; }

  // Elements in front of the groups; −1 when the tensors' groups, or the noise's, do not start together.
  __device__ int64_t head() const {
    const int64_t head = elements_to_boundary(sample);
    bool grouped = on_boundary(sample, head) && on_boundary(result, head) && !(kNoise && head % 4 != 0);
    if (stored()) grouped = grouped && trajectory().on_boundary(head);
#pragma unroll
    for (int j = 0; j < kMost; ++j) {
      if (j < a.outputs) grouped = grouped && on_boundary(output(j), head);
    }
    return grouped ? head : -1;
  }

  __device__ void at(int64_t element) const {
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
    result.put(element, sum);
    if (stored()) trajectory().row.put(element, sum);
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
      if (stored()) trajectory().store(element + u * kThreads * kGroup, sum);
    }
  }

  // A row that is not active: the result bit for bit, the trajectory converted.
  __device__ void rest(Range range) const {
    if (sample.data != result.data) copy_range(sample, result, range);
    if (!stored()) return;
    const OtherRow<kGroup> to = trajectory();
    int64_t done = range.begin;
    if (on_boundary(sample, range.begin) && to.on_boundary(range.begin)) {
      const int groups = static_cast<int>((range.end - range.begin) / kGroup);
#pragma unroll 1
      for (int group = threadIdx.x; group < groups; group += kThreads) {
        float value[kGroup];
        sample.unpack(sample.load(range.begin + group * kGroup), value);
        to.store(range.begin + group * kGroup, value);
      }
      done += groups * kGroup;
    }
#pragma unroll 1
    for (int64_t i = done + threadIdx.x; i < range.end; i += kThreads) to.row.put(i, sample.at(i));
  }

  __device__ static void copy_range(const Input& from, const Row<T>& to, Range range) {
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
};

// Calls scalar(begin, end) for the elements that no groups hold, and groups<count>(element), by all threads.
template <int kGroup, int kAtOnce, class Scalar, class Grouped>
__device__ __forceinline__ void for_groups(Range range, int64_t head, const Scalar& scalar, const Grouped& grouped) {
  if (head < 0) {
    scalar(range.begin, range.end);
    return;
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
    grouped(Constant<kAtOnce>(), begin + static_cast<int64_t>(group) * kGroup);
  }
#pragma unroll 1
  for (; group < groups; group += kThreads) grouped(Constant<1>(), begin + static_cast<int64_t>(group) * kGroup);
  scalar(begin + static_cast<int64_t>(groups) * kGroup, range.end);
}

template <class T, int kMost, bool kNoise>
__global__ void __launch_bounds__(kThreads, 3) affine_step_kernel(const StepLaunch a) {
  for (int64_t task = blockIdx.x; task < a.work.tasks(); task += gridDim.x) {
    const int64_t row = task / a.work.spans, span = task % a.work.spans;
    const Step<T, kMost, kNoise> step(a.step, row);
    if (a.step.active != nullptr && !a.step.active[row]) {
      step.rest(chunk_range(a.work, span, 0, 0));
      continue;
    }
    const int64_t head = step.head();
    for_groups<Row<T>::kGroup, groups_at_once(kMost, kNoise)>(
        chunk_range(a.work, span, 0, head > 0 ? head : 0), head,
        [&](int64_t begin, int64_t end) {
#pragma unroll 1
          for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) step.at(i);
        },
        [&](auto count, int64_t element) { step.template groups_at<decltype(count)::value>(element); });
  }
}

// The gradients of one row.
template <class T>
struct StepBackward {
  static constexpr int kGroup = Row<T>::kGroup, kMost = 1 + kMaxOutputs;
  const StepBackwardArguments& a;
  int64_t row;
  Row<T> grad;
  bool moving;
  float factor[kMost];

  __device__ StepBackward(const StepBackwardArguments& arguments, int64_t index)
      : a(arguments), row(index), grad(row_of<Row<T>>(a.grad, row)), moving(a.active == nullptr || a.active[row]) {
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      factor[k] = moving && k < a.gradients ? a.coefficients[row * a.columns + a.column[k]] : 1.0f;
    }
  }

  __device__ Row<T> gradient(int k) const { return row_of<Row<T>>(a.gradient[k], row); }
  __device__ bool quiet(int k) const { return !moving && a.column[k] != 0; }  // an output of a sample at rest

  __device__ int64_t head() const {
    const int64_t head = elements_to_boundary(gradient(0));
    bool grouped = a.constant || on_boundary(grad, head);
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      if (k < a.gradients) grouped = grouped && on_boundary(gradient(k), head);
    }
    return grouped ? head : -1;
  }

  __device__ void at(int64_t element) const {
    const float g = grad.at(a.constant ? 0 : element);
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      if (k < a.gradients) gradient(k).put(element, quiet(k) ? 0.0f : factor[k] * g);
    }
  }

  template <int kCount>
  __device__ void groups_at(int64_t element) const {
    uint4 raw[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      raw[u] = make_uint4(0, 0, 0, 0);
      if (!a.constant) raw[u] = grad.load(element + u * kThreads * kGroup);
    }
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      float g[kGroup];
      grad.unpack(raw[u], g);
      if (a.constant) {
        const float value = grad.at(0);
#pragma unroll
        for (int e = 0; e < kGroup; ++e) g[e] = value;
      }
#pragma unroll
      for (int k = 0; k < kMost; ++k) {
        if (k >= a.gradients) break;
        float product[kGroup];
#pragma unroll
        for (int e = 0; e < kGroup; ++e) product[e] = quiet(k) ? 0.0f : factor[k] * g[e];
        gradient(k).store(element + u * kThreads * kGroup, product);
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4) affine_step_backward_kernel(const StepBackwardLaunch a) {
  for (int64_t task = blockIdx.x; task < a.work.tasks(); task += gridDim.x) {
    const int64_t span = task % a.work.spans;
    const StepBackward<T> step(a.step, task / a.work.spans);
    const int64_t head = step.head();
    for_groups<Row<T>::kGroup, 2>(
        chunk_range(a.work, span, 0, head > 0 ? head : 0), head,
        [&](int64_t begin, int64_t end) {
#pragma unroll 1
          for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) step.at(i);
        },
        [&](auto count, int64_t element) { step.template groups_at<decltype(count)::value>(element); });
  }
}

}  // namespace fastinvdpo
