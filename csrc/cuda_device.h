// What device code needs of the CUDA language, and reading and writing rows of any storage type 16 bytes at a time. Knows nothing of
// PyTorch. With FASTINVDPO_EMULATE_CUDA the language comes from a header that runs kernels on the host, for tests.
#pragma once

#ifdef FASTINVDPO_EMULATE_CUDA
#include "cuda_emulation.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define FID_SHARED(Type, name) __shared__ Type name
#endif

#include "cuda_work.h"
#include "storage.h"

namespace fastinvdpo {

#ifndef FASTINVDPO_EMULATE_CUDA

__device__ __forceinline__ float2 unpack_half2(uint32_t bits) {
  __half2_raw raw;
  raw.x = static_cast<unsigned short>(bits);
  raw.y = static_cast<unsigned short>(bits >> 16);
  return __half22float2(__half2(raw));
}

__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  const __half2_raw raw = __floats2half2_rn(low, high);
  return static_cast<uint32_t>(raw.y) << 16 | raw.x;
}

__device__ __forceinline__ uint32_t pack_bfloat2(float low, float high) {
  const __nv_bfloat162_raw raw = __floats2bfloat162_rn(low, high);
  return static_cast<uint32_t>(raw.y) << 16 | raw.x;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
__device__ __forceinline__ int cluster_rank() { return static_cast<int>(cooperative_groups::this_cluster().block_rank()); }
__device__ __forceinline__ void cluster_sync() { cooperative_groups::this_cluster().sync(); }
template <class T>
__device__ __forceinline__ T* in_block(T* shared, int rank) {  // the same shared variable in another block of the cluster
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}
#else
constexpr bool kHasClusters = false;  // their kernels are left empty, and never launched
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_sync() {}
template <class T>
__device__ __forceinline__ T* in_block(T* shared, int) {
  return shared;
}
#endif

#endif  // FASTINVDPO_EMULATE_CUDA

__device__ __forceinline__ float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

__device__ __forceinline__ uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Storage types as template arguments, besides float. Half precision comes in pairs of 32 bits.
struct BFloat16 {
  static __device__ __forceinline__ void unpack(uint32_t bits, float* out) {
    out[0] = bits_to_float(bits << 16);
    out[1] = bits_to_float(bits & 0xffff0000u);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_bfloat2(low, high); }
};

struct Float16 {
  static __device__ __forceinline__ void unpack(uint32_t bits, float* out) {
    const float2 pair = unpack_half2(bits);
    out[0] = pair.x;
    out[1] = pair.y;
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) { return pack_half2(low, high); }
};

struct Any {};  // known at run time only

// Reads through the cache for data that nobody writes while the kernel runs, unless the kernel may write there.
template <bool kWritten, class V>
__device__ __forceinline__ V fetch(const V* address) {
  return kWritten ? __ldcg(address) : __ldg(address);
}

// One row of a tensor, of half precision here. Elements travel in groups of kGroup: 16 bytes, or 8 for a half-precision tensor of type
// Any, whose groups have the four elements of a float32 group. kWritten: the kernel may write the row, or another of the same memory.
template <class T, bool kWritten = false>
struct Row {
  static constexpr int kGroup = 8;
  char* data;

  __device__ Row(const void* tensor, Storage, int64_t first) : data((char*)tensor + first * 2) {}
  __device__ int bytes() const { return 2; }
  __device__ uint4 load(int64_t element) const { return fetch<kWritten>(reinterpret_cast<const uint4*>(data + element * 2)); }
  __device__ float at(int64_t element) const {
    float pair[2];
    T::unpack(fetch<kWritten>(reinterpret_cast<const unsigned short*>(data) + element), pair);
    return pair[0];
  }
  __device__ void unpack(uint4 raw, float* out) const {
    T::unpack(raw.x, out), T::unpack(raw.y, out + 2), T::unpack(raw.z, out + 4), T::unpack(raw.w, out + 6);
  }
  __device__ void store(int64_t element, const float* v) const {
    __stcs(reinterpret_cast<uint4*>(data + element * 2),
           make_uint4(T::pack(v[0], v[1]), T::pack(v[2], v[3]), T::pack(v[4], v[5]), T::pack(v[6], v[7])));
  }
  __device__ void put(int64_t element, float value) const {
    reinterpret_cast<unsigned short*>(data)[element] = static_cast<unsigned short>(T::pack(value, 0.0f));
  }
};

template <bool kWritten>
struct Row<float, kWritten> {
  static constexpr int kGroup = 4;
  char* data;

  __device__ Row(const void* tensor, Storage, int64_t first) : data((char*)tensor + first * 4) {}
  __device__ int bytes() const { return 4; }
  __device__ uint4 load(int64_t element) const { return fetch<kWritten>(reinterpret_cast<const uint4*>(data + element * 4)); }
  __device__ float at(int64_t element) const { return fetch<kWritten>(reinterpret_cast<const float*>(data) + element); }
  __device__ void unpack(uint4 raw, float* out) const {
    out[0] = bits_to_float(raw.x), out[1] = bits_to_float(raw.y), out[2] = bits_to_float(raw.z), out[3] = bits_to_float(raw.w);
  }
  __device__ void store(int64_t element, const float* v) const {
    __stcs(reinterpret_cast<uint4*>(data + element * 4),
           make_uint4(float_to_bits(v[0]), float_to_bits(v[1]), float_to_bits(v[2]), float_to_bits(v[3])));
  }
  __device__ void put(int64_t element, float value) const { reinterpret_cast<float*>(data)[element] = value; }
};

template <bool kWritten>
struct Row<Any, kWritten> {
  static constexpr int kGroup = 4;
  char* data;
  Storage storage;

  __device__ Row(const void* tensor, Storage type, int64_t first) : data((char*)tensor + first * bytes_of(type)), storage(type) {}
  __device__ bool wide() const { return storage == Storage::kFloat32; }
  __device__ int bytes() const { return wide() ? 4 : 2; }
  // One product for all types: addresses that differ by type cost registers in loops.
  __device__ char* address(int64_t element) const { return data + element * bytes(); }
  __device__ uint4 load(int64_t element) const {
    if (wide()) return fetch<kWritten>(reinterpret_cast<const uint4*>(address(element)));
    const uint2 half = fetch<kWritten>(reinterpret_cast<const uint2*>(address(element)));
    return make_uint4(half.x, half.y, 0, 0);
  }
  __device__ float at(int64_t element) const {
    const char* where = address(element);
    if (wide()) return Row<float, kWritten>(where, storage, 0).at(0);
    return storage == Storage::kBFloat16 ? Row<BFloat16, kWritten>(where, storage, 0).at(0) : Row<Float16, kWritten>(where, storage, 0).at(0);
  }
  __device__ void unpack(uint4 raw, float* out) const {
    if (wide()) {
      Row<float, kWritten>(data, storage, 0).unpack(raw, out);
    } else if (storage == Storage::kBFloat16) {
      BFloat16::unpack(raw.x, out), BFloat16::unpack(raw.y, out + 2);
    } else {
      Float16::unpack(raw.x, out), Float16::unpack(raw.y, out + 2);
    }
  }
  __device__ void store(int64_t element, const float* v) const {
    if (wide()) {
      Row<float, kWritten>(address(element), storage, 0).store(0, v);
    } else {
      const bool brain = storage == Storage::kBFloat16;
      __stcs(reinterpret_cast<uint2*>(address(element)), brain ? make_uint2(BFloat16::pack(v[0], v[1]), BFloat16::pack(v[2], v[3]))
                                                                : make_uint2(Float16::pack(v[0], v[1]), Float16::pack(v[2], v[3])));
    }
  }
  __device__ void put(int64_t element, float value) const {
    if (wide()) {
      Row<float, kWritten>(address(element), storage, 0).put(0, value);
    } else if (storage == Storage::kBFloat16) {
      Row<BFloat16, kWritten>(address(element), storage, 0).put(0, value);
    } else {
      Row<Float16, kWritten>(address(element), storage, 0).put(0, value);
    }
  }
};

// A number as a type, for loops that the compiler is to unroll.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

template <class T, bool kWritten>
__device__ __forceinline__ int64_t elements_to_boundary(const Row<T, kWritten>& row) {
  return elements_to_boundary(reinterpret_cast<uint64_t>(row.data), row.bytes(), Row<T>::kGroup);
}

template <class T, bool kWritten>
__device__ __forceinline__ bool on_boundary(const Row<T, kWritten>& row, int64_t head) {
  return on_boundary(reinterpret_cast<uint64_t>(row.data), row.bytes(), Row<T>::kGroup, head);
}

}  // namespace fastinvdpo
