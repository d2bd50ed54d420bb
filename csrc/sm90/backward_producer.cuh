// The shape of the backward kernel for head dimensions up to 128, its shared memory, and the warps that fill it.
#pragma once
#include "backward_tile.cuh"

namespace seqpar::sm90 {

// D: head dimension, 64 or 128; QUERIES: rows per tile; T, INTERVAL, SOFTCAP: see ForwardConfig.
template <int D_, class T_, int QUERIES_, bool INTERVAL_, bool SOFTCAP_, bool CUT_> struct BackwardConfig {
  using T = T_;
  static constexpr int D = D_, QUERIES = QUERIES_, KEYS = 128;
  // Tiles in flight. dQ is multiplied one tile late, so that the warpgroups need not wait for each other's dS. The
  // queries of a tile are needed from its scores to its dK, longer than its dout.
  static constexpr int Q_STAGES = 3, DOUT_STAGES = 2, DS_SLOTS = 2;
  static constexpr bool INTERVAL = INTERVAL_, SOFTCAP = SOFTCAP_;
  static constexpr bool CUT = CUT_;         // whether there are pieces of tiles, see BackwardCut
  static constexpr bool STAGGERED = false;  // measured: no difference
  static constexpr int BLOCKS = D / 64;     // column blocks of 128 bytes
  static constexpr int KEY_BYTES = KEYS * D * 2, QUERY_BYTES = QUERIES * D * 2, SCORE_BYTES = QUERIES * KEYS * 2;
  // A warpgroup makes 64 rows by 64 columns of dQ: for D = 128 its half of the columns, for D = 64 its half of the
  // rows.
  static_assert(QUERIES * D == 2 * 64 * 64, "two warpgroups share a tile of dQ");
  static constexpr int DQ_BYTES = 64 * 64 * 4;
  // Whether the scores of the next tile are multiplied before dS of this one is formed. P then waits in 16 bits: as
  // fp16 of 2^14 P, which has enough digits not to add to the error of dS in bf16, and range down to P = 4e-9.
  static constexpr int SHIFT = backward_shift(T::is_bf16);           // P is 2^SHIFT times itself throughout
  static constexpr bool AHEAD = SHIFT > 0 && !INTERVAL && !SOFTCAP;  // those need the registers
  static constexpr int TILES =
      2 * KEY_BYTES + (Q_STAGES + DOUT_STAGES) * QUERY_BYTES + DS_SLOTS * SCORE_BYTES + 2 * DQ_BYTES;
  static constexpr int SHARED = TILES + (Q_STAGES + DOUT_STAGES) * QUERIES * 4 + 176;
  static_assert(SHARED <= 232448, "shared memory");
  static_assert(2 * KEYS * D * 4 <= TILES, "dK and dV are staged in the memory of all tiles");
  static constexpr int THREADS = 384;
};

template <class C> struct BackwardShared {
  static constexpr int K = 0, V = K + C::KEY_BYTES, Q = V + C::KEY_BYTES, DOUT = Q + C::Q_STAGES * C::QUERY_BYTES;
  static constexpr int DS = DOUT + C::DOUT_STAGES * C::QUERY_BYTES, DQ = DS + C::DS_SLOTS * C::SCORE_BYTES;
  static constexpr int LSE = DQ + 2 * C::DQ_BYTES, DELTA = LSE + C::Q_STAGES * C::QUERIES * 4;
  static constexpr int BARRIERS = DELTA + C::DOUT_STAGES * C::QUERIES * 4;
  static constexpr int K_FULL = BARRIERS, V_FULL = K_FULL + 8, Q_FULL = V_FULL + 8, Q_EMPTY = Q_FULL + 24,
                       DOUT_FULL = Q_EMPTY + 24, DOUT_EMPTY = DOUT_FULL + 16, DS_FULL = DOUT_EMPTY + 16;
  static constexpr int INNER = DS_FULL + 16;  // int2 per warp: queries that see all of its warpgroup's keys
  static_assert(INNER + 64 == C::SHARED, "the last bytes");
  static_assert(DQ % 1024 == 0 && DS % 1024 == 0, "swizzled tiles begin at multiples of 1024");
};

// Keys, or values.
template <class C>
DEVICE void load_keys(const CUtensorMap* map, const BackwardTile& t, uint32_t target, uint32_t full) {
  barrier_expect(full, C::KEY_BYTES);
  for (int block = 0; block < C::BLOCKS; block++) {
    load_box(target + block * (C::KEYS * 128), map, full, {64 * block, t.key, t.key_head, t.batch, t.part},
             kEvictFirst);
  }
}

// Tiles of queries, or of dout, into a ring.
template <class C, int STAGES>
DEVICE void load_tiles(const CUtensorMap* map, const BackwardParams& p, const BackwardTile& t, uint32_t target,
                       uint32_t full, uint32_t empty) {
  Ring<STAGES> ring;
  for_each_tile<C>(p, t, [&](int tile, int head) {
    const uint32_t ready = full + 8 * ring.stage();
    barrier_wait(empty + 8 * ring.stage(), ring.parity() ^ 1);
    barrier_expect(ready, C::QUERY_BYTES);
    for (int block = 0; block < C::BLOCKS; block++) {
      load_box(target + ring.stage() * C::QUERY_BYTES + block * (C::QUERIES * 128), map, ready,
               {64 * block, tile * C::QUERIES, head, t.batch, 0}, kEvictLast);
    }
    ring.advance();
  });
}

// An accumulator of these keys, into the L2 cache: soon it will be added to.
template <class C> DEVICE void prefetch_sums(const CUtensorMap* map, const BackwardTile& t) {
  for (int rows = 0; rows < C::KEYS; rows += 64) {
    for (int column = 0; column < C::D; column += 32) {
      prefetch_box(map, {column, t.key + rows, t.key_head, t.batch, t.part});
    }
  }
}

// `warp`: which producer this is.
template <class C>
DEVICE void backward_producer(const BackwardMaps& maps, const BackwardParams& p, uint32_t base, int warp) {
  using S = BackwardShared<C>;
  const BackwardTile t = decode<C>(p);
  if (t.first >= t.end) return;
  const bool first_lane = (threadIdx.x & 31) == 0;
  if (warp == 0 && first_lane) {
    load_keys<C>(&maps.k, t, base + S::K, base + S::K_FULL);
    load_tiles<C, C::Q_STAGES>(&maps.q, p, t, base + S::Q, base + S::Q_FULL, base + S::Q_EMPTY);
    if (p.carry_dkv && t.cut < 0) prefetch_sums<C>(&maps.dk, t);
  } else if (warp == 1 && first_lane) {
    load_keys<C>(&maps.v, t, base + S::V, base + S::V_FULL);
    load_tiles<C, C::DOUT_STAGES>(&maps.dout, p, t, base + S::DOUT, base + S::DOUT_FULL, base + S::DOUT_EMPTY);
    if (p.carry_dkv && t.cut < 0) prefetch_sums<C>(&maps.dv, t);
  } else if (warp == 2) {
    // Rows without keys keep -inf, and rows outside get it, so that their P is 0.
    load_rows<C, C::Q_STAGES>(p.lse + t.batch * p.lse_batch, p.lse_head, -kLog2E, C::SHIFT, -INFINITY, p, t,
                              base + S::LSE, base + S::Q_FULL, base + S::Q_EMPTY);
  } else if (warp == 3) {
    load_rows<C, C::DOUT_STAGES>(p.delta + t.batch * p.delta_batch, p.delta_head, 1.f, 0.f, 0.f, p, t, base + S::DELTA,
                                 base + S::DOUT_FULL, base + S::DOUT_EMPTY);
  }
}

}  // namespace seqpar::sm90
