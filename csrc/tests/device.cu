// Arithmetic on packed numbers, stmatrix, and named barriers.
#include "../common/device.cuh"

#include "../common/barrier.cuh"
#include "../common/tma.cuh"
#include "check.h"

using namespace seqpar;

namespace {

// out: [6][count]: x rounded to bf16 and to fp16 and back, as the lower and the upper half of a pair; tanh; 2^x.
__global__ void arithmetic(const float* x, float* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  out[i] = unpack<Bf16>(pack<Bf16>(x[i], 1.f)).x;
  out[count + i] = unpack<Bf16>(pack<Bf16>(1.f, x[i])).y;
  out[2 * count + i] = unpack<Fp16>(pack<Fp16>(x[i], 1.f)).x;
  out[3 * count + i] = unpack<Fp16>(pack<Fp16>(1.f, x[i])).y;
  out[4 * count + i] = tanh_exact(x[i]);
  out[5 * count + i] = exp2_fast(x[i]);
}

void test_arithmetic() {
  std::vector<float> x;
  for (int i = 0; i < 4096; i++) x.push_back(number(i, 3) * (i % 4 ? 4.f : 0.01f));
  x.push_back(0.f);
  x.push_back(-INFINITY);
  const int count = static_cast<int>(x.size());
  const Array<float> in(x), out(6 * count);
  arithmetic<<<(count + 255) / 256, 256>>>(in.data(), out.data(), count);
  finish("arithmetic");
  const std::vector<float> got = out.read();
  for (int i = 0; i < count; i++) {
    const float bf16 = __bfloat162float(__float2bfloat16(x[i])), fp16 = __half2float(__float2half(x[i]));
    for (int half = 0; half < 2; half++) {
      EXPECT(got[half * count + i] == bf16, "bf16 of %g: %g, expected %g", x[i], got[half * count + i], bf16);
      EXPECT(got[(2 + half) * count + i] == fp16, "fp16 of %g: %g, expected %g", x[i], got[(2 + half) * count + i],
             fp16);
    }
    const double t = tanh(static_cast<double>(x[i])), e = exp2(static_cast<double>(x[i]));
    EXPECT(fabs(got[4 * count + i] - t) < 3e-7, "tanh %g: %.9g, expected %.9g", x[i], got[4 * count + i], t);
    EXPECT(fabs(got[5 * count + i] - e) <= 4e-7 * e, "2^%g: %.9g, expected %.9g", x[i], got[5 * count + i], e);
  }
}

// A warp's fragments of 16 x 16 numbers 16 row + column, stored as a tile of rows and, transposed, as one of columns;
// and fp32 fragments of 16 x 8 through the same instruction, of which the even columns come first.
__global__ void matrices(uint16_t* rows, uint16_t* columns, float* wide) {
  __shared__ __align__(1024) uint8_t tile[3][16 * 128];
  const int lane = threadIdx.x, r = lane / 4, c = 2 * (lane % 4);
  const auto pair = [](int row, int column) {
    return static_cast<uint32_t>(16 * row + column) | static_cast<uint32_t>(16 * row + column + 1) << 16;
  };
  const uint32_t a = pair(r, c), b = pair(r + 8, c), x = pair(r, c + 8), y = pair(r + 8, c + 8);
  // Matrices in the order (rows 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
  store_matrices(shared_address(tile[0]) + swizzled(lane & 15, lane >> 4), a, b, x, y);
  store_matrices_transposed(shared_address(tile[1]) + swizzled((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1), a, b, x,
                            y);
  const auto value = [](int row, int column) { return __float_as_uint(10.f * row + column); };
  store_matrices(shared_address(tile[2]) + swizzled((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1), value(r, c),
                 value(r, c + 1), value(r + 8, c), value(r + 8, c + 1));
  __syncwarp();
  for (int i = lane; i < 256; i += 32) {
    const int offset = swizzled(i / 16, i % 16 / 8) + i % 8 * 2;
    rows[i] = *reinterpret_cast<uint16_t*>(tile[0] + offset);
    columns[i] = *reinterpret_cast<uint16_t*>(tile[1] + offset);
  }
  for (int i = lane; i < 128; i += 32) {
    wide[i] = *reinterpret_cast<float*>(tile[2] + swizzled(i / 8, i % 8 / 4) + i % 4 * 4);
  }
}

void test_matrices() {
  const Array<uint16_t> rows(256), columns(256);
  const Array<float> wide(128);
  matrices<<<1, 32>>>(rows.data(), columns.data(), wide.data());
  finish("matrices");
  const std::vector<uint16_t> by_row = rows.read(), by_column = columns.read();
  const std::vector<float> got = wide.read();
  for (int i = 0; i < 256; i++) {
    EXPECT(by_row[i] == i, "row %d column %d: %d", i / 16, i % 16, by_row[i]);
    EXPECT(by_column[i] == i % 16 * 16 + i / 16, "transposed, row %d column %d: %d", i / 16, i % 16, by_column[i]);
  }
  for (int i = 0; i < 128; i++) {
    const int position = i % 8, column = position < 4 ? 2 * position : 2 * (position - 4) + 1;
    EXPECT(got[i] == 10.f * (i / 8) + column, "fp32, row %d position %d: %g", i / 8, position, got[i]);
  }
}

// Warp 1 reads what warp 0 has written only after the named barrier, 100 times.
__global__ void hand_over(int* out) {
  __shared__ volatile int box;
  int sum = 0;
  for (int i = 0; i < 100; i++) {
    if (threadIdx.x < 32) {
      if (threadIdx.x == 0) box = i;
      named_arrive(1, 64);
      named_sync(2, 64);  // it has been read
    } else {
      named_sync(1, 64);
      sum += box;
      named_arrive(2, 64);
    }
  }
  if (threadIdx.x >= 32) out[threadIdx.x - 32] = sum;
}

void test_named_barriers() {
  const Array<int> out(32);
  hand_over<<<1, 64>>>(out.data());
  finish("hand_over");
  for (const int sum : out.read()) EXPECT(sum == 4950, "%d, expected 4950", sum);
}

}  // namespace

int main() {
  need_hopper();
  test_arithmetic();
  test_matrices();
  test_named_barriers();
  return result("device");
}
