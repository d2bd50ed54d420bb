// Included by every file in instances/: the body of forward_instance.
#pragma once
#include "forward_launch.cuh"

namespace seqpar::sm90 {

// Tile shapes that fit in 227 KiB of shared memory and in the registers, the fastest of those measured.
template <int D, Rows ROWS> struct ForwardShape;
template <> struct ForwardShape<64, Rows::kWide> {
  static constexpr int warpgroups = 3, keys = 112, stages = 3;
};
template <> struct ForwardShape<128, Rows::kWide> {
  static constexpr int warpgroups = 3, keys = 80, stages = 2;
};
template <> struct ForwardShape<128, Rows::kNarrow> {
  static constexpr int warpgroups = 2, keys = 128, stages = 2;
};

template <int D, class T, Rows ROWS, bool INTERVAL, bool SOFTCAP>
int32_t forward_instance(const SeqparForward& arguments, cudaStream_t stream) {
  using Shape = ForwardShape<D, ROWS>;
  using Config = ForwardConfig<D, T, Shape::warpgroups, Shape::keys, Shape::stages, INTERVAL, SOFTCAP>;
  return launch_forward<Config>(arguments, stream);
}

}  // namespace seqpar::sm90
