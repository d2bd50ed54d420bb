// Written by generate_instances.py; do not edit.
#include "../backward_instance.cuh"

namespace seqpar::sm90 {
template int32_t backward_instance<256, Fp16, false, true, false>(const SeqparBackward&, cudaStream_t);
}
