// The inner loops of affine_step and of its backward. Included once per instruction set, inside its namespace and target region (see simd.h).

#include "simd.h"

static inline vf set_all(float value) { return value - (vf){}; }

static inline vf select(vi32 mask, vf yes, vf no) { return (vf)(((vi32)yes & mask) | ((vi32)no & ~mask)); }

static inline vf sqrt_lanes(vf v) {
  vf root = {};
  for (int lane = 0; lane < kLanes; ++lane) root[lane] = __builtin_sqrtf(v[lane]);
  return root;
}

// ln(u) for u in (0, 1): u = m·2^e with m in [√½, √2), and a polynomial in m − 1 of relative error below 1e-7.
static inline vf log_unit(vf u) {
  vi32 bits = (vi32)u;
  vi32 exponent = (bits >> 23) - 126;
  vf m = (vf)((bits & 0x007fffff) | 0x3f000000);  // [½, 1)
  const vi32 small = m < 0.70710678f;
  exponent += small;  // a mask is −1 where it holds
  m = select(small, m + m, m) - 1.0f;
  vf poly = m * 7.0376836292e-2f - 1.1514610310e-1f;
  poly = poly * m + 1.1676998740e-1f;
  poly = poly * m - 1.2420140846e-1f;
  poly = poly * m + 1.4249322787e-1f;
  poly = poly * m - 1.6668057665e-1f;
  poly = poly * m + 2.0000714765e-1f;
  poly = poly * m - 2.4999993993e-1f;
  poly = poly * m + 3.3333331174e-1f;
  const vf square = m * m, e = __builtin_convertvector(exponent, vf);
  return (m * square * poly + e * -2.12194440e-4f) - 0.5f * square + m + e * 0.693359375f;
}

// cos(2πu) and sin(2πu) for u in (0, 1): the nearest quarter turn is split off exactly, the rest is at most π/4.
static inline void sincos_turn(vf u, vf* cosine, vf* sine) {
  const vi32 quarter = __builtin_convertvector(u * 4.0f + 0.5f, vi32);
  const vf x = (u - __builtin_convertvector(quarter, vf) * 0.25f) * 6.28318530717958647692f;
  const vf z = x * x;
  const vf s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * x + x;
  const vf c = ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z - 0.5f * z + 1.0f;
  const vi32 swap = -(quarter & 1);
  const vf sc = select(swap, c, s), cc = select(swap, s, c);
  const vi32 sine_sign = (quarter & 2) << 30, cosine_sign = ((quarter + 1) & 2) << 30;
  *sine = (vf)((vi32)sc ^ sine_sign);
  *cosine = (vf)((vi32)cc ^ cosine_sign);
}

// The products of all lanes with a constant, high and low words.
static inline void multiply(vu32 lanes, uint32_t constant, vu32* high, vu32* low) {
  const vu64 low_word = 0xffffffffu - (vu64){};
#if FID_VECTOR == 64
  const vu64 even = (vu64)_mm512_maskz_mul_epu32(0xff, (__m512i)lanes, _mm512_set1_epi64(constant));
  const vu64 odd = (vu64)_mm512_maskz_mul_epu32(0xff, (__m512i)((vu64)lanes >> 32), _mm512_set1_epi64(constant));
#elif FID_VECTOR == 32
  const vu64 even = (vu64)_mm256_mul_epu32((__m256i)lanes, _mm256_set1_epi64x(constant));
  const vu64 odd = (vu64)_mm256_mul_epu32((__m256i)((vu64)lanes >> 32), _mm256_set1_epi64x(constant));
#else
  const vu64 even = ((vu64)lanes & low_word) * constant, odd = ((vu64)lanes >> 32) * constant;
#endif
  *high = (vu32)((even >> 32) | (odd & ~low_word));
  *low = (vu32)((even & low_word) | (odd << 32));
}

static constexpr int64_t kNormals = 4 * kLanes;  // drawn at a time

// Philox for kLanes neighboring blocks: kNormals normal numbers, in the order of the elements.
static inline void draw_normals(uint64_t seed, uint32_t offset, uint64_t index, uint32_t first_block, float* out) {
  vu32 c0 = {}, c1 = offset - (vu32){}, c2 = (uint32_t)index - (vu32){}, c3 = (uint32_t)(index >> 32) - (vu32){};
  for (int lane = 0; lane < kLanes; ++lane) c0[lane] = first_block + (uint32_t)lane;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    vu32 high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, &high0, &low0);
    multiply(c2, 0xCD9E8D57u, &high1, &low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const float scale = 1.0f / 8388608.0f;
  const vu32 words[4] = {c0, c1, c2, c3};
  for (int half = 0; half < 2; ++half) {
    const vf u = (__builtin_convertvector((vi32)(words[2 * half] >> 9), vf) + 0.5f) * scale;
    const vf turn = (__builtin_convertvector((vi32)(words[2 * half + 1] >> 9), vf) + 0.5f) * scale;
    const vf radius = sqrt_lanes(-2.0f * log_unit(u));
    vf cosine, sine;
    sincos_turn(turn, &cosine, &sine);
    const vf x = radius * cosine, y = radius * sine;
    for (int lane = 0; lane < kLanes; ++lane) {
      out[4 * lane + 2 * half] = x[lane];
      out[4 * lane + 2 * half + 1] = y[lane];
    }
  }
}

// `count` floats into elements [begin, begin + count) of a row, rounded to its storage type.
static inline void put(void* row, Storage storage, int64_t begin, int64_t count, const float* values) {
  if (storage == Storage::kFloat32) {
    __builtin_memcpy(static_cast<float*>(row) + begin, values, static_cast<size_t>(count) * sizeof(float));
  } else {
    narrow(row, storage, begin, count, values);
  }
}

// A sample that does not move: the result bit for bit, the trajectory converted.
static void rest_chunk(const StepArguments& a, int64_t i, int64_t begin, int64_t end) {
  const char* x = sample_of(a.sample, i);
  const int64_t width = bytes_of(a.sample.storage);
  char* y = sample_of(a.result, i);
  if (y != x) std::memcpy(y + begin * width, x + begin * width, static_cast<size_t>((end - begin) * width));
  if (a.trajectory.data == nullptr) return;
  float wide[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    put(sample_of(a.trajectory, i), a.trajectory.storage, at, count, widen(x, a.sample.storage, at, count, wide));
  }
}

// Two vectors at a time in registers: outputs of one storage type, no noise.
template <Storage kSample, Storage kOutput, int kOutputs>
static void step_plainly(const StepArguments& a, int64_t i, int64_t begin, int64_t end) {
  constexpr bool kAlternate = kSample == Storage::kBFloat16 && (kOutputs == 0 || kOutput == kSample);
  const float* table = a.coefficients + i * (1 + kOutputs);
  const char* from = sample_of(a.sample, i);
  const char* output[kMaxOutputs] = {};
  for (int j = 0; j < kOutputs; ++j) output[j] = sample_of(a.output[j], i);
  char *result = sample_of(a.result, i), *trajectory = a.trajectory.data == nullptr ? nullptr : sample_of(a.trajectory, i);
  int64_t at = begin;
  // The result may be the memory that is read: every element is read before it is written.
  for (; at + 2 * kLanes <= end; at += 2 * kLanes) {
    vf sum[2];
    load_two<kSample, kAlternate>(from, at, sum);
    sum[0] *= table[0];
    sum[1] *= table[0];
#pragma GCC unroll 4
    for (int j = 0; j < kOutputs; ++j) {
      vf o[2];
      load_two<kOutput, kAlternate>(output[j], at, o);
      sum[0] = multiply_add(table[1 + j], o[0], sum[0]);
      sum[1] = multiply_add(table[1 + j], o[1], sum[1]);
    }
    store_two<kSample, kAlternate>(result, at, sum);
    if (trajectory != nullptr) store_two<kSample, kAlternate>(trajectory, at, sum);
  }
  for (; at < end; at += kLanes) {
    const int64_t left = std::min<int64_t>(end - at, kLanes);
    vf sum = table[0] * load_tail<kSample>(from, at, left);
    for (int j = 0; j < kOutputs; ++j) sum = multiply_add(table[1 + j], load_tail<kOutput>(output[j], at, left), sum);
    store_tail<kSample>(result, at, left, sum);
    if (trajectory != nullptr) store_tail<kSample>(trajectory, at, left, sum);
  }
}

// Whether step_plainly can do it, and has.
static bool stepped_plainly(const StepArguments& a, int64_t i, int64_t begin, int64_t end) {
  if (a.noise_scale != nullptr || (a.trajectory.data != nullptr && a.trajectory.storage != a.sample.storage)) return false;
  for (int j = 1; j < a.outputs; ++j) {
    if (a.output[j].storage != a.output[0].storage) return false;
  }
  with_storage(a.sample.storage, [&](auto sample) {
    if (a.outputs == 0) return step_plainly<sample(), sample(), 0>(a, i, begin, end);
    with_storage(a.output[0].storage, [&](auto output) {
      if (a.outputs == 1) return step_plainly<sample(), output(), 1>(a, i, begin, end);
      if (a.outputs == 2) return step_plainly<sample(), output(), 2>(a, i, begin, end);
      if (a.outputs == 3) return step_plainly<sample(), output(), 3>(a, i, begin, end);
      return step_plainly<sample(), output(), 4>(a, i, begin, end);
    });
  });
  return true;
}

static void step_chunk(const StepArguments& a, int64_t i, int64_t begin, int64_t end) {
  if (a.active != nullptr && !a.active[i]) {
    rest_chunk(a, i, begin, end);
    return;
  }
  if (stepped_plainly(a, i, begin, end)) return;
  float sample[kBlock], wide[kMaxOutputs][kBlock], noise[kBlock], coefficient[1 + kMaxOutputs];
  const int outputs = a.outputs;
  for (int j = 0; j <= outputs; ++j) coefficient[j] = a.coefficients[i * (1 + outputs) + j];
  const bool direct = a.sample.storage == Storage::kFloat32, noisy = a.noise_scale != nullptr;
  const float noise_scale = noisy ? a.noise_scale[i] : 0.0f;
  const uint64_t index = static_cast<uint64_t>(a.noise_index != nullptr ? a.noise_index[i] : i);
  const char* output[kMaxOutputs];
  for (int j = 0; j < outputs; ++j) output[j] = sample_of(a.output[j], i);
  const char* from = sample_of(a.sample, i);
  char* result = sample_of(a.result, i);
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t count = end - at < kBlock ? end - at : kBlock;
    const float* x = widen(from, a.sample.storage, at, count, sample);
    const float* o[kMaxOutputs];
    for (int j = 0; j < outputs; ++j) o[j] = widen(output[j], a.output[j].storage, at, count, wide[j]);
    if (noisy) {
      // Blocks start at multiples of kNormals elements, so that they hold whole Philox blocks.
      for (int64_t e = 0; e < count; e += kNormals) {
        draw_normals(a.seed, a.offset, index, static_cast<uint32_t>((at + e) / 4), noise + e);
      }
    }
    // The result may be the memory that x or an o is read from: every element is read before it is written.
    float* y = direct ? reinterpret_cast<float*>(result) + at : sample;
    int64_t e = 0;
    for (; e + kLanes <= count; e += kLanes) {
      vf sum = coefficient[0] * load(x + e);
      for (int j = 0; j < outputs; ++j) sum = multiply_add(coefficient[1 + j], load(o[j] + e), sum);
      if (noisy) sum = multiply_add(noise_scale, load(noise + e), sum);
      store(y + e, sum);
    }
    for (; e < count; ++e) {
      float sum = coefficient[0] * x[e];
      for (int j = 0; j < outputs; ++j) sum = multiply_add(coefficient[1 + j], o[j][e], sum);
      if (noisy) sum = multiply_add(noise_scale, noise[e], sum);
      y[e] = sum;
    }
    if (!direct) narrow(result, a.result.storage, at, count, y);
    if (a.trajectory.data != nullptr) put(sample_of(a.trajectory, i), a.trajectory.storage, at, count, y);
  }
}

template <Storage kGrad, Storage kGradient>
static void scale_gradient(const void* grad, void* gradient, int64_t begin, int64_t end, float factor) {
  constexpr bool kAlternate = kGrad == Storage::kBFloat16 && kGradient == kGrad;
  int64_t at = begin;
  for (; at + 2 * kLanes <= end; at += 2 * kLanes) {
    vf g[2];
    load_two<kGrad, kAlternate>(grad, at, g);
    g[0] *= factor;
    g[1] *= factor;
    store_two<kGradient, kAlternate>(gradient, at, g);
  }
  for (; at < end; at += kLanes) {
    const int64_t left = std::min<int64_t>(end - at, kLanes);
    store_tail<kGradient>(gradient, at, left, factor * load_tail<kGrad>(grad, at, left));
  }
}

static void step_backward_chunk(const StepBackwardArguments& a, int64_t i, int64_t begin, int64_t end) {
  const bool moving = a.active == nullptr || a.active[i];
  // A gradient of one number for each sample is written out for a block at a time.
  float constant[kBlock];
  char* grad = sample_of(a.grad, i);
  Storage storage = a.grad.storage;
  if (a.constant) {
    float buffer[1];
    const vf all = set_all(*widen(grad, storage, 0, 1, buffer));
    for (int64_t e = 0; e < kBlock; e += kLanes) store(constant + e, all);
    storage = Storage::kFloat32;
  }
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t to = std::min(at + kBlock, end);
    for (int k = 0; k < a.gradients; ++k) {
      const Samples& gradient = a.gradient[k];
      const int64_t width = bytes_of(gradient.storage);
      char* target = sample_of(gradient, i);
      if (!moving && a.column[k] != 0) {
        std::memset(target + at * width, 0, static_cast<size_t>((to - at) * width));
        continue;
      }
      const float factor = moving ? a.coefficients[i * a.columns + a.column[k]] : 1.0f;
      with_storage(storage, [&](auto from) {
        with_storage(gradient.storage, [&](auto into) {
          if (a.constant) return scale_gradient<from(), into()>(constant, target + at * width, 0, to - at, factor);
          scale_gradient<from(), into()>(grad, target, at, to, factor);
        });
      });
    }
  }
}
