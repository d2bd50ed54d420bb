// What both backward kernels share: who works on which tiles, lse and delta for them, which queries see a key, and
// whose turn it is to add to dq.
#pragma once
#include "../common/barrier.cuh"
#include "../common/tma.cuh"
#include "../common/wgmma.cuh"
#include "backward_params.h"

namespace seqpar::sm90 {

struct BackwardMaps {
  CUtensorMap q, k, v, dout, dq, dk, dv;
};

// A key tile of one part, and the query tiles [first, end) that see it. CTAs of a wave begin together and those of the
// next one as these end, the shortest first. So that all are always at the same queries, and find in the L2 cache what
// another has loaded or added to, one wave walks down from the end, where all key tiles' queries end under a causal
// mask, and the next one up; and all heads of a group see a query tile in turn, or they would come apart by a little in
// every head.
struct BackwardTile {
  int batch, key_head, part, key, first, end;
  int cut, piece;  // which of the tiles that are cut, or -1, and which piece of it
  bool down;
};

// Query tiles that see the key tile at `key`.
template <class C> DEVICE int first_query_tile(const BackwardParams& p, int key) {
  if constexpr (C::INTERVAL) return p.query_lo[key] / C::QUERIES;
  return p.causal ? max(0, key - p.offset) / C::QUERIES : 0;
}
template <class C> DEVICE int end_query_tile(const BackwardParams& p, int key) {
  if constexpr (!C::INTERVAL) return p.query_tiles;
  return min(p.query_tiles, (p.query_hi[min(key + C::KEYS, p.seqlen_k) - 1] + C::QUERIES - 1) / C::QUERIES);
}

// Grid: (key heads that take turns, key tiles, such groups of heads over all batches). Where key tiles differ, the
// first ones take longest under a causal mask, and go first.
DEVICE int key_tile() { return blockIdx.y; }
DEVICE int key_head(const BackwardParams& p, int batch) {
  return (blockIdx.z - batch * p.head_groups) * gridDim.x + blockIdx.x;
}
DEVICE int cta_number() { return blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z); }
template <class C> DEVICE BackwardTile decode(const BackwardParams& p) {
  BackwardTile t;
  int tile = key_tile(), heads = blockIdx.z;
  t.cut = -1;
  t.piece = 0;
  if constexpr (C::CUT) {
    const int beyond = cta_number() - p.whole;
    if (beyond >= 0) {  // long pieces first
      t.piece = beyond / p.rest;
      t.cut = beyond - t.piece * p.rest;
      heads = (p.whole + t.cut) / p.key_tiles;
      tile = p.whole + t.cut - heads * p.key_tiles;
    }
  }
  t.batch = p.batch == 1 ? 0 : heads / p.head_groups;
  t.key_head = (heads - t.batch * p.head_groups) * gridDim.x + blockIdx.x;
  t.part = 0;
  t.key = tile * C::KEYS;
  if (p.key_tiles_per_part < p.key_tiles) {
    t.part = tile / p.key_tiles_per_part;
    t.key -= t.part * p.key_tiles_per_part * C::KEYS;
  }
  t.end = end_query_tile<C>(p, t.key);
  t.first = min(first_query_tile<C>(p, t.key), t.end);
  if (C::CUT && t.cut >= 0) {
    const int left = p.query_tiles - p.long_end;
    t.first = t.piece ? p.long_end + left * (t.piece - 1) / p.shorts : 0;
    t.end = p.long_end + left * t.piece / p.shorts;
  }
  t.down = p.wave && cta_number() / p.wave % 2 == 0;
  return t;
}

// A place in a ring of buffers, and the parity of the current round. Of two buffers it is one number: registers are
// short.
template <int STAGES> class Ring {
 public:
  DEVICE int stage() const { return STAGES == 2 ? index & 1 : index; }
  DEVICE int parity() const { return STAGES == 2 ? (index >> 1) & 1 : round; }
  DEVICE void advance() {
    index++;
    if (STAGES != 2 && index == STAGES) {
      index = 0;
      round ^= 1;
    }
  }
  DEVICE Ring before() const {
    Ring r = *this;
    if (STAGES != 2 && index == 0) {
      r.index = STAGES - 1;
      r.round ^= 1;
    } else {
      r.index--;
    }
    return r;
  }

 private:
  int index = 0, round = 0;
};

// The order in which query tiles are walked over. Who begins late comes round to the first one.
template <class C> DEVICE int begin_tile(const BackwardParams& p, const BackwardTile& t) {
  if (t.down) return t.end - 1;
  return C::STAGGERED && p.stagger ? key_tile() * p.stagger % p.query_tiles : t.first;
}
template <class C> DEVICE int tile_after(const BackwardParams& p, bool down, int tile) {
  if (down) return tile - 1;
  return C::STAGGERED && tile + 1 == p.query_tiles ? 0 : tile + 1;
}

// The producers are one warp each for queries and dout, lse and delta: together they would need more registers than the
// consumers leave. All walk over the same tiles.
template <class C, class Visit> DEVICE void for_each_tile(const BackwardParams& p, const BackwardTile& t, Visit visit) {
  int tile = begin_tile<C>(p, t);
#pragma unroll 1
  for (int left = t.end - t.first; left > 0; left--, tile = tile_after<C>(p, t.down, tile)) {
#pragma unroll 1
    for (int h = 0; h < p.group; h++) visit(tile, t.key_head * p.group + h);
  }
}

// lse, or delta, of each tile, times `factor` plus `shift`. Rows outside the sequence get `outside`.
template <class C, int STAGES>
DEVICE void load_rows(const float* from, int64_t head_stride, float factor, float shift, float outside,
                      const BackwardParams& p, const BackwardTile& t, uint32_t target, uint32_t full, uint32_t empty) {
  const int lane = threadIdx.x & 31;
  Ring<STAGES> ring;
  for_each_tile<C>(p, t, [&](int tile, int head) {
    barrier_wait(empty + 8 * ring.stage(), ring.parity() ^ 1);
#pragma unroll 1
    for (int r = lane; r < C::QUERIES; r += 32) {
      const int row = tile * C::QUERIES + r;
      const float x = row < p.seqlen_q ? from[head * head_stride + row] : outside;
      const float y = x == -INFINITY ? x : fmaf(x, factor, shift);
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(target + 4 * (ring.stage() * C::QUERIES + r)), "f"(y) : "memory");
    }
    warp_arrive(full + 8 * ring.stage());
    ring.advance();
  });
}

// The queries [x, y) that see a key; y counts under INTERVAL only.
template <class C> DEVICE int2 seeing_queries(const BackwardParams& p, int key) {
  constexpr int kNever = 1 << 30;
  if (key >= p.seqlen_k) return make_int2(kNever, kNever);
  if constexpr (C::INTERVAL) return make_int2(p.query_lo[key], p.query_hi[key]);
  return make_int2(p.causal ? key - p.offset : -kNever, kNever);
}

// Deterministic: key tiles add to a query tile in their order. A counter, one of a query tile's 8 in `turns`, says how
// many have.
template <class C> DEVICE void wait_for_turn(const BackwardParams& p, const int* turns, int query_tile) {
  int before = key_tile();
  if constexpr (C::INTERVAL) {  // only those that the query tile sees
    int first = 0;
    while (end_query_tile<C>(p, first * C::KEYS) <= query_tile) first++;
    before -= first;
  }
  int done;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(turns) : "memory");
  } while (done != before);
}
template <class C> DEVICE void end_turn(const BackwardParams& p, int* turns, int query_tile) {
  const int next = key_tile() + 1;
  const bool last = next == p.key_tiles || first_query_tile<C>(p, next * C::KEYS) > query_tile;
  bulk_wait();
  // What the copy engine wrote comes before what this thread writes.
  asm volatile("fence.proxy.async.global;" ::: "memory");
  if (last) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(turns), "r"(0) : "memory");
  } else {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(turns), "r"(1) : "memory");
  }
}

}  // namespace seqpar::sm90
