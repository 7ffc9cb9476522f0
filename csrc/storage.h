// Storage types of latents and predictions, for host and device. All arithmetic is float32.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define FID_STORAGE_FUNCTION __host__ __device__ constexpr
#else
#define FID_STORAGE_FUNCTION constexpr
#endif

namespace fastinvdpo {

enum class Storage : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

FID_STORAGE_FUNCTION int64_t bytes_of(Storage storage) { return storage == Storage::kFloat32 ? 4 : 2; }

}  // namespace fastinvdpo
