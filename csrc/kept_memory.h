// Memory of large results on the CPU, kept for the next one. The C library may give freed megabytes back to the system, and to get them
// again, page by page, can take several times as long as the kernels do.
#pragma once

#include <atomic>
#include <cstdint>

#include "results.h"

#if defined(__linux__)
#include <sys/mman.h>

// PyTorch has it since 2.11; in 2.10, whose stable ABI this is built for and does not declare it, it is null.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(void* data, int64_t dims, const int64_t* sizes, const int64_t* strides,
                                                                int64_t storage_offset, int32_t dtype, int32_t device_type,
                                                                int32_t device_index, AtenTensorHandle* result, int32_t layout,
                                                                const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
                                                                void (*deleter)(void* data, void* context), void* context);
#endif

namespace fastinvdpo {

constexpr int64_t kWorthKeeping = 1 << 20;  // bytes; freed memory of less stays in the process anyway

// Asks for huge pages behind a large output: to touch its 4 KB pages for the first time takes longer than the kernels do.
inline void prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage, end = (address + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (end >= begin + kHugePage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

struct Block {
  Tensor memory;  // PyTorch's, so that its profiler knows of it
  int64_t bytes;
};

// The block that was given back last, or null. Never destroyed: a result may outlive all static objects.
inline std::atomic<Block*>& kept_block() {
  static std::atomic<Block*> kept{nullptr};
  return kept;
}

inline void keep(Block* block) { delete kept_block().exchange(block); }

inline void release_kept_memory() { keep(nullptr); }

// The kept block if its size will do, else a new one.
inline Block* take_block(const Tensor& like, int64_t bytes) {
  Block* const kept = kept_block().exchange(nullptr);
  if (kept != nullptr && kept->bytes >= bytes && kept->bytes / 2 <= bytes) return kept;
  delete kept;
  Block* const block = new Block{torch::stable::new_empty(like, {bytes}, ScalarType::Byte), bytes};
  prefer_huge_pages(block->memory.mutable_data_ptr(), bytes);
  return block;
}

// torch.empty_like(model), of a model on the CPU; `bytes`: of its elements.
inline Tensor empty_result(const Tensor& model, int64_t bytes) {
#if defined(__linux__)
  if (bytes >= kWorthKeeping && torch_from_blob != nullptr && model.is_contiguous()) {
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(model.get(), &dtype));
    Block* const block = take_block(model, bytes);
    const auto give_back = [](void*, void* context) { keep(static_cast<Block*>(context)); };
    AtenTensorHandle result;
    TORCH_ERROR_CODE_CHECK(torch_from_blob(block->memory.mutable_data_ptr(), model.dim(), model.sizes().data(), model.strides().data(),
                                                  0, dtype, aoti_torch_device_type_cpu(), kNoDeviceIndex, &result,
                                                  aoti_torch_layout_strided(), nullptr, 0, give_back, block));
    return Tensor(result);
  }
#endif
  Tensor result = new_like(model);
  prefer_huge_pages(result.mutable_data_ptr(), bytes);
  return result;
}

}  // namespace fastinvdpo
