// The host's side of a launch: device, stream, grid, checks. Nothing here synchronizes.
#pragma once

#include "stable_abi.h"  // before PyTorch's
//
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <atomic>

#include "common.h"
#include "cuda_work.h"

#define FID_CUDA_CHECK(call)                                                                \
  do {                                                                                      \
    const cudaError_t fid_error = (call);                                                   \
    STD_TORCH_CHECK(fid_error == cudaSuccess, #call, ": ", cudaGetErrorString(fid_error)); \
  } while (0)

namespace fastinvdpo {

using torch::stable::accelerator::DeviceGuard;

// PyTorch's current stream. Found in the CUDA library that a PyTorch with CUDA has loaded, not linked, so that one build of this module
// serves every build of PyTorch, those without CUDA too.
inline cudaStream_t current_stream(int device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(function != nullptr, "this PyTorch has no CUDA streams: it was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(function(device, &stream) == AOTI_TORCH_SUCCESS, "PyTorch gave no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// What a kernel can do on a device; asked for once for each device.
struct Fit {
  int blocks;     // that the device holds at a time
  bool clusters;  // whether the kernel was built for clusters and the device has them
};

template <class Kernel>
Fit fit(Kernel kernel, int device) {
  int per_multiprocessor = 0, multiprocessors = 0, clusters = 0;
  FID_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, 0));
  FID_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  FID_CUDA_CHECK(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device));
  // Code for older devices, translated by the driver, runs on one with clusters, but was compiled without them.
  cudaFuncAttributes attributes{};
  FID_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
  return {std::max(1, per_multiprocessor) * multiprocessors, clusters != 0 && attributes.ptxVersion >= 90};
}

constexpr int kMaxDevices = 64;

template <auto kKernel>
Fit cached_fit(int device) {
  static std::array<std::atomic<int>, kMaxDevices> known{};  // 0: not yet asked; otherwise 2·blocks + clusters
  STD_TORCH_CHECK(device >= 0 && device < kMaxDevices, "device index out of range");
  int packed = known[static_cast<size_t>(device)].load(std::memory_order_relaxed);
  if (packed == 0) {
    const Fit found = fit(kKernel, device);
    packed = 2 * found.blocks + (found.clusters ? 1 : 0);
    known[static_cast<size_t>(device)].store(packed, std::memory_order_relaxed);
  }
  return {packed / 2, packed % 2 == 1};
}

// Launches a kernel on as many teams of blocks as the device holds at a time, or as there are tasks.
template <auto kKernel, class Arguments>
void launch(const Arguments& arguments, int device, cudaStream_t stream) {
  const Work& work = arguments.work;
  const int64_t teams = std::min<int64_t>(work.tasks(), std::max(1, cached_fit<kKernel>(device).blocks / work.team));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(teams * work.team));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(work.team);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = work.team > 1 ? 1 : 0;
  FID_CUDA_CHECK(cudaLaunchKernelEx(&config, kKernel, arguments));
  FID_CUDA_CHECK(cudaGetLastError());
}

}  // namespace fastinvdpo
