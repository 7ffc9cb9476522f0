// Philox4x32-10 (Salmon et al., SC 2011) with the counter layout of fastinvdpo/ops/philox.py, for host and device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FID_PHILOX_INLINE __host__ __device__ __forceinline__
#else
#define FID_PHILOX_INLINE inline
#endif

namespace fastinvdpo {

struct PhiloxBlock {
  uint32_t word[4];
};

FID_PHILOX_INLINE PhiloxBlock philox(uint64_t seed, uint32_t offset, uint64_t index, uint32_t block) {
  uint32_t c0 = block, c1 = offset, c2 = static_cast<uint32_t>(index), c3 = static_cast<uint32_t>(index >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastinvdpo
