// Barriers in shared memory (PTX ISA, "mbarrier") and named barriers between warps ("bar").
#pragma once
#include <stdint.h>

#include "device.cuh"

namespace seqpar {

// mbarrier.init: a phase completes after `count` arrivals and all bytes that were announced.
DEVICE void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
// fence.mbarrier_init: makes initialised barriers visible to the copy engine and to the cluster.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// mbarrier.arrive.expect_tx: one arrival that announces `bytes` from the copy engine.
DEVICE void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// A warp's arrival, after all its lanes: kWarpArrivals of those that a phase counts. racecheck follows an mbarrier's
// order only for the threads that arrive themselves, so for it (SEQPAR_ATTN_RACECHECK) all lanes do.
#ifdef SEQPAR_ATTN_RACECHECK
constexpr int kWarpArrivals = 32;
DEVICE void warp_arrive(uint32_t barrier) { barrier_arrive(barrier); }
#else
constexpr int kWarpArrivals = 1;
DEVICE void warp_arrive(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}
#endif
// mbarrier.try_wait.parity: until the phase of this parity has completed.
DEVICE void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{ .reg .pred p;\n"
      "W%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra D%=;\n bra W%=;\n D%=: }" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// bar.sync, bar.arrive: named barriers 0 to 15; `threads` counts all that take part, a multiple of 32.
DEVICE void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

}  // namespace seqpar
