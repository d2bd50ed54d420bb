// What the tests of the wrappers share: one GPU, no framework. A test returns 0, 1 after a failure that it has
// described, or 77, which ctest counts as skipped, where there is no GPU of compute capability 9.0.
#pragma once
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

inline int failures = 0;

#define EXPECT(condition, ...)                                 \
  do {                                                         \
    if (!(condition)) {                                        \
      if (failures++ < 10) {                                   \
        printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
        printf(__VA_ARGS__);                                   \
        printf("\n");                                          \
      }                                                        \
    }                                                          \
  } while (0)

inline void cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  printf("%s: %s\n", what, cudaGetErrorString(error));
  exit(1);
}

inline void need_hopper() {
  int count = 0, major = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) exit(77);
  cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "capability");
  if (major != 9) exit(77);
}

// Numbers on the GPU, at first all bits set, which is NaN for every float format.
template <class T> class Array {
 public:
  explicit Array(size_t count) : count_(count) {
    cuda(cudaMalloc(&data_, count * sizeof(T)), "cudaMalloc");
    cuda(cudaMemset(data_, 0xff, count * sizeof(T)), "cudaMemset");
  }
  explicit Array(const std::vector<T>& x) : Array(x.size()) {
    cuda(cudaMemcpy(data_, x.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "to the GPU");
  }
  ~Array() { cudaFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T* data() const { return data_; }
  std::vector<T> read() const {
    std::vector<T> x(count_);
    cuda(cudaMemcpy(x.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "from the GPU");
    return x;
  }

 private:
  T* data_;
  size_t count_;
};

// Waits for a kernel and reports what it died of.
inline void finish(const char* what) {
  cuda(cudaGetLastError(), what);
  cuda(cudaDeviceSynchronize(), what);
}

// Reproducible numbers in [-1, 1).
inline float number(uint32_t index, uint32_t salt) {
  uint32_t x = index * 2654435761u + salt * 40503u + 12345u;
  x ^= x >> 15;
  x *= 2246822519u;
  x ^= x >> 13;
  return static_cast<float>(x & 0xffff) / 32768.f - 1.f;
}

inline int result(const char* name) {
  printf("%s: %s\n", name, failures ? "FAILED" : "ok");
  return failures ? 1 : 0;
}
