// What the forward kernel is told besides its tensor maps.
#pragma once
#include <cuda_runtime.h>
#include <stdint.h>

namespace seqpar::sm90 {

struct ForwardParams {
  float* lse;                            // [batch, nheads, seqlen_q], natural logarithm
  int64_t lse_batch, lse_head;           // strides in elements
  float* acc;                            // the carried output, where the kernel has no memory to stage it
  int64_t acc_batch, acc_row, acc_head;  // strides in elements
  int headdim;
  const int32_t* key_lo;  // [seqlen_q], INTERVAL
  const int32_t* key_hi;
  int* counter;                                  // zeroed ints, returned zeroed: two, and one per slot and warpgroup
  float* partial;                                // [slots, warpgroups, headdim / 8 + 1, 512], results of pieces
  int seqlen_q, seqlen_k, parts, nheads, group;  // group: query heads per key head
  int causal, offset;
  int packed, packs;        // query heads whose rows are counted together, such packs per batch
  int blocks;               // of 64 rows per head
  int row_tiles, tiles;     // query tiles per pack, tiles in all, with pieces counted
  int cut_from, pieces;     // tiles from this on are cut along keys
  int heads_at_once;        // packs whose tiles take turns
  int carry, keep, finish;  // read the accumulator, write it, write the output
  float score_scale;        // softcap only: scores times this are capped by tanh
  float scale_log2;         // then times this they are exponents of two
};

}  // namespace seqpar::sm90
