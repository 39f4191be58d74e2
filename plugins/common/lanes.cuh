// Reductions over the lanes of a warp that work on one row: they lie side by side, and their number
// is a power of two. All 32 lanes take part; every lane of a row gets the row's result.
#pragma once

#include "common/gpu.cuh"

namespace llmexport {

__device__ __forceinline__ float sumOverLanes(float value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(~0u, value, offset);
  }
  return value;
}

template <class V>
__device__ __forceinline__ V maxOverLanes(V value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    V const other = __shfl_xor_sync(~0u, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace llmexport
