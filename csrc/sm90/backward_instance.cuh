// Included by every file in instances/: the body of backward_instance.
#pragma once
#include "backward_launch.cuh"

namespace seqpar::sm90 {

template <int D, class T, bool INTERVAL, bool SOFTCAP, bool CUT>
int32_t backward_instance(const SeqparBackward& arguments, cudaStream_t stream) {
  if constexpr (D == 256) {
    return launch_backward<WideConfig<T, INTERVAL, SOFTCAP>>(arguments, stream);
  } else {
    constexpr int kQueries = D == 64 ? 128 : 64;
    return launch_backward<BackwardConfig<D, T, kQueries, INTERVAL, SOFTCAP, CUT>>(arguments, stream);
  }
}

}  // namespace seqpar::sm90
