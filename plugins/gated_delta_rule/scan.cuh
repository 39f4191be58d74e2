#pragma once

#include "gated_delta_rule/carry.cuh"
#include "gated_delta_rule/read.cuh"

namespace llmexport {

// Grid (columns of V / kScanColumns, H, B).
template <class T, int D>
__global__ void __launch_bounds__(kScanThreads, 2)
    scanKernel(T const* q, T const* k, T const* v, float const* state, ChunkRecord const* records,
               T* y, float* nextState, int64_t keyStride, int64_t valueStride, int64_t tokens,
               int groups, int V) {
  DYNAMIC_SHARED(bytes);
  auto& shared = *reinterpret_cast<ScanShared<T, D>*>(bytes);
  int const head = blockIdx.y, heads = gridDim.y, group = head / (heads / groups);
  int const chunks = int(ceilDiv(tokens, kChunk));
  int64_t const row0 = blockIdx.z * tokens;
  // Of B H heads, both at most kMaxGridY.
  unsigned const ofHead = blockIdx.z * heads + head;
  if (warpOfThread() < kRoleWarps) {
    int64_t const matrix = int64_t(ofHead) * D * V;
    carryState<T, D>(shared, state + matrix, nextState + matrix, chunks, V);
    return;
  }
  int64_t const keys = row0 * keyStride + group * D, yStride = int64_t(heads) * V;
  int const values = head * V + blockIdx.x * kScanColumns;
  readState<T, D>(shared, {q + keys, keyStride}, {k + keys, keyStride},
                  {v + row0 * valueStride + values, valueStride}, records + int64_t(ofHead) * chunks,
                  {y + row0 * yStride + values, yStride}, tokens, chunks, V);
}

}  // namespace llmexport
