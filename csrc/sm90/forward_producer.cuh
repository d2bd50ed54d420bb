// The warps that have the copy engine bring a forward kernel its tiles.
#pragma once
#include "forward_tile.cuh"

namespace seqpar::sm90 {

// The number of a tile nobody else has. All tiles are handed out so, the first ones too: a CTA that has to wait for a
// multiprocessor, because NCCL's have it, holds back no tile.
DEVICE int claim_tile(const ForwardParams& p) { return atomicAdd(p.counter, 1); }

// Loads keys and values, and decides which tile is next. `number`: the first one, claimed already.
template <class C>
DEVICE void produce_keys(const ForwardMaps& maps, const ForwardParams& p, uint8_t* shared, int number) {
  using S = ForwardShared<C>;
  const uint32_t base = shared_address(shared);
  volatile int* numbers = reinterpret_cast<volatile int*>(shared + S::NUMBER);
  prefetch_map(&maps.k);
  prefetch_map(&maps.v);
  int stage = 0, phase = 0;
  for (int turn = 0;; turn++) {
    numbers[turn & 3] = number;
    barrier_arrive(base + S::NUMBER_FULL + 8 * (turn & 3));
    if (number >= p.tiles) break;
    const int next = claim_tile(p);
    const ForwardTile t = decode<C>(p, number);
    const int key_head = t.head / p.group, per_part = t.end - t.first;
    const auto load_keys = [&](const CUtensorMap* map, int target, int full, int empty, int row, int part) {
      barrier_wait(base + empty + 8 * stage, phase ^ 1);
      barrier_expect(base + full + 8 * stage, C::KEY_BYTES);
      for (int block = 0; block < C::BLOCKS; block++) {
        load_box(base + target + stage * C::KEY_BYTES + block * (C::KEYS * 128), map, base + full + 8 * stage,
                 {64 * block, row, key_head, t.batch, part}, kEvictLast);
      }
    };
    int part = p.parts - 1 - t.begin / per_part, key_tile = t.end - 1 - t.begin % per_part;
    for (int i = t.begin; i < t.stop; i++) {
      load_keys(&maps.k, S::K, S::K_FULL, S::K_EMPTY, key_tile * C::KEYS, part);
      load_keys(&maps.v, S::V, S::V_FULL, S::V_EMPTY, key_tile * C::KEYS, part);
      if (++stage == C::STAGES) {
        stage = 0;
        phase ^= 1;
      }
      if (key_tile-- == t.first) {
        key_tile = t.end - 1;
        part--;
      }
    }
    number = next;
  }
  // The last CTA to finish leaves the counters zeroed.
  __threadfence();
  if (atomicAdd(p.counter + 1, 1) == static_cast<int>(gridDim.x) - 1) p.counter[0] = p.counter[1] = 0;
}

// Loads queries and the carried accumulator, which wait for a warpgroup to be done with its tile: keys must not.
template <class C> DEVICE void produce_queries(const ForwardMaps& maps, const ForwardParams& p, uint8_t* shared) {
  using S = ForwardShared<C>;
  const uint32_t base = shared_address(shared);
  const volatile int* numbers = reinterpret_cast<const volatile int*>(shared + S::NUMBER);
  ForwardWork* work = reinterpret_cast<ForwardWork*>(shared + S::WORK);
  prefetch_map(&maps.q);
  for (int turn = 0;; turn++) {
    barrier_wait(base + S::NUMBER_FULL + 8 * (turn & 3), (turn >> 2) & 1);
    const int number = numbers[turn & 3];
    if (number >= p.tiles) {
      for (int w = 0; w < C::WARPGROUPS; w++) {
        barrier_wait(base + S::Q_EMPTY + 8 * w, (turn & 1) ^ 1);
        work[2 * w + (turn & 1)].batch = ForwardWork::kNone;
        barrier_arrive(base + S::Q_FULL + 8 * w);
      }
      break;
    }
    const ForwardTile t = decode<C>(p, number);
    // From memory before there is room for them.
    for (int w = 0; w < C::WARPGROUPS; w++) {
      const ForwardWork rows = work_of(p, t, w);
      for (int block = 0; block < C::BLOCKS; block++) {
        prefetch_box(&maps.q, {64 * block, rows.row, rows.head, t.batch, 0});
      }
    }
    for (int w = 0; w < C::WARPGROUPS; w++) {
      const uint32_t full = base + S::Q_FULL + 8 * w;
      const ForwardWork rows = work_of(p, t, w);
      barrier_wait(base + S::Q_EMPTY + 8 * w, (turn & 1) ^ 1);
      work[2 * w + (turn & 1)] = rows;
      barrier_expect(full, C::QUERY_BYTES);
      for (int block = 0; block < C::BLOCKS; block++) {
        load_box(base + S::Q + w * C::QUERY_BYTES + block * 8192, &maps.q, full,
                 {64 * block, rows.row, rows.head, t.batch, 0}, kEvictFirst);
      }
    }
    for (int w = 0; C::STAGED && p.carry && w < C::WARPGROUPS; w++) {
      const uint32_t full = base + S::CARRY_FULL + 8 * w;
      const ForwardWork rows = work[2 * w + (turn & 1)];
      barrier_wait(base + S::CARRY_EMPTY + 8 * w, (turn & 1) ^ 1);
      barrier_expect(full, C::STAGE_BYTES);
      for (int block = 0; block < 2 * C::BLOCKS; block++) {
        load_box(base + S::STAGE + w * C::STAGE_BYTES + block * 8192, &maps.acc, full,
                 {32 * block, rows.row, rows.head, t.batch, 0}, kEvictFirst);
      }
    }
  }
}

}  // namespace seqpar::sm90
