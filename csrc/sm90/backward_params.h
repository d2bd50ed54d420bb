// What the backward kernel is told besides its tensor maps.
#pragma once
#include <stdint.h>

namespace seqpar::sm90 {

// P, and with it dS and what is accumulated in dq, is 2 to the power of this times itself throughout (see
// BackwardConfig::AHEAD and WideConfig::SHIFT).
constexpr int backward_shift(bool bf16) { return bf16 ? 14 : 0; }

struct BackwardParams {
  const float* lse;                                      // [batch, nheads, seqlen_q], natural logarithm
  const float* delta;                                    // [batch, nheads, seqlen_q]
  int64_t lse_batch, lse_head, delta_batch, delta_head;  // strides in elements
  const int32_t* query_lo;                               // [seqlen_k], INTERVAL
  const int32_t* query_hi;
  int* order;  // deterministic: [batch, nheads, query tiles, 8 warps], zeroed ints, returned zeroed
  int seqlen_q, seqlen_k, batch, nheads, group;  // group: query heads per key head
  int head_groups;                               // groups of key heads per batch, see key_head
  int stagger;  // FULL: by how many tiles the walks of neighbouring key tiles begin apart
  int wave;     // CTAs that run side by side; 0: all walk up
  int at_once;  // CTAs that run side by side
  int causal, offset;
  int query_tiles, key_tiles;  // per head; of all parts
  int key_tiles_per_part;
  int whole, ctas;  // FULL: CTAs with whole key tiles, CTAs in all; those between have pieces of tiles, which
  int rest, shorts, long_end;  // see BackwardCut
  int* done;                   // [rest], zeroed ints, returned zeroed: pieces that are done
  float* partial;              // [rest, shorts + 1, 2 warpgroups, headdim / 4, 512], their sums
  int carry_dkv, round_dkv;
  float scale, scale_log2;  // softmax_scale; softcap only: exponents of two from capped scores
  float score_scale;        // softcap only: scores times this are capped by tanh
};

}  // namespace seqpar::sm90
