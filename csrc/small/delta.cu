// delta = rowsum(dout * out), what the softmax's gradient needs of the output.
#include "common.cuh"

namespace seqpar {
namespace {

template <class T>
__global__ void __launch_bounds__(kLanes* kRowsPerBlock) delta_kernel(const __grid_constant__ SeqparDelta a) {
  const Row r = this_row();
  if (r.row >= a.seqlen) return;  // all threads of a row leave together
  // out, dout: [headdim] of this row
  const uint16_t* out = static_cast<const uint16_t*>(a.out) + at(a.out_strides, r);
  const uint16_t* dout = static_cast<const uint16_t*>(a.dout) + at(a.dout_strides, r);
  float sum = 0.f;
  for (int d = r.lane * 8; d < a.headdim; d += kLanes * 8) {
    const Eight x = load16<T>(out + d), y = load16<T>(dout + d);
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(x.x[i], y.x[i], sum);
  }
#pragma unroll
  for (int distance = kLanes / 2; distance; distance /= 2) {
    sum += __shfl_xor_sync(0xffffu << (threadIdx.x & kLanes), sum, distance, kLanes);
  }
  if (r.lane == 0) a.delta[at(a.delta_strides, r)] = sum;
}

}  // namespace

int32_t delta(const SeqparDelta& a, cudaStream_t stream) {
  if (a.headdim % 8 || a.dtype < 0 || a.dtype > 1) return kBadArgument;
  const dim3 grid = row_grid(a.seqlen, a.nheads, a.batch);
  if (a.dtype == SEQPAR_BF16) {
    delta_kernel<Bf16><<<grid, kLanes * kRowsPerBlock, 0, stream>>>(a);
  } else {
    delta_kernel<Fp16><<<grid, kLanes * kRowsPerBlock, 0, stream>>>(a);
  }
  return cudaGetLastError();
}

}  // namespace seqpar
