// From the C interface's arguments to a launch of the forward kernel.
#pragma once
#include <algorithm>

#include "../common/launch.h"
#include "forward_instances.h"
#include "forward_kernel.cuh"
#include "problem.h"

namespace seqpar::sm90 {

// Heads that take turns tile by tile, so that the longest tiles of all of them go first, as long as their keys and
// values are not much more than the L2 cache holds (50 MB on an H100): measured, 40 MB were 2 to 3% slower.
inline int heads_at_once(const SeqparProblem& x) {
  const double bytes_per_key_head = 4.0 * x.seqlen_k * x.parts * x.headdim;
  const int group = x.nheads / x.nheads_kv;
  int heads = x.batch * x.nheads;
  while (heads % 2 == 0 && std::max(1, heads / group) * bytes_per_key_head > 100e6) heads /= 2;
  return heads;
}

template <class C> int32_t launch_forward(const SeqparForward& a, const ForwardShape& shape, cudaStream_t stream) {
  const SeqparProblem& x = a.problem;
  const Element element = element_of(x);
  ForwardMaps maps = {};
  int32_t error = make_tensor_map(&maps.q, query_tensor(x, a.q, element, a.q_strides), 64);
  if (!error) error = make_tensor_map(&maps.k, key_tensor(x, a.k, element, a.k_strides), C::KEYS);
  if (!error) error = make_tensor_map(&maps.v, key_tensor(x, a.v, element, a.v_strides), C::KEYS);
  if (!error && a.out) error = make_tensor_map(&maps.out, query_tensor(x, a.out, element, a.out_strides), 64);
  if (!error && (a.carry || a.keep)) {
    error = make_tensor_map(&maps.acc, query_tensor(x, a.out_acc, Element::kFp32, a.acc_strides), 64);
  }
  if (error) return error;

  const int available = multiprocessors(x.sm_margin);
  if (!available) return cudaErrorInvalidDevice;
  const ForwardGrid g = forward_grid(x, shape, available);
  ForwardParams p = {};
  p.lse = a.lse;
  p.lse_batch = a.lse_strides.batch;
  p.lse_head = a.lse_strides.head;
  p.acc = static_cast<float*>(a.out_acc);
  p.acc_batch = a.acc_strides.batch;
  p.acc_row = a.acc_strides.seq;
  p.acc_head = a.acc_strides.head;
  p.headdim = x.headdim;
  p.key_lo = x.key_lo;
  p.key_hi = x.key_hi;
  p.counter = a.counter;
  p.seqlen_q = x.seqlen_q;
  p.seqlen_k = x.seqlen_k;
  p.parts = x.parts;
  p.nheads = x.nheads;
  p.group = x.nheads / x.nheads_kv;
  p.causal = x.mask == SEQPAR_CAUSAL;
  p.offset = x.offset;
  p.packed = g.packed;
  p.packs = x.nheads / g.packed;
  p.blocks = g.blocks;
  p.row_tiles = g.row_tiles;
  p.tiles = g.tiles + g.rest * (g.pieces - 1);
  p.cut_from = g.pieces > 1 ? g.tiles - g.rest : p.tiles;
  p.pieces = g.pieces;
  p.partial = reinterpret_cast<float*>(a.counter + kFlags);
  p.heads_at_once = x.mask == SEQPAR_FULL ? 1 : heads_at_once(x);
  p.carry = a.carry;
  p.keep = a.keep;
  p.finish = a.out != nullptr;
  p.score_scale = C::SOFTCAP ? x.softmax_scale / x.softcap : 1.f;
  p.scale_log2 = (C::SOFTCAP ? x.softcap : x.softmax_scale) * kLog2E;

  const auto kernel = forward_kernel<C>;
  if (cudaError_t e = allow_shared_memory<C>(kernel, C::SHARED)) return e;
  kernel<<<std::min(available, p.tiles), C::THREADS, C::SHARED, stream>>>(maps, p);
  return cudaGetLastError();
}

}  // namespace seqpar::sm90
