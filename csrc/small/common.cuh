// What the memory-bound kernels share: 8 elements of a row at a time, in 16-byte accesses.
#pragma once
#include "../common/device.cuh"
#include "../common/errors.h"
#include "launch.h"

namespace seqpar {

struct Eight {
  float x[8];
};

DEVICE Eight load_fp32(const float* p) {
  const float4 a = *reinterpret_cast<const float4*>(p), b = *reinterpret_cast<const float4*>(p + 4);
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
DEVICE void store_fp32(float* p, const Eight& v) {
  *reinterpret_cast<float4*>(p) = make_float4(v.x[0], v.x[1], v.x[2], v.x[3]);
  *reinterpret_cast<float4*>(p + 4) = make_float4(v.x[4], v.x[5], v.x[6], v.x[7]);
}
// Of 16-bit numbers; `p` counts those.
template <class T> DEVICE Eight load16(const uint16_t* p) {
  const uint4 a = *reinterpret_cast<const uint4*>(p);
  const float2 u = unpack<T>(a.x), v = unpack<T>(a.y), w = unpack<T>(a.z), z = unpack<T>(a.w);
  return {{u.x, u.y, v.x, v.y, w.x, w.y, z.x, z.y}};
}
template <class T> DEVICE void store16(uint16_t* p, const Eight& v) {
  *reinterpret_cast<uint4*>(p) =
      make_uint4(pack<T>(v.x[0], v.x[1]), pack<T>(v.x[2], v.x[3]), pack<T>(v.x[4], v.x[5]), pack<T>(v.x[6], v.x[7]));
}

// The rows of a problem: 16 threads a row, 16 rows a block, grid (rows, heads, batch).
constexpr int kLanes = 16, kRowsPerBlock = 16;

struct Row {
  int row, head, batch, lane;
};
DEVICE Row this_row() {
  return {static_cast<int>(blockIdx.x * kRowsPerBlock + threadIdx.x / kLanes), static_cast<int>(blockIdx.y),
          static_cast<int>(blockIdx.z), static_cast<int>(threadIdx.x % kLanes)};
}
DEVICE int64_t at(const SeqparStrides& s, const Row& r) { return r.batch * s.batch + r.row * s.seq + r.head * s.head; }
DEVICE int64_t at(const SeqparRowStrides& s, const Row& r) { return r.batch * s.batch + r.head * s.head + r.row; }

inline dim3 row_grid(int seqlen, int nheads, int batch) {
  return dim3((seqlen + kRowsPerBlock - 1) / kRowsPerBlock, nheads, batch);
}

}  // namespace seqpar
