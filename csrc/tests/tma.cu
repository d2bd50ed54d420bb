// Boxes through the copy engine: where the swizzle puts them, what lies outside a tensor, strides, stores and
// additions.
#include "../common/tma.cuh"

#include "../common/barrier.cuh"
#include "../common/tensor_map.h"
#include "check.h"

using namespace seqpar;

namespace {

constexpr int kBoxRows = 16, kRowBytes = 128;

// Loads the box at `at` and writes it, unswizzled, to `out`: [kBoxRows][32] of fp32.
__global__ void load(const __grid_constant__ CUtensorMap map, BoxAt at, float* out) {
  __shared__ __align__(1024) uint8_t tile[kBoxRows * kRowBytes];
  __shared__ __align__(8) uint64_t full;
  const uint32_t barrier = shared_address(&full);
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_fence();
  }
  __syncthreads();
  for (int round = 0; round < 2; round++) {  // both parities
    if (threadIdx.x == 0) {
      barrier_expect(barrier, sizeof(tile));
      load_box(shared_address(tile), &map, barrier, at, kEvictFirst);
    }
    barrier_wait(barrier, round);
    __syncthreads();
  }
  for (int i = threadIdx.x; i < kBoxRows * 32; i += blockDim.x) {
    out[i] = *reinterpret_cast<float*>(tile + swizzled(i / 32, i % 32 / 4) + i % 4 * 4);
  }
}

// Stores, or adds, 100 row + column as the box at `at`.
__global__ void store(const __grid_constant__ CUtensorMap map, BoxAt at, bool add) {
  __shared__ __align__(1024) uint8_t tile[kBoxRows * kRowBytes];
  for (int i = threadIdx.x; i < kBoxRows * 32; i += blockDim.x) {
    *reinterpret_cast<float*>(tile + swizzled(i / 32, i % 32 / 4) + i % 4 * 4) = 100.f * (i / 32) + i % 32;
  }
  shared_to_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (add) {
      add_box(&map, shared_address(tile), at);
    } else {
      store_box(&map, shared_address(tile), at);
    }
    bulk_commit();
    bulk_wait_read();
    bulk_wait();
  }
}

// [part][batch][row][head][column] as a slice of a larger tensor.
struct Tensor {
  int parts = 2, batch = 2, rows = 21, heads = 3, columns = 40, padding = 5;  // rows that belong to somebody else

  SeqparStrides strides() const {
    const int64_t row = static_cast<int64_t>(heads) * columns, one = row * (rows + padding);
    return {one * batch, one, row, columns};
  }
  size_t size() const { return static_cast<size_t>(strides().part * parts); }
  size_t at(int p, int b, int r, int h, int c) const {
    const SeqparStrides s = strides();
    return static_cast<size_t>(p * s.part + b * s.batch + r * s.seq + h * s.head + c);
  }
  CUtensorMap map(const float* data) const {
    CUtensorMap map;
    const Tiled tiled = {data, Element::kFp32, parts, batch, rows, heads, columns, strides()};
    const int32_t error = make_tensor_map(&map, tiled, kBoxRows);
    EXPECT(error == 0, "make_tensor_map: %s", error_text(error));
    return map;
  }
};

void test_load(const Tensor& t, BoxAt at) {
  std::vector<float> host(t.size());
  for (size_t i = 0; i < host.size(); i++) host[i] = static_cast<float>(i % 65521);
  const Array<float> data(host), out(kBoxRows * 32);
  load<<<1, 64>>>(t.map(data.data()), at, out.data());
  finish("load");
  const std::vector<float> got = out.read();
  for (int r = 0; r < kBoxRows; r++) {
    for (int c = 0; c < 32; c++) {
      const bool inside = at.row + r < t.rows && at.column + c < t.columns;
      const float expected = inside ? host[t.at(at.part, at.batch, at.row + r, at.head, at.column + c)] : 0.f;
      EXPECT(got[r * 32 + c] == expected, "row %d column %d: %g, expected %g", r, c, got[r * 32 + c], expected);
    }
  }
}

void test_store(const Tensor& t, BoxAt at, bool add) {
  const Array<float> data(std::vector<float>(t.size(), 7.f));
  store<<<1, 64>>>(t.map(data.data()), at, add);
  finish("store");
  std::vector<float> expected(t.size(), 7.f);
  for (int r = 0; r < kBoxRows; r++) {
    for (int c = 0; c < 32; c++) {
      if (at.row + r >= t.rows || at.column + c >= t.columns) continue;
      float& x = expected[t.at(at.part, at.batch, at.row + r, at.head, at.column + c)];
      x = (add ? x : 0.f) + 100.f * r + c;
    }
  }
  const std::vector<float> got = data.read();
  for (size_t i = 0; i < got.size(); i++) EXPECT(got[i] == expected[i], "%zu: %g, expected %g", i, got[i], expected[i]);
}

void test_refusals() {
  const Array<float> data(1024);
  CUtensorMap map;
  const SeqparStrides fine = {0, 0, 64, 32}, odd = {0, 0, 63, 32}, none = {0, 0, 0, 32};
  const auto make = [&](const float* pointer, const SeqparStrides& strides) {
    return make_tensor_map(&map, {pointer, Element::kFp32, 1, 1, 8, 2, 32, strides}, kBoxRows);
  };
  EXPECT(make(data.data(), fine) == 0, "a good one");
  EXPECT(make(data.data(), odd) == kUnaligned, "a stride of 252 bytes");
  EXPECT(make(data.data(), none) == kUnaligned, "a stride of 0");
  EXPECT(make(data.data() + 1, fine) == kUnaligned, "a pointer at 4 bytes");
}

}  // namespace

int main() {
  need_hopper();
  const Tensor t;
  for (const BoxAt at : {BoxAt{0, 0, 0, 0, 0}, BoxAt{32, 16, 2, 1, 1}, BoxAt{0, 8, 1, 0, 1}, BoxAt{32, 0, 0, 1, 0}}) {
    test_load(t, at);
    test_store(t, at, false);
    test_store(t, at, true);
  }
  test_refusals();
  return result("tma");
}
