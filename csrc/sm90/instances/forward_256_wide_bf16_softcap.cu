// Written by generate_instances.py; do not edit.
#include "../forward_instance.cuh"

namespace seqpar::sm90 {
template int32_t forward_instance<256, Bf16, Rows::kWide, false, true>(const SeqparForward&, cudaStream_t);
}
