#pragma once

#include "kimi_delta_rule/carry.cuh"
#include "kimi_delta_rule/make.cuh"

namespace llmexport {

// Grid (columns of V / kScanColumns, H, B). Of a block's eight warps four carry the state, four
// make the operands of the next chunk: two warps a scheduler, one of each. Carrier w holds half w %
// 2 of the state's rows in 16 columns, those from w / 2 * 16 on of the block's, transposed and in
// registers, over all chunks. Of the blocks of a head each makes its own operands from k, q and g
// as they came, as parts in memory would be half as many bytes more for each.
//
// States stay fp32, and y is rounded to T once and is infinite in fp16 beyond 65504, as in
// chunk_kimi_delta_attention of modeling_kimi_linear.py; chunk.cuh says how many bits the factors
// keep. Sums go along D 16 at a time, then over the two halves.
//
// At 32 heads of 128 columns there are B 32 4 = 128 blocks for B = 1, of which an SM has one. For
// each chunk of bf16 at D = 128 a scheduler issues 380 instructions of its carrier, 81 of them mma,
// and 700 of its maker (counted in the code for SM 90); the recurrence takes 600 and a barrier for
// each token. Tensor cores take 81 * 6.4 = 520 clocks of an SM 90, shared memory 4 * (142 + 140)
// for accesses and 21 KB / 128 = 160 for copies, 1300 in all; a carrier's chain takes about 1050:
// 12 products of 33 clocks for k S, 3 for u and 3 for the state and y, and two exchanges; a maker's
// about 1000. Expected are 1500 clocks of an SM 90, or 210 us for 4096 tokens at 1.85 GHz. On SM
// 86, 89 and 120 tensor cores take 1300 or 2600. All are reckoned, not measured.
template <class T, int D>
__global__ void __launch_bounds__(kKimiScanThreads, kKimiScanBlocks)
    kimiScanKernel(T const* q, T const* k, T const* v, float const* g, float const* state,
                   KimiChunkRecord const* records, T* y, float* nextState, int64_t tokens, int V) {
  DYNAMIC_SHARED(bytes);
  auto& shared = *reinterpret_cast<KimiScanShared<T, D>*>(bytes);
  int const head = blockIdx.y, heads = gridDim.y, chunks = int(ceilDiv(tokens, kKimiChunk));
  // Of B H heads, both at most kMaxGridY.
  unsigned const ofHead = blockIdx.z * heads + head;
  int64_t const keyStride = int64_t(heads) * D, valueStride = int64_t(heads) * V;
  int64_t const row0 = blockIdx.z * tokens;
  int64_t const values = row0 * valueStride + head * V + blockIdx.x * kScanColumns;
  if (warpOfThread() < kChunkThreads / kWarp) {
    int64_t const matrix = int64_t(ofHead) * D * V;
    carryKimiState<T, D>(shared, state + matrix, nextState + matrix, y + values, valueStride,
                         int(tokens), chunks, V);
    return;
  }
  int64_t const keys = row0 * keyStride + head * D;
  makeAllOperands<T, D>(shared, q + keys, k + keys, g + keys, v + values,
                        records + int64_t(ofHead) * chunks, keyStride, valueStride, int(tokens),
                        chunks, V);
}

}  // namespace llmexport
