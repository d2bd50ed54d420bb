// Exact attention backward for Hopper and head dimensions up to 256, given the global lse and delta.
//
// What two warpgroups share in backward_kernel.cuh does not fit their registers here, so each of three has one gradient
// and hands on what the next one needs: the first forms P and sums dV, the second gets P, forms dS and sums dK, the
// third multiplies dQ = dS K and has the copy engine add it. Scores and dP are formed transposed (keys are rows), so
// that P and dS are register operands of the products for dV and dK: shared memory, not the tensor cores, is what this
// head dimension is short of. A CTA owns 64 keys and walks over the query tiles that see them, for all query heads of
// their group; while one warpgroup takes exponentials or stores, the others multiply.
#pragma once
#include "backward_wide_tile.cuh"

namespace seqpar::sm90 {

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
      uint32_t m[4 * C::MESSAGES];
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
        if constexpr (C::FP32_MESSAGE) {
          m[2 * u] = __float_as_uint(factor[0]);
          m[2 * u + 1] = __float_as_uint(factor[1]);
        } else {
          m[u] = pack<Fp16>(factor[0], factor[1]);
        }
      }
#pragma unroll
      for (int i = 0; i < C::MESSAGES; i++) {
        *this->message(v * C::MESSAGES + i) = make_uint4(m[4 * i], m[4 * i + 1], m[4 * i + 2], m[4 * i + 3]);
      }
    }
  }
  DEVICE int2* inner_queries() const { return reinterpret_cast<int2*>(this->shared + S::INNER) + this->warp; }
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
    this->arrive(S::Q_EMPTY + 8 * q.stage());  // lse has been read, too
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
    this->arrive(S::DOUT_EMPTY + 8 * slot0);
    wgmma_wait<1>();
    this->arrive(S::DOUT_EMPTY + 8 * slot1);
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
      if (this->lane == 0) {
        *inner_queries() =
            make_int2(seeing_queries<C>(p, t.key + C::KEYS - 1).x, seeing_queries<C>(p, min(t.key, p.seqlen_k - 1)).y);
      }
      __syncwarp();
      barrier_wait(base + S::KV_FULL, 0);
      barrier_wait(base + S::Q_FULL, 0);
      multiply_scores();
      wgmma_wait<0>();
      pin(scores);
      int tile = begin_tile<C>(p, t), head = 0;  // counted in its group
      form_p(t.key, tile);
#pragma unroll 1
      for (int left = this->steps(t); left > 0; left--) {
        if (++head == p.group) {
          head = 0;
          tile = tile_after<C>(p, t.down, tile);
        }
        step(t.key, tile, left > 1);
      }
    } else if (p.carry_dkv) {
      return;
    }
    this->wait_for_all();
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
      uint32_t m[4 * C::MESSAGES];
#pragma unroll
      for (int i = 0; i < C::MESSAGES; i++) {
        const uint4 all = *this->message(v * C::MESSAGES + i);
        m[4 * i] = all.x;
        m[4 * i + 1] = all.y;
        m[4 * i + 2] = all.z;
        m[4 * i + 3] = all.w;
      }
#pragma unroll
      for (int u = 0; u < 4; u++) {
        const int j = 2 * v + u / 2, i = u % 2;
        const float2 delta = this->of_queries(S::DELTA, q.stage(), j);
        float2 x;
        if constexpr (C::FP32_MESSAGE) {
          x = make_float2(__uint_as_float(m[2 * u]), __uint_as_float(m[2 * u + 1]));
        } else {
          x = unpack<Fp16>(m[u]);
        }
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
    this->arrive(S::DOUT_EMPTY + 8 * slots.x);
    this->arrive(S::DOUT_EMPTY + 8 * slots.y);
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
    this->arrive(S::Q_EMPTY + 8 * q_stage);
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
    this->wait_for_all();
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

  // A warp has room for one or two quarters of its 16 rows.
  DEVICE uint32_t memory(int quarter) const {
    return base + S::DQ + this->warp * (C::DQ_BUFFERS * 4096) + quarter % C::DQ_BUFFERS * 4096;
  }

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
    if (this->lane == 0) bulk_wait_read<C::DQ_BUFFERS - 1>();  // what was there has left
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
      for_each_tile<C>(p, t, [&](int tile, int head) {
        barrier_wait(base + S::DS_FULL, parity);
        parity ^= 1;
        multiply(0);
#pragma unroll
        for (int quarter = 0; quarter < 4; quarter++) {
          wgmma_wait<0>();
          pin(dq);
          if (quarter == 3) this->arrive(S::DS_EMPTY);
          store(quarter);
          pin(dq);
          if (quarter < 3) multiply(quarter + 1);
          add(quarter, tile, head, t.batch);
        }
      });
    } else if (p.carry_dkv) {
      return;
    }
    this->wait_for_all();
    if (this->lane == 0) bulk_wait_read();
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
      // The copy engine's bytes, and the warps that bring lse and delta; four warps each that read scores and sum dK.
      barrier_init(base + S::Q_FULL + 8 * s, 1 + 2 * kWarpArrivals);
      barrier_init(base + S::Q_EMPTY + 8 * s, 8 * kWarpArrivals);
    }
    for (int s = 0; s < C::HALVES; s++) {
      barrier_init(base + S::DOUT_FULL + 8 * s, 1);
      barrier_init(base + S::DOUT_EMPTY + 8 * s, 8 * kWarpArrivals);
    }
    for (const int barrier : {S::P_FULL, S::P_EMPTY, S::DS_FULL, S::DS_EMPTY}) {
      barrier_init(base + barrier, 4 * kWarpArrivals);
    }
    barrier_init(base + S::DONE, 12 * kWarpArrivals);
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
