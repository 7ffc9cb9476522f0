// The Python module fastinvdpo._C. Importing it registers the native ops (namespace fastinvdpo_native); it offers build_info().

#include <pybind11/pybind11.h>

#include "isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels of fastinvdpo.";
  module.def(
      "build_info",
      [] {
        const char* const names[] = {"baseline", "avx2", "avx512"};
        py::dict info;
        info["compiler"] = __VERSION__;
        info["cuda"] = static_cast<bool>(FASTINVDPO_WITH_CUDA);
        info["cpu_instructions"] = names[static_cast<int>(fastinvdpo::isa())];
        return info;
      },
      "How this module was built, and the instruction set its CPU kernels use here.");
}
