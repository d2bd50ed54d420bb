// Tensor core instructions of a warpgroup (PTX ISA, "wgmma"). The shapes are in wgmma_shapes.cuh.
//
// An accumulator is 64 rows by N columns of fp32, N / 2 registers a thread: warp w of the warpgroup has the rows 16 w
// to 16 w + 15, lane l of it the rows l / 4 and l / 4 + 8; register 4 j + 2 i + c is row l / 4 + 8 i, column 8 j + 2 (l
// % 4) + c. An A operand in registers is the same layout, packed.
#pragma once
#include "device.cuh"
#include "wgmma_shapes.cuh"

namespace seqpar {

// wgmma.fence: orders register accesses before the first wgmma that uses them.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most the last N committed groups are in flight.
template <int N> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// Keeps all accesses to these registers on their side of the asm statements around it: the compiler does not know that
// a wgmma in flight still reads and writes its operands.
template <int R> DEVICE void pin(float (&r)[R]) {
#pragma unroll
  for (int i = 0; i < R; i++) asm volatile("" : "+f"(r[i])::"memory");
}
template <int R> DEVICE void pin(uint32_t (&r)[R]) {
#pragma unroll
  for (int i = 0; i < R; i++) asm volatile("" : "+r"(r[i])::"memory");
}

// Descriptor of a tile in shared memory under the 128-byte swizzle: column blocks of 64, each a run of 128-byte rows,
// eight of which are 1024 bytes. `lead`: bytes from one column block to the next, which only operands read along the
// rows (MN-major) need. The upper half is the same for all, so what a kernel has to keep is the lower one.
DEVICE uint32_t tile_descriptor_low(uint32_t address, uint32_t lead) {
  return ((address & 0x3FFFF) >> 4) | ((lead >> 4) << 16);
}
DEVICE uint64_t descriptor(uint32_t low) {
  uint64_t x;
  asm("mov.b64 %0, {%1, %2};" : "=l"(x) : "r"(low), "n"(1 << 30 | 1024 >> 4));
  return x;
}
DEVICE uint64_t tile_descriptor(uint32_t address, uint32_t lead) {
  return descriptor(tile_descriptor_low(address, lead));
}
// What to add to a descriptor to move it by so many bytes.
__host__ __device__ constexpr uint64_t moved(int bytes) { return static_cast<uint64_t>(bytes >> 4); }

}  // namespace seqpar
