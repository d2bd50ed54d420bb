// Exact attention backward for Hopper, given the global lse and delta.
//
// A CTA owns 128 keys, 64 per consumer warpgroup, and walks over the query tiles that see them, for all query heads of
// their group. Scores and dP are formed transposed (keys are rows), so that P and dS are register operands of the
// products for dV and dK (FlashAttention-3's arrangement, arXiv 2407.08608); dS also goes through shared memory for
// dQ = dS K, which the copy engine adds to an fp32 accumulator. The scores of the next tile are multiplied as soon as
// dS of this one is formed, so that the tensor cores have work while exponentials are taken.
#pragma once
#include "backward_producer.cuh"

namespace seqpar::sm90 {

// A warpgroup's 64 keys. Accumulators of scores: keys are rows (r0 and r0 + 8 are this thread's), queries columns.
template <class C> struct BackwardConsumer {
  using S = BackwardShared<C>;
  using T = typename C::T;
  static constexpr int D = C::D, QUERIES = C::QUERIES;
  static constexpr float kUnshift = 1.f / (1 << C::SHIFT);

  const BackwardMaps& maps;
  const BackwardParams& p;
  uint8_t* shared;
  uint32_t base;
  int warpgroup, warp, lane, batch;
  Ring<C::Q_STAGES> q;
  Ring<C::DOUT_STAGES> dout;
  Ring<C::DS_SLOTS> slot;                 // of dS
  int late_tile = -1, late_head = 0;      // whose dQ is multiplied next; heads are counted in their group
  int stored_tile = -1, stored_head = 0;  // whose dQ is added next
  float dk[D / 2], dv[D / 2];
  float probabilities[QUERIES / 2];  // scores, then P
  float dp[QUERIES / 2];
  uint32_t packed_p[QUERIES / 4], half_p[QUERIES / 4], packed_ds[QUERIES / 4];
  int tile_key;
  int first_head;  // of the group, CUT

  DEVICE BackwardConsumer(const BackwardMaps& maps, const BackwardParams& p, uint8_t* shared)
      : maps(maps), p(p), shared(shared), base(shared_address(shared)) {
    const int index = __shfl_sync(~0u, static_cast<int>(threadIdx.x) >> 5, 0);
    warpgroup = index >> 2;
    warp = index & 3;
    lane = threadIdx.x & 31;
  }

  // The descriptor of what lies `offset` bytes after the start of shared memory. Made anew for every product: as values
  // kept in the loop, descriptors would take the registers that accumulators need.
  DEVICE uint64_t tile(int offset, int lead = 0) const {
    return descriptor((opaque(base) >> 4) + (offset >> 4) + ((lead >> 4) << 16));
  }

  // The keys' side of a product with a tile of queries, both K-major.
  DEVICE void multiply_rows(float (&x)[QUERIES / 2], int keys, int queries) {
    const uint64_t a = tile(keys + warpgroup * 8192), b = tile(queries);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
      const uint64_t ak = a + (k / 4) * moved(C::KEYS * 128) + (k % 4) * 2;
      const uint64_t bk = b + (k / 4) * moved(QUERIES * 128) + (k % 4) * 2;
      if (k == 0) {
        wgmma_ss_first<T>(x, ak, bk);
      } else {
        wgmma_ss<T>(x, ak, bk);
      }
    }
    wgmma_commit();
  }
  // Sums over queries: x += scores^T y.
  DEVICE void multiply_columns(float (&x)[D / 2], const uint32_t (&scores)[QUERIES / 4], int y) {
    const uint64_t b = tile(y, QUERIES * 128);
#pragma unroll
    for (int k = 0; k < QUERIES / 16; k++) {
      const uint32_t* s = scores + 4 * k;
      wgmma_rs<T>(x, s[0], s[1], s[2], s[3], b + k * moved(2048));
    }
    wgmma_commit();
  }
  // This warpgroup's part of dQ = dS K, summed over all 128 keys.
  DEVICE void multiply_dq(float (&dq)[32], int slot) {
    const uint64_t a = tile(S::DS + slot * C::SCORE_BYTES + (D == 128 ? 0 : warpgroup * 8192));
    const uint64_t b = tile(S::K + (D == 128 ? warpgroup * (C::KEYS * 128) : 0));
#pragma unroll
    for (int k = 0; k < C::KEYS / 16; k++) {
      const uint64_t ak = a + (k / 4) * moved(QUERIES * 128) + (k % 4) * 2;
      if (k == 0) {
        wgmma_sb_first<T>(dq, ak, b);
      } else {
        wgmma_sb<T>(dq, ak, b + k * moved(2048));
      }
    }
    wgmma_commit();
  }

  // Two numbers per column, for columns 8 j + 2 (lane % 4) + {0, 1}.
  DEVICE float2 of_queries(int vectors, int stage, int j) const {
    return *reinterpret_cast<const float2*>(shared + vectors + 4 * (stage * QUERIES + 8 * j + 2 * (lane & 3)));
  }

  // Scores of query tile `tile` become P.
  DEVICE void exponentials(int tile, int stage) {
#pragma unroll
    for (int j = 0; j < QUERIES / 8; j++) {
      const float2 lse = of_queries(S::LSE, stage, j);
#pragma unroll
      for (int c = 0; c < 4; c++) {
        float& x = probabilities[4 * j + c];
        if constexpr (C::SOFTCAP) x = tanh_exact(x * p.score_scale);
        x = exp2_fast(fmaf(x, p.scale_log2, c % 2 ? lse.y : lse.x));
      }
    }
    const int query = tile * QUERIES;
    const int2 inner = *inner_queries();
    if (query < inner.x || query + QUERIES > inner.y) {
      // Asked anew for every tile that has a border in it: kept, they would take registers from all tiles.
      const int key = tile_key + 64 * warpgroup + warp * 16 + (lane >> 2), column = query + 2 * (lane & 3);
      const int2 seen0 = seeing_queries<C>(p, key), seen1 = seeing_queries<C>(p, key + 8);
      const int lo0 = seen0.x - column, lo1 = seen1.x - column, hi0 = seen0.y - column, hi1 = seen1.y - column;
#pragma unroll
      for (int j = 0; j < QUERIES / 8; j++) {
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const int i = 8 * j + c;
          if (i < lo0 || (C::INTERVAL && i >= hi0)) probabilities[4 * j + c] = 0.f;
          if (i < lo1 || (C::INTERVAL && i >= hi1)) probabilities[4 * j + 2 + c] = 0.f;
        }
      }
    }
  }
  DEVICE void pack_probabilities() {
#pragma unroll
    for (int i = 0; i < QUERIES / 4; i++) {
      packed_p[i] = pack<T>(probabilities[2 * i], probabilities[2 * i + 1]);
      if constexpr (C::AHEAD) half_p[i] = pack<Fp16>(probabilities[2 * i], probabilities[2 * i + 1]);
    }
  }
  // dS = P (dP - delta), times the derivative of the cap.
  DEVICE void form_ds(int q_stage, int dout_stage) {
#pragma unroll
    for (int j = 0; j < QUERIES / 8; j++) {
      const float2 delta = of_queries(S::DELTA, dout_stage, j);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        float2 x = make_float2(probabilities[4 * j + 2 * i], probabilities[4 * j + 2 * i + 1]), factor = x;
        if constexpr (C::AHEAD) x = factor = unpack<Fp16>(half_p[2 * j + i]);
        if constexpr (C::SOFTCAP) {  // the capped scores again, from P: to keep them would take too many registers
          const float2 lse = of_queries(S::LSE, q_stage, j);
          const float t0 = x.x == 0.f ? 0.f : (__log2f(x.x) - lse.x) / p.scale_log2;
          const float t1 = x.y == 0.f ? 0.f : (__log2f(x.y) - lse.y) / p.scale_log2;
          factor.x *= 1.f - t0 * t0;
          factor.y *= 1.f - t1 * t1;
        }
        packed_ds[2 * j + i] =
            pack<T>(factor.x * (dp[4 * j + 2 * i] - delta.x), factor.y * (dp[4 * j + 2 * i + 1] - delta.y));
      }
    }
  }
  // To shared memory, queries as rows: [key block of this warpgroup][query][64 keys].
  DEVICE void store_ds(int slot) {
    const uint32_t target = base + S::DS + slot * C::SCORE_BYTES + warpgroup * (C::SCORE_BYTES / 2);
    const int chunk = warp * 2 + ((lane >> 3) & 1), query = (lane & 7) + (lane >> 4) * 8;
#pragma unroll
    for (int k = 0; k < QUERIES / 16; k++) {
      const uint32_t* x = packed_ds + 4 * k;
      store_matrices_transposed(target + k * 2048 + swizzled(query, chunk), x[0], x[1], x[2], x[3]);
    }
  }

  // A warp's 16 rows of dQ, to where the copy engine finds them. A matrix of stmatrix is 8 rows of 16 bytes, of which a
  // thread has 4: one number, not the two neighbours that its accumulator holds. So of every 8 columns the even ones
  // come first in memory, then the odd ones (see SeqparBackward).
  DEVICE void store_dq(const float (&dq)[32]) {
    const uint32_t memory = base + S::DQ + (4 * warpgroup + warp) * 4096;
    const int row = (lane & 7) + (lane >> 4) * 8, odd = (lane >> 3) & 1;
#pragma unroll
    for (int j = 0; j < 8; j++) {
      store_matrices(memory + (j / 4) * 2048 + swizzled(row, 2 * (j % 4) + odd), __float_as_uint(dq[4 * j]),
                     __float_as_uint(dq[4 * j + 1]), __float_as_uint(dq[4 * j + 2]), __float_as_uint(dq[4 * j + 3]));
    }
  }
  // Has the copy engine add them to the accumulator. Long after they were stored: the fence would wait for the stores.
  DEVICE void add_dq() {
    shared_to_async();
    __syncwarp();
    if (lane == 0) {
      const uint32_t memory = base + S::DQ + (4 * warpgroup + warp) * 4096;
      const int column = D == 128 ? 64 * warpgroup : 0;
      const int row = stored_tile * QUERIES + (D == 128 ? 0 : 64 * warpgroup) + 16 * warp;
      if (p.order) wait_for_turn<C>(p, turns(), stored_tile);
      const int head = (C::CUT ? first_head : key_head(p, batch) * p.group) + stored_head;
      add_box(&maps.dq, memory, {column, row, head, batch, 0});
      add_box(&maps.dq, memory + 2048, {column + 32, row, head, batch, 0});
      bulk_commit();
      if (p.order) end_turn<C>(p, turns(), stored_tile);
    }
  }

  // Deterministic: this warp's counter of turns.
  DEVICE int* turns() const {
    const int own = C::CUT ? first_head : key_head(p, batch) * p.group;
    const int64_t head = static_cast<int64_t>(batch) * p.nheads + own + stored_head;
    return p.order + (head * p.query_tiles + stored_tile) * 8 + 4 * warpgroup + warp;
  }
  // Those that see all keys of this warpgroup, in shared memory: a copy per warp.
  DEVICE int2* inner_queries() const { return reinterpret_cast<int2*>(shared + S::INNER) + 4 * warpgroup + warp; }
  DEVICE void set_bounds(int tile_key_) {
    tile_key = tile_key_;
    const int first = tile_key + 64 * warpgroup, last = first + 63;
    const int2 inner = make_int2(seeing_queries<C>(p, last).x, seeing_queries<C>(p, min(first, p.seqlen_k - 1)).y);
    if (lane == 0) *inner_queries() = inner;
    __syncwarp();
  }

  DEVICE void multiply_scores(int stage) {
    pin(probabilities);
    wgmma_fence();
    multiply_rows(probabilities, S::K, S::Q + stage * C::QUERY_BYTES);
  }

  // One query tile, P of which is ready on entry, that of the next on return; and dQ of the tile before.
  DEVICE void step(int tile, int head, int next_tile, bool more) {
    auto& dq = reinterpret_cast<float (&)[32]>(dp);  // has dP's registers when that is not needed any more
    const int q_stage = q.stage(), dout_stage = dout.stage();
    barrier_wait(base + S::DOUT_FULL + 8 * dout_stage, dout.parity());
    q.advance();
    dout.advance();
    pin(packed_p);
    pin(dv);
    wgmma_fence();
    multiply_rows(dp, S::V, S::DOUT + dout_stage * C::QUERY_BYTES);
    multiply_columns(dv, packed_p, S::DOUT + dout_stage * C::QUERY_BYTES);
    if (stored_tile >= 0) add_dq();
    const auto next_scores = [&] {
      // After the last tile there is no next: its scores are those of a stale tile, and nobody reads them.
      if (more) barrier_wait(base + S::Q_FULL + 8 * q.stage(), q.parity());
      multiply_scores(q.stage());
    };
    wgmma_wait<0>();
    pin(dp);
    pin(dv);
    pin(packed_p);
    if constexpr (C::AHEAD) next_scores();
    form_ds(q_stage, dout_stage);
    pin(packed_ds);
    const auto multiply_dk = [&] {
      pin(dk);
      wgmma_fence();
      multiply_columns(dk, packed_ds, S::Q + q_stage * C::QUERY_BYTES);
    };
    if constexpr (!C::AHEAD) {
      next_scores();
      multiply_dk();
    }
    warp_arrive(base + S::DOUT_EMPTY + 8 * dout_stage);  // delta has been read, too
    // Both warpgroups' dS of the tile before. It also says that nobody reads the slot any more that is written next.
    const Ring<C::DS_SLOTS> before = slot.before();
    if (late_tile >= 0) barrier_wait(base + S::DS_FULL + 8 * before.stage(), before.parity());
    store_ds(slot.stage());
    wgmma_fence();
    multiply_dq(dq, before.stage());  // beside the first tile: of stale memory, dropped
    if constexpr (C::AHEAD) multiply_dk();
    wgmma_wait<C::AHEAD ? 2 : 1>();
    pin(probabilities);
    if constexpr (!C::AHEAD) {
      pin(dk);
      pin(packed_ds);
    }
    exponentials(next_tile, q.stage());
    if constexpr (C::AHEAD) {
      pack_probabilities();
      pin(packed_p);
      pin(half_p);
    } else {
      pin(probabilities);
    }
    shared_to_async();                // dS, stored long enough ago that this does not wait
    if (lane == 0) bulk_wait_read();  // the dQ tile before has left its memory
    wgmma_wait<C::AHEAD ? 1 : 0>();
    pin(dq);
    warp_arrive(base + S::DS_FULL + 8 * slot.stage());
    if (late_tile >= 0) store_dq(dq);
    stored_tile = late_tile;
    stored_head = late_head;
    if constexpr (C::AHEAD) {
      wgmma_wait<0>();
      pin(dk);
      pin(packed_ds);
    }
    warp_arrive(base + S::Q_EMPTY + 8 * q_stage);
    if constexpr (!C::AHEAD) pack_probabilities();
    late_tile = tile;
    late_head = head;
    slot.advance();
  }

  // This warpgroup's rows of an accumulator as fp32, blocks of 32 columns, at `memory`.
  DEVICE void stage_fp32(const float (&x)[D / 2], uint32_t memory, float factor) {
    const int r0 = warp * 16 + (lane >> 2), rest = (lane & 1) * 8;
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
      const int i = 4 * (n / 2) + n % 2;
      uint8_t* block = shared + memory + (i / 4) * 8192;
#pragma unroll
      for (int row = 0; row < 2; row++) {
        const float* y = x + 4 * i + 2 * row;
        float2 u = make_float2(y[0] * factor, y[1] * factor), v = make_float2(y[8] * factor, y[9] * factor);
        swap_in_odd_rows(u, v, lane);
        *reinterpret_cast<float2*>(block + swizzled(r0 + 8 * row, fp32_chunk(i, lane)) + rest) = u;
        *reinterpret_cast<float2*>(block + swizzled(r0 + 8 * row, fp32_chunk(i + 2, lane)) + rest) = v;
      }
    }
  }
  // The same in the inputs' dtype, blocks of 64 columns.
  DEVICE void stage_rounded(const float (&x)[D / 2], uint32_t memory, float factor) {
    const int row = warp * 16 + (lane & 15);
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
      const int chunk = 2 * i + (lane >> 4);
      const float* y = x + 8 * i;
      store_matrices(base + memory + (chunk / 8) * 8192 + swizzled(row, chunk % 8),
                     pack<T>(y[0] * factor, y[1] * factor), pack<T>(y[2] * factor, y[3] * factor),
                     pack<T>(y[4] * factor, y[5] * factor), pack<T>(y[6] * factor, y[7] * factor));
    }
  }

  // This warpgroup's rows of dK and dV, through the memory of all tiles, to where they are kept.
  DEVICE void store_dkdv(const BackwardTile& t) {
    if (lane == 0) bulk_wait_read();
    named_sync(1, 256);  // nobody multiplies or adds from this memory any more
    const uint32_t dv_memory = warpgroup * (2 * 64 * D * 4), dk_memory = dv_memory + 64 * D * 4;
    if (p.round_dkv) {
      stage_rounded(dv, dv_memory, kUnshift);
      stage_rounded(dk, dk_memory, p.scale * kUnshift);
    } else {
      stage_fp32(dv, dv_memory, kUnshift);
      stage_fp32(dk, dk_memory, p.scale * kUnshift);
    }
    shared_to_async();
    named_sync(2 + warpgroup, 128);
    if ((threadIdx.x & 127) == 0) {
      const int width = p.round_dkv ? 64 : 32;
      for (int block = 0; block < D / width; block++) {
        const BoxAt at = {width * block, t.key + 64 * warpgroup, t.key_head, t.batch, t.part};
        const uint32_t dv_from = base + dv_memory + block * 8192, dk_from = base + dk_memory + block * 8192;
        if (p.carry_dkv) {
          add_box(&maps.dv, dv_from, at);
          add_box(&maps.dk, dk_from, at);
        } else {
          store_box(&maps.dv, dv_from, at);
          store_box(&maps.dk, dk_from, at);
        }
      }
      bulk_commit();
    }
  }

  // Where a thread leaves its sums of a piece, four numbers at a time: [headdim / 4][128 threads][4].
  DEVICE float* partial(int cut, int piece) const {
    return p.partial + ((cut * (p.shorts + 1) + piece) * 2 + warpgroup) * (D * 128) + (threadIdx.x & 127) * 4;
  }
  // A piece leaves its sums, unless all others have. Returns whether all pieces of its tile are done now, and then has
  // the sums of all.
  DEVICE bool join(const BackwardTile& t) {
    volatile int* done = reinterpret_cast<volatile int*>(shared + S::INNER);  // nobody asks it for queries any more
    if (threadIdx.x == 0) {
      int before;
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(before) : "l"(p.done + t.cut) : "memory");
      *done = before;
    }
    named_sync(1, 256);
    if (*done != p.shorts) {
      float* to = partial(t.cut, t.piece);
#pragma unroll
      for (int i = 0; i < D / 8; i++) {
        float* x = to + i * 512;
        *reinterpret_cast<float4*>(x) = make_float4(dk[4 * i], dk[4 * i + 1], dk[4 * i + 2], dk[4 * i + 3]);
        *reinterpret_cast<float4*>(x + D * 64) = make_float4(dv[4 * i], dv[4 * i + 1], dv[4 * i + 2], dv[4 * i + 3]);
      }
      __threadfence();
      named_sync(1, 256);
      if (threadIdx.x == 0) {
        *done = atomicAdd(p.done + t.cut, 1);
        __threadfence();
      }
      named_sync(1, 256);
      if (*done != p.shorts) return false;
    }
    if (threadIdx.x == 0) p.done[t.cut] = 0;
#pragma unroll 1
    for (int piece = 0; piece <= p.shorts; piece++) {
      if (piece == t.piece) continue;
      const float* from = partial(t.cut, piece);
#pragma unroll
      for (int i = 0; i < D / 8; i++) {
        const float4 x = __ldcg(reinterpret_cast<const float4*>(from + i * 512));
        const float4 y = __ldcg(reinterpret_cast<const float4*>(from + i * 512 + D * 64));
        dk[4 * i] += x.x;
        dk[4 * i + 1] += x.y;
        dk[4 * i + 2] += x.z;
        dk[4 * i + 3] += x.w;
        dv[4 * i] += y.x;
        dv[4 * i + 1] += y.y;
        dv[4 * i + 2] += y.z;
        dv[4 * i + 3] += y.w;
      }
    }
    return true;
  }

  DEVICE void run() {
#pragma unroll
    for (int i = 0; i < D / 2; i++) dk[i] = dv[i] = 0.f;
    bool any;
    {
      const BackwardTile t = decode<C>(p);
      any = t.first < t.end;
      if (any) {
        batch = t.batch;
        if constexpr (C::CUT) first_head = t.key_head * p.group;
        set_bounds(t.key);
        barrier_wait(base + S::K_FULL, 0);
        barrier_wait(base + S::Q_FULL, 0);
        multiply_scores(0);
        wgmma_wait<0>();
        pin(probabilities);
        int tile = begin_tile<C>(p, t);
        exponentials(tile, 0);
        pack_probabilities();
        barrier_wait(base + S::V_FULL, 0);
        int left = (t.end - t.first) * p.group, h = 0;
        do {
          const int here = tile, head = h;
          if (++h == p.group) {
            h = 0;
            tile = tile_after<C>(p, t.down, tile);
          }
          step(here, head, tile, --left > 0);
        } while (left > 0);
        if (stored_tile >= 0) add_dq();
        const Ring<C::DS_SLOTS> before = slot.before();
        barrier_wait(base + S::DS_FULL + 8 * before.stage(), before.parity());
        wgmma_fence();
        auto& dq = reinterpret_cast<float (&)[32]>(dp);
        multiply_dq(dq, before.stage());
        if (lane == 0) bulk_wait_read();
        __syncwarp();
        wgmma_wait<0>();
        pin(dq);
        store_dq(dq);
        stored_tile = late_tile;
        stored_head = late_head;
        add_dq();
      }
    }
    const BackwardTile t = decode<C>(p);  // again, so that nothing of it lives in the loop
    if (!C::CUT || t.cut < 0 || join(t)) {
      if (any || !p.carry_dkv) store_dkdv(t);
    }
    bulk_wait_read();  // what is on its way to global memory arrives before the kernel ends
  }
};

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1)
    backward_kernel(const __grid_constant__ BackwardMaps maps, const __grid_constant__ BackwardParams p) {
  using S = BackwardShared<C>;
  if (C::CUT && cta_number() >= p.ctas) return;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) >> 5, 0);
  if (threadIdx.x == 0) {
    barrier_init(base + S::K_FULL, 1);
    barrier_init(base + S::V_FULL, 1);
    for (int s = 0; s < C::Q_STAGES; s++) {
      barrier_init(base + S::Q_FULL + 8 * s,
                   1 + kWarpArrivals);  // the copy engine's bytes, and the warp that brings lse
      barrier_init(base + S::Q_EMPTY + 8 * s, 8 * kWarpArrivals);
    }
    for (int s = 0; s < C::DOUT_STAGES; s++) {
      barrier_init(base + S::DOUT_FULL + 8 * s, 1 + kWarpArrivals);
      barrier_init(base + S::DOUT_EMPTY + 8 * s, 8 * kWarpArrivals);
    }
    for (int s = 0; s < C::DS_SLOTS; s++) barrier_init(base + S::DS_FULL + 8 * s, 8 * kWarpArrivals);
    barrier_init_fence();
  }
  __syncthreads();
  if (warp >= 8) {
    release_registers<24>();
    backward_producer<C>(maps, p, base, warp - 8);
  } else {
    claim_registers<240>();
    BackwardConsumer<C>(maps, p, shared).run();
  }
}

}  // namespace seqpar::sm90
