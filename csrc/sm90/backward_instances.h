// The backward kernels that exist, each compiled in a file of its own (see generate_instances.py).
#pragma once
#include <cuda_runtime.h>

#include "../common/device.cuh"
#include "../seqpar_attn.h"

namespace seqpar::sm90 {

// CUT: whether the last wave's key tiles are cut, see BackwardCut.
template <int D, class T, bool INTERVAL, bool SOFTCAP, bool CUT>
int32_t backward_instance(const SeqparBackward& arguments, cudaStream_t stream);

}  // namespace seqpar::sm90
