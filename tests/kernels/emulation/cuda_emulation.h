// The part of the CUDA language that csrc's kernels use, on the host: every thread is a fiber, and a few clusters run at a time, their warps
// in random turns, so that a missing barrier shows. A load or store that is not aligned ends the program. Shared memory starts as NaN.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
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
constexpr int kWarpSize = 32, kClustersAtATime = 3;

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
  Block* first = nullptr;  // of its cluster
  Barrier barrier, cluster;  // the cluster's is that of its first block
  std::vector<Warp> warps;
  alignas(16) unsigned char shared[kSharedBytes];
};

struct Fiber {
  ucontext_t context;
  Block* block = nullptr;
  int thread = 0;
  bool finished = false;
  const Barrier* waiting = nullptr;  // for a generation later than this one
  uint64_t generation = 0;

  bool can_run() const { return !finished && (waiting == nullptr || waiting->generation != generation); }
};

struct Machine {
  ucontext_t scheduler;
  std::vector<Block> blocks;  // of the clusters that run
  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<unsigned char[]>> stacks;
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
  Fiber& self = *machine().current;
  self.waiting = &barrier;
  self.generation = barrier.generation;
  swapcontext(&self.context, &machine().scheduler);
  self.waiting = nullptr;
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
  leave(self.block->first->cluster);
  self.finished = true;
  swapcontext(&self.context, &m.scheduler);
}

inline void* shared_memory(size_t size) {
  if (size > kSharedBytes) std::abort();
  return machine().current->block->shared;
}

// Runs body() as a kernel on `grid` blocks of `threads` threads in clusters of `team` blocks, in the order of clusters given.
inline void run(int grid, int threads, int team, const std::vector<int>& order, std::function<void()> body) {
  Machine& m = machine();
  m.grid = grid;
  m.body = std::move(body);
  std::mt19937 random(static_cast<unsigned>(order.size()));
  const size_t block_threads = static_cast<size_t>(threads), block_warps = block_threads / kWarpSize;
  for (size_t start = 0; start < order.size(); start += kClustersAtATime) {
    const size_t clusters = std::min<size_t>(kClustersAtATime, order.size() - start);
    m.blocks.assign(clusters * static_cast<size_t>(team), Block());
    m.fibers.assign(m.blocks.size() * block_threads, Fiber());
    while (m.stacks.size() < m.fibers.size()) m.stacks.emplace_back(new unsigned char[kStack]);
    for (size_t number = 0; number < m.blocks.size(); ++number) {
      Block& block = m.blocks[number];
      block.rank = static_cast<int>(number) % team;
      block.index = order[start + number / static_cast<size_t>(team)] * team + block.rank;
      block.first = &block - block.rank;
      block.barrier.expected = threads;
      block.cluster.expected = team * threads;
      block.warps.assign(block_warps, Warp());
      for (Warp& warp : block.warps) warp.barrier.expected = kWarpSize;
      std::memset(block.shared, 0xff, sizeof block.shared);
      for (size_t thread = 0; thread < block_threads; ++thread) {
        Fiber& fiber = m.fibers[number * block_threads + thread];
        fiber.block = &block;
        fiber.thread = static_cast<int>(thread);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = m.stacks[number * block_threads + thread].get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
      }
    }
    const size_t warps = m.fibers.size() / kWarpSize;
    size_t stalled = 0, running = m.fibers.size();
    while (running > 0) {
      // One warp stands still while the others go as far as they can; then another one.
      bool progress = false;
      for (size_t warp = 0; warp < warps; ++warp) {
        if (warp == stalled || random() % 4 == 0) continue;
        for (size_t thread = warp * kWarpSize; thread < (warp + 1) * kWarpSize; ++thread) {
          Fiber& fiber = m.fibers[thread];
          if (!fiber.can_run()) continue;
          progress = true;
          m.current = &fiber;
          swapcontext(&m.scheduler, &fiber.context);
          if (fiber.finished) --running;
        }
      }
      if (!progress) stalled = random() % (warps + 1);  // one more: none
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
inline void cluster_sync() { emulation::wait(emulation::machine().current->block->first->cluster); }
template <class T>
T* in_block(T* shared, int rank) {
  emulation::Block* block = emulation::machine().current->block;
  return reinterpret_cast<T*>(block->first[rank].shared + (reinterpret_cast<unsigned char*>(shared) - block->shared));
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
