// The oldest PyTorch that these sources are built for, 2.10: its stable ABI is what they get to see. To be included before every header of
// PyTorch. Not on the command line: module.cpp includes pybind11, and PyTorch's copy of it, before 2.13, refuses code for the stable ABI.
#pragma once

#ifdef TORCH_FEATURE_VERSION
#error "stable_abi.h comes before PyTorch's headers"
#endif

#define TORCH_TARGET_VERSION 0x020a000000000000
