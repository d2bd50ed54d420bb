// What both directions ask of a problem.
#pragma once
#include "../common/tensor_map.h"

namespace seqpar::sm90 {

inline bool valid(const SeqparProblem& x) {
  return x.batch >= 1 && x.seqlen_q >= 1 && x.seqlen_k >= 1 && x.parts >= 1 && x.nheads_kv >= 1 &&
         x.nheads % x.nheads_kv == 0 && x.headdim % 8 == 0 && x.headdim >= 8 && x.softmax_scale > 0.f &&
         x.softcap >= 0.f && (x.parts == 1 || x.mask == SEQPAR_FULL);
}

inline Element element_of(const SeqparProblem& x) { return x.dtype == SEQPAR_BF16 ? Element::kBf16 : Element::kFp16; }

// Tensors of the shapes of q and of k.
inline Tiled query_tensor(const SeqparProblem& x, const void* pointer, Element element, const SeqparStrides& strides) {
  return {pointer, element, 1, x.batch, x.seqlen_q, x.nheads, x.headdim, strides};
}
inline Tiled key_tensor(const SeqparProblem& x, const void* pointer, Element element, const SeqparStrides& strides) {
  return {pointer, element, x.parts, x.batch, x.seqlen_k, x.nheads_kv, x.headdim, strides};
}

}  // namespace seqpar::sm90
