// The exported functions: which kernels serve a GPU, and what errors mean.
#include <cuda_runtime.h>

#include "common/errors.h"
#include "seqpar_attn.h"
#include "sm90/launch.h"
#include "small/launch.h"

// Set by the build: the architectures it compiled for, and whether 90a is among them.
#ifndef SEQPAR_ATTN_ARCHITECTURES
#error "SEQPAR_ATTN_ARCHITECTURES must be defined, for example as \"80;90a\""
#endif
#ifndef SEQPAR_ATTN_SM90
#error "SEQPAR_ATTN_SM90 must be defined as 0 or 1"
#endif

namespace {

// The compute capability of the current device as one number, 90 for an H100; negative: an error code.
int32_t current_architecture() {
  static int32_t known[64] = {};  // written more than once at worst, with the same value
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return -static_cast<int32_t>(error);
  if (device < 64 && known[device]) return known[device];
  int major = 0, minor = 0;
  if (cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) {
    return -static_cast<int32_t>(error);
  }
  if (cudaError_t error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)) {
    return -static_cast<int32_t>(error);
  }
  const int32_t architecture = 10 * major + minor;
  if (device < 64) known[device] = architecture;
  return architecture;
}

}  // namespace

extern "C" {

int32_t seqpar_attn_abi() { return SEQPAR_ATTN_ABI; }

size_t seqpar_attn_struct_size(int32_t which) {
  const size_t sizes[] = {sizeof(SeqparForward),  sizeof(SeqparBackward), sizeof(SeqparDelta),
                          sizeof(SeqparFinishDq), sizeof(SeqparMerge),    sizeof(SeqparAccumulate)};
  return which >= 0 && which < 6 ? sizes[which] : 0;
}

const char* seqpar_attn_architectures() { return SEQPAR_ATTN_ARCHITECTURES; }

const char* seqpar_attn_error(int32_t code) {
  if (code >= 0) return cudaGetErrorString(static_cast<cudaError_t>(code));
  return seqpar::error_text(code);
}

int32_t seqpar_attn_forward(const SeqparForward* arguments, void* stream) {
  const int32_t architecture = current_architecture();
  if (architecture < 0) return -architecture;
#if SEQPAR_ATTN_SM90
  if (architecture == 90) return seqpar::sm90::forward(*arguments, static_cast<cudaStream_t>(stream));
#endif
  return seqpar::kNoArchitecture;
}

int32_t seqpar_attn_backward(const SeqparBackward* arguments, void* stream) {
  const int32_t architecture = current_architecture();
  if (architecture < 0) return -architecture;
#if SEQPAR_ATTN_SM90
  if (architecture == 90) return seqpar::sm90::backward(*arguments, static_cast<cudaStream_t>(stream));
#endif
  return seqpar::kNoArchitecture;
}

int64_t seqpar_attn_forward_counters(const SeqparForward* arguments) {
#if SEQPAR_ATTN_SM90
  return seqpar::sm90::forward_counters(*arguments);
#else
  return 0;
#endif
}

int64_t seqpar_attn_backward_counters(const SeqparBackward* arguments) {
#if SEQPAR_ATTN_SM90
  return seqpar::sm90::backward_counters(*arguments);
#else
  return 0;
#endif
}

int32_t seqpar_attn_delta(const SeqparDelta* arguments, void* stream) {
  return seqpar::delta(*arguments, static_cast<cudaStream_t>(stream));
}

int32_t seqpar_attn_finish_dq(const SeqparFinishDq* arguments, void* stream) {
  const int32_t architecture = current_architecture();
  if (architecture < 0) return -architecture;
#if SEQPAR_ATTN_SM90
  if (architecture == 90) return seqpar::sm90::finish_dq(*arguments, static_cast<cudaStream_t>(stream));
#endif
  return seqpar::kNoArchitecture;
}

int32_t seqpar_attn_merge(const SeqparMerge* arguments, void* stream) {
  return seqpar::merge(*arguments, static_cast<cudaStream_t>(stream));
}

int32_t seqpar_attn_accumulate(const SeqparAccumulate* arguments, void* stream) {
  return seqpar::accumulate(*arguments, static_cast<cudaStream_t>(stream));
}

}  // extern "C"
