// What a forward kernel is made of: its shape, its shared memory, and the tiles that its CTAs work through.
#pragma once
#include "../common/barrier.cuh"
#include "../common/tma.cuh"
#include "../common/wgmma.cuh"
#include "forward_params.h"

namespace seqpar::sm90 {

// D: head dimension, a multiple of 64; T: Bf16 or Fp16; WARPGROUPS: consumers; KEYS: keys per tile; STAGES: tiles of
// keys and of values in flight; INTERVAL: key bounds per query are loaded; SOFTCAP: scores are capped.
template <int D_, class T_, int WARPGROUPS_, int KEYS_, int STAGES_, bool INTERVAL_, bool SOFTCAP_>
struct ForwardConfig {
  using T = T_;
  static constexpr int D = D_, WARPGROUPS = WARPGROUPS_, KEYS = KEYS_, STAGES = STAGES_, ROWS = 64 * WARPGROUPS;
  static constexpr bool INTERVAL = INTERVAL_, SOFTCAP = SOFTCAP_;
  static constexpr int BLOCKS = D / 64;  // column blocks of 128 bytes
  static constexpr int QUERY_BYTES = 64 * D * 2, KEY_BYTES = KEYS * D * 2;
  static constexpr int LIMIT = 232448, FIXED = WARPGROUPS * QUERY_BYTES + 2 * STAGES * KEY_BYTES + 512;
  // The fp32 accumulator on its way in, and results on theirs out. For D = 256 there is no memory for that: the output
  // goes through that of the queries, and the accumulator from and to registers.
  static constexpr bool STAGED = D <= 128;
  static constexpr int STAGE_BYTES = STAGED ? 64 * D * 4 : QUERY_BYTES;
  static constexpr int SHARED = FIXED + (STAGED ? WARPGROUPS * STAGE_BYTES : 0);
  static_assert(SHARED <= LIMIT, "shared memory");
  static constexpr int THREADS = WARPGROUPS * 128 + 128;
  static constexpr int PRODUCER_REGISTERS = WARPGROUPS == 2 ? 40 : 56, CONSUMER_REGISTERS = WARPGROUPS == 2 ? 232 : 152;
};

struct ForwardMaps {
  CUtensorMap q, k, v, out, acc;
};

// A tile of queries: blocks of 64 rows, one per warpgroup, counted over the rows of `packed` query heads of one key
// head, beginning with `head`. They see the key tiles [first, end) of every part, at least one.
struct ForwardTile {
  int batch, head, block, first, end;
  int begin, stop;  // which of them are attended to, counted from the last one of the last part
  int cut, piece;   // which of the tiles that are cut along keys, or -1, and which piece of it
};
// What a warpgroup is told about a tile by the producer, which has the time for the divisions. `row`: its first, past
// the sequence's end if there is no such block; `left`: how many key tiles, beginning with the one `begin` before the
// last; `slot`: where a piece is left for others; kWhole; or kTakes less the first of the slots that the last piece of
// a tile takes over.
struct __align__(16) ForwardWork {
  int batch, head, row, first, end, begin, left, slot;
  static constexpr int kNone = -1, kWhole = -1, kTakes = -2;  // kNone: batch, when all tiles are done
};

// Key tiles that the query rows [row, end) see: at least one, within [first, last].
template <class C> DEVICE void key_range(const ForwardParams& p, int row, int end, int& first, int& last) {
  const int most = (p.seqlen_k + C::KEYS - 1) / C::KEYS;
  int lo = 0, hi = p.seqlen_k;
  if constexpr (C::INTERVAL) {
    lo = p.key_lo[min(row, p.seqlen_q - 1)];
    hi = p.key_hi[min(end, p.seqlen_q) - 1];
  } else if (p.causal) {
    hi = max(p.offset + end, 0);
  }
  first = min(lo / C::KEYS, most - 1);
  last = max(first + 1, min(most, (hi + C::KEYS - 1) / C::KEYS));
}

template <class C> DEVICE ForwardTile decode(const ForwardParams& p, int number) {
  ForwardTile t;
  t.cut = -1;
  t.piece = 0;
  if (!C::INTERVAL && number >= p.cut_from) {
    t.cut = (number - p.cut_from) / p.pieces;
    t.piece = number - p.cut_from - t.cut * p.pieces;
    number = p.cut_from + t.cut;
  }
  const int turn = p.row_tiles * p.heads_at_once, rest = number % turn;
  const int index = number / turn * p.heads_at_once + rest % p.heads_at_once;  // of (batch, head)
  t.batch = index / p.packs;
  t.head = (index - t.batch * p.packs) * p.packed;
  t.block = (p.row_tiles - 1 - rest / p.heads_at_once) * C::WARPGROUPS;  // the longest first
  key_range<C>(p, 64 * t.block, 64 * t.block + C::ROWS, t.first, t.end);
  t.begin = 0;
  t.stop = (t.end - t.first) * p.parts;
  if (!C::INTERVAL && t.cut >= 0) {
    const int count = t.stop;
    t.begin = count * t.piece / p.pieces;
    t.stop = count * (t.piece + 1) / p.pieces;
  }
  return t;
}

DEVICE ForwardWork work_of(const ForwardParams& p, const ForwardTile& t, int warpgroup) {
  ForwardWork w = {t.batch, t.head, 64 * (t.block + warpgroup), t.first, t.end, t.begin, t.stop - t.begin, -1};
  if (p.packed > 1) {
    const int head = (t.block + warpgroup) / p.blocks;
    w.head += head < p.packed ? head : 0;
    w.row = head < p.packed ? w.row - 64 * head * p.blocks : p.seqlen_q;
  }
  if (t.cut >= 0) {
    const int slot = t.cut * (p.pieces - 1);
    w.slot = t.piece < p.pieces - 1 ? slot + t.piece : ForwardWork::kTakes - slot;
  }
  return w;
}

// Offsets in shared memory, and of the barriers in its last 512 bytes.
template <class C> struct ForwardShared {
  static constexpr int Q = 0, K = C::WARPGROUPS * C::QUERY_BYTES, V = K + C::STAGES * C::KEY_BYTES;
  static constexpr int STAGE = C::STAGED ? V + C::STAGES * C::KEY_BYTES : Q;
  static constexpr int BARRIERS = C::SHARED - 512;
  // Full: the copy engine has written it. Empty: nobody reads it any more. One of each per warpgroup or stage.
  static constexpr int Q_FULL = BARRIERS, Q_EMPTY = Q_FULL + 32, CARRY_FULL = Q_EMPTY + 32,
                       CARRY_EMPTY = CARRY_FULL + 32;
  static constexpr int K_FULL = CARRY_EMPTY + 32, K_EMPTY = K_FULL + 32, V_FULL = K_EMPTY + 32, V_EMPTY = V_FULL + 32;
  // Tile numbers on their way from the producer of keys to that of queries, who may be as many behind as there are
  // stages; and what the consumers are told, two ForwardWork, used in turn, per warpgroup.
  static constexpr int NUMBER_FULL = BARRIERS + 256, NUMBER = NUMBER_FULL + 32, WORK = NUMBER + 16;
  static_assert(C::STAGES < 4, "room for barriers");
};

}  // namespace seqpar::sm90
