// What launching needs to know of a device, looked up once.
#pragma once
#include <cuda_runtime.h>

namespace seqpar {

// Streaming multiprocessors of the current device, less those left to others, at least one; 0 on an error.
inline int multiprocessors(int margin) {
  static int known[64] = {};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  int count = device < 64 ? known[device] : 0;
  if (!count && cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  if (device < 64) known[device] = count;
  return count > margin ? count - margin : 1;
}

// Lets a kernel use so much dynamic shared memory on the current device. `Tag` is any type that stands for the kernel.
template <class Tag, class Kernel> cudaError_t allow_shared_memory(Kernel kernel, int bytes) {
  static bool done[64] = {};
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (device < 64 && done[device]) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess && device < 64) done[device] = true;
  return error;
}

}  // namespace seqpar
