// The gradient of q from the accumulator that the backward kernel adds to.
#include "../small/common.cuh"
#include "backward_params.h"
#include "launch.h"

namespace seqpar::sm90 {
namespace {

template <class T>
__global__ void __launch_bounds__(kLanes* kRowsPerBlock)
    finish_dq_kernel(const __grid_constant__ SeqparFinishDq a, float factor) {
  const Row r = this_row();
  if (r.row >= a.seqlen) return;
  for (int d = r.lane * 8; d < a.headdim; d += kLanes * 8) {
    // dq: [8] columns, the even ones first
    const Eight x = load_fp32(a.dq + at(a.dq_strides, r) + d);
    Eight y;
#pragma unroll
    for (int i = 0; i < 8; i++) y.x[i] = x.x[i / 2 + 4 * (i % 2)] * factor;
    store16<T>(static_cast<uint16_t*>(a.grad) + at(a.grad_strides, r) + d, y);
  }
}

}  // namespace

int32_t finish_dq(const SeqparFinishDq& a, cudaStream_t stream) {
  if (a.headdim % 8 || a.dtype < 0 || a.dtype > 1) return kBadArgument;
  const bool bf16 = a.dtype == SEQPAR_BF16;
  const float factor = a.softmax_scale / static_cast<float>(1 << backward_shift(bf16));
  const dim3 grid = row_grid(a.seqlen, a.nheads, a.batch);
  if (bf16) {
    finish_dq_kernel<Bf16><<<grid, kLanes * kRowsPerBlock, 0, stream>>>(a, factor);
  } else {
    finish_dq_kernel<Fp16><<<grid, kLanes * kRowsPerBlock, 0, stream>>>(a, factor);
  }
  return cudaGetLastError();
}

}  // namespace seqpar::sm90
