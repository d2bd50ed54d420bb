// The forward kernels that exist, each compiled in a file of its own (see generate_instances.py).
#pragma once
#include <cuda_runtime.h>

#include "../common/device.cuh"
#include "../seqpar_attn.h"
#include "forward_grid.h"

namespace seqpar::sm90 {

template <int D, class T, Rows ROWS, bool INTERVAL, bool SOFTCAP>
int32_t forward_instance(const SeqparForward& arguments, cudaStream_t stream);

}  // namespace seqpar::sm90
