// Written by generate_instances.py; do not edit.
#include "../backward_instance.cuh"

namespace seqpar::sm90 {
template int32_t backward_instance<64, Fp16, true, false, false>(const SeqparBackward&, cudaStream_t);
}
