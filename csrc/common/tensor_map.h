// Tensor maps for the copy engine, through the driver's entry point so that the library does not link libcuda.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "../seqpar_attn.h"
#include "errors.h"

namespace seqpar {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<EncodeTiled>(error == cudaSuccess ? found : nullptr);
  }();
  return function;
}

enum class Element { kBf16, kFp16, kFp32 };

// What a map describes: [parts, batch, rows, heads, columns] at `pointer`, strides in elements.
struct Tiled {
  const void* pointer;
  Element element;
  int parts, batch, rows, heads, columns;
  SeqparStrides strides;
};

// A map with the dimensions (column, row, head, batch, part) and boxes of 128 bytes by `box_rows` rows, in shared
// memory under the 128-byte swizzle. 0, or an error code.
inline int32_t make_tensor_map(CUtensorMap* map, const Tiled& x, int box_rows) {
  const EncodeTiled encode = encode_tiled();
  if (!encode) return kNoTensorMaps;
  const int bytes = x.element == Element::kFp32 ? 4 : 2;
  const cuuint64_t sizes[5] = {static_cast<cuuint64_t>(x.columns), static_cast<cuuint64_t>(x.rows),
                               static_cast<cuuint64_t>(x.heads), static_cast<cuuint64_t>(x.batch),
                               static_cast<cuuint64_t>(x.parts)};
  const int64_t strides[4] = {x.strides.seq, x.strides.head, x.strides.batch, x.strides.part};
  cuuint64_t stride_bytes[4];
  for (int i = 0; i < 4; i++) {
    // A dimension of one may have any stride, but the driver looks at all of them.
    const int64_t stride = sizes[i + 1] == 1 ? 16 : strides[i] * bytes;
    if (stride <= 0 || stride % 16) return kUnaligned;
    stride_bytes[i] = static_cast<cuuint64_t>(stride);
  }
  if (reinterpret_cast<uintptr_t>(x.pointer) % 16) return kUnaligned;
  const cuuint32_t box[5] = {static_cast<cuuint32_t>(128 / bytes), static_cast<cuuint32_t>(box_rows), 1, 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUtensorMapDataType type = x.element == Element::kFp32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : x.element == Element::kBf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(map, type, 5, const_cast<void*>(x.pointer), sizes, stride_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : kBadTensorMap;
}

}  // namespace seqpar
