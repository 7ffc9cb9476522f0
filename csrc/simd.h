// Vectors as wide as the instruction set's registers, and the conversions to and from storage. Included once per instruction set,
// inside its namespace and its target region, hence no include guard. FID_VECTOR: the width in bytes; 32 and 64 are AVX2 and AVX-512,
// which have the half-precision conversions. (Wider vectors than the registers would be kept in memory.)

typedef float vf __attribute__((vector_size(FID_VECTOR)));
typedef double vd __attribute__((vector_size(FID_VECTOR)));
typedef uint32_t vu32 __attribute__((vector_size(FID_VECTOR)));
typedef int32_t vi32 __attribute__((vector_size(FID_VECTOR)));
typedef uint64_t vu64 __attribute__((vector_size(FID_VECTOR)));
typedef uint16_t vu16 __attribute__((vector_size(FID_VECTOR / 2)));
typedef float vf_half __attribute__((vector_size(FID_VECTOR / 2)));

static constexpr int kLanes = FID_VECTOR / 4;

static inline vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

// a·b + c. Written as two operations, the compiler would choose which of several products to round, here so and there so.
static inline vf multiply_add(vf a, vf b, vf c) {
#if FID_VECTOR == 64
  return (vf)_mm512_maskz_fmadd_ps(0xffff, (__m512)a, (__m512)b, (__m512)c);
#elif FID_VECTOR == 32
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
  for (int lane = 0; lane < kLanes; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return c;
#else
  return a * b + c;
#endif
}

static inline vf multiply_add(float a, vf b, vf c) { return multiply_add(a - vf{}, b, c); }

static inline float multiply_add(float a, float b, float c) {
#if FID_VECTOR >= 32 || defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

static inline vf from_bfloat16(const uint16_t* p) {
  vu16 half;
  __builtin_memcpy(&half, p, sizeof half);
  const vu32 bits = __builtin_convertvector(half, vu32) << 16;
  return (vf)bits;
}

// Rounded to nearest even; the upper half of each word counts.
static inline vu32 round_to_bfloat16(vf v) {
  const vu32 bits = (vu32)v, nan = (vu32)(v != v);
  return (nan & 0x7fc00000u) | (~nan & (bits + 0x7fffu + ((bits >> 16) & 1u)));
}

static inline void to_bfloat16(uint16_t* p, vf v) {
  const vu16 half = __builtin_convertvector(round_to_bfloat16(v) >> 16, vu16);
  __builtin_memcpy(p, &half, sizeof half);
}

static inline vf from_float16(const uint16_t* p) {
#if FID_VECTOR == 64
  return (vf)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif FID_VECTOR == 32
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf v;
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = torch::headeronly::detail::fp16_ieee_to_fp32_value(p[lane]);
  return v;
#endif
}

static inline void to_float16(uint16_t* p, vf v) {
#if FID_VECTOR == 64
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif FID_VECTOR == 32
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes; ++lane) p[lane] = torch::headeronly::detail::fp16_ieee_from_fp32_value(v[lane]);
#endif
}

// A vector of a row's elements, from element `at` on.
template <Storage kStorage>
static inline vf load_from(const void* row, int64_t at) {
  if (kStorage == Storage::kFloat32) return load(static_cast<const float*>(row) + at);
  const uint16_t* half = static_cast<const uint16_t*>(row) + at;
  return kStorage == Storage::kBFloat16 ? from_bfloat16(half) : from_float16(half);
}

template <Storage kStorage>
static inline void store_to(void* row, int64_t at, vf v) {
  if (kStorage == Storage::kFloat32) return store(static_cast<float*>(row) + at, v);
  uint16_t* half = static_cast<uint16_t*>(row) + at;
  kStorage == Storage::kBFloat16 ? to_bfloat16(half, v) : to_float16(half, v);
}

// Two vectors of a row's elements: neighbors, or, for bfloat16, every other element each, which needs no shuffling.
template <Storage kStorage, bool kAlternate>
static inline void load_two(const void* row, int64_t at, vf* two) {
  if (kAlternate) {
    vu32 words;
    __builtin_memcpy(&words, static_cast<const uint16_t*>(row) + at, sizeof words);
    two[0] = (vf)(words << 16);
    two[1] = (vf)(words & 0xffff0000u);
  } else {
    two[0] = load_from<kStorage>(row, at);
    two[1] = load_from<kStorage>(row, at + kLanes);
  }
}

// Two vectors rounded to bfloat16, in the lower and the upper halves of words.
static inline vu32 round_two_to_bfloat16(vf low, vf high) {
#if FID_VECTOR == 32
  if (_mm256_movemask_ps(_mm256_cmp_ps((__m256)low, (__m256)high, _CMP_UNORD_Q)) == 0) {
    const __m256i a = (__m256i)low, b = (__m256i)high;
    const __m256i kept = _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa);
    const __m256i dropped = _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa);
    // One more where more than a half is dropped, or just a half of an odd number.
    const __m256i even = _mm256_andnot_si256(kept, _mm256_set1_epi16(1));
    return (vu32)_mm256_add_epi16(kept, _mm256_srli_epi16(_mm256_subs_epu16(dropped, even), 15));
  }
#endif
  return (round_to_bfloat16(low) >> 16) | (round_to_bfloat16(high) & 0xffff0000u);
}

template <Storage kStorage, bool kAlternate>
static inline void store_two(void* row, int64_t at, const vf* two) {
  if (kAlternate) {
    const vu32 words = round_two_to_bfloat16(two[0], two[1]);
    __builtin_memcpy(static_cast<uint16_t*>(row) + at, &words, sizeof words);
  } else {
    store_to<kStorage>(row, at, two[0]);
    store_to<kStorage>(row, at + kLanes, two[1]);
  }
}

// Past the caches, so that the line that is overwritten is not read first. Where there are no such stores it is an ordinary one.
// The address is a multiple of the vector's size, and `streamed()` follows the last store.
static inline void stream(void* p, vu32 v) {
#if FID_VECTOR == 64
  _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#elif FID_VECTOR == 32
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#else
  __builtin_memcpy(p, &v, sizeof v);
#endif
}

// Other threads see what was streamed.
static inline void streamed() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

static inline bool can_stream(const void* p) { return reinterpret_cast<uintptr_t>(p) % FID_VECTOR == 0; }

template <Storage kStorage, bool kAlternate>
static inline void stream_two(void* row, int64_t at, const vf* two) {
  if (kStorage == Storage::kFloat32) {
    stream(static_cast<float*>(row) + at, (vu32)two[0]);
    stream(static_cast<float*>(row) + at + kLanes, (vu32)two[1]);
  } else {
    vu32 words;
    store_two<kStorage, kAlternate>(&words, 0, two);
    stream(static_cast<uint16_t*>(row) + at, words);
  }
}

// The same for fewer elements than a vector has: zeros stand for the others, which stay untouched in memory.
template <Storage kStorage>
static inline vf load_tail(const void* row, int64_t at, int64_t count) {
  char tail[kLanes * sizeof(float)] = {};
  constexpr int64_t kBytes = bytes_of(kStorage);
  __builtin_memcpy(tail, static_cast<const char*>(row) + at * kBytes, static_cast<size_t>(count * kBytes));
  return load_from<kStorage>(tail, 0);
}

template <Storage kStorage>
static inline void store_tail(void* row, int64_t at, int64_t count, vf v) {
  char tail[kLanes * sizeof(float)];
  constexpr int64_t kBytes = bytes_of(kStorage);
  store_to<kStorage>(tail, 0, v);
  __builtin_memcpy(static_cast<char*>(row) + at * kBytes, tail, static_cast<size_t>(count * kBytes));
}

// A float is added to at most this many others before the sum goes on in double.
static constexpr int64_t kFloatRun = 32;

// Sums of floats, in double.
struct Totals {
  vd low = {}, high = {};

  void add(vf v) {
    vf_half halves[2];
    __builtin_memcpy(halves, &v, sizeof v);
    low += __builtin_convertvector(halves[0], vd);
    high += __builtin_convertvector(halves[1], vd);
  }

  double sum() const {
    const vd both = low + high;
    double total = 0;
    for (int lane = 0; lane < kLanes / 2; ++lane) total += both[lane];
    return total;
  }
};

// A storage type known at run time as one known to the compiler: body(std::integral_constant<Storage, ...>).
template <class Body>
static inline void with_storage(Storage storage, const Body& body) {
  if (storage == Storage::kFloat32) return body(std::integral_constant<Storage, Storage::kFloat32>());
  if (storage == Storage::kBFloat16) return body(std::integral_constant<Storage, Storage::kBFloat16>());
  return body(std::integral_constant<Storage, Storage::kFloat16>());
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
