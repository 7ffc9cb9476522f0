// The Python module fastinvdpo._C. Importing it registers the native ops (namespace fastinvdpo_native); it offers build_info()
// and release_kept_memory().

#include <pybind11/pybind11.h>  // before stable_abi.h
#include <torch/headeronly/version.h>

#include "isa.h"
#include "kept_memory.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of fastinvdpo.";
  module.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["torch"] = TORCH_VERSION;
#ifdef FASTINVDPO_NVCC  // its release, where the CUDA kernels are built
        info["cuda"] = true;
        info["nvcc"] = FASTINVDPO_NVCC;
#else
        info["cuda"] = false;
#endif
        const fastinvdpo::IsaChoice& choice = fastinvdpo::isa_choice();
        info["cpu_instructions"] = choice.refusal.empty() ? fastinvdpo::kIsaNames[static_cast<int>(choice.isa)] : choice.refusal;
        return info;
      },
      "How this module was built, and the instruction set its CPU kernels use here.");
  module.def("release_kept_memory", &fastinvdpo::release_kept_memory, "Free the memory that is kept for the next large result.");
}
