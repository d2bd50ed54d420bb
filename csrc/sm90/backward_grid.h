// How a backward launch is divided among multiprocessors.
#pragma once
#include <stdint.h>

#include "problem.h"

namespace seqpar::sm90 {

// Under FULL all key tiles take the same time, and the last wave of them would leave multiprocessors idle for most of
// it. So its tiles are cut along their queries: each has one long piece, and `shorts` short ones for those
// multiprocessors that get no long one. `rest`: tiles that are cut; `long_end`: query tiles of a long piece.
struct BackwardCut {
  int rest, shorts, long_end;
};

constexpr int kMostCutTiles = 256, kMostPieces = 288;

// `queries`, `keys`: of a tile.
inline BackwardCut backward_cut(const SeqparBackward& a, int queries, int keys, int multiprocessors) {
  const SeqparProblem& x = a.problem;
  const int query_tiles = (x.seqlen_q + queries - 1) / queries, group = x.nheads / x.nheads_kv;
  const int64_t tiles = static_cast<int64_t>((x.seqlen_k + keys - 1) / keys) * x.parts * x.nheads_kv * x.batch;
  const int rest = static_cast<int>(tiles % multiprocessors), free = multiprocessors - rest;
  BackwardCut best = {0, 0, query_tiles};
  // In a fixed order key tiles come to a query tile one after the other. For the rest there is no such kernel: with D =
  // 64 the code for pieces costs the loop as much as cut tiles save, and under a causal mask, whose waves do not leave
  // much, CTAs lost each other by it (see BackwardTile).
  const bool served = x.mask == SEQPAR_FULL && x.headdim > 64 && x.headdim <= 128 && x.softcap == 0.f;
  if (!served || a.deterministic) return best;
  if (!rest || rest > kMostCutTiles) return best;
  // In units of one step, some 2.3 us: what a piece takes before and after its steps, and what it takes to add another
  // piece's sums.
  constexpr double kPiece = 2, kSum = 1;
  const double steps = static_cast<double>(query_tiles) * group;
  double least = 0.94 * (steps + kPiece);  // for less than that it is not worth the memory
  for (int shorts = 1; shorts <= 16 && rest * (shorts + 1) <= kMostPieces; shorts++) {
    const int turns = (rest * shorts + free - 1) / free;
    // The long piece takes as long as `turns` short ones.
    const double long_steps =
        (turns * steps / shorts + (turns - 1) * kPiece) / (1 + static_cast<double>(turns) / shorts);
    const double time = long_steps + kPiece + kSum * shorts;
    const int long_end = static_cast<int>(long_steps / group + 0.5);
    if (time < least && long_end >= 1 && query_tiles - long_end >= shorts) {
      least = time;
      best = {rest, shorts, long_end};
    }
  }
  return best;
}

// Ints that a launch with such a cut needs: a counter per tile, and the sums of all pieces behind them.
inline int64_t cut_ints(const BackwardCut& cut, int headdim) {
  if (!cut.rest) return 0;
  return kMostCutTiles + static_cast<int64_t>(cut.rest) * (cut.shorts + 1) * 2 * headdim * 128;
}

}  // namespace seqpar::sm90
