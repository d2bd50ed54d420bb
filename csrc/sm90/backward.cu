// Chooses the backward kernel.
#include <algorithm>

#include "../common/launch.h"
#include "backward_grid.h"
#include "backward_instances.h"
#include "launch.h"
#include "problem.h"

namespace seqpar::sm90 {
namespace {

BackwardCut cut_of(const SeqparBackward& a) { return backward_cut(a, 64, 128, std::max(1, multiprocessors(0))); }

template <int D, class T> int32_t by_mask(const SeqparBackward& a, cudaStream_t stream) {
  const bool interval = a.problem.mask == SEQPAR_INTERVAL, softcap = a.problem.softcap != 0.f;
  if (interval && softcap) return backward_instance<D, T, true, true, false>(a, stream);
  if (interval) return backward_instance<D, T, true, false, false>(a, stream);
  if (softcap) return backward_instance<D, T, false, true, false>(a, stream);
  if constexpr (D == 128) {
    if (cut_of(a).rest) return backward_instance<D, T, false, false, true>(a, stream);
  }
  return backward_instance<D, T, false, false, false>(a, stream);
}

template <class T> int32_t by_headdim(const SeqparBackward& a, cudaStream_t stream) {
  if (a.problem.headdim <= 64) return by_mask<64, T>(a, stream);
  if (a.problem.headdim <= 128) return by_mask<128, T>(a, stream);
  if (a.problem.headdim <= 256) return by_mask<256, T>(a, stream);
  return kNoKernel;
}

}  // namespace

int64_t backward_counters(const SeqparBackward& a) {
  const SeqparProblem& x = a.problem;
  const int queries = x.headdim <= 64 ? 128 : 64;  // of a tile, see backward_instance.cuh
  if (!a.deterministic) return cut_ints(cut_of(a), 128);
  return static_cast<int64_t>(x.batch) * x.nheads * ((x.seqlen_q + queries - 1) / queries) * 8;
}

int32_t backward(const SeqparBackward& a, cudaStream_t stream) {
  const SeqparProblem& x = a.problem;
  if (!valid(x)) return kBadArgument;
  if ((a.round_dkv && a.carry_dkv) || (!a.counter && backward_counters(a) > 0)) return kBadArgument;
  if (x.mask == SEQPAR_INTERVAL && (!x.query_lo || !x.query_hi)) return kBadArgument;
  if (x.dtype == SEQPAR_BF16) return by_headdim<Bf16>(a, stream);
  if (x.dtype == SEQPAR_FP16) return by_headdim<Fp16>(a, stream);
  return kBadArgument;
}

}  // namespace seqpar::sm90
