// Two partial results of a softmax over different keys become one.
#include "common.cuh"

namespace seqpar {
namespace {

template <class T, bool FP32>
__global__ void __launch_bounds__(kLanes* kRowsPerBlock) merge_kernel(const __grid_constant__ SeqparMerge a) {
  const Row r = this_row();
  if (r.row >= a.seqlen) return;
  float* lse = a.lse + at(a.lse_strides, r);
  const float before = *lse, part = a.lse_part[at(a.lse_part_strides, r)];
  const float peak = fmaxf(before, part), base = peak == -INFINITY ? 0.f : peak;
  const float total = base + logf(expf(before - base) + expf(part - base));
  // Weights from the total: a row without keys has total -inf, and then both are exp(-inf) = 0.
  const float origin = total == -INFINITY ? 0.f : total;
  const float old_weight = expf(before - origin), new_weight = expf(part - origin);
  __syncwarp(0xffffu << (threadIdx.x & kLanes));  // the row's threads have read lse
  if (r.lane == 0) *lse = total;
  for (int d = r.lane * 8; d < a.headdim; d += kLanes * 8) {
    // out_acc, out_part: [8] of this row
    float* acc = a.out_acc + at(a.acc_strides, r) + d;
    const int64_t offset = at(a.part_strides, r) + d;
    Eight x = load_fp32(acc), y;
    if constexpr (FP32) {
      y = load_fp32(static_cast<const float*>(a.out_part) + offset);
    } else {
      y = load16<T>(static_cast<const uint16_t*>(a.out_part) + offset);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) x.x[i] = x.x[i] * old_weight + y.x[i] * new_weight;
    store_fp32(acc, x);
    if (a.out) store16<T>(static_cast<uint16_t*>(a.out) + at(a.out_strides, r) + d, x);
  }
}

template <class T> void launch(const SeqparMerge& a, cudaStream_t stream) {
  const dim3 grid = row_grid(a.seqlen, a.nheads, a.batch);
  if (a.part_fp32) {
    merge_kernel<T, true><<<grid, kLanes * kRowsPerBlock, 0, stream>>>(a);
  } else {
    merge_kernel<T, false><<<grid, kLanes * kRowsPerBlock, 0, stream>>>(a);
  }
}

}  // namespace

int32_t merge(const SeqparMerge& a, cudaStream_t stream) {
  if (a.headdim % 8 || a.dtype < 0 || a.dtype > 1) return kBadArgument;
  if (a.dtype == SEQPAR_BF16) {
    launch<Bf16>(a, stream);
  } else {
    launch<Fp16>(a, stream);
  }
  return cudaGetLastError();
}

}  // namespace seqpar
