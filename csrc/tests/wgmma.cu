// Every shape in wgmma_shapes.cuh against sums on the host: descriptors, operands' layouts, accumulators' layout, and
// that the *_first functions do not read their accumulators.
#include "../common/wgmma.cuh"

#include "../common/tma.cuh"
#include "check.h"

using namespace seqpar;

namespace {

constexpr int kDepth = 64;  // columns of A that are multiplied: 4 steps of 16

enum class Kind { kSS, kSB, kRS };

template <class T> __device__ uint16_t round16(float x) { return static_cast<uint16_t>(pack<T>(x, 0.f) & 0xffff); }

// Puts element (row, column) of a tile with `rows` rows where the 128-byte swizzle has it.
template <class T> __device__ void put(uint8_t* tile, int rows, int row, int column, float x) {
  const int offset = column / 64 * (rows * 128) + swizzled(row, column % 64 / 8) + column % 8 * 2;
  *reinterpret_cast<uint16_t*>(tile + offset) = round16<T>(x);
}

// A: [64][kDepth]; B: [N][kDepth] for kSS, else [kDepth][N]; out: [2][64][N], first A B, then A B added to it once
// more.
template <class T, int N, Kind KIND> __global__ void multiply(const float* a, const float* b, float* out) {
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t *a_tile = shared, *b_tile = shared + 64 * kDepth * 2;
  for (int i = threadIdx.x; i < 64 * kDepth; i += blockDim.x) put<T>(a_tile, 64, i / kDepth, i % kDepth, a[i]);
  const int b_columns = KIND == Kind::kSS ? kDepth : N, b_rows = KIND == Kind::kSS ? N : kDepth;
  for (int i = threadIdx.x; i < b_rows * b_columns; i += blockDim.x) {
    put<T>(b_tile, b_rows, i / b_columns, i % b_columns, b[i]);
  }
  shared_to_async();
  __syncthreads();

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 4, column = 2 * (lane % 4);
  float d[N / 2];
  for (int i = 0; i < N / 2; i++) d[i] = nanf("");  // must not matter
  const uint64_t a_rows = tile_descriptor(shared_address(a_tile), 0);
  const uint64_t b_tiles = tile_descriptor(shared_address(b_tile), KIND == Kind::kSS ? 0 : kDepth * 128);
  for (int round = 0; round < 2; round++) {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; k++) {
      const uint64_t bk = b_tiles + (KIND == Kind::kSS ? static_cast<uint64_t>(2 * k) : k * moved(2048));
      const bool first = round == 0 && k == 0;
      if constexpr (KIND == Kind::kRS) {
        const auto pair = [&](int r, int c) {
          return pack<T>(a[r * kDepth + 16 * k + c], a[r * kDepth + 16 * k + c + 1]);
        };
        const uint32_t a0 = pair(row, column), a1 = pair(row + 8, column), a2 = pair(row, column + 8);
        const uint32_t a3 = pair(row + 8, column + 8);
        if (first) {
          wgmma_rs_first<T>(d, a0, a1, a2, a3, bk);
        } else {
          wgmma_rs<T>(d, a0, a1, a2, a3, bk);
        }
      } else if constexpr (KIND == Kind::kSB) {
        if (first) {
          wgmma_sb_first<T>(d, a_rows + 2 * k, bk);
        } else {
          wgmma_sb<T>(d, a_rows + 2 * k, bk);
        }
      } else {
        if (first) {
          wgmma_ss_first<T>(d, a_rows + 2 * k, bk);
        } else {
          wgmma_ss<T>(d, a_rows + 2 * k, bk);
        }
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    pin(d);
    for (int j = 0; j < N / 8; j++) {
      for (int i = 0; i < 4; i++) {
        out[(round * 64 + row + 8 * (i / 2)) * N + 8 * j + column + i % 2] = d[4 * j + i];
      }
    }
  }
}

float rounded(float x, bool bf16) {
  return bf16 ? __bfloat162float(__float2bfloat16(x)) : __half2float(__float2half(x));
}

template <class T, int N, Kind KIND> void test(const char* name) {
  std::vector<float> a(64 * kDepth), b(N * kDepth);
  for (size_t i = 0; i < a.size(); i++) a[i] = number(i, 1);
  for (size_t i = 0; i < b.size(); i++) b[i] = number(i, 2);
  const Array<float> on_a(a), on_b(b), out(2 * 64 * N);
  const int bytes = 64 * kDepth * 2 + N * kDepth * 2;
  cuda(cudaFuncSetAttribute(multiply<T, N, KIND>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
  multiply<T, N, KIND><<<1, 128, bytes>>>(on_a.data(), on_b.data(), out.data());
  finish(name);
  const std::vector<float> got = out.read();
  for (int i = 0; i < 64; i++) {
    for (int j = 0; j < N; j++) {
      double sum = 0;
      for (int k = 0; k < kDepth; k++) {
        const float y = KIND == Kind::kSS ? b[j * kDepth + k] : b[k * N + j];
        sum += static_cast<double>(rounded(a[i * kDepth + k], T::is_bf16)) * rounded(y, T::is_bf16);
      }
      const float once = got[i * N + j], twice = got[(64 + i) * N + j];
      EXPECT(fabs(once - sum) < 1e-4, "%s N=%d (%d, %d): %g, expected %g", name, N, i, j, once, sum);
      EXPECT(fabs(twice - 2 * sum) < 2e-4, "%s N=%d (%d, %d), added: %g, expected %g", name, N, i, j, twice, 2 * sum);
    }
  }
}

template <class T> void test_all(const char* dtype) {
  printf("%s\n", dtype);
  test<T, 64, Kind::kSS>("ss");
  test<T, 80, Kind::kSS>("ss");
  test<T, 112, Kind::kSS>("ss");
  test<T, 128, Kind::kSS>("ss");
  test<T, 64, Kind::kSB>("sb");
  test<T, 64, Kind::kRS>("rs");
  test<T, 128, Kind::kRS>("rs");
  test<T, 256, Kind::kRS>("rs");
}

}  // namespace

int main() {
  need_hopper();
  test_all<Bf16>("bf16");
  test_all<Fp16>("fp16");
  return result("wgmma");
}
