// Products with weights of 4 and 8 bits, which are decoded in registers.
//
// For few rows, as in decode: an H100 reads 3.35 TB/s, 12.8 bytes a cycle of each of its 132 SMs at
// 1.98 GHz, which issue 4 instructions of warps a cycle at most, 2 of those of integers and bits. A
// warp takes 423 instructions on SM 90, 222 of those, for its 2048 bytes of a stage of MXFP4 in
// bf16: 4.8 bytes an instruction, so that 12.8 bytes need 2.7 a cycle, 1.4 of those. The 4.8 TB/s
// of an H200, 18.4 bytes, need 3.8 and 2.0; it reads 16.5 bytes, 4.3 TB/s, at most, which need 3.4
// and 1.8. Shared memory takes 40 KB for 8192 bytes of weights: those twice, and 8 KB of inputs
// once from the copy and once for each half of the columns. At 128 bytes a cycle that is 25.6 bytes
// of weights.
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

// Where a lane that takes whole blocks finds what it multiplies in every stage: block `part` of the
// four of its warp's depth, of every eighth column.
template <class W, class S>
struct LanePlaces {
  int its;    // the block of a stage's
  int input;  // of a chunk of its first row
  int block;  // of its first column
  // Of MXFP4, of its first column; how far from there that of the next is, and the next but one.
  int scale, toOdd, toNext;

  __device__ __forceinline__ LanePlaces(Projection const& p, int warpDepth, int warpColumn) {
    static_assert(S::kDepth == S::kWarpsDeep * kLaneBlocks * kPackedBlock);
    int const lane = threadIdx.x % kWarp, group = lane / 4;
    its = warpDepth * kLaneBlocks + lane % 4;
    input = blockwiseChunkAt<S::kDepth / kChunk>(group, its * (kPackedBlock / kChunk));
    block = blockAt<S>(its, warpColumn + group);
    // They are not computed anew in every stage.
    keepInLoop(input);
    keepInLoop(block);
    if constexpr (kIsMxfp4<W>) {
      int const blocks = p.depth / kMoeScaleBlock;
      scale = scaleRow<S>(p, warpColumn + group) * blocks + its;
      toOdd = scaleRow<S>(p, kMmaColumns) * blocks;
      toNext = scaleRow<S>(p, 2 * kMmaColumns) * blocks;
      keepInLoop(scale);
      keepInLoop(toOdd);
      keepInLoop(toNext);
    }
  }

  // The place of the scale of its j-th column.
  __device__ __forceinline__ int scaleOf(int j) const {
    return scale + j % 2 * toOdd + j / 2 * toNext;
  }
};

// In its place where they take parts of blocks.
struct NoPlaces {
  __device__ __forceinline__ NoPlaces(Projection const&, int, int) {}
};

// The same where lanes take whole blocks, in each product the pairs of half a word's values. Scales
// and words are then read once a block. The weights are the rows of the product, as the inputs of a
// lane's column of it come from shared memory side by side. decode(pairs, j) gives the pairs of the
// lane's block in its j-th column.
template <class T, class S, class F>
__device__ __forceinline__ void multiplyBlockwise(Sums<S>& sums, T const* input, int inputAt,
                                                  F decode) {
  constexpr int kInputChunks = S::kDepth / kChunk, kWords = kPackedBlock / kChunk;
  static_assert(S::kRowTiles == 1);
  Vector<uint32_t, 4> in[2][kWords];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      // Chunks of a block are in places that differ in the last bits alone.
      int const at = (inputAt ^ i) + half * 8 * kInputChunks;
      in[half][i] = load<4>(reinterpret_cast<uint32_t const*>(input + at * kChunk));
    }
  }
#pragma unroll
  for (int j = 0; j < S::kColumnTiles; j += 2) {
    uint32_t pairs[2][kWords][4];
    decode(pairs[0], j);
    decode(pairs[1], j + 1);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        uint32_t const a[4] = {pairs[0][i][e], pairs[1][i][e], pairs[0][i][e + 1],
                               pairs[1][i][e + 1]};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t const b[2] = {in[half][i].at[e], in[half][i].at[e + 1]};
          mma16x8x16<T>(sums[0][j + half], a, b);
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
