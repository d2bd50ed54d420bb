// What the forward kernel is told besides its tensor maps.
#pragma once
#include <stdint.h>

namespace seqpar::sm90 {

struct ForwardParams {
  float* lse;                   // [batch, nheads, seqlen_q], natural logarithm
  int64_t lse_batch, lse_head;  // strides in elements
  const int32_t* key_lo;        // [seqlen_q], INTERVAL
  const int32_t* key_hi;
  int* counter;                                  // two zeroed ints, returned zeroed
  int seqlen_q, seqlen_k, parts, nheads, group;  // group: query heads per key head
  int causal, offset;
  int row_tiles, tiles;     // query tiles per head, tiles in all
  int heads_at_once;        // heads whose tiles take turns
  int carry, keep, finish;  // read the accumulator, write it, write the output
  float score_scale;        // softcap only: scores times this are capped by tanh
  float scale_log2;         // then times this they are exponents of two
};

}  // namespace seqpar::sm90
