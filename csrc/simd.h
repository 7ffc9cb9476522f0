// Vectors of 16 floats, and the conversions to and from storage. Included once per instruction set, inside its namespace and its
// target region, hence no include guard: FID_F16C says whether the region has the half-precision conversions.

typedef float vf __attribute__((vector_size(64)));
typedef uint32_t vu32 __attribute__((vector_size(64)));
typedef int32_t vi32 __attribute__((vector_size(64)));
typedef uint16_t vu16 __attribute__((vector_size(32)));

static constexpr int kLanes = 16;

static inline vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

static inline vf from_bfloat16(const uint16_t* p) {
  vu16 half;
  __builtin_memcpy(&half, p, sizeof half);
  const vu32 bits = __builtin_convertvector(half, vu32) << 16;
  return (vf)bits;
}

static inline void to_bfloat16(uint16_t* p, vf v) {
  const vu32 bits = (vu32)v;
  const vu32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest even
  const vu32 nan = (vu32)(v != v);
  const vu16 half = __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), vu16);
  __builtin_memcpy(p, &half, sizeof half);
}

static inline vf from_float16(const uint16_t* p) {
  vf v;
#if FID_F16C
  const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  __builtin_memcpy(&v, &low, 32);
  __builtin_memcpy(reinterpret_cast<char*>(&v) + 32, &high, 32);
#else
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = torch::headeronly::detail::fp16_ieee_to_fp32_value(p[lane]);
#endif
  return v;
}

static inline void to_float16(uint16_t* p, vf v) {
#if FID_F16C
  __m256 low, high;
  __builtin_memcpy(&low, &v, 32);
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + 32, 32);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes; ++lane) p[lane] = torch::headeronly::detail::fp16_ieee_from_fp32_value(v[lane]);
#endif
}

// Elements [begin, begin + count) of a row as floats: the row itself, or converted into `buffer`.
static inline const float* widen(const void* row, Storage storage, int64_t begin, int64_t count, float* buffer) {
  if (storage == Storage::kFloat32) return static_cast<const float*>(row) + begin;
  const uint16_t* source = static_cast<const uint16_t*>(row) + begin;
  int64_t i = 0;
  if (storage == Storage::kBFloat16) {
    for (; i + kLanes <= count; i += kLanes) store(buffer + i, from_bfloat16(source + i));
  } else {
    for (; i + kLanes <= count; i += kLanes) store(buffer + i, from_float16(source + i));
  }
  if (i < count) {
    uint16_t tail[kLanes] = {};
    __builtin_memcpy(tail, source + i, (count - i) * sizeof(uint16_t));
    float wide[kLanes];
    store(wide, storage == Storage::kBFloat16 ? from_bfloat16(tail) : from_float16(tail));
    __builtin_memcpy(buffer + i, wide, (count - i) * sizeof(float));
  }
  return buffer;
}

// The reverse: `count` floats rounded into elements [begin, begin + count) of a row of half precision.
static inline void narrow(void* row, Storage storage, int64_t begin, int64_t count, const float* values) {
  uint16_t* target = static_cast<uint16_t*>(row) + begin;
  int64_t i = 0;
  if (storage == Storage::kBFloat16) {
    for (; i + kLanes <= count; i += kLanes) to_bfloat16(target + i, load(values + i));
  } else {
    for (; i + kLanes <= count; i += kLanes) to_float16(target + i, load(values + i));
  }
  if (i < count) {
    float wide[kLanes] = {};
    __builtin_memcpy(wide, values + i, (count - i) * sizeof(float));
    uint16_t tail[kLanes];
    if (storage == Storage::kBFloat16) {
      to_bfloat16(tail, load(wide));
    } else {
      to_float16(tail, load(wide));
    }
    __builtin_memcpy(target + i, tail, (count - i) * sizeof(uint16_t));
  }
}
