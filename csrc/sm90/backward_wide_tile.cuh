// What the warpgroups of backward_wide_kernel.cuh share: shapes, shared memory, the producers, products and stores.
#pragma once
#include "backward_tile.cuh"

namespace seqpar::sm90 {

// T, INTERVAL, SOFTCAP: see ForwardConfig.
template <class T_, bool INTERVAL_, bool SOFTCAP_> struct WideConfig {
  using T = T_;
  static constexpr int D = 256, QUERIES = 64, KEYS = 64;
  static constexpr bool INTERVAL = INTERVAL_, SOFTCAP = SOFTCAP_, CUT = false;
  static constexpr bool STAGGERED = true;  // under FULL, or all CTAs of a head add to the same rows of dq at a time
  // Of dout there is room for one and a half tiles: it comes in halves of 128 columns.
  static constexpr int Q_STAGES = 2, HALVES = 3;
  static constexpr int BLOCK_BYTES = 64 * 128;  // of 64 rows by 64 columns of 16 bits, or by 32 of fp32
  static constexpr int HALF_BYTES = 2 * BLOCK_BYTES, TILE_BYTES = 2 * HALF_BYTES;
  // P, dS and the sums are 2^SHIFT times themselves, as in the other kernel. Between warpgroups P goes as fp16 of 2^14
  // P, which has enough digits not to add to the error of dS in bf16, and range down to P = 4e-9. To that of dS in fp16
  // it would add a fifth: there P goes as fp32, and dQ on its way out gives up one of its two buffers for that.
  static constexpr bool FP32_MESSAGE = !T::is_bf16;
  static constexpr int SHIFT = backward_shift(T::is_bf16), MESSAGE_SHIFT = FP32_MESSAGE ? SHIFT : 14;
  static constexpr int MESSAGES = FP32_MESSAGE ? 2 : 1, DQ_BUFFERS = FP32_MESSAGE ? 1 : 2;
  static constexpr int THREADS = 512;
};

template <class C> struct WideShared {
  static constexpr int K = 0, V = K + C::TILE_BYTES, Q = V + C::TILE_BYTES, DOUT = Q + C::Q_STAGES * C::TILE_BYTES;
  static constexpr int P = DOUT + C::HALVES * C::HALF_BYTES, DS = P + C::MESSAGES * C::BLOCK_BYTES,
                       DQ = DS + C::BLOCK_BYTES;
  static constexpr int LSE = DQ + 2 * C::DQ_BUFFERS * C::BLOCK_BYTES, DELTA = LSE + C::Q_STAGES * C::QUERIES * 4;
  // lse and delta come and go with the tile of queries.
  static constexpr int KV_FULL = DELTA + C::Q_STAGES * C::QUERIES * 4, Q_FULL = KV_FULL + 8,
                       Q_EMPTY = Q_FULL + 8 * C::Q_STAGES, DOUT_FULL = Q_EMPTY + 8 * C::Q_STAGES,
                       DOUT_EMPTY = DOUT_FULL + 8 * C::HALVES, P_FULL = DOUT_EMPTY + 8 * C::HALVES,
                       P_EMPTY = P_FULL + 8, DS_FULL = P_EMPTY + 8, DS_EMPTY = DS_FULL + 8, DONE = DS_EMPTY + 8;
  static constexpr int INNER = DONE + 8;  // int2 per warp of the first warpgroup: queries that see all keys
  static constexpr int BYTES = INNER + 32;
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
  for_each_tile<C>(p, t, [&](int tile, int head) {
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
  DEVICE void arrive(int barrier) const { warp_arrive(base + barrier); }
  // Until no warpgroup multiplies any more. An mbarrier: synccheck takes a named one that is come to by three ways for
  // divergence.
  DEVICE void wait_for_all() const {
    arrive(S::DONE);
    barrier_wait(base + S::DONE, 0);
  }
  // The tiles that this CTA walks over.
  DEVICE int steps(const BackwardTile& t) const { return (t.end - t.first) * p.group; }

  // Two numbers per column, for columns 8 j + 2 (lane % 4) + {0, 1}.
  DEVICE float2 of_queries(int vectors, int stage, int j) const {
    return *reinterpret_cast<const float2*>(shared + vectors + 4 * (stage * C::QUERIES + 8 * j + 2 * (lane & 3)));
  }
  // What the first warpgroup's thread hands to the second's in the same place, by 16 bytes.
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

}  // namespace seqpar::sm90
