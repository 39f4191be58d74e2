// Products with weights of 4 and 8 bits, which are decoded in registers.
#pragma once

#include "common/tensor_core.cuh"
#include "moe_experts/packed_scales.cuh"

namespace llmexport {

template <class S>
using Sums = float[S::kRowTiles][S::kColumnTiles][4];

// Adds the product of a stage's two tiles, for the rows and columns of this warp. A sum may take
// the k of a block in any order: a thread takes 8 that follow each other, and pairs them as
// decode(pairs, block, column, part) gives them.
template <class T, class W, class S, class F>
__device__ __forceinline__ void multiplyPacked(Sums<S>& sums, T const* input, int warpRow,
                                               int warpColumn, F decode) {
  constexpr int kInputChunks = S::kDepth / kChunk;
  constexpr int kParts = 4;
  // Of 4 bits a word of inputs is paired with the next but one, of 8 bits with the next.
  constexpr int kApart = kBits<W> == 4 ? 2 : 1, kStep = 3 - kApart;
  int const lane = threadIdx.x % kWarp, group = lane / 4, part = lane % 4;
  int inputAt = chunkAt<kInputChunks>(warpRow + group, part);
  keepInLoop(inputAt);
#pragma unroll 1
  for (int block = 0; block < S::kDepth / kPackedBlock; ++block) {
    uint32_t b[S::kColumnTiles][4];
#pragma unroll
    for (int j = 0; j < S::kColumnTiles; ++j) {
      decode(b[j], block, warpColumn + j * kMmaColumns + group, part);
    }
#pragma unroll
    for (int i = 0; i < S::kRowTiles; ++i) {
      Vector<uint32_t, 4> in[2];
      uint32_t a[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int const at = (inputAt ^ block * kParts) + (i * kMmaRows + half * 8) * kInputChunks;
        in[half] = load<4>(reinterpret_cast<uint32_t const*>(input + at * kChunk));
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          uint32_t const low = in[half].at[e * kStep], high = in[half].at[e * kStep + kApart];
          a[e][half] = (low & 0xFFFF) | high << 16;
          a[e][half + 2] = low >> 16 | (high & 0xFFFF0000);
        }
      }
#pragma unroll
      for (int j = 0; j < S::kColumnTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          uint32_t const both[2] = {b[j][2 * e], b[j][2 * e + 1]};
          mma16x8x16<T>(sums[i][j], a[e], both);
        }
      }
    }
  }
}

// Adds the sums of warps that have the same columns to those of the first, in the order of their
// depths; `parts` is shared memory that nothing else uses.
template <class S>
__device__ __forceinline__ void addParts(Sums<S>& sums, float* parts, int warpDepth) {
  constexpr int kSums = S::kColumnTiles * 4, kApart = S::kWarpsAcross * kWarp;
  float* const its = parts + threadIdx.x % kApart;
  if (warpDepth > 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      its[((warpDepth - 1) * kSums + i) * kApart] = sums[0][i / 4][i % 4];
    }
  }
  __syncthreads();
  if (warpDepth > 0) return;
#pragma unroll
  for (int i = 0; i < (S::kWarpsDeep - 1) * kSums; ++i) {
    sums[0][i % kSums / 4][i % 4] += its[i * kApart];
  }
}

// Rounds the first warps' sums into a tile; its rows are the columns of multiplyBlockwise's
// products.
template <class T, class S, int kPitch>
__device__ __forceinline__ void storeTurned(Sums<S> const& sums, T* tile, int warpDepth,
                                            int warpColumn) {
  int const lane = threadIdx.x % kWarp;
  if (warpDepth > 0) return;
#pragma unroll
  for (int j = 0; j < S::kColumnTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int const row = j % 2 * 8 + lane % 4 * 2 + e % 2;
      int const column = warpColumn + (j / 2 * 2 + e / 2) * kMmaColumns + lane / 4;
      tile[row * kPitch + column] = fromFloat<T>(sums[0][j][e]);
    }
  }
}

}  // namespace llmexport
