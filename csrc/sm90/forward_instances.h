// The forward kernels that exist, each compiled in a file of its own (see generate_instances.py).
#pragma once
#include <cuda_runtime.h>

#include "../common/device.cuh"
#include "../seqpar_attn.h"

namespace seqpar::sm90 {

// Measured on an H100: which tiles serve which head dimension. WIDE has 192 query rows, where a short sequence leaves
// many of its last wave's multiprocessors idle; NARROW has 128.
enum class Rows { kWide, kNarrow };

template <int D, class T, Rows ROWS, bool INTERVAL, bool SOFTCAP>
int32_t forward_instance(const SeqparForward& arguments, cudaStream_t stream);

}  // namespace seqpar::sm90
