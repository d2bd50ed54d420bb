// Exact attention backward for Hopper and head dimensions up to 256, given the global lse and delta.
//
// What two warpgroups share in backward_kernel.cuh does not fit their registers here, so each of three has one gradient
// and hands on what the next one needs: the first forms P and sums dV, the second gets P, forms dS and sums dK, the
// third multiplies dQ = dS K and has the copy engine add it. Scores and dP are formed transposed (keys are rows), so
// that P and dS are register operands of the products for dV and dK: shared memory, not the tensor cores, is what this
// head dimension is short of. A CTA owns 64 keys and walks over the query tiles that see them, for all query heads of
// their group; while one warpgroup takes exponentials or stores, the others multiply.
#pragma once
#include "backward_tile.cuh"

namespace seqpar::sm90 {

// T, INTERVAL, SOFTCAP: see ForwardConfig.
template <class T_, bool INTERVAL_, bool SOFTCAP_> struct WideConfig {
  using T = T_;
  static constexpr int D = 256, QUERIES = 64, KEYS = 64;
  static constexpr bool INTERVAL = INTERVAL_, SOFTCAP = SOFTCAP_;
  // Of dout there is room for one and a half tiles: it comes in halves of 128 columns.
  static constexpr int Q_STAGES = 2, HALVES = 3;
  static constexpr int BLOCK_BYTES = 64 * 128;  // of 64 rows by 64 columns of 16 bits, or by 32 of fp32
  static constexpr int HALF_BYTES = 2 * BLOCK_BYTES, TILE_BYTES = 2 * HALF_BYTES;
  // P, dS and the sums are 2^SHIFT times themselves, as in the other kernel; between warpgroups P goes as fp16 of 2^14
  // P, which has enough digits not to add to the error of dS in 16 bits, and range down to P = 4e-9.
  static constexpr int SHIFT = backward_shift(T::is_bf16), MESSAGE_SHIFT = 14;
  static constexpr int THREADS = 512;
};

template <class C> struct WideShared {
  static constexpr int K = 0, V = K + C::TILE_BYTES, Q = V + C::TILE_BYTES, DOUT = Q + C::Q_STAGES * C::TILE_BYTES;
  static constexpr int P = DOUT + C::HALVES * C::HALF_BYTES, DS = P + C::BLOCK_BYTES, DQ = DS + C::BLOCK_BYTES;
  static constexpr int LSE = DQ + 4 * C::BLOCK_BYTES, DELTA = LSE + C::Q_STAGES * C::QUERIES * 4;
  // lse and delta come and go with the tile of queries.
  static constexpr int KV_FULL = DELTA + C::Q_STAGES * C::QUERIES * 4, Q_FULL = KV_FULL + 8,
                       Q_EMPTY = Q_FULL + 8 * C::Q_STAGES, DOUT_FULL = Q_EMPTY + 8 * C::Q_STAGES,
                       DOUT_EMPTY = DOUT_FULL + 8 * C::HALVES, P_FULL = DOUT_EMPTY + 8 * C::HALVES,
                       P_EMPTY = P_FULL + 8, DS_FULL = P_EMPTY + 8, DS_EMPTY = DS_FULL + 8;
  static constexpr int INNER = DS_EMPTY + 8;  // int2: queries that see all keys
  static constexpr int BYTES = INNER + 8;
  static_assert(INNER % 8 == 0, "aligned");
  static_assert(BYTES <= 232448, "shared memory");
  static_assert(P % 1024 == 0 && DS % 1024 == 0 && DQ % 1024 == 0, "swizzled tiles begin at multiples of 1024");
  // dV and dK as fp32 are staged in the memory of K and V, and of Q.
  static_assert(V + C::TILE_BYTES == Q && C::Q_STAGES == 2, "64 KiB each");
};

// Tiles of queries, or of dout, into a ring, each in so many pieces.
template <class C, int STAGES, int PIECES>
DEVICE void load_pieces(const CUtensorMap* map, const BackwardParams& p, const BackwardTile& t, uint32_t target,
                        uint32_t full, uint32_t empty) {
  constexpr int kBlocks = 4 / PIECES;
  Ring<STAGES> ring;
  for_each_tile(p, t, [&](int tile, int head) {
    for (int piece = 0; piece < PIECES; piece++) {
      const uint32_t ready = full + 8 * ring.stage(), memory = target + ring.stage() * (kBlocks * C::BLOCK_BYTES);
      barrier_wait(empty + 8 * ring.stage(), ring.parity() ^ 1);
      barrier_expect(ready, kBlocks * C::BLOCK_BYTES);
      for (int block = 0; block < kBlocks; block++) {
        load_box(memory + block * C::BLOCK_BYTES, map, ready,
                 {64 * (piece * kBlocks + block), tile * C::QUERIES, head, t.batch, 0}, kEvictLast);
      }
      ring.advance();
    }
  });
}

// `warp`: which producer this is.
template <class C>
DEVICE void wide_producer(const BackwardMaps& maps, const BackwardParams& p, uint32_t base, int warp) {
  using S = WideShared<C>;
  const BackwardTile t = decode<C>(p);
  if (t.first >= t.end) return;
  const bool first_lane = (threadIdx.x & 31) == 0;
  if (warp == 0 && first_lane) {
    barrier_expect(base + S::KV_FULL, 2 * C::TILE_BYTES);
    for (int block = 0; block < 4; block++) {
      const BoxAt at = {64 * block, t.key, t.key_head, t.batch, t.part};
      load_box(base + S::K + block * C::BLOCK_BYTES, &maps.k, base + S::KV_FULL, at, kEvictFirst);
      load_box(base + S::V + block * C::BLOCK_BYTES, &maps.v, base + S::KV_FULL, at, kEvictFirst);
    }
    load_pieces<C, C::Q_STAGES, 1>(&maps.q, p, t, base + S::Q, base + S::Q_FULL, base + S::Q_EMPTY);
  } else if (warp == 1 && first_lane) {
    load_pieces<C, C::HALVES, 2>(&maps.dout, p, t, base + S::DOUT, base + S::DOUT_FULL, base + S::DOUT_EMPTY);
  } else if (warp == 2) {
    // Rows without keys keep -inf, and rows outside get it, so that their P is 0.
    load_rows<C, C::Q_STAGES>(p.lse + t.batch * p.lse_batch, p.lse_head, -kLog2E, C::SHIFT, -INFINITY, p, t,
                              base + S::LSE, base + S::Q_FULL, base + S::Q_EMPTY);
  } else if (warp == 3) {
    load_rows<C, C::Q_STAGES>(p.delta + t.batch * p.delta_batch, p.delta_head, 1.f, 0.f, 0.f, p, t, base + S::DELTA,
                              base + S::Q_FULL, base + S::Q_EMPTY);
  }
}

// What the three warpgroups have in common.
template <class C> struct WideConsumer {
  using S = WideShared<C>;
  using T = typename C::T;
  static constexpr float kUnshift = 1.f / (1 << C::SHIFT);

  const BackwardMaps& maps;
  const BackwardParams& p;
  uint8_t* shared;
  uint32_t base;
  int warp, lane;  // warp of this warpgroup

  DEVICE WideConsumer(const BackwardMaps& maps, const BackwardParams& p, uint8_t* shared, int warp)
      : maps(maps), p(p), shared(shared), base(shared_address(shared)), warp(warp & 3), lane(threadIdx.x & 31) {}

  // See BackwardConsumer::tile.
  DEVICE uint64_t tile(int offset, int lead = 0) const {
    return descriptor((opaque(base) >> 4) + (offset >> 4) + ((lead >> 4) << 16));
  }
  // One arrival per warp, after all its lanes.
  DEVICE void arrive(int barrier) const {
    __syncwarp();
    if (lane == 0) barrier_arrive(base + barrier);
  }
  // The tiles that this CTA walks over.
  DEVICE int steps(const BackwardTile& t) const { return (t.end - t.first) * p.group; }

  // Two numbers per column, for columns 8 j + 2 (lane % 4) + {0, 1}.
  DEVICE float2 of_queries(int vectors, int stage, int j) const {
    return *reinterpret_cast<const float2*>(shared + vectors + 4 * (stage * C::QUERIES + 8 * j + 2 * (lane & 3)));
  }
  // What the first warpgroup's thread hands to the second's in the same place: four times 16 bytes.
  DEVICE uint4* message(int i) const { return reinterpret_cast<uint4*>(shared + S::P) + 128 * i + (threadIdx.x & 127); }

  // [64 keys][64 queries] = keys queries^T. The queries' columns are halves in two places.
  DEVICE void multiply_rows(float (&x)[32], int keys, int half0, int half1) const {
    const uint64_t a = tile(keys), b0 = tile(half0), b1 = tile(half1);
#pragma unroll
    for (int k = 0; k < 16; k++) {
      const uint64_t ak = a + (k / 4) * moved(C::BLOCK_BYTES) + (k % 4) * 2;
      const uint64_t bk = (k < 8 ? b0 : b1) + (k / 4 % 2) * moved(C::BLOCK_BYTES) + (k % 4) * 2;
      if (k == 0) {
        wgmma_ss_first<T>(x, ak, bk);
      } else {
        wgmma_ss<T>(x, ak, bk);
      }
    }
    wgmma_commit();
  }
  // Sums over queries, for half of the columns: x += scores^T y.
  DEVICE void multiply_columns(float (&x)[64], const uint32_t (&scores)[16], int y) const {
    const uint64_t b = tile(y, C::BLOCK_BYTES);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const uint32_t* s = scores + 4 * k;
      wgmma_rs<T>(x, s[0], s[1], s[2], s[3], b + k * moved(2048));
    }
    wgmma_commit();
  }

  // An accumulator [64 keys][256], through `memory`, to where it is kept.
  DEVICE void store_sums(const float (&x)[2][64], int memory, float factor, const CUtensorMap* map, int warpgroup) {
    if (p.round_dkv) {
      const int row = warp * 16 + (lane & 15);
#pragma unroll
      for (int i = 0; i < 16; i++) {  // 16 columns
        const int chunk = 2 * i + (lane >> 4);
        const float* y = x[i / 8] + 8 * (i % 8);
        store_matrices(base + memory + (chunk / 8) * C::BLOCK_BYTES + swizzled(row, chunk % 8),
                       pack<T>(y[0] * factor, y[1] * factor), pack<T>(y[2] * factor, y[3] * factor),
                       pack<T>(y[4] * factor, y[5] * factor), pack<T>(y[6] * factor, y[7] * factor));
      }
    } else {
      const int row = warp * 16 + (lane >> 2), rest = (lane & 1) * 8;
#pragma unroll
      for (int i = 0; i < 32; i++) {  // 8 columns
        uint8_t* block = shared + memory + (i / 4) * C::BLOCK_BYTES;
        const int chunk = 2 * (i % 4) + ((lane & 3) >> 1);
        const float* y = x[i / 16] + 4 * (i % 16);
        *reinterpret_cast<float2*>(block + swizzled(row, chunk) + rest) = make_float2(y[0] * factor, y[1] * factor);
        *reinterpret_cast<float2*>(block + swizzled(row + 8, chunk) + rest) = make_float2(y[2] * factor, y[3] * factor);
      }
    }
    shared_to_async();
    named_sync(2 + warpgroup, 128);
    if ((threadIdx.x & 127) == 0) {
      const BackwardTile t = decode<C>(p);  // again, so that nothing of it lives in the loop
      const int width = p.round_dkv ? 64 : 32;
      for (int block = 0; block < C::D / width; block++) {
        const BoxAt at = {width * block, t.key, t.key_head, t.batch, t.part};
        const uint32_t from = base + memory + block * C::BLOCK_BYTES;
        if (p.carry_dkv) {
          add_box(map, from, at);
        } else {
          store_box(map, from, at);
        }
      }
      bulk_commit();
      bulk_wait();
    }
  }
};

// The first warpgroup: P, and dV += P^T dout.
template <class C> struct ValueGroup : WideConsumer<C> {
  using S = WideShared<C>;
  using T = typename C::T;
  using WideConsumer<C>::WideConsumer;
  using WideConsumer<C>::base;
  using WideConsumer<C>::p;

  Ring<C::Q_STAGES> q;  // the next tile's. A slot of one, as P's, has the parity that two have as their stage.
  Ring<C::HALVES> half;
  float dv[2][64], scores[32];
  uint32_t packed[16];

  DEVICE void multiply_scores() {
    const int queries = S::Q + q.stage() * C::TILE_BYTES;
    pin(scores);
    wgmma_fence();
    this->multiply_rows(scores, S::K, queries, queries + C::HALF_BYTES);
  }

  // P of the tile at `query` from its scores: for dV, and for the second warpgroup.
  template <class Masked> DEVICE void exponentials(Masked, int tile_key, int query) {
    constexpr float kFactor = 1 << (C::MESSAGE_SHIFT - C::SHIFT);
    int lo[2] = {}, hi[2] = {};
    if constexpr (Masked::value) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int column = query + 2 * (this->lane & 3);
        const int2 seen = seeing_queries<C>(p, tile_key + this->warp * 16 + (this->lane >> 2) + 8 * i);
        lo[i] = seen.x - column;
        hi[i] = seen.y - column;
      }
    }
#pragma unroll
    for (int v = 0; v < 4; v++) {
      uint32_t m[4];
#pragma unroll
      for (int u = 0; u < 4; u++) {
        const int j = 2 * v + u / 2, i = u % 2;
        const float2 lse = this->of_queries(S::LSE, q.stage(), j);
        float x[2], factor[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
          float s = scores[4 * j + 2 * i + c];
          if constexpr (C::SOFTCAP) s = tanh_exact(s * p.score_scale);
          x[c] = exp2_fast(fmaf(s, p.scale_log2, c ? lse.y : lse.x));
          if constexpr (Masked::value) {
            const int column = 8 * j + c;
            if (column < lo[i] || (C::INTERVAL && column >= hi[i])) x[c] = 0.f;
          }
          factor[c] = x[c] * kFactor;
          if constexpr (C::SOFTCAP) factor[c] *= 1.f - s * s;  // the derivative of the cap: dS alone needs it
        }
        packed[2 * j + i] = pack<T>(x[0], x[1]);
        m[u] = pack<Fp16>(factor[0], factor[1]);
      }
      *this->message(v) = make_uint4(m[0], m[1], m[2], m[3]);
    }
  }
  // All threads write the same, and each reads what it wrote itself.
  DEVICE int2* inner_queries() const { return reinterpret_cast<int2*>(this->shared + S::INNER); }
  DEVICE void form_p(int tile_key, int tile) {
    const int query = tile * C::QUERIES;
    const int2 inner = *inner_queries();
    barrier_wait(base + S::P_EMPTY, q.stage() ^ 1);
    if (query < inner.x || query + C::QUERIES > inner.y) {
      exponentials(Yes(), tile_key, query);
    } else {
      exponentials(No(), tile_key, query);
    }
    this->arrive(S::P_FULL);
    if (this->lane == 0) barrier_arrive(base + S::Q_EMPTY + 8 * q.stage());  // lse has been read, too
    q.advance();
  }

  // dV of one tile and P of the next. The product for dV goes first: its tile of dout makes room for another.
  DEVICE void step(int tile_key, int next, bool more) {
    const int slot0 = half.stage();
    barrier_wait(base + S::DOUT_FULL + 8 * slot0, half.parity());
    half.advance();
    pin(packed);
    pin(dv[0]);
    wgmma_fence();
    this->multiply_columns(dv[0], packed, S::DOUT + slot0 * C::HALF_BYTES);
    const int slot1 = half.stage();
    barrier_wait(base + S::DOUT_FULL + 8 * slot1, half.parity());
    half.advance();
    pin(dv[1]);
    wgmma_fence();
    this->multiply_columns(dv[1], packed, S::DOUT + slot1 * C::HALF_BYTES);
    // After the last tile there is no next: its scores are those of a stale tile, and nobody reads them.
    if (more) barrier_wait(base + S::Q_FULL + 8 * q.stage(), q.parity());
    multiply_scores();
    wgmma_wait<2>();
    if (this->lane == 0) barrier_arrive(base + S::DOUT_EMPTY + 8 * slot0);
    wgmma_wait<1>();
    if (this->lane == 0) barrier_arrive(base + S::DOUT_EMPTY + 8 * slot1);
    wgmma_wait<0>();
    pin(dv[0]);
    pin(dv[1]);
    pin(packed);
    pin(scores);
    if (more) form_p(tile_key, next);
  }

  DEVICE void run() {
#pragma unroll
    for (int i = 0; i < 64; i++) dv[0][i] = dv[1][i] = 0.f;
    const BackwardTile t = decode<C>(p);
    if (t.first < t.end) {
      *inner_queries() =
          make_int2(seeing_queries<C>(p, t.key + C::KEYS - 1).x, seeing_queries<C>(p, min(t.key, p.seqlen_k - 1)).y);
      barrier_wait(base + S::KV_FULL, 0);
      barrier_wait(base + S::Q_FULL, 0);
      multiply_scores();
      wgmma_wait<0>();
      pin(scores);
      const int move = t.down ? -1 : 1;
      int tile = t.down ? t.end - 1 : t.first, head = 0;  // counted in its group
      form_p(t.key, tile);
#pragma unroll 1
      for (int left = this->steps(t); left > 0; left--) {
        if (++head == p.group) {
          head = 0;
          tile += move;
        }
        step(t.key, tile, left > 1);
      }
    } else if (p.carry_dkv) {
      return;
    }
    named_sync(1, 384);  // nobody multiplies any more
    this->store_sums(dv, S::K, this->kUnshift, &this->maps.dv, 0);
  }
};

// The second warpgroup: dS, and dK += dS^T Q.
template <class C> struct KeyGroup : WideConsumer<C> {
  using S = WideShared<C>;
  using T = typename C::T;
  using WideConsumer<C>::WideConsumer;
  using WideConsumer<C>::base;
  using WideConsumer<C>::p;

  Ring<C::Q_STAGES> q;
  Ring<C::HALVES> half;
  float dk[2][64], dp[32];
  uint32_t packed[16];

  // dS = P (dP - delta); P comes with the derivative of the cap.
  DEVICE void form_ds() {
    constexpr float kFactor = 1.f / (1 << (C::MESSAGE_SHIFT - C::SHIFT));
#pragma unroll
    for (int v = 0; v < 4; v++) {
      const uint4 all = *this->message(v);
      const uint32_t m[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
      for (int u = 0; u < 4; u++) {
        const int j = 2 * v + u / 2, i = u % 2;
        const float2 delta = this->of_queries(S::DELTA, q.stage(), j), x = unpack<Fp16>(m[u]);
        packed[2 * j + i] =
            pack<T>(x.x * kFactor * (dp[4 * j + 2 * i] - delta.x), x.y * kFactor * (dp[4 * j + 2 * i + 1] - delta.y));
      }
    }
  }
  // To shared memory, queries as rows: [query][64 keys].
  DEVICE void store_ds() const {
    const int chunk = this->warp * 2 + ((this->lane >> 3) & 1), query = (this->lane & 7) + (this->lane >> 4) * 8;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const uint32_t* x = packed + 4 * k;
      store_matrices_transposed(base + S::DS + k * 2048 + swizzled(query, chunk), x[0], x[1], x[2], x[3]);
    }
  }
  // dP of the next tile, where there is one, else of a stale one. Its halves of dout have to be left afterwards.
  DEVICE int2 multiply_dp(bool more) {
    const int slot0 = half.stage();
    if (more) barrier_wait(base + S::DOUT_FULL + 8 * slot0, half.parity());
    half.advance();
    const int slot1 = half.stage();
    if (more) barrier_wait(base + S::DOUT_FULL + 8 * slot1, half.parity());
    half.advance();
    pin(dp);
    wgmma_fence();
    this->multiply_rows(dp, S::V, S::DOUT + slot0 * C::HALF_BYTES, S::DOUT + slot1 * C::HALF_BYTES);
    return make_int2(slot0, slot1);
  }
  DEVICE void leave_dout(int2 slots) const {
    if (this->lane != 0) return;
    barrier_arrive(base + S::DOUT_EMPTY + 8 * slots.x);
    barrier_arrive(base + S::DOUT_EMPTY + 8 * slots.y);
  }

  // dS and dK of one tile, dP of which is ready on entry, and dP of the next.
  DEVICE void step(bool more) {
    const int q_stage = q.stage(), queries = S::Q + q_stage * C::TILE_BYTES;
    barrier_wait(base + S::Q_FULL + 8 * q_stage, q.parity());  // long complete: for delta
    barrier_wait(base + S::P_FULL, q_stage);                   // the parity of one slot, see ValueGroup
    form_ds();
    pin(packed);
    this->arrive(S::P_EMPTY);
    pin(dk[0]);
    pin(dk[1]);
    wgmma_fence();
    this->multiply_columns(dk[0], packed, queries);
    this->multiply_columns(dk[1], packed, queries + C::HALF_BYTES);
    barrier_wait(base + S::DS_EMPTY, q_stage ^ 1);
    store_ds();
    shared_to_async();
    this->arrive(S::DS_FULL);
    const int2 slots = multiply_dp(more);
    wgmma_wait<1>();
    if (this->lane == 0) barrier_arrive(base + S::Q_EMPTY + 8 * q_stage);
    wgmma_wait<0>();
    pin(dk[0]);
    pin(dk[1]);
    pin(packed);
    pin(dp);
    if (more) leave_dout(slots);
    q.advance();
  }

  DEVICE void run() {
#pragma unroll
    for (int i = 0; i < 64; i++) dk[0][i] = dk[1][i] = 0.f;
    const BackwardTile t = decode<C>(p);
    if (t.first < t.end) {
      barrier_wait(base + S::KV_FULL, 0);
      const int2 slots = multiply_dp(true);
      wgmma_wait<0>();
      pin(dp);
      leave_dout(slots);
#pragma unroll 1
      for (int left = this->steps(t); left > 0; left--) step(left > 1);
    } else if (p.carry_dkv) {
      return;
    }
    named_sync(1, 384);
    this->store_sums(dk, S::Q, p.scale * this->kUnshift, &this->maps.dk, 1);
  }
};

// The third warpgroup: dQ = dS K, a quarter of the columns at a time.
template <class C> struct QueryGroup : WideConsumer<C> {
  using S = WideShared<C>;
  using T = typename C::T;
  using WideConsumer<C>::WideConsumer;
  using WideConsumer<C>::base;
  using WideConsumer<C>::p;

  float dq[32];

  // A warp has room for two quarters of its 16 rows.
  DEVICE uint32_t memory(int quarter) const { return base + S::DQ + this->warp * C::BLOCK_BYTES + quarter % 2 * 4096; }

  DEVICE void multiply(int quarter) {
    const uint64_t a = this->tile(S::DS), b = this->tile(S::K + quarter * C::BLOCK_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) {
      if (k == 0) {
        wgmma_sb_first<T>(dq, a, b);
      } else {
        wgmma_sb<T>(dq, a + 2 * k, b + k * moved(2048));
      }
    }
    wgmma_commit();
  }
  // In the order of BackwardConsumer::store_dq.
  DEVICE void store(int quarter) const {
    if (this->lane == 0) bulk_wait_read<1>();  // the last but one has left its memory
    __syncwarp();
    const int row = (this->lane & 7) + (this->lane >> 4) * 8, odd = (this->lane >> 3) & 1;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      store_matrices(memory(quarter) + (j / 4) * 2048 + swizzled(row, 2 * (j % 4) + odd), __float_as_uint(dq[4 * j]),
                     __float_as_uint(dq[4 * j + 1]), __float_as_uint(dq[4 * j + 2]), __float_as_uint(dq[4 * j + 3]));
    }
  }
  DEVICE void add(int quarter, int tile, int head, int batch) const {
    shared_to_async();
    __syncwarp();
    if (this->lane != 0) return;
    int* turns = p.order;  // one for two quarters
    if (turns) {
      turns +=
          ((static_cast<int64_t>(batch) * p.nheads + head) * p.query_tiles + tile) * 8 + quarter / 2 * 4 + this->warp;
      if (quarter % 2 == 0) wait_for_turn<C>(p, turns, tile);
    }
    const int row = tile * C::QUERIES + 16 * this->warp;
    add_box(&this->maps.dq, memory(quarter), {64 * quarter, row, head, batch, 0});
    add_box(&this->maps.dq, memory(quarter) + 2048, {64 * quarter + 32, row, head, batch, 0});
    bulk_commit();
    if (turns && quarter % 2 == 1) end_turn<C>(p, turns, tile);
  }

  DEVICE void run() {
    const BackwardTile t = decode<C>(p);
    if (t.first < t.end) {
      barrier_wait(base + S::KV_FULL, 0);
      int parity = 0;
      for_each_tile(p, t, [&](int tile, int head) {
        barrier_wait(base + S::DS_FULL, parity);
        parity ^= 1;
        multiply(0);
#pragma unroll
        for (int quarter = 0; quarter < 4; quarter++) {
          wgmma_wait<0>();
          pin(dq);
          if (quarter == 3 && this->lane == 0) barrier_arrive(base + S::DS_EMPTY);
          store(quarter);
          pin(dq);
          if (quarter < 3) multiply(quarter + 1);
          add(quarter, tile, head, t.batch);
        }
      });
    } else if (p.carry_dkv) {
      return;
    }
    named_sync(1, 384);
    if (this->lane == 0) bulk_wait();
  }
};

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1)
    backward_wide_kernel(const __grid_constant__ BackwardMaps maps, const __grid_constant__ BackwardParams p) {
  using S = WideShared<C>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) >> 5, 0);
  if (threadIdx.x == 0) {
    barrier_init(base + S::KV_FULL, 1);
    for (int s = 0; s < C::Q_STAGES; s++) {
      barrier_init(base + S::Q_FULL + 8 * s, 3);   // the copy engine's bytes, and the warps that bring lse and delta
      barrier_init(base + S::Q_EMPTY + 8 * s, 8);  // four warps each that read scores and sum dK
    }
    for (int s = 0; s < C::HALVES; s++) {
      barrier_init(base + S::DOUT_FULL + 8 * s, 1);
      barrier_init(base + S::DOUT_EMPTY + 8 * s, 8);
    }
    for (const int barrier : {S::P_FULL, S::P_EMPTY, S::DS_FULL, S::DS_EMPTY}) barrier_init(base + barrier, 4);
    barrier_init_fence();
  }
  __syncthreads();
  // 512 registers in all: the sums of two warpgroups take 128 each.
  if (warp >= 12) {
    release_registers<24>();
    wide_producer<C>(maps, p, base, warp - 12);
  } else if (warp >= 8) {
    release_registers<72>();
    QueryGroup<C>(maps, p, shared, warp).run();
  } else if (warp >= 4) {
    claim_registers<208>();
    KeyGroup<C>(maps, p, shared, warp).run();
  } else {
    claim_registers<208>();
    ValueGroup<C>(maps, p, shared, warp).run();
  }
}

}  // namespace seqpar::sm90
