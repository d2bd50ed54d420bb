// Hopper's kernels, as library.cu sees them. See seqpar_attn.h for the arguments.
#pragma once
#include <cuda_runtime.h>

#include "../seqpar_attn.h"

namespace seqpar::sm90 {

int32_t forward(const SeqparForward& arguments, cudaStream_t stream);
int32_t backward(const SeqparBackward& arguments, cudaStream_t stream);
int32_t finish_dq(const SeqparFinishDq& arguments, cudaStream_t stream);
int64_t forward_counters(const SeqparForward& arguments);
int64_t backward_counters(const SeqparBackward& arguments);

}  // namespace seqpar::sm90
