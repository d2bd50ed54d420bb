// Included by every file in instances/: the body of forward_instance.
#pragma once
#include "forward_launch.cuh"

namespace seqpar::sm90 {

template <int D, class T, Rows ROWS, bool INTERVAL, bool SOFTCAP>
int32_t forward_instance(const SeqparForward& arguments, cudaStream_t stream) {
  constexpr ForwardShape kShape = forward_shape(D, ROWS);
  using Config = ForwardConfig<D, T, kShape.warpgroups, kShape.keys, kShape.stages, INTERVAL, SOFTCAP>;
  return launch_forward<Config>(arguments, kShape, stream);
}

}  // namespace seqpar::sm90
