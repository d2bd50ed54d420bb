// From the C interface's arguments to a launch of the backward kernel.
#pragma once
#include <math.h>

#include <algorithm>

#include "../common/launch.h"
#include "../small/launch.h"
#include "backward_grid.h"
#include "backward_instances.h"
#include "backward_kernel.cuh"
#include "backward_wide_kernel.cuh"
#include "problem.h"

namespace seqpar::sm90 {

using BackwardKernel = void (*)(BackwardMaps, BackwardParams);

// Which kernel serves a configuration, and how many bytes of shared memory it needs.
template <class C> struct BackwardServed {
  static BackwardKernel kernel() { return backward_kernel<C>; }
  static constexpr int SHARED = C::SHARED, TILES_TOGETHER = 32 * 132;
};
template <class T, bool INTERVAL, bool SOFTCAP> struct BackwardServed<WideConfig<T, INTERVAL, SOFTCAP>> {
  using C = WideConfig<T, INTERVAL, SOFTCAP>;
  static BackwardKernel kernel() { return backward_wide_kernel<C>; }
  static constexpr int SHARED = WideShared<C>::BYTES, TILES_TOGETHER = 8 * 132;
};

// Key heads that take turns tile by tile. All together, the longest tiles of all of them go first and none of them is
// last; but after more than some 32 waves (`limit`, in key tiles; 8 with head dimension 256), CTAs do not begin
// together any more, and lose each other (see BackwardTile): 64K tokens with 32 heads then run at half speed.
inline int key_heads_at_once(int nheads_kv, int key_tiles, int limit) {
  int heads = nheads_kv;
  while (heads > 1 && (nheads_kv % heads || heads * key_tiles > limit)) heads--;
  return heads;
}

template <class C> int32_t launch_backward(const SeqparBackward& a, cudaStream_t stream) {
  const SeqparProblem& x = a.problem;
  const Element element = element_of(x);
  const Element gradient = a.round_dkv ? element : Element::kFp32;
  BackwardMaps maps;
  int32_t error = make_tensor_map(&maps.q, query_tensor(x, a.q, element, a.q_strides), C::QUERIES);
  if (!error) error = make_tensor_map(&maps.k, key_tensor(x, a.k, element, a.k_strides), C::KEYS);
  if (!error) error = make_tensor_map(&maps.v, key_tensor(x, a.v, element, a.v_strides), C::KEYS);
  if (!error) error = make_tensor_map(&maps.dout, query_tensor(x, a.dout, element, a.dout_strides), C::QUERIES);
  if (!error) error = make_tensor_map(&maps.dq, query_tensor(x, a.dq, Element::kFp32, a.dq_strides), 16);
  if (!error) error = make_tensor_map(&maps.dk, key_tensor(x, a.dk, gradient, a.dk_strides), 64);
  if (!error) error = make_tensor_map(&maps.dv, key_tensor(x, a.dv, gradient, a.dv_strides), 64);
  if (error) return error;

  BackwardParams p = {};
  p.lse = a.lse;
  p.delta = a.delta;
  p.lse_batch = a.lse_strides.batch;
  p.lse_head = a.lse_strides.head;
  p.delta_batch = a.delta_strides.batch;
  p.delta_head = a.delta_strides.head;
  p.query_lo = x.query_lo;
  p.query_hi = x.query_hi;
  p.seqlen_q = x.seqlen_q;
  p.seqlen_k = x.seqlen_k;
  p.batch = x.batch;
  p.nheads = x.nheads;
  p.group = x.nheads / x.nheads_kv;
  p.causal = x.mask == SEQPAR_CAUSAL;
  p.offset = x.offset;
  p.query_tiles = (x.seqlen_q + C::QUERIES - 1) / C::QUERIES;
  p.key_tiles_per_part = (x.seqlen_k + C::KEYS - 1) / C::KEYS;
  p.key_tiles = p.key_tiles_per_part * x.parts;
  p.order = a.deterministic ? a.counter : nullptr;
  p.carry_dkv = a.carry_dkv;
  p.round_dkv = a.round_dkv;
  p.scale = x.softmax_scale;
  p.score_scale = C::SOFTCAP ? x.softmax_scale / x.softcap : 1.f;
  p.scale_log2 = (C::SOFTCAP ? x.softcap : x.softmax_scale) * kLog2E;

  if (!a.carry_dq) {
    if (cudaError_t e = zero(a.dq, a.dq_strides, x.batch, x.seqlen_q, x.nheads, x.headdim, stream)) return e;
  }
  const BackwardKernel kernel = BackwardServed<C>::kernel();
  constexpr int kShared = BackwardServed<C>::SHARED;
  if (cudaError_t e = allow_shared_memory<C>(kernel, kShared)) return e;
  p.stagger = C::STAGGERED && x.mask == SEQPAR_FULL && !p.order && p.group == 1 ? 2 : 0;
  const int together =
      x.mask == SEQPAR_FULL ? 1 : key_heads_at_once(x.nheads_kv, p.key_tiles, BackwardServed<C>::TILES_TOGETHER);
  p.head_groups = x.nheads_kv / together;
  p.at_once = multiprocessors(0);
  if (!p.at_once) return cudaErrorInvalidDevice;
  if (x.mask != SEQPAR_FULL && !p.order) {  // in a fixed order, the first key tiles must come to a query tile first
    p.wave = p.at_once;
  }
  dim3 grid(together, p.key_tiles, x.batch * p.head_groups);
  p.whole = p.ctas = INT32_MAX;
  if constexpr (C::CUT) {
    const int tiles = p.key_tiles * grid.z;
    const BackwardCut cut = backward_cut(a, C::QUERIES, C::KEYS, p.at_once);
    if (cut.rest) {
      p.rest = cut.rest;
      p.shorts = cut.shorts;
      p.long_end = cut.long_end;
      p.whole = tiles - cut.rest;
      p.ctas = tiles + cut.rest * cut.shorts;
      p.done = a.counter;
      p.partial = reinterpret_cast<float*>(a.counter + kMostCutTiles);
      grid.z = (p.ctas + p.key_tiles - 1) / p.key_tiles;
    }
  }
  kernel<<<grid, C::THREADS, kShared, stream>>>(maps, p);
  return cudaGetLastError();
}

}  // namespace seqpar::sm90
