// The part of the CUDA language that csrc's kernels use, on the host: every thread is a fiber, the blocks of a cluster run together and
// clusters one after the other, in any order. A load or store that is not aligned ends the program. Shared memory starts as NaN.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define FID_SHARED(Type, name) Type& name = *static_cast<Type*>(emulation::shared_memory(sizeof(Type)))

struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace emulation {

constexpr size_t kStack = 128 * 1024, kSharedBytes = 8192;
constexpr int kWarpSize = 32;

struct Barrier {
  int expected = 0, arrived = 0;
  uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  double slot[kWarpSize];
};

struct Block {
  int index = 0, rank = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  alignas(16) unsigned char shared[kSharedBytes];
};

struct Fiber {
  ucontext_t context;
  Block* block = nullptr;
  int thread = 0;
  bool finished = false;
};

struct Machine {
  ucontext_t scheduler;
  std::vector<Block> blocks;  // of the cluster that runs
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<unsigned char[]>> stacks;
  Barrier cluster;
  Fiber* current = nullptr;
  int grid = 0;
  std::function<void()> body;
};

inline Machine& machine() {
  static Machine instance;
  return instance;
}

struct Index {
  struct Lazy {
    int (*get)();
    operator int() const { return get(); }
  } x;
};
inline Index thread_index{{[] { return machine().current->thread; }}};
inline Index block_index{{[] { return machine().current->block->index; }}};
inline Index grid_size{{[] { return machine().grid; }}};

inline void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  const uint64_t generation = barrier.generation;
  while (barrier.generation == generation) swapcontext(&machine().current->context, &machine().scheduler);
}

// A thread that has returned is not waited for.
inline void leave(Barrier& barrier) {
  if (--barrier.expected > 0 && barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
}

inline Warp& warp() { return machine().current->block->warps[static_cast<size_t>(machine().current->thread / kWarpSize)]; }

inline void run_fiber() {
  Machine& m = machine();
  m.body();
  Fiber& self = *m.current;
  leave(warp().barrier);
  leave(self.block->barrier);
  leave(m.cluster);
  self.finished = true;
  swapcontext(&self.context, &m.scheduler);
}

inline void* shared_memory(size_t size) {
  if (size > kSharedBytes) std::abort();
  return machine().current->block->shared;
}

// Runs body() as a kernel on `grid` blocks of `threads` threads in clusters of `team` blocks; cluster i of `order` runs as the i-th.
inline void run(int grid, int threads, int team, const std::vector<int>& order, std::function<void()> body) {
  Machine& m = machine();
  m.grid = grid;
  m.body = std::move(body);
  for (const int cluster : order) {
    m.blocks.assign(static_cast<size_t>(team), Block());
    m.fibers.assign(static_cast<size_t>(team * threads), Fiber());
    m.cluster = {team * threads, 0, 0};
    while (m.stacks.size() < m.fibers.size()) m.stacks.emplace_back(new unsigned char[kStack]);
    for (int rank = 0; rank < team; ++rank) {
      Block& block = m.blocks[static_cast<size_t>(rank)];
      block.index = cluster * team + rank;
      block.rank = rank;
      block.barrier.expected = threads;
      block.warps.assign(static_cast<size_t>(threads / kWarpSize), Warp());
      for (Warp& warp : block.warps) warp.barrier.expected = kWarpSize;
      std::memset(block.shared, 0xff, sizeof block.shared);
      for (int thread = 0; thread < threads; ++thread) {
        const size_t number = static_cast<size_t>(rank * threads + thread);
        Fiber& fiber = m.fibers[number];
        fiber.block = &block;
        fiber.thread = thread;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = m.stacks[number].get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
      }
    }
    for (bool running = true; running;) {
      running = false;
      for (Fiber& fiber : m.fibers) {
        if (fiber.finished) continue;
        running = true;
        m.current = &fiber;
        swapcontext(&m.scheduler, &fiber.context);
      }
    }
  }
}

template <class T>
T* aligned(T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    std::fprintf(stderr, "misaligned access of %zu bytes at %p\n", sizeof(T), static_cast<const void*>(address));
    std::abort();
  }
  return address;
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_size

template <class T>
T __ldg(const T* address) {
  return *emulation::aligned(address);
}
template <class T>
T __ldcg(const T* address) {
  return *emulation::aligned(address);
}
template <class T>
void __stcs(T* address, T value) {
  *emulation::aligned(address) = value;
}

inline void __syncthreads() { emulation::wait(emulation::machine().current->block->barrier); }
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address += value;
  return old;
}

inline double __shfl_down_sync(unsigned, double value, int step, int width = emulation::kWarpSize) {
  emulation::Warp& warp = emulation::warp();
  const int lane = emulation::machine().current->thread % emulation::kWarpSize;
  warp.slot[lane] = value;
  emulation::wait(warp.barrier);
  const double result = lane % width + step < width ? warp.slot[lane + step] : value;
  emulation::wait(warp.barrier);
  return result;
}

inline void sincospif(float x, float* sine, float* cosine) {
  *sine = static_cast<float>(std::sin(M_PI * static_cast<double>(x)));
  *cosine = static_cast<float>(std::cos(M_PI * static_cast<double>(x)));
}

namespace fastinvdpo {

constexpr bool kHasClusters = true;
inline int cluster_rank() { return emulation::machine().current->block->rank; }
inline void cluster_sync() { emulation::wait(emulation::machine().cluster); }
template <class T>
T* in_block(T* shared, int rank) {
  unsigned char* mine = emulation::machine().current->block->shared;
  unsigned char* theirs = emulation::machine().blocks[static_cast<size_t>(rank)].shared;
  return reinterpret_cast<T*>(theirs + (reinterpret_cast<unsigned char*>(shared) - mine));
}

inline uint16_t to_half(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

inline float from_half(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
}

inline uint16_t to_bfloat(float value) {
  if (value != value) return 0x7fff;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float2 unpack_half2(uint32_t bits) { return {from_half(static_cast<uint16_t>(bits)), from_half(static_cast<uint16_t>(bits >> 16))}; }
inline uint32_t pack_half2(float low, float high) { return static_cast<uint32_t>(to_half(high)) << 16 | to_half(low); }
inline uint32_t pack_bfloat2(float low, float high) { return static_cast<uint32_t>(to_bfloat(high)) << 16 | to_bfloat(low); }

}  // namespace fastinvdpo
