// An fp32 accumulator in the dtype of the inputs.
#include "common.cuh"

namespace seqpar {
namespace {

template <class T>
__global__ void __launch_bounds__(kLanes* kRowsPerBlock) convert_kernel(const __grid_constant__ SeqparConvert a) {
  const Row r = this_row();
  if (r.row >= a.seqlen) return;
  for (int d = r.lane * 8; d < a.headdim; d += kLanes * 8) {
    const Eight x = load_fp32(a.source + at(a.source_strides, r) + d);
    store16<T>(static_cast<uint16_t*>(a.target) + at(a.target_strides, r) + d, x);
  }
}

}  // namespace

int32_t convert(const SeqparConvert& a, cudaStream_t stream) {
  if (a.headdim % 8 || a.dtype < 0 || a.dtype > 1) return kBadArgument;
  const dim3 grid = row_grid(a.seqlen, a.nheads, a.batch);
  if (a.dtype == SEQPAR_BF16) {
    convert_kernel<Bf16><<<grid, kLanes * kRowsPerBlock, 0, stream>>>(a);
  } else {
    convert_kernel<Fp16><<<grid, kLanes * kRowsPerBlock, 0, stream>>>(a);
  }
  return cudaGetLastError();
}

}  // namespace seqpar
