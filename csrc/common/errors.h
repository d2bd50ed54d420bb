// Error codes of the C interface that are not CUDA's.
#pragma once
#include <stdint.h>

namespace seqpar {

enum Error : int32_t {
  kNoArchitecture = -1,
  kNoTensorMaps = -2,
  kBadTensorMap = -3,
  kUnaligned = -4,
  kBadArgument = -5,
  kNoKernel = -6,
};

inline const char* error_text(int32_t code) {
  switch (code) {
    case kNoArchitecture:
      return "the library has no kernels for this GPU: build it again with TORCH_CUDA_ARCH_LIST naming its architecture";
    case kNoTensorMaps:
      return "the NVIDIA driver has no cuTensorMapEncodeTiled: a driver for CUDA 12.0 or later is needed";
    case kBadTensorMap:
      return "the driver refused a tensor map: a size or a stride is out of its range";
    case kUnaligned:
      return "a pointer or a stride is not a multiple of 16 bytes: make the tensor contiguous";
    case kBadArgument:
      return "an argument is outside what the kernels serve (see seqpar_attn.h)";
    case kNoKernel:
      return "no kernel was built for this head dimension, dtype or mask";
    default:
      return "unknown error code: the library and its caller differ in version";
  }
}

}  // namespace seqpar
