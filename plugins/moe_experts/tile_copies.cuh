// Copies of a projection's inputs and weights to tiles in shared memory, and their places there.
#pragma once

#include "common/async_copy.cuh"
#include "moe_experts/mxfp4.cuh"
#include "moe_experts/tensor_core_projection.h"

namespace llmexport {

// The place of chunk `chunk` of row `row` in a tile whose rows have 8 chunks or more: one chunk of
// each of 8 rows, or 4 chunks of each of two rows that follow each other, are in different banks.
template <int kChunksPerRow>
__device__ __forceinline__ int chunkAt(int row, int chunk) {
  static_assert(kChunksPerRow % 8 == 0);
  return row * kChunksPerRow + (chunk ^ ((row & 1) << 2 | (row >> 1 & 3)));
}

// The same for the i-th of rows from `first` on that are kApart apart.
template <int kChunksPerRow, int kApart>
__device__ __forceinline__ int chunkAt(int first, int i, int chunk) {
  if constexpr (kApart % 8 == 0) {
    return chunkAt<kChunksPerRow>(first, chunk) + i * kApart * kChunksPerRow;
  } else {
    return chunkAt<kChunksPerRow>(first + i * kApart, chunk);
  }
}

// The column of the weights that column `c` of a tile holds, or -1 beyond the last. `adjacent`:
// gate and up alternate element by element in memory, and columns are taken as they lie; otherwise
// a tile has chunks of 8 of each in turn.
template <class S>
__device__ __forceinline__ int weightColumn(Projection const& p, int columnTile, int c,
                                            bool adjacent) {
  if (!p.gated) {
    int const column = columnTile * S::kColumns + c;
    return column < p.columns ? column : -1;
  }
  int const first = columnTile * (S::kColumns / 2);
  int const column = first + (adjacent ? c / 2 : c / (2 * kChunk) * kChunk + c % kChunk);
  int const isUp = adjacent ? c % 2 : c / kChunk % 2;
  if (column >= p.columns) return -1;
  return p.interleaved ? 2 * column + isUp : isUp * p.columns + column;
}

// The offset of element `at` of row `row`, by one multiplication of 32 by 32 bits: a multiplication
// of 64 bits takes three.
__device__ __forceinline__ int64_t place(int row, int columns, int at) {
  return int64_t(uint64_t(unsigned(row)) * unsigned(columns) + unsigned(at));
}

// The place of chunk `chunk` of row `row` in a tile of inputs that lanes take blockwise: the chunks
// of two rows and four blocks that follow each other are in different banks.
template <int kChunksPerRow>
__device__ __forceinline__ int blockwiseChunkAt(int row, int chunk) {
  return row * kChunksPerRow + (chunk ^ (chunk >> 3 & 1) ^ (row & 1) << 1);
}

// Hides from the compiler what x was computed from. Computations from x stay in their loop: moved
// out of it, the results would take registers that are not left. And x is not computed anew there.
__device__ __forceinline__ void keepInLoop(int& x) { asm volatile("" : "+r"(x)); }
template <class X>
__device__ __forceinline__ void keepInLoop([[maybe_unused]] X*& x) {
#ifndef LLMEXPORT_EMULATED
  asm volatile("" : "+l"(x));
#endif
}

// The copies of a thread into a stage's tile of inputs, [kRows, kDepth] in chunks. `rows`, in
// shared memory, holds the input's row for each of the tile, -1 past the last.
template <class T, class S, bool kHeld = S::kBlockwise>
struct InputCopies {
  static constexpr int kPerRow = S::kDepth / kChunk, kApart = S::kThreads / kPerRow;
  static constexpr int kCount = S::kRows / kApart;
  T const* from;
  int const* rows;
  int depth;

  __device__ __forceinline__ void start(T* tile, int firstDepth) const {
    int const chunk = threadIdx.x % kPerRow, at = firstDepth + chunk * kChunk;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int const row = rows[threadIdx.x / kPerRow + i * kApart];
      int const to = chunkAt<kPerRow, kApart>(threadIdx.x / kPerRow, i, chunk);
      copyAsync16(tile + to * kChunk, from + place(row < 0 ? 0 : row, depth, at),
                  row >= 0 && at < depth);
    }
  }
};

// The same where lanes take whole blocks: registers hold what does not change from stage to stage.
template <class T, class S>
struct InputCopies<T, S, true> {
  static constexpr int kPerRow = S::kDepth / kChunk, kApart = S::kThreads / kPerRow;
  static constexpr int kCount = S::kRows / kApart;
  static_assert(kApart % 2 == 0);
  T const* from[kCount];
  int to, count, depth;  // the first place, the rows there are, and a row's rest from its chunk on

  __device__ __forceinline__ InputCopies(T const* input, int const* rows, int rowDepth)
      : count(0), depth(rowDepth - threadIdx.x % kPerRow * kChunk) {
    int const first = threadIdx.x / kPerRow, chunk = threadIdx.x % kPerRow;
    to = blockwiseChunkAt<kPerRow>(first, chunk) * kChunk;
    keepInLoop(to);
    keepInLoop(depth);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int const row = rows[first + i * kApart];
      from[i] = input + place(row < 0 ? 0 : row, rowDepth, chunk * kChunk);
      keepInLoop(from[i]);
      count += row >= 0;
    }
  }

  __device__ __forceinline__ void start(T* tile, int firstDepth) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      copyAsync16(tile + to + i * kApart * S::kDepth, from[i] + unsigned(firstDepth),
                  i < count && firstDepth < depth);
    }
  }
};

// The weights of one expert from column `column` on, or from column 0 if that is -1.
template <class W>
__device__ __forceinline__ W const* weightsFrom(Projection const& p, int expert, int64_t column,
                                                int columnElements) {
  int64_t const first = int64_t(expert) * p.width() + (column < 0 ? 0 : column);
  return static_cast<W const*>(p.weights) + first * columnElements;
}

// How many of a tile's kCount columns from c on, kApart apart, the weights have.
template <class S, int kApart, int kCount>
__device__ __forceinline__ int columnsThere(Projection const& p, Share const& share, int c) {
  static_assert(kApart % (2 * kChunk) == 0 || kCount == 1);
  int count = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    count += weightColumn<S>(p, share.columnTile, c + i * kApart, false) >= 0;
  }
  return count;
}

// How far apart such columns are in the weights.
template <int kApart>
__device__ __forceinline__ int apartInWeights(Projection const& p) {
  return p.gated && !p.interleaved ? kApart / 2 : kApart;
}

// The copies of a thread into a stage's tile of 16-bit weights, stored [width, depth].
template <class W, bool kTransposed, class S>
struct WeightCopies {
  static constexpr int kPerRow = S::kDepth / kChunk, kApart = S::kThreads / kPerRow;
  static constexpr int kCount = S::kColumns / kApart;
  W const* from;
  int count, apart, depth;

  __device__ __forceinline__ WeightCopies(Projection const& p, Share const& share)
      : from(weightsFrom<W>(p, share.expert,
                            weightColumn<S>(p, share.columnTile, threadIdx.x / kPerRow, false),
                            p.depth)),
        count(columnsThere<S, kApart, kCount>(p, share, threadIdx.x / kPerRow)),
        apart(apartInWeights<kApart>(p)),
        depth(p.depth) {}

  __device__ __forceinline__ void start(unsigned char* stage, int firstDepth) const {
    int const chunk = threadIdx.x % kPerRow, at = firstDepth + chunk * kChunk;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int const to = chunkAt<kPerRow, kApart>(threadIdx.x / kPerRow, i, chunk);
      copyAsync16(reinterpret_cast<W*>(stage) + to * kChunk, from + place(i * apart, depth, at),
                  i < count && at < depth);
    }
  }
};

// The same for weights that are stored [depth, width].
template <class W, class S>
struct WeightCopies<W, true, S> {
  static constexpr int kPerRow = S::kColumns / kChunk, kApart = S::kThreads / kPerRow;
  static constexpr int kCount = S::kDepth / kApart;
  W const* from;
  int width, depth;  // depth is 0 past the last column

  __device__ __forceinline__ WeightCopies(Projection const& p, Share const& share)
      : from(weightsFrom<W>(p, share.expert, 0, p.depth)), width(p.width()) {
    int const column =
        weightColumn<S>(p, share.columnTile, threadIdx.x % kPerRow * kChunk, p.interleaved);
    depth = column < 0 ? 0 : p.depth;
    from += column < 0 ? 0 : column;
  }

  __device__ __forceinline__ void start(unsigned char* stage, int firstDepth) const {
    int columns = width;
    keepInLoop(columns);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      int const row = threadIdx.x / kPerRow, at = firstDepth + row + i * kApart;
      int const to = chunkAt<kPerRow, kApart>(row, i, threadIdx.x % kPerRow);
      copyAsync16(reinterpret_cast<W*>(stage) + to * kChunk, from + place(at, columns, 0),
                  at < depth);
    }
  }
};

// The same for packed weights: a stage holds [kDepth / kPackedBlock, kColumns] blocks.
template <class W, class S>
struct BlockCopies {
  static constexpr int kCopyBytes = 16, kPerBlock = kBlockBytes<W> / kCopyBytes;
  static constexpr int kPerRow = S::kDepth / kPackedBlock * kPerBlock;
  static constexpr int kApart = S::kThreads / kPerRow, kCount = S::kColumns / kApart;
  unsigned char const* from;
  int to, count, apart, bytes;  // bytes of a column

  __device__ __forceinline__ BlockCopies(Projection const& p, Share const& share)
      : from(weightsFrom<unsigned char>(
            p, share.expert, weightColumn<S>(p, share.columnTile, threadIdx.x / kPerRow, false),
            p.depth * kBits<W> / 8)),
        count(columnsThere<S, kApart, kCount>(p, share, threadIdx.x / kPerRow)),
        apart(apartInWeights<kApart>(p)),
        bytes(p.depth * kBits<W> / 8) {
    int const copy = threadIdx.x % kPerRow;
    to = blockAt<S>(copy / kPerBlock, threadIdx.x / kPerRow) * kBlockBytes<W> +
         copy % kPerBlock * kCopyBytes;
    keepInLoop(to);
  }

  __device__ __forceinline__ void start(unsigned char* stage, int firstDepth) const {
    int const at = firstDepth * kBits<W> / 8 + threadIdx.x % kPerRow * kCopyBytes;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      // A multiple of 8 columns further on lies as far from the first.
      static_assert(kApart % 8 == 0);
      copyAsync16(stage + to + i * kApart * kBlockBytes<W>, from + place(i * apart, bytes, at),
                  i < count && at < bytes);
    }
  }
};
template <class S>
struct WeightCopies<Mxfp4, false, S> : BlockCopies<Mxfp4, S> {
  using BlockCopies<Mxfp4, S>::BlockCopies;
};
template <class S>
struct WeightCopies<Packed4, false, S> : BlockCopies<Packed4, S> {
  using BlockCopies<Packed4, S>::BlockCopies;
};
template <class S>
struct WeightCopies<Packed8, false, S> : BlockCopies<Packed8, S> {
  using BlockCopies<Packed8, S>::BlockCopies;
};

}  // namespace llmexport
