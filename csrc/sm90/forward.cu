// Chooses the forward kernel.
#include <algorithm>

#include "../common/launch.h"
#include "forward_instances.h"
#include "launch.h"
#include "problem.h"

namespace seqpar::sm90 {
namespace {

template <int D, class T, Rows ROWS> int32_t by_mask(const SeqparForward& a, cudaStream_t stream) {
  const bool interval = a.problem.mask == SEQPAR_INTERVAL, softcap = a.problem.softcap != 0.f;
  if (interval && softcap) return forward_instance<D, T, ROWS, true, true>(a, stream);
  if (interval) return forward_instance<D, T, ROWS, true, false>(a, stream);
  if (softcap) return forward_instance<D, T, ROWS, false, true>(a, stream);
  return forward_instance<D, T, ROWS, false, false>(a, stream);
}

// Whether tiles of 128 rows take less time than those of 192, which do more per clock but fill the last wave worse.
bool prefers_narrow(const SeqparProblem& x) {
  if (x.variant) return x.variant == 2;
  const int sms = std::max(1, multiprocessors(x.sm_margin));
  const auto rows_in_turn = [&](int rows) {
    const int64_t tiles = static_cast<int64_t>((x.seqlen_q + rows - 1) / rows) * x.batch * x.nheads;
    return static_cast<double>((tiles + sms - 1) / sms * rows);
  };
  constexpr double kNarrowRate = 0.91;  // of the wide tiles' rate, measured
  return rows_in_turn(128) < rows_in_turn(192) * kNarrowRate;
}

template <class T> int32_t by_headdim(const SeqparForward& a, cudaStream_t stream) {
  const SeqparProblem& x = a.problem;
  if (x.headdim <= 64) return by_mask<64, T, Rows::kWide>(a, stream);
  if (x.headdim <= 128) {
    const bool plain = x.mask != SEQPAR_INTERVAL && x.softcap == 0.f;
    if (plain && prefers_narrow(x)) return forward_instance<128, T, Rows::kNarrow, false, false>(a, stream);
    return by_mask<128, T, Rows::kWide>(a, stream);
  }
  return kNoKernel;
}

}  // namespace

int32_t forward(const SeqparForward& a, cudaStream_t stream) {
  const SeqparProblem& x = a.problem;
  if (!valid(x) || !a.counter) return kBadArgument;
  if (x.mask == SEQPAR_INTERVAL && (!x.key_lo || !x.key_hi)) return kBadArgument;
  if (((a.carry || a.keep) && !a.out_acc) || (!a.keep && !a.out)) return kBadArgument;
  if (x.dtype == SEQPAR_BF16) return by_headdim<Bf16>(a, stream);
  if (x.dtype == SEQPAR_FP16) return by_headdim<Fp16>(a, stream);
  return kBadArgument;
}

}  // namespace seqpar::sm90
