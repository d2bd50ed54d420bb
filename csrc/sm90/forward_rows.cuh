// What a consumer warpgroup of the forward kernel does with its 64 query rows: products, softmax, the loop over key
// tiles.
#pragma once
#include "forward_producer.cuh"

namespace seqpar::sm90 {

// A warpgroup's 64 query rows. Thread registers: rows r0 and r0 + 8 of the warpgroup.
template <class C> struct ForwardRows {
  using S = ForwardShared<C>;
  using T = typename C::T;
  static constexpr int KEYS = C::KEYS, D = C::D;

  const ForwardMaps& maps;
  const ForwardParams& p;
  uint8_t* shared;
  uint32_t base;
  int warpgroup, warp, lane, r0;
  bool leader;
  uint64_t q_tile, k_tile, v_tile;  // descriptors
  float scores[KEYS / 2], out[D / 2];
  uint32_t probabilities[KEYS / 4];
  float m0, m1, l0, l1;    // reference of the exponentials (base 2), sum of this thread's
  float a0, a1;            // what out must be multiplied by
  float c0, c1;            // carried lse
  int lo0, lo1, hi0, hi1;  // keys that rows r0 and r0 + 8 see, less this thread's first column
  int stage = 0, phase = 0;

  DEVICE ForwardRows(const ForwardMaps& maps, const ForwardParams& p, uint8_t* shared)
      : maps(maps), p(p), shared(shared), base(shared_address(shared)) {
    const int index = __shfl_sync(~0u, static_cast<int>(threadIdx.x) >> 5, 0);
    warpgroup = index >> 2;
    warp = index & 3;
    lane = threadIdx.x & 31;
    r0 = warp * 16 + (lane >> 2);
    leader = (threadIdx.x & 127) == 0;
    q_tile = tile_descriptor(base + S::Q + warpgroup * C::QUERY_BYTES, 0);
    k_tile = tile_descriptor(base + S::K, 0);
    v_tile = tile_descriptor(base + S::V, KEYS * 128);
  }

  DEVICE uint32_t stage_memory() const { return base + S::STAGE + warpgroup * C::STAGE_BYTES; }
  DEVICE void release(int barrier) const {
    if (lane == 0) barrier_arrive(base + barrier);
  }
  DEVICE void advance() {
    if (++stage == C::STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
  DEVICE void sync() const { named_sync(4 + warpgroup, 128); }

  DEVICE void multiply_keys() {
    const uint64_t a = opaque(q_tile), b = k_tile + stage * moved(C::KEY_BYTES);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
      const uint64_t ak = a + (k / 4) * moved(8192) + (k % 4) * 2, bk = b + (k / 4) * moved(KEYS * 128) + (k % 4) * 2;
      if (k == 0) {
        wgmma_ss_first<T>(scores, ak, bk);
      } else {
        wgmma_ss<T>(scores, ak, bk);
      }
    }
    wgmma_commit();
  }
  DEVICE void multiply_values(int stage) {
    const uint64_t b = v_tile + stage * moved(C::KEY_BYTES);
#pragma unroll
    for (int k = 0; k < KEYS / 16; k++) {
      const uint32_t* x = probabilities + 4 * k;
      wgmma_rs<T>(out, x[0], x[1], x[2], x[3], b + k * moved(2048));
    }
    wgmma_commit();
  }

  // Scores of the tile whose first key is `key` become exponentials. Returns whether this warp must rescale `out` by
  // (a0, a1).
  template <class Masked> DEVICE bool softmax(Masked, int key) {
    if constexpr (C::SOFTCAP) {
#pragma unroll
      for (int i = 0; i < KEYS / 2; i++) scores[i] = tanh_exact(scores[i] * p.score_scale);
    }
    if constexpr (Masked::value) {
      const int e0 = hi0 - key, e1 = hi1 - key;
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          if (8 * j + c >= e0) scores[4 * j + c] = -INFINITY;
          if (8 * j + c >= e1) scores[4 * j + 2 + c] = -INFINITY;
          if constexpr (C::INTERVAL) {
            if (8 * j + c < lo0 - key) scores[4 * j + c] = -INFINITY;
            if (8 * j + c < lo1 - key) scores[4 * j + 2 + c] = -INFINITY;
          }
        }
      }
    }
    float x0 = fmaxf(scores[0], scores[1]), x1 = fmaxf(scores[2], scores[3]);
    float y0 = fmaxf(scores[4], scores[5]), y1 = fmaxf(scores[6], scores[7]);
#pragma unroll
    for (int j = 2; j < KEYS / 8; j += 2) {
      x0 = fmaxf(x0, fmaxf(scores[4 * j], scores[4 * j + 1]));
      x1 = fmaxf(x1, fmaxf(scores[4 * j + 2], scores[4 * j + 3]));
      y0 = fmaxf(y0, fmaxf(scores[4 * j + 4], scores[4 * j + 5]));
      y1 = fmaxf(y1, fmaxf(scores[4 * j + 6], scores[4 * j + 7]));
    }
    x0 = fmaxf(x0, y0);
    x1 = fmaxf(x1, y1);
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      x0 = fmaxf(x0, __shfl_xor_sync(~0u, x0, distance));
      x1 = fmaxf(x1, __shfl_xor_sync(~0u, x1, distance));
    }
    x0 *= p.scale_log2;
    x1 *= p.scale_log2;
    // NaN compares false: it then reaches the output through the exponentials.
    const bool move = __any_sync(~0u, x0 > m0 + 8.f || x1 > m1 + 8.f);
    if (move) {
      x0 = fmaxf(x0, m0);
      x1 = fmaxf(x1, m1);
      a0 = exp2_fast(m0 - (x0 == -INFINITY ? 0.f : x0));
      a1 = exp2_fast(m1 - (x1 == -INFINITY ? 0.f : x1));
      m0 = x0;
      m1 = x1;
      l0 *= a0;
      l1 *= a1;
    }
    float n0 = -m0, n1 = -m1;
    if constexpr (Masked::value) {  // a row that has seen no key yet
      if (m0 == -INFINITY) n0 = 0.f;
      if (m1 == -INFINITY) n1 = 0.f;
    }
    float s0 = 0.f, s1 = 0.f;
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++) {
      scores[4 * j] = exp2_fast(fmaf(scores[4 * j], p.scale_log2, n0));
      scores[4 * j + 1] = exp2_fast(fmaf(scores[4 * j + 1], p.scale_log2, n0));
      scores[4 * j + 2] = exp2_fast(fmaf(scores[4 * j + 2], p.scale_log2, n1));
      scores[4 * j + 3] = exp2_fast(fmaf(scores[4 * j + 3], p.scale_log2, n1));
      l0 += scores[4 * j];
      s0 += scores[4 * j + 1];
      l1 += scores[4 * j + 2];
      s1 += scores[4 * j + 3];
    }
    l0 += s0;
    l1 += s1;
    return move;
  }

  DEVICE void pack_probabilities() {
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) probabilities[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }
  DEVICE void rescale() {
#pragma unroll
    for (int i = 0; i < D / 8; i++) {
      out[4 * i] *= a0;
      out[4 * i + 1] *= a0;
      out[4 * i + 2] *= a1;
      out[4 * i + 3] *= a1;
    }
  }

  // The scores of the tile at `key` beside the values of the tile before.
  template <class Masked> DEVICE void step(Masked masked, int key) {
    const int before = stage, phase_before = phase;
    advance();
    barrier_wait(base + S::K_FULL + 8 * stage, phase);
    pin(out);
    pin(probabilities);
    wgmma_fence();
    multiply_keys();
    barrier_wait(base + S::V_FULL + 8 * before, phase_before);
    wgmma_fence();
    multiply_values(before);
    wgmma_wait<1>();
    pin(scores);
    release(S::K_EMPTY + 8 * stage);
    const bool move = softmax(masked, key);
    pin(scores);
    wgmma_wait<0>();
    pin(out);
    pin(probabilities);
    release(S::V_EMPTY + 8 * before);
    if (move) rescale();
    pack_probabilities();
  }

  // A tile that only other warpgroups see.
  DEVICE void skip() {
    barrier_wait(base + S::K_FULL + 8 * stage, phase);
    release(S::K_EMPTY + 8 * stage);
    barrier_wait(base + S::V_FULL + 8 * stage, phase);
    release(S::V_EMPTY + 8 * stage);
    advance();
  }

  DEVICE void set_bounds(int row) {
    lo0 = lo1 = 0;
    hi0 = hi1 = p.seqlen_k;
    if constexpr (C::INTERVAL) {
      const int i0 = min(row, p.seqlen_q - 1), i1 = min(row + 8, p.seqlen_q - 1);
      const int column = 2 * (lane & 3);
      lo0 = p.key_lo[i0] - column;
      lo1 = p.key_lo[i1] - column;
      hi0 = p.key_hi[i0];
      hi1 = p.key_hi[i1];
    } else if (p.causal) {
      hi0 = min(hi0, row + p.offset + 1);
      hi1 = min(hi1, row + 8 + p.offset + 1);
    }
    hi0 -= 2 * (lane & 3);
    hi1 -= 2 * (lane & 3);
  }

  // Whether the output goes through the memory of the queries.
  DEVICE bool holds_queries(const ForwardWork& t) const { return !C::STAGED && p.finish && t.slot < 0; }

  // All key tiles of this warpgroup's rows; on return the last product with values is in flight, with its stage
  // current. Returns that tile: those before it are for other warpgroups only.
  DEVICE int attend(const ForwardWork& t, int turn) {
    const int row = t.row;
    set_bounds(row + r0);
    m0 = m1 = -INFINITY;
    l0 = l1 = 0.f;
    c0 = c1 = -INFINITY;
    if (p.carry && t.slot < 0) {  // long before it is needed
      const float* lse = p.lse + t.batch * p.lse_batch + t.head * p.lse_head + row + r0;
      if (row + r0 < p.seqlen_q) c0 = lse[0];
      if (row + r0 + 8 < p.seqlen_q) c1 = lse[8];
    }
#pragma unroll
    for (int i = 0; i < D / 2; i++) out[i] = 0.f;
    int first = t.first, end = t.end;                    // this warpgroup's key tiles
    int inner_first = 0, inner_end = p.seqlen_k / KEYS;  // tiles all of whose keys all of its rows see
    if (C::INTERVAL || p.causal) {
      int own_first, own_end;
      key_range<C>(p, row, row + 64, own_first, own_end);
      first = min(max(first, own_first), end - 1);
      end = max(first + 1, min(end, own_end));
      if constexpr (C::INTERVAL) {
        inner_first = (p.key_lo[min(row + 63, p.seqlen_q - 1)] + KEYS - 1) / KEYS;
        inner_end = min(inner_end, p.key_hi[min(row, p.seqlen_q - 1)] / KEYS);
      } else {
        inner_end = min(inner_end, max(p.offset + row + 1, 0) / KEYS);
      }
      for (int j = t.end; j > end; j--) skip();
    }
    int j = end - 1, left = end - first;
    if (!C::INTERVAL && !p.causal) {
      j -= t.begin % left;
      left = t.left;
    }
    barrier_wait(base + S::K_FULL + 8 * stage, phase);
    wgmma_fence();
    multiply_keys();
    wgmma_wait<0>();
    pin(scores);
    release(S::K_EMPTY + 8 * stage);
    softmax(Yes{}, j * KEYS);
    pack_probabilities();
    if (C::STAGED && p.carry && turn > 0 && leader) {  // the next carried tile may come when the last one is stored
      bulk_wait_read();
      barrier_arrive(base + S::CARRY_EMPTY + 8 * warpgroup);
    }
    while (--left > 0) {
      if (--j < first) j = end - 1;  // of the part before
      if (j >= inner_end || (C::INTERVAL && j < inner_first)) {
        step(Yes{}, j * KEYS);
      } else {
        step(No{}, j * KEYS);
      }
    }
    if (!holds_queries(t)) release(S::Q_EMPTY + 8 * warpgroup);
    barrier_wait(base + S::V_FULL + 8 * stage, phase);
    pin(out);
    pin(probabilities);
    wgmma_fence();
    multiply_values(stage);
    return first;
  }
};

}  // namespace seqpar::sm90
