// Zeroes an accumulator that may be a slice.
#include "common.cuh"

namespace seqpar {
namespace {

struct Zeroed {
  float* x;
  SeqparStrides strides;
  int seqlen, headdim;
};

__global__ void __launch_bounds__(kLanes* kRowsPerBlock) zero_kernel(const __grid_constant__ Zeroed a) {
  const Row r = this_row();
  if (r.row >= a.seqlen) return;
  for (int d = r.lane * 8; d < a.headdim; d += kLanes * 8) store_fp32(a.x + at(a.strides, r) + d, Eight{});
}

}  // namespace

cudaError_t zero(float* x, const SeqparStrides& strides, int batch, int seqlen, int nheads, int headdim,
                 cudaStream_t stream) {
  const bool dense = strides.head == headdim && strides.seq == static_cast<int64_t>(nheads) * headdim &&
                     (batch == 1 || strides.batch == seqlen * strides.seq);
  if (dense) return cudaMemsetAsync(x, 0, sizeof(float) * batch * seqlen * strides.seq, stream);
  zero_kernel<<<row_grid(seqlen, nheads, batch), kLanes * kRowsPerBlock, 0, stream>>>({x, strides, seqlen, headdim});
  return cudaGetLastError();
}

}  // namespace seqpar
