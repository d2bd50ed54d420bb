// Gradients from several owners added to one accumulator in one pass over it.
#include "common.cuh"

namespace seqpar {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) accumulate_kernel(const __grid_constant__ SeqparAccumulate a) {
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
  if (index >= a.elements) return;
  // target: [4]
  float4* target = reinterpret_cast<float4*>(a.target + blockIdx.y * a.target_batch_stride + index);
  const float* parts = a.parts + blockIdx.y * a.part_batch_stride + index;
  float4 sum = *target;
  for (int n = 0; n < a.count; n++) {
    const float4 x = *reinterpret_cast<const float4*>(parts + n * a.part_stride);
    sum.x += x.x;
    sum.y += x.y;
    sum.z += x.z;
    sum.w += x.w;
  }
  *target = sum;
}

}  // namespace

int32_t accumulate(const SeqparAccumulate& a, cudaStream_t stream) {
  if (a.elements % 4) return kBadArgument;
  const int64_t blocks = (a.elements / 4 + kThreads - 1) / kThreads;
  accumulate_kernel<<<dim3(static_cast<unsigned>(blocks), a.batch), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace seqpar
