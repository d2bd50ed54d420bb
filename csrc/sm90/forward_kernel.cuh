// Exact attention forward for Hopper with an fp32 carry between calls.
//
// Persistent CTAs: two producer warps feed 2 or 3 consumer warpgroups of 64 query rows each. A consumer multiplies the
// scores of one key tile while it still multiplies the values of the tile before (FlashAttention-3's overlap inside a
// warpgroup, arXiv 2407.08608), and moves the reference of a row's exponentials only when its maximum has grown by 2^8.
#pragma once
#include "forward_rows.cuh"

namespace seqpar::sm90 {

// A consumer warpgroup: its rows' results, from one tile to the next.
template <class C> struct ForwardConsumer : ForwardRows<C> {
  using Base = ForwardRows<C>;
  using Base::a0, Base::a1, Base::c0, Base::c1, Base::l0, Base::l1, Base::m0, Base::m1, Base::out;
  using Base::advance, Base::attend, Base::holds_queries, Base::probabilities, Base::release, Base::rescale, Base::skip;
  using Base::base, Base::lane, Base::leader, Base::maps, Base::p, Base::r0, Base::shared, Base::stage, Base::warp;
  using Base::stage_memory, Base::sync, Base::warpgroup;
  using typename Base::S;
  using typename Base::T;
  static constexpr int D = C::D;

  DEVICE ForwardConsumer(const ForwardMaps& maps, const ForwardParams& p, uint8_t* shared) : Base(maps, p, shared) {}

  // Tiles cut along keys: all pieces but the last of a tile leave what they have, thread by thread, to the CTA with the
  // last one. The pieces before have all been begun when a CTA begins the last, so that it waits for none in vain.
  // [D / 8 + 1][128 threads][4], or [D / 8 + 1][4][128 threads] for D = 256: four numbers that are loaded at once have
  // to lie side by side in registers, which there are too few of for that.
  DEVICE float* partial(int slot) const {
    return p.partial + (slot * C::WARPGROUPS + warpgroup) * ((D / 8 + 1) * 512) +
           (threadIdx.x & 127) * (D == 256 ? 1 : 4);
  }
  DEVICE static void put(float* to, int i, float x, float y, float z, float w) {
    to += i * 512;
    if constexpr (D == 256) {
      to[0] = x;
      to[128] = y;
      to[256] = z;
      to[384] = w;
    } else {
      *reinterpret_cast<float4*>(to) = make_float4(x, y, z, w);
    }
  }
  DEVICE static float4 get(const float* from, int i) {
    from += i * 512;
    if constexpr (D == 256) {
      return make_float4(__ldcg(from), __ldcg(from + 128), __ldcg(from + 256), __ldcg(from + 384));
    } else {
      return __ldcg(reinterpret_cast<const float4*>(from));
    }
  }
  DEVICE int* ready(int slot) const { return p.counter + 2 + slot * C::WARPGROUPS + warpgroup; }
  DEVICE void hand_over(int slot) {
    float* to = partial(slot);
#pragma unroll
    for (int i = 0; i < D / 8; i++) put(to, i, out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
    put(to, D / 8, m0, m1, l0, l1);
    __threadfence();
    sync();
    if (leader) asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(ready(slot)), "r"(1) : "memory");
  }
  DEVICE void take_over(int slot) {
#pragma unroll 1
    for (const int end = slot + p.pieces - 1; slot < end; slot++) {
      if (leader) {
        int done;
        do {
          asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(done) : "l"(ready(slot)) : "memory");
        } while (!done);
        *ready(slot) = 0;
      }
      sync();
      const float* from = partial(slot);
      const float4 state = get(from, D / 8);
      const float x0 = fmaxf(m0, state.x), x1 = fmaxf(m1, state.y);
      const float z0 = x0 == -INFINITY ? 0.f : x0, z1 = x1 == -INFINITY ? 0.f : x1;
      a0 = exp2_fast(m0 - z0);
      a1 = exp2_fast(m1 - z1);
      const float w0 = exp2_fast(state.x - z0), w1 = exp2_fast(state.y - z1);
      m0 = x0;
      m1 = x1;
      l0 = l0 * a0 + state.z * w0;
      l1 = l1 * a1 + state.w * w1;
#pragma unroll
      for (int i = 0; i < D / 8; i++) {
        const float4 x = get(from, i);
        out[4 * i] = out[4 * i] * a0 + x.x * w0;
        out[4 * i + 1] = out[4 * i + 1] * a0 + x.y * w0;
        out[4 * i + 2] = out[4 * i + 2] * a1 + x.z * w1;
        out[4 * i + 3] = out[4 * i + 3] * a1 + x.w * w1;
      }
    }
  }

  // The carried state and the final factors; `w0, w1` are the weights of the carried rows.
  DEVICE void finish_rows(const ForwardWork& t, float& w0, float& w1) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      l0 += __shfl_xor_sync(~0u, l0, distance);
      l1 += __shfl_xor_sync(~0u, l1, distance);
    }
    const int row = t.row + r0;
    float* lse = p.lse + t.batch * p.lse_batch + t.head * p.lse_head + row;
    const bool in0 = row < p.seqlen_q, in1 = row + 8 < p.seqlen_q;
    a0 = a1 = 1.f;
    w0 = w1 = 0.f;
    if (p.carry) {
      c0 *= kLog2E;  // not where they are loaded, which would wait for them
      c1 *= kLog2E;
      const float x0 = fmaxf(m0, c0), x1 = fmaxf(m1, c1);
      const float z0 = x0 == -INFINITY ? 0.f : x0, z1 = x1 == -INFINITY ? 0.f : x1;
      a0 = exp2_fast(m0 - z0);
      a1 = exp2_fast(m1 - z1);
      w0 = exp2_fast(c0 - z0);
      w1 = exp2_fast(c1 - z1);
      l0 = l0 * a0 + w0;
      l1 = l1 * a1 + w1;
      m0 = x0;
      m1 = x1;
    }
    const float i0 = l0 == 0.f ? 0.f : 1.f / l0, i1 = l1 == 0.f ? 0.f : 1.f / l1;
    if ((lane & 3) == 0) {
      if (in0) lse[0] = (m0 + log2f(l0)) * kLn2;
      if (in1) lse[8] = (m1 + log2f(l1)) * kLn2;
    }
    a0 *= i0;
    a1 *= i1;
    w0 *= i0;
    w1 *= i1;
  }

  // Where columns 8 i + 2 (lane % 4) of row r lie in the staged fp32 tile, in odd rows those of i ^ 2: see fp32_chunk.
  DEVICE float2* staged(int i, int r) const {
    return reinterpret_cast<float2*>(shared + (stage_memory() - base) + (i / 4) * 8192 +
                                     swizzled(r, fp32_chunk(i, lane)) + (lane & 1) * 8);
  }
  // Where they lie in global memory, from column 2 (lane % 4) on: four threads have 32 bytes of a row. A row past the
  // end has no columns.
  struct Kept {
    float* row;
    int columns;
  };
  DEVICE Kept kept(const ForwardWork& t, int r) const {
    const int row = t.row + r;
    return {p.acc + t.batch * p.acc_batch + row * p.acc_row + t.head * p.acc_head + 2 * (lane & 3),
            row < p.seqlen_q ? p.headdim : 0};
  }
  DEVICE void add_carry(const ForwardWork& t, int turn, float w0, float w1) {
    if constexpr (!C::STAGED) {
      const Kept k0 = kept(t, r0), k1 = kept(t, r0 + 8);
#pragma unroll
      for (int i = 0; i < D / 8; i++) {
        if (8 * i < k0.columns) {
          const float2 u = *reinterpret_cast<const float2*>(k0.row + 8 * i);
          out[4 * i] += u.x * w0;
          out[4 * i + 1] += u.y * w0;
        }
        if (8 * i < k1.columns) {
          const float2 v = *reinterpret_cast<const float2*>(k1.row + 8 * i);
          out[4 * i + 2] += v.x * w1;
          out[4 * i + 3] += v.y * w1;
        }
      }
      return;
    }
    barrier_wait(base + S::CARRY_FULL + 8 * warpgroup, turn & 1);
#pragma unroll
    for (int n = 0; n < D / 16; n++) {
      const int i = 4 * (n / 2) + n % 2;
      float2 u[2] = {*staged(i, r0), *staged(i + 2, r0)}, v[2] = {*staged(i, r0 + 8), *staged(i + 2, r0 + 8)};
      swap_in_odd_rows(u[0], u[1], lane);
      swap_in_odd_rows(v[0], v[1], lane);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float* x = out + 4 * (i + 2 * h);
        x[0] += u[h].x * w0;
        x[1] += u[h].y * w0;
        x[2] += v[h].x * w1;
        x[3] += v[h].y * w1;
      }
    }
  }

  // `out` is final. Stores read the staging memory after this returns.
  DEVICE void store(const ForwardWork& t) {
    if (!C::STAGED && p.keep) {
      const Kept k0 = kept(t, r0), k1 = kept(t, r0 + 8);
#pragma unroll
      for (int i = 0; i < D / 8; i++) {
        if (8 * i < k0.columns) *reinterpret_cast<float2*>(k0.row + 8 * i) = make_float2(out[4 * i], out[4 * i + 1]);
        if (8 * i < k1.columns) {
          *reinterpret_cast<float2*>(k1.row + 8 * i) = make_float2(out[4 * i + 2], out[4 * i + 3]);
        }
      }
    } else if (p.keep) {
#pragma unroll
      for (int n = 0; n < D / 16; n++) {
        const int i = 4 * (n / 2) + n % 2;
#pragma unroll
        for (int row = 0; row < 2; row++) {
          const float* x = out + 4 * i + 2 * row;
          float2 u = make_float2(x[0], x[1]), v = make_float2(x[8], x[9]);
          swap_in_odd_rows(u, v, lane);
          *staged(i, r0 + 8 * row) = u;
          *staged(i + 2, r0 + 8 * row) = v;
        }
      }
      shared_to_async();
      sync();
      if (leader) {
        for (int block = 0; block < 2 * C::BLOCKS; block++) {
          store_box(&maps.acc, stage_memory() + block * 8192, {32 * block, t.row, t.head, t.batch, 0});
        }
        bulk_commit();
        if (p.finish) bulk_wait_read();
      }
      if (p.finish) sync();
    }
    if (p.finish) {
      const int r = warp * 16 + (lane & 15);
#pragma unroll
      for (int i = 0; i < D / 16; i++) {
        const int chunk = 2 * i + (lane >> 4);
        store_matrices(stage_memory() + (chunk / 8) * 8192 + swizzled(r, chunk % 8),
                       pack<T>(out[8 * i], out[8 * i + 1]), pack<T>(out[8 * i + 2], out[8 * i + 3]),
                       pack<T>(out[8 * i + 4], out[8 * i + 5]), pack<T>(out[8 * i + 6], out[8 * i + 7]));
      }
      shared_to_async();
      sync();
      if (leader) {
        for (int block = 0; block < C::BLOCKS; block++) {
          store_box(&maps.out, stage_memory() + block * 8192, {64 * block, t.row, t.head, t.batch, 0});
        }
        bulk_commit();
      }
    }
  }

  DEVICE static ForwardWork read_work(const volatile int* w) {
    return {w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]};
  }

  DEVICE void run() {
    for (int turn = 0;; turn++) {
      barrier_wait(base + S::Q_FULL + 8 * warpgroup, turn & 1);
      // Read wherever it is needed, so that nothing of it takes a register elsewhere.
      const volatile int* work =
          reinterpret_cast<const volatile int*>(shared + S::WORK) + 16 * warpgroup + 8 * (turn & 1);
      if (work[0] == ForwardWork::kNone) break;
      const int first = attend(read_work(work), turn);
      float w0, w1;
      if (C::INTERVAL || read_work(work).slot == ForwardWork::kWhole) finish_rows(read_work(work), w0, w1);
      wgmma_wait<0>();
      pin(out);
      pin(probabilities);
      release(S::V_EMPTY + 8 * stage);
      advance();
      const ForwardWork t = read_work(work);
      for (int skipped = first - t.first; skipped > 0; skipped--) skip();
      if (!C::INTERVAL && t.slot != ForwardWork::kWhole) {
        if (t.slot >= 0) {
          hand_over(t.slot);
          if (C::STAGED && p.carry) barrier_wait(base + S::CARRY_FULL + 8 * warpgroup, turn & 1);  // not used
          continue;
        }
        take_over(ForwardWork::kTakes - t.slot);
        finish_rows(t, w0, w1);
      }
      rescale();
      if (p.carry) add_carry(t, turn, w0, w1);
      // The store before must have left the staging memory, and all warps be done with what was in it.
      if (!p.carry && leader) bulk_wait_read();
      sync();
      store(t);
      if (holds_queries(t)) {
        if (leader) bulk_wait_read();
        release(S::Q_EMPTY + 8 * warpgroup);
      }
    }
    if (leader) bulk_wait();
  }
};

template <class C>
__global__ void __launch_bounds__(C::THREADS, 1)
    forward_kernel(const __grid_constant__ ForwardMaps maps, const __grid_constant__ ForwardParams p) {
  using S = ForwardShared<C>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = shared_address(shared);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) >> 5, 0);
  int number = 0;
  if (threadIdx.x == 128 * C::WARPGROUPS) number = claim_tile(p);  // on its way while barriers are set up
  if (threadIdx.x == 0) {
    for (int w = 0; w < C::WARPGROUPS; w++) {
      barrier_init(base + S::Q_FULL + 8 * w, 1);
      barrier_init(base + S::Q_EMPTY + 8 * w, 4);
      barrier_init(base + S::CARRY_FULL + 8 * w, 1);
      barrier_init(base + S::CARRY_EMPTY + 8 * w, 1);
    }
    for (int i = 0; i < 4; i++) barrier_init(base + S::NUMBER_FULL + 8 * i, 1);
    for (int s = 0; s < C::STAGES; s++) {
      barrier_init(base + S::K_FULL + 8 * s, 1);
      barrier_init(base + S::K_EMPTY + 8 * s, 4 * C::WARPGROUPS);
      barrier_init(base + S::V_FULL + 8 * s, 1);
      barrier_init(base + S::V_EMPTY + 8 * s, 4 * C::WARPGROUPS);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (warp >= 4 * C::WARPGROUPS) {
    release_registers<C::PRODUCER_REGISTERS>();
    if ((threadIdx.x & 31) == 0) {
      if (warp == 4 * C::WARPGROUPS) produce_keys<C>(maps, p, shared, number);
      if (warp == 4 * C::WARPGROUPS + 1) produce_queries<C>(maps, p, shared);
    }
  } else {
    claim_registers<C::CONSUMER_REGISTERS>();
    ForwardConsumer<C>(maps, p, shared).run();
  }
}

}  // namespace seqpar::sm90
