// Memory-bound kernels for every architecture. See seqpar_attn.h for the arguments.
#pragma once
#include <cuda_runtime.h>

#include "../seqpar_attn.h"

namespace seqpar {

int32_t delta(const SeqparDelta& arguments, cudaStream_t stream);
int32_t merge(const SeqparMerge& arguments, cudaStream_t stream);
int32_t accumulate(const SeqparAccumulate& arguments, cudaStream_t stream);

// Zeroes [batch, seqlen, nheads, headdim] of fp32.
cudaError_t zero(float* x, const SeqparStrides& strides, int batch, int seqlen, int nheads, int headdim,
                 cudaStream_t stream);

}  // namespace seqpar
