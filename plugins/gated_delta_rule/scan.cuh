#pragma once

#include "gated_delta_rule/carry.cuh"
#include "gated_delta_rule/read.cuh"

namespace llmexport {

// Grid (columns of V / kScanColumns, H, B). Of a block's eight warps four carry the state, four
// read it: two warps a scheduler, one of each, so that one works while the other waits. Carrier w
// holds half w % 2 of the state's rows in 16 columns, those from w / 2 * 16 on of the block's,
// transposed and in registers, over all chunks; it multiplies k S, makes u and moves the state.
// Readers take the state as parts of 16 bits, and u, from shared memory: two of them have the same
// 16 columns, and half of the tokens each.
//
// States stay fp32, and y is rounded to T once and is infinite in fp16 beyond 65504, as in
// torch_chunk_gated_delta_rule of modeling_qwen3_5_moe.py; chunk.cuh says how many bits the factors
// keep. Sums go along D 16 at a time in each half, then over the two halves; over a chunk's tokens
// they go by tiles, and in u and y the low parts have sums of their own.
//
// At 32 heads of 128 columns there are B 32 4 = 128 blocks for B = 1, of which an SM has one. For
// each chunk of bf16 at D = 128 a scheduler issues 653 instructions of its carrier, 158 of them
// mma, and 645 of its reader, 94 of them mma (counted in the code for SM 90). Tensor cores take
// about 252 * 6.4 = 1600 clocks of an SM 90, 252 * 8 = 2000 of an SM 80, and 4000 or 8000 of an SM
// 86, 89 or 120; shared memory takes 4 * (309 + 204) for accesses and 57 KB / 128 = 450 for copies,
// 2500 in all; what a carrier does one after another takes about 1700: 128 mma of 6.4 clocks, a
// chain of 8 that wait 33 clocks each, three splits and five barriers. Shared memory comes first
// but for the last three: expected are 3000 clocks of an SM 90, or 105 us for 4096 tokens at 1.85
// GHz. All are reckoned, not measured.
template <class T, int D>
__global__ void __launch_bounds__(kScanThreads, kScanBlocks)
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
                  {v + row0 * valueStride + values, valueStride},
                  records + int64_t(ofHead) * chunks, {y + row0 * yStride + values, yStride},
                  tokens, chunks, V);
}

}  // namespace llmexport
