// The copy engine (PTX ISA, "cp.async.bulk" and "cp.async.bulk.tensor"). Tensor maps are made in tensor_map.h; all have
// the dimensions (column, row, head, batch, part) and boxes of one column block, 128 bytes wide, by some rows.
#pragma once
#include <cuda.h>
#include <stdint.h>

#include "device.cuh"

namespace seqpar {

// L2 eviction priorities as createpolicy encodes them.
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull, kEvictLast = 0x14F0000000000000ull;

// Where a box begins.
struct BoxAt {
  int column, row, head, batch, part;
};

DEVICE void prefetch_map(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// A box into shared memory; its bytes count for the barrier, also those outside the tensor, which become zero.
DEVICE void load_box(uint32_t target, const CUtensorMap* map, uint32_t barrier, BoxAt at, uint64_t priority) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(target),
      "l"(map), "r"(barrier), "r"(at.column), "r"(at.row), "r"(at.head), "r"(at.batch), "r"(at.part), "l"(priority)
      : "memory");
}
// cp.async.bulk.prefetch: a box into the L2 cache.
DEVICE void prefetch_box(const CUtensorMap* map, BoxAt at) {
  asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global [%0, {%1, %2, %3, %4, %5}];" ::"l"(map), "r"(at.column),
               "r"(at.row), "r"(at.head), "r"(at.batch), "r"(at.part)
               : "memory");
}
// A box into global memory; what lies outside the tensor is left out.
DEVICE void store_box(const CUtensorMap* map, uint32_t source, BoxAt at) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
               "r"(source), "r"(at.column), "r"(at.row), "r"(at.head), "r"(at.batch), "r"(at.part)
               : "memory");
}
// cp.reduce: adds a box to global memory, element by element in any order.
DEVICE void add_box(const CUtensorMap* map, uint32_t source, BoxAt at) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
      "r"(source), "r"(at.column), "r"(at.row), "r"(at.head), "r"(at.batch), "r"(at.part)
      : "memory");
}
// Stores and additions of a thread form groups.
DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the groups before the last N have read their shared memory.
template <int N = 0> DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
// Until they are done altogether.
template <int N = 0> DEVICE void bulk_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"); }
// fence.proxy.async: what this thread wrote to shared memory can be read by the copy engine and by wgmma.
DEVICE void shared_to_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Byte offset of a 16-byte chunk in a tile of 128-byte rows under the 128-byte swizzle (PTX ISA, "Swizzling modes").
DEVICE uint32_t swizzled(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

// Accumulators as rows of 128 bytes of fp32: a thread has columns 8 i + 2 (lane % 4) + {0, 1} of row lane / 4. Under
// the swizzle the 32 bytes that four threads have of a row and of the next one lie in the same banks. So odd rows take
// column groups i and i ^ 2 in turned order: `fp32_chunk` is the chunk for both, and what is loaded or stored there
// must be swapped.
DEVICE int fp32_chunk(int i, int lane) { return (2 * (i % 4) + ((lane & 3) >> 1)) ^ (lane & 4); }
DEVICE void swap_in_odd_rows(float2& a, float2& b, int lane) {
  const float2 x = a;
  if (lane & 4) {
    a = b;
    b = x;
  }
}

}  // namespace seqpar
