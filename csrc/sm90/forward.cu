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

// Which of the two shapes takes less time.
Rows choose(const SeqparProblem& x) {
  if (x.headdim <= 64 || x.headdim > 128 || x.mask == SEQPAR_INTERVAL || x.softcap != 0.f)
    return Rows::kWide;  // the only one
  if (x.variant) return x.variant == 2 ? Rows::kNarrow : Rows::kWide;
  const int sms = std::max(1, multiprocessors(x.sm_margin));
  const auto time = [&](Rows rows) {
    const ForwardShape shape = forward_shape(128, rows);
    return forward_grid(x, shape, sms).waves * shape.warpgroups;
  };
  constexpr double kNarrowRate = 0.91;  // of the wide tiles' rate, measured
  return time(Rows::kNarrow) < time(Rows::kWide) * kNarrowRate ? Rows::kNarrow : Rows::kWide;
}

template <class T> int32_t by_headdim(const SeqparForward& a, cudaStream_t stream) {
  const SeqparProblem& x = a.problem;
  if (x.headdim <= 64) return by_mask<64, T, Rows::kWide>(a, stream);
  if (x.headdim <= 128) {
    if (choose(x) == Rows::kNarrow) return forward_instance<128, T, Rows::kNarrow, false, false>(a, stream);
    return by_mask<128, T, Rows::kWide>(a, stream);
  }
  if (x.headdim <= 256) return by_mask<256, T, Rows::kWide>(a, stream);
  return kNoKernel;
}

}  // namespace

int64_t forward_counters(const SeqparForward& a) {
  const SeqparProblem& x = a.problem;
  const int headdim = x.headdim <= 64 ? 64 : x.headdim <= 128 ? 128 : 256;
  const ForwardShape shape = forward_shape(headdim, choose(x));
  const ForwardGrid g = forward_grid(x, shape, std::max(1, multiprocessors(x.sm_margin)));
  return counter_ints(g, shape.warpgroups, headdim);
}

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
