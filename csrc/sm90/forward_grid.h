// How a forward launch is divided into tiles.
#pragma once
#include <stdint.h>

#include <algorithm>

#include "problem.h"

namespace seqpar::sm90 {

// Measured on an H100: which tiles serve which head dimension. WIDE has 192 query rows, NARROW 128, which do less per
// clock but may fill the last wave better.
enum class Rows { kWide, kNarrow };
struct ForwardShape {
  int warpgroups, keys, stages;
};
constexpr ForwardShape forward_shape(int headdim, Rows rows) {
  if (rows == Rows::kNarrow) return {2, 128, 2};
  if (headdim == 256) return {2, 80, 2};
  return headdim == 64 ? ForwardShape{3, 112, 3} : ForwardShape{3, 80, 2};
}

// Under FULL all rows are alike: those of all query heads of a key head are one sequence of blocks, and the tiles of
// the last wave are cut along keys, so that it takes only as long as there is work for all multiprocessors.
struct ForwardGrid {
  int packed, blocks, row_tiles, tiles;  // see ForwardParams; pieces counted once
  int rest, pieces;                      // tiles of the last wave, and into how many each is cut
  double waves;
};

constexpr int kFlags = 4096;

inline ForwardGrid forward_grid(const SeqparProblem& x, const ForwardShape& shape, int multiprocessors) {
  ForwardGrid g = {};
  const bool full = x.mask == SEQPAR_FULL;
  g.packed = full ? x.nheads / x.nheads_kv : 1;
  g.blocks = (x.seqlen_q + 63) / 64;
  g.row_tiles = (g.packed * g.blocks + shape.warpgroups - 1) / shape.warpgroups;
  g.tiles = g.row_tiles * x.batch * (x.nheads / g.packed);
  g.rest = g.tiles % multiprocessors;
  g.pieces = 1;
  double least = g.rest ? 1 : 0;
  const int key_tiles = x.parts * ((x.seqlen_k + shape.keys - 1) / shape.keys);
  constexpr double kPieceCost = 0.015;  // of a tile's time, about a microsecond: what a piece more to be merged takes
  for (int pieces = 2; full && g.rest && pieces <= std::min(6, key_tiles / 8); pieces++) {
    const int turns = (g.rest * pieces + multiprocessors - 1) / multiprocessors;
    if (2 + g.rest * (pieces - 1) * shape.warpgroups > kFlags) break;
    const double waves = static_cast<double>(turns) / pieces + kPieceCost * pieces;
    if (waves < least) {
      least = waves;
      g.pieces = pieces;
    }
  }
  g.waves = g.tiles / multiprocessors + least;
  return g;
}

// Ints that a launch needs: counters and flags, as many for every launch, which leaves them zeroed, and the results of
// pieces behind them.
inline int64_t counter_ints(const ForwardGrid& g, int warpgroups, int headdim) {
  return kFlags + static_cast<int64_t>(g.rest) * (g.pieces - 1) * warpgroups * (headdim / 8 + 1) * 512;
}

}  // namespace seqpar::sm90
